//! A whole model as named tensors that are loaded one at a time: the common source of all exports.
//!
//! A model in memory, component folders on disk, and a single-file checkpoint look alike here: four
//! configurations, diffusers' names, and tensors on request. So export and import share two
//! writers, and neither needs memory for more than the largest tensor, apart from mapped files.
//!
//! Not here: the writers (`export`), the meaning of names (`keys`).

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};
use tch::{Kind, Tensor};

use crate::{
    config::{
        clip::ClipConfig, reader::read_object, scheduler::SchedulerConfig, unet::UNetConfig,
        vae::VaeConfig,
    },
    error::{Error, Result, WeightProblems},
    files::{
        folder,
        model::Model,
        prediction::Prediction,
        single_file::{SingleFile, table_of},
    },
    flow::Parameterization,
    nets::{clip::ClipText, unet::UNet, vae::Vae},
    weights::{
        Parameters, Weights, component::Component, is_finite, keys::KeyTable, stored::Stored,
    },
};

pub use crate::files::single_file::{CONFIGS_KEY, sdxl_configs};

/// A tensor that every autoencoder has; its dtype is taken as the dtype of all.
const VAE_TENSOR: &str = "decoder.conv_in.weight";

/// The four components of a model; tensors are loaded on request.
#[derive(Debug)]
pub struct Bundle<'a> {
    parts: BTreeMap<Component, Part<'a>>,
    table: KeyTable,
    /// What the UNet predicts; `None` if it is not known.
    pub parameterization: Option<Parameterization>,
    /// What the source says that the UNet predicts.
    pub prediction: Prediction,
    /// The scheduler's configuration of the source; `None` if it has none.
    pub scheduler: Option<SchedulerConfig>,
    /// What a user should know about the source, one sentence each: ignored tensors, parts taken
    /// from another model.
    pub notes: Vec<String>,
}

#[derive(Debug)]
struct Part<'a> {
    config: Map<String, Value>,
    /// The configuration's name for messages.
    config_name: String,
    tensors: Tensors<'a>,
}

#[derive(Debug)]
enum Tensors<'a> {
    Memory(&'a Parameters),
    Files(Stored),
}

impl<'a> Part<'a> {
    fn in_memory(
        component: Component,
        config: &Map<String, Value>,
        parameters: &'a Parameters,
    ) -> Self {
        Self {
            config: config.clone(),
            config_name: component.config_name(),
            tensors: Tensors::Memory(parameters),
        }
    }

    /// Names the source of the tensors for messages.
    fn source(&self) -> String {
        match &self.tensors {
            Tensors::Memory(_) => "the model".into(),
            Tensors::Files(stored) => stored.description(),
        }
    }
}

impl<'a> Bundle<'a> {
    /// Makes a bundle of a model in memory.
    ///
    /// # Errors
    /// [`Error::Weights`] if tensors do not fit the configurations.
    pub fn of_model(model: &'a Model) -> Result<Self> {
        let Model {
            unet,
            clip_l,
            clip_g,
            vae,
            ..
        } = model;
        let mut parts = BTreeMap::new();
        for (component, config, parameters) in [
            (Component::UNet, &unet.config.json, &unet.parameters),
            (Component::ClipL, &clip_l.config.json, &clip_l.parameters),
            (Component::ClipG, &clip_g.config.json, &clip_g.parameters),
            (Component::Vae, &vae.config.json, &vae.parameters),
        ] {
            parts.insert(component, Part::in_memory(component, config, parameters));
        }
        Self::new(parts, model.parameterization)
    }

    /// Opens components in folders of diffusers' layout or in single files, memory-mapped;
    /// `folder` returns the place of each component.
    ///
    /// # Errors
    /// An error if a folder, a configuration or a file is unusable; [`Error::Weights`] if tensors
    /// do not fit.
    pub fn open_folders(
        folder: impl Fn(Component) -> PathBuf,
        parameterization: Option<Parameterization>,
    ) -> Result<Self> {
        let mut parts = BTreeMap::new();
        for component in Component::ALL {
            let place = folder(component);
            let part = if place.is_file() {
                part_in_file(component, &mut SingleFile::open(&place)?)?
            } else {
                part_in_folder(component, &place)?
            };
            parts.insert(component, part);
        }
        Self::new(parts, parameterization)
    }

