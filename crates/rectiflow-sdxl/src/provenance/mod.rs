//! Where a picture comes from: the texts inside it by which other programs draw it again.

pub mod differences;
pub mod drawing;
mod graph;
pub mod infotext;
pub mod workflow;
