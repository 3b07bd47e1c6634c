//! Opens models by path: the base that a run starts from, and any folder to sample or export from,
//! including checkpoints of this trainer.

use std::path::Path;

use rectiflow_sdxl::{
    clip::ClipText,
    model::{Component, Model, OpenOptions},
    unet::UNet,
    vae::Vae,
    weights::Parameters,
};
use tch::Device;

use crate::{
    checkpoint::{bases::Bases, components::Components},
    error::Result,
};

/// Opens a complete model: a diffusers folder, a single-file checkpoint, or a training checkpoint
/// whose other parts are found by their hashes.
///
/// # Errors
/// As [`Components::find`]; [`crate::error::Error::Model`].
pub fn open(path: &Path, bases: &Bases, options: &OpenOptions) -> Result<Model> {
    open_components(&Components::find(path, bases)?, options)
}

/// Like [`open`], with components that have already been located.
pub(crate) fn open_components(components: &Components, options: &OpenOptions) -> Result<Model> {
    let place = |component| components.folder(component);
    let path = components.model();
    let model = Model {
        unet: UNet::open(place(Component::UNet), options)?,
        clip_l: ClipText::open(place(Component::ClipL), Component::ClipL, options)?,
        clip_g: ClipText::open(place(Component::ClipG), Component::ClipG, options)?,
        vae: Vae::open(place(Component::Vae), options)?,
        parameterization: components.parameterization()?,
        scheduler: rectiflow_sdxl::model::scheduler(path)?,
    };
    model.check_fit(&path.display().to_string())?;
    Ok(model)
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
