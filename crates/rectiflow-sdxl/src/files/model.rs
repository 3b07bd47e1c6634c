//! Opens models: a whole diffusers folder, one component's folder with its `config.json`, or a
//! single-file checkpoint.
//!
//! ```text
//! MODEL/unet/             config.json, diffusion_pytorch_model.safetensors
//! MODEL/text_encoder/     config.json, model.safetensors                     CLIP-L
//! MODEL/text_encoder_2/   config.json, model.safetensors                     bigG with projection
//! MODEL/vae/              config.json, diffusion_pytorch_model.safetensors
//! MODEL/scheduler/        scheduler_config.json                              says flow, eps or v
//! ```
//!
//! The file names inside such a folder are in `folder`, the layout of a single file in
//! `single_file`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tch::{Device, Kind};

use crate::{
    config::{
        clip::ClipConfig, reader::read_object, scheduler::SchedulerConfig, unet::UNetConfig,
        vae::VaeConfig,
    },
    error::{Error, Result},
    files::{folder, prediction::Prediction, single_file::SingleFile},
    flow::Parameterization,
    nets::{clip::ClipText, unet::UNet, vae::Vae},
    weights::{Weights, component::PARAMETERIZATION_KEY, tensor_file::TensorFile},
};

pub use crate::weights::component::Component;

/// Options for opening a model.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Device that the model runs on.
    pub device: Device,
    /// Dtype that the model runs in, independent of the files. An autoencoder that overflows in
    /// fp16 runs in fp32 instead.
    pub kind: Kind,
    /// Components that start from random weights; their weight files are not opened.
    pub random: Vec<Component>,
    /// Seed of the random weights.
    pub seed: u64,
    /// Whether weights are memory-mapped instead of copied, where the model runs on the CPU in the
    /// dtype of the file: a UNet then takes the memory of its largest level. Mapped weights are
    /// read-only, so this is not for training.
    pub map: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            kind: Kind::Float,
            random: Vec::new(),
            seed: 0,
            map: false,
        }
    }
}

/// The configuration and weights of a component, with its name for messages.
struct Opened {
    config: Map<String, Value>,
    what: String,
    weights: Weights,
}

/// Returns a component's configuration from a folder or a single file, and its name for messages.
///
/// # Errors
/// An error if the folder, the file or its header is unusable.
pub fn config_of(component: Component, model: &Path) -> Result<(Map<String, Value>, String)> {
    if model.is_file() {
        let mut file = SingleFile::open(model)?;
        let name = file.config_name(component);
        return Ok((file.take(component)?.0, name));
    }
    let path = folder::find(component, model)?.join("config.json");
    Ok((read_object(&path)?, path.display().to_string()))
}

/// Reads a component's configuration and weights from a single file or a folder.
fn open(component: Component, model: &Path, options: &OpenOptions) -> Result<Opened> {
    let (config, what) = config_of(component, model)?;
    let weights = if options.random.contains(&component) {
        Weights::random(options.seed, options.kind, options.device)
    } else {
        let stored = if model.is_file() {
            SingleFile::open(model)?.take(component)?.1
        } else {
            folder::stored(component, &folder::find(component, model)?)?
        };
        Weights::of_files(stored, options.kind, options.device).map(options.map)
    };
    Ok(Opened {
        config,
        what,
        weights,
    })
}

impl UNet {
    /// Opens the UNet of a diffusers folder or a single-file checkpoint, or a UNet's own folder.
    ///
    /// # Errors
    /// An error if the folder, its configuration or its weights are unusable.
    pub fn open(model: &Path, options: &OpenOptions) -> Result<Self> {
        let Opened {
            config,
            what,
            weights,
        } = open(Component::UNet, model, options)?;
        Self::new(UNetConfig::from_json(config, &what)?, weights)
    }
}

impl ClipText {
    /// Opens the text encoder `which` (CLIP-L or bigG) of a diffusers folder or a single-file
    /// checkpoint, or an encoder's own folder.
    ///
    /// # Errors
    /// An error if the folder, its configuration or its weights are unusable.
    pub fn open(model: &Path, which: Component, options: &OpenOptions) -> Result<Self> {
        let Opened {
            config,
            what,
            weights,
        } = open(which, model, options)?;
        Self::new(
            ClipConfig::from_json(config, which == Component::ClipG, &what)?,
            weights,
        )
    }
}

