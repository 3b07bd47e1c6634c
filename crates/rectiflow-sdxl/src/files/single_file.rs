//! A single-file SDXL checkpoint: assigns its tensors to the parts of the model.
//!
//! Sizes come from the configurations in its header if this program wrote it, else they are SDXL's.
//! A file need not hold every part: UNets without text encoders are common, and so are autoencoders
//! alone, in the original layout or in diffusers'. The names of tensors that belong to no part are
//! kept for messages.
//!
//! Not here: the meaning of names (`keys`), the recognition of other files (`foreign`).

use std::{collections::BTreeMap, path::Path, sync::Arc};

use serde_json::{Map, Value};

use crate::{
    config::{clip::ClipConfig, unet::UNetConfig, vae::VaeConfig},
    error::{Error, Result},
    files::{foreign, prediction::Prediction},
    nets::vae::current_name,
    weights::{
        component::Component,
        keys::{FIRST_UNET_WEIGHT, Form, KeyTable, single_prefix},
        quantised::{self, FORMATS_KEY},
        stored::{Stored, is_constant},
        tensor_file::TensorFile,
    },
};

/// Key in a single file's header: the four configurations as one JSON object, by component folder.
pub const CONFIGS_KEY: &str = "rectiflow.configs";

/// Key in a single file's header: the SHA-256 of all tensors' bytes.
pub(crate) const HASH_KEY: &str = "modelspec.hash_sha256";

const KIND: &str = "single-file SDXL checkpoint";

/// The parts that a file can be, besides a whole checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    /// Any parts, under the names of a whole checkpoint.
    Parts,
    /// A UNet, without its prefix.
    UNet,
    /// An autoencoder, without its prefix.
    Vae,
    /// An autoencoder under diffusers' names.
    DiffusersVae,
}

impl Holds {
    fn of(file: &TensorFile) -> Self {
        let has = |name| file.shape(name).is_some();
        if has(FIRST_UNET_WEIGHT) {
            Self::UNet
        } else if !foreign::is_vae(file.names()) {
            Self::Parts
        } else if file.names().any(|name| name.contains(".mid_block.")) {
            Self::DiffusersVae
        } else {
            Self::Vae
        }
    }

    /// Returns what the names of a whole checkpoint have in front of the file's.
    fn prefix(self) -> &'static str {
        match self {
            Self::UNet => single_prefix(Component::UNet),
            Self::Vae => single_prefix(Component::Vae),
            Self::Parts | Self::DiffusersVae => "",
        }
    }
}

/// An open single-file checkpoint.
#[derive(Debug)]
pub(crate) struct SingleFile {
    file: Arc<TensorFile>,
    configs: BTreeMap<Component, Map<String, Value>>,
    parts: BTreeMap<Component, Stored>,
    /// Names of tensors that belong to no part.
    pub(crate) ignored: Vec<String>,
    /// What the file says that its UNet predicts.
    pub(crate) prediction: Prediction,
}

