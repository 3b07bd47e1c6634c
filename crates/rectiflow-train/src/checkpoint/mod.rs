//! Checkpoints: a folder each, whole or absent.
//!
//! ```text
//! RUN/checkpoints/step-00000500/
//!   state.json                     position, order, identities, where the frozen parts are (format version 4)
//!   recipe.toml                    the recipe with every default written out
//!   unet/config.json, unet/diffusion_pytorch_model.safetensors          fp32, diffusers' names
//!   text_encoder/..., text_encoder_2/...                                only where they are trained
//!   optimizer.safetensors          "mean" and "mean_square" [n] fp32, in the order of state.json's `layout`; of R ranks
//!                                  with parts of their own optimizer-00001-of-0000R.safetensors and so on: of each of
//!                                  the buckets of state.json's `buckets` (lengths, in order) that rank's piece, one
//!                                  behind the other; a bucket of l elements has pieces of ceil(l / R), the last ones
//!                                  perhaps shorter
//!   ema/                           only with `ema`: state.json and the averaged weights, a model like the folder itself
//!   BLAKE3SUMS                     hash and name of every other file, as the program b3sum writes and checks them
//! ```
//!
//! A checkpoint is written beside its place and renamed when all of it is on disk (`saving`), so that a kill at any moment
//! leaves the one before. Frozen components are named by path and hash instead of being copied. Before a run goes on from a
//! checkpoint every file is checked; a damaged one is set aside (`step-00000500.damaged`) and the one before is used.
//!
//! Format 3 had no buckets: the whole vector was one. Format 2 had one optimiser file always. Format 1 had neither sums nor `ema/`, nor what a branch and the guard need; it can be read.

pub(crate) mod adopt;
pub mod components;
pub mod model;
pub(crate) mod restore;
pub(crate) mod saving;
pub(crate) mod snapshots;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
};

use rayon::prelude::*;
use rectiflow_sdxl::{flow::ObjectiveSettings, model::Component};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    error::{Error, Result},
    guard::GuardState,
    recipe::sections::CheckpointConfig,
    state::{
        Position,
        layout::{Slice, narrow},
        partition::Partition,
    },
};

const FORMAT: u32 = 4;
pub(crate) const STATE: &str = "state.json";
pub(crate) const RECIPE: &str = "recipe.toml";
const OPTIMIZER: &str = "optimizer.safetensors";
pub(crate) const SUMS: &str = "BLAKE3SUMS";
/// Folder of the averaged weights.
pub const EMA: &str = "ema";

/// `state.json`: what a checkpoint knows of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Saved {
    /// Version of the checkpoint format.
    pub format: u32,
    /// How far the run was.
    pub position: Position,
    /// Identity of the order of samples; a resume must have the same.
    pub order_hash: String,
    /// What the UNet predicts, and at which noise levels it learnt to.
    pub objective: ObjectiveSettings,
    /// Components that are not in the folder: where they were read, and their hash.
    pub frozen: BTreeMap<String, Frozen>,
    /// Identities of the data sets.
    pub data: Vec<String>,
    /// Version and BLAKE3 of the program.
    pub program: String,
    /// Names and shapes of the optimiser's vectors, in order.
    pub layout: Vec<(String, Vec<i64>)>,
    /// Files that the optimiser's memory is in: one, or one for each rank.
    #[serde(default = "one")]
    pub shards: usize,
    /// Lengths of the buckets of which each of those files has a piece; none: all is one bucket.
    #[serde(default)]
    pub buckets: Vec<i64>,
    /// Epochs of the data that have been passed, with the part of the last one.
    #[serde(default)]
    pub epochs: f64,
    /// By component, the updates that were made when the optimiser began with it; 0 where it is not named.
    #[serde(default)]
    pub moments_from: BTreeMap<String, u64>,
    /// Steps that the guard passed over: (first, one behind the last).
    #[serde(default)]
    pub passed_over: Vec<(u64, u64)>,
    /// The guard's memory.
    #[serde(default)]
    pub guard: GuardState,
    /// Seconds that processes have worked on the run up to here.
    #[serde(default)]
    pub secs: f64,
    /// The checkpoints that this run was branched from, oldest first.
    #[serde(default)]
    pub lineage: Vec<Ancestor>,
}

fn one() -> usize {
    1
}

/// A checkpoint that a run was branched from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ancestor {
    /// Its folder, absolute, as it was.
    pub checkpoint: PathBuf,
    /// BLAKE3 of its state, hexadecimal.
    pub blake3: String,
    /// Where the old run was.
    pub position: Position,
    /// What the new recipe changed: "key: old -> new".
    pub changed: Vec<String>,
}

