//! Pictures from a whole model: where the tokenizer and the sampler meet.

pub mod generate;
pub mod preview;
pub mod staged_model;
