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

pub(crate) use cache::{evict, flight};
pub(crate) use dataset::{held, rows};
pub(crate) use format::text_shard;
pub use format::{bucket, manifest, record, shard};
pub use load::{batch, fixed, loader, measure};
pub(crate) use load::{feed, uses};
pub use order::{epoch, lanes, pass, window};
pub(crate) use picture::{colour, jpeg};
pub use picture::{grid, image};
pub use prep::publish;
pub(crate) use prep::{encode, plan, scan, source, split, store};
pub(crate) use remote::{buffers, fetch};
pub(crate) use text::words;
pub use text::{caption, prompt, token};

pub use dataset::{BucketShape, Dataset};
pub use error::{Error, Result};
pub use manifest::{Codec, Manifest, Split};
pub use prep::{PrepEvent, PrepSettings, PrepSummary, RgbBatch, prepare};
pub use record::{Record, SampleId};
