//! Build script of every crate that ends in a binary linking libtorch: tests, examples and the
//! command itself.
//!
//! torch-sys names the folder of the libraries but cannot set the run path of other crates'
//! binaries; without it they start only under LD_LIBRARY_PATH. Where the folder has CUDA,
//! `--no-as-needed` keeps `libtorch_cuda`, which nothing references by symbol and which registers
//! the CUDA kernels when it is loaded.
//!
//! A crate's C++ files, `src/*/*.cpp`, are what libtorch has and `tch` does not bind. Each has a C
//! interface. With the feature `nccl`, `RECTIFLOW_CUDA_INCLUDE` names the folders of CUDA's and
//! NCCL's headers, separated by colons.

#![allow(
    clippy::print_stdout,
    reason = "cargo reads a build script's standard output"
)]

use std::{
    env, fs,
    path::{Path, PathBuf},
};

fn main() {
    println!("cargo::rerun-if-changed=../link-libtorch.rs");
    println!("cargo::rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    let lib = env::var("DEP_TCH_LIBTORCH_LIB")
        .expect("torch-sys publishes libtorch_lib as `links` metadata");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
    if Path::new(&lib).join("libtorch_cuda.so").exists() {
        println!("cargo::rustc-link-arg=-Wl,--no-as-needed");
        println!("cargo::rustc-link-arg=-L{lib}");
        println!("cargo::rustc-link-arg=-ltorch_cuda");
    }
    compile_cpp(Path::new(&lib));
}

/// Compiles the crate's C++ files, if it has any, as torch-sys compiles its own.
fn compile_cpp(lib: &Path) {
    let files: Vec<PathBuf> = ["src/torch", "src/ranks"]
        .into_iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flatten()
        .map(|entry| entry.expect("a folder of src can be read").path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "cpp"))
        .collect();
    if files.is_empty() {
        return;
    }
    // Not the folder: a change of any Rust file would recompile all C++. After adding a file,
    // touch this script.
    for file in &files {
        println!("cargo::rerun-if-changed={}", file.display());
    }
    println!("cargo::rerun-if-changed=../guarded.h");
    for variable in ["LIBTORCH_INCLUDE", "LIBTORCH_CXX11_ABI"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let root = env::var("LIBTORCH_INCLUDE").map_or_else(|_| lib.join(".."), PathBuf::from);
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".into());
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .opt_level(3) // whatever the crate's Rust is compiled with
        .files(files)
        .include("..") // guarded.h
        .include(root.join("include"))
        .include(root.join("include/torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .define("USE_C10D_GLOO", None)
        .flag("-fopenmp") // libtorch's parallel loops are templates, and serial without it
        .warnings(false); // libtorch's headers
    // Headers that libtorch's own need and its wheel does not have.
    if Path::new("cpp").is_dir() {
        println!("cargo::rerun-if-changed=cpp");
        build.include("cpp");
    }
    if env::var_os("CARGO_FEATURE_NCCL").is_some() {
        println!("cargo::rerun-if-env-changed=RECTIFLOW_CUDA_INCLUDE");
        let folders =
            env::var("RECTIFLOW_CUDA_INCLUDE").unwrap_or_else(|_| "/usr/local/cuda/include".into());
        build
            .define("USE_C10D_NCCL", None)
            .includes(folders.split(':'));
    }
    build.compile(&format!(
        "{}_cpp",
        env::var("CARGO_PKG_NAME").expect("cargo sets it")
    ));
}