/// A component that training left as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// The component's folder, absolute.
    pub path: PathBuf,
    /// BLAKE3 over its weights ([`components::hash_weights`]), hexadecimal.
    pub blake3: String,
}

/// A trained component: which, and its configuration file.
#[derive(Debug, Clone)]
pub(crate) struct Trained {
    /// Which component.
    pub(crate) component: Component,
    /// What its `config.json` holds. Read once: the checkpoint that it is in may be removed before the next is written.
    pub(crate) config: Vec<u8>,
}

/// The checkpoints of one run.
#[derive(Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
    keep_every_steps: u64,
}

impl Checkpoints {
    /// The checkpoints below `run_dir`.
    pub(crate) fn at(run_dir: &Path, config: &CheckpointConfig) -> Self {
        let folder = run_dir.join("checkpoints");
        Self { folder, keep: config.keep, keep_every_steps: config.keep_every_steps }
    }

    /// Makes the folder, and removes what an interrupted save left. The caller holds the run's lock.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn clean(&self) -> Result<()> {
        let folder = &self.folder;
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
            let entry = entry.map_err(Error::io(folder))?;
            if entry.file_name().to_string_lossy().ends_with(UNFINISHED) {
                fs::remove_dir_all(entry.path()).map_err(Error::io(entry.path()))?;
            }
        }
        Ok(())
    }

    /// Folders of all checkpoints, oldest first.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn list(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(Error::io(&self.folder))? {
            let path = entry.map_err(Error::io(&self.folder))?.path();
            if step_of(&path).is_some() && path.join(STATE).is_file() {
                found.push(path);
            }
        }
        found.sort_by_key(|path| step_of(path));
        Ok(found)
    }

    /// The newest checkpoint whose files are what was written; newer ones are set aside with a warning. `None` where
    /// there is no checkpoint at all.
    ///
    /// # Errors
    /// What is wrong with the newest one where none is sound: to begin anew is the user's decision.
    pub fn newest_sound(&self) -> Result<Option<PathBuf>> {
        let mut damaged: Vec<(PathBuf, Error)> = Vec::new();
        for path in self.list()?.into_iter().rev() {
            match verify(&path) {
                Err(error) => damaged.push((path, error)),
                Ok(()) => {
                    for (damaged, error) in damaged {
                        tracing::warn!("{error}; going on from {} instead", path.display());
                        let aside = damaged.with_extension(DAMAGED);
                        if aside.exists() {
                            fs::remove_dir_all(&aside).map_err(Error::io(&aside))?;
                        }
                        fs::rename(&damaged, &aside).map_err(Error::io(&damaged))?;
                    }
                    return Ok(Some(path));
                }
            }
        }
        match damaged.into_iter().next() {
            None => Ok(None),
            Some((path, error)) => {
                let reason = format!(
                    "{error}; no other checkpoint is sound either: put a copy back, or remove {} to begin anew",
                    self.folder.display()
                );
                Err(Error::Checkpoint { path, reason })
            }
        }
    }

    /// The folder of a step's checkpoint.
    pub(crate) fn place(&self, step: u64) -> PathBuf {
        self.folder.join(format!("step-{step:08}"))
    }

    pub(crate) fn prune(&self) -> Result<()> {
        let all = self.list()?;
        for old in &all[..all.len().saturating_sub(self.keep)] {
            let is_kept = |step: u64| self.keep_every_steps > 0 && step.is_multiple_of(self.keep_every_steps);
            if !step_of(old).is_some_and(is_kept) {
                fs::remove_dir_all(old).map_err(Error::io(old))?;
            }
        }
        Ok(())
    }
}

/// The file of one rank's part of the optimiser's memory.
pub(crate) fn optimizer_name(shard: usize, shards: usize) -> String {
    if shards == 1 { OPTIMIZER.to_owned() } else { format!("optimizer-{:05}-of-{shards:05}.safetensors", shard + 1) }
}

/// A component's slices of the flat vector, each with its name inside the component.
pub(crate) fn slices_of(slices: &[Slice], component: Component) -> impl Iterator<Item = (&str, &Slice)> {
    slices.iter().filter_map(move |slice| {
        let name = slice.name.strip_prefix(component.folder())?.strip_prefix('.')?;
        Some((name, slice))
    })
}

/// The tensor that a slice is.
pub(crate) fn view(vector: &Tensor, slice: &Slice) -> Tensor {
    narrow(vector, &slice.range).view(slice.shape.as_slice())
}

