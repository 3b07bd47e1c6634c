//! Models in ONNX files that look at a picture: found, opened and run.
//!
//! ONNX Runtime is a shared library that is loaded when the first model is opened (`runtime`);
//! nothing is compiled against it. A model says what it takes (`input`) and returns (`output`);
//! `preparation` turns a picture into that, on several threads, while `model` runs the pictures
//! before it (`feed`).

mod convolution;
pub mod feed;
pub mod input;
pub mod model;
pub mod output;
pub mod preparation;
mod resample;
pub mod runtime;
