//! The sections of a recipe that belong to no other module, with their defaults and the checks that
//! need only the section itself.
//!
//! The other sections are in the modules that use them: `guard`, `lr`, the optimiser, the average,
//! the ranks. No section depends on the whole recipe.

use std::{path::PathBuf, sync::Arc};

use rectiflow_data::{
    Bucket,
    cache::DiskCache,
    order::{Amount, Mode},
    prompt::PromptSettings,
};
use rectiflow_sdxl::{model::Component, sample::SampleSettings};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{error::Problems, hardware::hardware, state::precision::Precision};

/// `[run]`: where the run is stored, and on what it runs.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The run folder, for checkpoints, `metrics.jsonl` and previews. A run found there is resumed.
    pub dir: PathBuf,
    /// Seed of every random number of the run.
    #[serde(default)]
    pub seed: u64,
    /// The device: `cpu`, `cuda` or `cuda:N`. With several ranks, `cuda` is the GPU of each rank's
    /// `LOCAL_RANK`.
    #[serde(default = "default_device")]
    pub device: String,
    /// Memory of each rank for latents and text read ahead from object storage, in MiB; a hard
    /// limit. Default: what the open windows of its lanes need, and one more window per lane.
    pub read_ahead_mib: Option<u64>,
    /// A folder on a local disk that keeps data from URLs, so that later epochs and runs do not
    /// fetch it again. The ranks of a machine and several runs may share it. Requires `cache_gib`;
    /// `train.mode = "owned"` requires both.
    pub cache_dir: Option<PathBuf>,
    /// Size of `cache_dir` in GiB; a hard limit. When it is full, the block that is needed last is
    /// removed first.
    pub cache_gib: Option<u64>,
    /// The GPU model of the run: `h100-sxm`, `h200-sxm`, `a100-80gb`, `rtx-4090` or another name
    /// that `rectiflow plan --hardware` lists. With it, the live line and the log show the share of
    /// the GPU's peak that is used.
    pub hardware: Option<String>,
    /// Price of all machines per hour, in any currency, at least 0. With it, the live line and the
    /// log show the money spent.
    pub price_per_hour: Option<f64>,
}

impl RunConfig {
    /// Opens the cache of `cache_dir`, if any.
    ///
    /// # Errors
    /// As [`DiskCache::open`].
    pub fn open_cache(&self) -> rectiflow_data::Result<Option<Arc<DiskCache>>> {
        let cache = self.cache_dir.as_ref().zip(self.cache_gib);
        cache
            .map(|(dir, gib)| DiskCache::open(dir, gib.saturating_mul(1 << 30)).map(Arc::new))
            .transpose()
    }

    /// Returns the problems of the cache and the hardware, as (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Problems::of("run");
        match (&self.cache_dir, self.cache_gib) {
            (Some(_), None) => {
                problems.add("cache_gib", "expected a number, since run.cache_dir is set");
            }
            (None, Some(_)) => {
                problems.add("cache_dir", "expected a folder, since run.cache_gib is set");
            }
            _ => {}
        }
        if let Some(name) = &self.hardware
            && let Err(error) = hardware(name)
        {
            problems.add("hardware", error.to_string());
        }
        problems.into_pairs()
    }
}

fn default_device() -> String {
    "cpu".to_owned()
}

/// `[model]`: the model that training starts from.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// A diffusers folder or a training checkpoint.
    pub base: PathBuf,
    /// Components that start from random weights: any of `unet`, `text_encoder` and
    /// `text_encoder_2`. The weights of all others must be in `base`.
    #[serde(default)]
    pub random: Vec<String>,
}

/// `[[data]]`: one data set.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// The folder that `rectiflow prep` wrote, or the URL of a copy of it: `s3://bucket/prefix`,
    /// `gs://`, `az://` or `http(s)://`. Credentials and endpoint are read from the environment.
    pub path: PathBuf,
    /// How often an epoch contains the data set, above 0; fractions are allowed. 1 if neither this
    /// nor `share` is set.
    pub repeats: Option<f64>,
    /// Its share of the samples of an epoch, above 0 and at most 1. If one data set has a share,
    /// all need one, and the shares sum to 1.
    pub share: Option<f64>,
    /// How prompts are made from captions and tags.
    #[serde(default)]
    pub prompt: PromptSettings,
}

