//! What a run keeps in memory and what it recomputes; and how much memory that takes, before any of
//! it is allocated.
//!
//! The estimate follows from the recipe, the model's configurations and the largest bucket.
//! `rectiflow bench step` measures its error: it prints the estimate beside the largest resident
//! memory (docs/numerics.md).

use std::{collections::BTreeSet, fmt};

use rectiflow_data::{batch::Source, manifest::Split};
use rectiflow_sdxl::{
    choices::about_bf16,
    clip::ClipText,
    config::{ClipConfig, UNetConfig},
    cost::{Load, PartCost, choose, keeps_less, parts, peak_bytes, text_encoder_bytes},
    model::{Component, Configs},
    unet::UNet,
    vae::Vae,
    weights::Weights,
};
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::{
    checkpoint::{components::Components, saving, snapshots},
    error::{Error, Result},
    ranks::{comm::Comm, launch::Sharding},
    recipe::{Checked, Recipe, sections::Checkpointing},
    state::{moments::MomentsKind, precision::Precision, workers},
};

/// The blocks of the UNet that are recomputed in the backward pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecomputedBlocks {
    /// All blocks if true, none if false.
    All(bool),
    /// The blocks of these names.
    Some(BTreeSet<String>),
}

impl RecomputedBlocks {
    /// Whether a block is recomputed, by the name prefix of its tensors.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Self::All(is_on) => *is_on,
            Self::Some(names) => names.contains(name),
        }
    }

    /// Sets the recomputed blocks of a UNet.
    pub fn apply(&self, unet: &mut UNet) {
        unet.checkpoint_blocks(|name| self.contains(name));
    }
}

/// The memory that training takes, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Estimate {
    /// Trained weights in the precision of the passes.
    pub weights: u64,
    /// What completes bf16 weights to fp32 masters, for the parameters that the rank owns.
    #[serde(default)]
    pub masters: u64,
    /// The optimiser's two moments.
    pub moments: u64,
    /// The averaged weights.
    pub average: u64,
    /// Components that are not trained: text encoders, autoencoder.
    pub frozen: u64,
    /// Activations and gradients at their common peak: gradients replace activations during the
    /// backward pass.
    pub passes: u64,
    /// Snapshots that the guard can rewind to; in host memory for every device.
    pub snapshots: u64,
    /// The copy that a checkpoint is written from while training continues; in host memory for
    /// every device.
    pub checkpoint: u64,
    /// The program and libtorch themselves.
    pub program: u64,
}

/// The program and libtorch before the first tensor, on a CPU: 0.22 GB resident (measured
/// 2026-11-25, x86-64 Linux).
const PROGRAM_BYTES: u64 = 220_000_000;

/// How parameters are updated, as far as memory depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct UpdateMode {
    /// How the optimiser's moments are stored.
    pub moments: MomentsKind,
    /// Whether each tensor is updated during the backward pass, and its gradient freed.
    pub in_backward: bool,
}

/// The passes of a UNet: their inputs, and how they are computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Passes {
    /// Samples per micro-batch.
    pub batch: u64,
    /// Height and width of the latents.
    pub latent: [u64; 2],
    /// Tokens of context per sample.
    pub tokens: u64,
    /// Precision of weights and activations.
    pub precision: Precision,
    /// Micro-batches that are computed at the same time.
    pub width: u64,
    /// Whether other micro-batches follow in the same step: the sum of gradients then stays in
    /// memory during their passes.
    pub accumulates: bool,
    /// Whether the device keeps less for chains of operations ([`keeps_less`]).
    pub fused: bool,
    /// How the gradients are used.
    pub update: UpdateMode,
}

impl UpdateMode {
    /// Returns the mode of a recipe.
    pub(crate) fn of_recipe(recipe: &Recipe) -> Self {
        Self {
            moments: recipe.optimizer.state,
            in_backward: recipe.train.update_in_backward,
        }
    }
}

impl Passes {
    /// Returns the passes of a run on its largest bucket.
    fn of_run(checked: &Checked, configs: &Configs, sources: &[Source]) -> Self {
        let train = &checked.recipe.train;
        let [width_px, height_px] = largest_bucket(sources);
        let down = u64::from(configs.vae.down_factor());
        let width = workers::count(checked.device, train.micro_batches);
        Self {
            batch: train.micro_batch as u64,
            latent: [height_px / down, width_px / down],
            tokens: MOST_TOKENS,
            precision: train.dtype,
            width: width as u64,
            accumulates: train.micro_batches > width,
            fused: keeps_less(checked.device),
            update: UpdateMode::of_recipe(&checked.recipe),
        }
    }

