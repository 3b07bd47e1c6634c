//! Comparisons: our numbers with those of other programs, and drawn pictures with real ones.

pub mod forward;
pub mod kid;
