//! `rectiflow bench calls`: the calls and bytes of a GPU's training step, counted without a GPU.
//!
//! `scripts/peers/count_calls.py` counts the same of diffusers and PyTorch.

use std::path::PathBuf;

use rectiflow_sdxl::{
    bundle::sdxl_configs,
    config::UNetConfig,
    cost::keeps_less,
    counting::{Calls, Counted, DEVICE},
    flops::{FORWARD_AND_BACKWARD, unet},
    model::Component,
};
use rectiflow_train::{
    counting::{Sizes, StepCount, count_step},
    estimate::{Passes, RecomputedBlocks, UpdateMode},
    hardware::hardware,
    precision::Precision,
};
use serde_json::json;

use crate::{
    sample::parse_size,
    terminal::{
        answer::{Answer, Misuse},
        dtype::{self, ComputeDtype},
        numbers::{bytes, grouped, median, table},
    },
};

/// Count the calls, bytes and host time of a training step on a GPU; no GPU is needed.
///
/// The step runs on tensors that have a shape and no numbers.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A UNet's own folder, of which config.json is read. Default: the published SDXL.
    #[arg(long)]
    unet: Option<PathBuf>,
    /// Samples of the micro-batch.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Width and height in pixels, multiples of 8.
    #[arg(long, default_value = "1024x1024", value_name = "WxH", value_parser = parse_size)]
    size: (u32, u32),
    /// Compute dtype of the UNet.
    #[arg(long, value_enum, default_value_t = ComputeDtype::Bf16)]
    dtype: ComputeDtype,
    /// Recompute the activations of all blocks in the backward pass.
    #[arg(long)]
    checkpointing: bool,
    /// Steps whose host time is measured.
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// The GPU whose time for the step is modelled.
    #[arg(long, default_value = "h100-sxm", value_name = "NAME")]
    hardware: String,
}

/// The share of its peak by which a GPU's time for a step is modelled: the aim of this program, so
/// that the processor's share is not made small by a slow GPU.
const MODELLED_SHARE: f64 = 0.33;
/// Operations in the table.
const SHOWN: usize = 24;

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let gpu = hardware(&args.hardware).map_err(|error| Misuse(error.to_string()))?;
    let config = config(args)?;
    let latent = [args.size.1, args.size.0].map(|px| i64::from(px) / 8);
    let sizes = Sizes {
        batch: i64::from(args.batch),
        latent,
        precision: precision(args.dtype),
        recomputed: RecomputedBlocks::All(args.checkpointing),
        timed: args.steps,
    };
    let found = count_step(config.clone(), &sizes)?;
    let estimated = estimated_bytes(&config, &sizes);

    let flops = FORWARD_AND_BACKWARD * unet(&config, latent, 77).total() * u64::from(args.batch);
    let recomputed = if args.checkpointing { 4.0 / 3.0 } else { 1.0 };
    let gpu_secs = flops as f64 * recomputed / (MODELLED_SHARE * gpu.peak_flops);
    let host_secs = (!found.host_secs.is_empty()).then(|| median(&found.host_secs));

    let text = [
        table(&parts(&found.counted)),
        table(&operations(&found.counted)),
        summary(&found, estimated, host_secs, gpu_secs),
    ]
    .join("\n");
    let json = json!({
        "counted": found.counted,
        "calls": found.counted.total(),
        "host_secs": found.host_secs,
        "modelled_gpu_secs": gpu_secs,
        "modelled_share_of_peak": MODELLED_SHARE,
        "hardware": args.hardware,
        "estimated_bytes": estimated,
        "batch": args.batch,
        "latent": latent,
        "dtype": dtype::name(args.dtype.into()),
        "checkpointing": args.checkpointing,
    });
    Ok(Answer::done(text, json))
}

fn config(args: &Args) -> anyhow::Result<UNetConfig> {
    if let Some(folder) = &args.unet {
        return Ok(UNetConfig::read(&folder.join("config.json"))?);
    }
    let json = sdxl_configs()
        .remove(&Component::UNet)
        .expect("there is one for every component");
    Ok(UNetConfig::from_json(json, "SDXL")?)
}

fn precision(dtype: ComputeDtype) -> Precision {
    match dtype {
        ComputeDtype::Fp32 => Precision::Fp32,
        ComputeDtype::Bf16 => Precision::Bf16,
    }
}

/// The trainer's estimate for the device.
fn estimated_bytes(config: &UNetConfig, sizes: &Sizes) -> u64 {
    let passes = Passes {
        batch: sizes.batch as u64,
        latent: sizes.latent.map(|side| side as u64),
        tokens: 77,
        precision: sizes.precision,
        width: 1,
        accumulates: false,
        fused: keeps_less(DEVICE),
        update: UpdateMode::default(),
    };
    let estimate = passes.estimate(config, &sizes.recomputed);
    estimate.device_bytes(DEVICE)
}

fn parts(counted: &Counted) -> Vec<Vec<String>> {
    let heads = ["part", "calls", "waits", "layout copies", "of bytes"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    for (name, calls) in counted.parts() {
        let [copies, of_bytes] = calls.all_layout_copies();
        rows.push(vec![
            name.to_owned(),
            grouped(calls.total()),
            grouped(calls.waits),
            grouped(copies),
            bytes(of_bytes),
        ]);
    }
    rows
}

/// The operations that are called most often.
fn operations(counted: &Counted) -> Vec<Vec<String>> {
    let of = |calls: &Calls, name: &str| calls.operations.get(name).copied().unwrap_or(0);
    let mut all: Vec<(&str, [u64; 3])> = Vec::new();
    for (_, calls) in counted.parts() {
        for name in calls.operations.keys() {
            if all.iter().all(|(known, _)| known != name) {
                all.push((name, counted.parts().map(|(_, calls)| of(calls, name))));
            }
        }
    }
    all.sort_by_key(|(_, counts)| std::cmp::Reverse(counts.iter().sum::<u64>()));
    let heads = ["operation", "forward", "backward", "update"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    for (name, counts) in all.iter().take(SHOWN) {
        let mut row = vec![name.trim_start_matches("aten::").to_owned()];
        row.extend(counts.map(grouped));
        rows.push(row);
    }
    rows
}

fn summary(found: &StepCount, estimated: u64, host_secs: Option<f64>, gpu_secs: f64) -> String {
    let counted = &found.counted;
    let peak = counted.peak_bytes;
    let error = 100.0 * (estimated as f64 / peak as f64 - 1.0);
    let mut text = format!(
        "{} calls; peak of tensors {}, estimated {} ({error:+.1}%)",
        grouped(counted.total()),
        bytes(peak),
        bytes(estimated),
    );
    if let Some(host_secs) = host_secs {
        text += &format!(
            "\nhost time {:.1} ms a step, {:.1} microseconds a call, without starting kernels; {:.0}% \
             of a modelled {:.0} ms (modelled, not measured on a GPU)",
            1e3 * host_secs,
            1e6 * host_secs / counted.total() as f64,
            100.0 * host_secs / gpu_secs,
            1e3 * gpu_secs,
        );
    }
    text
}
