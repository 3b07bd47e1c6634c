//! Pictures drawn with a whole model: where the tokenizer and the sampler meet.

pub mod draw;
pub mod gallery;
pub mod preview;
pub mod staged;
