//! Whole models in files: diffusers folders, single files, and the conversion between them.

pub mod bundle;
pub mod export;
pub mod folder;
pub(crate) mod foreign;
pub mod model;
pub mod prediction;
pub(crate) mod single_file;
pub mod visit;