/// One line a file below `folder`, in the order of their names: hash, two spaces, name.
fn sums(folder: &Path) -> Result<String> {
    let mut names = Vec::new();
    collect_files(folder, "", &mut names)?;
    names.retain(|name| name != SUMS);
    names.sort();
    sums_of(folder, &names)
}

pub(crate) fn sums_of(folder: &Path, names: &[String]) -> Result<String> {
    let line = |name: &String| Ok(format!("{}  {name}\n", hash_file(&folder.join(name))?));
    names.par_iter().map(line).collect()
}

pub(crate) fn collect_files(folder: &Path, prefix: &str, names: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            collect_files(&entry.path(), &format!("{name}/"), names)?;
        } else {
            names.push(name);
        }
    }
    Ok(())
}

/// BLAKE3 of a file, hexadecimal.
pub(crate) fn hash_file(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut file = File::open(path).map_err(Error::io(path))?;
    hasher.update_reader(&mut file).map_err(Error::io(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Checks that the files of a checkpoint are what was written. One of format 1 has no sums, and is believed.
///
/// # Errors
/// [`Error::Checkpoint`] naming the first file that is missing or different, or [`Error::Io`].
pub fn verify(checkpoint: &Path) -> Result<()> {
    // The averaged weights are among the files of the checkpoint that they are in.
    let checkpoint = if checkpoint.ends_with(EMA) { checkpoint.parent().unwrap_or(checkpoint) } else { checkpoint };
    let saved = Saved::read(checkpoint)?;
    if saved.format == 1 {
        return Ok(());
    }
    let path = checkpoint.join(SUMS);
    let expected = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let found = sums(checkpoint)?;
    if expected == found {
        return Ok(());
    }
    let find = |lines: &str, name: &str| -> Option<String> {
        lines.lines().filter_map(|line| line.split_once("  ")).find(|line| line.1 == name).map(|line| line.0.to_owned())
    };
    let names = expected.lines().chain(found.lines()).filter_map(|line| Some(line.split_once("  ")?.1));
    let differs = names.map(|name| (name, find(&expected, name), find(&found, name))).find(|(_, a, b)| a != b);
    let Some((name, expected, found)) = differs else {
        return Err(Error::Checkpoint { path, reason: "not a list of hashes and names".to_owned() });
    };
    let or_none =
        |hash: Option<String>| hash.map_or_else(|| "no such file".to_owned(), |hash| format!("BLAKE3 {hash}"));
    let reason = format!("damaged: expected {}, found {}", or_none(expected), or_none(found));
    Err(Error::Checkpoint { path: checkpoint.join(name), reason })
}

impl Saved {
    /// What a new checkpoint of `state` says.
    pub(crate) fn layout(slices: &[Slice]) -> Vec<(String, Vec<i64>)> {
        slices.iter().map(|slice| (slice.name.clone(), slice.shape.clone())).collect()
    }

    /// Lengths of a partition's buckets.
    pub(crate) fn bucket_lengths(partition: &Partition) -> Vec<i64> {
        partition.buckets().iter().map(|bucket| bucket.range.end - bucket.range.start).collect()
    }

    /// Version of the format that this program writes.
    pub(crate) fn format() -> u32 {
        FORMAT
    }

    /// Reads `state.json` of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where it is not one, or one of a newer format.
    pub fn read(checkpoint: &Path) -> Result<Self> {
        let path = checkpoint.join(STATE);
        let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let broken = |reason: String| Error::Checkpoint { path: path.clone(), reason };
        let saved: Self =
            serde_json::from_str(&text).map_err(|e| broken(format!("not the state of a checkpoint: {e}")))?;
        if !(1..=FORMAT).contains(&saved.format) {
            let reason = format!(
                "expected checkpoint format 1 to {FORMAT}, found {}; use the version that wrote it",
                saved.format
            );
            return Err(broken(reason));
        }
        Ok(saved)
    }

    /// The recipe that a checkpoint was trained with.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn recipe(checkpoint: &Path) -> Result<String> {
        // The averaged weights have none of their own.
        let folder = if checkpoint.ends_with(EMA) { checkpoint.parent().unwrap_or(checkpoint) } else { checkpoint };
        let path = folder.join(RECIPE);
        fs::read_to_string(&path).map_err(Error::io(&path))
    }
}

/// Whether a folder is a training checkpoint.
pub fn is_checkpoint(folder: &Path) -> bool {
    folder.join(STATE).is_file()
}

pub(crate) const UNFINISHED: &str = "unfinished";
const DAMAGED: &str = "damaged";

fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}