    fn parts(&self, unet: &UNetConfig) -> Vec<PartCost> {
        let [height, width] = self.latent;
        parts(
            unet,
            Load {
                batch: self.batch,
                height,
                width,
                tokens: self.tokens,
                bytes: self.precision.value_bytes(),
                fused: self.fused,
            },
        )
    }

    /// Returns the blocks to recompute so that activations and gradients fit into `room` bytes.
    pub fn choose(&self, unet: &UNetConfig, room: u64) -> RecomputedBlocks {
        let parts = self.parts(unet);
        let fits = |chosen: &BTreeSet<String>| {
            self.peak(&parts, 4, |part| chosen.contains(&part.name)) <= room
        };
        RecomputedBlocks::Some(choose(&parts, fits))
    }

    /// Returns the blocks that a run recomputes; a budget leaves `room` bytes for activations and
    /// gradients.
    pub(crate) fn recomputed(
        &self,
        unet: &UNetConfig,
        checkpointing: Checkpointing,
        room: impl FnOnce() -> u64,
    ) -> RecomputedBlocks {
        match checkpointing {
            Checkpointing::Off => RecomputedBlocks::All(false),
            Checkpointing::Full => RecomputedBlocks::All(true),
            Checkpointing::Budget => self.choose(unet, room()),
        }
    }

    /// Returns the peak of activations and gradients together, with `gradient_bytes` per gradient.
    pub fn bytes(
        &self,
        unet: &UNetConfig,
        recomputed: &RecomputedBlocks,
        gradient_bytes: u64,
    ) -> u64 {
        let is_recomputed = |part: &PartCost| part.is_block && recomputed.contains(&part.name);
        self.peak(&self.parts(unet), gradient_bytes, is_recomputed)
    }

    fn peak(
        &self,
        parts: &[PartCost],
        gradient_bytes: u64,
        is_recomputed: impl Fn(&PartCost) -> bool,
    ) -> u64 {
        let widening = if self.widens() { 2 } else { 1 };
        if self.update.in_backward {
            return peak_bytes(parts, 0, widening, &is_recomputed) + self.in_flight(parts);
        }
        let activations = peak_bytes(parts, 0, widening, &is_recomputed);
        // Micro-batches that run at the same time share the sum of gradients.
        let beside = (self.width - 1) * activations;
        if self.accumulates {
            return gradient_bytes * num_parameters(parts) + activations + beside;
        }
        peak_bytes(parts, gradient_bytes, widening, &is_recomputed) + beside
    }

    /// Returns the bytes of gradients that exist at once where each is freed when it is complete:
    /// those of one block, in the dtype of its weights and in fp32.
    fn in_flight(&self, parts: &[PartCost]) -> u64 {
        let largest = parts.iter().map(|part| part.num_parameters).max();
        (self.precision.value_bytes() + 4) * largest.unwrap_or(0)
    }

    /// Whether numbers in bf16 are multiplied in fp32, on a CPU without fast bf16 instructions.
    fn widens(&self) -> bool {
        self.fused && self.precision == Precision::Bf16 && about_bf16().is_some()
    }

    /// Returns the memory of training this UNet alone: weights, moments, activations and gradients.
    pub fn estimate(&self, unet: &UNetConfig, recomputed: &RecomputedBlocks) -> Estimate {
        let num_parameters = num_parameters(&self.parts(unet));
        Estimate {
            weights: num_parameters * self.precision.value_bytes(),
            masters: num_parameters * self.master_bytes(),
            moments: self.update.moments.bytes(num_parameters),
            passes: self.bytes(unet, recomputed, 4),
            program: PROGRAM_BYTES,
            ..Estimate::default()
        }
    }

    /// Returns the bytes that complete a trained weight to its master.
    fn master_bytes(&self) -> u64 {
        match self.precision {
            Precision::Fp32 => 0,
            Precision::Bf16 => 2,
        }
    }
}

fn num_parameters(parts: &[PartCost]) -> u64 {
    parts.iter().map(|part| part.num_parameters).sum()
}

/// Returns width and height in pixels of the largest bucket of training samples.
fn largest_bucket(sources: &[Source]) -> [u64; 2] {
    let mut largest = [0, 0];
    for source in sources {
        for bucket in source.dataset.buckets(Split::Train) {
            let size = [u64::from(bucket.width_px), u64::from(bucket.height_px)];
            if size[0] * size[1] >= largest[0] * largest[1] {
                largest = size;
            }
        }
    }
    largest
}

