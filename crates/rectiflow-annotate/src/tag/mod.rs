//! Taggers: the names of a model's outputs, and which of them are a picture's tags.

pub mod choice;
pub mod labels;
