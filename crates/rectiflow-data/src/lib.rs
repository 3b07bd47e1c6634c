//! Captioned images to packed data sets, and packed data sets to batches. Links no tensor library.
//!
//! ```text
//! image -> bucket -> (encode) + caption -> record -> shard -> manifest        prepare
//! manifest -> order -> prompt -> token -> batch -> loader                     load
//! ```

pub mod epoch;
pub mod error;
pub mod grid;
pub mod order;
pub mod picture;
pub mod rng;
pub mod token;
pub mod window;

pub use error::{Error, Result};
