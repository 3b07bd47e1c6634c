//! What a run reports about itself: metrics, the test loss, vital signs, findings,
//! and the files of other programs.

pub(crate) mod bins;
pub mod findings;
pub mod metrics;
pub mod testloss;
pub mod trackers;
pub(crate) mod vitals;
