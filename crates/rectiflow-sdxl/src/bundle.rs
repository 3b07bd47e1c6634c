//! A whole model as named tensors that are loaded one at a time: what exports read, wherever it comes from.
//!
//! A model in memory, component folders on disk, and a single-file checkpoint look alike here: four configurations,
//! diffusers' names, a tensor on request. So export and import are the same two writers, and neither needs more memory
//! than its largest tensor beyond what is mapped.
//!
//! Not here: the writers (`export`), what names mean (`keys`).

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};
use tch::{Kind, Tensor};

use crate::{
    clip::ClipText,
    config::{ClipConfig, UNetConfig, VaeConfig, read_object},
    error::{Error, Result, WeightProblems},
    flow::Parameterization,
    keys::{DiffusersKey, Form, KeyTable, single_prefix},
    model::{Component, Model, PARAMETERIZATION_KEY},
    tensor_file::TensorFile,
    unet::UNet,
    vae::Vae,
    weights::{Parameters, Weights, is_finite},
};

/// Key in a single file's header: the four configurations as one JSON object, by component folder.
pub const CONFIGS_KEY: &str = "rectiflow.configs";

/// Four components, their tensors on request.
#[derive(Debug)]
pub struct Bundle<'a> {
    parts: BTreeMap<Component, Part<'a>>,
    table: KeyTable,
    /// What the UNet predicts, where the source says so.
    pub parameterization: Option<Parameterization>,
    /// Tensors of a single file that belong to no component: averaged copies, constants.
    pub ignored: Vec<String>,
}

#[derive(Debug)]
struct Part<'a> {
    config: Map<String, Value>,
    tensors: Tensors<'a>,
}

#[derive(Debug)]
enum Tensors<'a> {
    Memory(&'a Parameters),
    Files(BTreeMap<String, Stored>, Vec<TensorFile>),
}

/// Where a file has a tensor, and in which form.
#[derive(Debug)]
struct Stored {
    file: usize,
    name: String,
    form: Form,
}

impl<'a> Bundle<'a> {
    /// A model in memory.
    pub fn of_model(model: &'a Model) -> Result<Self> {
        let part = |config: &Map<String, Value>, parameters| Part {
            config: config.clone(),
            tensors: Tensors::Memory(parameters),
        };
        let parts = BTreeMap::from([
            (Component::UNet, part(&model.unet.config.json, &model.unet.parameters)),
            (Component::ClipL, part(&model.clip_l.config.json, &model.clip_l.parameters)),
            (Component::ClipG, part(&model.clip_g.config.json, &model.clip_g.parameters)),
            (Component::Vae, part(&model.vae.config.json, &model.vae.parameters)),
        ]);
        Self::new(parts, model.parameterization, "the model")
    }

    /// Components in folders of diffusers' layout, memory-mapped; `folder` says which.
    ///
    /// # Errors
    /// What is wrong with a folder, a configuration or a file; [`Error::Weights`] if tensors do not fit.
    pub fn open_folders(
        folder: impl Fn(Component) -> PathBuf,
        parameterization: Option<Parameterization>,
    ) -> Result<Self> {
        let mut parts = BTreeMap::new();
        for component in Component::ALL {
            let folder = component.find(&folder(component))?;
            let files = component.weight_files(&folder)?;
            let files: Vec<_> = files.iter().map(|path| TensorFile::open(path)).collect::<Result<_>>()?;
            let config = read_object(&folder.join("config.json"))?;
            parts.insert(component, Part { config, tensors: Tensors::Files(index_of(component, &files), files) });
        }
        Self::new(parts, parameterization, &folder(Component::UNet).display().to_string())
    }

