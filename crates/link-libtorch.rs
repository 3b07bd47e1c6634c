//! Build script of every crate that ends in a binary linking libtorch: tests, examples and the
//! command itself.
//!
//! torch-sys names the folder of the libraries but cannot set the run path of other crates'
//! binaries; without it they start only under LD_LIBRARY_PATH. Where the folder has CUDA,
//! `--no-as-needed` keeps `libtorch_cuda`, which nothing references by symbol and which registers
//! the CUDA kernels when it is loaded.
//!
//! A crate's C++ files, `src/*/*.cpp`, are what libtorch has and `tch` does not bind. Each has a C
//! interface. With a libtorch that has CUDA they are compiled for NCCL too, which needs CUDA's and
//! NCCL's headers; `scripts/libtorch.py` installs them beside it. `RECTIFLOW_CUDA_INCLUDE` names
//! other folders of them, separated by colons. Without them a build has no NCCL and says so; with
//! the feature `nccl` it fails instead.

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
    if has_cuda(Path::new(&lib)) {
        println!("cargo::rustc-link-arg=-Wl,--no-as-needed");
        println!("cargo::rustc-link-arg=-L{lib}");
        println!("cargo::rustc-link-arg=-ltorch_cuda");
    }
    compile_cpp(Path::new(&lib));
}

/// Compiles the crate's C++ files, if it has any, as torch-sys compiles its own.
fn compile_cpp(lib: &Path) {
    let mut files: Vec<PathBuf> = ["src/torch", "src/ranks"]
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
    // Compiled as one: what they do takes less time to compile than libtorch's headers.
    files.sort();
    let folder = env::current_dir().expect("cargo starts build scripts in the crate's folder");
    let include = |file: &PathBuf| format!("#include \"{}\"\n", folder.join(file).display());
    let all = Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("all.cpp");
    fs::write(&all, files.iter().map(include).collect::<String>()).expect("OUT_DIR is writable");
    let root = env::var("LIBTORCH_INCLUDE").map_or_else(|_| lib.join(".."), PathBuf::from);
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".into());
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .opt_level(3) // whatever the crate's Rust is compiled with
        .file(all)
        .include("..") // guarded.h
        .include(root.join("include"))
        .include(root.join("include/torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .define("NDEBUG", None) // as libtorch: members of its classes depend on it
        .define("USE_C10D_GLOO", None)
        .flag("-fopenmp") // libtorch's parallel loops are templates, and serial without it
        .warnings(false); // libtorch's headers
    // Headers that libtorch's own need and its wheel does not have.
    if Path::new("cpp").is_dir() {
        println!("cargo::rerun-if-changed=cpp");
        build.include("cpp");
    }
    println!("cargo::rerun-if-env-changed=RECTIFLOW_CUDA_INCLUDE");
    if let Some(folders) = nccl_includes(lib) {
        build.define("USE_C10D_NCCL", None).includes(folders);
    }
    build.compile(&format!(
        "{}_cpp",
        env::var("CARGO_PKG_NAME").expect("cargo sets it")
    ));
}

/// Headers that c10d's own header for NCCL includes, directly or not.
const NCCL_HEADERS: [&str; 3] = ["nccl.h", "cuda_runtime_api.h", "crt/host_defines.h"];

/// Returns the folders with [`NCCL_HEADERS`], if this libtorch has CUDA and all of them are found.
fn nccl_includes(lib: &Path) -> Option<Vec<PathBuf>> {
    let is_demanded = env::var_os("CARGO_FEATURE_NCCL").is_some();
    if !has_cuda(lib) {
        assert!(
            !is_demanded,
            "the feature nccl needs a libtorch with CUDA; {} has no libtorch_cuda.so",
            lib.display()
        );
        return None;
    }
    let folders = cuda_includes(lib);
    let is_missing = |name: &&str| !folders.iter().any(|folder| folder.join(name).is_file());
    let missing: Vec<&str> = NCCL_HEADERS.into_iter().filter(is_missing).collect();
    if missing.is_empty() {
        return Some(folders);
    }
    let reason = format!(
        "built without NCCL, so without several ranks on GPUs: {} not found; `scripts/libtorch.py` \
         installs a libtorch with CUDA and these headers, or set RECTIFLOW_CUDA_INCLUDE to their \
         folders, separated by colons",
        missing.join(", ")
    );
    assert!(!is_demanded, "{reason}");
    println!("cargo::warning={reason}");
    None
}

fn has_cuda(lib: &Path) -> bool {
    lib.join("libtorch_cuda.so").exists()
}

/// Returns the folders of headers that the user names; otherwise those of NVIDIA's Python packages
/// beside torch's, and that of CUDA's installer.
fn cuda_includes(lib: &Path) -> Vec<PathBuf> {
    if let Ok(named) = env::var("RECTIFLOW_CUDA_INCLUDE") {
        return named.split(':').map(PathBuf::from).collect();
    }
    let packages = lib.join("../../nvidia");
    let mut folders = vec![
        packages.join("cu13/include"),
        packages.join("nccl/include"),
        PathBuf::from("/usr/local/cuda/include"),
    ];
    folders.retain(|folder| folder.is_dir());
    folders
}
