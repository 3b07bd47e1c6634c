//! Predicts what a run takes on hardware that need not exist yet: hours, money, memory, bandwidth,
//! and how it scales. Pure.
//!
//! FLOPs, bytes and steps are counted. The share of a GPU's peak that training reaches is assumed;
//! every plan names it and its source. The default is the share that one published run reached,
//! which includes all losses to that run's network, loader and machines. Facts about the model and
//! the data come from `facts`.

pub mod estimate;
pub mod facts;
pub mod gpu_memory;
pub mod simulate;

use rectiflow_data::order::RankOf;
use serde::Serialize;

use crate::{
    error::Result,
    hardware::{Hardware, Network},
    plan::{
        estimate::{MOST_TOKENS, Passes},
        facts::{Facts, Storage},
        gpu_memory::{MemorySettings, Term, memory, total},
        simulate::{BUCKET_BYTES, Cluster, StepWork, predict},
    },
    ranks::launch::Sharding,
    recipe::{Checked, sections::Checkpointing},
    state::precision::Precision,
};

/// The hardware and prices that a plan is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Question {
    /// GPU model.
    pub hardware: &'static Hardware,
    /// Number of GPUs.
    pub gpus: usize,
    /// Network between machines.
    pub network: &'static Network,
    /// Share of the peak that one GPU reaches without waiting for others, 0 to 1; `None` takes the
    /// published run's.
    pub mfu: Option<f64>,
    /// Price of one GPU per hour, in any currency.
    pub price_per_gpu_hour: Option<f64>,
}

/// The published run that is the reference for speed: (GPUs, samples per second and GPU), on H100
/// SXM (bigASP v2.5, an SDXL to flow matching; 4 machines of 8, latents of about a megapixel,
/// activation checkpointing).
const PUBLISHED: [(usize, f64); 3] = [(1, 11.0), (8, 9.6), (32, 9.4)];
/// FLOPs of one of its samples, assumed to be 1024 x 1024 pixels with 77 tokens: 3 x 6.761e12 in
/// the UNet, 0.11e12 in the encoders.
const PUBLISHED_SAMPLE_FLOPS: f64 = 20.39e12;
/// Peak of its GPUs, in FLOP/s.
const PUBLISHED_PEAK_FLOPS: f64 = 989.4e12;
/// Numbers of GPUs in the table of efficiencies.
const TABLE_GPUS: [usize; 7] = [1, 8, 32, 64, 128, 512, 1024];

/// Returns the share of the peak that the published run reached, and the number of GPUs there: the
/// smallest of its sizes that is not below `gpus`.
fn published_mfu(gpus: usize) -> (f64, usize) {
    let &(at, rate) = PUBLISHED
        .iter()
        .find(|(at, _)| *at >= gpus)
        .unwrap_or(&PUBLISHED[PUBLISHED.len() - 1]);
    (rate * PUBLISHED_SAMPLE_FLOPS / PUBLISHED_PEAK_FLOPS, at)
}

/// The prediction for a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Number of GPUs.
    pub gpus: usize,
    /// Full name of the GPU model.
    pub hardware: String,
    /// Assumptions, one sentence each.
    pub assumptions: Vec<String>,
    /// Problems that the user should solve, one sentence each.
    pub warnings: Vec<String>,
    /// Arithmetic, in FLOP.
    pub flops: Arithmetic,
    /// Time and money.
    pub time: Time,
    /// Memory of one GPU, term by term.
    pub memory: Vec<Term>,
    /// Sum of the terms of `memory`.
    pub memory_bytes: f64,
    /// Memory of the GPU model.
    pub memory_available_bytes: f64,
    /// Host memory of one rank, term by term.
    pub host_memory: Vec<Term>,
    /// Disk space of the checkpoints kept.
    pub checkpoint_bytes: f64,
    /// Reads from storage.
    pub storage: Storage,
    /// Share of the time that ranks wait for ranks with one lane more, 0 to 1.
    pub idle_share: f64,
    /// Expected efficiency for other numbers of GPUs, with the same number of micro-batches per
    /// GPU.
    pub scaling: Vec<Scaling>,
}

