//! What a run reports about itself: metrics, the test loss, vital signs, findings.

pub(crate) mod bins;
pub mod findings;
pub mod metrics;
pub mod testloss;
pub(crate) mod vitals;
