//! `rectiflow schedule`: the noise levels that a sampler visits, as numbers and as a plot.

use std::{fs, path::PathBuf};

use anyhow::Context;
use rectiflow_sdxl::{
    flow::Parameterization,
    sample::SampleSettings,
    schedule::{NoiseLevels, Schedule},
};
use serde_json::json;

use crate::{
    report::plot::{Axis, Plot, Series, Style},
    terminal::{answer::Answer, numbers},
};

/// Show the noise levels (sigmas) that a sampler visits, as ComfyUI computes them.
///
/// From 1 (pure noise) to 0 (the picture) for flow models, from 14.6 to 0 for eps and v, from 4519
/// with zero terminal SNR.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The rule: simple, normal, sgm_uniform, beta, karras, exponential, ddim_uniform or
    /// kl_optimal.
    name: Schedule,
    /// Steps of the sampler, 1 to 1000; there is one more sigma than steps.
    #[arg(long, default_value_t = SampleSettings::default().steps)]
    steps: usize,
    /// How far the levels of a flow model are shifted towards noise: 1 is no shift, 3 to 6 is the
    /// useful range.
    #[arg(long, default_value_t = SampleSettings::default().shift, allow_negative_numbers = true)]
    shift: f64,
    /// What the model predicts: flow, eps, v, or v_ztsnr (v with zero terminal SNR). Shift applies
    /// to flow only.
    #[arg(long, default_value_t = Parameterization::Flow)]
    parameterization: Parameterization,
    /// Also draw this schedule among the seven others, as an SVG file.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let levels = NoiseLevels::new(args.parameterization, args.shift)?;
    let sigmas = args.name.sigmas(args.steps, &levels)?;
    if let Some(path) = &args.plot {
        fs::write(path, draw(args, &levels)?).with_context(|| format!("{}", path.display()))?;
    }
    let lines: Vec<String> = sigmas.iter().map(|sigma| format!("{sigma:.6}")).collect();
    let json = json!({
        "schedule": args.name,
        "steps": args.steps,
        "shift": args.shift,
        "parameterization": args.parameterization,
        "sigmas": sigmas,
    });
    Ok(Answer::done(lines.join("\n"), json))
}

fn draw(args: &Args, levels: &NoiseLevels) -> anyhow::Result<String> {
    let mut series = Vec::new();
    for (name, schedule) in Schedule::ALL {
        let sigmas = schedule.sigmas(args.steps, levels)?;
        let points = (0..).map(f64::from).zip(sigmas).collect();
        let style = if schedule == args.name {
            Style::Bold(0)
        } else {
            Style::Line(series.len() + 1)
        };
        series.push(Series {
            name: name.to_owned(),
            points,
            style,
        });
    }
    // The requested schedule is drawn last, above the others.
    series.sort_by_key(|series| matches!(series.style, Style::Bold(_)));
    let title = match args.parameterization {
        Parameterization::Flow => format!("{}, shift {}", args.name, numbers::short(args.shift, 3)),
        other => format!("{}, {other}", args.name),
    };
    let plot = Plot {
        title,
        x: Axis::linear("step"),
        y: Axis::linear("sigma").with_zero(),
        series,
    };
    Ok(plot.standalone_svg())
}
