//! The events of a run: one JSON object per line in `metrics.jsonl`. Of several ranks, rank 0
//! writes that file, and the others write their own events and seconds to
//! `metrics-rank-00001.jsonl` and so on.
//!
//! This folder defines the names of all metrics: here those of the file, in `curves` those that
//! viewers show; `tail` reads the file. The terminal, the report and the live page show these
//! events. A number that is not finite is written as a string ("NaN", "inf", "-inf"), since JSON
//! has none. After a resume a step may appear twice: the later line is valid.

pub mod curves;
pub mod tail;

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    error::{Error, Result},
    ranks::{straggler::Slowest, traffic::Collective},
};

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A process began to run.
    Start(Start),
    /// A step was done; `applied` says whether its update was.
    Step(StepMetrics),
    /// The test loss was measured.
    Test(TestMetrics),
    /// A checkpoint was written.
    Checkpoint {
        /// Steps done at the checkpoint; more may have been done while it was written.
        step: u64,
        /// Name of the folder below `checkpoints/`.
        name: String,
        /// Seconds from its begin to its final name; training may have continued meanwhile.
        secs: f64,
    },
    /// A checkpoint could not be written; training continues, and earlier checkpoints are not
    /// changed.
    SaveFailed {
        /// Steps done.
        step: u64,
        /// The error message.
        reason: String,
    },
    /// The vital signs of the model's parts were measured.
    Vitals(VitalsMetrics),
    /// The guard acted.
    Guard(GuardEvent),
    /// Preview pictures were sampled.
    Preview {
        /// Steps done.
        step: u64,
        /// Name of the file below `previews/`.
        name: String,
        /// Duration in seconds.
        secs: f64,
    },
    /// The process ended the run without an error, or the guard stopped it.
    End {
        /// Steps done.
        step: u64,
        /// Reason: "finished", "interrupted" or "stopped".
        reason: String,
        /// Seconds since `Start`.
        secs: f64,
        /// Seconds of `secs` that the steps' thread spent on handing events to trackers and alerts;
        /// `None` if the recipe has neither, and in runs of earlier versions.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reporting_secs: Option<f64>,
    },
}

impl Event {
    /// Returns the steps done at the event.
    pub fn step(&self) -> u64 {
        match self {
            Self::Start(start) => start.step,
            Self::Step(step) => step.step,
            Self::Test(test) => test.step,
            Self::Vitals(vitals) => vitals.step,
            Self::Guard(act) => act.step,
            Self::Checkpoint { step, .. }
            | Self::SaveFailed { step, .. }
            | Self::Preview { step, .. }
            | Self::End { step, .. } => *step,
        }
    }
}

/// The facts about a run when a process begins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// Steps already done: 0, or those of the checkpoint resumed from.
    pub step: u64,
    /// Seconds since 1970.
    pub unix_secs: u64,
    /// Identity of the order of samples.
    pub order_hash: String,
    /// Number of trained parameters.
    pub num_parameters: u64,
    /// Number of samples in the training split, over all data sets.
    pub num_train: u64,
    /// Number of samples in the test split.
    pub num_test: u64,
    /// Rows per bucket, largest first: (width px, height px, train rows, test rows).
    pub buckets: Vec<(u32, u32, u64, u64)>,
    /// Number of libtorch's intra-op threads.
    pub threads: u32,
    /// The other run's checkpoint that this run was branched from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branched_from: Option<PathBuf>,
    /// Changes of the recipe since that checkpoint, or since the one resumed from: "key: old ->
    /// new".
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<String>,
    /// Host memory that the full set of the guard's snapshots takes, in bytes.
    #[serde(default)]
    pub snapshot_bytes: u64,
    /// Peak of this process's GPU, dense bf16, in FLOP/s; `None` if the recipe does not name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_flops: Option<f64>,
    /// Number of ranks.
    #[serde(default = "one")]
    pub ranks: usize,
    /// Share of the ranks' time that is spent waiting for ranks with one lane more, 0 to 1.
    #[serde(default)]
    pub idle_share: f64,
    /// Samples after which the run ends, `train.samples` of the recipe; 0 if it is not known, as in
    /// runs of earlier versions.
    #[serde(default)]
    pub total_samples: u64,
}

fn one() -> usize {
    1
}

/// An action of the guard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardEvent {
    /// Steps done, including the one acted on.
    pub step: u64,
    /// "clip", "skip", "rewind", "stop" or "acknowledged".
    pub action: String,
    /// Reason for the action.
    pub reason: String,
    /// Updates applied so far; a rewind lowers the number.
    pub update: u64,
    /// Name of the file below `blackbox/`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub black_box: Option<String>,
}

