//! Compiles `src/autograd.cpp` and `src/kernels.cpp` against the libtorch that torch-sys found, and links as every crate here does.

#![allow(clippy::print_stdout, reason = "cargo reads a build script's standard output")]

#[path = "../link-libtorch.rs"]
mod link_libtorch;

use std::{env, path::PathBuf};

fn main() {
    link_libtorch::main();
    let include = |base: PathBuf| base.join("include");
    let lib = env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys publishes libtorch_lib as `links` metadata");
    let beside = PathBuf::from(lib).join("..");
    // As torch-sys: headers may be elsewhere, and old builds of libtorch have the old ABI.
    let base = env::var_os("LIBTORCH_INCLUDE").map_or(beside, PathBuf::from);
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    for name in ["LIBTORCH_INCLUDE", "LIBTORCH_CXX11_ABI"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let files = ["src/autograd.cpp", "src/kernels.cpp"];
    files.iter().for_each(|file| println!("cargo::rerun-if-changed={file}"));
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .warnings(false)
        .include(include(base))
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        // libtorch's parallel loops are templates, and serial without it.
        .flag("-fopenmp")
        .files(files)
        .compile("rectiflow_shim");
}
