//! `rectiflow bench ranks`: weak scaling on this machine, each rank on a core of its own.
//!
//! The same recipe is trained for a few steps by 1, 2, ... ranks, each with the same number of
//! micro-batches per step. If communication were free, all would take the same time. The bytes
//! counted in `metrics.jsonl` are compared with the bytes that crossed the loopback interface. If
//! the speed of the link is given, the measured step is compared with the simulator's prediction
//! from the single-rank run.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use rectiflow_train::{
    flat::FEWEST_BUCKETS,
    hardware::Link,
    metrics::{Event, StepMetrics, tail},
    precision::Precision,
    recipe::Recipe,
    simulate::{BUCKET_BYTES, Cluster, StepWork, predict},
    traffic::Collective,
};
use serde::Serialize;
use serde_json::json;

use crate::{
    local_ranks::Ranks,
    terminal::{
        answer::Answer,
        numbers::{median, short, table},
        signals::StopSignal,
    },
};

/// Train a few steps with 1, 2, ... ranks, each pinned to a core: seconds per step, efficiency,
/// bytes.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The recipe, a TOML file. No test loss, preview or checkpoint is made, and its run folder is
    /// not touched.
    recipe: PathBuf,
    /// Override a key of the recipe. Repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
    /// Numbers of ranks to measure, at most the number of cores.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2], value_name = "N,N")]
    ranks: Vec<usize>,
    /// Measured steps; three warm-up steps run before them.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Micro-batches per step of each rank.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    micro_batches: u64,
    /// Speed of the link between ranks: MB/s and latency in microseconds. With it the simulator's
    /// prediction is printed too. `scripts/peers/bench_ranks.py --wire` measures both.
    #[arg(long, num_args = 2, value_names = ["MB_PER_SEC", "MICROSECONDS"])]
    link: Option<Vec<f64>>,
}

/// Warm-up steps.
const WARM_UP: u64 = 3;

/// Medians over the measured steps at one number of ranks, on rank 0.
#[derive(Debug, Serialize)]
struct Measured {
    ranks: usize,
    step_secs: f64,
    passes_secs: f64,
    communication_secs: f64,
    /// Seconds of the backward passes during which gradients were sent.
    hidden_secs: f64,
    samples_per_sec: f64,
    /// Samples per second of a rank, relative to a single rank.
    efficiency: f64,
    /// The simulator's prediction of it, if the link is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    predicted: Option<f64>,
    /// Bytes sent per rank and step, as counted in the metrics.
    step_bytes: u64,
    /// Bytes per step over the loopback interface during the whole run: all ranks, and any other
    /// traffic of the machine.
    loopback_step_bytes: f64,
    num_parameters: u64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let stop = StopSignal::listen().context("listening for Ctrl-C")?;
    let folder = std::env::temp_dir().join(format!("rectiflow-bench-ranks-{}", std::process::id()));
    let measured = measure_all(args, &folder, &stop);
    // A folder that cannot be removed stays among the temporary files.
    let _ = fs::remove_dir_all(&folder);
    let mut measured = measured?;
    let one = measured
        .first()
        .map_or(0.0, |first| first.samples_per_sec / first.ranks as f64);
    for row in &mut measured {
        row.efficiency = row.samples_per_sec / row.ranks as f64 / one;
    }
    if let Some(link) = &args.link {
        add_predictions(args, link, &mut measured)?;
    }
    Ok(Answer::done(describe(&measured), json!(measured)))
}

/// Measures each number of ranks in turn.
fn measure_all(args: &Args, folder: &Path, stop: &StopSignal) -> anyhow::Result<Vec<Measured>> {
    let mut measured = Vec::new();
    for &ranks in &args.ranks {
        measured.push(measure(args, ranks, folder, stop)?);
    }
    Ok(measured)
}

/// Adds the simulator's prediction to each row, from the first row and the speed of the link.
fn add_predictions(args: &Args, link: &[f64], measured: &mut [Measured]) -> anyhow::Result<()> {
    let Some(first) = measured.first() else {
        return Ok(());
    };
    let recipe = Recipe::load(&args.recipe, &args.overrides)?.recipe;
    let work = work(args, first, recipe.train.dtype);
    for row in measured {
        let cluster = loopback(row.ranks, link);
        let found = predict(&cluster, &work, recipe.ranks.sharding, true);
        row.predicted = Some(found.efficiency);
    }
    Ok(())
}

