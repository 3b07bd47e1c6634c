//! The black box: what the last steps were made of, written down before the guard acts.
//!
//! One JSON file an act below `RUN/blackbox/`, named by step and act: the samples of the last steps with their prompts,
//! times and losses, and all that is needed to run them again (`replay`).

use std::{
    collections::VecDeque,
    fs,
    path::{Path, PathBuf},
};

use rectiflow_data::batch::{MicroBatch, Step};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    measure::metrics::{VitalsMetrics, lossless},
    ranks::{comm::Comm, exchange::Passes},
};

/// What led to an act of the guard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlackBox {
    /// Version of this format.
    pub format: u32,
    /// "skip", "rewind" or "stop".
    pub action: String,
    /// What the guard saw.
    pub reason: String,
    /// The recipe with every default, as TOML.
    pub recipe: String,
    /// The newest checkpoint at that time, absolute.
    pub checkpoint: Option<PathBuf>,
    /// Processes that shared the run.
    #[serde(default = "one")]
    pub ranks: usize,
    /// The vital signs of the model's parts, as they were last taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vitals: Option<VitalsMetrics>,
    /// The last steps, oldest first; the last one is the one that the guard acted on.
    pub steps: Vec<SeenStep>,
}

/// A step, as it was measured before its update.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SeenStep {
    /// Which step of the order, from 0.
    pub step: u64,
    /// Its loss.
    #[serde(with = "lossless")]
    pub loss: f64,
    /// Norm of its gradient before clipping.
    #[serde(with = "lossless")]
    pub gradient_norm: f64,
    /// Learning rate of the schedule, lowered by the guard where it was.
    pub lr: f64,
    /// Its samples, in the order of the micro-batches.
    pub samples: Vec<SeenSample>,
}

fn one() -> usize {
    1
}

/// A sample of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SeenSample {
    /// Micro-batch of the step that it was in.
    #[serde(default)]
    pub slot: u32,
    /// Identity of the sample.
    pub id: u64,
    /// Which of the recipe's data sets it is from, from 0.
    pub data: u32,
    /// What the model read.
    pub prompt: String,
    /// Noise level: sigma for flow, timestep / 1000 for eps and v.
    pub time: f64,
    /// Its loss.
    #[serde(with = "lossless")]
    pub loss: f64,
}

impl BlackBox {
    /// Reads a black box.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Checkpoint`] where the file is something else.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io(path))?;
        let broken = |reason: String| Error::Checkpoint { path: path.to_owned(), reason };
        let found: Self = serde_json::from_str(&text).map_err(|error| broken(format!("not a black box: {error}")))?;
        if found.format != FORMAT {
            return Err(broken(format!("expected black box format {FORMAT}, found {}", found.format)));
        }
        Ok(found)
    }
}

/// This rank's samples of a step with what was measured of each.
pub(crate) fn samples_of(step: &Step, passes: &Passes) -> Vec<SeenSample> {
    let of_batch = |batch: &MicroBatch| {
        let (slot, data, ids, prompts) = (batch.slot, batch.data, batch.ids.clone(), batch.prompts.clone());
        ids.into_iter().zip(prompts).map(move |(id, prompt)| (slot, data, id.0, prompt))
    };
    let places = step.micro_batches.iter().flat_map(of_batch);
    let sample = |((slot, data, id, prompt), &(time, loss)): (_, &(f64, f32))| {
        let loss = f64::from(loss);
        SeenSample { slot, id, data, prompt, time, loss }
    };
    places.zip(&passes.samples).map(sample).collect()
}

const FORMAT: u32 = 1;
/// Steps in a black box.
const NUM_STEPS: usize = 10;
/// Black boxes that a run keeps: a data set with many bad samples must not fill the disk.
const MAX_FILES: usize = 50;

/// Remembers the last steps.
#[derive(Debug)]
pub(crate) struct Recorder {
    folder: PathBuf,
    steps: VecDeque<SeenStep>,
    vitals: Option<VitalsMetrics>,
}

impl Recorder {
    /// A recorder for the run in `run_dir`.
    pub(crate) fn new(run_dir: &Path) -> Self {
        Self { folder: run_dir.join("blackbox"), steps: VecDeque::with_capacity(NUM_STEPS), vitals: None }
    }

    /// Remembers a step.
    pub(crate) fn record(&mut self, step: &Step, passes: &Passes, lr: f64) {
        if self.steps.len() == NUM_STEPS {
            self.steps.pop_front();
        }
        let (loss, gradient_norm) = (passes.loss, passes.gradient_norm);
        self.steps.push_back(SeenStep { step: step.step, loss, gradient_norm, lr, samples: samples_of(step, passes) });
    }

    /// Remembers the vital signs that were last taken.
    pub(crate) fn record_vitals(&mut self, vitals: &VitalsMetrics) {
        self.vitals = Some(vitals.clone());
    }

    /// What all ranks remember, on rank 0; elsewhere what this one does.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub(crate) fn steps_of_all(&self, comm: &Comm) -> Result<Vec<SeenStep>> {
        let mut steps: Vec<SeenStep> = self.steps.iter().cloned().collect();
        let text = serde_json::to_string(&steps).expect("steps are plain data that JSON can hold");
        let others = comm.gather_texts(&text)?;
        if comm.is_first() {
            for text in &others[1..] {
                let of_rank: Vec<SeenStep> = serde_json::from_str(text).expect("another rank of this program wrote it");
                for (step, more) in steps.iter_mut().zip(of_rank) {
                    step.samples.extend(more.samples);
                }
            }
            for step in &mut steps {
                step.samples.sort_by_key(|sample| sample.slot);
            }
        }
        Ok(steps)
    }

    /// Writes what all ranks remember; gives the file's name. The oldest files beyond a number are removed.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn write(
        &self,
        action: &str,
        reason: &str,
        recipe: String,
        checkpoint: Option<PathBuf>,
        (ranks, steps): (usize, Vec<SeenStep>),
    ) -> Result<String> {
        let step = steps.last().map_or(0, |step| step.step);
        let (action, reason) = (action.to_owned(), reason.to_owned());
        let vitals = self.vitals.clone();
        let black_box = BlackBox { format: FORMAT, action, reason, recipe, checkpoint, ranks, vitals, steps };
        let name = format!("step-{:08}-{}.json", step + 1, black_box.action);
        let text = serde_json::to_string_pretty(&black_box).expect("a black box is plain data that JSON can hold");
        let path = self.folder.join(&name);
        fs::create_dir_all(&self.folder).and_then(|()| fs::write(&path, text)).map_err(Error::io(&path))?;
        let entries = fs::read_dir(&self.folder).map_err(Error::io(&self.folder))?;
        let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.sort();
        for old in &files[..files.len().saturating_sub(MAX_FILES)] {
            fs::remove_file(old).map_err(Error::io(old))?;
        }
        Ok(name)
    }
}
