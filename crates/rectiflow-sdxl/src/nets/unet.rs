//! SDXL's UNet, with a separate time for each sample of a batch.
//!
//! The same calculation as diffusers' `UNet2DConditionModel` with `addition_embed_type`
//! "text_time", to fp32 rounding (checked by golden tests, gradients too), with two differences of
//! form: sinusoids are always computed in fp32, and a context mask removes padding exactly
//! (diffusers adds -10000).

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, TchError, Tensor};

use crate::{
    config::unet::{NUM_TIME_IDS, UNetConfig},
    error::{Error, Result},
    nets::{
        attention::{LogitMeter, Mask},
        layers::{Conv, GroupNorm, Norm, Sinusoid, TimeEmbedding},
        unet_blocks::{Attending, Conditions, DownBlock, MidBlock, UpBlock},
    },
    torch::{ffi::Torch, write::f_upload},
    weights::{Parameters, Scope, Weights},
};

/// The network that predicts velocity or noise from noisy latents, time, text and image size.
#[derive(Debug)]
pub struct UNet {
    /// Its sizes.
    pub config: UNetConfig,
    /// Its tensors by their diffusers names.
    pub parameters: Parameters,
    device: Device,
    time_proj: Sinusoid,
    time_embedding: TimeEmbedding,
    add_time_proj: Sinusoid,
    add_embedding: TimeEmbedding,
    conv_in: Conv,
    down: Vec<DownBlock>,
    mid: MidBlock,
    up: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv,
}

/// The input of the UNet. Floating-point tensors are converted to the model's dtype, and all
/// tensors moved to its device.
#[derive(Debug, Clone, Copy)]
pub struct UNetInput<'a> {
    /// Noisy latents. `[b, 4, h, w]`, any size
    pub sample: &'a Tensor,
    /// Time of each sample, from 0 to 1000, not rounded: 1000 sigma for flow. `[b]`
    pub timestep: &'a Tensor,
    /// Penultimate states of both text encoders. `[b, 77 k, 2048]`
    pub context: &'a Tensor,
    /// Which tokens of the context are attended to; `None`: all. `[b, 77 k]` bool, at least one
    /// true in each row
    pub context_mask: Option<&'a Tensor>,
    /// bigG's projected pooled output. `[b, 1280]`
    pub text_embeds: &'a Tensor,
    /// Original height and width, top and left of the crop, target height and width. `[b, 6]`
    pub time_ids: &'a Tensor,
}

/// A level of the network: on the way down (numbered from 0, the finest), in the middle, or on the
/// way up (numbered from 0, the coarsest).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum UNetPart {
    /// `down_blocks.N` in diffusers' names.
    Down(usize),
    /// `mid_block`.
    Mid,
    /// `up_blocks.N`.
    Up(usize),
}

impl fmt::Display for UNetPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Down(level) => write!(f, "down.{level}"),
            Self::Mid => f.write_str("mid"),
            Self::Up(level) => write!(f, "up.{level}"),
        }
    }
}

impl From<UNetPart> for String {
    fn from(part: UNetPart) -> Self {
        part.to_string()
    }
}

impl FromStr for UNetPart {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let part = match name.split_once('.') {
            None if name == "mid" => Some(Self::Mid),
            Some(("down", number)) => number.parse().ok().map(Self::Down),
            Some(("up", number)) => number.parse().ok().map(Self::Up),
            _ => None,
        };
        part.ok_or_else(|| {
            Error::unknown_name(
                "part of the UNet",
                name,
                &["mid", "down.1", "down.2", "up.0", "up.1"],
            )
        })
    }
}

impl TryFrom<String> for UNetPart {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

/// The part of a pass whose self-attention is switched off, for perturbed-attention guidance.
#[derive(Debug, Clone, Copy)]
pub struct Perturbation<'a> {
    /// The parts of the UNet; all their transformer blocks are affected.
    pub parts: &'a [UNetPart],
    /// The first affected row of the batch; all later rows are affected too.
    pub first_row: i64,
}

