//! Captioned images to packed data sets, and packed data sets to batches. Links no tensor library.
//!
//! ```text
//! image -> bucket -> (encode) + caption -> record -> shard -> manifest        prepare
//! manifest -> order -> prompt -> token -> batch -> loader                     load
//! ```

pub mod error;
pub mod grid;
pub mod picture;
pub mod rng;
pub mod token;

pub use error::{Error, Result};
