//! The time, money and memory of one set-up of a run. Pure.
//!
//! FLOPs, bytes and steps are counted. The share of the peak that a GPU spends is assumed
//! (`speed`), and the same for every set-up on as many GPUs: a smaller micro-batch is taken to
//! keep it.

use rectiflow_data::order::{Order, RankOf};
use serde::Serialize;

use crate::{
    error::Result,
    plan::{
        estimate::{MOST_TOKENS, Passes},
        facts::Facts,
        gpu_memory::{GpuMemory, MemorySettings, memory},
        setup::{Question, Setup},
        simulate::{BUCKET_BYTES, Cluster, StepWork, predict},
        speed::{Published, SampleFlops, asked_source},
    },
    ranks::launch::Sharding,
    recipe::Checked,
};

/// Duration and cost of the run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Time {
    /// Share of the peak that is reached by what training requires, waiting included.
    pub mfu: f64,
    /// The same by everything that is computed, recomputation included.
    pub hfu: f64,
    /// Number of steps.
    pub steps: u64,
    /// Seconds per step.
    pub step_secs: f64,
    /// Samples per second, all GPUs together.
    pub samples_per_sec: f64,
    /// Hours of the run.
    pub hours: f64,
    /// `hours` times the number of GPUs.
    pub gpu_hours: f64,
    /// Hours if nothing but the simulated links slowed down a single GPU's speed.
    pub simulated_hours: f64,
    /// Cost of the run, in the currency of the price; `None` without a price.
    pub money: Option<f64>,
}

/// Efficiency at a number of GPUs, 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Scaling {
    /// Number of GPUs.
    pub gpus: usize,
    /// Gradients exchanged once per step, overlapping the last backward pass, as the trainer does.
    pub once: f64,
    /// The same, without overlap.
    pub once_in_turn: f64,
    /// Gradients exchanged after every micro-batch, overlapping its backward pass.
    pub each: f64,
    /// The same, without overlap.
    pub each_in_turn: f64,
}

/// Numbers of GPUs in the table of efficiencies.
const TABLE_GPUS: [usize; 7] = [1, 8, 32, 64, 128, 512, 1024];

/// A run with one set-up, and the facts that its numbers follow from.
pub(crate) struct Planner<'a> {
    pub(crate) checked: &'a Checked,
    pub(crate) facts: &'a Facts,
    pub(crate) question: &'a Question,
    pub(crate) setup: Setup,
    pub(crate) memory: GpuMemory,
    /// Micro-batches per step of the rank with the most.
    micro_batches: u64,
}

impl<'a> Planner<'a> {
    /// Prepares the numbers of a set-up, whose samples `order` puts into steps.
    ///
    /// # Errors
    /// [`crate::error::Error::Data`] if there are more GPUs than lanes, with the number of lanes
    /// that would suffice.
    pub(crate) fn new(
        checked: &'a Checked,
        facts: &'a Facts,
        question: &'a Question,
        setup: Setup,
        order: &Order,
    ) -> Result<Self> {
        let slots = order.slots_of(RankOf {
            rank: 0,
            ranks: setup.gpus,
        })?;
        let settings = memory_settings(checked, facts, &setup);
        Ok(Self {
            checked,
            facts,
            question,
            setup,
            memory: memory(&facts.unet, facts.parameters, &settings),
            micro_batches: slots.len() as u64,
        })
    }

    /// Returns the arithmetic of a sample, on average over all buckets.
    pub(crate) fn sample_flops(&self) -> SampleFlops {
        SampleFlops {
            required: self.facts.mean_sample_flops(),
            recomputed: self.facts.mean_recomputed_flops(&self.memory.recomputed),
        }
    }

    fn cluster(&self, gpus: usize) -> Cluster {
        let hardware = self.question.hardware;
        let gpus_per_node = hardware.gpus_per_node;
        Cluster {
            ranks: gpus,
            ranks_per_node: gpus_per_node,
            inside: hardware.inside,
            between: self.question.network.link(gpus_per_node.min(gpus)),
        }
    }

