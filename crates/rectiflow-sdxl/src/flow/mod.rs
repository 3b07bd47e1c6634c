//! Flow matching, defined once: training and sampling both use this file, so their times cannot
//! differ.
//!
//! **The time convention.** `sigma` runs from 0 (the picture) to 1 (pure noise):
//!
//! ```text
//! x      = (1 - sigma) * x0 + sigma * noise        the UNet's input
//! target = noise - x0                              dx/dsigma, the UNet's target
//! x0     = x - sigma * target                      the estimate of the picture
//! t      = 1000 * sigma                            the UNet's timestep: a float, never rounded
//! ```
//!
//! The older objectives (eps and v on SDXL's noise schedule) are here too, behind the same
//! [`Objective`]: a flow model is nearly always a fine-tune of an eps model and is compared with
//! one. Their schedule is in [`crate::discrete`].
//!
//! Nothing here draws a random number: the caller passes a quantile for each sample and the noise,
//! and so chooses their keys. With [`stratified_quantile`] each sample of a global step has its own
//! quantile cell, which leaves the marginal distribution of sigma unchanged and removes most of its
//! variance from the step's loss.
//!
//! Tensors: `x0`, `noise`, `x` and targets are `[b, 4, h, w]` in fp32, latents already multiplied
//! by the VAE's scaling factor. Scalars per sample are `[b]`.

pub mod discrete;

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use statrs::function::erf::erfc_inv;
use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// The UNet's timestep at sigma 1: SDXL was trained with 1000 steps, and flow keeps that scale.
pub const TIMESTEP_SCALE: f64 = 1000.0;

/// The quantity that a model predicts, which also defines its time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Parameterization {
    /// The velocity `noise - x0` along straight lines (rectified flow).
    #[default]
    Flow,
    /// The noise, on SDXL's scaled-linear schedule.
    Eps,
    /// `sqrt(abar) * noise - sqrt(1 - abar) * x0`, on SDXL's scaled-linear schedule.
    V,
    /// As `v`, on that schedule rescaled to zero terminal SNR: its last step is pure noise (arXiv
    /// 2305.08891). There is no such variant of eps, since pure noise tells nothing about x0.
    #[serde(rename = "v_ztsnr")]
    VZtsnr,
}

impl Parameterization {
    /// All of them, with their names in files and on the command line.
    pub const ALL: [(&'static str, Self); 4] = [
        ("flow", Self::Flow),
        ("eps", Self::Eps),
        ("v", Self::V),
        ("v_ztsnr", Self::VZtsnr),
    ];

    /// Returns true if the model predicts v.
    pub fn predicts_v(self) -> bool {
        matches!(self, Self::V | Self::VZtsnr)
    }

    /// Returns the noise schedule of an eps or v model. A flow model has none; for it this is the
    /// schedule of the eps models that it is compared with.
    pub fn steps(self) -> &'static discrete::Steps {
        match self {
            Self::Flow | Self::Eps | Self::V => discrete::sdxl(),
            Self::VZtsnr => discrete::zero_terminal_snr(),
        }
    }
}

impl fmt::Display for Parameterization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, _) = Self::ALL
            .iter()
            .find(|(_, value)| value == self)
            .expect("ALL has every variant");
        f.write_str(name)
    }
}

impl FromStr for Parameterization {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match Self::ALL.iter().find(|(known, _)| *known == name) {
            Some((_, value)) => Ok(*value),
            None => Err(Error::unknown_name(
                "parameterization",
                name,
                &Self::ALL.map(|(name, _)| name),
            )),
        }
    }
}

/// The distribution of training sigmas (flow only; eps and v draw their timestep uniformly).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SigmaDistribution {
    /// `sigmoid(u)` with `u ~ N(ln shift, 1)`: the distribution of logit-normal draws after the
    /// resolution shift.
    #[default]
    LogitNormal,
    /// Uniform on (0, 1].
    Uniform,
}

/// The `[objective]` section of a recipe: the training target and the noise levels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ObjectiveSettings {
    /// `flow`, `eps`, `v`, or `v_ztsnr` (v with zero terminal SNR). Flow is the purpose of this
    /// program; eps trains base models to start from.
    pub parameterization: Parameterization,
    /// `logit_normal` or `uniform`; flow only.
    pub sigmas: SigmaDistribution,
    /// Centre of the logit-normal distribution, in odds: 3 puts the median sigma at 0.75. Positive;
    /// 1 means unshifted. Flow only.
    pub shift: f64,
    /// Whether each sample of a global step has its own quantile cell, instead of an independent
    /// draw. This reduces the variance at no cost.
    pub stratified: bool,
    /// Gamma of the min-SNR loss weights (5 in the paper, arXiv 2303.09556); absent, all timesteps
    /// have equal weight. Eps and v only.
    pub min_snr_gamma: Option<f64>,
}

