//! Captioned images to packed data sets, and packed data sets to batches. Links no tensor library.
//!
//! A source of pictures is turned into a data set once ([`prepare`]): each image goes into the
//! aspect bucket nearest to its shape, the caller's encoder turns it into latents, and latents and
//! text are written in blocks of 32 rows, each with a checksum. Training then reads it for days
//! ([`loader::Loader`]): the order of samples is a pure function of the data sets and the settings,
//! blocks come from memory, a local disk or an object store, and prompts are drawn and tokenised
//! while the trainer computes.
//!
//! ```text
//! prepare   picture -> bucket -> (encode) + caption -> record -> shard -> manifest
//! load      manifest -> order -> blocks (cache, remote) -> prompt -> token -> batch
//! ```
//!
//! The folders, from top to bottom; each one uses only folders below it:
//!
//! | folder | holds |
//! |---|---|
//! | `load` | steps for the trainer: the loader, its reading ahead, test batches, throughput |
//! | `prep` | a source of pictures to a packed data set: scan, encode, publish; resumable |
//! | `source` | pictures and their texts, listed and opened: folders, tars, Parquet, MDS |
//! | `board` | tables of image boards: the row of a picture, its text and its columns |
//! | `posts` | rows of such tables: Parquet, SQLite, JSON lines, CSV |
//! | `filter` | `prep.filter`: an expression on columns and tags, checked before it is asked |
//! | `captioning` | `[caption]`: modes, servers and limits of captioning models; pure |
//! | `order` | the samples of each step: passes, shares, lanes, epochs, windows; pure |
//! | `dataset` | an opened data set: its row index, verified reads, blocks kept in memory |
//! | `text` | captions to prompts to token ids, in chunks of 75 |
//! | `dedupe` | near-copies of pictures by their signatures; pure |
//! | `picture` | image files to sRGB pixels; pictures as PNG; contact sheets |
//! | `cache` | blocks on a local disk, shared by processes, up to a limit in bytes |
//! | `format` | the bytes on disk: manifest, block table, buckets, records, shards |
//! | `remote` | byte ranges from object storage, with deadlines and bounded retries |
//! | `reject`, `durable` | why a file is not in a data set; files that are whole or absent |
//! | `lock_file` | files that a process locks for as long as it lives |
//! | `text_file` | texts that a user names: regular files up to a limit |
//! | `rng`, `error` | keyed random numbers; errors by meaning |
//!
//! Only `remote` and `dataset` contain `async` code; a [`loader::Loader`] returns one step per
//! call. The crate contains no `unsafe`. `docs/format.md` specifies the format byte by byte.

mod board;
pub mod cache;
pub mod captioning;
pub mod dataset;
pub mod dedupe;
pub mod durable;
pub mod error;
mod filter;
mod format;
mod load;
pub mod lock_file;
mod nameless_file;
pub mod order;
pub mod picture;
mod posts;
pub mod prep;
pub mod reject;
mod remote;
pub mod rng;
mod source;
mod text;
pub mod text_file;

pub use board::{classes, count};
pub use format::{
    annotation, annotation_rows, annotation_table, block_table, bucket, crop, manifest, record,
    shard,
};
pub use load::{batch, loader, test_batches, throughput};
pub use order::{amplification, epoch, pass, window};
pub use picture::{contact_sheet, decode, resize};
pub use posts::values;
pub use prep::{near_copies, publish, small_pictures, speed};
pub use source::{choice, no_folder, sample, texts};
pub use text::{caption, overflow, prompt, quality_ranks, tag_list, template, token};

pub use dataset::{BucketShape, Dataset, batch_latents::BatchLatents};
pub use error::{Error, Result};
pub use format::manifest::{Codec, Manifest, Split};
pub use format::record::{Record, SampleId};
pub use prep::{PrepEvent, PrepSettings, PrepSummary, RgbBatch, prepare};
pub use remote::bucket::{Bucket, Stored};
pub use remote::{folder::RemoteFolder, network::Network, post::post_json, store::install_tls};
pub use source::Source;