    /// Returns the work per step of the rank with the most micro-batches, if a GPU spends `hfu` of
    /// its peak.
    fn step_work(&self, hfu: f64) -> StepWork {
        let sample = self.sample_flops();
        let flops = sample.spent() * self.setup.micro_batch as f64;
        let parameters = self.facts.parameters.trained as f64;
        let value_bytes = self.checked.recipe.train.dtype.value_bytes();
        StepWork {
            micro_batch_secs: flops / (hfu * self.question.hardware.peak_flops),
            backward_share: sample.backward_share(),
            micro_batches: self.micro_batches,
            // A few passes over the rank's part in GPU memory take milliseconds.
            update_secs: 0.0,
            gradient_bytes: 4.0 * parameters,
            weight_bytes: value_bytes as f64 * parameters,
            bucket_bytes: BUCKET_BYTES,
        }
    }

    /// Returns the work per step at the speed of a GPU that waits for nothing.
    fn undisturbed_work(&self) -> StepWork {
        let published = || Published::at_least(1).hfu();
        self.step_work(self.question.mfu.unwrap_or_else(published))
    }

    /// Returns the seconds of a step by the simulation of the links alone.
    fn simulated_secs(&self) -> f64 {
        let cluster = self.cluster(self.setup.gpus);
        let work = self.undisturbed_work();
        predict(&cluster, &work, self.setup.sharding, true).step_secs
    }

    /// Returns the seconds of a step with the share of the peak that is asked for, or else the
    /// published run's. That share includes what the run lost to its own links; slower links, or
    /// more traffic, are never taken to cost less than their simulation.
    fn step_secs(&self) -> f64 {
        let simulated = self.simulated_secs();
        if self.question.mfu.is_some() {
            return simulated;
        }
        let work = self.step_work(Published::at_least(self.setup.gpus).hfu());
        simulated.max(work.micro_batch_secs * work.micro_batches as f64)
    }

    /// Returns the source of the speed, in words.
    pub(crate) fn speed_source(&self) -> String {
        match self.question.mfu {
            Some(mfu) => asked_source(mfu),
            None => Published::at_least(self.setup.gpus).source(self.question),
        }
    }

    pub(crate) fn time(&self) -> Time {
        let gpus = self.setup.gpus as f64;
        let step_secs = self.step_secs();
        let steps = self
            .checked
            .recipe
            .train
            .samples
            .div_ceil(self.checked.batch());
        let samples_per_sec = self.checked.batch() as f64 / step_secs;
        let hours = steps as f64 * step_secs / 3600.0;
        let gpu_hours = hours * gpus;
        let price = self.question.gpu_hour_price(self.checked);
        let sample = self.sample_flops();
        let share = |flops| samples_per_sec * flops / (gpus * self.question.hardware.peak_flops);
        Time {
            mfu: share(sample.required),
            hfu: share(sample.spent()),
            steps,
            step_secs,
            samples_per_sec,
            hours,
            gpu_hours,
            simulated_hours: steps as f64 * self.simulated_secs() / 3600.0,
            money: price.map(|price| price * gpu_hours),
        }
    }

    /// Returns the expected efficiency for each number of GPUs in the table.
    pub(crate) fn scaling(&self) -> Vec<Scaling> {
        let work = self.undisturbed_work();
        let mut rows = Vec::with_capacity(TABLE_GPUS.len());
        for gpus in TABLE_GPUS {
            let cluster = self.cluster(gpus);
            rows.push(Scaling {
                gpus,
                once: predict(&cluster, &work, Sharding::Once, true).efficiency,
                once_in_turn: predict(&cluster, &work, Sharding::Once, false).efficiency,
                each: predict(&cluster, &work, Sharding::Each, true).efficiency,
                each_in_turn: predict(&cluster, &work, Sharding::Each, false).efficiency,
            });
        }
        rows
    }
}

fn memory_settings(checked: &Checked, facts: &Facts, setup: &Setup) -> MemorySettings {
    let recipe = &checked.recipe;
    MemorySettings {
        passes: Passes {
            batch: setup.micro_batch as u64,
            latent: facts.largest_latents().map(|side| side as u64),
            tokens: MOST_TOKENS,
            precision: recipe.train.dtype,
            width: 1,
            accumulates: setup.micro_batches > setup.gpus,
            fused: false,
            update: setup.update,
        },
        checkpointing: setup.checkpointing,
        budget_bytes: setup.budget_bytes(),
        sharding: setup.sharding,
        ranks: setup.gpus,
        averaged: recipe.ema.half_life_samples.is_some(),
    }
}
