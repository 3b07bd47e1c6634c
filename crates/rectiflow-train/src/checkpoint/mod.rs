//! Checkpoints. Each is one folder, either complete or absent.
//!
//! ```text
//! RUN/checkpoints/step-00000500/
//!   state.json             position, order, hashes, paths of the frozen parts (format version 6)
//!   recipe.toml            the recipe with every default written out
//!   unet/config.json, unet/diffusion_pytorch_model.safetensors     fp32, diffusers' names
//!   text_encoder/..., text_encoder_2/...                           only if they are trained
//!   optimizer.safetensors  "mean", "mean_square" [n] fp32, in the order of `layout` (state.json).
//!                          With `moments` "8bit": "mean", "root_mean_square" [n] uint8, and for
//!                          each the scales of its blocks, "mean_scales",
//!                          "root_mean_square_scales" [b] fp32. A number is its scale times the
//!                          number of its code in the map (`state/eight_bit/map`). Blocks begin at
//!                          every 64th element of a bucket and at each tensor.
//!                          If R ranks share them, optimizer-00001-of-0000R.safetensors and so on:
//!                          that rank's piece of each bucket in `buckets` (lengths, in order), one
//!                          after the other. The pieces of a bucket of l elements have ceil(l / R)
//!                          elements, with `moments` "8bit" the least multiple of 64 that
//!                          suffices; the last ones may be shorter.
//!   ema/                   only with `ema`: state.json and the averaged weights, a model like the
//!                          folder itself
//!   BLAKE3SUMS             hash and name of every other file, in the format of b3sum
//! ```
//!
//! A checkpoint is written under a temporary name and renamed once all of it is on disk (`saving`),
//! so a kill at any moment leaves the previous one intact. An old one loses its name before its
//! files, so that a kill leaves nothing that looks like a checkpoint; the next start removes the
//! rest (`rotation`). A copy of all of it may be in object storage (`mirror`). Frozen components
//! are referenced by path and hash instead of being copied, and found by the hash if they have
//! moved (`bases`). Every reader verifies the files that it reads (`found`). A run that resumes
//! verifies all: a damaged checkpoint is set aside (`step-00000500.damaged`) and the previous one
//! is used. Numbers that the sums protect and that cannot be are refused by name (`state_numbers`).
//!
//! Format 5 had moments in fp32 only. Format 4 held the guard's numbers as text. Format 3 had no
//! buckets: the whole vector was a single one. Format 2 always had one optimiser file. Format 1 had
//! neither sums nor `ema/`, nor what a branch and the guard need. All of them can still be read.

pub(crate) mod adopt;
pub mod bases;
pub mod components;
pub(crate) mod damaged;
pub mod found;
pub(crate) mod mirror;
pub mod model;
mod pin;
pub(crate) mod restore;
mod rotation;
pub(crate) mod saving;
pub(crate) mod snapshots;
mod state_numbers;
pub(crate) mod sums;
pub mod weights_hash;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use rectiflow_data::text_file;
use rectiflow_sdxl::{flow::ObjectiveSettings, model::Component};
use serde::{Deserialize, Serialize};

use crate::{
    checkpoint::pin::Pin,
    error::{Error, Result},
    guard::GuardState,
    recipe::sections::CheckpointConfig,
    state::{
        Position, layout::Slice, moments::MomentsKind, partition::Partition, tensor_norms::NormMean,
    },
};

const FORMAT: u32 = 6;
pub(crate) const STATE: &str = "state.json";
pub(crate) const RECIPE: &str = "recipe.toml";
const OPTIMIZER: &str = "optimizer.safetensors";
pub(crate) const SUMS: &str = "BLAKE3SUMS";
/// Folder of the averaged weights.
pub const EMA: &str = "ema";

/// `state.json`: the metadata of a checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Saved {
    /// Version of the checkpoint format.
    pub format: u32,
    /// Progress of the run.
    pub position: Position,
    /// Hash of the order of samples; a resumed run must have the same.
    pub order_hash: String,
    /// What the UNet predicts, and the noise levels that it was trained at.
    pub objective: ObjectiveSettings,
    /// Components that are not in the folder: where they were read from, and their hash.
    pub frozen: BTreeMap<String, Frozen>,
    /// Hashes of the data sets.
    pub data: Vec<String>,
    /// Version and BLAKE3 of the program.
    pub program: String,
    /// Names and shapes of the optimiser's vectors, in order.
    pub layout: Vec<(String, Vec<i64>)>,
    /// Number of files that hold the optimiser's moments: one, or one for each rank.
    #[serde(default = "one")]
    pub shards: usize,
    /// Lengths of the buckets of which each of those files holds a piece. Empty if everything is
    /// one bucket.
    #[serde(default)]
    pub buckets: Vec<i64>,
    /// How the optimiser's moments are stored.
    #[serde(default)]
    pub moments: MomentsKind,
    /// The usual norm of each tensor's gradient, in the order of `layout`; empty without
    /// `train.update_in_backward`.
    #[serde(default)]
    pub tensor_norms: Vec<NormMean>,
    /// Completed epochs of the data, including the fraction of the current one.
    #[serde(default)]
    pub epochs: f64,
    /// For each component, the number of updates before the optimiser began to train it; 0 for a
    /// component that is not listed.
    #[serde(default)]
    pub moments_from: BTreeMap<String, u64>,
    /// Steps that the guard skipped, as half-open ranges (first, end).
    #[serde(default)]
    pub passed_over: Vec<(u64, u64)>,
    /// The statistics of the guard.
    #[serde(default)]
    pub guard: GuardState,
    /// Seconds spent on the run so far, over all its processes.
    #[serde(default)]
    pub secs: f64,
    /// The checkpoints that this run descends from, oldest first.
    #[serde(default)]
    pub lineage: Vec<Ancestor>,
}

