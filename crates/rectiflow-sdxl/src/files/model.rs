//! Models from folders and files: a whole diffusers folder, one component's folder with its `config.json`, or a
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
//! Weights may be sharded (an index names the files) and in an fp16 variant, under the names that diffusers and
//! transformers give such files. What a single file holds under which names is in `single_file`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tch::{Device, Kind};

use crate::{
    clip::{self, ClipText},
    config::{ClipConfig, SchedulerConfig, UNetConfig, VaeConfig, read_object},
    error::{Error, Result},
    flow::Parameterization,
    single_file::SingleFile,
    stored::Stored,
    tensor_file::TensorFile,
    unet::UNet,
    vae::{self, Vae},
    weights::Weights,
};

/// Key in the header of a UNet's weight file that says what it predicts: "flow", "eps" or "v".
pub const PARAMETERIZATION_KEY: &str = "rectiflow.parameterization";

/// A part of SDXL with weights of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Component {
    /// The UNet.
    #[serde(rename = "unet")]
    UNet,
    /// The first text encoder, CLIP-L.
    ClipL,
    /// The second text encoder, OpenCLIP bigG.
    ClipG,
    /// The autoencoder.
    Vae,
}

impl Component {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::UNet, Self::ClipL, Self::ClipG, Self::Vae];

    /// Its folder in a diffusers model.
    pub fn folder(self) -> &'static str {
        match self {
            Self::UNet => "unet",
            Self::ClipL => "text_encoder",
            Self::ClipG => "text_encoder_2",
            Self::Vae => "vae",
        }
    }

    /// Its name on the command line and in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::UNet => "unet",
            Self::ClipL => "clip-l",
            Self::ClipG => "clip-g",
            Self::Vae => "vae",
        }
    }

    /// The name of its weight file, as upstream saves it.
    pub fn weights_name(self) -> &'static str {
        match self {
            Self::UNet | Self::Vae => "diffusion_pytorch_model.safetensors",
            Self::ClipL | Self::ClipG => "model.safetensors",
        }
    }

    /// Where its `config.json` is: in its folder of a diffusers model, or in `model` itself.
    ///
    /// # Errors
    /// [`Error::Missing`] if it is in neither.
    pub fn find(self, model: &Path) -> Result<PathBuf> {
        let inside = model.join(self.folder());
        [inside.as_path(), model]
            .into_iter()
            .find(|folder| folder.join("config.json").is_file())
            .map(Path::to_owned)
            .ok_or_else(|| Error::Missing {
                path: model.to_owned(),
                what: format!("{} of the {}", Path::new(self.folder()).join("config.json").display(), self.name()),
                hint: if model.is_dir() {
                    "give a diffusers model folder, or the component's own folder with its config.json".into()
                } else if model.exists() {
                    "this is a file, not a folder in diffusers' layout (`rectiflow import` makes one of a single-file \
                     checkpoint)"
                        .into()
                } else {
                    "there is nothing at this path".into()
                },
            })
    }

    /// Its weight files in `folder`: one, or the shards that an index names; an fp16 variant where that is all there is.
    ///
    /// # Errors
    /// [`Error::Missing`] if there are none, [`Error::Malformed`] for an unusable index.
    pub fn weight_files(self, folder: &Path) -> Result<Vec<PathBuf>> {
        let stem = self.weights_name().trim_end_matches(".safetensors");
        for variant in ["", ".fp16"] {
            let single = folder.join(format!("{stem}{variant}.safetensors"));
            if single.is_file() {
                return Ok(vec![single]);
            }
            let index = folder.join(format!("{stem}.safetensors.index{variant}.json"));
            if index.is_file() {
                return shards(&index);
            }
        }
        let pickled =
            [format!("{stem}.bin"), "pytorch_model.bin".into()].iter().any(|name| folder.join(name).is_file());
        Err(Error::Missing {
            path: folder.to_owned(),
            what: self.weights_name().to_owned(),
            hint: if pickled {
                "the weights there are a pickle, which can run code when it is opened; convert them to safetensors"
                    .into()
            } else {
                format!("give a model with weights, or ask for random ones for {:?}", self.name())
            },
        })
    }

    /// How its configuration is called in messages, where it is in no file of its own.
    pub(crate) fn config_name(self) -> String {
        format!("{}/config.json", self.folder())
    }

    /// The tensors of this component in its folder, under today's names.
    pub(crate) fn stored(self, folder: &Path) -> Result<Stored> {
        let mut stored = Stored::open(&self.weight_files(folder)?)?;
        stored.drop_constants();
        match self {
            Self::UNet => {}
            Self::Vae => stored.rename(vae::current_name),
            Self::ClipL | Self::ClipG => {
                if clip::lacks_prefix(stored.names()) {
                    stored.rename(clip::with_prefix);
                }
            }
        }
        Ok(stored)
    }

    /// Its configuration in a folder or a single file, and how that is called in messages.
    fn config(self, model: &Path) -> Result<(Map<String, Value>, String)> {
        if model.is_file() {
            let (config, _) = SingleFile::open(model)?.take(self)?;
            return Ok((config, format!("{}: {}", model.display(), self.config_name())));
        }
        let path = self.find(model)?.join("config.json");
        Ok((read_object(&path)?, path.display().to_string()))
    }

    /// Its configuration, how that is called, and its tensors: from a single file, or from a folder.
    fn open(self, model: &Path, options: &OpenOptions) -> Result<Opened> {
        let (config, what) = self.config(model)?;
        let weights = if options.random.contains(&self) {
            Weights::random(options.seed, options.kind, options.device)
        } else {
            let stored =
                if model.is_file() { SingleFile::open(model)?.take(self)?.1 } else { self.stored(&self.find(model)?)? };
            Weights::of_files(stored, options.kind, options.device).map(options.map)
        };
        Ok(Opened { config, what, weights })
    }
}