    /// Opens a single-file SDXL checkpoint, memory-mapped. Sizes come from the configurations in
    /// its header if this program wrote it, else they are SDXL's. Parts that the file lacks are
    /// taken from `missing_from`, a diffusers folder, if it is `Some`.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Malformed`] if the file is not safetensors or not SDXL,
    /// [`Error::Missing`] if it lacks a whole component, [`Error::Weights`] if tensors do not fit.
    pub fn open_single_file(path: &Path, missing_from: Option<&Path>) -> Result<Self> {
        let mut file = SingleFile::open(path)?;
        let mut notes = file.notes();
        notes.extend(file.check_hash()?);
        let mut parts = BTreeMap::new();
        for component in Component::ALL {
            let part = match missing_from {
                Some(other) if !file.has(component) => {
                    let name = component.name();
                    notes.push(format!("the {name} is from {}", other.display()));
                    part_in_folder(component, other)?
                }
                _ => part_in_file(component, &mut file)?,
            };
            parts.insert(component, part);
        }
        // A contradiction is an error only where no argument resolves it.
        let parameterization = file.prediction.settled(None).unwrap_or_default();
        let mut bundle = Self::new(parts, parameterization)?;
        bundle.prediction = file.prediction;
        if bundle.kind(Component::Vae, VAE_TENSOR) == Some(Kind::Half) {
            let note = "the VAE is stored in fp16; it runs in fp32 or bf16, since SDXL's VAE \
                        overflows in fp16";
            notes.push(note.into());
        }
        bundle.notes = notes;
        Ok(bundle)
    }

    fn new(
        parts: BTreeMap<Component, Part<'a>>,
        parameterization: Option<Parameterization>,
    ) -> Result<Self> {
        let mut configs = BTreeMap::new();
        let mut names = BTreeMap::new();
        for (component, part) in &parts {
            configs.insert(*component, part.config.clone());
            names.insert(*component, part.config_name.clone());
        }
        let bundle = Self {
            table: table_of(&configs, &names)?,
            parts,
            parameterization,
            prediction: Prediction::default(),
            scheduler: None,
            notes: Vec::new(),
        };
        bundle.check()?;
        Ok(bundle)
    }

    /// Compares names and shapes with those that the configurations require.
    fn check(&self) -> Result<()> {
        let mut all = WeightProblems::default();
        let mut sources = Vec::new();
        for component in Component::ALL {
            let part = &self.parts[&component];
            let expected = expected(component, &part.config, &part.config_name)?;
            let mut problems = WeightProblems::default();
            self.compare(component, &expected, &mut problems);
            let source = part.source();
            if !problems.is_empty() && !sources.contains(&source) {
                sources.push(source);
            }
            all.missing.extend(problems.missing);
            all.unexpected.extend(problems.unexpected);
            all.misshapen.extend(problems.misshapen);
        }
        if all.is_empty() {
            return Ok(());
        }
        all.source = sources.join(", ");
        Err(Error::Weights(Box::new(all)))
    }

    /// Adds the differences between a component's tensors and those expected.
    fn compare(&self, component: Component, expected: &Parameters, problems: &mut WeightProblems) {
        let folder = component.folder();
        for (name, tensor) in expected.iter() {
            let full = format!("{folder}/{name}");
            match self.shape(component, name) {
                None => problems.missing.push((full, tensor.size())),
                Some(shape) if shape != tensor.size() => {
                    problems.misshapen.push((full, tensor.size(), shape));
                }
                Some(_) => {}
            }
        }
        for name in self.names(component) {
            if expected.get(name).is_none() {
                let shape = self.shape(component, name).unwrap_or_default();
                problems
                    .unexpected
                    .push((format!("{folder}/{name}"), shape));
            }
        }
    }

    /// Returns what the UNet predicts.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the source does not say, or contradicts itself.
    pub(crate) fn known_parameterization(&self) -> Result<Parameterization> {
        let known = match self.parameterization {
            Some(known) => Some(known),
            None => self.prediction.settled(None)?,
        };
        let reason = "it does not say what its UNet predicts; specify flow, eps or v \
                      (--parameterization)";
        known.ok_or_else(|| Error::Invalid {
            what: "the model".into(),
            reason: reason.into(),
        })
    }

