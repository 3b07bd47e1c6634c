//! Locations of a model's components, and the hashes that identify their weights.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use rectiflow_sdxl::{folder, model::Component, visit::visit_weights};

use crate::{
    checkpoint::{Checkpoints, Frozen, Saved, is_checkpoint},
    error::{Error, Result},
    recipe::sections::CheckpointConfig,
};

/// Locations of a model's components. A component, which may be gigabytes, is hashed at most once,
/// and only on request or if a checkpoint names the hash that it must have.
#[derive(Debug)]
pub struct Components {
    folders: BTreeMap<Component, PathBuf>,
    hashes: BTreeMap<Component, OnceLock<String>>,
}

impl Components {
    /// Finds the components of a model: those in a diffusers folder, a checkpoint's own and the
    /// frozen ones that it references, or a single-file checkpoint, which holds all.
    ///
    /// # Errors
    /// [`Error::Model`] if one is missing; [`Error::Checkpoint`] if a frozen one is missing or has
    /// changed.
    pub fn find(model: &Path) -> Result<Self> {
        if model.is_file() {
            let folders = Component::ALL.map(|component| (component, model.to_owned()));
            let hashes = Component::ALL.map(|component| (component, OnceLock::new()));
            return Ok(Self {
                folders: folders.into(),
                hashes: hashes.into(),
            });
        }
        let mut frozen = if is_checkpoint(model) {
            Some(Saved::read(model)?.frozen)
        } else {
            None
        };
        check_no_run(model)?;
        let (mut folders, mut hashes) = (BTreeMap::new(), BTreeMap::new());
        for component in Component::ALL {
            let hash = OnceLock::new();
            let folder = match &mut frozen {
                None => folder::find(component, model)?,
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

    /// Finds one component, of which a folder of its own is enough. A checkpoint's frozen
    /// components are found where it references them.
    ///
    /// # Errors
    /// Those of [`Self::find`].
    pub fn find_one(component: Component, model: &Path) -> Result<PathBuf> {
        if model.is_file() {
            return Ok(model.to_owned());
        }
        match folder::find(component, model) {
            Ok(found) => Ok(found),
            Err(_) if is_checkpoint(model) => Ok(Self::find(model)?.folder(component).to_owned()),
            Err(error) => {
                check_no_run(model)?;
                Err(error.into())
            }
        }
    }

    /// Returns the folder of a component, which has its `config.json`, or the single file that
    /// holds all components.
    pub fn folder(&self, component: Component) -> &Path {
        &self.folders[&component]
    }

    /// Reads a component from another folder, which must hold the same weights.
    pub(crate) fn replace(&mut self, component: Component, folder: PathBuf) {
        self.folders.insert(component, folder);
    }

    /// Returns the BLAKE3 of the component's weights, see [`hash_weights`].
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn blake3(&self, component: Component) -> Result<&str> {
        let hash = &self.hashes[&component];
        if hash.get().is_none() {
            let found = hash_weights(component, self.folder(component))?;
            hash.get_or_init(|| found);
        }
        Ok(hash.get().expect("the hash was just set"))
    }
}

/// Rejects the folder of a run, which is easily mistaken for one of its checkpoints.
fn check_no_run(model: &Path) -> Result<()> {
    let checkpoints = Checkpoints::at(model, &CheckpointConfig::default()).list();
    let Some(newest) = checkpoints
        .ok()
        .and_then(|mut checkpoints| checkpoints.pop())
    else {
        return Ok(());
    };
    let reason = format!(
        "this is the folder of a run, not of a model; its newest checkpoint is {}",
        newest.display()
    );
    Err(Error::Checkpoint {
        path: model.to_owned(),
        reason,
    })
}

fn check_unchanged(checkpoint: &Path, component: Component, frozen: &Frozen) -> Result<()> {
    let broken = |reason: String| Error::Checkpoint {
        path: frozen.path.clone(),
        reason,
    };
    let (name, checkpoint) = (component.name(), checkpoint.display());
    let found = hash_weights(component, &frozen.path).map_err(|e| {
        broken(format!(
            "the checkpoint {checkpoint} needs this {name}: {e}"
        ))
    })?;
    if found == frozen.blake3 {
        return Ok(());
    }
    let expected = &frozen.blake3;
    Err(broken(format!(
        "the {name} has changed since the checkpoint {checkpoint} was written: \
         expected BLAKE3 {expected}, found {found}; restore the old one"
    )))
}

/// Returns the BLAKE3 of a component's tensors, hexadecimal: names, dtypes, shapes and elements,
/// sorted by name. Equal weights have equal hashes, regardless of how they are split into files and
/// of the files' metadata, so a model that is exported again still matches the data sets and
/// checkpoints that name it. A component of a single-file checkpoint has the hash of the folder
/// that `rectiflow import` writes.
///
/// # Errors
/// [`Error::Model`] for missing or unusable weight files.
pub fn hash_weights(component: Component, folder: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    visit_weights(component, folder, &mut |name, kind, shape, bytes| {
        hasher.update(format!("{name}\0{kind:?}\0{shape:?}\0").as_bytes());
        hasher.update(bytes);
    })?;
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rectiflow_sdxl::tensor_file::write_tensors;
    use tch::Tensor;

    use super::*;

    #[test]
    fn a_run_is_answered_with_its_newest_checkpoint() {
        let run = tempfile::tempdir().expect("a temporary folder");
        for step in ["step-00000010", "step-00000200"] {
            let folder = run.path().join("checkpoints").join(step);
            fs::create_dir_all(&folder).expect("a writable folder");
            fs::write(folder.join("state.json"), "{}").expect("writes");
        }
        let error = Components::find(run.path())
            .expect_err("it is a run")
            .to_string();
        assert!(
            error.contains("folder of a run") && error.ends_with("step-00000200"),
            "{error}"
        );
    }

    #[test]
    fn a_hash_of_weights_depends_on_the_numbers_alone() {
        let (a, b) = (
            Tensor::from_slice(&[1f32, 2.0]),
            Tensor::from_slice(&[3f32]),
        );
        let folder = |files: &[(&str, &[(&str, &Tensor)])], metadata: &[(&str, &str)]| {
            let dir = tempfile::tempdir().expect("a temporary folder");
            for (name, tensors) in files {
                write_tensors(
                    &dir.path().join(name),
                    tensors.iter().copied(),
                    None,
                    metadata,
                )
                .expect("writes");
            }
            dir
        };
        let hash = |dir: &tempfile::TempDir| {
            hash_weights(Component::Vae, dir.path()).expect("it can be hashed")
        };
        let whole = "diffusion_pytorch_model.safetensors";
        let one = folder(&[(whole, &[("a", &a), ("b", &b)])], &[]);
        let told = folder(&[(whole, &[("b", &b), ("a", &a)])], &[("format", "pt")]);
        let cut = folder(
            &[
                ("1.safetensors", &[("b", &b)]),
                ("2.safetensors", &[("a", &a)]),
            ],
            &[],
        );
        let index = r#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}"#;
        fs::write(cut.path().join(format!("{whole}.index.json")), index).expect("writes");
        assert_eq!(hash(&one), hash(&told));
        assert_eq!(hash(&one), hash(&cut));
        let other = folder(&[(whole, &[("a", &b), ("b", &a)])], &[]);
        assert_ne!(hash(&one), hash(&other));
    }
}
