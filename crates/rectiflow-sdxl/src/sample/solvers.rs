//! Samplers that add no noise: methods for the equation `dx/dsigma = (x - denoised) / sigma`.
//!
//! Plain functions of (denoise, x, sigmas), where `x` are the latents at `sigmas[0]`. The equation
//! is the same for flow, eps and v, so only [`ddim`], which is written as in its paper, takes the
//! parameterization. Each is ComfyUI's arithmetic (k-diffusion's, where ComfyUI took it from
//! there), golden-tested in `tests/samplers.rs`.

use tch::Tensor;

use crate::{
    error::Result,
    flow::Parameterization,
    sample::denoise::{Denoise, signal},
};

/// What a sampler reports once per step, after the model's prediction at the step's first noise
/// level.
#[derive(Debug)]
pub struct Progress<'a> {
    /// Index of the step, from 0.
    pub step: usize,
    /// Total number of steps.
    pub num_steps: usize,
    /// The noise level of `x`.
    pub sigma: f64,
    /// The noisy latents, the model's input. `[b, 4, h, w]`
    pub x: &'a Tensor,
    /// The clean latents that the model predicts. `[b, 4, h, w]`
    pub denoised: &'a Tensor,
}

/// A callback for the progress of sampling.
pub type Watch<'a> = dyn FnMut(Progress<'_>) + 'a;

/// The start of a step: the model's input, its prediction, and the next noise level.
#[derive(Debug)]
pub(crate) struct Begun<'a> {
    pub(crate) x: &'a Tensor,
    pub(crate) denoised: Tensor,
    pub(crate) sigma: f64,
    pub(crate) next: f64,
}

impl Begun<'_> {
    /// Returns `dx/dsigma`.
    fn slope(&self) -> Tensor {
        slope(self.x, &self.denoised, self.sigma)
    }

    /// Returns the step's length in sigma, which is negative.
    fn length(&self) -> f64 {
        self.next - self.sigma
    }
}

/// Steps through the levels: evaluates the model, calls `watch`, and lets `step` compute the
/// latents at the next level.
pub(crate) fn walk(
    denoise: &mut Denoise<'_>,
    mut x: Tensor,
    sigmas: &[f64],
    watch: &mut Watch<'_>,
    mut step: impl FnMut(&mut Denoise<'_>, Begun<'_>) -> Result<Tensor>,
) -> Result<Tensor> {
    let num_steps = sigmas.len().saturating_sub(1);
    for (index, pair) in sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = denoise(&x, sigma)?;
        watch(Progress {
            step: index,
            num_steps,
            sigma,
            x: &x,
            denoised: &denoised,
        });
        let begun = Begun {
            x: &x,
            denoised,
            sigma,
            next,
        };
        x = step(denoise, begun)?;
    }
    Ok(x)
}

/// Euler's method. Order 1.
///
/// # Errors
/// Errors of `denoise`.
pub fn euler(
    denoise: &mut Denoise<'_>,
    x: Tensor,
    sigmas: &[f64],
    watch: &mut Watch<'_>,
) -> Result<Tensor> {
    walk(denoise, x, sigmas, watch, |_, start| {
        // Not in place, since the caller can still hold the tensor.
        Ok(start.x + start.slope() * start.length())
    })
}

/// DDIM without noise (Song et al. 2021, eq. 12 with their sigma at 0): the clean latents and the
/// noise that the model predicts are mixed for the next level. The same numbers as [`euler`], to
/// rounding; ComfyUI's `ddim` *is* Euler's method.
///
/// # Errors
/// Errors of `denoise`.
pub fn ddim(
    denoise: &mut Denoise<'_>,
    x: Tensor,
    sigmas: &[f64],
    parameterization: Parameterization,
    watch: &mut Watch<'_>,
) -> Result<Tensor> {
    walk(denoise, x, sigmas, watch, |_, start| {
        let clean = &start.denoised * signal(parameterization, start.sigma);
        let noise = (start.x - clean) / start.sigma;
        Ok(start.denoised * signal(parameterization, start.next) + noise * start.next)
    })
}

/// Heun's method (Karras et al. 2022, algorithm 2): the mean of the slopes at both ends of a step.
/// Order 2, two evaluations per step except the last, which has no slope at its end.
///
/// # Errors
/// Errors of `denoise`.
pub fn heun(
    denoise: &mut Denoise<'_>,
    x: Tensor,
    sigmas: &[f64],
    watch: &mut Watch<'_>,
) -> Result<Tensor> {
    walk(denoise, x, sigmas, watch, |denoise, start| {
        let before = start.slope();
        let end = start.x + &before * start.length();
        if start.next == 0.0 {
            return Ok(end);
        }
        let after = slope(&end, &denoise(&end, start.next)?, start.next);
        Ok(start.x + (before + after) * (0.5 * start.length()))
    })
}

/// DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): extrapolates the denoised latents linearly in
/// `-ln sigma` from the last two predictions. Order 2 with one evaluation per step.
///
/// The paper's variable is the logarithm of the signal-to-noise ratio. For eps and v that is
/// `-ln sigma`; for flow it is not, but ComfyUI uses `-ln sigma` for all. Both are of order 2, and
/// `-ln sigma` is finite at sigma 1. The weight of the extrapolation is half the ratio of this
/// step's length to the last one's, so a schedule with one long step after short ones overshoots
/// there: see docs/samplers.md on `normal`.
///
/// # Errors
/// Errors of `denoise`.
pub fn dpmpp_2m(
    denoise: &mut Denoise<'_>,
    x: Tensor,
    sigmas: &[f64],
    watch: &mut Watch<'_>,
) -> Result<Tensor> {
    // The previous prediction, and the length of the step that used it.
    let mut last: Option<(Tensor, f64)> = None;
    walk(denoise, x, sigmas, watch, |_, start| {
        let ratio = start.next / start.sigma;
        let length = (start.sigma / start.next).ln(); // infinite in the last step
        let target = match &last {
            Some((before, last_length)) if start.next > 0.0 => {
                let weight = 0.5 * length / last_length;
                &start.denoised * (1.0 + weight) - before * weight
            }
            _ => start.denoised.shallow_clone(),
        };
        last = Some((start.denoised, length));
        Ok(start.x * ratio + target * (1.0 - ratio))
    })
}

/// Returns `dx/dsigma`.
fn slope(x: &Tensor, denoised: &Tensor, sigma: f64) -> Tensor {
    (x - denoised) / sigma
}
