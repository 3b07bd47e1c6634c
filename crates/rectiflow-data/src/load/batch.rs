//! From samples of one bucket to one contiguous host batch: latents, prompts, tokens, conditioning.
//!
//! In `local` mode text is read one bucket at a time and kept: the data set's text is held in
//! memory, about 1 kB per sample with long captions. In `window` mode it arrives with the window
//! (`feed`). Prompts are drawn and tokenised once per pass, keyed by (seed, sample, pass), so that
//! drawing twice returns the same text.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use half::f16;
use rayon::prelude::*;

use crate::{
    dataset::{Dataset, batch_latents::BatchLatents},
    error::Result,
    format::{
        manifest::Split,
        record::{Record, SampleId},
    },
    order::{Amount, window::RowRef},
    remote::buffers::Buffers,
    rng::{Purpose, Rng},
    text::{
        prompt::{self, PromptSettings},
        token::{CHUNK_LEN, Clip, Cut, TokenChunks, Tokenizer, empty_chunk},
    },
};

/// One data set of a run.
#[derive(Debug, Clone)]
pub struct Source {
    /// The opened data set.
    pub dataset: Arc<Dataset>,
    /// How prompts are drawn from its text.
    pub prompt: PromptSettings,
    /// Its part of an epoch.
    pub amount: Amount,
}

/// A host batch: n samples of one bucket of one data set.
#[derive(Debug, Clone, PartialEq)]
pub struct MicroBatch {
    /// Its number in the step.
    pub slot: u32,
    /// Index of its first sample among all samples of the step, over all ranks.
    pub first_sample: u64,
    /// Index of the data set.
    pub data: u32,
    /// Index of the bucket in that data set's manifest.
    pub bucket: u32,
    /// Width of its images.
    pub width_px: u32,
    /// Height of its images.
    pub height_px: u32,
    /// Channels, height and width of a latent.
    pub latent_shape: [usize; 3],
    /// Posterior means, unscaled, `[n, C, h, w]`.
    pub latents: BatchLatents,
    /// Ids of the samples, `[n]`.
    pub ids: Vec<SampleId>,
    /// The pass of each, from 0.
    pub passes: Vec<u64>,
    /// The prompt of each.
    pub prompts: Vec<String>,
    /// Whether the prompt of each was dropped, to nothing or to quality words only.
    pub dropped: Vec<bool>,
    /// Number of 75-token chunks of each, 1 to 3.
    pub chunks: Vec<u32>,
    /// Number of chunks of the longest prompt: the second dimension of the ids.
    pub tokens: usize,
    /// Ids for CLIP-L, `[n, tokens, 77]`. Chunks beyond a sample's own hold no text and must be
    /// masked.
    pub clip_l: Vec<i64>,
    /// Ids for bigG, `[n, tokens, 77]`.
    pub clip_g: Vec<i64>,
    /// Original height and width, crop top and left, target height and width, in pixels, `[n, 6]`.
    pub time_ids: Vec<f32>,
    /// 1 for a sample that counts, 0 for padding, `[n]`.
    pub weights: Vec<f32>,
}

/// A rank's part of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The step, from 0.
    pub step: u64,
    /// The epoch of the step's first micro-batch.
    pub epoch: u64,
    /// Samples of the whole step over all ranks: the divisor of a sum of losses.
    pub num_samples: u64,
    /// This rank's micro-batches, in slot order.
    pub micro_batches: Vec<MicroBatch>,
}

/// The samples of a micro-batch, and its place in the step.
#[derive(Debug, Clone)]
pub(crate) struct Members {
    pub(crate) slot: u32,
    pub(crate) first_sample: u64,
    pub(crate) data: u32,
    pub(crate) bucket: u32,
    pub(crate) row_refs: Vec<RowRef>,
}

/// The records of a bucket, in row order.
type Records = Arc<Vec<Record>>;
/// The same; none until they are read.
type RecordCache = Arc<Mutex<Option<Records>>>;

/// Reads, draws and tokenises the samples of one split.
#[derive(Debug)]
pub(crate) struct Batcher {
    sources: Vec<Source>,
    split: Split,
    seed: u64,
    tokenizer: &'static Tokenizer,
    /// Memory of the latents of dropped batches.
    buffers: Buffers<f16>,
    /// Records by data set and bucket.
    texts: Mutex<HashMap<(u32, u32), RecordCache>>,
}

impl Batcher {
    pub(crate) fn new(sources: Vec<Source>, split: Split, seed: u64) -> Self {
        Self {
            sources,
            split,
            seed,
            tokenizer: Tokenizer::shared(),
            buffers: Buffers::default(),
            texts: Mutex::default(),
        }
    }

    /// The data sets of the run.
    pub(crate) fn sources(&self) -> &[Source] {
        &self.sources
    }

    /// A data set of the run.
    pub(crate) fn source(&self, data: u32) -> &Source {
        &self.sources[data as usize]
    }

    /// Memory for the latents of batches.
    pub(crate) fn buffers(&self) -> &Buffers<f16> {
        &self.buffers
    }

    /// Chunk counts of samples of one bucket, on all cores.
    pub(crate) fn count(&self, data: u32, bucket: u32, row_refs: &[RowRef]) -> Result<Vec<u8>> {
        let texts = self.texts(data, bucket)?;
        Ok(self.count_of(data, row_refs, |row| &texts[row as usize]))
    }

