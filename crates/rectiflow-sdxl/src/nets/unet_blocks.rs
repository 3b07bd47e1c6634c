//! The UNet's levels: residual blocks, transformers that attend to the text, and the resampling
//! between levels.
//!
//! Names and order of operations are those of diffusers (`unet_2d_blocks.py`, `transformer_2d.py`,
//! `attention.py`).

use tch::Tensor;

use crate::{
    config::unet::{LevelConfig, UNetConfig},
    nets::{
        attention::{Attention, LogitMeter, Mask},
        layers::{
            Conv, Downsample, GroupNorm, LayerNorm, Linear, Norm, Resnet, Upsample, height_width,
        },
        recompute::Recompute,
    },
    torch::{ffi::Torch, kernels::gated_gelu},
    weights::Scope,
};

/// The conditions of every block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Conditions<'a> {
    /// The embedding of time, text and size, after its activation. `[b, time_embed_dim]`
    pub(crate) time: &'a Tensor,
    /// The states of the text encoders. `[b, n, context_dim]`
    pub(crate) context: &'a Tensor,
    pub(crate) attending: Attending<'a>,
}

/// The attention settings of a transformer block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attending<'a> {
    /// Which tokens of the context are attended to.
    pub(crate) mask: Mask<'a>,
    /// The first row of the batch whose self-attention is off; `None`: it is on in all rows.
    pub(crate) perturbed_from: Option<i64>,
    /// Measures all attention logits.
    pub(crate) meter: Option<&'a LogitMeter>,
}

/// Epsilon of a transformer's first norm, fixed by diffusers.
const TRANSFORMER_NORM_EPS: f64 = 1e-6;
/// Epsilon of the norms inside a transformer, fixed by diffusers.
const LAYER_NORM_EPS: f64 = 1e-5;

/// Self-attention, attention to the text and an MLP with a gated GELU, each with a skip connection.
#[derive(Debug)]
struct TransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff_in: Linear,
    ff_out: Linear,
}

impl TransformerBlock {
    fn new(scope: &mut Scope<'_>, level: &LevelConfig) -> Self {
        let dim = level.channels;
        Self {
            norm1: LayerNorm::new(&mut scope.sub("norm1"), dim, LAYER_NORM_EPS),
            attn1: Attention::new(&mut scope.sub("attn1"), [dim, dim], level.num_heads, false),
            norm2: LayerNorm::new(&mut scope.sub("norm2"), dim, LAYER_NORM_EPS),
            attn2: Attention::new(
                &mut scope.sub("attn2"),
                [dim, level.context_dim],
                level.num_heads,
                false,
            ),
            norm3: LayerNorm::new(&mut scope.sub("norm3"), dim, LAYER_NORM_EPS),
            ff_in: Linear::new(&mut scope.sub("ff.net.0.proj"), dim, 8 * dim),
            ff_out: Linear::new(&mut scope.sub("ff.net.2"), 4 * dim, dim),
        }
    }

    fn forward(&self, [x, context]: [&Tensor; 2], attending: Attending<'_>) -> Torch {
        let Attending {
            mask,
            perturbed_from,
            meter,
        } = attending;
        let normed = self.norm1.forward(x)?;
        let looked = match perturbed_from {
            None => self
                .attn1
                .forward(&normed, &normed, Mask::Everything, meter)?,
            Some(first) => self.attn1.forward_perturbed(&normed, first, meter)?,
        };
        let x = looked.f_add(x)?;
        let normed = self.norm2.forward(&x)?;
        let x = self
            .attn2
            .forward(&normed, context, mask, meter)?
            .f_add(&x)?;
        let both = self.ff_in.forward(&self.norm3.forward(&x)?)?; // the value and its gate
        self.ff_out.forward(&gated_gelu(&both)?)?.f_add(&x)
    }
}

/// The outer projections of a transformer: linear in SDXL, 1x1 convolutions in Stable Diffusion 1.
#[derive(Debug)]
enum Projections {
    Linear(Linear, Linear),
    Conv(Conv, Conv),
}

