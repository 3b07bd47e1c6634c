//! The autoencoder between pictures and latents: diffusers' `AutoencoderKL`.
//!
//! Pictures are `[b, 3, h, w]` in -1 to 1, latents `[b, 4, h/8, w/8]`. The scaling factor is *not*
//! applied here, in either direction: latents are stored unscaled, and training and sampling
//! multiply by `config.scaling_factor`.

use tch::{Device, Kind, Tensor};

use crate::{
    config::vae::VaeConfig,
    error::{Error, Result},
    nets::{
        attention::{Attention, Mask},
        layers::{Conv, Downsample, GroupNorm, Norm, Resnet, Upsample},
    },
    torch::{allocator::empty_gaps, ffi::Torch},
    weights::{Parameters, Scope, Weights},
};

/// Epsilon of all norms, fixed by diffusers.
const NORM_EPS: f64 = 1e-6;
/// Range of the log-variance in diffusers' `DiagonalGaussianDistribution`.
const LOGVAR_RANGE: [f64; 2] = [-30.0, 20.0];

/// The autoencoder.
#[derive(Debug)]
pub struct Vae {
    /// Its sizes, and the scaling factor.
    pub config: VaeConfig,
    /// Its tensors by their diffusers names.
    pub parameters: Parameters,
    kind: Kind,
    device: Device,
    encoder: Encoder,
    quant_conv: Option<Conv>,
    post_quant_conv: Option<Conv>,
    decoder: Decoder,
}

impl Vae {
    /// Builds the autoencoder from its tensors.
    ///
    /// # Errors
    /// [`Error::Weights`] if they are not exactly those of the configuration.
    pub fn new(config: VaeConfig, mut weights: Weights) -> Result<Self> {
        weights.rename(current_name);
        let (kind, device) = (weights.kind(), weights.device());
        let channels = config.latent_channels;
        let mut root = weights.root();
        let encoder = Encoder::new(&mut root.sub("encoder"), &config);
        let quant_conv = config
            .use_quant_conv
            .then(|| pointwise(&mut root, "quant_conv", 2 * channels));
        let post_quant_conv = config
            .use_post_quant_conv
            .then(|| pointwise(&mut root, "post_quant_conv", channels));
        let decoder = Decoder::new(&mut root.sub("decoder"), &config);
        let parameters = weights.finish()?;
        Ok(Self {
            config,
            parameters,
            kind,
            device,
            encoder,
            quant_conv,
            post_quant_conv,
            decoder,
        })
    }

    /// Returns the dtype of the calculation.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the device of the tensors.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Returns the posterior of pictures, `[b, 3, h, w]` in -1 to 1: mean and log-variance, each
    /// `[b, 4, h/8, w/8]` (rounded down), unscaled.
    ///
    /// # Errors
    /// [`Error::Input`] for a wrong shape or dtype, [`Error::Torch`] if libtorch fails (out of
    /// memory).
    pub fn encode(&self, pixels: &Tensor) -> Result<(Tensor, Tensor)> {
        let least = i64::from(self.config.down_factor());
        check("pixels", pixels, self.config.in_channels, least)?;
        self.posterior(pixels)
            .map_err(Error::torch(format!("VAE encoding of {:?}", pixels.size())))
    }

    fn posterior(&self, pixels: &Tensor) -> Torch<(Tensor, Tensor)> {
        let mut moments = self.encoder.forward(&self.placed(pixels)?)?;
        if let Some(conv) = &self.quant_conv {
            moments = conv.forward(&moments)?;
        }
        let halves = moments.f_chunk(2, 1)?;
        let logvar = halves[1].f_clamp(LOGVAR_RANGE[0], LOGVAR_RANGE[1])?;
        Ok((halves[0].shallow_clone(), logvar))
    }

    /// Returns a tensor on the model's device and in its dtype.
    fn placed(&self, x: &Tensor) -> Torch {
        x.f_to_device(self.device)?.f_to_kind(self.kind)
    }

    /// Returns the output of the encoder's middle, averaged over a grid of 4 x 4 fields,
    /// `[b, 16 c]` fp32 for `[b, 3, h, w]` pictures of any size in -1 to 1: features to compare
    /// sets of pictures by (see [`crate::kid`]).
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn features(&self, pixels: &Tensor) -> Result<Tensor> {
        let least = i64::from(self.config.down_factor());
        check("pixels", pixels, self.config.in_channels, least)?;
        self.averages(pixels)
            .map_err(Error::torch(format!("VAE features of {:?}", pixels.size())))
    }

    fn averages(&self, pixels: &Tensor) -> Torch {
        let seen = self.encoder.trunk(&self.placed(pixels)?)?;
        seen.f_adaptive_avg_pool2d([4, 4])?
            .f_flatten(1, 3)?
            .f_to_kind(Kind::Float)
    }