impl Default for ObjectiveSettings {
    fn default() -> Self {
        Self {
            parameterization: Parameterization::Flow,
            sigmas: SigmaDistribution::LogitNormal,
            shift: 3.0,
            stratified: true,
            min_snr_gamma: None,
        }
    }
}

/// Checked [`ObjectiveSettings`]: noising, targets and loss weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Objective {
    settings: ObjectiveSettings,
    is_aligned: bool,
}

/// A micro-batch ready for the UNet.
#[derive(Debug)]
pub struct Noised {
    /// `[b, 4, h, w]` fp32: the UNet's input.
    pub sample: Tensor,
    /// `[b]` fp32: the UNet's timestep.
    pub timestep: Tensor,
    /// `[b, 4, h, w]` fp32: the UNet's target.
    pub target: Tensor,
    /// `[b]` fp32: weight of each sample's mean squared error; 1 for flow.
    pub weights: Tensor,
}

impl Objective {
    /// Checks the settings; one error reports all problems.
    pub fn new(settings: ObjectiveSettings) -> Result<Self> {
        let mut problems = Vec::new();
        if !(settings.shift.is_finite() && settings.shift > 0.0) {
            problems.push(format!(
                "shift is {}, expected a positive number (3 is the default)",
                settings.shift
            ));
        }
        if let Some(gamma) = settings.min_snr_gamma {
            if !(gamma.is_finite() && gamma > 0.0) {
                problems.push(format!(
                    "min_snr_gamma is {gamma}, expected a positive number (5 is usual)"
                ));
            }
            if settings.parameterization == Parameterization::Flow {
                problems.push(
                    "min_snr_gamma has no meaning for flow, whose loss is unweighted: remove it"
                        .into(),
                );
            }
        }
        if problems.is_empty() {
            Ok(Self {
                settings,
                is_aligned: false,
            })
        } else {
            Err(Error::invalid("objective", &problems))
        }
    }

    /// Returns flow on the inputs known to an eps model, for comparison: samples scaled to unit
    /// variance, and the timestep of SDXL's schedule with the same signal-to-noise ratio (arXiv
    /// 2506.02221). Targets stay velocities. No sampler or export supports it.
    pub fn aligned(self) -> Self {
        Self {
            is_aligned: true,
            ..self
        }
    }

    /// Checks that a base that predicts `base` can be trained with this objective. Any can be
    /// converted to another, but a recipe that says `v` for a base with zero terminal SNR is a
    /// mistake: the schedule would change unnoticed.
    ///
    /// # Errors
    /// [`Error::Invalid`] with both.
    pub fn check_base(&self, base: Option<Parameterization>) -> Result<()> {
        let own = self.settings.parameterization;
        if own == Parameterization::V && base == Some(Parameterization::VZtsnr) {
            let problem = "parameterization is v, but model.base has zero terminal SNR \
                           (rescale_betas_zero_snr, or the tensor ztsnr): choose v_ztsnr";
            return Err(Error::invalid("objective", &[problem.into()]));
        }
        Ok(())
    }

    /// Returns the settings.
    pub fn settings(&self) -> &ObjectiveSettings {
        &self.settings
    }

    /// Returns the quantile of one sample of a global step of `count` samples: inside its own
    /// `cell` if the objective is stratified, else `jitter` alone. `jitter` is uniform on [0, 1);
    /// cells are a permutation of `0..count`, keyed by the caller.
    pub fn quantile(&self, cell: u64, count: u64, jitter: f64) -> f64 {
        if self.settings.stratified {
            stratified_quantile(cell, count, jitter)
        } else {
            jitter
        }
    }

    /// Returns the training time at a quantile, in (0, 1]: sigma for flow, timestep / 1000 for eps
    /// and v.
    pub fn time(&self, quantile: f64) -> f64 {
        match (self.settings.parameterization, self.settings.sigmas) {
            (Parameterization::Flow, SigmaDistribution::LogitNormal) => {
                logit_normal_sigma(quantile, self.settings.shift)
            }
            _ => inside(quantile),
        }
    }

