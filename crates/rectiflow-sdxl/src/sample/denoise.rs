//! A model as a denoiser: maps noisy latents and a noise level to the predicted clean latents.
//!
//! The three parameterizations are unified here, so that samplers and guidance are written once. In
//! this form an eps or v model's latents are `x0 + sigma * noise` (not scaled to unit variance), a
//! flow model's are `(1 - sigma) * x0 + sigma * noise`. Both follow the same equation,
//! `dx/dsigma = (x - denoised) / sigma`; a sampler that adds noise, and so depends on the form,
//! uses [`signal`].

use tch::{Kind, Tensor};

use crate::{
    error::Result,
    flow::{self, Parameterization},
};

/// A function from (noisy latents `[b, 4, h, w]`, noise level) to clean latents of the same shape.
pub type Denoise<'a> = dyn FnMut(&Tensor, f64) -> Result<Tensor> + 'a;

/// Returns the factor of the clean latents in the latents at a level: `1 - sigma` for flow, 1 for
/// eps and v.
pub fn signal(parameterization: Parameterization, sigma: f64) -> f64 {
    match parameterization {
        Parameterization::Flow => 1.0 - sigma,
        Parameterization::Eps | Parameterization::V | Parameterization::VZtsnr => 1.0,
    }
}

/// Returns the initial latents: unit noise scaled to the first level.
///
/// For an eps or v model that starts at the highest level, the variance is that of its noisiest
/// training inputs, `1 + sigma^2`.
pub fn noised_start(
    parameterization: Parameterization,
    noise: &Tensor,
    sigma: f64,
    sigma_max: f64,
) -> Tensor {
    let starts_at_top = sigma >= sigma_max * (1.0 - 1e-5);
    if parameterization != Parameterization::Flow && starts_at_top {
        noise * (1.0 + sigma * sigma).sqrt()
    } else {
        noise * sigma
    }
}

/// Evaluates a model: scales its input, computes its timestep, and converts its output to clean
/// latents. `model` takes (input `[b, 4, h, w]`, timestep `[b]` fp32) and returns a tensor of the
/// input's shape.
///
/// # Errors
/// Errors of `model`.
pub fn denoised_by(
    parameterization: Parameterization,
    x: &Tensor,
    sigma: f64,
    model: &mut dyn FnMut(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    if parameterization == Parameterization::Flow {
        let sigma = for_each_row(x, sigma);
        let velocity = widened(model(x, &flow::timestep(&sigma))?);
        return Ok(flow::clean_estimate(x, &velocity, &sigma));
    }
    let variance = sigma * sigma + 1.0;
    let step = parameterization.steps().timestep(sigma as f32);
    let timestep = for_each_row(x, step as f64);
    let output = widened(model(&(x / variance.sqrt()), &timestep)?);
    Ok(if parameterization.predicts_v() {
        x / variance - output * (sigma / variance.sqrt())
    } else {
        x - output * sigma
    })
}

/// Returns a value for each row of `x`. `[b]` fp32
fn for_each_row(x: &Tensor, value: f64) -> Tensor {
    Tensor::full([x.size()[0]], value, (Kind::Float, x.device()))
}

/// Converts to at least fp32: a bf16 model's outputs are accumulated over many steps.
fn widened(output: Tensor) -> Tensor {
    if output.kind() == Kind::Double {
        output
    } else {
        output.to_kind(Kind::Float)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_has_the_first_levels_noise() {
        let noise = Tensor::from_slice(&[1.0f64]);
        let start = |parameterization, sigma| {
            noised_start(parameterization, &noise, sigma, 14.0).double_value(&[0])
        };
        assert_eq!(start(Parameterization::Flow, 1.0), 1.0);
        assert_eq!(start(Parameterization::Flow, 0.9), 0.9);
        assert_eq!(start(Parameterization::Eps, 14.0), 197f64.sqrt());
        assert_eq!(start(Parameterization::V, 3.0), 3.0);
    }
}
