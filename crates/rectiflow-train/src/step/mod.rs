//! One training step: noise, predict, compare and accumulate over micro-batches; then, if the guard
//! agrees, clip and update.
//!
//! The loss of a step is the sum over its samples of the (weighted) mean squared error, divided by
//! the total number of samples in the step, so a ragged micro-batch counts by its samples. Sigma
//! and noise are keyed by (seed, cursor, slot), never by rank or by the order of micro-batches.

pub(crate) mod in_backward;
pub(crate) mod prompt_cache;
pub mod step_flops;
pub mod synthetic;

use rectiflow_data::{
    batch::{MicroBatch, Step},
    rng::{Purpose, Rng, key_u64},
};
use rectiflow_sdxl::{
    attention::LogitMeter,
    cond::{self, ChunkedIds, Cond},
    flow::{Objective, per_sample_mse},
    model::Model,
    sample::initial_noise,
    unet::UNetInput,
    write::upload,
};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    error::Result,
    lr::LrRatios,
    ranks::exchange::{Exchange, Passes, Summed},
    recipe::{Checked, sections::TextEncoders},
    state::{
        TrainState,
        ema::{self, EmaConfig},
        flat::FlatParameters,
        gradient_vector::GradientVector,
        gradients::Adder,
        on_device,
        workers::{OnlyTensors, Workers},
    },
    step::prompt_cache::PromptCache,
};

/// What a step needs besides the state that it changes.
#[derive(Debug)]
pub(crate) struct Stepper<'a> {
    pub(crate) model: &'a Model,
    pub(crate) objective: &'a Objective,
    pub(crate) device: Device,
    pub(crate) seed: u64,
    /// Encodings of prompts that many samples share; `None` if the text encoders are trained.
    pub(crate) prompt_cache: Option<PromptCache>,
    pub(crate) offset_noise: f64,
    pub(crate) clip_norm: f64,
    pub(crate) clip_ratio: f64,
    pub(crate) ratios: LrRatios,
    pub(crate) ema: EmaConfig,
    pub(crate) workers: Workers,
}

// SAFETY: besides the model's tensors it holds settings, threads, and a cache behind a lock.
unsafe impl OnlyTensors for Stepper<'_> {}

/// Measurements of one or several forward and backward passes.
#[derive(Debug, Default)]
struct Pass {
    /// Their contribution to the step's loss.
    loss: f64,
    /// Diffusion time and loss of each sample, in order.
    samples: Vec<(f64, f32)>,
}

/// Measurements of one micro-batch's passes, not read yet: reading waits for the device.
#[derive(Debug)]
struct UnreadPass {
    /// Its contribution to the step's loss, a scalar.
    loss: Tensor,
    /// Diffusion time of each sample.
    times: Vec<f64>,
    /// Loss of each sample, `[n]` fp32.
    losses: Tensor,
}

impl UnreadPass {
    fn read(self) -> Pass {
        Pass {
            loss: self.loss.double_value(&[]),
            samples: self.times.into_iter().zip(to_vec(&self.losses)).collect(),
        }
    }
}

/// Limits on the length of an update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rates {
    /// Largest norm of the gradient; a longer gradient is scaled down to it.
    pub(crate) norm: f64,
    /// Learning rate.
    pub(crate) lr: f64,
}

impl<'a> Stepper<'a> {
    /// Returns the stepper of a recipe for this model.
    pub(crate) fn new(checked: &'a Checked, model: &'a Model) -> Self {
        let recipe = &checked.recipe;
        Self {
            model,
            objective: &checked.objective,
            device: checked.device,
            seed: recipe.run.seed,
            prompt_cache: (recipe.train.text_encoders == TextEncoders::Frozen)
                .then(PromptCache::default),
            offset_noise: recipe.train.offset_noise,
            clip_norm: recipe.train.clip_norm,
            clip_ratio: recipe.train.clip_ratio,
            ratios: recipe.lr.ratio.clone(),
            ema: recipe.ema.clone(),
            workers: Workers::new(checked.device, recipe.train.micro_batches),
        }
    }

    /// Returns the loss of a step and its gradient `[n]`, summed over this rank's micro-batches in
    /// the order of their slots. The result does not depend on how many of them run concurrently.
    pub(crate) fn passes(
        &self,
        parameters: &FlatParameters,
        step: &Step,
        exchange: &Exchange,
    ) -> Result<Summed> {
        let quantiles = StepQuantiles::draw(self.seed, step);
        exchange.wait_gathers()?;
        let mut gradients = exchange.begin(parameters);
        let mut measured = Pass::default();
        let mut unread = Vec::new();
        let adder = parameters.gradients.adder();
        let micro_batches = &step.micro_batches;
        for round in micro_batches.chunks(exchange.round().min(micro_batches.len())) {
            let mut work = || self.round_passes(step, round, &quantiles, &adder, &mut unread);
            exchange.reduce_round(&mut gradients, parameters, round.len(), &mut work)?;
        }
        for passes in unread {
            let mut loss = 0.0;
            for pass in passes {
                let pass = pass.read();
                loss += pass.loss;
                measured.samples.extend(pass.samples);
            }
            measured.loss += loss;
        }
        Ok(Summed {
            loss: measured.loss,
            samples: measured.samples,
            gradients,
        })
    }