impl Estimate {
    /// Returns the memory of a run and the blocks that it recomputes: of its model by the
    /// configurations, of its data by the largest bucket; the optimiser's memory is split over
    /// `shards`.
    ///
    /// # Errors
    /// [`Error::Model`] if a configuration cannot be read.
    pub(crate) fn of_run(
        checked: &Checked,
        components: &Components,
        sources: &[Source],
        shards: u64,
    ) -> Result<(Self, RecomputedBlocks)> {
        let configs = Configs::read(Component::ALL.map(|component| components.folder(component)))?;
        let passes = Passes::of_run(checked, &configs, sources);
        let run = RunEstimate {
            apart: Self::apart_from_unet(checked, &configs, &passes)?,
            checked,
            unet: &configs.unet,
            passes,
            shards,
        };
        let checkpointing = checked.recipe.memory.checkpointing;
        let recomputed = passes.recomputed(&configs.unet, checkpointing, || run.room());
        Ok((run.with_unet(&recomputed), recomputed))
    }

    /// Returns the memory of everything but the UNet.
    fn apart_from_unet(checked: &Checked, configs: &Configs, passes: &Passes) -> Result<Self> {
        let mut estimate = Self {
            program: PROGRAM_BYTES,
            ..Self::default()
        };
        for (component, config) in [
            (Component::ClipL, &configs.clip_l),
            (Component::ClipG, &configs.clip_g),
        ] {
            let num_parameters = count(config)?;
            let value_bytes = passes.precision.value_bytes();
            if checked.recipe.train.trains(component) {
                estimate.weights += num_parameters * value_bytes;
                estimate.masters += num_parameters * passes.master_bytes();
                estimate.moments += passes.update.moments.bytes(num_parameters);
                let kept = text_encoder_bytes(config, passes.batch * MOST_TOKENS, value_bytes);
                let gradients = if passes.update.in_backward { 0 } else { 4 };
                estimate.passes += passes.width * kept + gradients * num_parameters;
            } else {
                estimate.frozen += num_parameters * value_bytes;
            }
        }
        let vae = Vae::new(configs.vae.clone(), Weights::shapes_only())?;
        estimate.frozen += 4 * vae.parameters.num_elements() as u64;
        Ok(estimate)
    }

    fn with_average(self, is_kept: bool, trained: u64) -> Self {
        Self {
            average: if is_kept { 4 * trained } else { 0 },
            ..self
        }
    }

    /// Returns the memory of a rank that keeps masters and moments of one of `shards` parts of the
    /// `trained` parameters, with its snapshots and the copy that a checkpoint is written from.
    fn split(mut self, trained: u64, shards: u64, recipe: &Recipe) -> Self {
        let (kind, has_average) = (recipe.optimizer.state, self.average > 0);
        if recipe.checkpoint.in_background {
            self.checkpoint = saving::copy_bytes(trained, kind, shards, has_average);
        }
        self.masters = self.masters.div_ceil(shards);
        self.moments = self.moments.div_ceil(shards);
        self.average = self.average.div_ceil(shards);
        let owned = trained.div_ceil(shards) as i64;
        let snapshot_bytes = snapshots::bytes(owned, kind, has_average);
        self.snapshots = snapshots::total_bytes(&recipe.guard, snapshot_bytes);
        self
    }

    /// Returns the bytes that the device has to hold.
    pub fn device_bytes(&self, device: Device) -> u64 {
        let Self {
            weights,
            masters,
            moments,
            average,
            frozen,
            passes,
            snapshots,
            checkpoint,
            program,
        } = *self;
        let here = weights + masters + moments + average + frozen + passes;
        if device == Device::Cpu {
            here + snapshots + checkpoint + program
        } else {
            here
        }
    }

    /// Refuses a run that needs more memory than the device has or the recipe allows.
    ///
    /// # Errors
    /// [`Error::Memory`] with the settings that reduce it.
    pub(crate) fn check(&self, checked: &Checked) -> Result<()> {
        let needed = self.device_bytes(checked.device);
        let Some(limit) = limit_bytes(checked) else {
            return Ok(());
        };
        if needed <= limit {
            return Ok(());
        }
        Err(Error::Memory {
            needs: self.to_string(),
            needed,
            limit,
            help: self.help(checked, limit).join(", "),
        })
    }

    /// Returns the settings that reduce the memory below a limit.
    fn help(&self, checked: &Checked, limit: u64) -> Vec<&'static str> {
        let recipe = &checked.recipe;
        let mut help = Vec::new();
        if recipe.memory.budget_bytes() == Some(limit) {
            help.push("a larger memory.budget_gib");
        } else if recipe.memory.checkpointing != Checkpointing::Full {
            help.push("memory.checkpointing = \"full\"");
        }
        if recipe.train.dtype == Precision::Fp32 {
            help.push("train.dtype = \"bf16\"");
        }
        if recipe.optimizer.state == MomentsKind::Fp32 {
            help.push("optimizer.state = \"8bit\"");
        }
        if recipe.train.micro_batches == 1 && !recipe.train.update_in_backward {
            help.push("train.update_in_backward = true");
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
        help
    }

