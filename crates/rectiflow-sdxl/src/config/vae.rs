//! The autoencoder's sizes: diffusers' `AutoencoderKL`.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{
    config::{
        activation::Activation,
        reader::{Reader, read_object},
    },
    error::Result,
};

/// diffusers' `AutoencoderKL`.
#[derive(Debug, Clone)]
pub struct VaeConfig {
    /// Channels of the pictures.
    pub in_channels: i64,
    /// Channels of the decoded pictures.
    pub out_channels: i64,
    /// Channels of the latents.
    pub latent_channels: i64,
    /// Channels of each level, from the finest to the coarsest.
    pub block_out_channels: Vec<i64>,
    /// Number of residual blocks per level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Number of groups of every group norm.
    pub norm_num_groups: i64,
    /// Whether the encoder ends in a 1x1 convolution.
    pub use_quant_conv: bool,
    /// Whether the decoder begins with a 1x1 convolution.
    pub use_post_quant_conv: bool,
    /// Whether the middle blocks have attention.
    pub mid_block_add_attention: bool,
    /// Factor that latents are multiplied by before they are noised (SDXL: 0.13025).
    pub scaling_factor: f64,
    /// Whether the model overflows in fp16; such a VAE runs in fp32 or bf16.
    pub force_upcast: bool,
    /// The JSON that was read.
    pub json: Map<String, Value>,
}

impl VaeConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// As [`read_object`] and [`Self::from_json`].
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_json(read_object(path)?, &path.display().to_string())
    }

    /// Checks the contents of a `config.json`; `what` names it in messages.
    ///
    /// # Errors
    /// [`crate::error::Error::Config`] with every unsupported or contradictory value.
    pub fn from_json(json: Map<String, Value>, what: &str) -> Result<Self> {
        let mut r = Reader::new(&json);
        r.only("_class_name", "AutoencoderKL", &["AutoencoderKL"]);
        r.activation("act_fn", Activation::Silu, &[Activation::Silu]);
        let block_out_channels = r.positive_list("block_out_channels", &[64]);
        let num_levels = block_out_channels.len();
        // Each has only one type; the length must still match the number of levels.
        let (down, up) = (["DownEncoderBlock2D"; 2], ["UpDecoderBlock2D"; 2]);
        r.block_types("down_block_types", down, &[true], num_levels);
        r.block_types("up_block_types", up, &[true], num_levels);
        let norm_num_groups = r.norm_num_groups(&block_out_channels);
        for key in ["shift_factor", "latents_mean", "latents_std"] {
            r.unset(key, &Value::Null);
        }
        let scaling_factor = scaling_factor(&mut r);
        // What is not checked against other values.
        let config = Self {
            in_channels: r.positive("in_channels", 3),
            out_channels: r.positive("out_channels", 3),
            latent_channels: r.positive("latent_channels", 4),
            block_out_channels,
            layers_per_block: r.num_blocks("layers_per_block", 1),
            norm_num_groups,
            use_quant_conv: r.boolean("use_quant_conv", true),
            use_post_quant_conv: r.boolean("use_post_quant_conv", true),
            mid_block_add_attention: r.boolean("mid_block_add_attention", true),
            scaling_factor,
            force_upcast: r.boolean("force_upcast", true),
            json: Map::new(),
        };
        r.finish(what)?;
        Ok(Self { json, ..config })
    }

    /// Returns the number of pixels per latent, in each dimension.
    pub fn down_factor(&self) -> u32 {
        1 << (self.block_out_channels.len() - 1)
    }
}

/// Reads the scaling factor, which must be positive.
fn scaling_factor(r: &mut Reader<'_>) -> f64 {
    let factor = r.number("scaling_factor", 0.18215);
    if !(factor > 0.0 && factor.is_finite()) {
        r.problem("scaling_factor", "a positive number", &factor.to_string());
    }
    factor
}