impl Projections {
    fn new(scope: &mut Scope<'_>, dim: i64, are_linear: bool) -> Self {
        if are_linear {
            Self::Linear(
                Linear::new(&mut scope.sub("proj_in"), dim, dim),
                Linear::new(&mut scope.sub("proj_out"), dim, dim),
            )
        } else {
            Self::Conv(
                Conv::new(&mut scope.sub("proj_in"), dim, dim, 1),
                Conv::new(&mut scope.sub("proj_out"), dim, dim, 1),
            )
        }
    }

    /// `[b, c, h, w]` -> `[b, h w, c]`
    fn enter(&self, pixels: Tensor) -> Torch {
        match self {
            Self::Linear(proj_in, _) => proj_in.forward(&tokens_of(pixels)?),
            Self::Conv(proj_in, _) => tokens_of(proj_in.forward(&pixels)?),
        }
    }

    /// `[b, h w, c]` -> `[b, c, h, w]`
    fn exit(&self, tokens: Tensor, size: [i64; 2]) -> Torch {
        match self {
            Self::Linear(_, proj_out) => pixels_of(proj_out.forward(&tokens)?, size),
            Self::Conv(_, proj_out) => proj_out.forward(&pixels_of(tokens, size)?),
        }
    }
}

/// `[b, c, h, w]` -> `[b, h w, c]`. Takes the pixels, so that their memory is free afterwards.
fn tokens_of(pixels: Tensor) -> Torch {
    let (b, c, h, w) = pixels.size4()?;
    pixels.f_permute([0, 2, 3, 1])?.f_reshape([b, h * w, c])
}

/// `[b, h w, c]` -> `[b, c, h, w]`
fn pixels_of(tokens: Tensor, [h, w]: [i64; 2]) -> Torch {
    let (b, _, c) = tokens.size3()?;
    tokens.f_reshape([b, h, w, c])?.f_permute([0, 3, 1, 2])
}

/// diffusers' `Transformer2DModel`, whose tokens are the pixels.
#[derive(Debug)]
pub(crate) struct Transformer {
    norm: GroupNorm,
    projections: Projections,
    blocks: Vec<Recompute<TransformerBlock>>,
}

impl Transformer {
    fn new(
        scope: &mut Scope<'_>,
        config: &UNetConfig,
        level: &LevelConfig,
        num_blocks: usize,
    ) -> Self {
        let dim = level.channels;
        let norm = Norm {
            num_groups: config.norm_num_groups,
            eps: TRANSFORMER_NORM_EPS,
        };
        let projections = Projections::new(scope, dim, config.use_linear_projection);
        let mut blocks = Vec::new();
        for i in 0..num_blocks {
            let scope = scope.sub(format_args!("transformer_blocks.{i}"));
            blocks.push(Recompute::new(scope, |scope| {
                TransformerBlock::new(scope, level)
            }));
        }
        Self {
            norm: GroupNorm::new(&mut scope.sub("norm"), dim, norm),
            projections,
            blocks,
        }
    }

    fn forward(&self, x: &Tensor, conditions: &Conditions<'_>) -> Torch {
        let mut hidden = self.projections.enter(self.norm.forward(x)?)?;
        for block in &self.blocks {
            hidden = block.on(&hidden, conditions)?;
        }
        let hidden = self.projections.exit(hidden, height_width(x))?;
        // x stands first, because the sum takes the memory layout of its first operand, and
        // `hidden` is permuted.
        x.f_add(&hidden)
    }
}

impl Recompute<TransformerBlock> {
    /// Runs the block on `hidden`, `[b, n, c]`. All tensors that the block reads are its inputs: a
    /// recomputed block keeps no others.
    fn on(&self, hidden: &Tensor, conditions: &Conditions<'_>) -> Torch {
        let Attending {
            mask,
            perturbed_from,
            meter,
        } = conditions.attending;
        let meter = meter.cloned();
        let mut inputs = vec![hidden, conditions.context];
        if let Mask::Keys(keys) = mask {
            inputs.push(keys);
        }
        self.forward(&inputs, move |block, inputs| {
            let attending = Attending {
                mask: inputs.get(2).map_or(Mask::Everything, Mask::Keys),
                perturbed_from,
                meter: meter.as_ref(),
            };
            block.forward([&inputs[0], &inputs[1]], attending)
        })
    }
}