    /// Returns all terms with their names.
    fn terms(&self) -> [(&'static str, u64); 9] {
        [
            ("weights", self.weights),
            ("masters", self.masters),
            ("moments", self.moments),
            ("average", self.average),
            ("frozen parts", self.frozen),
            ("activations and gradients", self.passes),
            ("snapshots (host)", self.snapshots),
            ("copy for a checkpoint (host)", self.checkpoint),
            ("program (host)", self.program),
        ]
    }
}

/// Returns the memory that a run may take: that of the device or the recipe's budget, whichever is
/// smaller; `None` if neither is known.
fn limit_bytes(checked: &Checked) -> Option<u64> {
    let memory = &checked.recipe.memory;
    let device = match memory.device_bytes() {
        Some(bytes) => Some(bytes),
        None => available_bytes(checked.device),
    };
    match (device, memory.budget_bytes()) {
        (Some(device), Some(budget)) => Some(device.min(budget)),
        (device, budget) => device.or(budget),
    }
}

/// The memory of a run but for the choice of recomputed blocks.
struct RunEstimate<'a> {
    checked: &'a Checked,
    unet: &'a UNetConfig,
    passes: Passes,
    /// The memory of everything but the UNet.
    apart: Estimate,
    /// Number of parts that the optimiser's memory is split over.
    shards: u64,
}

impl RunEstimate<'_> {
    /// Returns the memory of the run, of which these blocks are recomputed.
    fn with_unet(&self, recomputed: &RecomputedBlocks) -> Estimate {
        let recipe = &self.checked.recipe;
        let unet = self.passes.estimate(self.unet, recomputed);
        let all = Estimate {
            weights: self.apart.weights + unet.weights,
            masters: self.apart.masters + unet.masters,
            moments: self.apart.moments + unet.moments,
            passes: self.apart.passes + unet.passes,
            ..self.apart
        };
        let trained = all.weights / self.passes.precision.value_bytes();
        all.with_average(recipe.ema.half_life_samples.is_some(), trained)
            .split(trained, self.shards, recipe)
    }

    /// Returns the bytes that the budget leaves for the UNet's activations and gradients.
    fn room(&self) -> u64 {
        let none = self.with_unet(&RecomputedBlocks::All(false));
        let others = none.device_bytes(self.checked.device) - none.passes + self.apart.passes;
        let budget = self.checked.recipe.memory.budget_bytes().unwrap_or(0);
        budget.saturating_sub(others)
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, bytes) in self.terms() {
            if bytes > 0 {
                write!(f, "{name} {:.2}, ", bytes as f64 / f64::from(1 << 30))?;
            }
        }
        write!(f, "in GiB")
    }
}

/// Logs the memory that a run takes, and refuses a run that needs more than the limit. Returns the
/// blocks that it recomputes.
pub(crate) fn announce(
    checked: &Checked,
    comm: &Comm,
    components: &Components,
    sources: &[Source],
) -> Result<RecomputedBlocks> {
    let ranks = comm.rank().ranks as u64;
    let shards = if checked.recipe.ranks.sharding == Sharding::None {
        1
    } else {
        ranks
    };
    let (estimate, recomputed) = Estimate::of_run(checked, components, sources, shards)?;
    tracing::info!(
        "memory: about {:.2} GiB on {:?} ({estimate})",
        estimate.device_bytes(checked.device) as f64 / f64::from(1 << 30),
        checked.device
    );
    let is_bf16 = checked.recipe.train.dtype == Precision::Bf16;
    if let (true, Device::Cpu, Some(about)) = (is_bf16, checked.device, about_bf16()) {
        tracing::info!("{about}");
    }
    if let RecomputedBlocks::Some(names) = &recomputed {
        let shown: Vec<&str> = names.iter().map(String::as_str).collect();
        tracing::info!(
            "checkpointing: {} blocks are recomputed in the backward pass: {}",
            shown.len(),
            shown.join(", ")
        );
    }
    estimate.check(checked)?;
    Ok(recomputed)
}

/// Tokens of the longest prompts: three chunks.
pub(crate) const MOST_TOKENS: u64 = 3 * 77;

fn count(config: &ClipConfig) -> Result<u64> {
    Ok(ClipText::new(config.clone(), Weights::shapes_only())?
        .parameters
        .num_elements() as u64)
}

/// Returns the memory that the system has available, for a run on the CPU of a Linux machine.
fn available_bytes(device: Device) -> Option<u64> {
    if device != Device::Cpu {
        return None;
    }
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