/// What a component is built from.
struct Opened {
    config: Map<String, Value>,
    what: String,
    weights: Weights,
}

/// The files that a sharded model's index names.
fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    let malformed = |reason: String| Error::Malformed { path: index.to_owned(), kind: "index of weight files", reason };
    let json = read_object(index)?;
    let map = json.get("weight_map").and_then(|map| map.as_object());
    let map = map.ok_or_else(|| malformed("it has no weight_map".into()))?;
    let mut files = Vec::new();
    for value in map.values() {
        let name = value.as_str().unwrap_or_default();
        if name.is_empty() || Path::new(name).file_name() != Some(name.as_ref()) {
            return Err(malformed(format!("{value} is not the name of a file beside it")));
        }
        files.push(index.with_file_name(name));
    }
    files.sort();
    files.dedup();
    Ok(files)
}

/// How to open a model.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Where it calculates.
    pub device: Device,
    /// The dtype it calculates in, whatever is on disk. An autoencoder that overflows in fp16 runs in fp32 instead.
    pub kind: Kind,
    /// Components that start from random weights; their weight files are not looked for.
    pub random: Vec<Component>,
    /// Seed of the random weights.
    pub seed: u64,
    /// Whether weights that a CPU calculates in the dtype of their file are looked at there instead of copied: a UNet
    /// then takes the memory of its largest level. They can be read and not written: not for training.
    pub map: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { device: Device::Cpu, kind: Kind::Float, random: Vec::new(), seed: 0, map: false }
    }
}

impl UNet {
    /// Opens the UNet of a diffusers folder or a single-file checkpoint, or a UNet's own folder.
    ///
    /// # Errors
    /// What is wrong with the folder, its configuration or its weights.
    pub fn open(model: &Path, options: &OpenOptions) -> Result<Self> {
        let Opened { config, what, weights } = Component::UNet.open(model, options)?;
        Self::new(UNetConfig::from_json(config, &what)?, weights)
    }
}

impl ClipText {
    /// Opens a text encoder (`which`: CLIP-L or bigG) of a diffusers folder or a single-file checkpoint, or an encoder's
    /// own folder.
    ///
    /// # Errors
    /// What is wrong with the folder, its configuration or its weights.
    pub fn open(model: &Path, which: Component, options: &OpenOptions) -> Result<Self> {
        let Opened { config, what, weights } = which.open(model, options)?;
        Self::new(ClipConfig::from_json(config, which == Component::ClipG, &what)?, weights)
    }
}

