//! Locations of a model's components, and the hashes that identify their weights.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use rectiflow_sdxl::{
    flow::Parameterization,
    folder,
    model::{Component, check_file},
    prediction::Prediction,
};

use crate::{
    checkpoint::{
        Checkpoints,
        bases::Bases,
        found::{Found, Reads, found},
        weights_hash::hash_weights,
    },
    error::{Error, Result},
    recipe::sections::CheckpointConfig,
};

/// Locations of a model's components. A component, which may be gigabytes, is hashed at most once,
/// and only on request or if a checkpoint names the hash that it must have.
#[derive(Debug)]
pub struct Components {
    model: PathBuf,
    checkpoint: Option<Found>,
    folders: BTreeMap<Component, PathBuf>,
    hashes: BTreeMap<Component, OnceLock<String>>,
}

impl Components {
    /// Finds the components of a model to read their weights: those in a diffusers folder, a
    /// checkpoint's own and the ones that it references, or a single-file checkpoint, which holds
    /// all. What a checkpoint holds is verified, and the hash of a single file if it has one.
    ///
    /// # Errors
    /// [`Error::Model`] if one is missing; [`Error::Checkpoint`] if a checkpoint is damaged, or
    /// if a part that it references is not found.
    pub fn find(model: &Path, bases: &Bases) -> Result<Self> {
        if model.is_file() {
            check_single_file(model)?;
            return Ok(Self::in_file(model));
        }
        match found(model, Reads::Model)? {
            Some(checkpoint) => Self::of_checkpoint(checkpoint, bases),
            None => Self::in_folder(model),
        }
    }

    /// As [`Self::find`], to read the configurations alone: no weights are read or verified.
    ///
    /// # Errors
    /// Those of [`Self::find`].
    pub(crate) fn find_configs(model: &Path) -> Result<Self> {
        if model.is_file() {
            return Ok(Self::in_file(model));
        }
        let Some(checkpoint) = found(model, Reads::Configs)? else {
            return Self::in_folder(model);
        };
        let mut components = Self::empty(model);
        let bases = Bases::default();
        for component in Component::ALL {
            let referenced = bases.find_config(&checkpoint, component)?;
            let own = || model.join(component.folder());
            components.add(component, referenced.unwrap_or_else(own));
        }
        components.checkpoint = Some(checkpoint);
        Ok(components)
    }

    /// Finds the components of a checkpoint that has been verified.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if a part that it references is not found.
    pub(crate) fn of_checkpoint(checkpoint: Found, bases: &Bases) -> Result<Self> {
        let mut components = Self::empty(&checkpoint.path);
        for component in Component::ALL {
            let own = checkpoint.path.join(component.folder());
            match bases.find(&checkpoint, component)? {
                None => components.add(component, own),
                Some((place, hash)) => {
                    components.add(component, place);
                    components.hashes[&component].get_or_init(|| hash);
                }
            }
        }
        components.checkpoint = Some(checkpoint);
        Ok(components)
    }

    /// Finds one component to read its weights; a folder of its own is enough. A part that a
    /// checkpoint references is found by its hash.
    ///
    /// # Errors
    /// Those of [`Self::find`].
    pub fn find_one(component: Component, model: &Path, bases: &Bases) -> Result<PathBuf> {
        if model.is_file() {
            check_single_file(model)?;
            return Ok(model.to_owned());
        }
        if let Some(checkpoint) = found(model, Reads::Part(component))? {
            let referenced = bases.find(&checkpoint, component)?;
            return Ok(match referenced {
                Some((place, _)) => place,
                None => model.join(component.folder()),
            });
        }
        match folder::find(component, model) {
            Ok(place) => {
                check_checkpoint_around(component, &place)?;
                Ok(place)
            }
            Err(error) => {
                check_no_run(model)?;
                Err(error.into())
            }
        }
    }

    fn empty(model: &Path) -> Self {
        Self {
            model: model.to_owned(),
            checkpoint: None,
            folders: BTreeMap::new(),
            hashes: BTreeMap::new(),
        }
    }

    fn add(&mut self, component: Component, place: PathBuf) {
        self.folders.insert(component, place);
        self.hashes.insert(component, OnceLock::new());
    }

    fn in_file(model: &Path) -> Self {
        let mut components = Self::empty(model);
        for component in Component::ALL {
            components.add(component, model.to_owned());
        }
        components
    }

    fn in_folder(model: &Path) -> Result<Self> {
        check_no_run(model)?;
        let mut components = Self::empty(model);
        for component in Component::ALL {
            components.add(component, folder::find(component, model)?);
        }
        Ok(components)
    }

    /// Returns the path of the model.
    pub fn model(&self) -> &Path {
        &self.model
    }

    /// Returns the checkpoint that the model is; `None` for other models.
    pub fn checkpoint(&self) -> Option<&Found> {
        self.checkpoint.as_ref()
    }

    /// Returns the folder of a component, which has its `config.json`, or the single file that
    /// holds all components.
    pub fn folder(&self, component: Component) -> &Path {
        &self.folders[&component]
    }

    /// Returns what the model's files say that its UNet predicts.
    ///
    /// # Errors
    /// [`Error::Model`].
    pub fn prediction(&self) -> Result<Prediction> {
        match &self.checkpoint {
            Some(checkpoint) => {
                let objective = &checkpoint.saved.objective;
                Ok(Prediction::named(objective.parameterization, "state.json"))
            }
            None => Ok(rectiflow_sdxl::model::prediction(&self.model)?),
        }
    }

    /// Returns what the model's UNet predicts, or `None` if the model does not say.
    ///
    /// # Errors
    /// [`Error::Model`].
    pub fn parameterization(&self) -> Result<Option<Parameterization>> {
        Ok(self.prediction()?.settled(None)?)
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

/// Compares the tensors of a single file with the hash in its header, and says what a user should
/// know about it.
fn check_single_file(file: &Path) -> Result<()> {
    for note in check_file(file)? {
        tracing::warn!("{}: {note}", file.display());
    }
    Ok(())
}

/// Verifies a component's own folder, if that is in a checkpoint.
fn check_checkpoint_around(component: Component, folder: &Path) -> Result<()> {
    let full = folder.canonicalize().map_err(Error::io(folder))?;
    if full.ends_with(component.folder())
        && let Some(around) = full.parent()
    {
        found(around, Reads::Part(component))?;
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_run_is_answered_with_its_newest_checkpoint() {
        let run = tempfile::tempdir().expect("a temporary folder");
        for step in ["step-00000010", "step-00000200"] {
            let folder = run.path().join("checkpoints").join(step);
            fs::create_dir_all(&folder).expect("a writable folder");
            fs::write(folder.join("state.json"), "{}").expect("writes");
        }
        let error = Components::find(run.path(), &Bases::default())
            .expect_err("it is a run")
            .to_string();
        assert!(
            error.contains("folder of a run") && error.ends_with("step-00000200"),
            "{error}"
        );
    }
}