    /// Adds noise to `x0` at these times (one per sample, from [`Self::time`]).
    ///
    /// For eps and v the timestep is the integer `floor(1000 * time)`, at most 999.
    pub fn noised(&self, x0: &Tensor, noise: &Tensor, times: &[f64]) -> Noised {
        assert_eq!(x0.size(), noise.size(), "noise has the shape of x0");
        assert_eq!(
            x0.size()[0] as usize,
            times.len(),
            "one time for each sample"
        );
        match self.settings.parameterization {
            Parameterization::Flow => self.noised_flow(x0, noise, times),
            Parameterization::Eps | Parameterization::V | Parameterization::VZtsnr => {
                self.noised_discrete(x0, noise, times)
            }
        }
    }

    fn noised_flow(&self, x0: &Tensor, noise: &Tensor, times: &[f64]) -> Noised {
        let sigma = per_sample(times.iter().copied(), x0);
        let mut sample = interpolate(x0, noise, &sigma);
        let mut timestep = timestep(&sigma);
        if self.is_aligned {
            (sample, timestep) = aligned(&sample, times);
        }
        Noised {
            sample,
            timestep,
            target: velocity(x0, noise),
            weights: sigma.ones_like(),
        }
    }

    fn noised_discrete(&self, x0: &Tensor, noise: &Tensor, times: &[f64]) -> Noised {
        let steps = self.settings.parameterization.steps();
        let predicts_v = self.settings.parameterization.predicts_v();
        // One number per sample.
        let mut timesteps = Vec::new();
        let mut signal = Vec::new();
        let mut spoil = Vec::new();
        let mut weights = Vec::new();
        for &time in times {
            let step = discrete::training_step(time);
            let alpha_bar = steps.alpha_bar(step);
            timesteps.push(step as f64);
            signal.push(alpha_bar.sqrt());
            spoil.push((1.0 - alpha_bar).sqrt());
            let gamma = self.settings.min_snr_gamma;
            weights.push(discrete::min_snr_weight(alpha_bar, gamma, predicts_v));
        }
        // Tensors.
        let signal = spread(&per_sample(signal.into_iter(), x0));
        let spoil = spread(&per_sample(spoil.into_iter(), x0));
        Noised {
            sample: &signal * x0 + &spoil * noise,
            timestep: per_sample(timesteps.into_iter(), x0),
            target: if predicts_v {
                &signal * noise - &spoil * x0
            } else {
                noise.shallow_clone()
            },
            weights: per_sample(weights.into_iter(), x0),
        }
    }
}

/// Returns `(cell + jitter) / count`: a uniform number inside cell `cell` of `count` equal cells of
/// [0, 1).
///
/// With cells a permutation of `0..count` and uniform jitters, each number is uniform by itself,
/// and together they cover the range evenly.
pub fn stratified_quantile(cell: u64, count: u64, jitter: f64) -> f64 {
    assert!(cell < count, "cell {cell} of {count}");
    (cell as f64 + jitter) / count as f64
}

/// Returns the sigma at a quantile of `sigmoid(N(ln shift, 1))`, in (0, 1).
pub fn logit_normal_sigma(quantile: f64, shift: f64) -> f64 {
    let normal = -std::f64::consts::SQRT_2 * erfc_inv(2.0 * inside(quantile));
    1.0 / (1.0 + (-(shift.ln() + normal)).exp())
}

/// Keeps a quantile away from 0 and 1, where the normal distribution is infinite. 2^-54 is 8
/// standard deviations from the mean.
fn inside(quantile: f64) -> f64 {
    const EDGE: f64 = 1.0 / (1u64 << 54) as f64;
    quantile.clamp(EDGE, 1.0 - f64::EPSILON)
}

/// Returns `(1 - sigma) * x0 + sigma * noise`; sigma is `[b]`.
pub fn interpolate(x0: &Tensor, noise: &Tensor, sigma: &Tensor) -> Tensor {
    let sigma = spread(sigma);
    (1.0 - &sigma) * x0 + sigma * noise
}

/// Returns the velocity `noise - x0`, the target of flow matching.
pub fn velocity(x0: &Tensor, noise: &Tensor) -> Tensor {
    noise - x0
}

/// Returns a flow sample scaled as on SDXL's schedule, and its timestep there.
fn aligned(sample: &Tensor, times: &[f64]) -> (Tensor, Tensor) {
    let scales = times.iter().map(|sigma| 1.0 / (1.0 - sigma).hypot(*sigma));
    let timesteps = times
        .iter()
        .map(|sigma| discrete::sdxl().timestep((sigma / (1.0 - sigma)) as f32) as f64);
    (
        spread(&per_sample(scales, sample)) * sample,
        per_sample(timesteps, sample),
    )
}

