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

use rectiflow_data::order::{Order, RankOf};
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
    let work = RankWork::new(&facts.order, question)?;
    let sample_flops = facts.mean_sample_flops();
    let (mfu, mfu_source) = single_gpu_mfu(question);
    let step_work = |mfu: f64| step_work(checked, facts, question, &work, mfu);
    let sharding = checked.recipe.ranks.sharding;
    let simulated = predict(
        &cluster(question, question.gpus),
        &step_work(mfu),
        sharding,
        true,
    );
    let (step_secs, speed_source) = match question.mfu {
        Some(_) => (simulated.step_secs, mfu_source),
        None => {
            let (mfu, at) = published_mfu(question.gpus);
            let busy = step_work(mfu);
            (
                busy.micro_batch_secs * busy.micro_batches as f64,
                published_source(question, mfu, at),
            )
        }
    };
    let time = time(
        checked,
        question,
        sample_flops,
        [step_secs, simulated.step_secs],
    );
    let memory = memory_terms(checked, facts, question);
    let memory_bytes = total(&memory);
    let host_memory = host_memory(checked, facts, question);
    let parameters = facts.parameters.trained as f64;
    let vectors = if checked.recipe.ema.half_life_samples.is_some() {
        4.0
    } else {
        3.0
    };
    let mut assumptions = vec![speed_source];
    assumptions.extend(facts.assumptions.iter().cloned());
    assumptions.extend(machine_assumptions(checked, question));
    let idle_share = facts.order.idle_share(question.gpus);
    Ok(Plan {
        gpus: question.gpus,
        hardware: question.hardware.label.to_owned(),
        assumptions,
        warnings: warnings(checked, question, memory_bytes, idle_share),
        flops: Arithmetic {
            sample: sample_flops,
            step: sample_flops * checked.batch() as f64,
            run: sample_flops * checked.recipe.train.samples as f64,
        },
        memory,
        memory_bytes,
        memory_available_bytes: question.hardware.memory_bytes,
        host_memory,
        checkpoint_bytes: 4.0 * vectors * parameters * checked.recipe.checkpoint.keep as f64,
        storage: facts.storage(checked.recipe.train.samples, time.samples_per_sec),
        idle_share,
        scaling: TABLE_GPUS
            .iter()
            .map(|&gpus| scaling(question, gpus, &step_work(mfu)))
            .collect(),
        time,
    })
}

/// The work per step of the rank with the most micro-batches.
struct RankWork {
    micro_batches: u64,
}

impl RankWork {
    fn new(order: &Order, question: &Question) -> Result<Self> {
        let slots = order.slots_of(RankOf {
            rank: 0,
            ranks: question.gpus,
        })?;
        Ok(Self {
            micro_batches: slots.len() as u64,
        })
    }
}

fn cluster(question: &Question, gpus: usize) -> Cluster {
    let Hardware {
        gpus_per_node,
        inside,
        ..
    } = *question.hardware;
    let between = question.network.link(gpus_per_node.min(gpus));
    Cluster {
        ranks: gpus,
        ranks_per_node: gpus_per_node,
        inside,
        between,
    }
}

fn step_work(
    checked: &Checked,
    facts: &Facts,
    question: &Question,
    work: &RankWork,
    mfu: f64,
) -> StepWork {
    let flops = facts.mean_sample_flops() * checked.recipe.train.micro_batch as f64;
    let parameters = facts.parameters.trained as f64;
    StepWork {
        micro_batch_secs: flops / (mfu * question.hardware.peak_flops),
        backward_share: if is_checkpointed(checked) {
            0.75
        } else {
            2.0 / 3.0
        },
        micro_batches: work.micro_batches,
        // A few passes over the rank's part in GPU memory take milliseconds.
        update_secs: 0.0,
        gradient_bytes: 4.0 * parameters,
        weight_bytes: checked.recipe.train.dtype.value_bytes() as f64 * parameters,
        bucket_bytes: BUCKET_BYTES,
    }
}

/// Returns the share of the peak that a single GPU reaches, and the source of the figure.
fn single_gpu_mfu(question: &Question) -> (f64, String) {
    match question.mfu {
        Some(mfu) => {
            let percent = 100.0 * mfu;
            (
                mfu,
                format!(
                    "a single GPU reaches {percent:.1}% of its peak (--mfu); the cost of the links is simulated"
                ),
            )
        }
        None => {
            let (mfu, _) = published_mfu(1);
            (mfu, String::new())
        }
    }
}

fn published_source(question: &Question, mfu: f64, at: usize) -> String {
    let rate = mfu * PUBLISHED_PEAK_FLOPS / PUBLISHED_SAMPLE_FLOPS;
    let elsewhere = if question.hardware.name == "h100-sxm" {
        String::new()
    } else {
        format!("; not measured on {}", question.hardware.label)
    };
    format!(
        "{:.1}% of the peak is reached, the share of the published run with {rate} samples/s on each of {at} H100 \
         (11 on one, 9.6 on eight, 9.4 on 32; its network and loader included){elsewhere}: --mfu sets another share",
        100.0 * mfu
    )
}

/// Whether blocks are recomputed in the backward pass; with a budget, some are.
fn is_checkpointed(checked: &Checked) -> bool {
    checked.recipe.memory.checkpointing != Checkpointing::Off
}

