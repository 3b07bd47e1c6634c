//! Floating-point operations of the models, from their configurations alone. Pure.
//!
//! A multiply-add counts as 2. Counts convolutions, matrix products and the two products of
//! attention (causal attention in full, by convention), but not norms, activations, softmax and
//! additions, which are below 1% of SDXL's arithmetic. Exactly equal to the count of PyTorch's
//! `FlopCounterMode` for diffusers' and transformers' models (`scripts/golden/flops.py`).
//!
//! A backward pass counts as two forward passes: one gradient with respect to the weights, one with
//! respect to the input. This is the convention of "model FLOPs". PyTorch counts 0.4% less for
//! SDXL's UNet, since gradients of the first layers' inputs and of the text are not needed.

use std::ops::{Add, Mul};

use crate::{
    config::{clip::ClipConfig, unet::UNetConfig, vae::VaeConfig},
    cost::walk::{Block, BlockKind, unet_blocks},
};

/// Numbers of operations by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flops {
    /// In convolutions, including 1x1.
    pub convolutions: u64,
    /// In products of activations with a weight matrix.
    pub products: u64,
    /// In the products of queries with keys and of attention weights with values.
    pub attention: u64,
}

/// FLOPs of training over those of a forward pass: one for the forward pass, two for the backward
/// pass.
pub const FORWARD_AND_BACKWARD: u64 = 3;

impl Flops {
    /// Returns the sum of all kinds.
    pub fn total(self) -> u64 {
        self.convolutions + self.products + self.attention
    }

    fn convolution(kernel: i64, [inputs, outputs]: [i64; 2], [h, w]: [i64; 2]) -> Self {
        Self {
            convolutions: count(&[2, kernel, kernel, inputs, outputs, h, w]),
            ..Self::default()
        }
    }

    fn linear(num_tokens: i64, [inputs, outputs]: [i64; 2]) -> Self {
        Self {
            products: count(&[2, num_tokens, inputs, outputs]),
            ..Self::default()
        }
    }

    /// Attention of `num_queries` over `num_keys`, with `dim` channels over all heads.
    fn attention(num_queries: i64, num_keys: i64, dim: i64) -> Self {
        Self {
            attention: count(&[4, num_queries, num_keys, dim]),
            ..Self::default()
        }
    }
}

impl Add for Flops {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            convolutions: self.convolutions + other.convolutions,
            products: self.products + other.products,
            attention: self.attention + other.attention,
        }
    }
}

impl Mul<u64> for Flops {
    type Output = Self;

    fn mul(self, times: u64) -> Self {
        Self {
            convolutions: self.convolutions * times,
            products: self.products * times,
            attention: self.attention * times,
        }
    }
}

impl std::iter::Sum for Flops {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}

/// Returns the FLOPs of a forward pass of the UNet over one sample: latents of `size` (height,
/// width), a context of `num_tokens`.
pub fn unet(config: &UNetConfig, size: [i64; 2], num_tokens: i64) -> Flops {
    let time_dim = config.time_embed_dim;
    let mut flops = Flops::linear(1, [config.down[0].channels, time_dim])
        + Flops::linear(1, [config.added_dim(), time_dim])
        + Flops::linear(1, [time_dim; 2]) * 2;
    for block in unet_blocks(config, size) {
        flops = flops + unet_block(config, &block, num_tokens);
    }
    flops
}

/// Returns the FLOPs of one block of [`unet_blocks`].
pub(crate) fn unet_block(config: &UNetConfig, block: &Block, num_tokens: i64) -> Flops {
    let size = block.size;
    let num_pixels = size[0] * size[1];
    let one = match block.kind {
        BlockKind::Conv { channels } => Flops::convolution(3, channels, size),
        BlockKind::Resnet { channels } => {
            resnet(channels, size) + Flops::linear(1, [config.time_embed_dim, channels[1]])
        }
        BlockKind::Projections { channels } if config.use_linear_projection => {
            Flops::linear(num_pixels, [channels; 2]) * 2
        }
        BlockKind::Projections { channels } => Flops::convolution(1, [channels; 2], size) * 2,
        BlockKind::Layer {
            channels,
            context_dim,
        } => {
            let of_text = Flops::linear(num_tokens, [context_dim, channels]);
            layer(num_pixels, channels)
                + of_text * 2
                + Flops::attention(num_pixels, num_tokens, channels)
        }
    };
    one * block.repeats
}

/// Returns the FLOPs of a transformer layer, without those over the text's tokens.
fn layer(num_pixels: i64, channels: i64) -> Flops {
    let square = Flops::linear(num_pixels, [channels; 2]);
    let to_itself = square * 4 + Flops::attention(num_pixels, num_pixels, channels);
    let to_text = square * 2;
    // The MLP: the values and their gates, each four times as wide, and the output.
    to_itself + to_text + square * 12
}

