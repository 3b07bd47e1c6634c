//! Captioned images to packed data sets, and packed data sets to batches. Links no tensor library.
//!
//! ```text
//! image -> bucket -> (encode) + caption -> record -> shard -> manifest        prepare
//! manifest -> order -> prompt -> token -> batch -> loader                     load
//! ```

pub mod batch;
pub mod bucket;
pub mod dataset;
mod durable;
pub mod epoch;
pub mod error;
pub mod fixed;
pub mod grid;
pub mod loader;
pub mod manifest;
pub mod order;
pub mod picture;
pub mod prompt;
pub mod record;
pub mod rng;
pub mod shard;
mod text_shard;
pub mod token;
pub mod window;

pub use dataset::{BucketShape, Dataset};
pub use error::{Error, Result};
pub use manifest::{Codec, Manifest, Split};
pub use record::{Record, SampleId};
