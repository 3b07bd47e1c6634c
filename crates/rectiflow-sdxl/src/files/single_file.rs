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
        keys::{DiffusersKey, KeyTable, single_prefix},
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
        let malformed = |reason: String| Error::Malformed {
            path: path.to_owned(),
            kind: KIND,
            reason,
        };
        if let Some(what) = foreign::architecture(file.names().collect::<Vec<_>>().into_iter()) {
            return Err(malformed(what.into()));
        }
        let configs = configs_in(&file)?;
        let table = table_of(&configs)?;
        // UNets without the other parts often lack the prefix.
        let prefix = if file.shape("input_blocks.0.0.weight").is_some() {
            single_prefix(Component::UNet)
        } else {
            ""
        };
        let mut parts: BTreeMap<Component, Stored> = BTreeMap::new();
        let mut ignored = Vec::new();
        for name in file.names() {
            let keys = table.to_diffusers(&format!("{prefix}{name}"));
            if keys.is_empty() {
                ignored.push(name.to_owned());
            }
            for DiffusersKey {
                component,
                name: diffusers,
                form,
            } in keys
            {
                if is_constant(&diffusers) {
                    continue;
                }
                let part = parts.entry(component).or_insert_with(|| {
                    let mut part = Stored::default();
                    part.add_file(file.clone());
                    part
                });
                part.add(diffusers, 0, name.to_owned(), form);
            }
        }
        let parameterization = parameterization_in(&file)?;
        Ok(Self {
            file,
            configs,
            parts,
            ignored,
            parameterization,
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
        let tensors = self
            .parts
            .remove(&component)
            .ok_or_else(|| self.lacks(component))?;
        Ok((self.configs[&component].clone(), tensors))
    }

    fn lacks(&self, component: Component) -> Error {
        Error::Missing {
            path: self.file.path().to_owned(),
            what: format!("any tensor of the {} ({}...)", component.name(), single_prefix(component)),
            hint: "this is not a whole SDXL checkpoint; use one that has the UNet, both text encoders and the VAE, or \
                   let `rectiflow import` take what is missing from another model (--missing-from)"
                .into(),
        }
    }
}

/// Returns the configurations in a single file's header, or SDXL's if it has none.
fn configs_in(file: &TensorFile) -> Result<BTreeMap<Component, Map<String, Value>>> {
    let parsed = match file.metadata().get(CONFIGS_KEY) {
        Some(text) => {
            serde_json::from_str::<Map<String, Value>>(text).map_err(|error| error.to_string())
        }
        None => return Ok(sdxl_configs()),
    };
    let malformed = |reason: String| Error::Malformed {
        path: file.path().to_owned(),
        kind: KIND,
        reason: format!("{CONFIGS_KEY} in its header: {reason}"),
    };
    let mut parsed = parsed.map_err(malformed)?;
    let mut configs = BTreeMap::new();
    for component in Component::ALL {
        let Some(Value::Object(config)) = parsed.remove(component.folder()) else {
            return Err(malformed(format!(
                "no configuration for {}",
                component.folder()
            )));
        };
        configs.insert(component, config);
    }
    Ok(configs)
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
        return name
            .parse()
            .map(Some)
            .map_err(|error: Error| Error::Malformed {
                path: file.path().to_owned(),
                kind: KIND,
                reason: format!("{PARAMETERIZATION_KEY} in its header: {error}"),
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