/// Returns the FLOPs of a residual block's convolutions.
fn resnet(channels: [i64; 2], size: [i64; 2]) -> Flops {
    let [inputs, outputs] = channels;
    let shortcut = if inputs == outputs {
        Flops::default()
    } else {
        Flops::convolution(1, channels, size)
    };
    Flops::convolution(3, channels, size) + Flops::convolution(3, [outputs; 2], size) + shortcut
}

/// Returns the FLOPs of a text encoder's forward pass over one text of `num_tokens`. `pooled`
/// includes the last layer and the projection, which SDXL needs from bigG only.
pub fn text_encoder(config: &ClipConfig, num_tokens: i64, pooled: bool) -> Flops {
    let (width, inner) = (config.hidden_size, config.intermediate_size);
    let layer = Flops::linear(num_tokens, [width; 2]) * 4
        + Flops::attention(num_tokens, num_tokens, width)
        + Flops::linear(num_tokens, [width, inner]) * 2;
    let num_layers = config.num_hidden_layers as u64 - u64::from(!pooled);
    let projection = match config.projection_dim {
        Some(dim) if pooled => Flops::linear(1, [width, dim]),
        _ => Flops::default(),
    };
    layer * num_layers + projection
}

/// Returns the FLOPs of encoding one picture of `size` pixels (height, width).
pub fn vae_encoder(config: &VaeConfig, size: [i64; 2]) -> Flops {
    let widths = &config.block_out_channels;
    let coarsest = widths[widths.len() - 1];
    let mut size = size;
    let mut flops = Flops::convolution(3, [config.in_channels, widths[0]], size);
    for (i, &width) in widths.iter().enumerate() {
        let above = widths[i.saturating_sub(1)];
        flops = flops + vae_level([above, width], config.layers_per_block, size);
        if i + 1 < widths.len() {
            size = size.map(|n| n / 2);
            flops = flops + Flops::convolution(3, [width; 2], size);
        }
    }
    let moments = 2 * config.latent_channels;
    flops
        + vae_mid(config, size)
        + Flops::convolution(3, [coarsest, moments], size)
        + pointwise(config.use_quant_conv, moments, size)
}

/// Returns the FLOPs of a 1x1 convolution between equal widths, if the model has it.
fn pointwise(is_present: bool, width: i64, size: [i64; 2]) -> Flops {
    if is_present {
        Flops::convolution(1, [width; 2], size)
    } else {
        Flops::default()
    }
}

/// Returns the FLOPs of decoding one sample's latents of `size` (height, width).
pub fn vae_decoder(config: &VaeConfig, size: [i64; 2]) -> Flops {
    let widths: Vec<i64> = config.block_out_channels.iter().rev().copied().collect();
    let latents = config.latent_channels;
    let mut size = size;
    let mut flops = pointwise(config.use_post_quant_conv, latents, size)
        + Flops::convolution(3, [latents, widths[0]], size)
        + vae_mid(config, size);
    for (i, &width) in widths.iter().enumerate() {
        let below = widths[i.saturating_sub(1)];
        flops = flops + vae_level([below, width], config.layers_per_block + 1, size);
        if i + 1 < widths.len() {
            size = size.map(|n| 2 * n);
            flops = flops + Flops::convolution(3, [width; 2], size);
        }
    }
    flops + Flops::convolution(3, [widths[widths.len() - 1], config.out_channels], size)
}

fn vae_level([inputs, width]: [i64; 2], num_resnets: usize, size: [i64; 2]) -> Flops {
    let mut flops = Flops::default();
    for i in 0..num_resnets {
        let channels = if i == 0 { [inputs, width] } else { [width; 2] };
        flops = flops + resnet(channels, size);
    }
    flops
}

/// Returns the FLOPs of the middle: residual block, attention over all pixels, residual block.
fn vae_mid(config: &VaeConfig, size: [i64; 2]) -> Flops {
    let width = config.block_out_channels[config.block_out_channels.len() - 1];
    let num_pixels = size[0] * size[1];
    let resnets = resnet([width; 2], size) * 2;
    if config.mid_block_add_attention {
        let projections = Flops::linear(num_pixels, [width; 2]) * 4;
        resnets + projections + Flops::attention(num_pixels, num_pixels, width)
    } else {
        resnets
    }
}

/// Returns the product of sizes, which are positive.
fn count(sizes: &[i64]) -> u64 {
    sizes.iter().map(|&size| size as u64).product()
}
