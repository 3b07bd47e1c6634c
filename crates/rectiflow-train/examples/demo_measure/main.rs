//! Measures the demo's models side by side: the same prompts, the same noise.
//!
//! ```text
//! demo_measure RUN --heldout DIR --vae DIR [--pictures N] [--seeds N] [--keep DIR] LABEL=MODEL[@PARAMETERIZATION] ...
//! ```
//!
//! The prompts are captions of pictures that no model was trained on (`emoji_pictures --holdout-subjects`). For each
//! model: how often the background is the one that was asked for, how bright pictures on black and on white are, and how
//! far the drawn pictures are from the held-out ones. The last model is also drawn with other inference settings. Leaves
//! `findings.json`, pictures and `measures.json` in RUN; `rectiflow report RUN` makes a page of them.
#![allow(clippy::print_stderr, reason = "a program, not a library")]

mod arguments;
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

use rectiflow_data::picture::Picture;
use rectiflow_sdxl::{
    flow::Parameterization,
    model::{Model, OpenOptions},
    sample::SampleSettings,
    vae::Vae,
};
use rectiflow_train::{
    Error, Result, findings,
    generate::{Batch, generate_all},
};

use crate::{arguments::Arguments, heldout::HeldOut, measure::Measured};

/// Side of every picture drawn.
const SIDE_PX: u32 = 128;
/// Pictures drawn together.
const BATCH: usize = 16;

/// How pictures are drawn unless a comparison says otherwise: half the usual steps, since thousands are drawn.
fn settings() -> SampleSettings {
    SampleSettings { steps: 20, shift: 3.0, cfg: 3.0, width_px: SIDE_PX, height_px: SIDE_PX, ..Default::default() }
}

/// A model under its name in the tables.
struct Contender {
    label: String,
    model: Model,
    parameterization: Parameterization,
}

impl Contender {
    /// One picture for each prompt.
    fn draw(&self, prompts: &[String], settings: &SampleSettings, what: &str) -> Result<Vec<Picture>> {
        let batches: Vec<Batch> = prompts
            .chunks(BATCH)
            .enumerate()
            .map(|(index, prompts)| {
                let seed = settings.seed + index as u64;
                let settings = SampleSettings { batch: prompts.len(), seed, ..settings.clone() };
                Batch { prompts: prompts.to_vec(), settings }
            })
            .collect();
        let (done, label) = (AtomicUsize::new(0), &self.label);
        let report = |pictures| {
            let done = done.fetch_add(pictures, Ordering::Relaxed) + pictures;
            if done.is_multiple_of(8 * BATCH) || done == prompts.len() {
                eprintln!("{label}: {what}: {done} of {} pictures", prompts.len());
            }
        };
        Ok(generate_all(&self.model, self.parameterization, &batches, &report)?.into_iter().flatten().collect())
    }
}

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(message) => {
            eprintln!("error: {message}");
            return ExitCode::from(2);
        }
    };
    match run(&arguments) {
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
    let contenders = arguments.models.iter().map(open).collect::<Result<Vec<_>>>()?;
    let mut measured = Vec::new();
    for contender in &contenders {
        measured.push(Measured::of(contender, &heldout, &vae, arguments)?);
    }
    let last = contenders.last().expect("the arguments name at least one model");
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

/// Leaves pictures as numbered files.
fn keep(folder: &Path, pictures: &[Picture]) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    for (index, picture) in pictures.iter().enumerate() {
        picture.write_png(&folder.join(format!("{index:04}.png")), &[])?;
    }
    Ok(())
}

fn open(named: &arguments::NamedModel) -> Result<Contender> {
    let model = rectiflow_train::model::open(&named.path, &OpenOptions::default())?;
    let parameterization = named.parameterization.or(model.parameterization).unwrap_or_default();
    Ok(Contender { label: named.label.clone(), model, parameterization })
}
