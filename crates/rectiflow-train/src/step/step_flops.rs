//! The arithmetic of a step, by the models' own count, for the share of a GPU's peak. Pure.
//!
//! "Model FLOPs": what training requires, regardless of whether a program does some of it twice.
//! Activation checkpointing therefore lowers the share of the peak (MFU) by the time that it costs,
//! and two programs can be compared.

use rectiflow_data::{batch::Step, token::CHUNK_LEN};
use rectiflow_sdxl::{
    config::{ClipConfig, UNetConfig},
    flops::{FORWARD_AND_BACKWARD, text_encoder, unet},
    model::{Component, Model},
};

use crate::recipe::sections::TrainConfig;

/// The configurations of the networks that a step runs.
#[derive(Debug, Clone, Copy)]
pub struct Configs<'a> {
    /// Configuration of the UNet.
    pub unet: &'a UNetConfig,
    /// Configuration of CLIP-L.
    pub clip_l: &'a ClipConfig,
    /// Configuration of OpenCLIP bigG.
    pub clip_g: &'a ClipConfig,
}

impl<'a> Configs<'a> {
    /// Returns the configurations of a model.
    pub fn of(model: &'a Model) -> Self {
        Self {
            unet: &model.unet.config,
            clip_l: &model.clip_l.config,
            clip_g: &model.clip_g.config,
        }
    }

    /// Returns the FLOPs of training the UNet on one sample with latents of `size` (height, width)
    /// and a context of `num_chunks` chunks.
    pub fn unet_flops(&self, size: [i64; 2], num_chunks: u64) -> u64 {
        FORWARD_AND_BACKWARD
            * unet(self.unet, size, (num_chunks as usize * CHUNK_LEN) as i64).total()
    }

    /// Returns the FLOPs of one chunk of text in both encoders, including the backward pass of
    /// those that are trained.
    pub fn text_flops(&self, train: &TrainConfig) -> u64 {
        let times = |component| {
            if train.trains(component) {
                FORWARD_AND_BACKWARD
            } else {
                1
            }
        };
        let tokens = CHUNK_LEN as i64;
        let clip_l = text_encoder(self.clip_l, tokens, false).total() * times(Component::ClipL);
        clip_l + text_encoder(self.clip_g, tokens, true).total() * times(Component::ClipG)
    }

    /// Returns the FLOPs of a rank's part of a step.
    pub fn step_flops(&self, train: &TrainConfig, step: &Step) -> u64 {
        let of_chunk = self.text_flops(train);
        let of_batch = step.micro_batches.iter().map(|batch| {
            let [_, height, width] = batch.latent_shape.map(|size| size as i64);
            let of_sample = self.unet_flops([height, width], batch.tokens as u64);
            let num_chunks: u64 = batch.chunks.iter().map(|&chunks| u64::from(chunks)).sum();
            of_sample * batch.ids.len() as u64 + of_chunk * num_chunks
        });
        of_batch.sum()
    }
}

#[cfg(test)]
mod tests {
    use rectiflow_sdxl::bundle::sdxl_configs;

    use super::*;
    use crate::recipe::sections::TextEncoders;

    #[test]
    fn a_sample_of_sdxl_is_20_tera_flops() {
        let mut json = sdxl_configs();
        let mut config = |component| {
            json.remove(&component)
                .expect("every component has a configuration")
        };
        let unet = UNetConfig::from_json(config(Component::UNet), "unet").expect("it is valid");
        let clip_l =
            ClipConfig::from_json(config(Component::ClipL), false, "clip-l").expect("it is valid");
        let clip_g =
            ClipConfig::from_json(config(Component::ClipG), true, "clip-g").expect("it is valid");
        let configs = Configs {
            unet: &unet,
            clip_l: &clip_l,
            clip_g: &clip_g,
        };
        let train: TrainConfig = toml::from_str("samples = 1\nmicro_batch = 1").expect("a section");
        let tera = |flops: u64| flops as f64 / 1e12;
        assert!((tera(configs.unet_flops([128, 128], 1)) - 20.28).abs() < 0.01);
        assert!(
            (tera(configs.text_flops(&train)) - 0.11).abs() < 0.002,
            "{}",
            tera(configs.text_flops(&train))
        );
        let trained = TrainConfig {
            text_encoders: TextEncoders::Trained,
            ..train.clone()
        };
        assert_eq!(configs.text_flops(&trained), 3 * configs.text_flops(&train));
    }
}