/// FLOPs of training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Arithmetic {
    /// FLOPs of training on one sample, on average.
    pub sample: f64,
    /// FLOPs of a step, over all GPUs.
    pub step: f64,
    /// FLOPs of the run.
    pub run: f64,
}

/// Duration and cost of the run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Time {
    /// Share of the peak that is reached, waiting included.
    pub mfu: f64,
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

/// Predicts a run.
///
/// # Errors
/// [`crate::error::Error::Data`] if there are more GPUs than lanes, with the number of lanes that
/// would suffice.
pub fn plan(checked: &Checked, facts: &Facts, question: &Question) -> Result<Plan> {
    let planner = Planner::new(checked, facts, question)?;
    let speed = planner.speed();
    let time = planner.time(&speed);
    let memory = planner.memory();
    let memory_bytes = total(&memory);
    let idle_share = facts.order.idle_share(question.gpus);
    Ok(Plan {
        gpus: question.gpus,
        hardware: question.hardware.label.to_owned(),
        assumptions: planner.assumptions(speed.source),
        warnings: planner.warnings(memory_bytes, idle_share),
        flops: planner.arithmetic(),
        memory,
        memory_bytes,
        memory_available_bytes: question.hardware.memory_bytes,
        host_memory: planner.host_memory(),
        checkpoint_bytes: planner.checkpoint_bytes(),
        storage: facts.storage(checked.recipe.train.samples, time.samples_per_sec),
        idle_share,
        scaling: planner.scaling(),
        time,
    })
}

/// The speed of a run, and where the figure comes from.
struct Speed {
    step_secs: f64,
    /// Seconds of a step by the simulation of the links alone.
    simulated_secs: f64,
    /// The source of `step_secs`, in words.
    source: String,
}

/// A question about a run, with the facts that answer it.
struct Planner<'a> {
    checked: &'a Checked,
    facts: &'a Facts,
    question: &'a Question,
    /// Micro-batches per step of the rank with the most.
    micro_batches: u64,
}