impl Vae {
    /// Opens the autoencoder of a diffusers folder or a single-file checkpoint, or an autoencoder's own folder.
    ///
    /// # Errors
    /// What is wrong with the folder, its configuration or its weights.
    pub fn open(model: &Path, options: &OpenOptions) -> Result<Self> {
        let Opened { config, what, mut weights } = Component::Vae.open(model, options)?;
        let config = VaeConfig::from_json(config, &what)?;
        if config.force_upcast && options.kind == Kind::Half {
            weights.convert_to(Kind::Float);
        }
        Self::new(config, weights)
    }
}

/// All of SDXL.
#[derive(Debug)]
pub struct Model {
    /// Predicts velocity or noise.
    pub unet: UNet,
    /// The first text encoder.
    pub clip_l: ClipText,
    /// The second text encoder, whose pooled output is used.
    pub clip_g: ClipText,
    /// Between pictures and latents.
    pub vae: Vae,
    /// What the UNet predicts, where the model says so.
    pub parameterization: Option<Parameterization>,
    /// The scheduler's configuration, where there is one.
    pub scheduler: Option<SchedulerConfig>,
}

impl Model {
    /// Opens a whole diffusers folder or single-file checkpoint.
    ///
    /// # Errors
    /// What is wrong with the folder, a configuration or weights; [`Error::Config`] if the parts do not fit each other.
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

    /// Whether the parts' widths fit each other.
    ///
    /// # Errors
    /// [`Error::Config`] naming all that do not; `what` names the model.
    pub fn check_fit(&self, what: &str) -> Result<()> {
        check_fit(&self.unet.config, [&self.clip_l.config, &self.clip_g.config], &self.vae.config, what)
    }
}

/// The sizes of all parts of a model, without their weights.
#[derive(Debug, Clone)]
pub struct Configs {
    /// The UNet's.
    pub unet: UNetConfig,
    /// The first text encoder's.
    pub clip_l: ClipConfig,
    /// The second text encoder's.
    pub clip_g: ClipConfig,
    /// The autoencoder's.
    pub vae: VaeConfig,
}

impl Configs {
    /// Reads the configurations of the UNet, CLIP-L, bigG and the autoencoder, each in the folder or the single-file
    /// checkpoint named in that order.
    ///
    /// # Errors
    /// What is wrong with a folder, a file's header or a configuration.
    pub fn read(places: [&Path; 4]) -> Result<Self> {
        let [unet, clip_l, clip_g, vae] = places;
        let (unet, unet_name) = Component::UNet.config(unet)?;
        let (clip_l, clip_l_name) = Component::ClipL.config(clip_l)?;
        let (clip_g, clip_g_name) = Component::ClipG.config(clip_g)?;
        let (vae, vae_name) = Component::Vae.config(vae)?;
        Ok(Self {
            unet: UNetConfig::from_json(unet, &unet_name)?,
            clip_l: ClipConfig::from_json(clip_l, false, &clip_l_name)?,
            clip_g: ClipConfig::from_json(clip_g, true, &clip_g_name)?,
            vae: VaeConfig::from_json(vae, &vae_name)?,
        })
    }

    /// Whether the parts' widths fit each other.
    ///
    /// # Errors
    /// [`Error::Config`] naming all that do not; `what` names the model.
    pub fn check_fit(&self, what: &str) -> Result<()> {
        check_fit(&self.unet, [&self.clip_l, &self.clip_g], &self.vae, what)
    }
}

