//! A model of which one part is in memory at a time: the text encoders, then the UNet, then the
//! autoencoder.
//!
//! SDXL's text encoders are a quarter of its weights and are not needed once the prompts are
//! encoded; the autoencoder is not needed until the UNet is done. A program that samples a given
//! list of prompts therefore needs the memory of the UNet, not of the whole model. That the parts
//! match is checked before the first is loaded.

use std::path::{Path, PathBuf};

use rectiflow_data::token::Tokenizer;
use rectiflow_sdxl::{
    clip::ClipText,
    cond::Cond,
    config::VaeConfig,
    model::{Component, Configs, OpenOptions, scheduler},
    prediction::Prediction,
    unet::UNet,
    vae::Vae,
};

use crate::{
    checkpoint::{bases::Bases, components::Components},
    error::Result,
    pictures::generate::encode_texts,
};

/// The files and configurations of a model's parts.
#[derive(Debug)]
pub struct StagedModel {
    options: OpenOptions,
    places: [PathBuf; 4],
    configs: Configs,
    /// What the model's files say that the UNet predicts.
    pub prediction: Prediction,
    /// The shift that the model's scheduler, or its single file's header, names for a flow model.
    pub flow_shift: Option<f64>,
}

impl StagedModel {
    /// Finds the parts of a model in any layout and reads their configurations. What is read later
    /// is verified now.
    ///
    /// # Errors
    /// If a folder, a file's header or a configuration is invalid, or if the parts do not match.
    pub fn find(path: &Path, bases: &Bases, options: &OpenOptions) -> Result<Self> {
        let components = Components::find(path, bases)?;
        let places = Component::ALL.map(|component| components.folder(component).to_owned());
        let [unet, clip_l, clip_g, vae] = &places;
        let configs = Configs::read([unet, clip_l, clip_g, vae])?;
        configs.check_fit(&path.display().to_string())?;
        let prediction = components.prediction()?;
        let of_scheduler = scheduler(path)?.and_then(|scheduler| scheduler.flow_shift);
        Ok(Self {
            options: options.clone(),
            places,
            configs,
            flow_shift: of_scheduler.or(prediction.shift),
            prediction,
        })
    }

    /// Returns the autoencoder's configuration.
    pub fn vae_config(&self) -> &VaeConfig {
        &self.configs.vae
    }

    /// Loads both text encoders; the caller drops them once all texts are encoded.
    ///
    /// # Errors
    /// [`crate::error::Error::Model`].
    pub fn text_encoders(&self) -> Result<TextEncoders> {
        let [_, clip_l, clip_g, _] = &self.places;
        Ok(TextEncoders {
            clip_l: ClipText::open(clip_l, Component::ClipL, &self.options)?,
            clip_g: ClipText::open(clip_g, Component::ClipG, &self.options)?,
            tokenizer: Tokenizer::new(),
        })
    }

    /// Loads the UNet.
    ///
    /// # Errors
    /// [`crate::error::Error::Model`].
    pub fn unet(&self) -> Result<UNet> {
        Ok(UNet::open(&self.places[0], &self.options)?)
    }

    /// Loads the autoencoder.
    ///
    /// # Errors
    /// [`crate::error::Error::Model`].
    pub fn vae(&self) -> Result<Vae> {
        Ok(Vae::open(&self.places[3], &self.options)?)
    }
}

/// Both text encoders and their tokenizer.
#[derive(Debug)]
pub struct TextEncoders {
    clip_l: ClipText,
    clip_g: ClipText,
    tokenizer: Tokenizer,
}

impl TextEncoders {
    /// Returns the conditioning of `texts`, one row each.
    ///
    /// # Errors
    /// [`crate::error::Error::Model`].
    pub fn encode(&self, texts: &[String]) -> Result<Cond> {
        encode_texts(&self.clip_l, &self.clip_g, &self.tokenizer, texts)
    }
}
