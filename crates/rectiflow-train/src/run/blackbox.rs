//! The black box: a record of the last steps, written before the guard acts.
//!
//! There is one JSON file per action below `RUN/blackbox/`, named by step and action: the samples
//! of the last steps with their prompts, times and losses, and everything needed to run them again
//! (`replay`).

use std::{
    collections::VecDeque,
    fs,
    path::{Path, PathBuf},
};

use rectiflow_data::{batch::Step, text_file};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    measure::metrics::{VitalsMetrics, lossless},
    ranks::{comm::Comm, exchange::Passes},
};

/// What led to an action of the guard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlackBox {
    /// Version of this format.
    pub format: u32,
    /// "skip", "rewind" or "stop".
    pub action: String,
    /// The observation that the guard acted on.
    pub reason: String,
    /// The recipe with every default, as TOML.
    pub recipe: String,
    /// Absolute path of the newest checkpoint at that time.
    pub checkpoint: Option<PathBuf>,
    /// Ranks of the run.
    #[serde(default = "one")]
    pub ranks: usize,
    /// The last measured vital signs of the model's parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vitals: Option<VitalsMetrics>,
    /// The last steps, oldest first; the guard acted on the last of them.
    pub steps: Vec<SeenStep>,
}

/// A step, as measured before its update.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SeenStep {
    /// Number of the step in the order, from 0.
    pub step: u64,
    /// Mean loss of its samples.
    #[serde(with = "lossless")]
    pub loss: f64,
    /// Norm of its gradient before clipping.
    #[serde(with = "lossless")]
    pub gradient_norm: f64,
    /// Learning rate of the schedule, times the factor of the guard.
    pub lr: f64,
    /// Its samples, in the order of the micro-batches.
    pub samples: Vec<SeenSample>,
}

fn one() -> usize {
    1
}

/// A sample of a step, with its loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SeenSample {
    /// Number of its micro-batch in the step, from 0.
    #[serde(default)]
    pub slot: u32,
    /// Identity of the sample.
    pub id: u64,
    /// Index of its data set in the recipe, from 0.
    pub data: u32,
    /// The prompt that the text encoders read.
    pub prompt: String,
    /// Noise level: sigma for flow, timestep / 1000 for eps and v.
    pub time: f64,
    /// Mean loss of its samples.
    #[serde(with = "lossless")]
    pub loss: f64,
}

impl BlackBox {
    /// Reads a black box.
    ///
    /// # Errors
    /// [`Error::Data`], or [`Error::Checkpoint`] if the file is not a black box of this format.
    pub fn read(path: &Path) -> Result<Self> {
        let text = text_file::read(path)?;
        let found: Self = match serde_json::from_str(&text) {
            Ok(found) => found,
            Err(error) => {
                return Err(Error::checkpoint(path, format!("not a black box: {error}")));
            }
        };
        if found.format != FORMAT {
            let found = found.format;
            let reason = format!("expected black box format {FORMAT}, found {found}");
            return Err(Error::checkpoint(path, reason));
        }
        Ok(found)
    }
}

/// Returns this rank's samples of a step, each with its time and loss.
pub(crate) fn samples_of(step: &Step, passes: &Passes) -> Vec<SeenSample> {
    let mut measured = passes.samples.iter();
    let mut samples = Vec::with_capacity(passes.samples.len());
    for batch in &step.micro_batches {
        for (id, prompt) in batch.ids.iter().zip(&batch.prompts) {
            let Some(&(time, loss)) = measured.next() else {
                return samples;
            };
            samples.push(SeenSample {
                slot: batch.slot,
                id: id.0,
                data: batch.data,
                prompt: prompt.clone(),
                time,
                loss: f64::from(loss),
            });
        }
    }
    samples
}

/// Name of the folder in that of the run.
pub(super) const FOLDER: &str = "blackbox";
const FORMAT: u32 = 1;
/// Number of steps in a black box.
const NUM_STEPS: usize = 10;
/// Number of black boxes that a run keeps: a data set with many bad samples must not fill the disk.
const MAX_FILES: usize = 50;