impl DataConfig {
    pub(crate) fn amount(&self) -> Amount {
        match self.share {
            Some(share) => Amount::Share(share),
            None => Amount::Repeats(self.repeats.unwrap_or(1.0)),
        }
    }

    /// Returns the problems of this data set's amount; `problems` is empty and names its section.
    pub(crate) fn problems(&self, mut problems: Problems) -> Vec<(String, String)> {
        if self.share.is_some() && self.repeats.is_some() {
            problems.add("share", "expected either share or repeats, found both");
        }
        if let Some(repeats) = self.repeats {
            problems.expect_above_0("repeats", repeats);
        }
        if let Some(share) = self.share {
            let fits = share > 0.0 && share <= 1.0;
            problems.expect("share", fits, "above 0, at most 1", share);
        }
        problems.into_pairs()
    }
}

/// Which text encoders are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TextEncoders {
    /// Neither is trained.
    #[serde(rename = "frozen")]
    Frozen,
    /// Both are trained with the UNet.
    #[serde(rename = "trained")]
    Trained,
    /// CLIP-L is trained with the UNet; bigG is frozen.
    #[serde(rename = "text_encoder")]
    OnlyClipL,
    /// OpenCLIP bigG is trained with the UNet; CLIP-L is frozen.
    #[serde(rename = "text_encoder_2")]
    OnlyClipG,
}

/// `[train]`: which components are trained, on how many samples and in which batches.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Total number of samples to train on, 1 to 2^50. Repetitions count; samples that the guard
    /// skipped or undid do not, and are replaced by further ones. The run ends with the first step
    /// that reaches the number.
    pub samples: u64,
    /// Samples per micro-batch, 1 to 4096: they are in memory at the same time, and all are of one
    /// bucket.
    pub micro_batch: usize,
    /// Micro-batches per step, over all ranks, 1 to 65536: the batch is `micro_batch` x
    /// `micro_batches`, at most 16777216.
    #[serde(default = "one")]
    pub micro_batches: usize,
    /// Number of lanes that share the micro-batches of a step, a divisor of `micro_batches`; it is
    /// also the largest possible number of ranks. Default: the largest divisor of `micro_batches`
    /// that is at most 64.
    pub lanes: Option<usize>,
    /// How an epoch is shuffled. `local` permutes all samples of a bucket, for data on a disk.
    /// `window` permutes blocks and shuffles the samples within a window of blocks, for data in
    /// object storage, so that every byte is fetched once per epoch. `owned` assigns each lane a
    /// share of the blocks, which stays on the disk of its machine (`run.cache_dir`) and is fully
    /// shuffled from the second epoch on. `auto` takes `window` for data at URLs that is larger
    /// than 2 GiB, and `local` otherwise.
    #[serde(default = "auto")]
    #[schemars(with = "String")]
    pub mode: Mode,
    /// Size in samples, 1 to 4294967295, of the window within which micro-batches are grouped by
    /// their number of 75-token chunks. In `window` mode, and in the first epoch of `owned` mode,
    /// it is also the window within which samples are shuffled.
    #[serde(default = "default_window")]
    pub window_samples: u64,
    /// Which text encoders are trained with the UNet: `frozen` (none), `trained` (both), or the
    /// name of one. `lr.ratio` sets their learning rates.
    #[serde(default = "frozen")]
    pub text_encoders: TextEncoders,
    /// Precision of training. With `bf16` the model computes in bf16 with copies of the weights,
    /// while the weights themselves, the sum of gradients and the moments stay in fp32: half the
    /// memory for activations, and faster where the device has fast bf16 instructions, as GPUs
    /// have. docs/numerics.md lists the precision of every tensor.
    #[serde(default)]
    pub dtype: Precision,
    /// Offset noise, 0 to 1: the standard deviation of a normal number that is added to the noise
    /// of each channel of a sample, so that the model learns to change the mean of a picture. 0.03
    /// to 0.1 is usual for eps and v; flow models need none.
    #[serde(default)]
    pub offset_noise: f64,
    /// Largest norm of the gradient, above 0; larger gradients are scaled down to it. The default
    /// is the article's.
    #[serde(default = "one_f64")]
    pub clip_norm: f64,
    /// Whether each tensor is updated during the backward pass, as soon as its gradient is
    /// complete, and the gradient freed: there is no sum of gradients, which takes 4 bytes a
    /// parameter. The norm of the whole gradient is known only after the update. So
    /// `micro_batches` must be 1, `guard.skip_by` must be `loss`, `guard.clip_z` and the vital
    /// signs must be off, and `clip_ratio` takes the place of `clip_norm`. After a gradient that is
    /// not finite the run goes back to the newest snapshot or checkpoint. docs/one-card.md has all
    /// of it.
    #[serde(default)]
    pub update_in_backward: bool,
    /// With `update_in_backward`: the largest norm of a tensor's gradient as a multiple of its
    /// running mean, above 1; a larger gradient is scaled down to it. The first 10 updates have no
    /// limit.
    #[serde(default = "default_clip_ratio")]
    pub clip_ratio: f64,
}

