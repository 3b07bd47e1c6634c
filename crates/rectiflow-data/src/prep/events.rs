//! What a preparation passes to its caller: batches to encode, progress, and a summary.

use std::{cmp::Reverse, collections::BTreeMap};

use serde::Serialize;

use crate::{
    board::count::{BoardCount, ClauseCount},
    format::{bucket::Bucket, manifest::Split},
    prep::{
        part::Part,
        timeline::{EncoderSecs, Stretch},
    },
    reject::{Reason, Remark},
};

/// Images of one bucket for the encoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbBatch {
    /// Width of each image.
    pub width_px: u32,
    /// Height of each image.
    pub height_px: u32,
    /// Number of images.
    pub num_images: usize,
    /// sRGB, [n, h, w, 3].
    pub pixels: Vec<u8>,
}

/// Progress of a preparation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PrepEvent {
    /// What tables and indexes say about the samples is read.
    Listing {
        /// Samples so far.
        done: u64,
        /// Samples of the source.
        num_samples: u64,
    },
    /// Files are hashed and their headers read.
    Scanning {
        /// Files scanned so far.
        done: u64,
        /// Files in the folder.
        num_files: u64,
        /// Rejected so far.
        rejected: u64,
    },
    /// A worker waits for the facts of the others.
    Waiting {
        /// Workers whose facts are missing.
        missing: u64,
        /// Number of all workers.
        num_workers: u64,
        /// Seconds since it began to wait.
        secs: u64,
    },
    /// The facts of all workers are read.
    Joining {
        /// Samples so far.
        done: u64,
        /// Samples of the source.
        num_files: u64,
    },
    /// Images are decoded, encoded and written, or existing latents are copied.
    Encoding {
        /// Width of the current bucket.
        width_px: u32,
        /// Height of the current bucket.
        height_px: u32,
        /// Samples of this run that are done.
        done: u64,
        /// Samples of this run.
        num_samples: u64,
        /// Samples rejected during encoding so far.
        rejected: u64,
    },
    /// Text files are rewritten because captions changed.
    Rewriting {
        /// Objects done.
        done: u64,
        /// Objects whose text changed.
        num_objects: u64,
    },
}

/// Numbers of rows of a bucket.
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

impl BucketCount {
    /// No rows of `bucket`.
    pub(crate) fn empty(bucket: Bucket) -> Self {
        Self {
            width_px: bucket.width_px,
            height_px: bucket.height_px,
            train: 0,
            test: 0,
        }
    }

    /// Adds rows of a split.
    pub(crate) fn add(&mut self, split: Split, rows: u64) {
        match split {
            Split::Train => self.train += rows,
            Split::Test => self.test += rows,
        }
    }
}

/// Summary of a preparation and of the resulting data set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PrepSummary {
    /// The data set's buckets.
    pub buckets: Vec<BucketCount>,
    /// Rows to train on.
    pub train_rows: u64,
    /// Rows held out.
    pub test_rows: u64,
    /// Rejected files, by reason (see `rejected.jsonl`).
    pub rejected: BTreeMap<Reason, u64>,
    /// Accepted files with a note, by reason (see `notes.jsonl`).
    pub notes: BTreeMap<Reason, u64>,
    /// The first file of each reason, by path.
    pub examples: BTreeMap<Reason, Remark>,
    /// Tables of image boards. None without them.
    pub boards: Option<BoardCount>,
    /// The clauses of `prep.filter`, and what each removes.
    pub filter: Vec<ClauseCount>,
    /// Rows that this run wrote.
    pub written_rows: u64,
    /// Of these, rows whose latents existed already.
    pub copied_rows: u64,
    /// Rows that an interrupted run had finished.
    pub resumed_rows: u64,
    /// Pictures that were read twice: they were not kept within `prep.keep_gib`.
    pub reread_pictures: u64,
    /// Rows whose text changed.
    pub rewritten_rows: u64,
    /// Rows that are marked deleted in the data set.
    pub deleted_rows: u64,
    /// Bytes of latents and text.
    pub bytes: u64,
    /// How the thread of the encoder spent its time.
    pub encoder_secs: EncoderSecs,
    /// When each thread did what, at the beginning of the run.
    #[serde(skip)]
    pub timeline: Vec<Stretch>,
    /// Duration of this run.
    pub secs: f64,
}

/// Summary of the part of a worker.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PartSummary {
    /// The worker.
    pub part: Part,
    /// Objects of the whole plan.
    pub all_objects: u64,
    /// Objects that are the worker's.
    pub own_objects: u64,
    /// Of these, objects that an earlier run had finished.
    pub resumed_objects: u64,
    /// Rows that this run wrote.
    pub written_rows: u64,
    /// Images that failed while they were encoded.
    pub failed: u64,
    /// How the thread of the encoder spent its time.
    pub encoder_secs: EncoderSecs,
    /// When each thread did what, at the beginning of the run.
    #[serde(skip)]
    pub timeline: Vec<Stretch>,
    /// Duration of this run.
    pub secs: f64,
}

impl PrepSummary {
    /// The reasons for which most files are not in the data set, with their counts; at most `most`.
    pub fn commonest_reasons(&self, most: usize) -> Vec<(Reason, u64)> {
        let mut reasons: Vec<(Reason, u64)> = Vec::new();
        for (&reason, &count) in &self.rejected {
            reasons.push((reason, count));
        }
        reasons.sort_by_key(|&(reason, count)| (Reverse(count), reason));
        reasons.truncate(most);
        reasons
    }
}
