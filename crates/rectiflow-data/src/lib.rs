//! Captioned images to packed data sets, and packed data sets to batches. Links no tensor library.
//!
//! ```text
//! image -> bucket -> (encode) + caption -> record -> shard -> manifest        prepare
//! manifest -> order -> prompt -> token -> batch -> loader                     load
//! ```

mod aws_profile;
pub mod batch;
pub mod bucket;
mod buffers;
pub mod cache;
pub mod caption;
mod colour;
pub mod dataset;
mod durable;
mod encode;
pub mod epoch;
pub mod error;
mod evict;
mod feed;
mod fetch;
pub mod fixed;
mod flight;
pub mod grid;
mod held;
pub mod image;
mod jpeg;
pub mod lanes;
pub mod loader;
pub mod manifest;
pub mod measure;
pub mod order;
pub mod pass;
pub mod picture;
mod plan;
pub mod prep;
pub mod prompt;
pub mod publish;
pub mod record;
pub mod reject;
mod remote;
pub mod rng;
mod rows;
mod scan;
pub mod shard;
mod share;
mod source;
mod split;
mod store;
mod text_shard;
pub mod token;
mod uses;
pub mod window;
mod words;

pub use dataset::{BucketShape, Dataset};
pub use error::{Error, Result};
pub use manifest::{Codec, Manifest, Split};
pub use prep::{PrepEvent, PrepSettings, PrepSummary, RgbBatch, prepare};
pub use record::{Record, SampleId};