impl UNet {
    /// Builds the network from its tensors.
    ///
    /// # Errors
    /// [`Error::Weights`] if they are not exactly those of the configuration.
    pub fn new(config: UNetConfig, mut weights: Weights) -> Result<Self> {
        let device = weights.device();
        let c = &config;
        let finest = c.down[0].channels;
        // The tensors, in the order of the calculation.
        let mut root = weights.root();
        let conv_in = Conv::new(&mut root.sub("conv_in"), c.in_channels, finest, 3);
        let time_embedding = embedding(&mut root, "time_embedding", finest, c);
        let add_embedding = embedding(&mut root, "add_embedding", c.added_dim(), c);
        let down = down_blocks(&mut root, c);
        let mid = MidBlock::new(&mut root.sub("mid_block"), c);
        let up = up_blocks(&mut root, c);
        let conv_norm_out = GroupNorm::new(&mut root.sub("conv_norm_out"), finest, norm(c));
        let conv_out = Conv::new(&mut root.sub("conv_out"), finest, c.out_channels, 3);
        // The parts without tensors.
        let time_proj = sinusoid(c, finest);
        let add_time_proj = sinusoid(c, c.addition_time_embed_dim);
        let parameters = weights.finish()?;
        Ok(Self {
            config,
            parameters,
            device,
            time_proj,
            time_embedding,
            add_time_proj,
            add_embedding,
            conv_in,
            down,
            mid,
            up,
            conv_norm_out,
            conv_out,
        })
    }

    /// Returns the dtype of the activations. Norms, time embeddings and the last convolution can
    /// have another.
    pub fn kind(&self) -> Kind {
        self.conv_in.kind()
    }

    /// Returns the device of the tensors.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Chooses the residual and transformer blocks whose intermediate results are recomputed in the
    /// backward pass instead of kept, by name (e.g.
    /// `down_blocks.1.attentions.0.transformer_blocks.1`): less memory for more time.
    pub fn checkpoint_blocks(&mut self, mut choose: impl FnMut(&str) -> bool) {
        let down = self.down.iter_mut().flat_map(DownBlock::switches);
        let up = self.up.iter_mut().flat_map(UpBlock::switches);
        for (name, is_on) in down.chain(self.mid.switches()).chain(up) {
            *is_on = choose(name);
        }
    }

    /// Returns the prediction for each sample, `[b, 4, h, w]` in the model's dtype.
    ///
    /// # Errors
    /// [`Error::Input`] for tensors that do not fit, [`Error::Torch`] if libtorch fails (out of
    /// memory).
    pub fn forward(&self, input: &UNetInput<'_>) -> Result<Tensor> {
        self.forward_perturbed(input, None)
    }

    /// As [`Self::forward`], with self-attention switched off as `perturbation` says.
    ///
    /// # Errors
    /// As [`Self::forward`]; [`Error::Invalid`] for a part without attention.
    pub fn forward_perturbed(
        &self,
        input: &UNetInput<'_>,
        perturbation: Option<Perturbation<'_>>,
    ) -> Result<Tensor> {
        self.check(input)?;
        if let Some(perturbation) = perturbation {
            self.check_parts(perturbation.parts)?;
            let rows = input.sample.size()[0];
            if !(1..rows).contains(&perturbation.first_row) {
                let expected = format!("from 1 to {} of a batch of {rows}", rows - 1);
                return Err(Error::input(
                    "first perturbed row",
                    expected,
                    perturbation.first_row.to_string(),
                ));
            }
        }
        self.calculate(input, perturbation, None)
            .map_err(torch_error(input))
    }

