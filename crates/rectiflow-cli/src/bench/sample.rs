//! `rectiflow bench sample`: measures sampling speed and memory on this machine.
//!
//! One part of the model is in memory at a time. Measured are the seconds to load, the seconds per
//! batch from noise to pixels, and the peak memory of the process. A first batch warms up and does
//! not count. `scripts/peers/bench_sample.py` runs it in turn with diffusers.

use std::{path::PathBuf, time::Instant};

use rectiflow_sdxl::{
    cond::Cond,
    flow::Parameterization,
    model::OpenOptions,
    sample::{SampleSettings, Texts, decode, sample_latents},
};
use rectiflow_train::{recipe::parse_device, staged_model::StagedModel};
use serde_json::json;
use tch::{Device, Tensor};

use crate::{
    sample::{parameterization_of, parse_size},
    terminal::{
        answer::Answer,
        base::BaseArg,
        dtype::{self, ComputeDtype},
        numbers,
        progress::Progress,
    },
};

/// Draw pictures and discard them: pictures per second, seconds to load, peak memory.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A diffusers model folder, a single-file checkpoint or a training checkpoint.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    base: BaseArg,
    /// What to draw.
    #[arg(
        long,
        default_value = "a red apple on a white background",
        value_name = "TEXT"
    )]
    prompt: String,
    /// Steps of Euler's method, 1 to 1000.
    #[arg(long, default_value_t = SampleSettings::default().steps)]
    steps: usize,
    /// Guidance scale; above 1 every step runs the UNet on twice the batch.
    #[arg(long, default_value_t = SampleSettings::default().cfg, allow_negative_numbers = true)]
    cfg: f64,
    /// Width and height in pixels, multiples of 8.
    #[arg(long, default_value = "1024x1024", value_name = "WxH", value_parser = parse_size)]
    size: (u32, u32),
    /// Pictures per batch.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Measured batches; one warm-up batch is drawn before them.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Compute dtype, whatever the files hold.
    #[arg(long, value_enum, default_value_t = ComputeDtype::Fp32)]
    dtype: ComputeDtype,
    /// What the model predicts (flow, eps or v), if neither its metadata nor its scheduler says so.
    #[arg(long)]
    parameterization: Option<Parameterization>,
    /// Map weights from their files instead of copying them, if a CPU computes in the file's dtype:
    /// a little over half the memory, an eighth slower.
    #[arg(long)]
    low_memory: bool,
    /// Device: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    device: Device,
}

/// Seconds of the parts of a measurement.
#[derive(Debug, Default)]
struct Measured {
    load_secs: f64,
    encode_secs: f64,
    /// From noise to pixels, one entry per batch; the first is the warm-up batch.
    batch_secs: Vec<f64>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let model = StagedModel::find(&args.model, &args.base.bases(), &args.open_options())?;
    let parameterization = parameterization_of(args.parameterization, &model, &args.model)?;
    let settings = args.settings();
    settings.latent_shape(model.vae_config())?;
    settings.sigmas(parameterization)?;
    let measured = measure(args, &model, parameterization, &settings)?;

    // The first batch is the warm-up.
    let median_secs = numbers::median(&measured.batch_secs[1..]);
    let images_per_sec = args.batch as f64 / median_secs;
    let peak_bytes = peak_bytes();
    let memory = peak_bytes.map_or_else(|| "unknown".into(), numbers::bytes);
    let text = format!(
        "{} pictures per second ({} s per batch of {}, median of {}), \
         loaded in {}, peak memory {memory}",
        numbers::short(images_per_sec, 3),
        numbers::short(median_secs, 3),
        args.batch,
        args.rounds,
        numbers::duration(measured.load_secs),
    );
    let json = json!({
        "images_per_sec": images_per_sec,
        "batch_secs": measured.batch_secs[1..],
        "warm_up_secs": measured.batch_secs[0],
        "encode_secs": measured.encode_secs,
        "load_secs": measured.load_secs,
        "peak_bytes": peak_bytes,
        "dtype": dtype::name(args.dtype.into()),
        "threads": tch::get_num_threads(),
        "settings": settings,
    });
    Ok(Answer::done(text, json))
}

