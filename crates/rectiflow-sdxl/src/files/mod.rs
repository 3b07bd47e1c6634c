//! Whole models in files: a diffusers folder, a single file, and the way from one to the other.

pub mod bundle;
pub mod export;
pub mod folder;
pub(crate) mod foreign;
pub mod model;
pub(crate) mod single_file;
