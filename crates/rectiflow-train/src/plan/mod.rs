//! Predicts what a run takes on hardware that need not exist yet: hours, money, memory, bandwidth,
//! and how it scales; and which set-up of the same run would be the cheapest. Pure.
//!
//! FLOPs, bytes and steps are counted, recomputation included. The share of a GPU's peak that
//! training spends is assumed; every plan names it and its source. The default is the share that
//! one published run spent (`speed`), which includes all losses to that run's network, loader and
//! machines. Facts about the model and the data come from `facts`.

pub mod counting;
pub mod estimate;
pub mod facts;
pub mod gpu_memory;
pub mod planner;
pub mod search;
pub mod setup;
pub mod simulate;
mod speed;

use serde::Serialize;

use crate::{
    error::Result,
    plan::{
        facts::{Facts, Storage},
        gpu_memory::Term,
        planner::{Planner, Scaling, Time},
        search::{FREE_SHARE, Priced, Setups, search},
        setup::{Question, Setup},
    },
    ranks::launch::Sharding,
    recipe::{Checked, sections::Checkpointing},
    state::{moments::MomentsKind, precision::Precision},
};

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
    /// The recipe's set-up beside the cheapest that fits.
    pub setups: Setups,
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
    /// FLOPs that training requires for one sample, on average.
    pub sample: f64,
    /// FLOPs that checkpointing computes a second time for one sample, on average.
    pub recomputed: f64,
    /// FLOPs that training requires for a step, over all GPUs.
    pub step: f64,
    /// FLOPs that training requires for the run.
    pub run: f64,
}

/// Predicts a run.
///
/// # Errors
/// [`crate::error::Error::Data`] if there are more GPUs than lanes, with the number of lanes that
/// would suffice.
pub fn plan(checked: &Checked, facts: &Facts, question: &Question) -> Result<Plan> {
    let setup = Setup::of_recipe(checked, question.gpus);
    let planner = Planner::new(checked, facts, question, setup, &facts.order)?;
    let setups = search(&planner);
    let time = setups.recipe.time;
    let memory_bytes = setups.recipe.memory_bytes;
    let idle_share = facts.order.idle_share(question.gpus);
    Ok(Plan {
        gpus: question.gpus,
        hardware: question.hardware.label.to_owned(),
        assumptions: assumptions(&planner, &setups),
        warnings: warnings(&planner, &setups, idle_share),
        flops: arithmetic(&planner),
        memory: planner.memory.terms.clone(),
        memory_bytes,
        memory_available_bytes: question.hardware.memory_bytes,
        host_memory: host_memory(&planner),
        checkpoint_bytes: checkpoint_bytes(&planner),
        storage: facts.storage(checked.recipe.train.samples, time.samples_per_sec),
        idle_share,
        scaling: planner.scaling(),
        time,
        setups,
    })
}

fn arithmetic(planner: &Planner<'_>) -> Arithmetic {
    let sample = planner.sample_flops();
    Arithmetic {
        sample: sample.required,
        recomputed: sample.recomputed,
        step: sample.required * planner.checked.batch() as f64,
        run: sample.required * planner.checked.recipe.train.samples as f64,
    }
}

/// Returns the bytes of a state of as many parameters: masters, both moments, the average.
fn state_bytes(checked: &Checked, parameters: u64) -> f64 {
    let has_average = checked.recipe.ema.half_life_samples.is_some();
    let fp32 = 4 * if has_average { 2 } else { 1 } * parameters;
    (fp32 + checked.recipe.optimizer.state.bytes(parameters)) as f64
}

/// Returns the terms of host memory: the guard's snapshots of the rank's part, and the data read
/// ahead.
fn host_memory(planner: &Planner<'_>) -> Vec<Term> {
    let num_snapshots = num_snapshots(planner);
    let mut terms = vec![
        Term {
            what: format!("the guard's {num_snapshots} snapshots"),
            bytes: num_snapshots as f64 * snapshot_bytes(planner),
        },
        Term {
            what: "latents and text read ahead".into(),
            bytes: planner.facts.read_ahead_bytes as f64,
        },
    ];
    terms.retain(|term| term.bytes > 0.0);
    terms
}

/// Returns the bytes of a rank's part of a snapshot.
fn snapshot_bytes(planner: &Planner<'_>) -> f64 {
    let owners = if planner.setup.sharding == Sharding::None {
        1
    } else {
        planner.setup.gpus
    };
    state_bytes(planner.checked, planner.facts.parameters.trained) / owners as f64
}

