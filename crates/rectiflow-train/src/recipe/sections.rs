//! The sections of a recipe that have no owner of their own, with their defaults and what each of them can check alone.
//!
//! The other sections stand with what they set: `guard`, `lr`, the optimiser, the average, the ranks. None of these knows
//! the recipe.

use std::{path::PathBuf, sync::Arc};

use rectiflow_data::{
    cache::DiskCache,
    order::{Amount, Mode},
    prompt::PromptSettings,
};
use rectiflow_sdxl::{model::Component, sample::SampleSettings};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{hardware::hardware, state::precision::Precision};

/// `[run]`: where the run lives and what makes it repeatable.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The run folder: checkpoints, metrics.jsonl and previews. A run found there is resumed.
    pub dir: PathBuf,
    /// Every random number of the run follows from it.
    #[serde(default)]
    pub seed: u64,
    /// `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "default_device")]
    pub device: String,
    /// Memory of each rank for latents and text that are read ahead from object storage, in MiB; a hard limit. Default:
    /// what the open windows of its lanes need, and one more window a lane.
    pub read_ahead_mib: Option<u64>,
    /// A folder on a local disk where data from URLs is kept, so that later epochs and runs need not fetch it again. The
    /// ranks of a machine and several runs may share it. Needs `cache_gib`; `train.mode = "owned"` needs both.
    pub cache_dir: Option<PathBuf>,
    /// GiB that `cache_dir` may take; a hard limit. When it is reached, what is needed last goes first.
    pub cache_gib: Option<u64>,
    /// The GPU that the run is on, so that the live line and the log can say what part of its peak is used: `h100-sxm`,
    /// `h200-sxm`, `a100-80gb`, `rtx-4090` and others that `rectiflow plan --hardware` lists.
    pub hardware: Option<String>,
    /// What an hour of all machines costs, in any currency: the live line and the log then say what was spent.
    pub price_per_hour: Option<f64>,
}

impl RunConfig {
    /// Opens the cache that it names, if any.
    ///
    /// # Errors
    /// As [`DiskCache::open`].
    pub fn open_cache(&self) -> rectiflow_data::Result<Option<Arc<DiskCache>>> {
        let cache = self.cache_dir.as_ref().zip(self.cache_gib);
        cache.map(|(dir, gib)| DiskCache::open(dir, gib.saturating_mul(1 << 30)).map(Arc::new)).transpose()
    }

    /// What is wrong with the cache and the hardware: (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let Self { cache_dir, cache_gib, hardware: name, .. } = self;
        let mut problems = match (cache_dir, cache_gib) {
            (Some(_), None) => vec![("run.cache_gib".into(), "expected a number, since run.cache_dir is given".into())],
            (None, Some(_)) => vec![("run.cache_dir".into(), "expected a folder, since run.cache_gib is given".into())],
            _ => Vec::new(),
        };
        let unknown = name.as_ref().and_then(|name| hardware(name).err());
        problems.extend(unknown.map(|error| ("run.hardware".into(), error.to_string())));
        problems
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
    /// Components that start from random weights (`unet`, `text_encoder`, `text_encoder_2`); of the others the
    /// weights must be there.
    #[serde(default)]
    pub random: Vec<String>,
}

/// `[[data]]`: one data set.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// The folder that `rectiflow prep` wrote, or the URL of a copy of it: `s3://bucket/prefix`, `gs://`, `az://`,
    /// `http(s)://`. Credentials and endpoint are those of the environment.
    pub path: PathBuf,
    /// How often an epoch goes through it; 1 where neither this nor `share` is given.
    pub repeats: Option<f64>,
    /// Its part of all samples of an epoch, above 0 and below 1; then every data set needs one, and they sum to 1.
    pub share: Option<f64>,
    /// How prompts are made from captions and tags.
    #[serde(default)]
    pub prompt: PromptSettings,
}

impl DataConfig {
    pub(crate) fn amount(&self) -> Amount {
        self.share.map_or_else(|| Amount::Repeats(self.repeats.unwrap_or(1.0)), Amount::Share)
    }
}

/// Which text encoders learn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TextEncoders {
    /// They stay as they are.
    #[serde(rename = "frozen")]
    Frozen,
    /// Both are trained with the UNet.
    #[serde(rename = "trained")]
    Trained,
    /// CLIP-L is trained with the UNet, bigG stays.
    #[serde(rename = "text_encoder")]
    OnlyClipL,
    /// OpenCLIP bigG is trained with the UNet, CLIP-L stays.
    #[serde(rename = "text_encoder_2")]
    OnlyClipG,
}

