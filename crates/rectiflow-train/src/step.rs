//! One step: noise, predict, compare, accumulate over micro-batches, clip, update.
//!
//! The loss of a step is the sum over its samples of the (weighted) mean squared error, divided by the step's true
//! number of samples, so that a ragged micro-batch counts by its samples. Sigma and noise are keyed by (seed, cursor,
//! slot), never by rank or micro-batch order.

use rectiflow_data::{
    batch::{MicroBatch, Step},
    rng::{Purpose, Rng, key_u64},
};
use rectiflow_sdxl::{
    cond::{self, ChunkedIds, Cond},
    flow::{Objective, per_sample_mse},
    model::Model,
    sample::initial_noise,
    unet::UNetInput,
};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    error::{Error, Result},
    flat::FlatParameters,
    state::TrainState,
    workers::{Shared, Workers},
};

/// What a step needs besides the state it changes.
#[derive(Debug)]
pub(crate) struct Stepper<'a> {
    pub(crate) model: &'a Model,
    pub(crate) objective: &'a Objective,
    pub(crate) device: Device,
    pub(crate) seed: u64,
    pub(crate) train_text_encoders: bool,
    pub(crate) clip_norm: f64,
    pub(crate) text_encoder_lr_ratio: f64,
    pub(crate) workers: Workers,
}

/// What a step measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    pub(crate) loss: f64,
    pub(crate) gradient_norm: f64,
}

impl Stepper<'_> {
    /// Makes one update of `state` from `step` at learning rate `lr`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] where the loss or the gradient is no number; the state is as before then.
    pub(crate) fn step(&self, state: &mut TrainState, step: &Step, lr: f64) -> Result<Measured> {
        let (loss, mut gradients) = self.gradients(&state.parameters, step)?;
        let gradient_norm = gradients.norm().double_value(&[]);
        for (what, value) in [("loss", loss), ("gradient norm", gradient_norm)] {
            if !value.is_finite() {
                return Err(Error::NotFinite { step: step.step, what, value });
            }
        }
        if gradient_norm > self.clip_norm {
            gradients *= self.clip_norm / gradient_norm;
        }
        state.position.update += 1;
        let rates = state.rates(lr, self.text_encoder_lr_ratio);
        state.optimizer.update(&state.parameters.values, &gradients, state.position.update, &rates, &self.workers);
        state.position.cursor = step.step + 1;
        state.position.samples += step.num_samples;
        Ok(Measured { loss, gradient_norm })
    }

    /// The loss of a step and its gradient `[n]`, summed over the micro-batches in the order of their slots, however
    /// many of them are worked on at a time.
    fn gradients(&self, parameters: &FlatParameters, step: &Step) -> Result<(f64, Tensor)> {
        let quantiles = StepQuantiles::draw(self.seed, step);
        let mut loss = 0.0;
        let sum = parameters.values.zeros_like();
        // SAFETY: forward and backward passes read the parameters, and `accumulate` writes `sum` when they are done.
        let shared = unsafe { Shared::new((self, parameters)) };
        for batches in step.micro_batches.chunks(self.workers.width()) {
            let passes = self.workers.map(batches, |batch| {
                let (stepper, parameters) = shared.get();
                let noise = noise(stepper.seed, step.step, batch, stepper.device);
                let times = quantiles.times(stepper.objective, batch);
                let loss = stepper.losses(batch, &noise, &times)?.sum(Kind::Float) / step.num_samples as f64;
                Ok((loss.double_value(&[]), parameters.gradients_of(&loss)?))
            });
            let passes: Vec<(f64, Vec<Tensor>)> = passes.into_iter().collect::<Result<_>>()?;
            let (losses, gradients): (Vec<f64>, Vec<_>) = passes.into_iter().unzip();
            loss += losses.iter().sum::<f64>();
            parameters.accumulate(&sum, &gradients, &self.workers);
        }
        Ok((loss, sum))
    }

    /// The (weighted) mean squared error of each sample, `[n]` fp32; samples of weight 0 have 0.
    pub(crate) fn losses(&self, batch: &MicroBatch, noise: &Tensor, times: &[f64]) -> Result<Tensor> {
        let x0 = latents(batch, self.device) * self.model.vae.config.scaling_factor;
        let noised = self.objective.noised(&x0, noise, times);
        let cond = self.condition(batch)?;
        let time_ids = Tensor::from_slice(&batch.time_ids).view([-1, 6]).to_device(self.device);
        let input = UNetInput {
            sample: &noised.sample,
            timestep: &noised.timestep,
            context: &cond.context,
            context_mask: cond.context_mask.as_ref(),
            text_embeds: &cond.pooled,
            time_ids: &time_ids,
        };
        let prediction = self.model.unet.forward(&input)?;
        let weights = Tensor::from_slice(&batch.weights).to_device(self.device) * noised.weights;
        Ok(per_sample_mse(&prediction, &noised.target) * weights)
    }

    fn condition(&self, batch: &MicroBatch) -> Result<Cond> {
        let size = [batch.ids.len() as i64, batch.tokens as i64, 77];
        let ids = |ids: &[i64]| Tensor::from_slice(ids).view(size).to_device(self.device);
        let (clip_l, clip_g) = (ids(&batch.clip_l), ids(&batch.clip_g));
        let ids = ChunkedIds { clip_l: &clip_l, clip_g: &clip_g, num_chunks: &batch.chunks };
        let encode = || cond::encode(&self.model.clip_l, &self.model.clip_g, ids);
        Ok(if self.train_text_encoders { encode() } else { no_grad(encode) }?)
    }
}

/// The quantiles of a step: which cell each sample has, and where in it.
#[derive(Debug)]
struct StepQuantiles {
    seed: u64,
    cursor: u64,
    cells: Vec<u32>,
}

impl StepQuantiles {
    fn draw(seed: u64, step: &Step) -> Self {
        let count = u32::try_from(step.num_samples).expect("a step has fewer than 2^32 samples");
        let cells = Rng::keyed(seed, Purpose::Sigma, &[step.step]).permutation(count);
        Self { seed, cursor: step.step, cells }
    }

    /// The times of a micro-batch's samples.
    fn times(&self, objective: &Objective, batch: &MicroBatch) -> Vec<f64> {
        let mut jitter = Rng::keyed(self.seed, Purpose::Sigma, &[self.cursor, u64::from(batch.slot)]);
        let first = batch.first_sample as usize;
        let cells = &self.cells[first..first + batch.ids.len()];
        let count = self.cells.len() as u64;
        cells.iter().map(|&cell| objective.time(objective.quantile(u64::from(cell), count, jitter.f64()))).collect()
    }
}

/// The noise of a micro-batch, `[n, C, h, w]` fp32, drawn on the CPU so that every device trains on the same.
fn noise(seed: u64, cursor: u64, batch: &MicroBatch, device: Device) -> Tensor {
    let key = key_u64(seed, Purpose::Noise, &[cursor, u64::from(batch.slot)]);
    initial_noise(key, &latent_size(batch)).to_device(device)
}

/// Shape of a micro-batch's latents.
pub(crate) fn latent_size(batch: &MicroBatch) -> [i64; 4] {
    let [channels, height, width] = batch.latent_shape.map(|size| size as i64);
    [batch.ids.len() as i64, channels, height, width]
}

fn latents(batch: &MicroBatch, device: Device) -> Tensor {
    Tensor::from_slice(&batch.latents).view(latent_size(batch)).to_device(device).to_kind(Kind::Float)
}
