//! A step that updates each tensor during its backward pass (`train.update_in_backward`).
//!
//! ```text
//! forward pass -> loss -> guard -> backward pass: gradient complete -> norm, scale, update, free
//! ```
//!
//! The sum of gradients is never in memory. What is known only after it, its norm, can neither
//! scale nor skip the update: each tensor is scaled by its own norm.

use rectiflow_data::batch::Step;
use tch::Tensor;

use crate::{
    error::{Error, Result},
    ranks::exchange::Passes,
    state::{
        TrainState,
        gradient_vector::GradientVector,
        tensor_updates::{Done, TensorUpdates},
    },
    step::{StepQuantiles, Stepper},
};

/// The forward pass of a step, before its backward pass.
#[derive(Debug)]
pub(crate) struct Forward {
    loss: Tensor,
    /// The step's loss.
    pub(crate) value: f64,
    /// Diffusion time and loss of each sample, in order.
    samples: Vec<(f64, f32)>,
}

/// A step whose tensors have been updated, and what was measured on the way.
#[derive(Debug)]
pub(crate) struct Updated {
    pub(crate) passes: Passes,
    /// Number of tensors whose gradient was scaled.
    pub(crate) num_scaled: u64,
    /// The name of the tensor whose gradient was not finite, if any. The state is then of no use.
    pub(crate) broken: Option<String>,
}

impl Forward {
    /// Returns the measurements of a step without a backward pass: there is no gradient norm.
    pub(crate) fn without_gradient(&self) -> Passes {
        Passes {
            loss: self.value,
            gradient_norm: f64::NAN,
            norm_by_group: Vec::new(),
            samples: self.samples.clone(),
            gradients: GradientVector::new([]),
        }
    }
}

impl Stepper<'_> {
    /// Runs the forward pass of a step of one micro-batch.
    pub(crate) fn forward(&self, step: &Step) -> Result<Forward> {
        let [batch] = &step.micro_batches[..] else {
            unreachable!("a recipe with train.update_in_backward has one micro-batch a step");
        };
        let quantiles = StepQuantiles::draw(self.seed, step);
        let pass = self.step_loss(step, batch, &quantiles)?;
        let loss = pass.loss.shallow_clone();
        let read = pass.read();
        Ok(Forward {
            value: read.loss,
            loss,
            samples: read.samples,
        })
    }

    /// Runs the backward pass at learning rate `lr`, and updates each tensor as soon as its
    /// gradient is complete. The position moves on unless a gradient was not finite.
    pub(crate) fn backward(
        &self,
        state: &mut TrainState,
        step: &Step,
        forward: Forward,
        lr: f64,
    ) -> Result<Updated> {
        let ranges = state.tensor_ranges(lr, &self.ratios);
        let updates = TensorUpdates::new(state, ranges, self.clip_ratio);
        let gradients = &state.parameters.gradients;
        let taker = updates.clone();
        gradients.begin_taking(move |tensor, gradient| taker.take(tensor, &gradient));
        let ran = forward.loss.f_backward();
        gradients.end_taking();
        ran.map_err(Error::torch("the backward pass"))?;
        let done = updates.finish();
        let broken = done
            .broken
            .map(|tensor| state.parameters.slices[tensor].name.clone());
        let updated = Updated {
            passes: passes(state, forward, &done),
            num_scaled: done.num_scaled,
            broken,
        };
        if updated.broken.is_none() {
            state.tensor_norms = done.norms;
            self.move_on(state, step)?;
        }
        Ok(updated)
    }

    /// Moves the position and the average on by an update.
    fn move_on(&self, state: &mut TrainState, step: &Step) -> Result<()> {
        let position = &mut state.position;
        position.update += 1;
        position.samples += step.num_samples;
        position.cursor = step.step + 1;
        self.move_average(state, step)
    }
}

/// Returns the measurements of a step whose gradients are freed.
fn passes(state: &TrainState, forward: Forward, done: &Done) -> Passes {
    let parameters = &state.parameters;
    let mut square_norms = Vec::new();
    for group in &parameters.groups {
        let mut sum = 0.0;
        for (slice, square) in parameters.slices.iter().zip(&done.square_norms) {
            if group.range.contains(&slice.range.start) {
                sum += square;
            }
        }
        square_norms.push(sum);
    }
    let norm_by_group = if square_norms.len() > 1 {
        square_norms.iter().map(|square| square.sqrt()).collect()
    } else {
        Vec::new()
    };
    Passes {
        loss: forward.value,
        gradient_norm: square_norms.iter().sum::<f64>().sqrt(),
        norm_by_group,
        samples: forward.samples,
        gradients: GradientVector::new([]),
    }
}
