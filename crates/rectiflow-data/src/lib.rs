//! Captioned images to packed data sets, and packed data sets to batches. Links no tensor library.
//!
//! ```text
//! image -> bucket -> (encode) + caption -> record -> shard -> manifest        prepare
//! manifest -> order -> prompt -> token -> batch -> loader                     load
//! ```

pub mod cache;
pub mod dataset;
mod durable;
pub mod error;
mod format;
mod load;
pub mod order;
pub mod picture;
pub mod prep;
pub mod reject;
mod remote;
pub mod rng;
mod text;

pub use format::{block_table, bucket, manifest, record, shard};
pub use load::{batch, loader, test_batches, throughput};
pub use order::{amplification, epoch, pass, window};
pub use picture::{contact_sheet, decode};
pub use prep::publish;
pub use text::{caption, prompt, token};

pub use dataset::{BucketShape, Dataset};
pub use error::{Error, Result};
pub use format::manifest::{Codec, Manifest, Split};
pub use format::record::{Record, SampleId};
pub use prep::{PrepEvent, PrepSettings, PrepSummary, RgbBatch, prepare};
pub use remote::network::Network;