/// Returns the number of the guard's snapshots that memory has room for.
fn num_snapshots(planner: &Planner<'_>) -> usize {
    let guard = &planner.checked.recipe.guard;
    if !guard.enabled {
        return 0;
    }
    let room = guard.snapshot_gib * f64::from(1 << 30);
    let levels = (room / (2.0 * snapshot_bytes(planner))) as usize;
    2 * levels.min(guard.snapshot_updates.len())
}

fn checkpoint_bytes(planner: &Planner<'_>) -> f64 {
    let keep = planner.checked.recipe.checkpoint.keep;
    state_bytes(planner.checked, planner.facts.parameters.trained) * keep as f64
}

/// Returns all assumptions, that on the speed first.
fn assumptions(planner: &Planner<'_>, setups: &Setups) -> Vec<String> {
    let hardware = planner.question.hardware;
    let mut found = vec![planner.speed_source()];
    found.extend(planner.facts.assumptions.iter().cloned());
    found.push(format!(
        "peak {:.1} TFLOP/s, {} ({})",
        hardware.peak_flops / 1e12,
        hardware.label,
        hardware.source
    ));
    let precision = precision_name(planner.checked.recipe.train.dtype);
    let checkpointing = checkpointing_words(planner.setup.checkpointing);
    found.push(format!(
        "{precision} and {checkpointing} (train.dtype, memory.checkpointing); gradients are sent \
         during the backward pass, and new weights are waited for"
    ));
    if planner.setup.gpus > 1 {
        found.push(links_assumption(planner.question));
    }
    if let Some(cheapest) = &setups.cheapest {
        found.push(search_assumption(setups, cheapest));
    }
    found
}

fn links_assumption(question: &Question) -> String {
    let hardware = question.hardware;
    let per_node = hardware.gpus_per_node;
    let mut links = format!("{} inside", hardware.inside.label);
    if question.gpus > per_node {
        links += ", between them ";
        links += question.network.label;
    }
    format!("machines of {per_node} GPUs, {links}, at the rates that NCCL assumes")
}

/// Returns what the cheapest set-up rests on, in words.
fn search_assumption(setups: &Setups, cheapest: &Priced) -> String {
    let free = 100.0 * FREE_SHARE;
    let mut found = format!(
        "the cheapest set-up takes at most {:.1} hours (--within), leaves {free:.0}% of the GPU's \
         memory free and keeps the samples of a step; within 1% of the price more GPUs, then a \
         larger micro-batch, count as better",
        setups.within_hours
    );
    if cheapest.setup.update != setups.recipe.setup.update {
        found += "; nothing fits with the recipe's own optimizer.state and \
                  train.update_in_backward, and these change what a run learns (docs/one-card.md); \
                  the latter needs guard.skip_by = \"loss\" and guard.vitals_every_updates = 0";
    }
    if cheapest.setup.micro_batch < setups.recipe.setup.micro_batch {
        found += "; that a smaller micro-batch spends the same share of the peak has not been \
                  measured";
    }
    found
}

fn warnings(planner: &Planner<'_>, setups: &Setups, idle_share: f64) -> Vec<String> {
    let mut found = Vec::new();
    if setups.recipe.memory_bytes > planner.question.hardware.memory_bytes {
        found.push(memory_warning(planner, setups));
    }
    if idle_share > 0.0 {
        found.push(format!(
            "{:.0}% of the time is spent waiting for GPUs with one lane more: use a number that \
             divides train.lanes",
            100.0 * idle_share
        ));
    }
    found
}

fn memory_warning(planner: &Planner<'_>, setups: &Setups) -> String {
    let hardware = planner.question.hardware;
    let mut warning = format!(
        "it does not fit: it needs {:.1} GB and {} has {:.0}; lower train.micro_batch, or use more \
         GPUs",
        setups.recipe.memory_bytes / 1e9,
        hardware.label,
        hardware.memory_bytes / 1e9
    );
    if planner.setup.checkpointing == Checkpointing::Off {
        warning += ", memory.checkpointing = \"full\"";
    }
    if planner.setup.sharding != Sharding::Each && !planner.setup.update.in_backward {
        warning += ", or ranks.sharding = \"each\"";
    }
    if planner.setup.update.moments == MomentsKind::Fp32 {
        warning += ", or optimizer.state = \"8bit\"";
    }
    warning
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