    /// Runs the passes over a round of micro-batches, as many concurrently as there are workers.
    /// Appends their measurements, those that ran concurrently together.
    fn round_passes(
        &self,
        step: &Step,
        round: &[MicroBatch],
        quantiles: &StepQuantiles,
        gradients: &Adder,
        unread: &mut Vec<Vec<UnreadPass>>,
    ) -> Result<()> {
        let numbered: Vec<(usize, &MicroBatch)> = round.iter().enumerate().collect();
        for batches in numbered.chunks(self.workers.width()) {
            let passes: Vec<Result<UnreadPass>> =
                self.workers
                    .map_tensors(self, batches, |stepper, &(place, batch)| {
                        let pass = stepper.step_loss(step, batch, quantiles)?;
                        gradients.add(place, &pass.loss)?;
                        Ok(UnreadPass {
                            loss: pass.loss.detach(),
                            ..pass
                        })
                    });
            unread.push(passes.into_iter().collect::<Result<_>>()?);
        }
        Ok(())
    }

    /// Returns the largest attention logit of the UNet on this rank's first micro-batch of a step.
    /// Costs one more forward pass.
    pub(crate) fn largest_logit(&self, step: &Step) -> Result<f64> {
        let Some(batch) = step.micro_batches.first() else {
            return Ok(f64::NEG_INFINITY);
        };
        let quantiles = StepQuantiles::draw(self.seed, step);
        let meter = LogitMeter::default();
        let noise = self.noise_of(step, batch);
        let times = quantiles.times(self.objective, batch);
        let _losses = no_grad(|| self.metered_losses(batch, &noise, &times, Some(&meter)))?;
        Ok(meter.largest())
    }

    /// Returns a micro-batch's contribution to the step's loss, and the diffusion time and loss of
    /// each of its samples.
    fn step_loss(
        &self,
        step: &Step,
        batch: &MicroBatch,
        quantiles: &StepQuantiles,
    ) -> Result<UnreadPass> {
        let noise = self.noise_of(step, batch);
        let times = quantiles.times(self.objective, batch);
        let losses = self.losses(batch, &noise, &times)?;
        let loss = losses.sum(Kind::Float) / step.num_samples as f64;
        Ok(UnreadPass {
            loss,
            times,
            losses: losses.detach(),
        })
    }

    /// Returns the noise of a micro-batch of a step, `[n, C, h, w]` fp32.
    fn noise_of(&self, step: &Step, batch: &MicroBatch) -> Tensor {
        let key = [step.step, u64::from(batch.slot)];
        let drawn = noise(self.seed, key, &latent_size(batch), self.offset_noise);
        upload(&drawn, self.device)
    }

    /// Applies the update of a step at learning rate `lr`, with its gradient clipped to `norm` or
    /// the recipe's limit, whichever is smaller. Returns the clipped gradient.
    pub(crate) fn update(
        &self,
        state: &mut TrainState,
        step: &Step,
        passes: Passes,
        Rates { norm, lr }: Rates,
        exchange: &Exchange,
    ) -> Result<GradientVector> {
        let Passes {
            gradient_norm,
            mut gradients,
            ..
        } = passes;
        gradients.clip(gradient_norm, norm.min(self.clip_norm));
        let position = &mut state.position;
        position.update += 1;
        position.samples += step.num_samples;
        position.cursor = step.step + 1;
        let ranges = state.update_ranges(lr, &self.ratios);
        let masters = &state.parameters.masters;
        let total = |excess: &[f64]| exchange.total(excess);
        state
            .optimizer
            .update(masters, &gradients, &ranges, &self.workers, &total)?;
        exchange.publish(&state.parameters)?;
        self.move_average(state, step)?;
        Ok(gradients)
    }

    /// Moves the average of the weights on by a step, if the recipe has one.
    fn move_average(&self, state: &TrainState, step: &Step) -> Result<()> {
        let keep = self.ema.keep(step.num_samples, state.position.samples);
        let (Some(average), Some(keep)) = (&state.average, keep) else {
            return Ok(());
        };
        let masters = &state.parameters.masters;
        if self.device != Device::Cpu {
            return on_device::lerp_towards(average, masters, keep);
        }
        ema::lerp_towards(average, masters, keep, &self.workers);
        Ok(())
    }

    /// Returns the (weighted) mean squared error of each sample, `[n]` fp32; 0 for samples of
    /// weight 0.
    pub(crate) fn losses(
        &self,
        batch: &MicroBatch,
        noise: &Tensor,
        times: &[f64],
    ) -> Result<Tensor> {
        self.metered_losses(batch, noise, times, None)
    }

