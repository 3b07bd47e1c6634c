//! What a run reports about itself: metrics, the test loss, vital signs, findings,
//! and the files of other programs.

pub(crate) mod bins;
pub mod findings;
pub mod metrics;
pub mod mirrors;
pub mod testloss;
pub(crate) mod vitals;