    /// As [`Self::forward`], but `meter` measures all attention logits, at the cost of one more
    /// product of queries and keys each.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_metered(&self, input: &UNetInput<'_>, meter: &LogitMeter) -> Result<Tensor> {
        self.check(input)?;
        self.calculate(input, None, Some(meter))
            .map_err(torch_error(input))
    }

    /// Returns the parts with transformers, whose self-attention can be switched off.
    pub fn parts_with_attention(&self) -> Vec<UNetPart> {
        let mut parts = Vec::new();
        for (index, level) in self.config.down.iter().enumerate() {
            if level.has_attention() {
                parts.push(UNetPart::Down(index));
            }
        }
        parts.push(UNetPart::Mid);
        for (index, level) in self.config.up.iter().enumerate() {
            if level.has_attention() {
                parts.push(UNetPart::Up(index));
            }
        }
        parts
    }

    /// Checks that all `parts` have attention.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the first part without attention and the parts that have it.
    pub fn check_parts(&self, parts: &[UNetPart]) -> Result<()> {
        let known = self.parts_with_attention();
        match parts.iter().find(|part| !known.contains(part)) {
            None => Ok(()),
            Some(part) => {
                let names: Vec<String> = known.iter().map(ToString::to_string).collect();
                let problem = format!(
                    "this UNet has no attention in {part}, only in {}",
                    names.join(", ")
                );
                Err(Error::invalid("pag_parts", &[problem]))
            }
        }
    }

    fn calculate(
        &self,
        input: &UNetInput<'_>,
        perturbation: Option<Perturbation<'_>>,
        meter: Option<&LogitMeter>,
    ) -> Torch {
        let time = self.embed(input)?;
        let context = self.placed(input.context)?;
        let mask = match input.context_mask {
            Some(mask) => Some(f_upload(mask, self.device)?),
            None => None,
        };
        let mask = mask.as_ref().map_or(Mask::Everything, Mask::Keys);
        let conditions = PassConditions {
            time: &time,
            context: &context,
            mask,
            perturbation,
            meter,
        };
        let x = self.conv_in.forward(&self.placed(input.sample)?)?;
        let x = self.levels(x, &conditions)?;
        let normed = self.conv_norm_out.forward_silu(&x)?;
        self.conv_out
            .forward(&normed.f_to_kind(self.conv_out.kind())?)
    }

    /// Returns a tensor on the model's device and in its dtype.
    fn placed(&self, x: &Tensor) -> Torch {
        f_upload(x, self.device)?.f_to_kind(self.kind())
    }

    /// Runs the levels down, the middle and the levels up. Mapped weights leave memory level by
    /// level.
    fn levels(&self, mut x: Tensor, conditions: &PassConditions<'_>) -> Torch {
        let mut skips = vec![x.shallow_clone()];
        for (level, block) in self.down.iter().enumerate() {
            x = block.forward(x, &conditions.within(UNetPart::Down(level)), &mut skips)?;
            self.parameters
                .release_pages(&format!("down_blocks.{level}."));
        }
        x = self.mid.forward(&x, &conditions.within(UNetPart::Mid))?;
        self.parameters.release_pages("mid_block.");
        for (level, block) in self.up.iter().enumerate() {
            x = block.forward(x, &conditions.within(UNetPart::Up(level)), &mut skips)?;
            self.parameters
                .release_pages(&format!("up_blocks.{level}."));
        }
        Ok(x)
    }

    /// Returns the embedding of time, pooled text and size, after the activation with which every
    /// residual block begins.
    fn embed(&self, input: &UNetInput<'_>) -> Torch {
        let timestep = f_upload(input.timestep, self.device)?;
        let time = self.time_proj.forward(&timestep)?;
        let time = time.f_to_kind(self.time_embedding.kind())?;
        let time = self.time_embedding.forward(&time)?; // [b, time_embed_dim]
        let added = self.add_embedding.forward(&self.added(input)?)?;
        time.f_add(&added)?.f_silu()?.f_to_kind(self.kind())
    }

    /// Returns the pooled text and the sinusoids of the size values, `[b, 2816]`.
    fn added(&self, input: &UNetInput<'_>) -> Torch {
        let kind = self.add_embedding.kind();
        let b = input.time_ids.size()[0];
        let ids = f_upload(input.time_ids, self.device)?.f_reshape([-1])?;
        let sizes = self.add_time_proj.forward(&ids)?.f_reshape([b, -1])?;
        let text = f_upload(input.text_embeds, self.device)?.f_to_kind(kind)?;
        Tensor::f_cat(&[text, sizes.f_to_kind(kind)?], 1)
    }

    /// Checks that the tensors fit each other and the model.
    fn check(&self, input: &UNetInput<'_>) -> Result<()> {
        let size = input.sample.size();
        if size.len() != 4 || size[1] != self.config.in_channels || size.contains(&0) {
            let expected = format!("[b, {}, h, w] without zeros", self.config.in_channels);
            return Err(Error::input("sample", expected, format!("{size:?}")));
        }
        self.check_conditions(input, size[0])?;
        expect_floating("sample", input.sample)?;
        expect_floating("encoder_hidden_states", input.context)?;
        expect_floating("text_embeds", input.text_embeds)
    }

    /// Checks the shapes of all tensors besides the sample, and the mask's dtype.
    fn check_conditions(&self, input: &UNetInput<'_>, b: i64) -> Result<()> {
        expect("timestep", input.timestep, &[b])?;
        let pooled = [b, self.config.pooled_dim];
        expect("text_embeds", input.text_embeds, &pooled)?;
        expect("time_ids", input.time_ids, &[b, NUM_TIME_IDS])?;
        let num_tokens = input.context.size().get(1).copied().unwrap_or(0);
        let context = [b, num_tokens.max(1), self.config.context_dim()];
        expect("encoder_hidden_states", input.context, &context)?;
        let Some(mask) = input.context_mask else {
            return Ok(());
        };
        expect("context mask", mask, &[b, num_tokens])?;
        if mask.kind() == Kind::Bool {
            return Ok(());
        }
        let found = format!("{:?}", mask.kind());
        Err(Error::input("context mask", "dtype Bool", found))
    }
}

