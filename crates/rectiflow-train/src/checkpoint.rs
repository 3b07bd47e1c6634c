//! Checkpoints: a folder each, whole or absent.
//!
//! ```text
//! RUN/checkpoints/step-00000500/
//!   state.json                     position, order, identities, where the frozen parts are (format version 2)
//!   recipe.toml                    the recipe with every default written out
//!   unet/config.json, unet/diffusion_pytorch_model.safetensors          fp32, diffusers' names
//!   text_encoder/..., text_encoder_2/...                                only where they are trained
//!   optimizer.safetensors          "mean" and "mean_square" [n] fp32, in the order of state.json's `layout`
//!   ema/                           only with `ema`: state.json and the averaged weights, a model like the folder itself
//!   BLAKE3SUMS                     hash and name of every other file, as the program b3sum writes and checks them
//! ```
//!
//! A checkpoint is written beside its place and renamed when all of it is on disk, so that a kill at any moment leaves
//! the one before. Frozen components are named by path and hash instead of being copied. Before a run goes on from a
//! checkpoint every file is checked; a damaged one is set aside (`step-00000500.damaged`) and the one before is used.
//!
//! Format 1 had neither sums nor `ema/`, nor what a branch and the guard need; it can be read.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use rayon::prelude::*;
use rectiflow_sdxl::{
    durable::{rename_folder, write_bytes},
    flow::ObjectiveSettings,
    model::Component,
    tensor_file::{TensorFile, write_tensors},
};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    config::CheckpointConfig,
    error::{Error, Result},
    flat::{Slice, part},
    guard::GuardState,
    state::{Position, TrainState},
};

const FORMAT: u32 = 2;
const STATE: &str = "state.json";
const RECIPE: &str = "recipe.toml";
const OPTIMIZER: &str = "optimizer.safetensors";
const SUMS: &str = "BLAKE3SUMS";
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
    /// BLAKE3 over its weights ([`hash_weights`]), hexadecimal.
    pub blake3: String,
}

/// A trained component: which, and its configuration file.
#[derive(Debug)]
pub struct Trained<'a> {
    /// Which component.
    pub component: Component,
    /// What its `config.json` holds.
    pub config: &'a [u8],
}

/// The checkpoints of one run.
#[derive(Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
    keep_every_steps: u64,
}

impl Checkpoints {
    /// The checkpoints below `run_dir`; what an interrupted save left is removed. The caller holds the run's lock.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(run_dir: &Path, config: &CheckpointConfig) -> Result<Self> {
        let folder = run_dir.join("checkpoints");
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        for entry in fs::read_dir(&folder).map_err(Error::io(&folder))? {
            let entry = entry.map_err(Error::io(&folder))?;
            if entry.file_name().to_string_lossy().ends_with(UNFINISHED) {
                fs::remove_dir_all(entry.path()).map_err(Error::io(entry.path()))?;
            }
        }
        Ok(Self { folder, keep: config.keep, keep_every_steps: config.keep_every_steps })
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

    /// Writes a checkpoint and removes older ones that need not be kept. Gives its folder.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Model`]; earlier checkpoints are untouched then.
    pub fn save(&self, saved: &Saved, recipe: &str, trained: &[Trained], state: &TrainState) -> Result<PathBuf> {
        let place = self.folder.join(format!("step-{:08}", saved.position.cursor));
        let unfinished = place.with_extension(UNFINISHED);
        write(&unfinished, saved, recipe, trained, state).inspect_err(|_| {
            // On a full disk the room is needed; what cannot be removed now is when the run is opened again.
            let _ = fs::remove_dir_all(&unfinished);
        })?;
        if place.exists() {
            // The same step saved again, e.g. by an interrupt right after a resume: the new one is as good.
            fs::remove_dir_all(&place).map_err(Error::io(&place))?;
        }
        rename_folder(&unfinished, &place)?;
        self.prune()?;
        Ok(place)
    }

