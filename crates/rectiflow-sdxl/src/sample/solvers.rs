//! Samplers without noise of their own: methods for the equation `dx/dsigma = (x - denoised) / sigma`.
//!
//! Plain functions of (denoise, x, sigmas), `x` being the latents at `sigmas[0]`. The equation is the same for flow as
//! for eps and v, so only [`ddim`], which is written the way its paper has it, is told which of them it is on. Each is
//! ComfyUI's arithmetic (k-diffusion's, where ComfyUI took it from there): golden-tested, in `tests/samplers.rs`.

use tch::Tensor;

use crate::{
    error::Result,
    flow::Parameterization,
    sample::denoise::{Denoise, signal},
};

/// What a sampler tells once a step, after it has seen the model's answer at the step's first noise level.
#[derive(Debug)]
pub struct Progress<'a> {
    /// Steps done before this one.
    pub step: usize,
    /// Steps in all.
    pub num_steps: usize,
    /// The noise level the model saw.
    pub sigma: f64,
    /// The noisy latents it saw. `[b, 4, h, w]`
    pub x: &'a Tensor,
    /// The clean latents it pointed to. `[b, 4, h, w]`
    pub denoised: &'a Tensor,
}

/// Who is told.
pub type Watch<'a> = dyn FnMut(Progress<'_>) + 'a;

/// Where a step begins: what the model saw, what it answered, and the noise level to go to.
#[derive(Debug)]
pub(crate) struct Begun<'a> {
    pub(crate) x: &'a Tensor,
    pub(crate) denoised: Tensor,
    pub(crate) sigma: f64,
    pub(crate) next: f64,
}

/// Goes from level to level: asks the model, tells who watches, and has `step` make the latents at the next level.
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
        watch(Progress { step: index, num_steps, sigma, x: &x, denoised: &denoised });
        x = step(denoise, Begun { x: &x, denoised, sigma, next })?;
    }
    Ok(x)
}

/// Euler's method. Order 1.
///
/// # Errors
/// What `denoise` returns.
pub fn euler(denoise: &mut Denoise<'_>, x: Tensor, sigmas: &[f64], watch: &mut Watch<'_>) -> Result<Tensor> {
    walk(denoise, x, sigmas, watch, |_, Begun { x, denoised, sigma, next }| {
        // Not in place: the caller may still hold the tensor.
        Ok(x + slope(x, &denoised, sigma) * (next - sigma))
    })
}

/// DDIM without noise (Song et al. 2021, eq. 12 with their sigma at 0): the clean latents and the noise that the model
/// sees are mixed anew at the next level. The same numbers as [`euler`], to rounding; ComfyUI's `ddim` *is* Euler's.
///
/// # Errors
/// What `denoise` returns.
pub fn ddim(
    denoise: &mut Denoise<'_>,
    x: Tensor,
    sigmas: &[f64],
    parameterization: Parameterization,
    watch: &mut Watch<'_>,
) -> Result<Tensor> {
    walk(denoise, x, sigmas, watch, |_, Begun { x, denoised, sigma, next }| {
        let noise = (x - &denoised * signal(parameterization, sigma)) / sigma;
        Ok(denoised * signal(parameterization, next) + noise * next)
    })
}

/// Heun's method (Karras et al. 2022, algorithm 2): the mean of the slopes at both ends of a step. Order 2, two
/// evaluations a step but for the last, which has no slope at its end.
///
/// # Errors
/// What `denoise` returns.
pub fn heun(denoise: &mut Denoise<'_>, x: Tensor, sigmas: &[f64], watch: &mut Watch<'_>) -> Result<Tensor> {
    walk(denoise, x, sigmas, watch, |denoise, Begun { x, denoised, sigma, next }| {
        let before = slope(x, &denoised, sigma);
        let end = x + &before * (next - sigma);
        if next == 0.0 {
            return Ok(end);
        }
        let after = slope(&end, &denoise(&end, next)?, next);
        Ok(x + (before + after) * (0.5 * (next - sigma)))
    })
}

/// DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): the denoised latents are taken to move on a straight line through the
/// last two answers, in `-ln sigma`. Order 2 for one evaluation a step.
///
/// The paper's variable is the logarithm of the signal-to-noise ratio. For eps and v that is `-ln sigma`; for flow it is
/// not, and ComfyUI keeps `-ln sigma`. Both are of order 2, and this one is finite at sigma 1. The line's weight is half
/// the ratio of this step's length to the last one's, so a schedule with one long step after short ones overshoots
/// there: see docs/samplers.md on `normal`.
///
/// # Errors
/// What `denoise` returns.
pub fn dpmpp_2m(denoise: &mut Denoise<'_>, x: Tensor, sigmas: &[f64], watch: &mut Watch<'_>) -> Result<Tensor> {
    let mut last: Option<(Tensor, f64)> = None; // the answer before, and the length of the step after it
    walk(denoise, x, sigmas, watch, |_, Begun { x, denoised, sigma, next }| {
        let length = (sigma / next).ln(); // infinite in the last step
        let target = match &last {
            Some((before, last_length)) if next > 0.0 => {
                let weight = 0.5 * length / last_length;
                &denoised * (1.0 + weight) - before * weight
            }
            _ => denoised.shallow_clone(),
        };
        last = Some((denoised, length));
        Ok(x * (next / sigma) + target * (1.0 - next / sigma))
    })
}

/// `dx/dsigma`.
fn slope(x: &Tensor, denoised: &Tensor, sigma: f64) -> Tensor {
    (x - denoised) / sigma
}
