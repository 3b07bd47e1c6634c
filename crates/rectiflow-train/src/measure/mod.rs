//! What a run reports about itself: metrics, the test loss, vital signs, findings.

pub(crate) mod bins;
pub(crate) mod event_file;
pub mod findings;
pub mod metrics;
pub mod tensorboard;
pub mod testloss;
pub(crate) mod vitals;
