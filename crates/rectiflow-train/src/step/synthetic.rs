//! Training steps on a fixed input, without data set, text encoders or run folder: what
//! `rectiflow bench step` times.
//!
//! All parts are the trainer's own: forward and backward passes through compute copies, the fp32
//! sum of gradients, the clipping, the optimiser. `scripts/peers/bench_step.py` does the same with
//! diffusers and PyTorch, from the same files.

use std::{path::Path, time::Instant};

use rectiflow_sdxl::{
    flow::per_sample_mse,
    tensor_file::TensorFile,
    unet::{UNet, UNetInput},
};
use tch::{Device, Kind, Tensor};

use crate::{
    error::{Error, Result},
    state::{
        flat::FlatParameters,
        optim::{Optimizer, OptimizerConfig, UpdateRange},
        precision::Precision,
        workers::{OnlyTensors, Workers},
    },
};

/// Settings of the steps.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Precision that the UNet computes in.
    pub precision: Precision,
    /// Number of micro-batches that the input is split into; on a CPU they run concurrently.
    pub micro_batches: usize,
    /// Number of steps.
    pub steps: usize,
    /// Learning rate.
    pub lr: f64,
    /// Largest norm of the gradient; a longer gradient is scaled down to it.
    pub clip_norm: f64,
}

/// Input of the UNet and the target of its prediction.
#[derive(Debug)]
pub struct Input {
    /// Noisy latents, `[b, 4, h, w]` fp32.
    pub sample: Tensor,
    /// `[b]` fp32.
    pub timestep: Tensor,
    /// `[b, n, context_dim]` fp32.
    pub context: Tensor,
    /// `[b, pooled_dim]` fp32.
    pub text_embeds: Tensor,
    /// `[b, 6]` fp32.
    pub time_ids: Tensor,
    /// Target of the prediction, shaped as `sample`.
    pub target: Tensor,
}

impl Input {
    /// Reads the tensors with the names of the fields from a safetensors file.
    ///
    /// # Errors
    /// [`Error::Model`] if one is missing.
    pub fn read(path: &Path, device: Device) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let get =
            |name: &str| Ok::<_, Error>(file.tensor(name)?.to_kind(Kind::Float).to_device(device));
        Ok(Self {
            sample: get("sample")?,
            timestep: get("timestep")?,
            context: get("context")?,
            text_embeds: get("text_embeds")?,
            time_ids: get("time_ids")?,
            target: get("target")?,
        })
    }

    /// Returns random tensors for a UNet: `batch` samples with latents of `height` x `width`, one
    /// chunk of tokens each.
    pub fn random(unet: &UNet, [batch, height, width]: [i64; 3]) -> Self {
        let config = &unet.config;
        let options = (Kind::Float, unet.device());
        let normal = |size: &[i64]| Tensor::randn(size, options);
        let latents = [batch, config.in_channels, height, width];
        let side_px = |latent: i64| 8.0 * latent as f32;
        let size = [
            side_px(height),
            side_px(width),
            0.0,
            0.0,
            side_px(height),
            side_px(width),
        ];
        Self {
            sample: normal(&latents),
            timestep: Tensor::rand([batch], options) * 1000.0,
            context: normal(&[batch, 77, config.context_dim()]),
            text_embeds: normal(&[batch, config.pooled_dim]),
            time_ids: Tensor::from_slice(&size)
                .to_device(unet.device())
                .repeat([batch, 1]),
            target: normal(&latents),
        }
    }

    /// Returns the number of samples.
    pub fn num_samples(&self) -> usize {
        self.sample.size()[0] as usize
    }

    fn rows(&self, start: i64, count: i64) -> Self {
        let cut = |tensor: &Tensor| tensor.narrow(0, start, count);
        Self {
            sample: cut(&self.sample),
            timestep: cut(&self.timestep),
            context: cut(&self.context),
            text_embeds: cut(&self.text_embeds),
            time_ids: cut(&self.time_ids),
            target: cut(&self.target),
        }
    }

    fn split(&self, parts: usize) -> Vec<Self> {
        let rows = (self.num_samples() / parts) as i64;
        (0..parts as i64)
            .map(|part| self.rows(part * rows, rows))
            .collect()
    }
}

/// Measurements of each step.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    /// Mean squared error before the update.
    pub losses: Vec<f64>,
    /// Norm of the gradient before clipping.
    pub gradient_norms: Vec<f64>,
    /// Seconds from the inputs to the updated weights.
    pub secs: Vec<f64>,
}

/// Trains `unet` for some steps on the same input. Calls `observe` with the number of completed
/// steps after each.
///
/// # Errors
/// [`Error::Model`] if the input does not fit the UNet.
pub fn train_steps(
    unet: &UNet,
    input: &Input,
    settings: &Settings,
    observe: &mut dyn FnMut(usize),
) -> Result<Measured> {
    let parameters = FlatParameters::adopt(&[("unet", &unet.parameters)], settings.precision);
    let mut optimizer = Optimizer::new(OptimizerConfig::default(), &parameters.masters);
    let workers = Workers::new(unet.device(), settings.micro_batches);
    let inputs = input.split(settings.micro_batches);
    let mut measured = Measured::default();
    for step in 0..settings.steps {
        let began = Instant::now();
        let loss = accumulate(unet, &parameters, &inputs, &workers)?;
        let mut gradients = parameters.gradients.finish();
        let whole = parameters.num_parameters();
        let norm = gradients.square_norm(&(0..whole)).sqrt();
        gradients.clip(norm, settings.clip_norm);
        let range = UpdateRange {
            range: 0..whole,
            whole,
            rate: settings.lr,
            update: step as u64 + 1,
        };
        let alone = |own: &[f64]| Ok(own.to_vec());
        optimizer.update(&parameters.masters, &gradients, &[range], &workers, &alone)?;
        measured.secs.push(began.elapsed().as_secs_f64());
        measured.losses.push(loss);
        measured.gradient_norms.push(norm);
        observe(step + 1);
    }
    Ok(measured)
}

/// Data shared by the workers.
struct Given<'a> {
    unet: &'a UNet,
    inputs: &'a [Input],
}

// SAFETY: a network consists of tensors and settings, an input of tensors.
unsafe impl OnlyTensors for Given<'_> {}

/// Returns the mean loss of all inputs and accumulates its gradient.
fn accumulate(
    unet: &UNet,
    parameters: &FlatParameters,
    inputs: &[Input],
    workers: &Workers,
) -> Result<f64> {
    parameters.gradients.begin(inputs.len(), None);
    let (gradients, given) = (parameters.gradients.adder(), Given { unet, inputs });
    let places: Vec<usize> = (0..inputs.len()).collect();
    let mut sum = 0.0;
    for places in places.chunks(workers.width()) {
        let losses: Vec<Result<f64>> = workers.map_tensors(&given, places, |given, &place| {
            let input = &given.inputs[place];
            let prediction = given.unet.forward(&UNetInput {
                sample: &input.sample,
                timestep: &input.timestep,
                context: &input.context,
                context_mask: None,
                text_embeds: &input.text_embeds,
                time_ids: &input.time_ids,
            })?;
            let loss = per_sample_mse(&prediction, &input.target).mean(Kind::Float)
                / given.inputs.len() as f64;
            gradients.add(place, &loss)?;
            Ok(loss.double_value(&[]))
        });
        sum += losses.into_iter().sum::<Result<f64>>()?;
    }
    Ok(sum)
}
