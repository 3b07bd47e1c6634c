//! Checkpoints: a folder each, whole or absent.
//!
//! ```text
//! RUN/checkpoints/step-00000500/
//!   state.json                     position, order, identities, where the frozen parts are (format version 1)
//!   recipe.toml                    the recipe with every default written out
//!   unet/config.json, unet/diffusion_pytorch_model.safetensors          fp32, diffusers' names
//!   text_encoder/..., text_encoder_2/...                                only where they are trained
//!   optimizer.safetensors          "mean" and "mean_square" [n] fp32, in the order of state.json's `layout`
//! ```
//!
//! A checkpoint is written beside its place and renamed when all of it is on disk, so that a kill at any moment leaves
//! the one before. Frozen components are named by path and hash instead of being copied.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use rectiflow_sdxl::{
    durable::{rename_folder, write_bytes},
    flow::ObjectiveSettings,
    model::Component,
    tensor_file::{TensorFile, write_tensors},
    weights::Parameters,
};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    flat::Slice,
    state::{Position, TrainState},
};

const FORMAT: u32 = 1;
const STATE: &str = "state.json";
const OPTIMIZER: &str = "optimizer.safetensors";

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
}

/// A component that training left as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// The component's folder, absolute.
    pub path: PathBuf,
    /// BLAKE3 over its weights ([`hash_weights`]), hexadecimal.
    pub blake3: String,
}

/// A trained component: which, where its configuration file is, and its tensors.
#[derive(Debug)]
pub struct Trained<'a> {
    /// Which component.
    pub component: Component,
    /// The folder that its `config.json` is copied from.
    pub source: PathBuf,
    /// Its tensors.
    pub parameters: &'a Parameters,
}

/// The checkpoints of one run.
#[derive(Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// The checkpoints below `run_dir`; what an interrupted save left is removed. The caller holds the run's lock.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(run_dir: &Path, keep: usize) -> Result<Self> {
        let folder = run_dir.join("checkpoints");
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        for entry in fs::read_dir(&folder).map_err(Error::io(&folder))? {
            let entry = entry.map_err(Error::io(&folder))?;
            if entry.file_name().to_string_lossy().ends_with(UNFINISHED) {
                fs::remove_dir_all(entry.path()).map_err(Error::io(entry.path()))?;
            }
        }
        Ok(Self { folder, keep })
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

    /// Writes a checkpoint and removes what is older than the newest `keep`. Gives its folder.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Model`]; earlier checkpoints are untouched then.
    pub fn save(&self, saved: &Saved, recipe: &str, trained: &[Trained], state: &TrainState) -> Result<PathBuf> {
        let place = self.folder.join(format!("step-{:08}", saved.position.cursor));
        let unfinished = place.with_extension(UNFINISHED);
        fs::create_dir_all(&unfinished).map_err(Error::io(&unfinished))?;
        for part in trained {
            let folder = unfinished.join(part.component.folder());
            fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
            let config = part.source.join("config.json");
            let text = fs::read(&config).map_err(Error::io(&config))?;
            write_bytes(&folder.join("config.json"), &text)?;
            part.parameters.save(&folder.join(part.component.weights_name()), None)?;
        }
        let vectors = [("mean", &state.optimizer.mean), ("mean_square", &state.optimizer.mean_square)];
        write_tensors(&unfinished.join(OPTIMIZER), vectors, None, &[])?;
        write_bytes(&unfinished.join("recipe.toml"), recipe.as_bytes())?;
        let json = serde_json::to_vec_pretty(saved).expect("the state is plain data that JSON can hold");
        write_bytes(&unfinished.join(STATE), &json)?;
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
            fs::remove_dir_all(old).map_err(Error::io(old))?;
        }
        Ok(())
    }
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
        if saved.format != FORMAT {
            let reason =
                format!("expected checkpoint format {FORMAT}, found {}; use the version that wrote it", saved.format);
            return Err(broken(reason));
        }
        Ok(saved)
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

/// Puts a checkpoint's numbers into a run's state. Shapes and names must be those of the run.
///
/// # Errors
/// [`Error::Checkpoint`] naming the first difference, or [`Error::Model`].
pub fn restore(checkpoint: &Path, trained: &[Trained], state: &mut TrainState) -> Result<Saved> {
    let saved = Saved::read(checkpoint)?;
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
    for part in trained {
        let folder = checkpoint.join(part.component.folder());
        part.parameters.load(&folder.join(part.component.weights_name()))?;
    }
    let file = TensorFile::open(&path)?;
    let vectors = [("mean", &mut state.optimizer.mean), ("mean_square", &mut state.optimizer.mean_square)];
    for (name, vector) in vectors {
        let found = file.tensor(name)?;
        if found.size() != vector.size() {
            let reason = format!("{name}: expected shape {:?}, found {:?}", vector.size(), found.size());
            return Err(Error::Checkpoint { path, reason });
        }
        vector.copy_(&found);
    }
    state.position = saved.position;
    Ok(saved)
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
