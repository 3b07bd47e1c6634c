//! A single-file SDXL checkpoint: assigns its tensors to the parts of the model.
//!
//! Sizes come from the configurations in its header if this program wrote it, else they are SDXL's.
//! A file need not hold every part: UNets without text encoders are common. The names of tensors
//! that belong to no part are kept for messages.
//!
//! Not here: the meaning of names (`keys`), the recognition of other files (`foreign`).

use std::{collections::BTreeMap, path::Path, sync::Arc};

use serde_json::{Map, Value};

use crate::{
    config::{clip::ClipConfig, unet::UNetConfig, vae::VaeConfig},
    error::{Error, Result},
    files::foreign,
    flow::Parameterization,
    weights::{
        component::{Component, PARAMETERIZATION_KEY},
        keys::{FIRST_UNET_WEIGHT, KeyTable, single_prefix},
        stored::{Stored, is_constant},
        tensor_file::TensorFile,
    },
};

/// Key in a single file's header: the four configurations as one JSON object, by component folder.
pub const CONFIGS_KEY: &str = "rectiflow.configs";

const KIND: &str = "single-file SDXL checkpoint";

/// An open single-file checkpoint.
#[derive(Debug)]
pub(crate) struct SingleFile {
    file: Arc<TensorFile>,
    configs: BTreeMap<Component, Map<String, Value>>,
    parts: BTreeMap<Component, Stored>,
    /// Names of tensors that belong to no part.
    pub(crate) ignored: Vec<String>,
    /// What the UNet predicts; `None` if the file does not say.
    pub(crate) parameterization: Option<Parameterization>,
}

impl SingleFile {
    /// Opens a checkpoint and assigns its tensors to parts, without reading them.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Malformed`] if the file is not safetensors or not SDXL.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = Arc::new(TensorFile::open(path)?);
        let names: Vec<&str> = file.names().collect();
        if let Some(what) = foreign::architecture(names.into_iter()) {
            return Err(malformed(&file, what.into()));
        }
        let configs = configs_in(&file)?;
        let table = table_of(&configs)?;
        let parameterization = parameterization_in(&file)?;
        let mut opened = Self {
            file,
            configs,
            parts: BTreeMap::new(),
            ignored: Vec::new(),
            parameterization,
        };
        opened.assign(&table);
        Ok(opened)
    }

    /// Assigns the file's tensors to parts.
    fn assign(&mut self, table: &KeyTable) {
        // UNets without the other parts often lack the prefix.
        let prefix = if self.file.shape(FIRST_UNET_WEIGHT).is_some() {
            single_prefix(Component::UNet)
        } else {
            ""
        };
        let file = self.file.clone();
        for name in file.names() {
            let keys = table.to_diffusers(&format!("{prefix}{name}"));
            if keys.is_empty() {
                self.ignored.push(name.to_owned());
            }
            for key in keys {
                if !is_constant(&key.name) {
                    let part = self.part(key.component);
                    part.add(key.name, 0, name.to_owned(), key.form);
                }
            }
        }
    }

    /// Returns the tensors of a part, at first none.
    fn part(&mut self, component: Component) -> &mut Stored {
        let file = &self.file;
        self.parts.entry(component).or_insert_with(|| {
            let mut part = Stored::default();
            part.add_file(file.clone());
            part
        })
    }

    /// Whether the file has any tensor of a part.
    pub(crate) fn has(&self, component: Component) -> bool {
        self.parts.contains_key(&component)
    }

    /// Removes a part and returns its configuration and its tensors.
    ///
    /// # Errors
    /// [`Error::Missing`] if the file has no tensor of the part.
    pub(crate) fn take(&mut self, component: Component) -> Result<(Map<String, Value>, Stored)> {
        match self.parts.remove(&component) {
            Some(tensors) => Ok((self.configs[&component].clone(), tensors)),
            None => Err(self.lacks(component)),
        }
    }

    fn lacks(&self, component: Component) -> Error {
        let (name, prefix) = (component.name(), single_prefix(component));
        let hint = "this is not a whole SDXL checkpoint; use one that has the UNet, both text \
                    encoders and the VAE, or let `rectiflow import` take what is missing from \
                    another model (--missing-from)";
        Error::Missing {
            path: self.file.path().to_owned(),
            what: format!("any tensor of the {name} ({prefix}...)"),
            hint: hint.into(),
        }
    }
}

