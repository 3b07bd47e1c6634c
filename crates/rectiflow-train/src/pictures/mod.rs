//! Pictures from a whole model: the tokenizer and the sampler meet here.

pub mod generate;
pub mod preview;
pub mod staged_model;