/// Returns the picture that a velocity points to: `x - sigma * velocity`; sigma is `[b]`.
pub fn clean_estimate(x: &Tensor, velocity: &Tensor, sigma: &Tensor) -> Tensor {
    x - spread(sigma) * velocity
}

/// Returns the UNet's timestep at sigma: `1000 * sigma`, not rounded.
pub fn timestep(sigma: &Tensor) -> Tensor {
    sigma * TIMESTEP_SCALE
}

/// Returns the mean squared error of each sample, `[b]`, in fp32 for every input dtype: a bf16 sum
/// of 65,536 numbers has no meaningful digits.
pub fn per_sample_mse(prediction: &Tensor, target: &Tensor) -> Tensor {
    let difference = prediction.to_kind(Kind::Float) - target.to_kind(Kind::Float);
    difference
        .square()
        .mean_dim(&[1i64, 2, 3][..], false, Kind::Float)
}

/// `[b]` -> `[b, 1, 1, 1]`.
fn spread(scalars: &Tensor) -> Tensor {
    scalars.view([-1, 1, 1, 1])
}

/// Returns one fp32 number per sample, `[b]`, on the device of `like`.
fn per_sample(values: impl Iterator<Item = f64>, like: &Tensor) -> Tensor {
    let values: Vec<f32> = values.map(|value| value as f32).collect();
    // Without waiting for what the device has to do before.
    let values = Tensor::from_slice(&values);
    values.to_device_(like.device(), values.kind(), true, false)
}

#[cfg(test)]
mod tests {
    use super::*;
    // Locks torch's generator: another draw would change the noise of tests beside this one.
    use crate::sample::noise::initial_noise;

    fn objective(settings: ObjectiveSettings) -> Objective {
        Objective::new(settings).unwrap()
    }

    #[test]
    fn logit_normal_quantiles_are_those_of_the_shifted_distribution() {
        // The median of sigmoid(N(ln s, 1)) is s / (1 + s); one standard deviation multiplies the
        // odds by e.
        for shift in [0.5, 1.0, 3.0, 6.0] {
            let odds = |quantile: f64| {
                let sigma = logit_normal_sigma(quantile, shift);
                sigma / (1.0 - sigma)
            };
            assert!((odds(0.5) / shift - 1.0).abs() < 1e-12);
            assert!(
                (odds(0.841_344_746_068_543) / (shift * std::f64::consts::E) - 1.0).abs() < 1e-9
            );
            assert!((odds(0.158_655_253_931_457) * std::f64::consts::E / shift - 1.0).abs() < 1e-9);
        }
        // Figures of the reference for shift 3: 5.7% of draws above 0.936, 0.05% below 0.1.
        let share_below = |sigma: f64| {
            (0..100_000)
                .filter(|i| logit_normal_sigma((*i as f64 + 0.5) / 1e5, 3.0) < sigma)
                .count()
        };
        assert!((share_below(0.936) as f64 / 1e5 - 0.943).abs() < 1e-3);
        assert!((share_below(0.1) as f64 / 1e5 - 0.0005).abs() < 1e-4);
    }

    #[test]
    fn aligned_inputs_are_those_of_sdxls_schedule() {
        // Timesteps of the reference; the schedule has no noise level as high as that of 0.97.
        let times = [0.1, 0.25, 0.5, 0.75, 0.9, 0.97];
        let noise = initial_noise(2, &[6, 4, 16, 16]);
        let x0 = initial_noise(3, &[6, 4, 16, 16]);
        let [native, aligned] = [false, true].map(|is_aligned| {
            let objective = objective(ObjectiveSettings::default());
            let objective = if is_aligned {
                objective.aligned()
            } else {
                objective
            };
            objective.noised(&x0, &noise, &times)
        });
        assert_eq!(
            Vec::<f32>::try_from(&aligned.timestep).unwrap(),
            [13.0, 95.0, 354.0, 673.0, 914.0, 999.0]
        );
        assert!(aligned.target.equal(&native.target));
        let steps = [13, 95, 354, 673, 914].map(|step| discrete::sdxl().alpha_bar(step));
        let as_trained =
            |abar: &f64, at: i64| abar.sqrt() * x0.get(at) + (1.0 - abar).sqrt() * noise.get(at);
        for (at, abar) in (0..).zip(&steps) {
            let difference = (as_trained(abar, at) - aligned.sample.get(at))
                .abs()
                .max()
                .double_value(&[]);
            assert!(difference < 0.02, "{at}: {difference}");
        }
    }

