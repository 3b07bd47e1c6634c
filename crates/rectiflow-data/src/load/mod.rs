//! Steps for the trainer: the loader, its reading ahead, and the fixed passes of the test loss.

pub mod batch;
pub(crate) mod feed;
pub(crate) mod horizon;
pub(crate) mod incoming_window;
pub mod loader;
pub(crate) mod local_reader;
pub(crate) mod next_use;
pub(crate) mod scatter;
pub(crate) mod setup;
pub mod test_batches;
pub mod throughput;
