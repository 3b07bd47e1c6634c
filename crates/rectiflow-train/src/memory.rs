//! `[memory]`: what a run keeps in memory and what it calculates again; and how much that will be, before any of it is
//! taken.
//!
//! The estimate follows from the recipe, the model's configurations and the largest bucket. How near it comes is measured
//! by `rectiflow bench step`, which prints it beside the largest resident memory (docs/numerics.md).

use std::fmt;

use rectiflow_data::{batch::Source, manifest::Split};
use rectiflow_sdxl::{
    clip::ClipText,
    config::{ClipConfig, UNetConfig},
    cost::{Load, PartCost, parts, peak_bytes, text_encoder_bytes},
    model::{Component, Configs, Model},
    vae::Vae,
    weights::Weights,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::{
    checkpoint::Components,
    comm::Comm,
    config::{Checked, Recipe},
    error::{Error, Result},
    launch::Sharding,
    precision::Precision,
    saving, snapshots, workers,
};

/// `[memory]`: what is kept in memory and what is calculated again.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Activation checkpointing: `off` keeps all that the backward pass needs; `full` keeps what goes into each residual
    /// and transformer block of the UNet, and calculates the rest a second time. Gradients are the same.
    pub checkpointing: Checkpointing,
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
}

impl MemoryConfig {
    /// Tells a model's UNet which of its blocks are remade.
    pub(crate) fn apply(&self, model: &mut Model) {
        model.unet.checkpoint_blocks(|_| self.checkpointing == Checkpointing::Full);
    }

    /// What is wrong with these settings: (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        match self.device_gib.filter(|gib| !(*gib > 0.0 && gib.is_finite())) {
            Some(gib) => vec![("memory.device_gib".into(), format!("expected a number above 0, found {gib}"))],
            None => Vec::new(),
        }
    }
}

/// What training will take, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Estimate {
    /// Trained weights as they are calculated with.
    pub weights: u64,
    /// fp32 masters of what the rank owns, where those are not the masters themselves.
    #[serde(default)]
    pub masters: u64,
    /// The optimiser's two moments.
    pub moments: u64,
    /// The averaged weights.
    pub average: u64,
    /// What is not trained: text encoders, autoencoder.
    pub frozen: u64,
    /// Activations, and gradients as they take their place: the most of both at a time.
    pub passes: u64,
    /// Snapshots that the guard can go back to; in host memory on every device.
    pub snapshots: u64,
    /// The copy that a checkpoint is written from while training goes on; in host memory on every device.
    pub checkpoint: u64,
    /// The program and libtorch themselves.
    pub program: u64,
}

/// The program and libtorch before the first tensor, on a CPU: 0.22 GB resident (2026-11-25, x86-64 Linux).
const PROGRAM_BYTES: u64 = 220_000_000;

/// One pass of a UNet: what goes in, and how it is calculated.
#[derive(Debug, Clone, Copy)]
pub struct Passes {
    /// Samples of a micro-batch.
    pub batch: u64,
    /// Height and width of the latents.
    pub latent: [u64; 2],
    /// Tokens of context a sample.
    pub tokens: u64,
    /// fp32 or bf16.
    pub precision: Precision,
    /// Which blocks are remade.
    pub checkpointing: Checkpointing,
    /// Micro-batches that are worked on side by side.
    pub width: u64,
}

impl Passes {
    fn activation_bytes(&self) -> u64 {
        match self.precision {
            Precision::Fp32 => 4,
            Precision::Bf16 => 2,
        }
    }

    /// Weights, moments, activations and gradients of training this UNet, nothing else.
    pub fn estimate(&self, unet: &UNetConfig) -> Estimate {
        let Self { batch, latent: [height, width], tokens, .. } = *self;
        let parts = parts(unet, Load { batch, height, width, tokens, bytes: self.activation_bytes() });
        let num_parameters: u64 = parts.iter().map(|part| part.num_parameters).sum();
        let is_remade = |part: &PartCost| part.is_block && self.checkpointing == Checkpointing::Full;
        // Micro-batches side by side share the sum of gradients.
        let alone = peak_bytes(&parts, 4, is_remade);
        let beside = (self.width - 1) * peak_bytes(&parts, 0, is_remade);
        Estimate {
            weights: num_parameters * self.activation_bytes(),
            masters: num_parameters * self.master_bytes(),
            moments: num_parameters * 8,
            passes: alone + beside,
            program: PROGRAM_BYTES,
            ..Estimate::default()
        }
    }

    /// Bytes of a trained weight's master beside what is calculated with, on a rank that owns all.
    fn master_bytes(&self) -> u64 {
        match self.precision {
            Precision::Fp32 => 0,
            Precision::Bf16 => 4,
        }
    }
}

