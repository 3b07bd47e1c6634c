//! `rectiflow bench step`: measures the speed and memory of a training step on this machine.
//!
//! `scripts/peers/bench_step.py` runs it in turn with diffusers and PyTorch, on the same weights
//! and batch.

use std::{collections::BTreeSet, path::PathBuf, time::Instant};

use rectiflow_sdxl::{
    choices,
    cost::keeps_less,
    model::{Component, OpenOptions},
    unet::UNet,
};
use rectiflow_train::{
    bases::Bases,
    components::Components,
    estimate::{Passes, RecomputedBlocks, UpdateMode},
    precision::Precision,
    recipe::parse_device,
    synthetic::{Input, Measured, Settings, train_steps},
};
use serde_json::json;
use tch::Device;

use crate::{
    bench::sample::{file_bytes, peak_bytes},
    sample::parse_size,
    terminal::{
        answer::{Answer, Misuse},
        dtype::{self, ComputeDtype},
        numbers,
        progress::Progress,
    },
};

/// Train a UNet on one batch and discard it: steps per second, peak memory.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A model folder or single-file checkpoint, or a UNet's own folder.
    #[arg(long)]
    unet: PathBuf,
    /// Start from random weights; only config.json of the folder is read.
    #[arg(long)]
    random: bool,
    /// A safetensors file with the batch: sample, timestep, context, text_embeds, time_ids and
    /// target. Default: random numbers.
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Samples of a random batch.
    #[arg(long, default_value_t = 2)]
    batch: usize,
    /// Width and height in pixels of a random batch, multiples of 8.
    #[arg(long, default_value = "512x512", value_name = "WxH", value_parser = parse_size)]
    size: (u32, u32),
    /// Micro-batches that the batch is cut into; on a CPU they run in parallel.
    #[arg(long, default_value_t = 1)]
    micro_batches: usize,
    /// Steps; the first two warm up and are not timed.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(3..))]
    steps: u32,
    /// Compute dtype of the UNet; weights, gradients and moments are fp32 in both.
    #[arg(long, value_enum, default_value_t = ComputeDtype::Fp32)]
    dtype: ComputeDtype,
    /// Recompute the activations of all blocks in the backward pass.
    #[arg(long)]
    checkpointing: bool,
    /// Recompute only as many blocks as are needed to stay within this many GiB by the estimate.
    #[arg(long, value_name = "GIB", conflicts_with = "checkpointing")]
    budget_gib: Option<f64>,
    /// Learning rate.
    #[arg(long, default_value_t = 1e-4)]
    lr: f64,
    /// Device: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    device: Device,
}

/// Warm-up steps.
const WARM_UP: usize = 2;

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let began = Instant::now();
    let mut unet = open(args)?;
    let input = input(args, &unet)?;
    let num_samples = input.num_samples();
    if args.micro_batches == 0 || num_samples % args.micro_batches != 0 {
        let text = format!(
            "--micro-batches {}: expected a divisor of the batch, {num_samples}",
            args.micro_batches
        );
        return Err(Misuse(text).into());
    }
    let load_secs = began.elapsed().as_secs_f64();

    // What is recomputed, and the memory estimate that follows from it.
    let passes = passes(args, &input);
    let recomputed = recomputed(args, &passes, &unet);
    recomputed.apply(&mut unet);
    let estimate = passes.estimate(&unet.config, &recomputed);
    let estimated_bytes = estimate.device_bytes(args.device);

    let about_bf16 = about_bf16(args);
    if let Some(about) = about_bf16 {
        tracing::info!("{about}");
    }
    let measured = train(args, &unet, &input)?;
    let timed = &measured.secs[WARM_UP..];
    let median_secs = numbers::median(timed);
    let peak_bytes = peak_bytes();
    let text = format!(
        "{} steps per second ({} s per step of {num_samples}, median of {}), \
         peak memory {} (estimated {})",
        numbers::short(1.0 / median_secs, 3),
        numbers::short(median_secs, 3),
        timed.len(),
        peak_bytes.map_or_else(|| "unknown".into(), numbers::bytes),
        numbers::bytes(estimated_bytes),
    );
    let json = json!({
        "steps_per_sec": 1.0 / median_secs,
        "step_secs": timed,
        "losses": measured.losses,
        "gradient_norms": measured.gradient_norms,
        "load_secs": load_secs,
        "peak_bytes": peak_bytes,
        "file_bytes": file_bytes(),
        "estimated_bytes": estimated_bytes,
        "num_parameters": unet.parameters.num_elements(),
        "dtype": dtype::name(args.dtype.into()),
        "checkpointing": args.checkpointing,
        "remade": names(&recomputed),
        "about_bf16": about_bf16,
        "threads": tch::get_num_threads(),
    });
    Ok(Answer::done(text, json))
}

