//! For holding our numbers against other programs', and pictures against real ones.

pub mod forward;
pub mod kid;