/// Returns the sinusoids of a value, with `dim` channels.
fn sinusoid(config: &UNetConfig, dim: i64) -> Sinusoid {
    Sinusoid {
        dim,
        cos_first: config.flip_sin_to_cos,
        freq_shift: config.freq_shift,
    }
}

/// Builds an embedding of `inputs` channels.
fn embedding(root: &mut Scope<'_>, name: &str, inputs: i64, config: &UNetConfig) -> TimeEmbedding {
    TimeEmbedding::new(&mut root.sub(name), inputs, config.time_embed_dim)
}

fn norm(config: &UNetConfig) -> Norm {
    Norm {
        num_groups: config.norm_num_groups,
        eps: config.norm_eps,
    }
}

fn down_blocks(root: &mut Scope<'_>, config: &UNetConfig) -> Vec<DownBlock> {
    let mut blocks = Vec::new();
    for i in 0..config.down.len() {
        let mut scope = root.sub(format_args!("down_blocks.{i}"));
        blocks.push(DownBlock::new(&mut scope, config, i));
    }
    blocks
}

fn up_blocks(root: &mut Scope<'_>, config: &UNetConfig) -> Vec<UpBlock> {
    let mut blocks = Vec::new();
    for i in 0..config.up.len() {
        let mut scope = root.sub(format_args!("up_blocks.{i}"));
        blocks.push(UpBlock::new(&mut scope, config, i));
    }
    blocks
}

/// The conditions of a pass, for all parts together.
struct PassConditions<'a> {
    time: &'a Tensor,
    context: &'a Tensor,
    mask: Mask<'a>,
    perturbation: Option<Perturbation<'a>>,
    meter: Option<&'a LogitMeter>,
}

impl PassConditions<'_> {
    /// Returns the conditions of one part: only some have perturbed attention.
    fn within(&self, part: UNetPart) -> Conditions<'_> {
        let perturbation = self
            .perturbation
            .filter(|perturbation| perturbation.parts.contains(&part));
        let attending = Attending {
            mask: self.mask,
            perturbed_from: perturbation.map(|perturbation| perturbation.first_row),
            meter: self.meter,
        };
        Conditions {
            time: self.time,
            context: self.context,
            attending,
        }
    }
}

/// Returns a constructor of the error for a failure of libtorch with this input.
fn torch_error(input: &UNetInput<'_>) -> impl FnOnce(TchError) -> Error {
    Error::torch(format!("UNet forward of {:?}", input.sample.size()))
}

/// Checks that a tensor has a floating-point dtype.
fn expect_floating(name: &str, tensor: &Tensor) -> Result<()> {
    if tensor.is_floating_point() {
        return Ok(());
    }
    let found = format!("{:?}", tensor.kind());
    Err(Error::input(name, "a floating-point dtype", found))
}

/// Checks the shape of a tensor.
fn expect(name: &str, tensor: &Tensor, shape: &[i64]) -> Result<()> {
    if tensor.size() == shape {
        Ok(())
    } else {
        Err(Error::input(
            name,
            format!("shape {shape:?}"),
            format!("{:?}", tensor.size()),
        ))
    }
}
