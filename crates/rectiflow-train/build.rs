//! Links libtorch as every crate does, and compiles `cpp/c10d.cpp` against its headers.
//!
//! With the feature `nccl`, `RECTIFLOW_CUDA_INCLUDE` names the folders of CUDA's and NCCL's headers, separated by colons.

#[path = "../link-libtorch.rs"]
mod link_libtorch;

use std::{env, path::Path};

fn main() {
    link_libtorch::main();
    println!("cargo::rerun-if-changed=cpp");
    for name in ["LIBTORCH_INCLUDE", "LIBTORCH_CXX11_ABI", "RECTIFLOW_CUDA_INCLUDE"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let lib = env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys publishes libtorch_lib as `links` metadata");
    let root = env::var("LIBTORCH_INCLUDE").map_or_else(|_| Path::new(&lib).join(".."), Into::into);
    let include = root.join("include");
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").file("cpp/c10d.cpp").include("cpp").define("USE_C10D_GLOO", None);
    build.define("_GLIBCXX_USE_CXX11_ABI", abi.as_str());
    // As system folders, so that warnings are about our file alone.
    for folder in [include.join("torch/csrc/api/include"), include] {
        build.flag("-isystem").flag(folder.display().to_string());
    }
    if env::var_os("CARGO_FEATURE_NCCL").is_some() {
        build.define("USE_C10D_NCCL", None);
        let folders = env::var("RECTIFLOW_CUDA_INCLUDE").unwrap_or_else(|_| "/usr/local/cuda/include".to_owned());
        for folder in folders.split(':') {
            build.flag("-isystem").flag(folder);
        }
    }
    build.compile("rectiflow_c10d");
}
