//! Opens models by path: the base that a run starts from, and any folder to sample or export from,
//! including checkpoints of this trainer.

use std::path::Path;

use rectiflow_sdxl::{
    clip::ClipText,
    flow::{ObjectiveSettings, Parameterization},
    model::{Component, Model, OpenOptions},
    prediction::Prediction,
    unet::UNet,
    vae::Vae,
    weights::Parameters,
};
use tch::Device;

use crate::{
    checkpoint::{Saved, components::Components, is_checkpoint},
    error::Result,
};

/// Opens a complete model: a diffusers folder, a single-file checkpoint, or a training checkpoint
/// whose frozen parts are unchanged and still in place.
///
/// # Errors
/// [`crate::error::Error::Model`]; [`crate::error::Error::Checkpoint`] if a frozen part is missing
/// or different.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Model> {
    open_components(path, &Components::find(path)?, options)
}

/// Like [`open`], with components that have already been located.
pub(crate) fn open_components(
    path: &Path,
    components: &Components,
    options: &OpenOptions,
) -> Result<Model> {
    let place = |component| components.folder(component);
    let model = Model {
        unet: UNet::open(place(Component::UNet), options)?,
        clip_l: ClipText::open(place(Component::ClipL), Component::ClipL, options)?,
        clip_g: ClipText::open(place(Component::ClipG), Component::ClipG, options)?,
        vae: Vae::open(place(Component::Vae), options)?,
        parameterization: parameterization(path)?,
        scheduler: rectiflow_sdxl::model::scheduler(path)?,
    };
    model.check_fit(&path.display().to_string())?;
    Ok(model)
}

/// Returns what a model's UNet predicts, or `None` if the model does not say.
///
/// # Errors
/// [`crate::error::Error::Checkpoint`], [`crate::error::Error::Model`].
pub fn parameterization(path: &Path) -> Result<Option<Parameterization>> {
    Ok(prediction(path)?.settled(None)?)
}

/// Returns what a model's files say that its UNet predicts.
///
/// # Errors
/// [`crate::error::Error::Checkpoint`], [`crate::error::Error::Model`].
pub fn prediction(path: &Path) -> Result<Prediction> {
    match objective(path)? {
        Some(objective) => Ok(Prediction::named(objective.parameterization, "state.json")),
        None => Ok(rectiflow_sdxl::model::prediction(path)?),
    }
}

/// Returns what a checkpoint's UNet was trained to predict, or `None` if the folder is not a
/// checkpoint.
///
/// # Errors
/// [`crate::error::Error::Checkpoint`].
pub fn objective(path: &Path) -> Result<Option<ObjectiveSettings>> {
    if is_checkpoint(path) {
        Ok(Some(Saved::read(path)?.objective))
    } else {
        Ok(None)
    }
}

/// Returns the tensors of one component.
pub(crate) fn parameters(model: &Model, component: Component) -> &Parameters {
    match component {
        Component::UNet => &model.unet.parameters,
        Component::ClipL => &model.clip_l.parameters,
        Component::ClipG => &model.clip_g.parameters,
        Component::Vae => &model.vae.parameters,
    }
}

/// Returns the options to open a run's base model: the device, and the components that start from
/// random weights.
pub(crate) fn base_options(device: Device, random: &[Component], seed: u64) -> OpenOptions {
    OpenOptions {
        device,
        random: random.to_vec(),
        seed,
        ..OpenOptions::default()
    }
}