    /// Returns the pictures of unscaled latents: `[b, 4, h, w]` to `[b, 3, 8 h, 8 w]`,
    /// approximately in -1 to 1, not clamped.
    ///
    /// # Errors
    /// [`Error::Input`] for a wrong shape or dtype, [`Error::Torch`] if libtorch fails (out of
    /// memory).
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        check("latents", latents, self.config.latent_channels, 1)?;
        let pictures = self.pictures(latents).map_err(Error::torch(format!(
            "VAE decoding of {:?}",
            latents.size()
        )))?;
        if self.device == Device::Cpu {
            // Decoding takes several times the memory of the UNet.
            empty_gaps();
        }
        Ok(pictures)
    }

    fn pictures(&self, latents: &Tensor) -> Torch {
        let mut latents = self.placed(latents)?;
        if let Some(conv) = &self.post_quant_conv {
            latents = conv.forward(&latents)?;
        }
        self.decoder.forward(&latents)
    }
}

/// Builds a 1x1 convolution between equal widths.
fn pointwise(root: &mut Scope<'_>, name: &str, width: i64) -> Conv {
    Conv::new(&mut root.sub(name), width, width, 1)
}

/// Returns the current name of a tensor: files older than diffusers 0.18 have other names in the
/// middle's attention.
pub(crate) fn current_name(name: &str) -> String {
    let old = [
        (".query.", ".to_q."),
        (".key.", ".to_k."),
        (".value.", ".to_v."),
        (".proj_attn.", ".to_out.0."),
    ];
    let in_attention = name.contains(".attentions.");
    let found = old
        .iter()
        .find(|(old, _)| in_attention && name.contains(old));
    found.map_or_else(|| name.to_owned(), |(old, new)| name.replace(old, new))
}

fn check(name: &str, tensor: &Tensor, channels: i64, least: i64) -> Result<()> {
    let size = tensor.size();
    if size.len() != 4 || size[0] == 0 || size[1] != channels || size[2] < least || size[3] < least
    {
        let expected = format!("shape [b, {channels}, h, w] with h and w at least {least}");
        return Err(Error::input(name, expected, format!("{size:?}")));
    }
    if !tensor.is_floating_point() {
        return Err(Error::input(
            name,
            "a floating-point dtype",
            format!("{:?}", tensor.kind()),
        ));
    }
    Ok(())
}

fn norm(config: &VaeConfig) -> Norm {
    Norm {
        num_groups: config.norm_num_groups,
        eps: NORM_EPS,
    }
}

fn resnet(scope: &mut Scope<'_>, config: &VaeConfig, i: usize, channels: [i64; 2]) -> Resnet {
    let mut scope = scope.sub(format_args!("resnets.{i}"));
    Resnet::new(&mut scope, channels, None, norm(config))
}

/// Builds the residual blocks of a level, of which only the first changes the width.
fn resnets(
    scope: &mut Scope<'_>,
    config: &VaeConfig,
    num_resnets: usize,
    [inputs, width]: [i64; 2],
) -> Vec<Resnet> {
    let mut resnets = Vec::new();
    for i in 0..num_resnets {
        let channels = if i == 0 { [inputs, width] } else { [width; 2] };
        resnets.push(resnet(scope, config, i, channels));
    }
    resnets
}

/// Maps pictures to moments.
#[derive(Debug)]
struct Encoder {
    conv_in: Conv,
    levels: Vec<EncoderLevel>,
    mid: Mid,
    conv_norm_out: GroupNorm,
    conv_out: Conv,
}

#[derive(Debug)]
struct EncoderLevel {
    resnets: Vec<Resnet>,
    downsampler: Option<Downsample>,
}

impl EncoderLevel {
    /// Level 0 is the finest.
    fn new(scope: &mut Scope<'_>, config: &VaeConfig, i: usize) -> Self {
        let widths = &config.block_out_channels;
        let channels = [widths[i.saturating_sub(1)], widths[i]];
        Self {
            resnets: resnets(scope, config, config.layers_per_block, channels),
            downsampler: (i + 1 < widths.len())
                .then(|| Downsample::new(&mut scope.sub("downsamplers.0"), widths[i], 0)),
        }
    }
}

impl Encoder {
    fn new(scope: &mut Scope<'_>, config: &VaeConfig) -> Self {
        let widths = &config.block_out_channels;
        let finest = widths[0];
        let coarsest = widths[widths.len() - 1];
        let conv_in = Conv::new(&mut scope.sub("conv_in"), config.in_channels, finest, 3);
        let mut levels = Vec::new();
        for i in 0..widths.len() {
            let mut scope = scope.sub(format_args!("down_blocks.{i}"));
            levels.push(EncoderLevel::new(&mut scope, config, i));
        }
        Self {
            conv_in,
            levels,
            mid: Mid::new(&mut scope.sub("mid_block"), config),
            conv_norm_out: GroupNorm::new(&mut scope.sub("conv_norm_out"), coarsest, norm(config)),
            conv_out: Conv::new(
                &mut scope.sub("conv_out"),
                coarsest,
                2 * config.latent_channels,
                3,
            ),
        }
    }