impl TrainConfig {
    /// Whether a component is trained.
    pub fn trains(&self, component: Component) -> bool {
        use TextEncoders::{Frozen, OnlyClipG, OnlyClipL, Trained};
        match (component, self.text_encoders) {
            (Component::UNet, _) | (Component::ClipL | Component::ClipG, Trained) => true,
            (Component::ClipL, OnlyClipL) | (Component::ClipG, OnlyClipG) => true,
            (Component::ClipL, Frozen | OnlyClipG)
            | (Component::ClipG, Frozen | OnlyClipL)
            | (Component::Vae, _) => false,
        }
    }

    /// Returns the problems of these settings, as (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Problems::of("train");
        problems.expect_count("samples", self.samples, MOST_SAMPLES);
        self.check_batch(&mut problems);
        problems.expect_count("window_samples", self.window_samples, u32::MAX.into());
        if let Some(lanes) = self.lanes {
            problems.expect(
                "lanes",
                lanes > 0 && self.micro_batches.is_multiple_of(lanes),
                &format!("a divisor of train.micro_batches = {}", self.micro_batches),
                lanes,
            );
        }
        problems.expect_above_0("clip_norm", self.clip_norm);
        problems.expect_above_1("clip_ratio", self.clip_ratio);
        if self.update_in_backward && self.micro_batches != 1 {
            let reason = format!(
                "expected train.micro_batches = 1, since the gradients of several would have to be \
                 summed before any update; found {}",
                self.micro_batches
            );
            problems.add("update_in_backward", reason);
        }
        problems.expect(
            "offset_noise",
            (0.0..=1.0).contains(&self.offset_noise),
            "0 to 1",
            self.offset_noise,
        );
        problems.into_pairs()
    }

    /// Checks the sizes that memory is reserved for before anything is read.
    fn check_batch(&self, problems: &mut Problems) {
        let (micro_batch, micro_batches) = (self.micro_batch as u64, self.micro_batches as u64);
        problems.expect_count("micro_batch", micro_batch, MOST_MICRO_BATCH);
        problems.expect_count("micro_batches", micro_batches, MOST_MICRO_BATCHES);
        let batch = micro_batch.saturating_mul(micro_batches);
        let each_fits = micro_batch <= MOST_MICRO_BATCH && micro_batches <= MOST_MICRO_BATCHES;
        if each_fits && batch > MOST_BATCH {
            let reason = format!(
                "expected train.micro_batch x train.micro_batches of at most {MOST_BATCH}, found \
                 {batch}"
            );
            problems.add("micro_batches", reason);
        }
    }
}

/// The most samples of a run, 10^15.
const MOST_SAMPLES: u64 = 1 << 50;
/// The most samples of a micro-batch, as of the pictures that are sampled together.
const MOST_MICRO_BATCH: u64 = 4096;
/// The most micro-batches of a step.
const MOST_MICRO_BATCHES: u64 = 1 << 16;
/// The most samples of a step.
const MOST_BATCH: u64 = 1 << 24;