/// `[train]`: what is learnt, from how many samples, in which batches.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Samples to train on in all, repetitions counted, those that the guard passed over or undid not: they are made up for.
    /// The run ends with the first step that reaches it.
    pub samples: u64,
    /// Samples a micro-batch: what is in memory at once, all of one bucket.
    pub micro_batch: usize,
    /// Micro-batches a step, over all ranks: the batch is micro_batch x micro_batches.
    #[serde(default = "one")]
    pub micro_batches: usize,
    /// Lanes that the micro-batches of a step are dealt to; at most so many ranks can run. Default: the largest
    /// divisor of micro_batches that is at most 64.
    pub lanes: Option<usize>,
    /// How samples are spread over an epoch: `local` permutes all samples of a bucket, for data on a disk; `window`
    /// permutes blocks and shuffles the samples of a window of them, for data in object storage, every byte of which
    /// is then fetched once an epoch; `owned` gives each lane a share of the blocks, which stays on its machine's disk
    /// (`run.cache_dir`) and is fully shuffled from the second epoch on; `auto` takes `window` for data at URLs that is
    /// larger than 2 GiB.
    #[serde(default = "auto")]
    #[schemars(with = "String")]
    pub mode: Mode,
    /// Window of samples inside which micro-batches are grouped by their number of 75-token chunks; in `window` mode, and
    /// in the first epoch of `owned` mode, also the samples that are shuffled among each other.
    #[serde(default = "default_window")]
    pub window_samples: u64,
    /// `frozen`, `trained` (both), or the one that is trained; `lr.ratio` has their rates.
    #[serde(default = "frozen")]
    pub text_encoders: TextEncoders,
    /// `fp32`, or `bf16`: the model calculates in bf16 with copies of the weights, while weights, the sum of gradients
    /// and the optimiser's memory stay in fp32. Faster, and half the memory for activations; docs/numerics.md has what
    /// is in which.
    #[serde(default)]
    pub dtype: Precision,
    /// Offset noise: so many times a normal number of its own is added to the noise of each channel of a sample, so
    /// that a model learns to change a picture's mean. For eps and v, 0.03 to 0.1; flow models need none.
    #[serde(default)]
    pub offset_noise: f64,
    /// Gradients of a larger norm are scaled down to it. 1.0 is the article's.
    #[serde(default = "one_f64")]
    pub clip_norm: f64,
}

impl TrainConfig {
    /// Whether a component learns.
    pub fn trains(&self, component: Component) -> bool {
        use TextEncoders::{Frozen, OnlyClipG, OnlyClipL, Trained};
        match (component, self.text_encoders) {
            (Component::UNet, _) | (Component::ClipL | Component::ClipG, Trained) => true,
            (Component::ClipL, OnlyClipL) | (Component::ClipG, OnlyClipG) => true,
            (Component::ClipL, Frozen | OnlyClipG) | (Component::ClipG, Frozen | OnlyClipL) | (Component::Vae, _) => {
                false
            }
        }
    }

    /// What is wrong with these settings: (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let Self { samples, micro_batch, micro_batches, lanes, window_samples, clip_norm, offset_noise, .. } = *self;
        let mut problems = Vec::new();
        let counts = [
            ("samples", samples),
            ("micro_batch", micro_batch as u64),
            ("micro_batches", micro_batches as u64),
            ("window_samples", window_samples),
        ];
        for (key, _) in counts.into_iter().filter(|(_, count)| *count == 0) {
            problems.push((format!("train.{key}"), "expected at least 1, found 0".to_owned()));
        }
        if let Some(lanes) = lanes.filter(|&lanes| lanes == 0 || !micro_batches.is_multiple_of(lanes)) {
            let reason = format!("expected a divisor of train.micro_batches = {micro_batches}, found {lanes}");
            problems.push(("train.lanes".into(), reason));
        }
        if !(clip_norm > 0.0 && clip_norm.is_finite()) {
            problems.push(("train.clip_norm".into(), format!("expected a number above 0, found {clip_norm}")));
        }
        if !(0.0..=1.0).contains(&offset_noise) {
            problems.push(("train.offset_noise".into(), format!("expected 0 to 1, found {offset_noise}")));
        }
        problems
    }
}

fn frozen() -> TextEncoders {
    TextEncoders::Frozen
}
fn one() -> usize {
    1
}
fn one_f64() -> f64 {
    1.0
}
fn auto() -> Mode {
    Mode::Auto
}
fn default_window() -> u64 {
    2048
}

/// `[checkpoint]`: when and how many.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps from one checkpoint to the next; the end of a run and an interrupt save as well.
    pub every_steps: u64,
    /// Newest checkpoints to keep; older ones are removed. At least 1.
    pub keep: usize,
    /// Checkpoints whose step is a multiple of this are kept for ever; 0 keeps none but the newest.
    pub keep_every_steps: u64,
    /// Whether training goes on while a checkpoint is being written. That takes host memory for a copy, of 12 bytes a
    /// trained parameter (16 with `ema`), on rank 0; the others copy their parts of the optimiser's memory.
    pub in_background: bool,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every_steps: 500, keep: 3, keep_every_steps: 0, in_background: true }
    }
}