    fn forward(&self, pixels: &Tensor) -> Torch {
        let x = self.trunk(pixels)?;
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)
    }

    /// Runs all levels and the middle, without the last layers that compute the moments.
    /// `[b, c, h/8, w/8]`
    fn trunk(&self, pixels: &Tensor) -> Torch {
        let mut x = self.conv_in.forward(pixels)?;
        for level in &self.levels {
            for resnet in &level.resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(downsampler) = &level.downsampler {
                x = downsampler.forward(&x)?;
            }
        }
        self.mid.forward(&x)
    }
}

/// Maps latents to pictures.
#[derive(Debug)]
struct Decoder {
    conv_in: Conv,
    mid: Mid,
    levels: Vec<DecoderLevel>,
    conv_norm_out: GroupNorm,
    conv_out: Conv,
}

#[derive(Debug)]
struct DecoderLevel {
    resnets: Vec<Resnet>,
    upsampler: Option<Upsample>,
}

impl DecoderLevel {
    /// `widths` are those of all levels; level 0 is the coarsest.
    fn new(scope: &mut Scope<'_>, config: &VaeConfig, widths: &[i64], i: usize) -> Self {
        let channels = [widths[i.saturating_sub(1)], widths[i]];
        Self {
            resnets: resnets(scope, config, config.layers_per_block + 1, channels),
            upsampler: (i + 1 < widths.len())
                .then(|| Upsample::new(&mut scope.sub("upsamplers.0"), widths[i])),
        }
    }
}

impl Decoder {
    fn new(scope: &mut Scope<'_>, config: &VaeConfig) -> Self {
        let widths: Vec<i64> = config.block_out_channels.iter().rev().copied().collect();
        let coarsest = widths[0];
        let finest = widths[widths.len() - 1];
        let latents = config.latent_channels;
        let conv_in = Conv::new(&mut scope.sub("conv_in"), latents, coarsest, 3);
        let mid = Mid::new(&mut scope.sub("mid_block"), config);
        let mut levels = Vec::new();
        for i in 0..widths.len() {
            let mut scope = scope.sub(format_args!("up_blocks.{i}"));
            levels.push(DecoderLevel::new(&mut scope, config, &widths, i));
        }
        Self {
            conv_in,
            mid,
            levels,
            conv_norm_out: GroupNorm::new(&mut scope.sub("conv_norm_out"), finest, norm(config)),
            conv_out: Conv::new(&mut scope.sub("conv_out"), finest, config.out_channels, 3),
        }
    }

    fn forward(&self, latents: &Tensor) -> Torch {
        let mut x = self.mid.forward(&self.conv_in.forward(latents)?)?;
        for level in &self.levels {
            for resnet in &level.resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(upsampler) = &level.upsampler {
                x = upsampler.forward(&x, None)?;
            }
        }
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)
    }
}

/// The middle, at the coarsest level: residual block, attention over all pixels with one head,
/// residual block.
#[derive(Debug)]
struct Mid {
    first: Resnet,
    attention: Option<(GroupNorm, Attention)>,
    last: Resnet,
}

impl Mid {
    fn new(scope: &mut Scope<'_>, config: &VaeConfig) -> Self {
        let width = config.block_out_channels[config.block_out_channels.len() - 1];
        let first = resnet(scope, config, 0, [width, width]);
        let last = resnet(scope, config, 1, [width, width]);
        let attention = config.mid_block_add_attention.then(|| {
            let mut scope = scope.sub("attentions.0");
            let norm = GroupNorm::new(&mut scope.sub("group_norm"), width, norm(config));
            (norm, Attention::new(&mut scope, [width, width], 1, true))
        });
        Self {
            first,
            attention,
            last,
        }
    }

    fn forward(&self, x: &Tensor) -> Torch {
        let mut x = self.first.forward(x, None)?;
        if let Some((norm, attention)) = &self.attention {
            let (b, c, h, w) = x.size4()?;
            let tokens = norm.forward(&x)?.f_flatten(2, 3)?.f_transpose(1, 2)?; // [b, h w, c]
            let mixed = attention.forward(&tokens, &tokens, Mask::Everything, None)?;
            x = x.f_add(&mixed.f_transpose(1, 2)?.f_reshape([b, c, h, w])?)?;
        }
        self.last.forward(&x, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_attention_names_are_replaced_and_others_kept() {
        let name = "decoder.mid_block.attentions.0.proj_attn.weight";
        assert_eq!(
            current_name(name),
            "decoder.mid_block.attentions.0.to_out.0.weight"
        );
        assert_eq!(
            current_name("encoder.mid_block.attentions.0.key.bias"),
            "encoder.mid_block.attentions.0.to_k.bias"
        );
        assert_eq!(current_name("encoder.key.bias"), "encoder.key.bias");
    }
}
