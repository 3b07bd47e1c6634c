//! SDXL's original noise schedule, for eps and v models: 1000 steps, with betas whose square roots
//! are linear in the step; and the same schedule rescaled to zero terminal SNR, for v models.
//!
//! Training uses `alpha_bar` (diffusers' `alphas_cumprod`). Samplers use [`Steps::sigma`] and its
//! inverse [`Steps::timestep`], the variance-exploding form:
//! `x_ve = x / sqrt(alpha_bar) = x0 + sigma * noise`. These two reproduce ComfyUI's
//! `ModelSamplingDiscrete` including its fp32 roundings, because samples must agree with ComfyUI's
//! to the last step of the schedule.

use std::sync::LazyLock;

/// Number of training steps.
pub const NUM_STEPS: usize = 1000;
const BETA_START: f64 = 0.00085;
const BETA_END: f64 = 0.012;

/// The `alpha_bar` in place of 0 with which the last sigma of a zero-terminal-SNR schedule is
/// finite, 4518.76. ComfyUI, Forge and reForge use the same number.
const LAST_ALPHA_BAR: f64 = 4.897_345_189_085_343_5e-8;

/// The noise levels of the training steps.
#[derive(Debug)]
pub struct Steps {
    alpha_bars: Vec<f64>,
    sigmas: Vec<f32>,
    log_sigmas: Vec<f32>,
}

static SDXL: LazyLock<Steps> = LazyLock::new(|| Steps::new(alpha_bars()));
static ZERO_TERMINAL_SNR: LazyLock<Steps> = LazyLock::new(|| Steps::new(rescaled(&alpha_bars())));

/// Returns SDXL's schedule.
pub fn sdxl() -> &'static Steps {
    &SDXL
}

/// Returns SDXL's schedule rescaled so that the last step is pure noise (Lin et al., 2023, arXiv
/// 2305.08891).
pub fn zero_terminal_snr() -> &'static Steps {
    &ZERO_TERMINAL_SNR
}

/// Returns the picture's share of the variance at each step of SDXL's schedule.
fn alpha_bars() -> Vec<f64> {
    let start = BETA_START.sqrt();
    let end = BETA_END.sqrt();
    let mut alpha_bars = Vec::new();
    let mut alpha_bar: f64 = 1.0;
    for step in 0..NUM_STEPS {
        let root = start + (end - start) * step as f64 / (NUM_STEPS - 1) as f64;
        alpha_bar *= 1.0 - root * root;
        alpha_bars.push(alpha_bar);
    }
    alpha_bars
}

/// Shifts the square roots so that the last is 0, and scales them so that the first stays.
fn rescaled(alpha_bars: &[f64]) -> Vec<f64> {
    let first = alpha_bars[0].sqrt();
    let last = alpha_bars[NUM_STEPS - 1].sqrt();
    let mut rescaled = Vec::new();
    for alpha_bar in alpha_bars {
        let root = (alpha_bar.sqrt() - last) * (first / (first - last));
        rescaled.push(root * root);
    }
    rescaled
}

impl Steps {
    fn new(alpha_bars: Vec<f64>) -> Self {
        let mut sigmas = Vec::new();
        let mut log_sigmas = Vec::new();
        for &alpha_bar in &alpha_bars {
            let alpha_bar = if alpha_bar == 0.0 {
                LAST_ALPHA_BAR
            } else {
                alpha_bar
            };
            let sigma = ((1.0 - alpha_bar) / alpha_bar).sqrt();
            sigmas.push(sigma as f32);
            log_sigmas.push(sigma.ln() as f32);
        }
        Self {
            alpha_bars,
            sigmas,
            log_sigmas,
        }
    }

    /// Returns the picture's share of the variance at a training step, 0 to 999.
    pub fn alpha_bar(&self, step: usize) -> f64 {
        self.alpha_bars[step]
    }

    /// Returns the noise levels of all steps, rising from 0.0292 to 14.61, or to 4518.76 with zero
    /// terminal SNR.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// Returns the noise level at a timestep, interpolated linearly in the logarithm between two
    /// steps.
    pub fn sigma(&self, timestep: f32) -> f32 {
        let t = timestep.clamp(0.0, (NUM_STEPS - 1) as f32);
        let weight = t.fract();
        let at = |index: f32| self.log_sigmas[index as usize];
        let log_sigma = (1.0 - weight) * at(t.floor()) + weight * at(t.ceil());
        f64::from(log_sigma).exp() as f32
    }

    /// Returns the step whose noise level is nearest to `sigma` in the logarithm (the lower of two
    /// equally near).
    pub fn timestep(&self, sigma: f32) -> usize {
        let log_sigma = f64::from(sigma).ln() as f32;
        let mut nearest = (0, f32::INFINITY);
        for (step, known) in self.log_sigmas.iter().enumerate() {
            let distance = (log_sigma - known).abs();
            if distance < nearest.1 {
                nearest = (step, distance);
            }
        }
        nearest.0
    }
}

/// Returns the training step of a time in [0, 1]: `floor(1000 * time)`, at most 999.
pub fn training_step(time: f64) -> usize {
    ((time * NUM_STEPS as f64) as usize).min(NUM_STEPS - 1)
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
        for steps in [sdxl(), zero_terminal_snr()] {
            for step in 0..NUM_STEPS {
                assert_eq!(steps.timestep(steps.sigma(step as f32)), step);
                assert_eq!(steps.timestep(steps.sigmas()[step]), step);
            }
            assert_eq!(steps.timestep(1e-3), 0);
            assert_eq!(steps.timestep(1e5), 999);
        }
        assert_eq!(sdxl().timestep(80.0), 999);
        assert!((sdxl().sigmas()[999] - 14.6146).abs() < 1e-4);
        assert!((zero_terminal_snr().sigmas()[999] - 4518.7637).abs() < 1e-3);
    }

    #[test]
    fn zero_terminal_snr_keeps_the_first_step_and_ends_in_pure_noise() {
        let (plain, rescaled) = (sdxl(), zero_terminal_snr());
        assert_eq!(rescaled.alpha_bar(0), plain.alpha_bar(0));
        assert_eq!(rescaled.alpha_bar(999), 0.0);
        for step in 1..NUM_STEPS {
            assert!(rescaled.alpha_bar(step) < plain.alpha_bar(step), "{step}");
            assert!(rescaled.alpha_bar(step) < rescaled.alpha_bar(step - 1));
        }
    }

    #[test]
    fn training_steps_are_whole_and_in_range() {
        assert_eq!(training_step(0.0), 0);
        assert_eq!(training_step(0.999_999), 999);
        assert_eq!(training_step(1.0), 999);
        assert_eq!(training_step(0.5), 500);
    }
}