/// Builds the transformers of a level: one after each residual block, or none.
fn transformers(
    scope: &mut Scope<'_>,
    config: &UNetConfig,
    level: &LevelConfig,
) -> Vec<Transformer> {
    let mut transformers = Vec::new();
    for (i, &num_blocks) in level.transformer_layers.iter().enumerate() {
        let mut scope = scope.sub(format_args!("attentions.{i}"));
        transformers.push(Transformer::new(&mut scope, config, level, num_blocks));
    }
    transformers
}

/// Builds a residual block with the UNet's time embedding and norms.
fn resnet(
    scope: &mut Scope<'_>,
    config: &UNetConfig,
    i: usize,
    channels: [i64; 2],
) -> Recompute<Resnet> {
    let norm = Norm {
        num_groups: config.norm_num_groups,
        eps: config.norm_eps,
    };
    let build =
        |scope: &mut Scope<'_>| Resnet::new(scope, channels, Some(config.time_embed_dim), norm);
    Recompute::new(scope.sub(format_args!("resnets.{i}")), build)
}

impl Recompute<Resnet> {
    /// Runs the block on `x`, `[b, c, h, w]`, with `time`, `[b, time_embed_dim]`.
    fn on(&self, x: &Tensor, time: &Tensor) -> Torch {
        self.forward(&[x, time], |resnet, inputs| {
            resnet.forward(&inputs[0], Some(&inputs[1]))
        })
    }

    /// As [`Self::on`], on `x` and `skip` concatenated along the channels; a recomputed block
    /// recomputes the concatenation too.
    fn on_both(&self, x: &Tensor, skip: &Tensor, time: &Tensor) -> Torch {
        self.forward(&[x, skip, time], |resnet, inputs| {
            resnet.forward(
                &Tensor::f_cat(&[&inputs[0], &inputs[1]], 1)?,
                Some(&inputs[2]),
            )
        })
    }
}

/// The names and switches of a level's blocks that can be recomputed, in the order of the
/// calculation.
type Switches<'a> = Vec<(&'a str, &'a mut bool)>;

fn switches<'a>(
    resnets: &'a mut [Recompute<Resnet>],
    attentions: &'a mut [Transformer],
) -> Switches<'a> {
    let mut all = Vec::new();
    let mut attentions = attentions.iter_mut();
    for resnet in resnets {
        all.push((resnet.name.as_str(), &mut resnet.is_on));
        let blocks = attentions
            .next()
            .into_iter()
            .flat_map(|attention| &mut attention.blocks);
        all.extend(blocks.map(|block| (block.name.as_str(), &mut block.is_on)));
    }
    all
}

/// A level on the way down; its results are kept for the way up.
#[derive(Debug)]
pub(crate) struct DownBlock {
    resnets: Vec<Recompute<Resnet>>,
    attentions: Vec<Transformer>,
    downsampler: Option<Downsample>,
}

impl DownBlock {
    pub(crate) fn new(scope: &mut Scope<'_>, config: &UNetConfig, index: usize) -> Self {
        let level = &config.down[index];
        let inputs = config.down[index.saturating_sub(1)].channels;
        let is_last = index + 1 == config.down.len();
        let mut resnets = Vec::new();
        for i in 0..level.num_resnets {
            let inputs = if i == 0 { inputs } else { level.channels };
            resnets.push(resnet(scope, config, i, [inputs, level.channels]));
        }
        Self {
            resnets,
            attentions: transformers(scope, config, level),
            downsampler: (!is_last).then(|| {
                Downsample::new(
                    &mut scope.sub("downsamplers.0"),
                    level.channels,
                    config.downsample_padding,
                )
            }),
        }
    }

    /// Returns its blocks that can be recomputed.
    pub(crate) fn switches(&mut self) -> Switches<'_> {
        switches(&mut self.resnets, &mut self.attentions)
    }

    pub(crate) fn forward(
        &self,
        x: Tensor,
        conditions: &Conditions<'_>,
        skips: &mut Vec<Tensor>,
    ) -> Torch {
        let mut x = x;
        for (i, resnet) in self.resnets.iter().enumerate() {
            x = resnet.on(&x, conditions.time)?;
            if let Some(attention) = self.attentions.get(i) {
                x = attention.forward(&x, conditions)?;
            }
            skips.push(x.shallow_clone());
        }
        if let Some(downsampler) = &self.downsampler {
            x = downsampler.forward(&x)?;
            skips.push(x.shallow_clone());
        }
        Ok(x)
    }
}

