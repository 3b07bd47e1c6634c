//! `rectiflow plan`: hours, money, memory and bandwidth of a run before anything is rented.

use std::path::PathBuf;

use rectiflow_train::{
    facts::{Facts, ReadFrom, Storage},
    gpu_memory::Term,
    hardware::{HARDWARE, NETWORKS, hardware, network},
    plan::{Plan, Question, plan},
    recipe::Recipe,
};

use crate::terminal::{
    answer::{Answer, Misuse},
    numbers::{bytes, duration, flops, grouped, short, table},
};

/// Estimate what a run takes on hardware that is not rented yet: hours, money, memory, bandwidth,
/// efficiency.
///
/// Figures that are assumed rather than counted are named with their source. The recipe's data sets
/// and base model are read if they exist. Nothing is started, and no GPU is needed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The recipe, a TOML file.
    recipe: PathBuf,
    /// The GPU, by default the recipe's run.hardware: h100-sxm, a100-80gb, rtx-4090 ...; an unknown
    /// name lists all.
    #[arg(long, value_name = "NAME")]
    hardware: Option<String>,
    /// GPUs that share the run.
    #[arg(long, value_name = "N", default_value_t = 1)]
    gpus: usize,
    /// Network between machines: ib-400 or eth-100.
    #[arg(long, value_name = "NAME", default_value = NETWORKS[0].name)]
    network: String,
    /// Share of its peak that a single GPU reaches, from 0 to 1. Default: that of a published run.
    #[arg(long, value_name = "SHARE")]
    mfu: Option<f64>,
    /// Price of one GPU per hour, in any currency. Default: run.price_per_hour, which is the price
    /// of all GPUs.
    #[arg(long, value_name = "PRICE")]
    price_per_gpu_hour: Option<f64>,
    /// Number of 75-token chunks of a prompt.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3))]
    chunks: u64,
    /// Override a key of the recipe, e.g. --set train.micro_batch=8. Repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    // Planning needs no GPU, whatever device the recipe names.
    let overrides = [&args.overrides[..], &["run.device=cpu".to_owned()]].concat();
    let checked = Recipe::load(&args.recipe, &overrides)?;
    let question = question(args, checked.recipe.run.hardware.as_deref())?;
    let facts = Facts::read(&checked, args.gpus, args.chunks)?;
    let plan = plan(&checked, &facts, &question)?;
    for warning in &plan.warnings {
        tracing::warn!("{warning}");
    }
    Ok(Answer::done(describe(&plan), serde_json::to_value(&plan)?))
}

fn question(args: &Args, of_recipe: Option<&str>) -> anyhow::Result<Question> {
    let name = args.hardware.as_deref().or(of_recipe).ok_or_else(|| {
        let names: Vec<&str> = HARDWARE.iter().map(|known| known.name).collect();
        Misuse(format!(
            "no GPU named: pass --hardware or set run.hardware to one of {}",
            names.join(", ")
        ))
    })?;
    if args.gpus == 0 {
        return Err(Misuse("--gpus: expected at least 1, found 0".to_owned()).into());
    }
    if let Some(mfu) = args.mfu.filter(|mfu| !(*mfu > 0.0 && *mfu <= 1.0)) {
        return Err(Misuse(format!("--mfu: expected above 0, at most 1, found {mfu}")).into());
    }
    if let Some(price) = args
        .price_per_gpu_hour
        .filter(|price| !(*price >= 0.0 && price.is_finite()))
    {
        return Err(Misuse(format!(
            "--price-per-gpu-hour: expected a number of at least 0, found {price}"
        ))
        .into());
    }
    Ok(Question {
        hardware: hardware(name)?,
        gpus: args.gpus,
        network: network(&args.network)?,
        mfu: args.mfu,
        price_per_gpu_hour: args.price_per_gpu_hour,
    })
}