    /// A single-file SDXL checkpoint, memory-mapped. Sizes come from the configurations in its header if this program
    /// wrote it, else they are SDXL's.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Malformed`] for a file that is no safetensors, [`Error::Missing`] for one that lacks a
    /// whole component, [`Error::Weights`] for tensors that do not fit.
    pub fn open_single_file(path: &Path) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let configs = configs_in(&file)?;
        let table = table_of(&configs)?;
        let mut indices: BTreeMap<Component, BTreeMap<String, Stored>> = BTreeMap::new();
        let mut ignored = Vec::new();
        for name in file.names() {
            let keys = table.to_diffusers(name);
            if keys.is_empty() {
                ignored.push(name.to_owned());
            }
            for DiffusersKey { component, name: diffusers, form } in keys {
                let stored = Stored { file: 0, name: name.to_owned(), form };
                indices.entry(component).or_default().insert(diffusers, stored);
            }
        }
        let parameterization = parameterization_in(&file)?;
        let mut parts = BTreeMap::new();
        for (component, config) in configs {
            let index = indices.remove(&component).ok_or_else(|| lacks(path, component))?;
            let index = index.into_iter().filter(|(name, _)| !name.ends_with("position_ids")).collect();
            parts.insert(component, Part { config, tensors: Tensors::Files(index, vec![TensorFile::open(path)?]) });
        }
        let mut bundle = Self::new(parts, parameterization, &path.display().to_string())?;
        bundle.ignored = ignored;
        Ok(bundle)
    }

    fn new(
        parts: BTreeMap<Component, Part<'a>>,
        parameterization: Option<Parameterization>,
        source: &str,
    ) -> Result<Self> {
        let configs = parts.iter().map(|(component, part)| (*component, part.config.clone())).collect();
        let bundle = Self { table: table_of(&configs)?, parts, parameterization, ignored: Vec::new() };
        bundle.check(source)?;
        Ok(bundle)
    }

    /// Compares names and shapes with those of the models that the configurations describe.
    fn check(&self, source: &str) -> Result<()> {
        let mut problems = WeightProblems { source: source.to_owned(), ..WeightProblems::default() };
        for component in Component::ALL {
            let full = |name: &str| format!("{}/{name}", component.folder());
            let expected = expected(component, self.config(component))?;
            for (name, tensor) in expected.iter() {
                match self.shape(component, name) {
                    None => problems.missing.push((full(name), tensor.size())),
                    Some(shape) if shape != tensor.size() => {
                        problems.misshapen.push((full(name), tensor.size(), shape));
                    }
                    Some(_) => {}
                }
            }
            let is_extra = |name: &&str| expected.get(name).is_none();
            for name in self.names(component).into_iter().filter(is_extra) {
                problems.unexpected.push((full(name), self.shape(component, name).unwrap_or_default()));
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Weights(Box::new(problems))) }
    }

    /// A component's `config.json`.
    pub fn config(&self, component: Component) -> &Map<String, Value> {
        &self.parts[&component].config
    }

    /// The table of names for these sizes.
    pub fn table(&self) -> &KeyTable {
        &self.table
    }

    /// The diffusers names of a component's tensors, sorted.
    pub fn names(&self, component: Component) -> Vec<&str> {
        match &self.parts[&component].tensors {
            Tensors::Memory(parameters) => parameters.iter().map(|(name, _)| name).collect(),
            Tensors::Files(index, _) => index.keys().map(String::as_str).collect(),
        }
    }

    /// A tensor's shape in diffusers' layout.
    pub fn shape(&self, component: Component, name: &str) -> Option<Vec<i64>> {
        match &self.parts[&component].tensors {
            Tensors::Memory(parameters) => parameters.get(name).map(Tensor::size),
            Tensors::Files(index, files) => {
                let stored = index.get(name)?;
                stored.form.diffusers_shape(files[stored.file].shape(&stored.name)?)
            }
        }
    }

    /// A tensor's dtype.
    pub fn kind(&self, component: Component, name: &str) -> Option<Kind> {
        match &self.parts[&component].tensors {
            Tensors::Memory(parameters) => parameters.get(name).map(Tensor::kind),
            Tensors::Files(index, files) => index.get(name).and_then(|at| files[at.file].kind(&at.name)),
        }
    }

    /// Loads a tensor, in its own dtype and diffusers' shape.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is none of that name, [`Error::Invalid`] if a value is not finite.
    pub fn load(&self, component: Component, name: &str) -> Result<Tensor> {
        let what = || format!("tensor {name} of {}", component.folder());
        let tensor = match &self.parts[&component].tensors {
            Tensors::Memory(parameters) => parameters.get(name).map(|tensor| Ok(tensor.detach())),
            Tensors::Files(index, files) => {
                index.get(name).map(|at| from_single(files[at.file].tensor(&at.name)?, at.form, &what()))
            }
        };
        let tensor = tensor.unwrap_or_else(|| Err(Error::input(what(), "a tensor", "none of that name")))?;
        if !is_finite(&tensor) {
            let reason = "holds values that are not finite (NaN or infinity): the model is broken, go back to an \
                          earlier checkpoint";
            return Err(Error::Invalid { what: what(), reason: reason.into() });
        }
        Ok(tensor)
    }
}

/// A single file's tensor in diffusers' shape.
fn from_single(tensor: Tensor, form: Form, what: &str) -> Result<Tensor> {
    let made = match form {
        Form::Same => Ok(tensor),
        Form::Transposed => tensor.f_tr(),
        Form::Pointwise => {
            let size = tensor.size();
            tensor.f_reshape(&size[..2])
        }
        Form::Stacked { index, of } => {
            let rows = tensor.size()[0] / of as i64;
            tensor.f_narrow(0, index as i64 * rows, rows)
        }
    };
    made.and_then(|tensor| tensor.f_contiguous()).map_err(Error::torch(format!("converting {what}")))
}