fn machine_assumptions(checked: &Checked, question: &Question) -> Vec<String> {
    let Question {
        hardware,
        gpus,
        network,
        ..
    } = question;
    let mut found = vec![format!(
        "peak {:.1} TFLOP/s, {} ({})",
        hardware.peak_flops / 1e12,
        hardware.label,
        hardware.source
    )];
    let precision = if checked.recipe.train.dtype == Precision::Bf16 {
        "bf16"
    } else {
        "fp32"
    };
    let checkpointing = match checked.recipe.memory.checkpointing {
        Checkpointing::Off => "no checkpointing",
        Checkpointing::Full => "every block checkpointed",
        Checkpointing::Budget => "as few blocks checkpointed as the budget allows",
    };
    found.push(format!(
        "{precision} and {checkpointing} (train.dtype, memory.checkpointing); gradients are sent during the \
         backward pass, and new weights are waited for"
    ));
    if *gpus > 1 {
        let between = if *gpus > hardware.gpus_per_node {
            format!(", between them {}", network.label)
        } else {
            String::new()
        };
        found.push(format!(
            "machines of {} GPUs, {} inside{between}, at the rates that NCCL assumes",
            hardware.gpus_per_node, hardware.inside.label
        ));
    }
    found
}

fn time(
    checked: &Checked,
    question: &Question,
    sample_flops: f64,
    [step_secs, simulated]: [f64; 2],
) -> Time {
    let samples = checked.recipe.train.samples;
    let steps = samples.div_ceil(checked.batch());
    let samples_per_sec = checked.batch() as f64 / step_secs;
    let hours = steps as f64 * step_secs / 3600.0;
    let gpu_hours = hours * question.gpus as f64;
    let whole = checked.recipe.run.price_per_hour.map(|price| price * hours);
    Time {
        mfu: samples_per_sec * sample_flops / (question.gpus as f64 * question.hardware.peak_flops),
        steps,
        step_secs,
        samples_per_sec,
        hours,
        gpu_hours,
        simulated_hours: steps as f64 * simulated / 3600.0,
        money: question
            .price_per_gpu_hour
            .map(|price| price * gpu_hours)
            .or(whole),
    }
}

fn memory_terms(checked: &Checked, facts: &Facts, question: &Question) -> Vec<Term> {
    let [height, width] = facts.largest_latents().map(|side| side as u64);
    let recipe = &checked.recipe;
    let passes = Passes {
        batch: recipe.train.micro_batch as u64,
        latent: [height, width],
        tokens: MOST_TOKENS,
        precision: recipe.train.dtype,
        width: 1,
        accumulates: recipe.train.micro_batches > question.gpus,
        fused: false,
    };
    let settings = MemorySettings {
        passes,
        checkpointing: recipe.memory.checkpointing,
        budget_bytes: recipe.memory.budget_bytes(),
        sharding: recipe.ranks.sharding,
        ranks: question.gpus,
        averaged: recipe.ema.half_life_samples.is_some(),
    };
    memory(&facts.unet, facts.parameters, &settings)
}

/// Returns the terms of host memory: the guard's snapshots of the rank's part, and the data read
/// ahead.
fn host_memory(checked: &Checked, facts: &Facts, question: &Question) -> Vec<Term> {
    let guard = &checked.recipe.guard;
    let vectors = if checked.recipe.ema.half_life_samples.is_some() {
        4.0
    } else {
        3.0
    };
    let owners = if checked.recipe.ranks.sharding == Sharding::None {
        1
    } else {
        question.gpus
    };
    let snapshot = 4.0 * vectors * facts.parameters.trained as f64 / owners as f64;
    let room = guard.snapshot_gib * f64::from(1 << 30);
    let levels = ((room / (2.0 * snapshot)) as usize).min(guard.snapshot_updates.len());
    let num_snapshots = if guard.enabled { 2 * levels } else { 0 };
    let snapshots = Term {
        what: format!("the guard's {num_snapshots} snapshots"),
        bytes: num_snapshots as f64 * snapshot,
    };
    let read_ahead = Term {
        what: "latents and text read ahead".into(),
        bytes: facts.read_ahead_bytes as f64,
    };
    [snapshots, read_ahead]
        .into_iter()
        .filter(|term| term.bytes > 0.0)
        .collect()
}

fn warnings(
    checked: &Checked,
    question: &Question,
    memory_bytes: f64,
    idle_share: f64,
) -> Vec<String> {
    let mut found = Vec::new();
    let room = question.hardware.memory_bytes;
    if memory_bytes > room {
        found.push(format!(
            "it does not fit: it needs {:.1} GB and {} has {:.0}; lower train.micro_batch, or use more GPUs{}{}",
            memory_bytes / 1e9,
            question.hardware.label,
            room / 1e9,
            if is_checkpointed(checked) { "" } else { ", memory.checkpointing = \"full\"" },
            if checked.recipe.ranks.sharding == Sharding::Each { "" } else { ", or ranks.sharding = \"each\"" }
        ));
    }
    if idle_share > 0.0 {
        found.push(format!(
            "{:.0}% of the time is spent waiting for GPUs with one lane more: use a number that divides train.lanes",
            100.0 * idle_share
        ));
    }
    found
}

fn scaling(question: &Question, gpus: usize, work: &StepWork) -> Scaling {
    let cluster = cluster(question, gpus);
    let of = |sharding, overlap| predict(&cluster, work, sharding, overlap).efficiency;
    Scaling {
        gpus,
        once: of(Sharding::Once, true),
        once_in_turn: of(Sharding::Once, false),
        each: of(Sharding::Each, true),
        each_in_turn: of(Sharding::Each, false),
    }
}