fn check_fit(unet: &UNetConfig, [l, g]: [&ClipConfig; 2], vae: &VaeConfig, what: &str) -> Result<()> {
    let pairs = [
        (
            "UNet's cross_attention_dim",
            unet.context_dim(),
            "both text encoders' hidden_size",
            l.hidden_size + g.hidden_size,
        ),
        ("UNet's pooled text width", unet.pooled_dim, "second text encoder's pooled width", g.pooled_dim()),
        ("UNet's in_channels", unet.in_channels, "VAE's latent_channels", vae.latent_channels),
    ];
    let differs = pairs.iter().filter(|(_, a, _, b)| a != b);
    let problems: Vec<_> =
        differs.map(|(left, a, right, b)| format!("{left} ({a}) is not the {right} ({b})")).collect();
    if problems.is_empty() { Ok(()) } else { Err(Error::Config { what: what.to_owned(), problems }) }
}

/// What a model's UNet predicts: from the header of its weights if this program wrote them, else from the scheduler's
/// configuration; `None` where neither says.
///
/// # Errors
/// [`Error::Io`], [`Error::Malformed`].
pub fn parameterization(model: &Path) -> Result<Option<Parameterization>> {
    if model.is_file() {
        return Ok(SingleFile::open(model)?.parameterization);
    }
    let files = Component::UNet.find(model).and_then(|folder| Component::UNet.weight_files(&folder));
    for file in files.unwrap_or_default() {
        if let Some(name) = TensorFile::open(&file)?.metadata().get(PARAMETERIZATION_KEY) {
            return name.parse().map(Some).map_err(|error: Error| Error::Malformed {
                path: file,
                kind: "UNet",
                reason: format!("{PARAMETERIZATION_KEY}: {error}"),
            });
        }
    }
    Ok(scheduler(model)?.and_then(|scheduler| scheduler.parameterization))
}

/// The scheduler's configuration of a diffusers folder, if it has one.
///
/// # Errors
/// [`Error::Io`], [`Error::Malformed`].
pub fn scheduler(model: &Path) -> Result<Option<SchedulerConfig>> {
    let path = model.join("scheduler").join("scheduler_config.json");
    if path.is_file() { SchedulerConfig::read(&path).map(Some) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn finds_single_sharded_and_variant_weights() {
        let folder = tempfile::tempdir().unwrap();
        let found = || Component::ClipL.weight_files(folder.path());
        let missing = found().unwrap_err().to_string();
        assert!(missing.contains("model.safetensors") && missing.contains("clip-l"), "{missing}");
        fs::write(folder.path().join("pytorch_model.bin"), b"").unwrap();
        assert!(found().unwrap_err().to_string().contains("pickle"));
        fs::write(folder.path().join("model.fp16.safetensors"), b"").unwrap();
        assert_eq!(found().unwrap(), [folder.path().join("model.fp16.safetensors")]);
        fs::remove_file(folder.path().join("model.fp16.safetensors")).unwrap();
        let index = folder.path().join("model.safetensors.index.fp16.json");
        fs::write(&index, r#"{"weight_map": {"a": "half"}}"#).unwrap();
        assert_eq!(found().unwrap(), [folder.path().join("half")]);
        let index = folder.path().join("model.safetensors.index.json");
        fs::write(&index, r#"{"weight_map": {"a": "two", "b": "one", "c": "two"}}"#).unwrap();
        assert_eq!(found().unwrap(), [folder.path().join("one"), folder.path().join("two")]);
        for hostile in
            [r#"{"weight_map": {"a": "../x"}}"#, r#"{"weight_map": {"a": 3}}"#, r#"{"weight_map": []}"#, "[]", "{"]
        {
            fs::write(&index, hostile).unwrap();
            assert!(matches!(found(), Err(Error::Malformed { .. })), "{hostile}");
        }
    }

    #[test]
    fn says_what_is_at_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let error = |path: &Path| UNet::open(path, &OpenOptions::default()).unwrap_err().to_string();
        assert!(error(&folder.path().join("gone")).contains("nothing at this path"));
        let file = folder.path().join("file");
        fs::write(&file, b"x").unwrap();
        assert!(error(&file).contains("the file ends after 1 bytes"), "a single file, then");
        assert!(error(folder.path()).contains("unet/config.json"));
    }

    #[test]
    fn components_are_named_as_on_the_command_line() {
        for component in Component::ALL {
            let name = serde_json::Value::from(component.name());
            assert_eq!(serde_json::from_value::<Component>(name).unwrap(), component);
        }
    }
}
