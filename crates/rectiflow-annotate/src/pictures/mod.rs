//! What is annotated: the pictures of a source, or those of a packed data set, which are opened by
//! the address that each row keeps.

pub mod jpeg;
pub mod listed;
