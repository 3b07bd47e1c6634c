//! Where the tests find ONNX Runtime and the files of scripts/golden/onnx_models.py.

#![allow(dead_code, reason = "each user needs its own part")]

use std::{env, path::PathBuf};

use rectiflow_annotate::onnx::runtime::{Places, VARIABLE};

/// As the command looks for it: `make test` has fetched it.
pub(crate) fn places() -> Places {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    Places {
        named: env::var_os(VARIABLE).map(PathBuf::from),
        beside: None,
        cache: cache.or(home).map(|folder| folder.join("rectiflow")),
    }
}

/// A file of the folder with models and pictures.
pub(crate) fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}
