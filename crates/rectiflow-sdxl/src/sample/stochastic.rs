//! Samplers that add noise: each step goes below the next level and returns to it with new noise.
//!
//! Unlike the solvers of [`crate::solvers`], these differ between flow and eps or v: the amount of
//! signal in the latents at a level ([`signal`]) determines how much noise a step can add. The eps
//! form on a flow model produces latents whose noise does not match their sigma. ComfyUI's
//! arithmetic, including its flow forms, golden-tested in `tests/samplers.rs`.

use tch::Tensor;

use crate::{
    error::Result,
    flow::Parameterization,
    sample::{
        denoise::{Denoise, signal},
        noise::StepNoise,
        solvers::{Begun, Watch, walk},
    },
};

/// What a stochastic sampler needs besides the levels.
pub struct Stochastic<'a> {
    /// The parameterization, which defines the latents at a level.
    pub parameterization: Parameterization,
    /// Share of the noise that is replaced: usually 1; 0 makes the sampler deterministic.
    pub eta: f64,
    /// Source of the new noise.
    pub noise: &'a mut StepNoise<'a>,
}

impl std::fmt::Debug for Stochastic<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stochastic({}, eta {})", self.parameterization, self.eta)
    }
}

/// Euler's method to a level below the next one, then noise to return to the next one.
///
/// # Errors
/// Errors of `denoise`.
pub fn euler_ancestral(
    denoise: &mut Denoise<'_>,
    x: Tensor,
    sigmas: &[f64],
    stochastic: &mut Stochastic<'_>,
    watch: &mut Watch<'_>,
) -> Result<Tensor> {
    let (parameterization, eta) = (stochastic.parameterization, stochastic.eta);
    walk(denoise, x, sigmas, watch, |_, start| {
        let Begun { sigma, next, .. } = start;
        let rest = Renoise::between(parameterization, sigma, next, eta);
        let ratio = rest.down / sigma;
        let down = start.x * ratio + start.denoised * (1.0 - ratio);
        Ok(if rest.added > 0.0 {
            down * rest.scale + (stochastic.noise)(sigma, next) * rest.added
        } else {
            down * rest.scale
        })
    })
}

/// The end of an ancestral step: latents at the level `down` are scaled by `scale`, and noise of
/// standard deviation `added` is added.
#[derive(Debug)]
struct Renoise {
    down: f64,
    scale: f64,
    added: f64,
}

impl Renoise {
    /// For eps and v, Karras et al.'s `sigma_down^2 + sigma_up^2 = next^2`. For flow, a lower level
    /// in the same proportion as the step itself, `next * (1 + (next / sigma - 1) * eta)`; `scale`
    /// restores the next level's signal.
    fn between(parameterization: Parameterization, sigma: f64, next: f64, eta: f64) -> Self {
        if next == 0.0 || eta == 0.0 {
            return Self {
                down: next,
                scale: 1.0,
                added: 0.0,
            };
        }
        if parameterization == Parameterization::Flow {
            let down = next * (1.0 + (next / sigma - 1.0) * eta);
            let scale = signal(parameterization, next) / signal(parameterization, down);
            return Self {
                down,
                scale,
                added: (next.powi(2) - (down * scale).powi(2)).max(0.0).sqrt(),
            };
        }
        let added = (eta * next * (1.0 - (next / sigma).powi(2)).sqrt()).min(next);
        Self {
            down: (next * next - added * added).sqrt(),
            scale: 1.0,
            added,
        }
    }
}

/// DPM-Solver++(2M) for the reverse-time stochastic equation (Lu et al. 2022, appendix), midpoint
/// form: [`dpmpp_2m`] with noise, in the logarithm of the signal-to-noise ratio.
///
/// For flow, every sigma must be below 1: at 1 the latents have no signal and the logarithm is
/// infinite. The caller lowers the first level slightly
/// ([`crate::schedule::NoiseLevels::below_the_top`]).
///
/// [`dpmpp_2m`]: crate::solvers::dpmpp_2m
///
/// # Errors
/// Errors of `denoise`.
pub fn dpmpp_2m_sde(
    denoise: &mut Denoise<'_>,
    x: Tensor,
    sigmas: &[f64],
    stochastic: &mut Stochastic<'_>,
    watch: &mut Watch<'_>,
) -> Result<Tensor> {
    // The previous prediction, and the length of the step that used it.
    let mut last: Option<(Tensor, f64)> = None;
    let (parameterization, eta) = (stochastic.parameterization, stochastic.eta);
    walk(denoise, x, sigmas, watch, |_, start| {
        let Begun { sigma, next, .. } = start;
        if next == 0.0 {
            return Ok(start.denoised);
        }
        let step = SdeStep::between(parameterization, sigma, next, eta);
        let mut mixed = start.x * step.kept + &start.denoised * step.share;
        if let Some((before, last_length)) = &last {
            // The second order: the denoised latents extrapolated to the middle of the step.
            let weight = 0.5 * step.share * step.length / last_length;
            mixed += (&start.denoised - before) * weight;
        }
        last = Some((start.denoised, step.length));
        Ok(if step.added > 0.0 {
            mixed + (stochastic.noise)(sigma, next) * step.added
        } else {
            mixed
        })
    })
}

/// The weights of a step of [`dpmpp_2m_sde`].
struct SdeStep {
    /// Its length in the logarithm of the signal-to-noise ratio.
    length: f64,
    /// Of the noisy latents.
    kept: f64,
    /// Of the denoised latents.
    share: f64,
    /// Of the new noise.
    added: f64,
}

impl SdeStep {
    fn between(parameterization: Parameterization, sigma: f64, next: f64, eta: f64) -> Self {
        let signal_before = signal(parameterization, sigma);
        let signal_after = signal(parameterization, next);
        let length = (signal_after / next).ln() - (signal_before / sigma).ln();
        Self {
            length,
            kept: next / sigma * (-length * eta).exp(),
            share: -(-length * (eta + 1.0)).exp_m1() * signal_after,
            added: next * (-(-2.0 * length * eta).exp_m1()).sqrt(),
        }
    }
}