fn describe(plan: &Plan) -> String {
    let sections = [
        time(plan),
        format!(
            "memory of one GPU\n{}",
            terms(
                &plan.memory,
                Some((plan.memory_bytes, plan.memory_available_bytes))
            )
        ),
        format!(
            "memory of its machine, for each GPU\n{}",
            terms(&plan.host_memory, None)
        ),
        format!(
            "disk: {} of checkpoints, and the data\n{}",
            bytes(plan.checkpoint_bytes as u64),
            storage(&plan.storage)
        ),
        scaling(plan),
        format!("assumed\n{}", list(&plan.assumptions)),
    ];
    let mut text = sections.join("\n\n");
    if !plan.warnings.is_empty() {
        text += &format!("\n\nlook at\n{}", list(&plan.warnings));
    }
    text
}

fn list(lines: &[String]) -> String {
    lines
        .iter()
        .map(|line| format!("- {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

fn time(plan: &Plan) -> String {
    let time = &plan.time;
    let rate = short(time.samples_per_sec, 4);
    let rate_per_gpu = short(time.samples_per_sec / plan.gpus as f64, 3);
    let money = match time.money {
        Some(money) => format!("{money:.0}"),
        None => "no price given".to_owned(),
    };
    let step_secs = duration(time.step_secs);
    let hours = short(time.hours, 4);
    let simulated = short(time.simulated_hours, 4);
    let rows = [
        (
            "time",
            format!("{} ({hours} hours)", duration(3600.0 * time.hours)),
        ),
        ("GPU-hours", short(time.gpu_hours, 5)),
        ("money", money),
        ("samples/s", format!("{rate}, {rate_per_gpu} per GPU")),
        ("MFU", format!("{:.1}%", 100.0 * time.mfu)),
        ("steps", format!("{} of {step_secs}", grouped(time.steps))),
        ("arithmetic", arithmetic(plan)),
        (
            "at best",
            format!("{simulated} hours, if the links were the only loss against a single GPU"),
        ),
    ];
    let mut text = format!("{} x {}", plan.gpus, plan.hardware);
    for (name, value) in rows {
        text += &format!("\n{name:<10}  {value}");
    }
    text
}

fn arithmetic(plan: &Plan) -> String {
    let sample = flops(plan.flops.sample);
    let step = flops(plan.flops.step);
    let run = flops(plan.flops.run);
    format!("{sample} per sample, {step} per step, {run} in total")
}

fn terms(terms: &[Term], total: Option<(f64, f64)>) -> String {
    let giga = |bytes: f64| format!("{:.1} GB", bytes / 1e9);
    let mut rows: Vec<Vec<String>> = terms
        .iter()
        .map(|term| vec![term.what.clone(), giga(term.bytes)])
        .collect();
    if let Some((total, available)) = total {
        rows.push(vec![
            "all together".into(),
            format!("{} of {:.0}", giga(total), available / 1e9),
        ]);
    }
    table(&rows)
}

fn storage(storage: &Storage) -> String {
    let speed = format!("{}/s", bytes(storage.bytes_per_sec as u64));
    let requests = format!("at most {} requests/s", short(storage.requests_per_sec, 3));
    let how = match storage.from {
        ReadFrom::Disk => format!("read from disk: {speed}"),
        ReadFrom::NetworkOnce => {
            format!("fetched once, then kept: {speed} and {requests} until the cache is full")
        }
        ReadFrom::Network => format!("fetched in every epoch: {speed}, {requests}"),
    };
    let epochs = storage
        .epochs
        .map(|epochs| format!("{} epochs", short(epochs, 3)));
    let all = storage
        .run_bytes
        .map(|all| format!("{} in all", bytes(all as u64)));
    [Some(how), all, epochs]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join(", ")
}

fn scaling(plan: &Plan) -> String {
    let percent = |share: f64| format!("{:.1}%", 100.0 * share);
    let mut rows = vec![
        [
            "GPUs",
            "once a step",
            "not overlapped",
            "each micro-batch",
            "not overlapped",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    rows.extend(plan.scaling.iter().map(|row| {
        let shares = [row.once, row.once_in_turn, row.each, row.each_in_turn].map(percent);
        [vec![grouped(row.gpus as u64)], shares.to_vec()].concat()
    }));
    let text = "efficiency by the links alone (simulated; each GPU has the micro-batches per \
    step named above)";
    format!("{text}\n{}", table(&rows))
}