/// Encodes, draws all batches, decodes all batches.
fn measure(
    args: &Args,
    model: &StagedModel,
    parameterization: Parameterization,
    settings: &SampleSettings,
) -> anyhow::Result<Measured> {
    let mut measured = Measured::default();
    let encoded = encode(args, model, &mut measured)?;
    let latents = draw(
        args,
        model,
        parameterization,
        settings,
        &encoded,
        &mut measured,
    )?;

    let began = Instant::now();
    let vae = model.vae()?;
    measured.load_secs += began.elapsed().as_secs_f64();
    for (latents, secs) in latents.iter().zip(&mut measured.batch_secs) {
        let began = Instant::now();
        let _pixels = decode(&vae, latents)?;
        *secs += began.elapsed().as_secs_f64();
    }
    Ok(measured)
}

/// The conditioning of the prompt and of the empty prompt.
struct Encoded {
    cond: Cond,
    uncond: Cond,
}

/// Encodes both prompts. The text encoders are in memory only during this call.
fn encode(args: &Args, model: &StagedModel, measured: &mut Measured) -> anyhow::Result<Encoded> {
    let began = Instant::now();
    let encoders = model.text_encoders()?;
    measured.load_secs += began.elapsed().as_secs_f64();
    let began = Instant::now();
    let cond = encoders.encode(std::slice::from_ref(&args.prompt))?;
    let uncond = encoders.encode(&[String::new()])?;
    measured.encode_secs = began.elapsed().as_secs_f64();
    Ok(Encoded { cond, uncond })
}

/// The latents of each batch. The UNet is in memory only during this call.
fn draw(
    args: &Args,
    model: &StagedModel,
    parameterization: Parameterization,
    settings: &SampleSettings,
    encoded: &Encoded,
    measured: &mut Measured,
) -> anyhow::Result<Vec<Tensor>> {
    let total = u64::from(args.rounds + 1) * settings.steps as u64;
    let mut progress = Progress::new("bench sample", "steps", 0, total);
    let mut done = 0;
    let began = Instant::now();
    let unet = model.unet()?;
    measured.load_secs += began.elapsed().as_secs_f64();
    let vae = model.vae_config();
    let texts = Texts {
        cond: &encoded.cond,
        uncond: &encoded.uncond,
    };

    let mut latents = Vec::new();
    let mut settings = settings.clone();
    for round in 0..=args.rounds {
        settings.seed = u64::from(round);
        let began = Instant::now();
        latents.push(sample_latents(
            &unet,
            vae,
            parameterization,
            texts,
            &settings,
            &mut |_| {
                done += 1;
                progress.set(done, "");
            },
        )?);
        measured.batch_secs.push(began.elapsed().as_secs_f64());
    }
    progress.finish();
    Ok(latents)
}

impl Args {
    fn open_options(&self) -> OpenOptions {
        OpenOptions {
            kind: self.dtype.into(),
            device: self.device,
            map: self.low_memory,
            ..OpenOptions::default()
        }
    }

    fn settings(&self) -> SampleSettings {
        SampleSettings {
            steps: self.steps,
            cfg: self.cfg,
            width_px: self.size.0,
            height_px: self.size.1,
            batch: self.batch,
            ..SampleSettings::default()
        }
    }
}

/// Peak resident memory of this process, if the system reports it (Linux). Weights are mapped, and
/// pages that have been read count until they are released.
pub(crate) fn peak_bytes() -> Option<u64> {
    status_bytes("VmHWM:")
}

/// Resident pages of mapped files, which are mostly the code of libtorch, if the system reports
/// them (Linux). How many there are depends on the system's page cache.
pub(crate) fn file_bytes() -> Option<u64> {
    status_bytes("RssFile:")
}

fn status_bytes(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn the_largest_memory_never_falls() {
        let before = peak_bytes().expect("Linux says it");
        let held = vec![1u8; 64 << 20];
        let after = peak_bytes().expect("Linux says it");
        assert!(
            after >= before && after >= held.len() as u64,
            "{before} then {after}"
        );
    }
}