/// Vital signs of the model's parts in one update.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VitalsMetrics {
    /// Steps done, including that of the update.
    pub step: u64,
    /// The parts, ordered by name.
    pub modules: Vec<Vitals>,
    /// Losses of the samples trained on since the last vital signs, by noise level.
    pub training: TableLoss,
    /// Largest attention logit of the UNet, on each rank's first micro-batch, after the update. It
    /// grows when softmax begins to attend to single tokens, in bf16 long before the loss shows it
    /// (arXiv 2309.14322).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub largest_logit: Option<Lossless>,
}

/// Vital signs of one part of the model in one update.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Vitals {
    /// Component and module, e.g. `unet.mid_block`.
    pub module: String,
    /// Norm of its gradient after clipping.
    #[serde(with = "lossless")]
    pub gradient_norm: f64,
    /// Root mean square of `g / sqrt(v)`.
    #[serde(with = "lossless")]
    pub moment_ratio: f64,
    /// Norm of the update without weight decay, over the norm of the weights.
    #[serde(with = "lossless")]
    pub update_ratio: f64,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Steps done, including this one.
    pub step: u64,
    /// Samples of all applied updates, including this step's if it was applied. A rewind lowers the
    /// number.
    pub samples: u64,
    /// Epoch in which the step begins, from 0.
    pub epoch: u64,
    /// Mean of the loss over the step's samples.
    #[serde(with = "lossless")]
    pub loss: f64,
    /// Norm of the gradient before clipping.
    #[serde(with = "lossless")]
    pub gradient_norm: f64,
    /// Norm of each component's part of the gradient, if more than one is trained; as a string if
    /// it is not finite.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub norm_by_component: BTreeMap<String, Lossless>,
    /// Learning rate of the schedule, times the factor of the guard.
    pub lr: f64,
    /// Seconds of the step.
    pub secs: f64,
    /// Seconds of the step spent waiting for data.
    pub data_secs: f64,
    /// Arithmetic of this process's part of the step by the models' own count, in FLOP, without
    /// recomputation.
    #[serde(default)]
    pub flops: u64,
    /// Whether the update was applied; the guard skips some steps.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub applied: bool,
    /// Money spent on the run so far, in the currency of `run.price_per_hour`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spent: Option<f64>,
    /// Memory of this process that is resident, in bytes; not that of a GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident_bytes: Option<u64>,
    /// This rank's share of the step, if there are several ranks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<RankMetrics>,
}

/// One rank's share of a step; its seconds and `data_secs` add up to those of the step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankMetrics {
    /// Seconds in forward and backward passes.
    pub passes_secs: f64,
    /// Seconds in collectives, including waiting for slower ranks.
    pub communication_secs: f64,
    /// Seconds of the passes during which gradients were in transit to other ranks.
    #[serde(default)]
    pub hidden_secs: f64,
    /// Seconds in everything else: guard, optimiser, average.
    pub update_secs: f64,
    /// Bytes that this rank sent over the network, by collective (docs/ranks.md).
    pub bytes: BTreeMap<Collective, u64>,
    /// The slowest rank, if it lags by more than a tenth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slowest: Option<Slowest>,
}

impl StepMetrics {
    /// Returns the FLOP/s of the step, waiting included.
    pub fn flops_per_sec(&self) -> f64 {
        self.flops as f64 / self.secs.max(1e-9)
    }
}

fn yes() -> bool {
    true
}
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it")]
fn is_yes(value: &bool) -> bool {
    *value
}

/// One measurement of the test loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TestMetrics {
    /// Steps done.
    pub step: u64,
    /// Samples of all applied updates.
    pub samples: u64,
    /// Mean over all test samples.
    #[serde(with = "lossless")]
    pub loss: f64,
    /// Means by noise level, in ascending order.
    pub bins: Vec<SigmaBin>,
    /// Loss on the fixed training samples, if the recipe asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<TableLoss>,
    /// Loss of the averaged weights on the test samples, if an average is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema: Option<TableLoss>,
    /// Loss of the averaged weights on the fixed training samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema_training: Option<TableLoss>,
    /// Duration in seconds.
    pub secs: f64,
}