impl<'a> Planner<'a> {
    fn new(checked: &'a Checked, facts: &'a Facts, question: &'a Question) -> Result<Self> {
        let slots = facts.order.slots_of(RankOf {
            rank: 0,
            ranks: question.gpus,
        })?;
        Ok(Self {
            checked,
            facts,
            question,
            micro_batches: slots.len() as u64,
        })
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

    /// Returns the work per step of the rank with the most micro-batches, if a GPU reaches `mfu`.
    fn step_work(&self, mfu: f64) -> StepWork {
        let train = &self.checked.recipe.train;
        let flops = self.facts.mean_sample_flops() * train.micro_batch as f64;
        let parameters = self.facts.parameters.trained as f64;
        StepWork {
            micro_batch_secs: flops / (mfu * self.question.hardware.peak_flops),
            backward_share: if self.is_checkpointed() {
                0.75
            } else {
                2.0 / 3.0
            },
            micro_batches: self.micro_batches,
            // A few passes over the rank's part in GPU memory take milliseconds.
            update_secs: 0.0,
            gradient_bytes: 4.0 * parameters,
            weight_bytes: train.dtype.value_bytes() as f64 * parameters,
            bucket_bytes: BUCKET_BYTES,
        }
    }

    /// Returns the share of the peak that a single GPU reaches.
    fn single_gpu_mfu(&self) -> f64 {
        match self.question.mfu {
            Some(mfu) => mfu,
            None => published_mfu(1).0,
        }
    }

    /// Returns the speed with the share of the peak that is asked for, or else the published run's.
    fn speed(&self) -> Speed {
        let gpus = self.question.gpus;
        let sharding = self.checked.recipe.ranks.sharding;
        let work = self.step_work(self.single_gpu_mfu());
        let simulated_secs = predict(&self.cluster(gpus), &work, sharding, true).step_secs;
        if let Some(mfu) = self.question.mfu {
            let percent = 100.0 * mfu;
            return Speed {
                step_secs: simulated_secs,
                simulated_secs,
                source: format!(
                    "a single GPU reaches {percent:.1}% of its peak (--mfu); the cost of the \
                     links is simulated"
                ),
            };
        }
        let (mfu, at) = published_mfu(gpus);
        let work = self.step_work(mfu);
        Speed {
            step_secs: work.micro_batch_secs * work.micro_batches as f64,
            simulated_secs,
            source: published_source(self.question, mfu, at),
        }
    }

    fn arithmetic(&self) -> Arithmetic {
        let sample = self.facts.mean_sample_flops();
        Arithmetic {
            sample,
            step: sample * self.checked.batch() as f64,
            run: sample * self.checked.recipe.train.samples as f64,
        }
    }

    fn time(&self, speed: &Speed) -> Time {
        let Question { hardware, gpus, .. } = *self.question;
        let recipe = &self.checked.recipe;
        let steps = recipe.train.samples.div_ceil(self.checked.batch());
        let samples_per_sec = self.checked.batch() as f64 / speed.step_secs;
        let hours = steps as f64 * speed.step_secs / 3600.0;
        let gpu_hours = hours * gpus as f64;
        let money = match (self.question.price_per_gpu_hour, recipe.run.price_per_hour) {
            (Some(price), _) => Some(price * gpu_hours),
            (None, Some(price)) => Some(price * hours),
            (None, None) => None,
        };
        let flops_per_sec = samples_per_sec * self.facts.mean_sample_flops();
        Time {
            mfu: flops_per_sec / (gpus as f64 * hardware.peak_flops),
            steps,
            step_secs: speed.step_secs,
            samples_per_sec,
            hours,
            gpu_hours,
            simulated_hours: steps as f64 * speed.simulated_secs / 3600.0,
            money,
        }
    }

    /// Whether blocks are recomputed in the backward pass; with a budget, some are.
    fn is_checkpointed(&self) -> bool {
        self.checked.recipe.memory.checkpointing != Checkpointing::Off
    }

    /// Returns the number of fp32 vectors of a checkpoint: masters, both moments, the average.
    fn num_vectors(&self) -> f64 {
        if self.checked.recipe.ema.half_life_samples.is_some() {
            4.0
        } else {
            3.0
        }
    }

    /// Returns the terms of a GPU's memory.
    fn memory(&self) -> Vec<Term> {
        let recipe = &self.checked.recipe;
        let passes = Passes {
            batch: recipe.train.micro_batch as u64,
            latent: self.facts.largest_latents().map(|side| side as u64),
            tokens: MOST_TOKENS,
            precision: recipe.train.dtype,
            width: 1,
            accumulates: recipe.train.micro_batches > self.question.gpus,
            fused: false,
        };
        let settings = MemorySettings {
            passes,
            checkpointing: recipe.memory.checkpointing,
            budget_bytes: recipe.memory.budget_bytes(),
            sharding: recipe.ranks.sharding,
            ranks: self.question.gpus,
            averaged: recipe.ema.half_life_samples.is_some(),
        };
        memory(&self.facts.unet, self.facts.parameters, &settings)
    }

    /// Returns the terms of host memory: the guard's snapshots of the rank's part, and the data
    /// read ahead.
    fn host_memory(&self) -> Vec<Term> {
        let num_snapshots = self.num_snapshots();
        let mut terms = vec![
            Term {
                what: format!("the guard's {num_snapshots} snapshots"),
                bytes: num_snapshots as f64 * self.snapshot_bytes(),
            },
            Term {
                what: "latents and text read ahead".into(),
                bytes: self.facts.read_ahead_bytes as f64,
            },
        ];
        terms.retain(|term| term.bytes > 0.0);
        terms
    }

    /// Returns the bytes of a rank's part of a snapshot.
    fn snapshot_bytes(&self) -> f64 {
        let owners = if self.checked.recipe.ranks.sharding == Sharding::None {
            1
        } else {
            self.question.gpus
        };
        4.0 * self.num_vectors() * self.facts.parameters.trained as f64 / owners as f64
    }

    /// Returns the number of the guard's snapshots that memory has room for.
    fn num_snapshots(&self) -> usize {
        let guard = &self.checked.recipe.guard;
        if !guard.enabled {
            return 0;
        }
        let room = guard.snapshot_gib * f64::from(1 << 30);
        let levels = (room / (2.0 * self.snapshot_bytes())) as usize;
        2 * levels.min(guard.snapshot_updates.len())
    }

    fn checkpoint_bytes(&self) -> f64 {
        let parameters = self.facts.parameters.trained as f64;
        let keep = self.checked.recipe.checkpoint.keep;
        4.0 * self.num_vectors() * parameters * keep as f64
    }

    /// Returns all assumptions, that on the speed first.
    fn assumptions(&self, speed: String) -> Vec<String> {
        let Question { hardware, gpus, .. } = *self.question;
        let mut found = vec![speed];
        found.extend(self.facts.assumptions.iter().cloned());
        found.push(format!(
            "peak {:.1} TFLOP/s, {} ({})",
            hardware.peak_flops / 1e12,
            hardware.label,
            hardware.source
        ));
        let precision = precision_name(self.checked.recipe.train.dtype);
        let checkpointing = checkpointing_words(self.checked.recipe.memory.checkpointing);
        found.push(format!(
            "{precision} and {checkpointing} (train.dtype, memory.checkpointing); gradients are \
             sent during the backward pass, and new weights are waited for"
        ));
        if gpus > 1 {
            found.push(self.links_assumption());
        }
        found
    }

    fn links_assumption(&self) -> String {
        let hardware = self.question.hardware;
        let per_node = hardware.gpus_per_node;
        let mut links = format!("{} inside", hardware.inside.label);
        if self.question.gpus > per_node {
            links += ", between them ";
            links += self.question.network.label;
        }
        format!("machines of {per_node} GPUs, {links}, at the rates that NCCL assumes")
    }

    fn warnings(&self, memory_bytes: f64, idle_share: f64) -> Vec<String> {
        let mut found = Vec::new();
        if memory_bytes > self.question.hardware.memory_bytes {
            found.push(self.memory_warning(memory_bytes));
        }
        if idle_share > 0.0 {
            found.push(format!(
                "{:.0}% of the time is spent waiting for GPUs with one lane more: use a number \
                 that divides train.lanes",
                100.0 * idle_share
            ));
        }
        found
    }

    fn memory_warning(&self, memory_bytes: f64) -> String {
        let hardware = self.question.hardware;
        let mut warning = format!(
            "it does not fit: it needs {:.1} GB and {} has {:.0}; lower train.micro_batch, or use \
             more GPUs",
            memory_bytes / 1e9,
            hardware.label,
            hardware.memory_bytes / 1e9
        );
        if !self.is_checkpointed() {
            warning += ", memory.checkpointing = \"full\"";
        }
        if self.checked.recipe.ranks.sharding != Sharding::Each {
            warning += ", or ranks.sharding = \"each\"";
        }
        warning
    }

    /// Returns the expected efficiency for each number of GPUs in the table.
    fn scaling(&self) -> Vec<Scaling> {
        let work = self.step_work(self.single_gpu_mfu());
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

/// Returns the source of a published speed, in words.
fn published_source(question: &Question, mfu: f64, at: usize) -> String {
    let percent = 100.0 * mfu;
    let rate = mfu * PUBLISHED_PEAK_FLOPS / PUBLISHED_SAMPLE_FLOPS;
    let elsewhere = if question.hardware.name == "h100-sxm" {
        String::new()
    } else {
        format!("; not measured on {}", question.hardware.label)
    };
    format!(
        "{percent:.1}% of the peak is reached, the share of the published run with {rate} \
         samples/s on each of {at} H100 (11 on one, 9.6 on eight, 9.4 on 32; its network and \
         loader included){elsewhere}: --mfu sets another share"
    )
}

fn precision_name(precision: Precision) -> &'static str {
    match precision {
        Precision::Bf16 => "bf16",
        Precision::Fp32 => "fp32",
    }
}

fn checkpointing_words(checkpointing: Checkpointing) -> &'static str {
    match checkpointing {
        Checkpointing::Off => "no checkpointing",
        Checkpointing::Full => "every block checkpointed",
        Checkpointing::Budget => "as few blocks checkpointed as the budget allows",
    }
}
