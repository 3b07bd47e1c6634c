//! A training run read back for the report: events, pictures, settings, exports, times.
//!
//! Only `metrics.jsonl` is required. After a resume steps appear twice; the later ones count.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use rectiflow_data::text_file;
use rectiflow_train::{
    Result,
    findings::{self, Finding},
    metrics::{Event, Start, StepMetrics, TestMetrics, tail},
};
use serde::{Deserialize, Serialize};

/// A finished or unfinished run.
#[derive(Debug, Default)]
pub(crate) struct RunRecord {
    /// Name of the run folder.
    pub(crate) name: String,
    /// One start event per process that worked on the run.
    pub(crate) starts: Vec<Start>,
    /// In order of steps, each once.
    pub(crate) steps: Vec<StepMetrics>,
    /// In order of steps, each once.
    pub(crate) tests: Vec<TestMetrics>,
    /// Previews: step and file, in order of steps; only files that exist.
    pub(crate) previews: Vec<(u64, PathBuf)>,
    /// Number of checkpoints written, and the seconds that took in total.
    pub(crate) checkpoints: (usize, f64),
    /// Seconds that the steps' threads spent on other programs' files and alerts, over the seconds
    /// of their processes; `None` if no process says so.
    pub(crate) reporting: Option<(f64, f64)>,
    /// Whether the last process finished the recipe.
    pub(crate) finished: bool,
    /// Findings that were added to the run folder.
    pub(crate) findings: Vec<Finding>,
    /// The run folder.
    pub(crate) folder: PathBuf,
    /// The pictures of `rectiflow sample` in `samples/`, one entry a prompt.
    pub(crate) samples: Vec<Sampled>,
    /// The recipe of the newest checkpoint, defaults included.
    pub(crate) recipe: Option<String>,
    /// Files and folders in `export/` with their sizes in bytes.
    pub(crate) exports: Vec<(String, u64)>,
    /// Parts of a script, with their seconds.
    pub(crate) timeline: Vec<Part>,
}

/// A line of `timeline.jsonl`, as a script that runs several commands writes it.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Part {
    /// Name of the part.
    pub(crate) part: String,
    /// Duration in seconds.
    pub(crate) secs: f64,
}

/// A prompt and its pictures.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub(crate) struct Sampled {
    /// The prompt.
    pub(crate) prompt: String,
    /// Files, relative to the folder of `samples.json`.
    pub(crate) images: Vec<PathBuf>,
}

/// The list of pictures that `rectiflow sample` writes beside them.
pub(crate) const SAMPLES_FILE: &str = "samples.json";

impl RunRecord {
    /// Reads the run folder.
    ///
    /// # Errors
    /// `metrics.jsonl` is missing.
    pub(crate) fn read(run_dir: &Path) -> Result<Self> {
        let mut record = Self {
            name: name_of(run_dir),
            folder: run_dir.to_owned(),
            ..Self::default()
        };
        record.take_events(tail::read(run_dir)?, run_dir);
        record.findings = findings::read(run_dir)?;
        record.samples = samples(&run_dir.join("samples"));
        record.recipe = newest_recipe(&run_dir.join("checkpoints"));
        record.exports = sizes(&run_dir.join("export"));
        record.timeline = timeline(&run_dir.join("timeline.jsonl"));
        Ok(record)
    }

    fn take_events(&mut self, events: Vec<Event>, run_dir: &Path) {
        let mut steps = BTreeMap::new();
        let mut tests = BTreeMap::new();
        let mut previews = BTreeMap::new();
        for event in events {
            match event {
                Event::Start(start) => {
                    // The steps after the checkpoint were lost and are repeated by this process.
                    let next = start.step.saturating_add(1);
                    steps.split_off(&next);
                    tests.split_off(&next);
                    previews.split_off(&next);
                    self.finished = false;
                    self.starts.push(start);
                }
                Event::Step(step) => drop(steps.insert(step.step, step)),
                Event::Test(test) => drop(tests.insert(test.step, test)),
                Event::Preview { step, name, .. } => {
                    let path = run_dir.join("previews").join(name);
                    if path.is_file() {
                        previews.insert(step, path);
                    }
                }
                Event::Checkpoint { secs, .. } => {
                    self.checkpoints = (self.checkpoints.0 + 1, self.checkpoints.1 + secs);
                }
                Event::SaveFailed { .. } | Event::Guard(_) | Event::Vitals(_) => {}
                Event::End {
                    reason,
                    secs,
                    reporting_secs,
                    ..
                } => {
                    self.finished = reason == "finished";
                    if let Some(reporting_secs) = reporting_secs {
                        let (reporting, all) = self.reporting.unwrap_or_default();
                        self.reporting = Some((reporting + reporting_secs, all + secs));
                    }
                }
            }
        }
        self.steps = steps.into_values().collect();
        self.tests = tests.into_values().collect();
        self.previews = previews.into_iter().collect();
    }

    /// Seconds spent in steps.
    pub(crate) fn training_secs(&self) -> f64 {
        self.steps.iter().map(|step| step.secs).sum()
    }

    /// Floating-point operations of all steps.
    pub(crate) fn flops(&self) -> f64 {
        self.steps.iter().map(|step| step.flops as f64).sum()
    }

    /// Samples seen after `step` steps.
    pub(crate) fn samples_at(&self, step: u64) -> u64 {
        let after = self.steps.partition_point(|metrics| metrics.step <= step);
        after
            .checked_sub(1)
            .map_or(0, |index| self.steps[index].samples)
    }
}

fn name_of(run_dir: &Path) -> String {
    let full = run_dir
        .canonicalize()
        .unwrap_or_else(|_| run_dir.to_owned());
    full.file_name().map_or_else(
        || run_dir.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// The pictures that exist, with their full paths.
fn samples(folder: &Path) -> Vec<Sampled> {
    let text = text_file::read(&folder.join(SAMPLES_FILE)).unwrap_or_default();
    let mut samples: Vec<Sampled> = serde_json::from_str(&text).unwrap_or_default();
    for sampled in &mut samples {
        sampled.images = sampled
            .images
            .iter()
            .map(|image| folder.join(image))
            .filter(|path| path.is_file())
            .collect();
    }
    samples.retain(|sampled| !sampled.images.is_empty());
    samples
}

fn newest_recipe(checkpoints: &Path) -> Option<String> {
    let folders = fs::read_dir(checkpoints)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()));
    let newest = folders
        .filter(|folder| folder.join("recipe.toml").is_file())
        .max()?;
    text_file::read(&newest.join("recipe.toml")).ok()
}

/// The entries of a folder by name, with the total bytes of the files below each.
fn sizes(folder: &Path) -> Vec<(String, u64)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut sizes: Vec<(String, u64)> = entries
        .map(|entry| {
            (
                entry.file_name().to_string_lossy().into_owned(),
                size(&entry.path()),
            )
        })
        .collect();
    sizes.sort();
    sizes
}

fn size(path: &Path) -> u64 {
    if path.is_dir() {
        return fs::read_dir(path)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| size(&entry.path()))
            .sum();
    }
    path.metadata().map_or(0, |metadata| metadata.len())
}

/// A part that was run twice counts once, with the later time.
fn timeline(path: &Path) -> Vec<Part> {
    let text = text_file::read(path).unwrap_or_default();
    let mut parts: Vec<Part> = Vec::new();
    for part in text
        .lines()
        .filter_map(|line| serde_json::from_str::<Part>(line).ok())
    {
        match parts.iter_mut().find(|known| known.part == part.part) {
            Some(known) => known.secs = part.secs,
            None => parts.push(part),
        }
    }
    parts
}