    fn prune(&self) -> Result<()> {
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

/// Writes all files of a checkpoint into `folder`.
fn write(folder: &Path, saved: &Saved, recipe: &str, trained: &[Trained], state: &TrainState) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let save = |vector: &Tensor, part: &Trained, path: &Path| {
        let slices = slices_of(&state.parameters.slices, part.component);
        let tensors: Vec<(&str, Tensor)> = slices.map(|(name, slice)| (name, view(vector, slice))).collect();
        let tensors = tensors.iter().map(|(name, tensor)| (*name, tensor));
        Ok(write_tensors(path, tensors, None, &[("format", "pt")])?)
    };
    // The masters, whatever the model calculates in.
    write_model(folder, saved, trained, &|part, path| save(&state.parameters.values, part, path))?;
    if let Some(average) = &state.average {
        let model = Saved { layout: Vec::new(), ..saved.clone() };
        write_model(&folder.join(EMA), &model, trained, &|part, path| save(average, part, path))?;
    }
    let vectors = [("mean", &state.optimizer.mean), ("mean_square", &state.optimizer.mean_square)];
    write_tensors(&folder.join(OPTIMIZER), vectors, None, &[])?;
    write_bytes(&folder.join(RECIPE), recipe.as_bytes())?;
    Ok(write_bytes(&folder.join(SUMS), sums(folder)?.as_bytes())?)
}

/// Writes what makes a folder a model: `state.json` and the trained components, their weights by `save`.
fn write_model(
    folder: &Path,
    saved: &Saved,
    trained: &[Trained],
    save: &dyn Fn(&Trained, &Path) -> Result<()>,
) -> Result<()> {
    for part in trained {
        let folder = folder.join(part.component.folder());
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        write_bytes(&folder.join("config.json"), part.config)?;
        save(part, &folder.join(part.component.weights_name()))?;
    }
    let json = serde_json::to_vec_pretty(saved).expect("the state is plain data that JSON can hold");
    Ok(write_bytes(&folder.join(STATE), &json)?)
}

/// A component's slices of the flat vector, each with its name inside the component.
fn slices_of(slices: &[Slice], component: Component) -> impl Iterator<Item = (&str, &Slice)> {
    slices.iter().filter_map(move |slice| {
        let name = slice.name.strip_prefix(component.folder())?.strip_prefix('.')?;
        Some((name, slice))
    })
}

/// The tensor that a slice is.
fn view(vector: &Tensor, slice: &Slice) -> Tensor {
    part(vector, &slice.range).view(slice.shape.as_slice())
}

/// One line a file below `folder`, in the order of their names: hash, two spaces, name.
fn sums(folder: &Path) -> Result<String> {
    let mut names = Vec::new();
    collect_files(folder, "", &mut names)?;
    names.retain(|name| name != SUMS);
    names.sort();
    let line = |name: &String| Ok(format!("{}  {name}\n", hash_file(&folder.join(name))?));
    names.par_iter().map(line).collect()
}

fn collect_files(folder: &Path, prefix: &str, names: &mut Vec<String>) -> Result<()> {
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

/// Where the components of a model are, each found once. Gigabytes are hashed at most once a component, and only where
/// somebody asks or a checkpoint names a hash that must be right.
#[derive(Debug)]
pub struct Components {
    folders: BTreeMap<Component, PathBuf>,
    hashes: BTreeMap<Component, OnceLock<String>>,
}

impl Components {
    /// The components of a model: a diffusers folder's own, or a checkpoint's own and its frozen ones.
    ///
    /// # Errors
    /// [`Error::Model`] where one is missing, [`Error::Checkpoint`] where a frozen one is gone or has changed since.
    pub fn find(model: &Path) -> Result<Self> {
        let mut frozen = if is_checkpoint(model) { Some(Saved::read(model)?.frozen) } else { None };
        let (mut folders, mut hashes) = (BTreeMap::new(), BTreeMap::new());
        for component in Component::ALL {
            let hash = OnceLock::new();
            let folder = match &mut frozen {
                None => component.find(model)?,
                Some(frozen) => match frozen.remove(component.folder()) {
                    None => model.join(component.folder()),
                    Some(part) => {
                        check_unchanged(model, component, &part)?;
                        hash.get_or_init(|| part.blake3);
                        part.path
                    }
                },
            };
            folders.insert(component, folder);
            hashes.insert(component, hash);
        }
        Ok(Self { folders, hashes })
    }

    /// As [`Self::find`], or of a single-file checkpoint, which all of them are in.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub fn locate(model: &Path) -> Result<Self> {
        if !model.is_file() {
            return Self::find(model);
        }
        let folders = Component::ALL.map(|component| (component, model.to_owned()));
        let hashes = Component::ALL.map(|component| (component, OnceLock::new()));
        Ok(Self { folders: folders.into(), hashes: hashes.into() })
    }

    /// The folder of a component, with its `config.json`; the file where all are in one.
    pub fn folder(&self, component: Component) -> &Path {
        &self.folders[&component]
    }

    /// Takes a component from another folder, which holds the same.
    pub(crate) fn replace(&mut self, component: Component, folder: PathBuf) {
        self.folders.insert(component, folder);
    }

    /// BLAKE3 over the component's weights, see [`hash_weights`].
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn blake3(&self, component: Component) -> Result<&str> {
        let hash = &self.hashes[&component];
        if hash.get().is_none() {
            let found = hash_weights(component, self.folder(component))?;
            hash.get_or_init(|| found);
        }
        Ok(hash.get().expect("it was just set"))
    }
}

fn check_unchanged(checkpoint: &Path, component: Component, frozen: &Frozen) -> Result<()> {
    let broken = |reason: String| Error::Checkpoint { path: frozen.path.clone(), reason };
    let (name, checkpoint) = (component.name(), checkpoint.display());
    let found = hash_weights(component, &frozen.path)
        .map_err(|e| broken(format!("the checkpoint {checkpoint} needs this {name}: {e}")))?;
    if found == frozen.blake3 {
        return Ok(());
    }
    let expected = &frozen.blake3;
    Err(broken(format!(
        "the {name} has changed since the checkpoint {checkpoint} was written: expected BLAKE3 {expected}, found \
         {found}; put the old one back"
    )))
}

/// Puts a checkpoint's numbers into the state of the run that it is of. The parameters are the checkpoint's already.
///
/// # Errors
/// [`Error::Checkpoint`] where the run trains other tensors, naming the first difference; [`Error::Model`].
pub fn restore(checkpoint: &Path, saved: &Saved, state: &mut TrainState) -> Result<()> {
    let path = checkpoint.join(OPTIMIZER);
    let layout = Saved::layout(&state.parameters.slices);
    if saved.layout != layout {
        let differs = layout.iter().zip(&saved.layout).find(|(a, b)| a != b);
        let reason = match differs {
            Some((expected, found)) => format!("expected {expected:?}, found {found:?}"),
            None => format!("expected {} tensors, found {}", layout.len(), saved.layout.len()),
        };
        return Err(Error::Checkpoint { path, reason: format!("{reason}: it is of another model or frozen set") });
    }
    inherit(checkpoint, saved, state)?;
    state.passed_over = saved.passed_over.iter().map(|&(first, end)| first..end).collect();
    Ok(())
}

/// Takes over from a checkpoint, whose parameters the state has already, what fits a state that may train other tensors:
/// moments and averages by name and shape, updates and samples. What has no moments begins with none.
///
/// # Errors
/// [`Error::Checkpoint`] where the optimiser's vectors are not as long as the layout says; [`Error::Model`].
pub fn inherit(checkpoint: &Path, saved: &Saved, state: &mut TrainState) -> Result<()> {
    state.position = saved.position;
    for (from, group) in state.moments_from.iter_mut().zip(&state.parameters.groups) {
        let prefix = format!("{}.", group.component);
        let has_moments = saved.layout.iter().any(|(name, _)| name.starts_with(&prefix));
        let known = saved.moments_from.get(&group.component).copied().unwrap_or(0);
        *from = if has_moments { known } else { saved.position.update };
    }
    inherit_moments(checkpoint, saved, state)?;
    if let Some(average) = &state.average {
        inherit_average(&checkpoint.join(EMA), &state.parameters.slices, average)?;
    }
    Ok(())
}

fn inherit_moments(checkpoint: &Path, saved: &Saved, state: &TrainState) -> Result<()> {
    if saved.layout.is_empty() {
        return Ok(());
    }
    let path = checkpoint.join(OPTIMIZER);
    let mut places = BTreeMap::new();
    let mut end = 0;
    for (name, shape) in &saved.layout {
        let start = end;
        end += shape.iter().product::<i64>();
        places.insert(name, (shape, start..end));
    }
    let file = TensorFile::open(&path)?;
    for (name, vector) in [("mean", &state.optimizer.mean), ("mean_square", &state.optimizer.mean_square)] {
        let found = file.tensor(name)?;
        if found.size() != [end] {
            let reason = format!("{name}: expected shape [{end}], found {:?}", found.size());
            return Err(Error::Checkpoint { path, reason });
        }
        for slice in &state.parameters.slices {
            if let Some((_, range)) = places.get(&slice.name).filter(|(shape, _)| **shape == slice.shape) {
                part(vector, &slice.range).copy_(&part(&found, range));
            }
        }
    }
    Ok(())
}

fn inherit_average(ema: &Path, slices: &[Slice], average: &Tensor) -> Result<()> {
    for component in Component::ALL {
        let path = ema.join(component.folder()).join(component.weights_name());
        if !path.is_file() {
            continue;
        }
        let file = TensorFile::open(&path)?;
        for (name, slice) in slices_of(slices, component) {
            if file.shape(name).is_some_and(|shape| shape == slice.shape) {
                view(average, slice).copy_(&file.tensor(name)?);
            }
        }
    }
    Ok(())
}

/// BLAKE3 over a component's tensors: names, dtypes, shapes and elements, in the order of their names, hexadecimal. The
/// same for the same numbers, however they are cut into files and whatever else the files say, so that a model that was
/// exported again still fits the data sets and checkpoints that name it.
///
/// # Errors
/// [`Error::Model`] for missing or unusable weight files.
pub fn hash_weights(component: Component, folder: &Path) -> Result<String> {
    let files = component.weight_files(folder)?;
    let files = files.iter().map(|path| TensorFile::open(path)).collect::<rectiflow_sdxl::Result<Vec<_>>>()?;
    let mut tensors: Vec<(&str, &TensorFile)> =
        files.iter().flat_map(|file| file.names().map(move |name| (name, file))).collect();
    tensors.sort_unstable_by_key(|(name, _)| *name);
    let mut hasher = blake3::Hasher::new();
    for (name, file) in tensors {
        let parts = (file.kind(name), file.shape(name), file.bytes(name));
        let (Some(kind), Some(shape), Some(bytes)) = parts else { unreachable!("{name} is one of the file's names") };
        hasher.update(format!("{name}\0{kind:?}\0{shape:?}\0").as_bytes());
        hasher.update(bytes);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

const UNFINISHED: &str = "unfinished";
const DAMAGED: &str = "damaged";

fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;

    #[test]
    fn a_hash_of_weights_depends_on_the_numbers_alone() {
        let (a, b) = (Tensor::from_slice(&[1f32, 2.0]), Tensor::from_slice(&[3f32]));
        let folder = |files: &[(&str, &[(&str, &Tensor)])], metadata: &[(&str, &str)]| {
            let dir = tempfile::tempdir().expect("a temporary folder");
            for (name, tensors) in files {
                write_tensors(&dir.path().join(name), tensors.iter().copied(), None, metadata).expect("writes");
            }
            dir
        };
        let hash = |dir: &tempfile::TempDir| hash_weights(Component::Vae, dir.path()).expect("it can be hashed");
        let whole = "diffusion_pytorch_model.safetensors";
        let one = folder(&[(whole, &[("a", &a), ("b", &b)])], &[]);
        let told = folder(&[(whole, &[("b", &b), ("a", &a)])], &[("format", "pt")]);
        let cut = folder(&[("1.safetensors", &[("b", &b)]), ("2.safetensors", &[("a", &a)])], &[]);
        let index = r#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}"#;
        fs::write(cut.path().join(format!("{whole}.index.json")), index).expect("writes");
        assert_eq!(hash(&one), hash(&told));
        assert_eq!(hash(&one), hash(&cut));
        let other = folder(&[(whole, &[("a", &b), ("b", &a)])], &[]);
        assert_ne!(hash(&one), hash(&other));
    }
}