/// Returns the configurations in a single file's header, or SDXL's if it has none.
fn configs_in(file: &TensorFile) -> Result<BTreeMap<Component, Map<String, Value>>> {
    match file.metadata().get(CONFIGS_KEY) {
        None => Ok(sdxl_configs()),
        Some(text) => parsed_configs(text)
            .map_err(|reason| malformed(file, format!("{CONFIGS_KEY} in its header: {reason}"))),
    }
}

/// Returns the configurations of all components; an error is the reason why the text is none.
fn parsed_configs(
    text: &str,
) -> std::result::Result<BTreeMap<Component, Map<String, Value>>, String> {
    let mut parsed: Map<String, Value> = match serde_json::from_str(text) {
        Ok(parsed) => parsed,
        Err(error) => return Err(error.to_string()),
    };
    let mut configs = BTreeMap::new();
    for component in Component::ALL {
        let folder = component.folder();
        let Some(Value::Object(config)) = parsed.remove(folder) else {
            return Err(format!("no configuration for {folder}"));
        };
        configs.insert(component, config);
    }
    Ok(configs)
}

fn malformed(file: &TensorFile, reason: String) -> Error {
    Error::Malformed {
        path: file.path().to_owned(),
        kind: KIND,
        reason,
    }
}

/// Returns the configurations of the published SDXL 1.0, for files without any.
pub fn sdxl_configs() -> BTreeMap<Component, Map<String, Value>> {
    let read = |text| serde_json::from_str(text).expect("the files are JSON objects");
    BTreeMap::from([
        (
            Component::UNet,
            read(include_str!("../../configs/unet/config.json")),
        ),
        (
            Component::ClipL,
            read(include_str!("../../configs/text_encoder/config.json")),
        ),
        (
            Component::ClipG,
            read(include_str!("../../configs/text_encoder_2/config.json")),
        ),
        (
            Component::Vae,
            read(include_str!("../../configs/vae/config.json")),
        ),
    ])
}

/// Returns what the UNet predicts according to our key, to modelspec's, or to the marker tensor
/// that other tools use for v. `None` if the file does not say, as most eps checkpoints do not.
fn parameterization_in(file: &TensorFile) -> Result<Option<Parameterization>> {
    let metadata = file.metadata();
    if let Some(name) = metadata.get(PARAMETERIZATION_KEY) {
        return name.parse().map(Some).map_err(|error: Error| {
            malformed(
                file,
                format!("{PARAMETERIZATION_KEY} in its header: {error}"),
            )
        });
    }
    Ok(
        match metadata
            .get("modelspec.prediction_type")
            .map(String::as_str)
        {
            Some("epsilon") => Some(Parameterization::Eps),
            Some("v") => Some(Parameterization::V),
            Some("flow") => Some(Parameterization::Flow),
            _ => file.shape("v_pred").map(|_| Parameterization::V),
        },
    )
}

/// Returns the table of names for models of these configurations.
pub(crate) fn table_of(configs: &BTreeMap<Component, Map<String, Value>>) -> Result<KeyTable> {
    let config = |component: Component| (configs[&component].clone(), component.config_name());
    let (unet, unet_name) = config(Component::UNet);
    let (clip_g, clip_g_name) = config(Component::ClipG);
    let (vae, vae_name) = config(Component::Vae);
    Ok(KeyTable::new(
        &UNetConfig::from_json(unet, &unet_name)?,
        &ClipConfig::from_json(clip_g, true, &clip_g_name)?,
        &VaeConfig::from_json(vae, &vae_name)?,
    ))
}