    /// Returns the contents of a component's `config.json`.
    pub fn config(&self, component: Component) -> &Map<String, Value> {
        &self.parts[&component].config
    }

    /// Returns the table of names for a model of these sizes.
    pub fn table(&self) -> &KeyTable {
        &self.table
    }

    /// Returns the diffusers names of a component's tensors, sorted.
    pub fn names(&self, component: Component) -> Vec<&str> {
        match &self.parts[&component].tensors {
            Tensors::Memory(parameters) => parameters.iter().map(|(name, _)| name).collect(),
            Tensors::Files(stored) => stored.names().collect(),
        }
    }

    /// Returns a tensor's shape in diffusers' layout; `None` for an unknown name.
    pub fn shape(&self, component: Component, name: &str) -> Option<Vec<i64>> {
        match &self.parts[&component].tensors {
            Tensors::Memory(parameters) => parameters.get(name).map(Tensor::size),
            Tensors::Files(stored) => stored.shape(name),
        }
    }

    /// Returns a tensor's dtype; `None` for an unknown name.
    pub fn kind(&self, component: Component, name: &str) -> Option<Kind> {
        match &self.parts[&component].tensors {
            Tensors::Memory(parameters) => parameters.get(name).map(Tensor::kind),
            Tensors::Files(stored) => stored.kind(name),
        }
    }

    /// Loads a tensor in its stored dtype and diffusers' shape.
    ///
    /// # Errors
    /// [`Error::Input`] for an unknown name, [`Error::Invalid`] if a value is not finite.
    pub fn load(&self, component: Component, name: &str) -> Result<Tensor> {
        let what = || self.named(component, name);
        let tensor = match &self.parts[&component].tensors {
            Tensors::Memory(parameters) => parameters.get(name).map(Tensor::detach),
            Tensors::Files(stored) => Some(stored.load(name)?),
        };
        let tensor = tensor.ok_or_else(|| Error::input(what(), "a tensor", "none of that name"))?;
        if !is_finite(&tensor) {
            let reason = "it holds values that are not finite (NaN or infinity), so the model is \
                          broken; use an earlier checkpoint";
            return Err(Error::Invalid {
                what: what(),
                reason: reason.into(),
            });
        }
        Ok(tensor)
    }

    /// Names a tensor for messages: its name, its component and its file.
    fn named(&self, component: Component, name: &str) -> String {
        let tensor = format!("tensor {name} of {}", component.folder());
        match &self.parts[&component].tensors {
            Tensors::Memory(_) => tensor,
            Tensors::Files(stored) => format!("{}: {tensor}", stored.description()),
        }
    }
}

/// Takes a component from a single file.
fn part_in_file<'a>(component: Component, file: &mut SingleFile) -> Result<Part<'a>> {
    let (config, tensors) = file.take(component)?;
    Ok(Part {
        config,
        config_name: file.config_name(component),
        tensors: Tensors::Files(tensors),
    })
}

/// Opens a component in a diffusers folder or in the component's own folder.
fn part_in_folder<'a>(component: Component, model: &Path) -> Result<Part<'a>> {
    let folder = folder::find(component, model)?;
    let tensors = Tensors::Files(folder::stored(component, &folder)?);
    let path = folder.join("config.json");
    Ok(Part {
        config: read_object(&path)?,
        config_name: path.display().to_string(),
        tensors,
    })
}

/// Returns the names and shapes of the model that a configuration describes.
fn expected(component: Component, config: &Map<String, Value>, what: &str) -> Result<Parameters> {
    let config = config.clone();
    let shapes = Weights::shapes_only();
    Ok(match component {
        Component::UNet => UNet::new(UNetConfig::from_json(config, what)?, shapes)?.parameters,
        Component::ClipL => {
            ClipText::new(ClipConfig::from_json(config, false, what)?, shapes)?.parameters
        }
        Component::ClipG => {
            ClipText::new(ClipConfig::from_json(config, true, what)?, shapes)?.parameters
        }
        Component::Vae => Vae::new(VaeConfig::from_json(config, what)?, shapes)?.parameters,
    })
}
