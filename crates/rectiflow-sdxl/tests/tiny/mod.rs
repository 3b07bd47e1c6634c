//! A tiny whole SDXL of random weights, and copies of its single file with changes.
#![allow(dead_code, reason = "each test uses a part")]

use std::path::Path;

use rectiflow_sdxl::{
    bundle::{Bundle, sdxl_configs},
    clip::ClipText,
    config::{ClipConfig, UNetConfig, VaeConfig},
    export::{ExportOptions, export_diffusers, export_single_file},
    flow::Parameterization,
    model::{Component, Model},
    tensor_file::{TensorFile, write_tensors},
    unet::UNet,
    vae::Vae,
    weights::Weights,
};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

/// SDXL's configuration of a component with `changes` applied.
fn config(component: Component, changes: Value) -> Map<String, Value> {
    let mut config = sdxl_configs().remove(&component).unwrap();
    config.extend(changes.as_object().unwrap().clone());
    config
}

/// Two levels, one block a level, one transformer.
pub(crate) fn model(parameterization: Option<Parameterization>) -> Model {
    rectiflow_sdxl::test_threads::set();
    let unet = json!({"block_out_channels": [8, 16], "attention_head_dim": [2, 2],
        "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 12,
        "transformer_layers_per_block": [1, 1], "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 54, "sample_size": 16,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]});
    let clip = |width: i64, projection: i64| {
        json!({"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 50,
            "intermediate_size": 8, "hidden_size": width, "projection_dim": projection})
    };
    let vae = json!({"block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"]});
    let weights = |seed| Weights::random(seed, Kind::Float, Device::Cpu);
    let unet = UNetConfig::from_json(config(Component::UNet, unet), "unet").unwrap();
    let clip_l = ClipConfig::from_json(config(Component::ClipL, clip(4, 4)), false, "l").unwrap();
    let clip_g = ClipConfig::from_json(config(Component::ClipG, clip(8, 6)), true, "g").unwrap();
    let vae = VaeConfig::from_json(config(Component::Vae, vae), "vae").unwrap();
    Model {
        unet: UNet::new(unet, weights(1)).unwrap(),
        clip_l: ClipText::new(clip_l, weights(2)).unwrap(),
        clip_g: ClipText::new(clip_g, weights(3)).unwrap(),
        vae: Vae::new(vae, weights(4)).unwrap(),
        parameterization,
        scheduler: None,
    }
}

/// Writes the tiny model as a folder in diffusers' layout.
pub(crate) fn write_folder(out: &Path, parameterization: Parameterization) {
    let model = model(Some(parameterization));
    let bundle = Bundle::of_model(&model).unwrap();
    export_diffusers(&bundle, out, &ExportOptions::default()).unwrap();
}

/// Writes the tiny model as a single file of fp32.
pub(crate) fn write_single_file(path: &Path, parameterization: Parameterization) {
    let model = model(Some(parameterization));
    let options = ExportOptions {
        kind: Some(Kind::Float),
        ..ExportOptions::default()
    };
    export_single_file(&Bundle::of_model(&model).unwrap(), path, &options).unwrap();
}

/// A single file in memory: its tensors by name, and its header.
#[derive(Debug)]
pub(crate) struct Contents {
    pub(crate) tensors: Vec<(String, Tensor)>,
    pub(crate) metadata: Vec<(String, String)>,
}

impl Contents {
    pub(crate) fn read(path: &Path) -> Self {
        let file = TensorFile::open(path).unwrap();
        let mut tensors = Vec::new();
        for name in file.names() {
            tensors.push((name.to_owned(), file.tensor(name).unwrap()));
        }
        let metadata = file.metadata().clone().into_iter().collect();
        Self { tensors, metadata }
    }

    /// Sets an entry of the header, or removes it.
    pub(crate) fn set(&mut self, key: &str, value: Option<&str>) {
        self.metadata.retain(|(known, _)| known != key);
        if let Some(value) = value {
            self.metadata.push((key.to_owned(), value.to_owned()));
        }
    }

    /// Adds a tensor.
    pub(crate) fn add(&mut self, name: &str, tensor: Tensor) {
        self.tensors.push((name.to_owned(), tensor));
    }

    pub(crate) fn tensor_mut(&mut self, name: &str) -> &mut Tensor {
        let found = self.tensors.iter_mut().find(|(known, _)| known == name);
        &mut found.unwrap_or_else(|| panic!("no tensor {name}")).1
    }

    pub(crate) fn write(&self, path: &Path) {
        let tensors = self
            .tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor));
        let metadata: Vec<(&str, &str)> = self
            .metadata
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        write_tensors(path, tensors, None, &metadata).unwrap();
    }
}