impl Vae {
    /// Opens the autoencoder of a diffusers folder or a single-file checkpoint, or an autoencoder's
    /// own folder.
    ///
    /// # Errors
    /// An error if the folder, its configuration or its weights are unusable.
    pub fn open(model: &Path, options: &OpenOptions) -> Result<Self> {
        let Opened {
            config,
            what,
            mut weights,
        } = open(Component::Vae, model, options)?;
        let config = VaeConfig::from_json(config, &what)?;
        if config.force_upcast && options.kind == Kind::Half {
            weights.convert_to(Kind::Float);
        }
        Self::new(config, weights)
    }
}

/// A complete SDXL model.
#[derive(Debug)]
pub struct Model {
    /// Predicts the velocity, the noise or v, as `parameterization` says.
    pub unet: UNet,
    /// The first text encoder, CLIP-L.
    pub clip_l: ClipText,
    /// The second text encoder, bigG, whose pooled output is used.
    pub clip_g: ClipText,
    /// Encodes pictures to latents and decodes them.
    pub vae: Vae,
    /// What the UNet predicts; `None` if the model does not say.
    pub parameterization: Option<Parameterization>,
    /// The scheduler's configuration; `None` if the model has none.
    pub scheduler: Option<SchedulerConfig>,
}

impl Model {
    /// Opens a whole diffusers folder or single-file checkpoint.
    ///
    /// # Errors
    /// An error if the folder, a configuration or weights are unusable; [`Error::Config`] if the
    /// parts do not fit each other.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let model = Self {
            unet: UNet::open(path, options)?,
            clip_l: ClipText::open(path, Component::ClipL, options)?,
            clip_g: ClipText::open(path, Component::ClipG, options)?,
            vae: Vae::open(path, options)?,
            parameterization: parameterization(path)?,
            scheduler: scheduler(path)?,
        };
        model.check_fit(&path.display().to_string())?;
        Ok(model)
    }

    /// Checks that the parts' widths fit each other.
    ///
    /// # Errors
    /// [`Error::Config`] with every mismatch; `what` names the model.
    pub fn check_fit(&self, what: &str) -> Result<()> {
        check_fit(
            &self.unet.config,
            [&self.clip_l.config, &self.clip_g.config],
            &self.vae.config,
            what,
        )
    }
}

/// The configurations of all components, without weights.
#[derive(Debug, Clone)]
pub struct Configs {
    /// The UNet's sizes.
    pub unet: UNetConfig,
    /// CLIP-L's sizes.
    pub clip_l: ClipConfig,
    /// bigG's sizes.
    pub clip_g: ClipConfig,
    /// The autoencoder's sizes.
    pub vae: VaeConfig,
}

impl Configs {
    /// Reads the configurations of the UNet, CLIP-L, bigG and the autoencoder, each in the folder
    /// or the single-file checkpoint named in that order.
    ///
    /// # Errors
    /// An error if a folder, a file's header or a configuration is unusable.
    pub fn read(places: [&Path; 4]) -> Result<Self> {
        let [unet, clip_l, clip_g, vae] = places;
        let (unet, unet_name) = config_of(Component::UNet, unet)?;
        let (clip_l, clip_l_name) = config_of(Component::ClipL, clip_l)?;
        let (clip_g, clip_g_name) = config_of(Component::ClipG, clip_g)?;
        let (vae, vae_name) = config_of(Component::Vae, vae)?;
        Ok(Self {
            unet: UNetConfig::from_json(unet, &unet_name)?,
            clip_l: ClipConfig::from_json(clip_l, false, &clip_l_name)?,
            clip_g: ClipConfig::from_json(clip_g, true, &clip_g_name)?,
            vae: VaeConfig::from_json(vae, &vae_name)?,
        })
    }

    /// Checks that the parts' widths fit each other.
    ///
    /// # Errors
    /// [`Error::Config`] with every mismatch; `what` names the model.
    pub fn check_fit(&self, what: &str) -> Result<()> {
        check_fit(&self.unet, [&self.clip_l, &self.clip_g], &self.vae, what)
    }
}

