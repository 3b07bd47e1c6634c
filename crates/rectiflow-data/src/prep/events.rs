//! What a preparation passes to its caller: batches to encode, how far it is, and what it did.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::reject::Reason;

/// Images of one bucket for the encoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbBatch {
    /// Width of each.
    pub width_px: u32,
    /// Height of each.
    pub height_px: u32,
    /// How many.
    pub num_images: usize,
    /// sRGB, [n, h, w, 3].
    pub pixels: Vec<u8>,
}

/// How far a preparation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PrepEvent {
    /// Files are hashed and their headers read.
    Scanning {
        /// Files looked at.
        done: u64,
        /// Files in the folder.
        num_files: u64,
        /// Rejected so far.
        rejected: u64,
    },
    /// Images are decoded, encoded and written, or latents taken over.
    Encoding {
        /// Width of the bucket at hand.
        width_px: u32,
        /// Height of the bucket at hand.
        height_px: u32,
        /// Samples done in this run.
        done: u64,
        /// Samples to do in this run.
        num_samples: u64,
        /// Samples rejected while they were encoded.
        rejected: u64,
    },
    /// Text files are written anew because captions changed.
    Rewriting {
        /// Objects done.
        done: u64,
        /// Objects whose text changed.
        num_objects: u64,
    },
}

/// Rows of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BucketCount {
    /// Width of its images.
    pub width_px: u32,
    /// Height of its images.
    pub height_px: u32,
    /// Rows to train on.
    pub train: u64,
    /// Rows held out.
    pub test: u64,
}

/// What a preparation did, and what the data set holds now.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PrepSummary {
    /// The data set's buckets.
    pub buckets: Vec<BucketCount>,
    /// Rows to train on.
    pub train_rows: u64,
    /// Rows held out.
    pub test_rows: u64,
    /// Files that are not in the data set, by reason (see `rejected.jsonl`).
    pub rejected: BTreeMap<Reason, u64>,
    /// Files that are in it with a remark, by reason (see `notes.jsonl`).
    pub notes: BTreeMap<Reason, u64>,
    /// Rows that this run wrote.
    pub written_rows: u64,
    /// Of these, rows whose latents existed already.
    pub copied_rows: u64,
    /// Rows that an interrupted run had finished.
    pub resumed_rows: u64,
    /// Rows whose text changed.
    pub rewritten_rows: u64,
    /// Rows that are deleted in the data set's bitmaps.
    pub deleted_rows: u64,
    /// Bytes of latents and text.
    pub bytes: u64,
    /// Duration of this run.
    pub secs: f64,
}
