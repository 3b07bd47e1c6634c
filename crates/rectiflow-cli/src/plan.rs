//! `rectiflow plan`: hours, money, memory and bandwidth of a run before anything is rented.

use std::path::PathBuf;

use rectiflow_train::{
    facts::{Facts, ReadFrom, Storage},
    gpu_memory::Term,
    hardware::{HARDWARE, NETWORKS, hardware, network},
    launch::Sharding,
    plan::{
        Plan, plan,
        search::{Priced, Setups},
        setup::Question,
    },
    recipe::{Recipe, sections::Checkpointing},
};

use crate::terminal::{
    answer::{Answer, Misuse},
    numbers::{bytes, duration, flops, grouped, short, table},
};

/// Estimate what a run takes on hardware that is not rented yet: hours, money, memory, bandwidth,
/// efficiency; and the cheapest set-up of the same run that fits.
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
    /// GPUs that share the run; the search for the cheapest set-up takes at most as many.
    #[arg(long, value_name = "N", default_value_t = 1)]
    gpus: usize,
    /// Network between machines: ib-400 or eth-100.
    #[arg(long, value_name = "NAME", default_value = NETWORKS[0].name)]
    network: String,
    /// Share of its peak that a single GPU reaches while it recomputes nothing, from 0 to 1.
    /// Default: what a published run spent, recomputation included.
    #[arg(long, value_name = "SHARE")]
    mfu: Option<f64>,
    /// Price of one GPU per hour, in any currency. Default: run.price_per_hour, which is the price
    /// of all GPUs.
    #[arg(long, value_name = "PRICE")]
    price_per_gpu_hour: Option<f64>,
    /// Hours that the cheapest set-up may take at most. Default: those of the recipe's own.
    #[arg(long, value_name = "HOURS")]
    within: Option<f64>,
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
    if let Some(hours) = args
        .within
        .filter(|hours| !(*hours > 0.0 && hours.is_finite()))
    {
        return Err(Misuse(format!(
            "--within: expected a number of hours above 0, found {hours}"
        ))
        .into());
    }
    Ok(Question {
        hardware: hardware(name)?,
        gpus: args.gpus,
        network: network(&args.network)?,
        mfu: args.mfu,
        price_per_gpu_hour: args.price_per_gpu_hour,
        within_hours: args.within,
    })
}

fn describe(plan: &Plan) -> String {
    let sections = [
        time(plan),
        set_ups(&plan.setups),
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
        ("MFU", mfu(plan)),
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

fn mfu(plan: &Plan) -> String {
    let time = &plan.time;
    let mfu = format!("{:.1}%", 100.0 * time.mfu);
    if plan.flops.recomputed > 0.0 {
        format!("{mfu}, and {:.1}% with recomputation", 100.0 * time.hfu)
    } else {
        mfu
    }
}

fn arithmetic(plan: &Plan) -> String {
    let sample = flops(plan.flops.sample);
    let step = flops(plan.flops.step);
    let run = flops(plan.flops.run);
    let mut text = format!("{sample} per sample, {step} per step, {run} in total");
    if plan.flops.recomputed > 0.0 {
        text += &format!(
            "; {} per sample recomputed besides",
            flops(plan.flops.recomputed)
        );
    }
    text
}

/// The recipe's set-up beside the cheapest one.
fn set_ups(setups: &Setups) -> String {
    let Some(cheapest) = &setups.cheapest else {
        return format!(
            "cheapest set-up\nnone with as many GPUs or fewer fits {} a GPU and {} hours",
            giga(setups.within_bytes),
            short(setups.within_hours, 4)
        );
    };
    if cheapest.setup == setups.recipe.setup {
        return "cheapest set-up\nthe recipe's own".to_owned();
    }
    let columns = [&setups.recipe, cheapest].map(|priced| column(priced, setups.num_blocks));
    let mut rows = vec![["", "the recipe's", "the cheapest that fits"].map(str::to_owned)];
    for (i, name) in NAMES.into_iter().enumerate() {
        rows.push([
            name.to_owned(),
            columns[0][i].clone(),
            columns[1][i].clone(),
        ]);
    }
    let rows: Vec<Vec<String>> = rows.into_iter().map(Vec::from).collect();
    format!("set-up\n{}", table(&rows))
}

/// Names of the rows of [`set_ups`].
const NAMES: [&str; 10] = [
    "GPUs",
    "train.micro_batch",
    "train.micro_batches",
    "memory.checkpointing",
    "ranks.sharding",
    "optimizer.state",
    "train.update_in_backward",
    "memory of one GPU",
    "samples/s",
    "hours, money",
];

/// The values of [`NAMES`] for one set-up.
fn column(priced: &Priced, num_blocks: usize) -> [String; NAMES.len()] {
    let setup = &priced.setup;
    let hours = short(priced.time.hours, 4);
    [
        grouped(setup.gpus as u64),
        setup.micro_batch.to_string(),
        setup.micro_batches.to_string(),
        checkpointing(priced, num_blocks),
        sharding(setup.sharding).to_owned(),
        setup.update.moments.name().to_owned(),
        setup.update.in_backward.to_string(),
        giga(priced.memory_bytes),
        short(priced.time.samples_per_sec, 4),
        match priced.time.money {
            Some(money) => format!("{hours}, {money:.0}"),
            None => hours,
        },
    ]
}

fn checkpointing(priced: &Priced, num_blocks: usize) -> String {
    let num_recomputed = priced.recomputed_blocks;
    match (priced.setup.checkpointing, priced.setup.budget_gib) {
        (Checkpointing::Off, _) => "off".to_owned(),
        (Checkpointing::Full, _) => "full".to_owned(),
        (Checkpointing::Budget, gib) => {
            let gib = gib.unwrap_or(0.0);
            format!("budget {gib} GiB: {num_recomputed} of {num_blocks} blocks")
        }
    }
}

fn sharding(sharding: Sharding) -> &'static str {
    match sharding {
        Sharding::None => "none",
        Sharding::Once => "once",
        Sharding::Each => "each",
    }
}

fn giga(bytes: f64) -> String {
    format!("{:.1} GB", bytes / 1e9)
}

fn terms(terms: &[Term], total: Option<(f64, f64)>) -> String {
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