    /// Chunk counts of samples whose records the caller has, on all cores.
    pub(crate) fn count_of<'r>(
        &self,
        data: u32,
        row_refs: &[RowRef],
        record: impl Fn(u32) -> &'r Record + Sync,
    ) -> Vec<u8> {
        let settings = &self.sources[data as usize].prompt;
        let count = |row_ref: &RowRef| {
            let prompt = self.prompt(settings, record(row_ref.row), row_ref.pass);
            self.tokenizer.num_chunks(&prompt, settings.cut) as u8
        };
        row_refs.par_iter().map(count).collect()
    }

    /// Reads a micro-batch.
    pub(crate) fn assemble(&self, members: &Members) -> Result<MicroBatch> {
        let dataset = &self.source(members.data).dataset;
        let texts = self.texts(members.data, members.bucket)?;
        let mut records = Vec::with_capacity(members.row_refs.len());
        let mut rows = Vec::with_capacity(members.row_refs.len());
        for row_ref in &members.row_refs {
            records.push(&texts[row_ref.row as usize]);
            rows.push(u64::from(row_ref.row));
        }
        let row_len: usize = dataset.latent_shape(members.bucket).iter().product();
        let mut latents = BatchLatents::unwritten(&self.buffers, rows.len() * row_len);
        dataset.read_latents(self.split, members.bucket, &rows, &mut latents)?;
        Ok(self.finish(members, &records, latents))
    }

    /// A micro-batch of samples whose records and latents the caller has.
    pub(crate) fn finish(
        &self,
        members: &Members,
        records: &[&Record],
        latents: BatchLatents,
    ) -> MicroBatch {
        let Source {
            dataset,
            prompt: settings,
            ..
        } = self.source(members.data);
        // Text.
        let mut prompts = Vec::with_capacity(records.len());
        let mut dropped = Vec::with_capacity(records.len());
        for (record, row_ref) in records.iter().zip(&members.row_refs) {
            let prompt = self.prompt(settings, record, row_ref.pass);
            dropped.push(prompt::is_dropped(record, &prompt));
            prompts.push(prompt);
        }
        let tokenized = Tokenized::new(self.tokenizer, &prompts, settings.cut);
        // All samples of a bucket have the target size of the first.
        MicroBatch {
            slot: members.slot,
            first_sample: members.first_sample,
            data: members.data,
            bucket: members.bucket,
            width_px: records[0].target_width_px,
            height_px: records[0].target_height_px,
            latent_shape: dataset.latent_shape(members.bucket),
            latents,
            ids: records.iter().map(|record| record.id).collect(),
            passes: members.row_refs.iter().map(|at| at.pass).collect(),
            prompts,
            dropped,
            chunks: tokenized.chunks,
            tokens: tokenized.longest,
            clip_l: tokenized.clip_l,
            clip_g: tokenized.clip_g,
            time_ids: records.iter().flat_map(|record| time_ids(record)).collect(),
            weights: vec![1.0; records.len()],
        }
    }

    /// The samples of a micro-batch.
    pub(crate) fn ids(&self, members: &Members) -> Result<Vec<SampleId>> {
        let texts = self.texts(members.data, members.bucket)?;
        let mut ids = Vec::with_capacity(members.row_refs.len());
        for row_ref in &members.row_refs {
            ids.push(texts[row_ref.row as usize].id);
        }
        Ok(ids)
    }

    fn prompt(&self, settings: &PromptSettings, record: &Record, pass: u64) -> String {
        prompt::draw(
            record,
            settings,
            &mut Rng::keyed(self.seed, Purpose::Prompt, &[record.id.0, pass]),
        )
    }

    /// A bucket's records, read on the first call.
    fn texts(&self, data: u32, bucket: u32) -> Result<Records> {
        let text = self
            .texts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry((data, bucket))
            .or_default()
            .clone();
        // Held while reading: another thread that needs this bucket would read the same bytes.
        // Other buckets are not blocked.
        let mut text = text.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*text {
            return Ok(known.clone());
        }
        let read = Arc::new(
            self.sources[data as usize]
                .dataset
                .records(self.split, bucket)?,
        );
        *text = Some(read.clone());
        Ok(read)
    }
}

/// The token ids of a micro-batch.
struct Tokenized {
    /// Number of chunks of each prompt.
    chunks: Vec<u32>,
    /// Number of chunks of the longest prompt.
    longest: usize,
    /// Ids for CLIP-L, `[n, longest, 77]`.
    clip_l: Vec<i64>,
    /// Ids for bigG, `[n, longest, 77]`.
    clip_g: Vec<i64>,
}

impl Tokenized {
    fn new(tokenizer: &Tokenizer, prompts: &[String], cut: Cut) -> Self {
        let mut samples = Vec::with_capacity(prompts.len());
        let mut chunks = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let sample = tokenizer.chunks_cut(prompt, cut);
            chunks.push(sample.clip_l.len() as u32);
            samples.push(sample);
        }
        let longest = chunks.iter().max().map_or(1, |&longest| longest as usize);
        Self {
            clip_l: padded(&samples, longest, Clip::L),
            clip_g: padded(&samples, longest, Clip::G),
            longest,
            chunks,
        }
    }
}

/// Chunks of all samples, `[n, longest, 77]`, shorter ones padded with chunks without text.
fn padded(samples: &[TokenChunks], longest: usize, clip: Clip) -> Vec<i64> {
    let empty = empty_chunk(clip);
    let mut ids = Vec::with_capacity(samples.len() * longest * CHUNK_LEN);
    for sample in samples {
        let chunks = match clip {
            Clip::L => &sample.clip_l,
            Clip::G => &sample.clip_g,
        };
        for at in 0..longest {
            ids.extend(chunks.get(at).unwrap_or(&empty));
        }
    }
    ids
}

fn time_ids(record: &Record) -> [f32; 6] {
    let sizes = [
        record.original_height_px,
        record.original_width_px,
        record.crop_top_px,
        record.crop_left_px,
        record.target_height_px,
        record.target_width_px,
    ];
    sizes.map(|size| size as f32)
}