    #[test]
    fn shift_commutes_with_the_logit_normal() {
        // An unshifted draw mapped by s t / (1 + (s - 1) t) has the same distribution.
        for quantile in [1e-9, 0.01, 0.3, 0.77, 0.9999] {
            let t = logit_normal_sigma(quantile, 1.0);
            assert!((3.0 * t / (1.0 + 2.0 * t) - logit_normal_sigma(quantile, 3.0)).abs() < 1e-12);
        }
    }

    #[test]
    fn every_quantile_gives_a_usable_sigma() {
        for settings in [SigmaDistribution::LogitNormal, SigmaDistribution::Uniform] {
            let objective = objective(ObjectiveSettings {
                sigmas: settings,
                ..Default::default()
            });
            for quantile in [0.0, 1e-300, 0.5, 1.0 - f64::EPSILON, 1.0] {
                let sigma = objective.time(quantile);
                assert!(
                    sigma > 0.0 && sigma <= 1.0 && sigma.is_finite(),
                    "{settings:?} at {quantile}: {sigma}"
                );
            }
        }
    }

    #[test]
    fn stratified_cells_cover_the_range_once() {
        let objective = objective(ObjectiveSettings {
            sigmas: SigmaDistribution::Uniform,
            ..Default::default()
        });
        let count = 4096;
        let mut hit = vec![0; count as usize];
        for cell in 0..count {
            let jitter = (cell as f64 * 0.618_033_988).fract();
            hit[(objective.time(objective.quantile(cell, count, jitter)) * count as f64)
                as usize] += 1;
        }
        assert!(hit.iter().all(|&hits| hits == 1));
    }

    #[test]
    fn unstratified_draws_ignore_the_cell() {
        let objective = objective(ObjectiveSettings {
            stratified: false,
            ..Default::default()
        });
        assert_eq!(objective.quantile(7, 8, 0.25), 0.25);
    }

    #[test]
    fn noising_and_its_inverse_agree() {
        let x0 = initial_noise(1, &[3, 4, 5, 6]);
        let noise = initial_noise(2, &[3, 4, 5, 6]);
        let noised =
            objective(ObjectiveSettings::default()).noised(&x0, &noise, &[0.25, 1.0, 0.7501]);
        // Not rounded: 750.1, to fp32 precision.
        let timesteps = Vec::<f32>::try_from(&noised.timestep).unwrap();
        assert!(
            timesteps
                .iter()
                .zip([250.0, 1000.0, 750.1])
                .all(|(t, expected)| (t - expected).abs() < 1e-4)
        );
        let sigma = &noised.timestep / TIMESTEP_SCALE;
        let back = clean_estimate(&noised.sample, &noised.target, &sigma);
        assert!((back - &x0).abs().max().double_value(&[]) < 1e-5);
        assert!(
            (noised.sample.get(1) - noise.get(1))
                .abs()
                .max()
                .double_value(&[])
                < 1e-6
        );
        assert!(
            (noised.target - (&noise - &x0))
                .abs()
                .max()
                .double_value(&[])
                == 0.0
        );
    }

    #[test]
    fn mse_is_per_sample_and_in_fp32() {
        let target = Tensor::zeros([2, 4, 2, 2], (Kind::Float, tch::Device::Cpu));
        let prediction = Tensor::from_slice(&[1f32, 3.0])
            .view([2, 1, 1, 1])
            .expand([2, 4, 2, 2], false);
        let mse = per_sample_mse(&prediction.to_kind(Kind::BFloat16), &target);
        assert_eq!(mse.kind(), Kind::Float);
        assert_eq!(Vec::<f32>::try_from(mse).unwrap(), [1.0, 9.0]);
    }

    #[test]
    fn bad_settings_are_all_named() {
        let settings = ObjectiveSettings {
            shift: -1.0,
            min_snr_gamma: Some(0.0),
            ..Default::default()
        };
        let message = Objective::new(settings).unwrap_err().to_string();
        for word in ["shift is -1", "min_snr_gamma is 0", "no meaning for flow"] {
            assert!(message.contains(word), "{message}");
        }
        assert!(
            "flwo"
                .parse::<Parameterization>()
                .unwrap_err()
                .to_string()
                .contains("flow, eps, v, v_ztsnr")
        );
    }
}