fn frozen() -> TextEncoders {
    TextEncoders::Frozen
}
fn one() -> usize {
    1
}
fn one_f64() -> f64 {
    1.0
}
fn default_clip_ratio() -> f64 {
    3.0
}
fn auto() -> Mode {
    Mode::Auto
}
fn default_window() -> u64 {
    2048
}

/// `[checkpoint]`: when checkpoints are written, and how many are kept.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps between checkpoints, at least 1. The end of a run and an interrupt also write one.
    pub every_steps: u64,
    /// Number of newest checkpoints to keep, at least 1; older ones are removed.
    pub keep: usize,
    /// Checkpoints whose step is a multiple of this are kept forever; 0 keeps only the newest. A
    /// multiple of `every_steps`.
    pub keep_every_steps: u64,
    /// Whether training continues while a checkpoint is written. This takes host memory for a copy:
    /// on rank 0, 12 bytes per trained parameter (16 with `ema`); on the others, their parts of the
    /// moments.
    pub in_background: bool,
    /// Seconds, 0 to 604800, for which the last checkpoint of a run is tried again if it cannot be
    /// written, for example because the disk is full. Free some space meanwhile, or move the folder
    /// `checkpoints` to another disk and put a link in its place, which the next try follows. After
    /// that it is written to `spare_dir`, and from there to `mirror`.
    pub retry_secs: u64,
    /// Address of a copy of the run: `s3://bucket/run`, `gs://`, `az://` or `file:///folder`.
    /// Checkpoints, `metrics.jsonl`, previews and black boxes are copied while training continues,
    /// and old checkpoints are removed on both sides. A run folder without checkpoints, on another
    /// machine for example, resumes from the newest one there. Credentials and endpoint are read
    /// from the environment. Each run needs an address of its own.
    pub mirror: Option<String>,
    /// Most megabits a second, above 0, that are sent to `mirror`. Default: no limit.
    pub mirror_mbit: Option<f64>,
    /// Seconds, 0 to 604800, for which the end of a run waits for a `mirror` to which no byte can
    /// be sent. While bytes are sent, it waits for all of them.
    pub mirror_wait_secs: u64,
    /// Folder for the last checkpoint of a run if `checkpoints` cannot be written for `retry_secs`.
    /// Default: the system's folder for temporary files, then `/dev/shm`, which is in memory. Only
    /// for runs on one machine.
    pub spare_dir: Option<PathBuf>,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self {
            every_steps: 500,
            keep: 3,
            keep_every_steps: 0,
            in_background: true,
            retry_secs: 3600,
            mirror: None,
            mirror_mbit: None,
            mirror_wait_secs: 300,
            spare_dir: None,
        }
    }
}

/// A week.
const MOST_RETRY_SECS: u64 = 604_800;

impl CheckpointConfig {
    /// Returns the problems of these settings, as (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Problems::of("checkpoint");
        problems.expect_at_least_1("every_steps", self.every_steps);
        problems.expect_at_least_1("keep", self.keep as u64);
        let every = self.every_steps;
        if every > 0 && !self.keep_every_steps.is_multiple_of(every) {
            let reason = format!(
                "expected a multiple of checkpoint.every_steps = {every}, since no others are \
                 written; found {}",
                self.keep_every_steps
            );
            problems.add("keep_every_steps", reason);
        }
        let fits = self.retry_secs <= MOST_RETRY_SECS;
        problems.expect("retry_secs", fits, "0 to 604800", self.retry_secs);
        let wait = self.mirror_wait_secs;
        let fits = wait <= MOST_RETRY_SECS;
        problems.expect("mirror_wait_secs", fits, "0 to 604800", wait);
        if let Some(mbit) = self.mirror_mbit {
            problems.expect_above_0("mirror_mbit", mbit);
        }
        if let Some(url) = &self.mirror
            && let Err(error) = Bucket::check_address(url)
        {
            problems.add("mirror", error.to_string());
        }
        problems.into_pairs()
    }
}

