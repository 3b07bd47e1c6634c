//! SDXL's original noise schedule, for eps and v models: 1000 steps, with betas whose square roots
//! are linear in the step.
//!
//! Training uses `alpha_bar` (diffusers' `alphas_cumprod`). Samplers use [`sigma`] and its inverse
//! [`timestep`], the variance-exploding form: `x_ve = x / sqrt(alpha_bar) = x0 + sigma * noise`.
//! These two reproduce ComfyUI's `ModelSamplingDiscrete` including its fp32 roundings, because
//! samples must agree with ComfyUI's to the last step of the schedule.

use std::sync::LazyLock;

/// Number of training steps.
pub const NUM_STEPS: usize = 1000;
const BETA_START: f64 = 0.00085;
const BETA_END: f64 = 0.012;

struct Table {
    alpha_bars: Vec<f64>,
    sigmas: Vec<f32>,
    log_sigmas: Vec<f32>,
}

static TABLE: LazyLock<Table> = LazyLock::new(Table::new);

impl Table {
    fn new() -> Self {
        let start = BETA_START.sqrt();
        let end = BETA_END.sqrt();
        let mut table = Self {
            alpha_bars: Vec::new(),
            sigmas: Vec::new(),
            log_sigmas: Vec::new(),
        };
        let mut alpha_bar: f64 = 1.0;
        for step in 0..NUM_STEPS {
            let root = start + (end - start) * step as f64 / (NUM_STEPS - 1) as f64;
            alpha_bar *= 1.0 - root * root;
            let sigma = ((1.0 - alpha_bar) / alpha_bar).sqrt();
            table.alpha_bars.push(alpha_bar);
            table.sigmas.push(sigma as f32);
            table.log_sigmas.push(sigma.ln() as f32);
        }
        table
    }
}

/// Returns the picture's share of the variance at a training step, 0 to 999.
pub fn alpha_bar(step: usize) -> f64 {
    TABLE.alpha_bars[step]
}

/// Returns the training step of a time in [0, 1]: `floor(1000 * time)`, at most 999.
pub fn training_step(time: f64) -> usize {
    ((time * NUM_STEPS as f64) as usize).min(NUM_STEPS - 1)
}

/// Returns the noise levels of all steps, rising from 0.0292 to 14.61.
pub fn sigmas() -> &'static [f32] {
    &TABLE.sigmas
}

/// Returns the noise level at a timestep, interpolated linearly in the logarithm between two steps.
pub fn sigma(timestep: f32) -> f32 {
    let t = timestep.clamp(0.0, (NUM_STEPS - 1) as f32);
    let weight = t.fract();
    let at = |index: f32| TABLE.log_sigmas[index as usize];
    let log_sigma = (1.0 - weight) * at(t.floor()) + weight * at(t.ceil());
    f64::from(log_sigma).exp() as f32
}

/// Returns the step whose noise level is nearest to `sigma` in the logarithm (the lower of two
/// equally near).
pub fn timestep(sigma: f32) -> usize {
    let log_sigma = f64::from(sigma).ln() as f32;
    let mut nearest = (0, f32::INFINITY);
    for (step, known) in TABLE.log_sigmas.iter().enumerate() {
        let distance = (log_sigma - known).abs();
        if distance < nearest.1 {
            nearest = (step, distance);
        }
    }
    nearest.0
}

/// The loss weight of a step under min-SNR (Hang et al., 2023) with `gamma`, for an eps or a v
/// target; 1 without `gamma`.
pub(crate) fn min_snr_weight(alpha_bar: f64, gamma: Option<f64>, predicts_v: bool) -> f64 {
    let snr = alpha_bar / (1.0 - alpha_bar);
    match gamma {
        None => 1.0,
        Some(gamma) if predicts_v => snr.min(gamma) / (snr + 1.0),
        Some(gamma) => snr.min(gamma) / snr,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sigma_and_timestep_are_inverse_on_the_steps() {
        for step in 0..NUM_STEPS {
            assert_eq!(timestep(sigma(step as f32)), step);
            assert_eq!(timestep(sigmas()[step]), step);
        }
        assert_eq!(timestep(1e-3), 0);
        assert_eq!(timestep(80.0), 999);
        assert!((sigmas()[999] - 14.6146).abs() < 1e-4);
    }

    #[test]
    fn training_steps_are_whole_and_in_range() {
        assert_eq!(training_step(0.0), 0);
        assert_eq!(training_step(0.999_999), 999);
        assert_eq!(training_step(1.0), 999);
        assert_eq!(training_step(0.5), 500);
    }
}