impl Estimate {
    /// What a run will take: its model by the configurations, its data by the largest bucket.
    ///
    /// # Errors
    /// [`Error::Model`] where a configuration cannot be read.
    pub(crate) fn of_run(checked: &Checked, components: &Components, sources: &[Source]) -> Result<Self> {
        let recipe = &checked.recipe;
        let places = Component::ALL.map(|component| components.folder(component));
        let configs = Configs::read(places)?;
        let pixels = |&(width, height): &(u32, u32)| u64::from(width) * u64::from(height);
        let buckets = sources.iter().flat_map(|source| source.dataset.buckets(Split::Train));
        let largest = buckets.map(|bucket| (bucket.width_px, bucket.height_px)).max_by_key(pixels).unwrap_or((0, 0));
        let down = u64::from(configs.vae.down_factor());
        let passes = Passes {
            batch: recipe.train.micro_batch as u64,
            latent: [u64::from(largest.1) / down, u64::from(largest.0) / down],
            tokens: MOST_TOKENS,
            precision: recipe.train.dtype,
            checkpointing: recipe.memory.checkpointing,
            width: workers::count(checked.device, recipe.train.micro_batches) as u64,
        };
        let mut estimate = passes.estimate(&configs.unet);
        let mut num_trained = estimate.moments / 8;
        for (component, config) in [(Component::ClipL, &configs.clip_l), (Component::ClipG, &configs.clip_g)] {
            let num_parameters = count(config)?;
            if recipe.train.trains(component) {
                num_trained += num_parameters;
                estimate.weights += num_parameters * passes.activation_bytes();
                estimate.masters += num_parameters * passes.master_bytes();
                estimate.moments += num_parameters * 8;
                let kept = text_encoder_bytes(config, passes.batch * MOST_TOKENS, passes.activation_bytes());
                estimate.passes += passes.width * kept + 4 * num_parameters;
            } else {
                estimate.frozen += num_parameters * passes.activation_bytes();
            }
        }
        estimate.frozen += 4 * Vae::new(configs.vae, Weights::shapes_only())?.parameters.num_elements() as u64;
        if recipe.ema.half_life_samples.is_some() {
            estimate.average = 4 * num_trained;
        }
        Ok(estimate)
    }

    /// The same on a rank that keeps masters and the optimiser's memory of one part of `shards`; its snapshots, and the
    /// copy that a checkpoint is written from.
    fn split(mut self, shards: u64, recipe: &Recipe) -> Self {
        if recipe.checkpoint.in_background {
            self.checkpoint = saving::copy_bytes(self.moments / 8, shards, self.average > 0);
        }
        if shards > 1 {
            // fp32 weights are of all ranks, so that a rank's masters are apart.
            self.masters = (self.moments / 2).div_ceil(shards);
        }
        self.moments = self.moments.div_ceil(shards);
        self.average = self.average.div_ceil(shards);
        // Masters, both moments, the average.
        self.snapshots = snapshots::total_bytes(&recipe.guard, self.moments / 2 + self.moments + self.average);
        self
    }

    /// What the device has to hold.
    pub fn device_bytes(&self, device: Device) -> u64 {
        let Self { weights, masters, moments, average, frozen, passes, snapshots, checkpoint, program } = *self;
        let here = weights + masters + moments + average + frozen + passes;
        if device == Device::Cpu { here + snapshots + checkpoint + program } else { here }
    }

    /// Refuses a run that is going to need more than there is.
    ///
    /// # Errors
    /// [`Error::Memory`], naming the settings that would help.
    pub(crate) fn check(&self, checked: &Checked) -> Result<()> {
        let recipe = &checked.recipe;
        let limit = recipe.memory.device_gib.map(|gib| (gib * f64::from(1 << 30)) as u64);
        let needed = self.device_bytes(checked.device);
        let Some(limit) = limit.or_else(|| available_bytes(checked.device)).filter(|limit| needed > *limit) else {
            return Ok(());
        };
        let mut help = Vec::new();
        if recipe.memory.checkpointing == Checkpointing::Off {
            help.push("memory.checkpointing = \"full\"");
        }
        if recipe.train.dtype == Precision::Fp32 {
            help.push("train.dtype = \"bf16\"");
        }
        if recipe.train.micro_batch > 1 {
            help.push("a smaller train.micro_batch (and more train.micro_batches)");
        }
        if self.snapshots > 0 && checked.device == Device::Cpu {
            help.push("a smaller guard.snapshot_gib");
        }
        if self.checkpoint > 0 && checked.device == Device::Cpu {
            help.push("checkpoint.in_background = false");
        }
        if self.average > 0 {
            help.push("no ema.half_life_samples");
        }
        help.push("fewer trained text encoders or a smaller model");
        Err(Error::Memory { estimate: *self, needed, limit, help: help.join(", ") })
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let Self { weights, masters, moments, average, frozen, passes, snapshots, checkpoint, program } = *self;
        let named = [
            (weights, "weights"),
            (masters, "masters"),
            (moments, "moments"),
            (average, "average"),
            (frozen, "frozen parts"),
            (passes, "activations and gradients"),
            (snapshots, "snapshots (host)"),
            (checkpoint, "copy for a checkpoint (host)"),
            (program, "program (host)"),
        ];
        let there: Vec<String> = named
            .iter()
            .filter(|(bytes, _)| *bytes > 0)
            .map(|(bytes, name)| format!("{name} {:.2}", gib(*bytes)))
            .collect();
        write!(f, "{}, in GiB", there.join(", "))
    }
}

/// Says what a run is going to take, and refuses it where that is more than there is.
pub(crate) fn announce(checked: &Checked, comm: &Comm, components: &Components, sources: &[Source]) -> Result<()> {
    let ranks = comm.rank().ranks as u64;
    let shards = if checked.recipe.ranks.sharding == Sharding::None { 1 } else { ranks };
    let estimate = Estimate::of_run(checked, components, sources)?.split(shards, &checked.recipe);
    tracing::info!(
        "memory: about {:.2} GiB on {:?} ({estimate})",
        estimate.device_bytes(checked.device) as f64 / f64::from(1 << 30),
        checked.device
    );
    estimate.check(checked)
}

/// Three chunks: the longest prompts.
const MOST_TOKENS: u64 = 3 * 77;

fn count(config: &ClipConfig) -> Result<u64> {
    Ok(ClipText::new(config.clone(), Weights::shapes_only())?.parameters.num_elements() as u64)
}

/// What the system can still give, on Linux, to a run on the CPU.
fn available_bytes(device: Device) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok().filter(|_| device == Device::Cpu)?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