/// `[memory]`: limits on memory, and which activations are recomputed.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Activation checkpointing of the UNet; gradients do not depend on it. `off` keeps everything
    /// that the backward pass needs. `full` keeps only the inputs of each residual and transformer
    /// block, and recomputes the rest. `budget` recomputes as few blocks as it takes to stay within
    /// `budget_gib`, first those that save the most bytes for their cost.
    pub checkpointing: Checkpointing,
    /// Memory in GiB, above 0, that the whole run may take on its device, with `checkpointing =
    /// "budget"`. The estimate at the start of the run decides; a run that does not fit with all
    /// blocks recomputed does not start.
    pub budget_gib: Option<f64>,
    /// Memory of the device in GiB, above 0. A run that needs more by the estimate does not start.
    /// Default: the memory that the system has available on a CPU, no limit on a GPU.
    pub device_gib: Option<f64>,
}

/// Which blocks of the UNet are recomputed in the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Checkpointing {
    /// No block.
    #[default]
    Off,
    /// All blocks.
    Full,
    /// As few blocks as it takes to stay within a budget.
    Budget,
}

impl MemoryConfig {
    /// Returns the problems of these settings, as (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Problems::of("memory");
        if let Some(gib) = self.device_gib {
            problems.expect_above_0("device_gib", gib);
        }
        if let Some(gib) = self.budget_gib {
            problems.expect_above_0("budget_gib", gib);
        }
        match (self.checkpointing, self.budget_gib) {
            (Checkpointing::Budget, None) => {
                problems.add(
                    "budget_gib",
                    "missing; memory.checkpointing = \"budget\" requires it",
                );
            }
            (Checkpointing::Off | Checkpointing::Full, Some(_)) => {
                problems.add(
                    "budget_gib",
                    "only memory.checkpointing = \"budget\" uses it; memory.device_gib sets a \
                     limit without it",
                );
            }
            _ => {}
        }
        problems.into_pairs()
    }

    /// Returns the memory that the whole run may take, in bytes.
    pub(crate) fn budget_bytes(&self) -> Option<u64> {
        self.budget_gib.map(bytes)
    }

    /// Returns the memory of the device in bytes, if the recipe sets it.
    pub(crate) fn device_bytes(&self) -> Option<u64> {
        self.device_gib.map(bytes)
    }
}

fn bytes(gib: f64) -> u64 {
    (gib * f64::from(1 << 30)) as u64
}

/// `[test]`: when and how the test loss is measured.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TestConfig {
    /// Steps between measurements, at least 1; the first measurement is before training, the last
    /// at its end.
    pub every_steps: u64,
    /// Number of equal ranges of noise levels that are reported separately, 1 to 100.
    pub bins: usize,
    /// Number of training samples, chosen by hash, whose loss is measured in the same way; 0
    /// measures none.
    pub training_samples: usize,
}

impl Default for TestConfig {
    fn default() -> Self {
        Self {
            every_steps: 500,
            bins: 10,
            training_samples: 0,
        }
    }
}

impl TestConfig {
    /// Returns the problems of these settings, as (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Problems::of("test");
        problems.expect_at_least_1("every_steps", self.every_steps);
        let fits = (1..=100).contains(&self.bins);
        problems.expect("bins", fits, "1 to 100", self.bins);
        problems.into_pairs()
    }
}

/// `[preview]`: preview pictures sampled during training.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PreviewConfig {
    /// Steps between sets of pictures, at least 1; the first set is before training, the last at
    /// its end.
    pub every_steps: u64,
    /// Prompts, one per picture. Without prompts, the default, no pictures are sampled.
    pub prompts: Vec<String>,
    /// Negative prompt: what guidance steers the pictures away from, with `cfg` above 1.
    pub negative: String,
    /// How the pictures are sampled; `batch` is ignored.
    pub sample: SampleSettings,
}

impl Default for PreviewConfig {
    fn default() -> Self {
        Self {
            every_steps: 500,
            prompts: Vec::new(),
            negative: String::new(),
            sample: SampleSettings::default(),
        }
    }
}

impl PreviewConfig {
    /// Returns the problems of these settings, as (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Problems::of("preview");
        problems.expect_at_least_1("every_steps", self.every_steps);
        if let (Err(error), false) = (self.sample.check(), self.prompts.is_empty()) {
            problems.add("sample", error.to_string());
        }
        problems.into_pairs()
    }
}