/// The middle: residual block, transformer, residual block.
#[derive(Debug)]
pub(crate) struct MidBlock {
    first: Recompute<Resnet>,
    attention: Transformer,
    last: Recompute<Resnet>,
}

impl MidBlock {
    pub(crate) fn new(scope: &mut Scope<'_>, config: &UNetConfig) -> Self {
        let widths = [config.mid.channels, config.mid.channels];
        let num_layers = config.mid.transformer_layers[0];
        Self {
            first: resnet(scope, config, 0, widths),
            attention: Transformer::new(
                &mut scope.sub("attentions.0"),
                config,
                &config.mid,
                num_layers,
            ),
            last: resnet(scope, config, 1, widths),
        }
    }

    /// Returns its blocks that can be recomputed.
    pub(crate) fn switches(&mut self) -> Switches<'_> {
        let mut all = switches(
            std::slice::from_mut(&mut self.first),
            std::slice::from_mut(&mut self.attention),
        );
        all.extend(switches(std::slice::from_mut(&mut self.last), &mut []));
        all
    }

    pub(crate) fn forward(&self, x: &Tensor, conditions: &Conditions<'_>) -> Torch {
        let x = self.first.on(x, conditions.time)?;
        let x = self.attention.forward(&x, conditions)?;
        self.last.on(&x, conditions.time)
    }
}

/// Builds the residual blocks of a level on the way up.
fn up_resnets(scope: &mut Scope<'_>, config: &UNetConfig, index: usize) -> Vec<Recompute<Resnet>> {
    let level = &config.up[index];
    let below = config.up[index.saturating_sub(1)].channels;
    let above = config.up[(index + 1).min(config.up.len() - 1)].channels;
    let mut resnets = Vec::new();
    for i in 0..level.num_resnets {
        let inputs = if i == 0 { below } else { level.channels };
        // The last skip of a level comes from the next finer level, before its first residual
        // block.
        let is_last = i + 1 == level.num_resnets;
        let skipped = if is_last { above } else { level.channels };
        let channels = [inputs + skipped, level.channels];
        resnets.push(resnet(scope, config, i, channels));
    }
    resnets
}

/// A level on the way up; each residual block also takes a result kept on the way down.
#[derive(Debug)]
pub(crate) struct UpBlock {
    resnets: Vec<Recompute<Resnet>>,
    attentions: Vec<Transformer>,
    upsampler: Option<Upsample>,
}

impl UpBlock {
    pub(crate) fn new(scope: &mut Scope<'_>, config: &UNetConfig, index: usize) -> Self {
        let level = &config.up[index];
        let is_last = index + 1 == config.up.len();
        Self {
            resnets: up_resnets(scope, config, index),
            attentions: transformers(scope, config, level),
            upsampler: (!is_last)
                .then(|| Upsample::new(&mut scope.sub("upsamplers.0"), level.channels)),
        }
    }

    /// Returns its blocks that can be recomputed.
    pub(crate) fn switches(&mut self) -> Switches<'_> {
        switches(&mut self.resnets, &mut self.attentions)
    }

    /// Takes its skips from the end of `skips`.
    pub(crate) fn forward(
        &self,
        x: Tensor,
        conditions: &Conditions<'_>,
        skips: &mut Vec<Tensor>,
    ) -> Torch {
        let mut x = x;
        for (i, resnet) in self.resnets.iter().enumerate() {
            let skip = skips
                .pop()
                .expect("the way down keeps one result for each residual block of the way up");
            x = resnet.on_both(&x, &skip, conditions.time)?;
            drop(skip);
            if let Some(attention) = self.attentions.get(i) {
                x = attention.forward(&x, conditions)?;
            }
        }
        match (&self.upsampler, skips.last()) {
            // Odd sizes were rounded up on the way down; the next skip has the original size.
            (Some(upsampler), Some(next)) => upsampler.forward(&x, Some(height_width(next))),
            _ => Ok(x),
        }
    }
}