fn describe(measured: &[Measured]) -> String {
    let heads = [
        "ranks",
        "s a step",
        "passes",
        "waiting",
        "hidden",
        "samples/s",
        "efficiency",
        "MB a step",
        "MB over lo",
        "predicted",
    ];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    for row in measured {
        let predicted = row.predicted.map(four_digits);
        rows.push(vec![
            row.ranks.to_string(),
            four_digits(row.step_secs),
            four_digits(row.passes_secs),
            four_digits(row.communication_secs),
            four_digits(row.hidden_secs),
            four_digits(row.samples_per_sec),
            four_digits(row.efficiency),
            four_digits(row.step_bytes as f64 / 1e6),
            four_digits(row.loopback_step_bytes / 1e6),
            predicted.unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    table(&rows)
}

fn four_digits(value: f64) -> String {
    short(value, 4)
}

/// The measured step of a single rank, as the simulator takes it.
fn work(args: &Args, one: &Measured, dtype: Precision) -> StepWork {
    let value_bytes = dtype.value_bytes() as f64;
    let parameters = one.num_parameters as f64;
    StepWork {
        micro_batch_secs: one.passes_secs / args.micro_batches as f64,
        backward_share: 2.0 / 3.0,
        micro_batches: args.micro_batches,
        update_secs: one.step_secs - one.passes_secs,
        gradient_bytes: 4.0 * parameters,
        weight_bytes: value_bytes * parameters,
        bucket_bytes: BUCKET_BYTES.min(4.0 * parameters / FEWEST_BUCKETS as f64),
    }
}

fn loopback(ranks: usize, link: &[f64]) -> Cluster {
    let link = Link {
        label: "loopback",
        bytes_per_sec: 1e6 * link[0],
        latency_secs: 1e-6 * link[1],
    };
    Cluster {
        ranks,
        ranks_per_node: ranks,
        inside: link,
        between: link,
    }
}

/// Trains with `ranks` ranks in a run folder below `folder`, and reads the run's metrics.
fn measure(
    args: &Args,
    ranks: usize,
    folder: &Path,
    stop: &StopSignal,
) -> anyhow::Result<Measured> {
    let run_dir = folder.join(ranks.to_string());
    let micro_batches = args.micro_batches * ranks as u64;
    let recipe = Recipe::load(&args.recipe, &args.overrides)?;
    let batch = recipe.order.micro_batch as u64 * micro_batches;
    let steps = args.steps + WARM_UP;

    let sets = overrides(args, &run_dir, micro_batches, steps * batch);
    let checked = Recipe::load(&args.recipe, &sets)?;
    let mut arguments: Vec<OsString> = vec!["train".into(), args.recipe.clone().into()];
    for set in sets {
        arguments.push("--set".into());
        arguments.push(set.into());
    }

    let bytes_before = loopback_bytes();
    let mut all = Ranks::start(&arguments, ranks, true)?;
    if let Some(rank) = all.wait(&checked, stop)? {
        bail!("rank {rank} of {ranks} failed");
    }
    let loopback_bytes = loopback_bytes() - bytes_before;

    let events = tail::read(&run_dir)?;
    let medians = Medians::of(&events)?;
    Ok(Measured {
        ranks,
        step_secs: medians.step_secs,
        passes_secs: medians.passes_secs,
        communication_secs: medians.communication_secs,
        hidden_secs: medians.hidden_secs,
        samples_per_sec: batch as f64 / medians.step_secs,
        efficiency: 1.0,
        predicted: None,
        num_parameters: num_parameters(&events),
        step_bytes: medians.last_step_bytes,
        loopback_step_bytes: loopback_bytes / steps as f64,
    })
}

/// The overrides of a measuring run: its own folder, a fixed length, no test, preview or
/// checkpoint.
fn overrides(args: &Args, run_dir: &Path, micro_batches: u64, samples: u64) -> Vec<String> {
    let mut sets = args.overrides.clone();
    sets.extend([
        format!("run.dir=\"{}\"", run_dir.display()),
        format!("train.samples={samples}"),
        format!("train.micro_batches={micro_batches}"),
        format!("train.lanes={micro_batches}"),
        "lr.warmup_samples=0".to_owned(),
        "preview.prompts=[]".to_owned(),
        "test.every_steps=1000000000".to_owned(),
        "test.training_samples=0".to_owned(),
        "checkpoint.keep_every_steps=0".to_owned(),
        "checkpoint.every_steps=1000000000".to_owned(),
    ]);
    sets
}

/// Medians over the steps after the warm-up.
struct Medians {
    step_secs: f64,
    passes_secs: f64,
    communication_secs: f64,
    hidden_secs: f64,
    last_step_bytes: u64,
}

impl Medians {
    fn of(events: &[Event]) -> anyhow::Result<Self> {
        let mut step_secs = Vec::new();
        let mut passes_secs = Vec::new();
        let mut communication_secs = Vec::new();
        let mut hidden_secs = Vec::new();
        let mut last_step_bytes = 0;
        for step in events.iter().filter_map(as_step).skip(WARM_UP as usize) {
            let ranks = step.ranks.as_ref();
            let busy_secs = step.secs - step.data_secs;
            step_secs.push(step.secs);
            passes_secs.push(ranks.map_or(busy_secs, |ranks| ranks.passes_secs));
            communication_secs.push(ranks.map_or(0.0, |ranks| ranks.communication_secs));
            hidden_secs.push(ranks.map_or(0.0, |ranks| ranks.hidden_secs));
            last_step_bytes = step_bytes(step);
        }
        if step_secs.is_empty() {
            bail!("no step was made");
        }
        Ok(Self {
            step_secs: median(&step_secs),
            passes_secs: median(&passes_secs),
            communication_secs: median(&communication_secs),
            hidden_secs: median(&hidden_secs),
            last_step_bytes,
        })
    }
}

fn as_step(event: &Event) -> Option<&StepMetrics> {
    match event {
        Event::Step(step) => Some(step),
        _ => None,
    }
}

/// Bytes that a rank sent in a step, barriers left out.
fn step_bytes(step: &StepMetrics) -> u64 {
    let mut sum = 0;
    for (kind, bytes) in step.ranks.iter().flat_map(|ranks| &ranks.bytes) {
        if *kind != Collective::Barrier {
            sum += bytes;
        }
    }
    sum
}

/// The number of trained parameters, from the run's start event.
fn num_parameters(events: &[Event]) -> u64 {
    for event in events {
        if let Event::Start(start) = event {
            return start.num_parameters;
        }
    }
    0
}

/// Bytes sent over the loopback interface since boot; 0 if the system does not report them.
fn loopback_bytes() -> f64 {
    let text = fs::read_to_string("/sys/class/net/lo/statistics/tx_bytes").unwrap_or_default();
    text.trim().parse().unwrap_or(0.0)
}