/// Loss on a fixed table of samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TableLoss {
    /// Mean over all samples.
    #[serde(with = "lossless")]
    pub loss: f64,
    /// Means by noise level, in ascending order.
    pub bins: Vec<SigmaBin>,
}

/// Loss in a range of noise levels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SigmaBin {
    /// Lower end, exclusive.
    pub from: f64,
    /// Upper end, inclusive.
    pub to: f64,
    /// Mean over the samples of the range.
    #[serde(with = "lossless")]
    pub loss: f64,
    /// Standard error of the mean.
    #[serde(with = "lossless")]
    pub standard_error: f64,
    /// Number of samples.
    pub count: u64,
}

/// Appends events to the event file of a rank.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
    /// Whether the last line may be incomplete.
    torn: bool,
}

impl Writer {
    /// Opens the event file of a rank for appending; a last line that a crash cut off stays a line
    /// of its own.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(run_dir: &Path, rank: usize) -> Result<Self> {
        let path = run_dir.join(file_name(rank));
        let torn = File::open(&path).is_ok_and(|file| !ends_in_line(file));
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(Error::io(&path))?;
        Ok(Self { path, file, torn })
    }

    /// Writes one event. After a failure, as on a full disk, the next event begins on a new line.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&mut self, event: &Event) -> Result<()> {
        let event = serde_json::to_string(event).expect("events are plain data that JSON can hold");
        let line = format!("{}{event}\n", if self.torn { "\n" } else { "" });
        self.torn = true;
        self.file
            .write_all(line.as_bytes())
            .map_err(Error::io(&self.path))?;
        self.torn = false;
        Ok(())
    }
}

/// Whether a file is empty or its last byte ends a line.
fn ends_in_line(mut file: File) -> bool {
    let mut last = [0];
    file.seek(SeekFrom::End(-1)).is_err() || (file.read_exact(&mut last).is_ok() && last == *b"\n")
}

/// The event file of rank 0.
pub const FILE: &str = "metrics.jsonl";

/// Returns the name of a rank's event file in the run folder.
pub fn file_name(rank: usize) -> String {
    if rank == 0 {
        FILE.to_owned()
    } else {
        format!("metrics-rank-{rank:05}.jsonl")
    }
}

/// A number that need not be finite.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lossless(#[serde(with = "lossless")] pub f64);

/// Serializes numbers as JSON numbers, or as strings if they are not finite.
pub(crate) mod lossless {
    use super::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() {
            value.serialize(serializer)
        } else {
            value.to_string().serialize(serializer)
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Number {
            Finite(f64),
            Text(String),
        }
        match Number::deserialize(deserializer)? {
            Number::Finite(value) => Ok(value),
            Number::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{tail::read, *};

    fn step(step: u64, loss: f64) -> Event {
        let metrics = StepMetrics {
            step,
            samples: 32 * step,
            epoch: 0,
            loss,
            gradient_norm: f64::INFINITY,
            norm_by_component: BTreeMap::from([("unet".to_owned(), Lossless(f64::INFINITY))]),
            lr: 1e-4,
            secs: 0.5,
            data_secs: 0.0,
            flops: 1 << 40,
            applied: true,
            spent: None,
            resident_bytes: None,
            ranks: None,
        };
        Event::Step(metrics)
    }

    #[test]
    fn events_come_back_as_written_even_when_not_finite() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mut writer = Writer::open(dir.path(), 0).expect("opens");
        writer.write(&step(1, 0.1 + 0.2)).expect("writes");
        writer.write(&step(2, f64::NAN)).expect("writes");
        let events = read(dir.path()).expect("reads");
        assert_eq!(events[0], step(1, 0.1 + 0.2));
        let Event::Step(second) = &events[1] else {
            panic!("{events:?}")
        };
        assert!(second.loss.is_nan() && second.gradient_norm == f64::INFINITY);
    }

    #[test]
    fn a_line_cut_by_a_crash_costs_that_line_only() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        Writer::open(dir.path(), 0)
            .expect("opens")
            .write(&step(1, 0.5))
            .expect("writes");
        let mut file = OpenOptions::new()
            .append(true)
            .open(dir.path().join(FILE))
            .expect("opens");
        file.write_all(b"{\"event\":\"step\",\"st").expect("writes");
        Writer::open(dir.path(), 0)
            .expect("opens")
            .write(&step(2, 0.25))
            .expect("writes");
        let events = read(dir.path()).expect("reads");
        assert_eq!(events.len(), 2);
        assert!(matches!(&events[1], Event::Step(metrics) if metrics.step == 2));
    }
}
