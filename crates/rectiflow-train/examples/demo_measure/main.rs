//! Measures the demo's models side by side: the same prompts, the same noise.
//!
//! ```text
//! demo_measure RUN --heldout DIR --vae DIR [--pictures N] [--seeds N] [--keep DIR]
//!     LABEL=MODEL[@PARAMETERIZATION]...
//! ```
//!
//! The prompts are captions of pictures that no model was trained on (`emoji_pictures
//! --holdout-subjects`). Measured for each model: how often the background is the requested one,
//! the brightness of pictures on black and on white, and the distance of the drawn pictures to the
//! held-out ones. The last model is also drawn with other inference settings. Writes
//! `findings.json`, pictures and `measures.json` to RUN; `rectiflow report RUN` makes a page of
//! them.
#![allow(clippy::print_stderr, reason = "a program, not a library")]

mod arguments;
mod brightness;
mod heldout;
mod inference;
mod measure;
mod side_by_side;

use std::{
    fs,
    path::Path,
    process::ExitCode,
    sync::atomic::{AtomicUsize, Ordering},
};

use clap::Parser;
use rectiflow_data::picture::Picture;
use rectiflow_sdxl::{
    flow::Parameterization,
    model::{Model, OpenOptions},
    sample::SampleSettings,
    vae::Vae,
};
use rectiflow_train::{
    Error, Result,
    bases::Bases,
    findings,
    generate::{Batch, generate_all},
};

use crate::{
    arguments::{Arguments, NamedModel},
    heldout::HeldOut,
    measure::Measured,
};

/// Side of every picture drawn.
const SIDE_PX: u32 = 128;
/// Pictures drawn together.
const BATCH: usize = 16;

/// The usual settings with half the steps, since thousands of pictures are drawn.
fn settings() -> SampleSettings {
    SampleSettings {
        steps: 20,
        shift: 3.0,
        cfg: 3.0,
        width_px: SIDE_PX,
        height_px: SIDE_PX,
        ..Default::default()
    }
}

/// A model and its name in the tables.
struct Contender {
    label: String,
    model: Model,
    parameterization: Parameterization,
}

impl Contender {
    fn open(named: &NamedModel) -> Result<Self> {
        let model =
            rectiflow_train::model::open(&named.path, &Bases::default(), &OpenOptions::default())?;
        let own = model.parameterization;
        let parameterization = named.parameterization.or(own).unwrap_or_default();
        Ok(Self {
            label: named.label.clone(),
            model,
            parameterization,
        })
    }

    /// One picture per prompt; `what` is for the progress line.
    fn draw(
        &self,
        prompts: &[String],
        settings: &SampleSettings,
        what: &str,
    ) -> Result<Vec<Picture>> {
        let mut batches = Vec::new();
        for (seed, prompts) in (settings.seed..).zip(prompts.chunks(BATCH)) {
            let settings = SampleSettings {
                batch: prompts.len(),
                seed,
                ..settings.clone()
            };
            batches.push(Batch {
                prompts: prompts.to_vec(),
                settings,
            });
        }
        let (label, total) = (&self.label, prompts.len());
        let done = AtomicUsize::new(0);
        let report = |pictures| {
            let done = done.fetch_add(pictures, Ordering::Relaxed) + pictures;
            if done.is_multiple_of(8 * BATCH) || done == total {
                eprintln!("{label}: {what}: {done} of {total} pictures");
            }
        };
        let drawn = generate_all(&self.model, self.parameterization, &batches, &report)?;
        Ok(drawn.into_iter().flatten().collect())
    }
}

fn main() -> ExitCode {
    rectiflow_sdxl::waiting::sleep_soon();
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let vae = Vae::open(&arguments.vae, &OpenOptions::default())?;
    let heldout = HeldOut::read(&arguments.heldout, &vae)?;
    if let Some(folder) = &arguments.keep {
        keep(&folder.join("real"), &heldout.pictures)?;
    }
    let contenders = arguments
        .models
        .iter()
        .map(Contender::open)
        .collect::<Result<Vec<_>>>()?;
    let mut measured = Vec::new();
    for contender in &contenders {
        measured.push(Measured::of(contender, &heldout, &vae, arguments)?);
    }
    let last = contenders
        .last()
        .expect("the arguments name at least one model");
    let mut all = vec![
        side_by_side::finding(&contenders, &arguments.run)?,
        measure::finding(&measured, &heldout, arguments),
        heldout.leak(&vae)?,
    ];
    all.extend(inference::findings(last, &arguments.run)?);
    let path = arguments.run.join("measures.json");
    let json = serde_json::to_string_pretty(&measured).expect("numbers are JSON");
    fs::write(&path, json).map_err(Error::io(&path))?;
    findings::write(&arguments.run, &all)
}

/// Writes pictures as numbered files.
fn keep(folder: &Path, pictures: &[Picture]) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    for (index, picture) in pictures.iter().enumerate() {
        picture.write_png(&folder.join(format!("{index:04}.png")), &[])?;
    }
    Ok(())
}