/// The tensors of a component's files by diffusers' names. transformers 5 writes CLIP-L without its usual prefix.
fn index_of(component: Component, files: &[TensorFile]) -> BTreeMap<String, Stored> {
    const PREFIX: &str = "text_model.";
    let is_clip = matches!(component, Component::ClipL | Component::ClipG);
    let lacks_prefix = is_clip && files.iter().flat_map(TensorFile::names).all(|name| !name.starts_with(PREFIX));
    let mut index = BTreeMap::new();
    for (file, tensors) in files.iter().enumerate() {
        for stored in tensors.names().filter(|name| !name.ends_with("position_ids")) {
            let is_bare = lacks_prefix && stored != "text_projection.weight";
            let name = if is_bare { format!("{PREFIX}{stored}") } else { stored.to_owned() };
            index.insert(name, Stored { file, name: stored.to_owned(), form: Form::Same });
        }
    }
    index
}

/// The configurations in a single file's header, or SDXL's own.
fn configs_in(file: &TensorFile) -> Result<BTreeMap<Component, Map<String, Value>>> {
    let parsed = match file.metadata().get(CONFIGS_KEY) {
        Some(text) => serde_json::from_str::<Map<String, Value>>(text).map_err(|error| error.to_string()),
        None => return Ok(sdxl_configs()),
    };
    let malformed = |reason: String| Error::Malformed {
        path: file.path().to_owned(),
        kind: "single-file checkpoint",
        reason: format!("{CONFIGS_KEY} in its header: {reason}"),
    };
    let mut parsed = parsed.map_err(malformed)?;
    let mut configs = BTreeMap::new();
    for component in Component::ALL {
        let Some(Value::Object(config)) = parsed.remove(component.folder()) else {
            return Err(malformed(format!("no configuration for {}", component.folder())));
        };
        configs.insert(component, config);
    }
    Ok(configs)
}

/// The configurations of the published SDXL 1.0, for files that bring none.
pub fn sdxl_configs() -> BTreeMap<Component, Map<String, Value>> {
    let read = |text| serde_json::from_str(text).expect("the files are JSON objects");
    BTreeMap::from([
        (Component::UNet, read(include_str!("../configs/unet/config.json"))),
        (Component::ClipL, read(include_str!("../configs/text_encoder/config.json"))),
        (Component::ClipG, read(include_str!("../configs/text_encoder_2/config.json"))),
        (Component::Vae, read(include_str!("../configs/vae/config.json"))),
    ])
}

/// What a single file says its UNet predicts: in our words, in modelspec's, or by the marker tensor that other tools
/// use for v. `None` where it is silent, as most eps checkpoints are.
fn parameterization_in(file: &TensorFile) -> Result<Option<Parameterization>> {
    let metadata = file.metadata();
    if let Some(name) = metadata.get(PARAMETERIZATION_KEY) {
        return name.parse().map(Some).map_err(|error: Error| Error::Malformed {
            path: file.path().to_owned(),
            kind: "single-file checkpoint",
            reason: format!("{PARAMETERIZATION_KEY} in its header: {error}"),
        });
    }
    Ok(match metadata.get("modelspec.prediction_type").map(String::as_str) {
        Some("epsilon") => Some(Parameterization::Eps),
        Some("v") => Some(Parameterization::V),
        Some("flow") => Some(Parameterization::Flow),
        _ => file.shape("v_pred").map(|_| Parameterization::V),
    })
}

fn lacks(path: &Path, component: Component) -> Error {
    Error::Missing {
        path: path.to_owned(),
        what: format!("any tensor of the {} ({}...)", component.name(), single_prefix(component)),
        hint: "this is not a whole SDXL checkpoint: take one that has the UNet, both text encoders and the VAE".into(),
    }
}

fn table_of(configs: &BTreeMap<Component, Map<String, Value>>) -> Result<KeyTable> {
    let config = |component| (configs[&component].clone(), config_name(component));
    let (unet, unet_name) = config(Component::UNet);
    let (clip_g, clip_g_name) = config(Component::ClipG);
    let (vae, vae_name) = config(Component::Vae);
    Ok(KeyTable::new(
        &UNetConfig::from_json(unet, &unet_name)?,
        &ClipConfig::from_json(clip_g, true, &clip_g_name)?,
        &VaeConfig::from_json(vae, &vae_name)?,
    ))
}

/// Names and shapes of the model that a configuration describes.
fn expected(component: Component, config: &Map<String, Value>) -> Result<Parameters> {
    let (config, what, shapes) = (config.clone(), config_name(component), Weights::shapes_only());
    Ok(match component {
        Component::UNet => UNet::new(UNetConfig::from_json(config, &what)?, shapes)?.parameters,
        Component::ClipL => ClipText::new(ClipConfig::from_json(config, false, &what)?, shapes)?.parameters,
        Component::ClipG => ClipText::new(ClipConfig::from_json(config, true, &what)?, shapes)?.parameters,
        Component::Vae => Vae::new(VaeConfig::from_json(config, &what)?, shapes)?.parameters,
    })
}

fn config_name(component: Component) -> String {
    format!("{}/config.json", component.folder())
}