fn one() -> usize {
    1
}

/// A checkpoint that a run was branched from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ancestor {
    /// Absolute path of its folder at that time.
    pub checkpoint: PathBuf,
    /// BLAKE3 of its `state.json`, hexadecimal.
    pub blake3: String,
    /// Progress of the parent run.
    pub position: Position,
    /// Keys that the new recipe changed: "key: old -> new".
    pub changed: Vec<String>,
}

/// A component that is not trained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// Absolute path of the component's folder, or of the single file that it was in.
    pub path: PathBuf,
    /// BLAKE3 of its weights ([`weights_hash::hash_weights`]), hexadecimal.
    pub blake3: String,
}

/// A trained component and its configuration file.
#[derive(Debug, Clone)]
pub(crate) struct Trained {
    /// The component.
    pub(crate) component: Component,
    /// Contents of its `config.json`. Read once, because the checkpoint that holds it may be
    /// removed before the next one is written.
    pub(crate) config: Vec<u8>,
}

/// The checkpoints of one run.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
    keep_every_steps: u64,
    /// Shared by clones.
    pin: Arc<Pin>,
}

impl Checkpoints {
    /// Returns the checkpoints of the run in `run_dir`.
    pub(crate) fn at(run_dir: &Path, config: &CheckpointConfig) -> Self {
        let folder = run_dir.join("checkpoints");
        Self {
            folder,
            keep: config.keep,
            keep_every_steps: config.keep_every_steps,
            pin: Arc::default(),
        }
    }

    /// Returns checkpoints in another folder, of which none is removed.
    pub(crate) fn in_spare(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            keep: usize::MAX,
            keep_every_steps: 0,
            pin: Arc::default(),
        }
    }

    /// Returns what keeps a checkpoint from being removed while it is copied.
    pub(crate) fn pin(&self) -> &Pin {
        &self.pin
    }

    /// Returns the folder of all checkpoints.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the folder of a step's checkpoint.
    pub(crate) fn place(&self, step: u64) -> PathBuf {
        self.folder.join(name_of(step))
    }
}

/// Returns the name of the folder of a step's checkpoint.
pub(crate) fn name_of(step: u64) -> String {
    format!("step-{step:08}")
}

/// Returns the name of the file that holds one rank's part of the optimiser's moments.
pub(crate) fn optimizer_name(shard: usize, shards: usize) -> String {
    if shards == 1 {
        OPTIMIZER.to_owned()
    } else {
        format!("optimizer-{:05}-of-{shards:05}.safetensors", shard + 1)
    }
}

/// Returns a component's slices of the flat vector, each with its name inside the component.
pub(crate) fn slices_of(
    slices: &[Slice],
    component: Component,
) -> impl Iterator<Item = (&str, &Slice)> {
    slices.iter().filter_map(move |slice| {
        let name = slice
            .name
            .strip_prefix(component.folder())?
            .strip_prefix('.')?;
        Some((name, slice))
    })
}

impl Saved {
    /// Returns the names and shapes of the slices, in order.
    pub(crate) fn layout(slices: &[Slice]) -> Vec<(String, Vec<i64>)> {
        slices
            .iter()
            .map(|slice| (slice.name.clone(), slice.shape.clone()))
            .collect()
    }

    /// Returns the lengths of a partition's buckets.
    pub(crate) fn bucket_lengths(partition: &Partition) -> Vec<i64> {
        partition
            .buckets()
            .iter()
            .map(|bucket| bucket.range.end - bucket.range.start)
            .collect()
    }

    /// Returns the version of the format that this program writes.
    pub(crate) fn format() -> u32 {
        FORMAT
    }

    /// Reads the `state.json` of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the folder is not a checkpoint, has a newer format or numbers that
    /// cannot be.
    pub fn read(checkpoint: &Path) -> Result<Self> {
        let path = checkpoint.join(STATE);
        let broken = |reason: String| Error::checkpoint(&path, reason);
        let text = match text_file::read(&path) {
            Ok(text) => text,
            Err(rectiflow_data::Error::Invalid { reason, .. }) => return Err(broken(reason)),
            Err(error) => return Err(error.into()),
        };
        let saved: Self = serde_json::from_str(&text)
            .map_err(|e| broken(format!("not a valid checkpoint state: {e}")))?;
        if !(1..=FORMAT).contains(&saved.format) {
            let reason = format!(
                "expected checkpoint format 1 to {FORMAT}, found {}; use the version that wrote it",
                saved.format
            );
            return Err(broken(reason));
        }
        let problems = saved.number_problems();
        if !problems.is_empty() {
            return Err(broken(problems.join("; ")));
        }
        Ok(saved)
    }
}

pub(crate) const UNFINISHED: &str = "unfinished";

/// Returns the step in the name of a checkpoint's folder. `None` for any other name: `step-9` is a
/// copy that a user made.
pub(crate) fn step_of(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (name == name_of(step)).then_some(step)
}