/// What this processor makes of bf16, where that is asked for.
fn about_bf16(args: &Args) -> Option<&'static str> {
    let asked = args.dtype == ComputeDtype::Bf16 && args.device == Device::Cpu;
    if asked { choices::about_bf16() } else { None }
}

fn open(args: &Args) -> anyhow::Result<UNet> {
    let mut options = OpenOptions {
        device: args.device,
        ..OpenOptions::default()
    };
    if args.random {
        options.random.push(Component::UNet);
        return Ok(UNet::open(&args.unet, &options)?);
    }
    let unet = Components::find_one(Component::UNet, &args.unet, &Bases::default())?;
    Ok(UNet::open(&unet, &options)?)
}

/// The batch of `--input`, or a random one.
fn input(args: &Args, unet: &UNet) -> anyhow::Result<Input> {
    if let Some(path) = &args.input {
        return Ok(Input::read(path, args.device)?);
    }
    let (width_px, height_px) = args.size;
    let height = i64::from(height_px) / 8;
    let width = i64::from(width_px) / 8;
    Ok(Input::random(unet, [args.batch as i64, height, width]))
}

/// Makes the steps, under a progress bar.
fn train(args: &Args, unet: &UNet, input: &Input) -> anyhow::Result<Measured> {
    let settings = Settings {
        precision: args.precision(),
        micro_batches: args.micro_batches,
        steps: args.steps as usize,
        lr: args.lr,
        clip_norm: 1.0,
    };
    let mut progress = Progress::new("bench step", "steps", 0, u64::from(args.steps));
    let mut step_done = |step: usize| progress.set(step as u64, "");
    let measured = train_steps(unet, input, &settings, &mut step_done)?;
    progress.finish();
    Ok(measured)
}

/// The recomputed blocks, if some are; `None` for all or none.
fn names(recomputed: &RecomputedBlocks) -> Option<&BTreeSet<String>> {
    match recomputed {
        RecomputedBlocks::All(_) => None,
        RecomputedBlocks::Some(names) => Some(names),
    }
}

/// The terms of the trainer's memory estimate.
fn passes(args: &Args, input: &Input) -> Passes {
    let size = input.sample.size();
    let width = args
        .micro_batches
        .min(tch::get_num_threads().max(1) as usize);
    Passes {
        batch: (input.num_samples() / args.micro_batches) as u64,
        latent: [size[2] as u64, size[3] as u64],
        tokens: input.context.size()[1] as u64,
        precision: args.precision(),
        width: width as u64,
        accumulates: args.micro_batches > width,
        fused: keeps_less(args.device),
        update: UpdateMode::default(),
    }
}

fn recomputed(args: &Args, passes: &Passes, unet: &UNet) -> RecomputedBlocks {
    let Some(gib) = args.budget_gib else {
        return RecomputedBlocks::All(args.checkpointing);
    };
    let none = RecomputedBlocks::All(false);
    let others = passes
        .estimate(&unet.config, &none)
        .device_bytes(args.device)
        - passes.bytes(&unet.config, &none, 4);
    passes.choose(
        &unet.config,
        ((gib * f64::from(1 << 30)) as u64).saturating_sub(others),
    )
}

impl Args {
    fn precision(&self) -> Precision {
        match self.dtype {
            ComputeDtype::Fp32 => Precision::Fp32,
            ComputeDtype::Bf16 => Precision::Bf16,
        }
    }
}
