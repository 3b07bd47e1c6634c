//! Steps for the trainer: the loader, what it reads ahead, and the fixed passes of the test loss.

pub mod batch;
pub(crate) mod feed;
pub mod fixed;
pub mod loader;
pub mod measure;
pub(crate) mod uses;