impl SingleFile {
    /// Opens a checkpoint and assigns its tensors to parts, without reading them.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Malformed`] if the file is not safetensors or not SDXL.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = Arc::new(TensorFile::open(path)?);
        check_kind(&file)?;
        let configs = configs_in(&file)?;
        let names = Component::ALL.map(|component| (component, config_name(&file, component)));
        let table = table_of(&configs, &names.into())?;
        let prediction = Prediction::of_single_file(&file)?;
        let mut opened = Self {
            file,
            configs,
            parts: BTreeMap::new(),
            ignored: Vec::new(),
            prediction,
        };
        opened.assign(&table);
        for part in opened.parts.values_mut() {
            part.attach_scales()?;
        }
        Ok(opened)
    }

    /// Compares the tensors with the hash in the header, if there is one. Returns a note about a
    /// hash that another tool may have left behind when it changed tensors.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the hash is of other tensors and this program wrote the file.
    pub(crate) fn check_hash(&self) -> Result<Option<String>> {
        let Some(said) = self.file.metadata().get(HASH_KEY) else {
            return Ok(None);
        };
        let found = self.file.sha256();
        let digits = |text: &str| text.trim().trim_start_matches("0x").to_ascii_lowercase();
        if digits(said) == digits(&found) {
            return Ok(None);
        }
        if self.file.metadata().contains_key(CONFIGS_KEY) {
            let reason = format!(
                "its tensors have SHA-256 {found}, but {HASH_KEY} in its header is {said:?}: it \
                 was damaged or changed after it was written; copy it again"
            );
            return Err(malformed(&self.file, reason));
        }
        Ok(Some(format!(
            "{HASH_KEY} in the header is {said:?}, but the tensors have SHA-256 {found}: another \
             tool changed them and left the key, or the file is damaged"
        )))
    }

    /// Returns a note if the file is an autoencoder alone, which does not say whose.
    pub(crate) fn vae_note(&self) -> Option<String> {
        let is_vae = matches!(Holds::of(&self.file), Holds::Vae | Holds::DiffusersVae);
        let is_said = self.file.metadata().contains_key(CONFIGS_KEY);
        (is_vae && !is_said).then(|| {
            "this is an autoencoder alone, taken for SDXL's (scaling factor 0.13025); those of \
             Stable Diffusion 1 and 2 have the same tensors and do not fit SDXL"
                .to_owned()
        })
    }

    /// Returns what a user should know about the file, one sentence each: ignored tensors, weights
    /// in fp8.
    pub(crate) fn notes(&self) -> Vec<String> {
        let mut notes = foreign::extras(&self.ignored);
        for (component, part) in &self.parts {
            notes.extend(part.fp8_note(component.name()));
        }
        notes
    }

    /// Assigns the file's tensors to parts.
    fn assign(&mut self, table: &KeyTable) {
        let holds = Holds::of(&self.file);
        let file = self.file.clone();
        for name in file.names() {
            if holds == Holds::DiffusersVae {
                let part = self.part(Component::Vae);
                part.add(current_name(name), 0, name.to_owned(), Form::Same);
                continue;
            }
            let keys = table.to_diffusers(&format!("{}{name}", holds.prefix()));
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

    /// Returns the name of a part's configuration for messages.
    pub(crate) fn config_name(&self, component: Component) -> String {
        config_name(&self.file, component)
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

/// Checks that a file can be an SDXL checkpoint, and that its weights are in formats that are read.
fn check_kind(file: &TensorFile) -> Result<()> {
    if let Some(what) = foreign::architecture(file.names()) {
        return Err(malformed(file, what.into()));
    }
    // A file with configurations of its own has sizes of its own.
    if !file.metadata().contains_key(CONFIGS_KEY) {
        let shape = |name: &str| file.shape(name);
        let other = foreign::relative(file.names(), shape).or_else(|| foreign::other_vae(shape));
        if let Some(what) = other {
            return Err(malformed(file, what));
        }
    }
    if let Some(formats) = file.metadata().get(FORMATS_KEY)
        && let Some(problem) = quantised::formats_problem(formats)
    {
        return Err(malformed(
            file,
            format!("{FORMATS_KEY} in its header: {problem}"),
        ));
    }
    Ok(())
}

/// Returns the name for messages of a part's configuration: the file, the key in its header and the
/// part.
fn config_name(file: &TensorFile, component: Component) -> String {
    let path = file.path().display();
    format!("{path}: {CONFIGS_KEY}, {}", component.folder())
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

/// Returns the table of names for models of these configurations, which messages call by `names`.
pub(crate) fn table_of(
    configs: &BTreeMap<Component, Map<String, Value>>,
    names: &BTreeMap<Component, String>,
) -> Result<KeyTable> {
    let config = |component: Component| configs[&component].clone();
    Ok(KeyTable::new(
        &UNetConfig::from_json(config(Component::UNet), &names[&Component::UNet])?,
        &ClipConfig::from_json(config(Component::ClipG), true, &names[&Component::ClipG])?,
        &VaeConfig::from_json(config(Component::Vae), &names[&Component::Vae])?,
    ))
}