/// What a black box holds besides the vital signs.
pub(crate) struct Evidence {
    pub(crate) action: String,
    pub(crate) reason: String,
    /// The recipe with every default, as TOML.
    pub(crate) recipe: String,
    /// Absolute path of the newest checkpoint.
    pub(crate) checkpoint: Option<PathBuf>,
    /// Ranks of the run.
    pub(crate) ranks: usize,
    /// The last steps, oldest first, with the samples of all ranks.
    pub(crate) steps: Vec<SeenStep>,
}

/// The last steps of a run, kept in memory.
#[derive(Debug)]
pub(crate) struct Recorder {
    folder: PathBuf,
    steps: VecDeque<SeenStep>,
    vitals: Option<VitalsMetrics>,
}

impl Recorder {
    /// Creates a recorder for the run in `run_dir`.
    pub(crate) fn new(run_dir: &Path) -> Self {
        Self {
            folder: run_dir.join(FOLDER),
            steps: VecDeque::with_capacity(NUM_STEPS),
            vitals: None,
        }
    }

    /// Records a step, in place of the oldest if there are enough.
    pub(crate) fn record(&mut self, step: &Step, passes: &Passes, lr: f64) {
        if self.steps.len() == NUM_STEPS {
            self.steps.pop_front();
        }
        self.steps.push_back(SeenStep {
            step: step.step,
            loss: passes.loss,
            gradient_norm: passes.gradient_norm,
            lr,
            samples: samples_of(step, passes),
        });
    }

    /// Records the vital signs, in place of the previous ones.
    pub(crate) fn record_vitals(&mut self, vitals: &VitalsMetrics) {
        self.vitals = Some(vitals.clone());
    }

    /// Returns the recorded steps: on rank 0 with the samples of all ranks, elsewhere with this
    /// rank's.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub(crate) fn steps_of_all(&self, comm: &Comm) -> Result<Vec<SeenStep>> {
        let mut steps: Vec<SeenStep> = self.steps.iter().cloned().collect();
        let text = serde_json::to_string(&steps).expect("steps are plain data that JSON can hold");
        let others = comm.gather_texts(&text)?;
        if comm.is_first() {
            for text in &others[1..] {
                let of_rank: Vec<SeenStep> =
                    serde_json::from_str(text).expect("another rank of this program wrote it");
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

    /// Writes a black box with the steps of all ranks and returns the file's name. The oldest files
    /// beyond [`MAX_FILES`] are removed.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn write(&self, evidence: Evidence) -> Result<String> {
        let step = evidence.steps.last().map_or(0, |step| step.step);
        let black_box = BlackBox {
            format: FORMAT,
            action: evidence.action,
            reason: evidence.reason,
            recipe: evidence.recipe,
            checkpoint: evidence.checkpoint,
            ranks: evidence.ranks,
            vitals: self.vitals.clone(),
            steps: evidence.steps,
        };
        let name = format!("step-{:08}-{}.json", step + 1, black_box.action);
        let text = serde_json::to_string_pretty(&black_box)
            .expect("a black box is plain data that JSON can hold");
        let path = self.folder.join(&name);
        fs::create_dir_all(&self.folder)
            .and_then(|()| fs::write(&path, text))
            .map_err(Error::io(&path))?;
        self.remove_oldest()?;
        Ok(name)
    }

    fn remove_oldest(&self) -> Result<()> {
        let entries = fs::read_dir(&self.folder).map_err(Error::io(&self.folder))?;
        let mut files = Vec::new();
        for entry in entries.flatten() {
            files.push(entry.path());
        }
        files.sort();
        for old in &files[..files.len().saturating_sub(MAX_FILES)] {
            fs::remove_file(old).map_err(Error::io(old))?;
        }
        Ok(())
    }
}
