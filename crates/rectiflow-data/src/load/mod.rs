//! Steps for the trainer: the loader, what it reads ahead, and the fixed passes of the test loss.

pub mod batch;
pub(crate) mod feed;
pub mod loader;
pub(crate) mod next_use;
pub mod test_batches;
pub mod throughput;