fn check_fit(
    unet: &UNetConfig,
    [l, g]: [&ClipConfig; 2],
    vae: &VaeConfig,
    what: &str,
) -> Result<()> {
    let mut problems = Vec::new();
    problems.extend(difference(
        ("UNet's cross_attention_dim", unet.context_dim()),
        (
            "both text encoders' hidden_size",
            l.hidden_size + g.hidden_size,
        ),
    ));
    problems.extend(difference(
        ("UNet's pooled text width", unet.pooled_dim),
        ("second text encoder's pooled width", g.pooled_dim()),
    ));
    problems.extend(difference(
        ("UNet's in_channels", unet.in_channels),
        ("VAE's latent_channels", vae.latent_channels),
    ));
    if problems.is_empty() {
        Ok(())
    } else {
        Err(Error::Config {
            what: what.to_owned(),
            problems,
        })
    }
}

/// Describes two named widths that should be equal and are not.
fn difference((left, a): (&str, i64), (right, b): (&str, i64)) -> Option<String> {
    (a != b).then(|| format!("{left} ({a}) is not the {right} ({b})"))
}

/// Compares the tensors of a single file with the hash in its header, if it has one. Returns what a
/// user should know, one sentence each: a hash that another tool may have left behind, and that the
/// file is an autoencoder alone.
///
/// # Errors
/// [`Error::Malformed`] if this program wrote the file and it has changed since, or if it is not
/// SDXL; [`Error::Io`].
pub fn check_file(path: &Path) -> Result<Vec<String>> {
    let file = SingleFile::open(path)?;
    let mut notes = Vec::new();
    notes.extend(file.check_hash()?);
    notes.extend(file.vae_note());
    Ok(notes)
}

/// Returns what a model's UNet predicts; `None` if its files do not say.
///
/// # Errors
/// As [`prediction`] and [`Prediction::settled`].
pub fn parameterization(model: &Path) -> Result<Option<Parameterization>> {
    prediction(model)?.settled(None)
}

/// Returns what a model's files say that its UNet predicts: for a folder, the header of the UNet's
/// weights if this program wrote them, else the scheduler's configuration.
///
/// # Errors
/// [`Error::Io`], [`Error::Malformed`], and [`Error::Config`] for a noise schedule that is not
/// supported.
pub fn prediction(model: &Path) -> Result<Prediction> {
    if model.is_file() {
        return Ok(SingleFile::open(model)?.prediction);
    }
    let of_scheduler = match scheduler(model)? {
        Some(SchedulerConfig {
            parameterization: Some(parameterization),
            ..
        }) => Prediction::named(parameterization, "scheduler/scheduler_config.json"),
        _ => Prediction::default(),
    };
    let Some((parameterization, file)) = parameterization_in_header(model)? else {
        return Ok(of_scheduler);
    };
    let source = format!("{PARAMETERIZATION_KEY} in the header of {}", file.display());
    Ok(Prediction {
        has_zero_terminal_snr: of_scheduler.has_zero_terminal_snr && parameterization.predicts_v(),
        ..Prediction::named(parameterization, source)
    })
}

/// Returns what the header of a folder's UNet says, and the file; `None` if this program did not
/// write it.
fn parameterization_in_header(model: &Path) -> Result<Option<(Parameterization, PathBuf)>> {
    let files = folder::find(Component::UNet, model)
        .and_then(|at| folder::weight_files(Component::UNet, &at));
    for file in files.unwrap_or_default() {
        let opened = TensorFile::open(&file)?;
        let Some(name) = opened.metadata().get(PARAMETERIZATION_KEY) else {
            continue;
        };
        return match name.parse() {
            Ok(parameterization) => Ok(Some((parameterization, file))),
            Err(error) => Err(Error::Malformed {
                path: file,
                kind: "UNet",
                reason: format!("{PARAMETERIZATION_KEY}: {error}"),
            }),
        };
    }
    Ok(None)
}

/// Returns the scheduler's configuration of a diffusers folder, if it has one.
///
/// # Errors
/// As [`SchedulerConfig::read`].
pub fn scheduler(model: &Path) -> Result<Option<SchedulerConfig>> {
    let path = model.join("scheduler").join("scheduler_config.json");
    if path.is_file() {
        SchedulerConfig::read(&path).map(Some)
    } else {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn says_what_is_at_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let error = |path: &Path| {
            UNet::open(path, &OpenOptions::default())
                .unwrap_err()
                .to_string()
        };
        assert!(error(&folder.path().join("gone")).contains("nothing at this path"));
        let file = folder.path().join("file");
        fs::write(&file, b"x").unwrap();
        assert!(
            error(&file).contains("the file ends after 1 byte,"),
            "a single file, then"
        );
        assert!(error(folder.path()).contains("unet/config.json"));
    }
}