impl CheckpointConfig {
    /// What is wrong with these settings: (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Vec::new();
        if self.every_steps == 0 {
            problems.push(("checkpoint.every_steps".into(), "expected at least 1, found 0".into()));
        }
        if self.keep == 0 {
            problems.push(("checkpoint.keep".into(), "expected at least 1, found 0".into()));
        }
        let Self { every_steps, keep_every_steps, .. } = *self;
        if every_steps > 0 && !keep_every_steps.is_multiple_of(every_steps) {
            let reason = format!(
                "expected a multiple of checkpoint.every_steps = {every_steps}, since others are never written; found \
                 {keep_every_steps}"
            );
            problems.push(("checkpoint.keep_every_steps".into(), reason));
        }
        problems
    }
}

/// `[memory]`: what is kept in memory and what is calculated again.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Activation checkpointing: `off` keeps all that the backward pass needs; `full` keeps what goes into each residual
    /// and transformer block of the UNet, and calculates the rest a second time; `budget` does so with as few of the
    /// blocks as it takes to stay within `budget_gib`, those first that save most bytes for what they cost. Gradients are
    /// the same.
    pub checkpointing: Checkpointing,
    /// Memory in GiB that the whole run may take on its device by the estimate at its start, with
    /// `checkpointing = "budget"`. A run that does not fit with all blocks remade does not start.
    pub budget_gib: Option<f64>,
    /// Memory of the device in GiB. A run that is going to need more does not start. Default: on a CPU what the system
    /// has available, on a GPU no limit.
    pub device_gib: Option<f64>,
}

/// Which blocks of the UNet are calculated a second time in the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Checkpointing {
    /// None.
    #[default]
    Off,
    /// All.
    Full,
    /// As many as it takes to stay within a budget.
    Budget,
}

impl MemoryConfig {
    /// What is wrong with these settings: (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let numbers = [("memory.device_gib", self.device_gib), ("memory.budget_gib", self.budget_gib)];
        let mut problems: Vec<(String, String)> = numbers
            .into_iter()
            .filter_map(|(key, number)| Some((key, number.filter(|gib| !(*gib > 0.0 && gib.is_finite()))?)))
            .map(|(key, gib)| (key.into(), format!("expected a number above 0, found {gib}")))
            .collect();
        let reason = match (self.checkpointing, self.budget_gib) {
            (Checkpointing::Budget, None) => "missing; memory.checkpointing = \"budget\" needs it",
            (Checkpointing::Off | Checkpointing::Full, Some(_)) => {
                "only memory.checkpointing = \"budget\" has one; memory.device_gib is what may not be exceeded"
            }
            _ => return problems,
        };
        problems.push(("memory.budget_gib".into(), reason.into()));
        problems
    }

    /// The memory that the whole run may take, in bytes.
    pub(crate) fn budget_bytes(&self) -> Option<u64> {
        self.budget_gib.map(bytes)
    }

    /// The memory of the device, in bytes, where the recipe gives it.
    pub(crate) fn device_bytes(&self) -> Option<u64> {
        self.device_gib.map(bytes)
    }
}

fn bytes(gib: f64) -> u64 {
    (gib * f64::from(1 << 30)) as u64
}

/// `[test]`: the test loss.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TestConfig {
    /// Steps from one measurement to the next; the first is before training, the last at its end.
    pub every_steps: u64,
    /// Equal ranges of noise levels to report apart, 1 to 100.
    pub bins: usize,
    /// Training samples, chosen by hash, whose loss is measured in the same way; 0 measures none.
    pub training_samples: usize,
}

impl Default for TestConfig {
    fn default() -> Self {
        Self { every_steps: 500, bins: 10, training_samples: 0 }
    }
}

impl TestConfig {
    /// What is wrong with these settings: (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Vec::new();
        if self.every_steps == 0 {
            problems.push(("test.every_steps".into(), "expected at least 1, found 0".into()));
        }
        if !(1..=100).contains(&self.bins) {
            problems.push(("test.bins".into(), format!("expected 1 to 100, found {}", self.bins)));
        }
        problems
    }
}

/// `[preview]`: pictures sampled while training goes on.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PreviewConfig {
    /// Steps from one set of pictures to the next; the first is before training, the last at its end.
    pub every_steps: u64,
    /// One picture each; none by default, and then nothing is sampled.
    pub prompts: Vec<String>,
    /// What the pictures are steered away from, with `cfg` above 1.
    pub negative: String,
    /// How they are sampled; `batch` is the number of prompts.
    pub sample: SampleSettings,
}

impl Default for PreviewConfig {
    fn default() -> Self {
        Self { every_steps: 500, prompts: Vec::new(), negative: String::new(), sample: SampleSettings::default() }
    }
}

impl PreviewConfig {
    /// What is wrong with these settings: (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        if self.every_steps == 0 {
            return vec![("preview.every_steps".into(), "expected at least 1, found 0".into())];
        }
        Vec::new()
    }
}
