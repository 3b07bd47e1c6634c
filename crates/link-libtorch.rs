//! Build script of every crate that ends in a binary linking libtorch: tests, examples and the command itself.
//!
//! torch-sys names the folder of the libraries but cannot set the run path of other crates' binaries; without it they
//! start only under LD_LIBRARY_PATH. Where the folder has CUDA, `--no-as-needed` keeps `libtorch_cuda`, which nothing
//! references by symbol and which registers the CUDA kernels when it is loaded.

#![allow(clippy::print_stdout, reason = "cargo reads a build script's standard output")]

use std::{env, path::Path};

pub(crate) fn main() {
    println!("cargo::rerun-if-changed=../link-libtorch.rs");
    println!("cargo::rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    let lib = env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys publishes libtorch_lib as `links` metadata");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
    if Path::new(&lib).join("libtorch_cuda.so").exists() {
        println!("cargo::rustc-link-arg=-Wl,--no-as-needed");
        println!("cargo::rustc-link-arg=-L{lib}");
        println!("cargo::rustc-link-arg=-ltorch_cuda");
    }
}