    /// Like [`Self::losses`], and measures the UNet's attention logits with `meter`.
    fn metered_losses(
        &self,
        batch: &MicroBatch,
        noise: &Tensor,
        times: &[f64],
        meter: Option<&LogitMeter>,
    ) -> Result<Tensor> {
        let x0 = latents(batch, self.device) * self.model.vae.config.scaling_factor;
        let noised = self.objective.noised(&x0, noise, times);
        let cond = self.condition(batch)?;
        let time_ids = Tensor::from_slice(&batch.time_ids).view([-1, 6]);
        let time_ids = upload(&time_ids, self.device);
        let input = UNetInput {
            sample: &noised.sample,
            timestep: &noised.timestep,
            context: &cond.context,
            context_mask: cond.context_mask.as_ref(),
            text_embeds: &cond.pooled,
            time_ids: &time_ids,
        };
        let unet = &self.model.unet;
        let prediction = match meter {
            None => unet.forward(&input),
            Some(meter) => unet.forward_metered(&input, meter),
        }?;
        let weights = upload(&Tensor::from_slice(&batch.weights), self.device) * noised.weights;
        Ok(per_sample_mse(&prediction, &noised.target) * weights)
    }

    fn condition(&self, batch: &MicroBatch) -> Result<Cond> {
        let size = [batch.ids.len() as i64, batch.tokens as i64, 77];
        let ids = |ids: &[i64]| upload(&Tensor::from_slice(ids).view(size), self.device);
        let (clip_l, clip_g) = (ids(&batch.clip_l), ids(&batch.clip_g));
        let ids = ChunkedIds {
            clip_l: &clip_l,
            clip_g: &clip_g,
            num_chunks: &batch.chunks,
        };
        let encode =
            |ids: ChunkedIds<'_>| cond::encode(&self.model.clip_l, &self.model.clip_g, ids);
        Ok(match &self.prompt_cache {
            None => encode(ids),
            Some(cache) => no_grad(|| cache.encode(ids, &batch.dropped, encode)),
        }?)
    }
}

/// The stratified quantiles of a step: one cell for each sample, and a random offset within it.
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
        Self {
            seed,
            cursor: step.step,
            cells,
        }
    }

    /// Returns the diffusion times of a micro-batch's samples.
    fn times(&self, objective: &Objective, batch: &MicroBatch) -> Vec<f64> {
        let mut jitter = Rng::keyed(
            self.seed,
            Purpose::Sigma,
            &[self.cursor, u64::from(batch.slot)],
        );
        let first = batch.first_sample as usize;
        let cells = &self.cells[first..first + batch.ids.len()];
        let count = self.cells.len() as u64;
        cells
            .iter()
            .map(|&cell| objective.time(objective.quantile(u64::from(cell), count, jitter.f64())))
            .collect()
    }
}

/// Returns the noise of a micro-batch, `[n, C, h, w]` fp32, keyed by its cursor and slot and drawn
/// on the CPU so that every device trains on the same noise. Adds `offset` times one normal number
/// for each channel of each sample.
fn noise(seed: u64, [cursor, slot]: [u64; 2], size: &[i64; 4], offset: f64) -> Tensor {
    let mut noise = initial_noise(key_u64(seed, Purpose::Noise, &[cursor, slot]), size);
    if offset > 0.0 {
        let key = key_u64(seed, Purpose::Noise, &[cursor, slot, 1]);
        noise += initial_noise(key, &[size[0], size[1], 1, 1]) * offset;
    }
    noise
}

/// Returns the values of an fp32 vector on any device.
pub(crate) fn to_vec(losses: &Tensor) -> Vec<f32> {
    Vec::try_from(losses.detach().to_device(Device::Cpu)).expect("losses are an fp32 vector")
}

/// Returns the shape of a micro-batch's latents, `[n, C, h, w]`.
pub(crate) fn latent_size(batch: &MicroBatch) -> [i64; 4] {
    let [channels, height, width] = batch.latent_shape.map(|size| size as i64);
    [batch.ids.len() as i64, channels, height, width]
}

fn latents(batch: &MicroBatch, device: Device) -> Tensor {
    let latents = Tensor::from_slice(&batch.latents).view(latent_size(batch));
    upload(&latents, device).to_kind(Kind::Float)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offset_noise_moves_each_channel_as_a_whole() {
        let size = [200, 4, 2, 3];
        let (plain, moved) = (noise(1, [7, 0], &size, 0.0), noise(1, [7, 0], &size, 0.1));
        let offsets = moved - plain; // [n, C, h, w]
        let of_channel = offsets.select(3, 0).select(2, 0); // [n, C]
        let spread = (&offsets - of_channel.view([200, 4, 1, 1]))
            .abs()
            .max()
            .double_value(&[]);
        assert!(
            spread < 1e-6,
            "expected one offset for a whole channel, found a spread of {spread}"
        );
        let (mean, deviation) = (
            of_channel.mean(Kind::Double),
            of_channel.std(true).double_value(&[]),
        );
        // 800 numbers with deviation 0.1: 5 standard errors are 0.018 for the mean and 0.0125 for
        // the deviation.
        assert!(
            mean.double_value(&[]).abs() < 0.018 && (deviation - 0.1).abs() < 0.0125,
            "{mean:?} {deviation}"
        );
        assert!(
            noise(1, [7, 1], &size, 0.1) != noise(1, [7, 0], &size, 0.1),
            "another slot has other noise"
        );
    }
}
