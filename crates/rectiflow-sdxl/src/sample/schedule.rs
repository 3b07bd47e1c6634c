//! Sampling schedules: the noise levels that a sampler visits. Pure functions, equal to ComfyUI's
//! of the same names.
//!
//! Every number is rounded to fp32 where ComfyUI's is. The schedule determines the picture,
//! `kl_optimal` amplifies a rounding error by 200 at the noisy end of an eps model, and exports
//! promise that the same workflow draws the same picture. The quirks are kept for the same reason:
//!
//! - `normal` shifts the last sigma twice, so it ends above `sigma_min`;
//! - `beta` drops a step that falls on the same table entry as the one before, so it can return
//!   fewer steps than requested;
//! - `ddim_uniform` walks the table in whole strides, so it can return more steps than requested,
//!   and starts below `sigma_max`.
//!
//! One exception: `kl_optimal` with a single step is 0 / 0 in ComfyUI and `[sigma_max, 0]` here.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use statrs::function::beta::inv_beta_reg;

use crate::{
    error::{Error, Result},
    flow::{Parameterization, discrete::Steps},
};

/// The largest number of steps, which is the number of training timesteps.
pub const MAX_STEPS: usize = 1000;

/// A named rule that picks sigmas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Equal strides through the table of 1000 sigmas.
    #[default]
    Simple,
    /// Equal strides in timestep from the first to the last.
    Normal,
    /// As `normal` with one more step, of which the last is dropped.
    SgmUniform,
    /// Quantiles of Beta(0.6, 0.6) (arXiv 2407.12173): dense at both ends.
    Beta,
    /// Karras et al. 2022 with rho 7: dense at the clean end.
    Karras,
    /// Equal strides in the logarithm of sigma.
    Exponential,
    /// Whole strides through the table from its second entry.
    DdimUniform,
    /// Equal strides in the arc tangent of sigma ("Align your steps", closed form for Gaussian
    /// data).
    KlOptimal,
}

impl Schedule {
    /// All schedules with their names in recipes and on the command line.
    pub const ALL: [(&'static str, Self); 8] = [
        ("simple", Self::Simple),
        ("normal", Self::Normal),
        ("sgm_uniform", Self::SgmUniform),
        ("beta", Self::Beta),
        ("karras", Self::Karras),
        ("exponential", Self::Exponential),
        ("ddim_uniform", Self::DdimUniform),
        ("kl_optimal", Self::KlOptimal),
    ];

    /// Returns the sigmas from the first to the final 0: usually `steps + 1` values, see the quirks
    /// above.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `steps` is not in `1..=1000`.
    pub fn sigmas(self, steps: usize, levels: &NoiseLevels) -> Result<Vec<f64>> {
        check_steps(steps)?;
        Ok(self.unchecked(steps, levels))
    }

    /// As [`Self::sigmas`] of `steps + 1`, which can exceed [`MAX_STEPS`]: for samplers that drop a
    /// level.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `steps` is not in `1..=1000`.
    pub fn sigmas_with_one_more(self, steps: usize, levels: &NoiseLevels) -> Result<Vec<f64>> {
        check_steps(steps)?;
        Ok(self.unchecked(steps + 1, levels))
    }

    fn unchecked(self, steps: usize, levels: &NoiseLevels) -> Vec<f64> {
        let sigmas = match self {
            Self::Simple => simple(steps, levels),
            Self::Normal => normal(steps, levels),
            Self::SgmUniform => sgm_uniform(steps, levels),
            Self::Beta => beta(steps, levels),
            Self::Karras => karras(steps, levels),
            Self::Exponential => exponential(steps, levels),
            Self::DdimUniform => ddim_uniform(steps, levels),
            Self::KlOptimal => kl_optimal(steps, levels),
        };
        sigmas.into_iter().map(f64::from).collect()
    }
}

fn check_steps(steps: usize) -> Result<()> {
    if (1..=MAX_STEPS).contains(&steps) {
        return Ok(());
    }
    Err(Error::invalid(
        "sampling",
        &[format!("steps is {steps}, expected 1 to {MAX_STEPS}")],
    ))
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, _) = Self::ALL
            .iter()
            .find(|(_, schedule)| schedule == self)
            .expect("ALL has every variant");
        f.write_str(name)
    }
}

impl FromStr for Schedule {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match Self::ALL.iter().find(|(known, _)| *known == name) {
            Some((_, schedule)) => Ok(*schedule),
            None => Err(Error::unknown_name(
                "schedule",
                name,
                &Self::ALL.map(|(name, _)| name),
            )),
        }
    }
}

/// The noise levels of a model: a table of 1000 rising sigmas, and sigma as a function of the
/// timestep.
#[derive(Clone, Debug)]
pub struct NoiseLevels {
    table: Vec<f32>,
    source: Source,
}

/// Where the levels come from.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// The straight path of a flow model, shifted.
    Flow { shift: f64 },
    /// The noise schedule of an eps or v model.
    Steps(&'static Steps),
}

impl NoiseLevels {
    /// Returns the levels of a model: for flow `ModelSamplingSD3(shift)`, for eps and v the noise
    /// schedule (`shift` is unused).
    ///
    /// # Errors
    /// [`Error::Invalid`] if the shift of a flow model is not a positive number.
    pub fn new(parameterization: Parameterization, shift: f64) -> Result<Self> {
        match parameterization {
            Parameterization::Flow => Self::flow(shift),
            Parameterization::Eps | Parameterization::V | Parameterization::VZtsnr => {
                let steps = parameterization.steps();
                Ok(Self {
                    table: steps.sigmas().to_vec(),
                    source: Source::Steps(steps),
                })
            }
        }
    }

    fn flow(shift: f64) -> Result<Self> {
        if !(shift.is_finite() && shift > 0.0) {
            let problem = format!(
                "shift is {shift}, expected a positive number (3 to 6 is the useful range)"
            );
            return Err(Error::invalid("sampling", &[problem]));
        }
        let table = (1..=1000)
            .map(|step| shifted(shift, step as f32 / 1000.0 * 1000.0))
            .collect();
        Ok(Self {
            table,
            source: Source::Flow { shift },
        })
    }

    /// Returns the lowest level of the table.
    pub fn sigma_min(&self) -> f64 {
        f64::from(self.table[0])
    }

    /// Returns the highest level of the table: 1 for flow, 14.61 for eps and v, 4518.76 with zero
    /// terminal SNR.
    pub fn sigma_max(&self) -> f64 {
        f64::from(self.last())
    }

    /// Returns `sigmas` with a first level of 1 lowered (flow only), since the logarithm of the
    /// signal-to-noise ratio is infinite at 1. The new level lies 0.01% down the schedule, as in
    /// ComfyUI.
    pub fn below_the_top(&self, sigmas: &[f64]) -> Vec<f64> {
        let mut sigmas = sigmas.to_vec();
        if let (Source::Flow { shift }, Some(first)) = (self.source, sigmas.first_mut())
            && *first >= 1.0
        {
            let u = 1.0 - 1e-4;
            *first = f64::from((shift * u / (1.0 + (shift - 1.0) * u)) as f32);
        }
        sigmas
    }

    fn last(&self) -> f32 {
        *self.table.last().expect("the table has 1000 entries")
    }

    fn timestep(&self, sigma: f32) -> f32 {
        match self.source {
            Source::Flow { .. } => sigma * 1000.0,
            Source::Steps(steps) => steps.timestep(sigma) as f32,
        }
    }

    fn sigma(&self, timestep: f32) -> f32 {
        match self.source {
            Source::Flow { shift } => shifted(shift, timestep),
            Source::Steps(steps) => steps.sigma(timestep),
        }
    }

    fn sigmas_at(&self, timesteps: &[f32]) -> Vec<f32> {
        timesteps.iter().map(|&t| self.sigma(t)).collect()
    }
}

/// Returns `s u / (1 + (s - 1) u)` with `u = timestep / 1000`.
fn shifted(shift: f64, timestep: f32) -> f32 {
    let u = timestep / 1000.0;
    if shift == 1.0 {
        u
    } else {
        shift as f32 * u / (1.0 + (shift - 1.0) as f32 * u)
    }
}

fn simple(steps: usize, levels: &NoiseLevels) -> Vec<f32> {
    let table = &levels.table;
    let stride = table.len() as f64 / steps as f64;
    let mut sigmas = Vec::new();
    for x in 0..steps {
        sigmas.push(table[table.len() - 1 - (x as f64 * stride) as usize]);
    }
    ending_in_zero(sigmas)
}

fn normal(steps: usize, levels: &NoiseLevels) -> Vec<f32> {
    let start = levels.timestep(levels.last());
    let end = levels.timestep(levels.table[0]);
    // A table that already ends in 0 must not get a second 0.
    if is_nearly_zero(levels.sigma(end)) {
        return levels.sigmas_at(&linspace(start, end, steps + 1));
    }
    ending_in_zero(levels.sigmas_at(&linspace(start, end, steps)))
}

fn sgm_uniform(steps: usize, levels: &NoiseLevels) -> Vec<f32> {
    let start = levels.timestep(levels.last());
    let end = levels.timestep(levels.table[0]);
    let timesteps = linspace(start, end, steps + 1);
    ending_in_zero(levels.sigmas_at(&timesteps[..steps]))
}

fn beta(steps: usize, levels: &NoiseLevels) -> Vec<f32> {
    let last = levels.table.len() - 1;
    let mut indices = Vec::new();
    for k in 0..steps {
        let p = 1.0 - k as f64 * (1.0 / steps as f64);
        indices.push((beta_quantile(p) * last as f64).round_ties_even() as usize);
    }
    indices.dedup();
    let mut sigmas = Vec::new();
    for index in indices {
        sigmas.push(levels.table[index]);
    }
    ending_in_zero(sigmas)
}

/// Returns the quantile `p` of the distribution of [`Schedule::Beta`].
fn beta_quantile(p: f64) -> f64 {
    const SHAPE: f64 = 0.6;
    // The median of a symmetric distribution is exactly 0.5, and 0.5 * 999 is a tie, which
    // rounding errors of the library must not decide.
    if p == 0.5 {
        0.5
    } else {
        inv_beta_reg(SHAPE, SHAPE, p)
    }
}

fn karras(steps: usize, levels: &NoiseLevels) -> Vec<f32> {
    const RHO: f64 = 7.0;
    let low = levels.sigma_min().powf(1.0 / RHO);
    let high = levels.sigma_max().powf(1.0 / RHO);
    let mut sigmas = Vec::new();
    for ramp in linspace(0.0, 1.0, steps) {
        let root = high as f32 + ramp * (low - high) as f32;
        sigmas.push(f64::from(root).powf(RHO) as f32);
    }
    ending_in_zero(sigmas)
}

fn exponential(steps: usize, levels: &NoiseLevels) -> Vec<f32> {
    let low = levels.sigma_min().ln();
    let high = levels.sigma_max().ln();
    let mut sigmas = Vec::new();
    for log in linspace(high as f32, low as f32, steps) {
        sigmas.push(f64::from(log).exp() as f32);
    }
    ending_in_zero(sigmas)
}

fn ddim_uniform(steps: usize, levels: &NoiseLevels) -> Vec<f32> {
    let first_is_zero = is_nearly_zero(levels.table[1]);
    let steps = if first_is_zero { steps + 1 } else { steps };
    let stride = (levels.table.len() / steps).max(1);
    let mut sigmas: Vec<f32> = levels
        .table
        .iter()
        .skip(1)
        .step_by(stride)
        .copied()
        .collect();
    sigmas.reverse();
    if first_is_zero {
        sigmas
    } else {
        ending_in_zero(sigmas)
    }
}

fn kl_optimal(steps: usize, levels: &NoiseLevels) -> Vec<f32> {
    let low = levels.sigma_min().atan() as f32;
    let high = levels.sigma_max().atan() as f32;
    let mut sigmas = Vec::new();
    for x in 0..steps {
        let weight = if steps == 1 {
            0.0
        } else {
            x as f32 / (steps - 1) as f32
        };
        sigmas.push(f64::from(weight * low + (1.0 - weight) * high).tan() as f32);
    }
    ending_in_zero(sigmas)
}

fn ending_in_zero(mut sigmas: Vec<f32>) -> Vec<f32> {
    sigmas.push(0.0);
    sigmas
}

fn is_nearly_zero(sigma: f32) -> bool {
    sigma.abs() <= 1e-5
}

/// torch's `linspace` in fp32: from both ends to the middle, so that both ends are exact.
/// `mul_add`, because torch's compiler fuses the two operations; without it one value in four
/// differs in the last bit.
fn linspace(start: f32, end: f32, steps: usize) -> Vec<f32> {
    if steps == 1 {
        return vec![start];
    }
    let step = (end - start) / (steps - 1) as f32;
    let mut values = Vec::new();
    for i in 0..steps {
        values.push(if i < steps / 2 {
            step.mul_add(i as f32, start)
        } else {
            (-step).mul_add((steps - 1 - i) as f32, end)
        });
    }
    values
}
#[cfg(test)]
mod tests {
    use super::*;

    fn flow(schedule: Schedule, steps: usize, shift: f64) -> Vec<f64> {
        schedule
            .sigmas(
                steps,
                &NoiseLevels::new(Parameterization::Flow, shift).unwrap(),
            )
            .unwrap()
    }

    #[test]
    fn schedules_fall_from_the_top_to_zero() {
        for (name, schedule) in Schedule::ALL {
            for (_, parameterization) in Parameterization::ALL {
                let levels = NoiseLevels::new(parameterization, 3.0).unwrap();
                for steps in [1, 2, 3, 28, 999, 1000] {
                    let sigmas = schedule.sigmas(steps, &levels).unwrap();
                    assert!(
                        sigmas.windows(2).all(|pair| pair[0] > pair[1]),
                        "{name} {steps} {parameterization}"
                    );
                    assert_eq!(*sigmas.last().unwrap(), 0.0, "{name} {steps}");
                    assert!(
                        sigmas[0] <= levels.sigma_max() * (1.0 + 1e-6),
                        "{name} {steps}"
                    );
                }
            }
        }
    }

    #[test]
    fn quirks_are_kept() {
        assert!((flow(Schedule::Normal, 8, 3.0)[7] - 0.0089).abs() < 1e-4);
        assert!(flow(Schedule::Beta, 900, 3.0).len() < 901);
        assert_eq!(flow(Schedule::DdimUniform, 300, 3.0).len(), 334);
        assert_eq!(
            flow(Schedule::KlOptimal, 1, 3.0),
            [flow(Schedule::Karras, 1, 3.0)[0], 0.0]
        );
    }

    #[test]
    fn names_round_trip_and_unknown_ones_are_answered_with_the_list() {
        for (name, schedule) in Schedule::ALL {
            assert_eq!(name.parse::<Schedule>().unwrap(), schedule);
            assert_eq!(schedule.to_string(), name);
        }
        let message = "linear".parse::<Schedule>().unwrap_err().to_string();
        assert!(
            message.contains("\"linear\"") && message.contains("sgm_uniform"),
            "{message}"
        );
    }

    #[test]
    fn bad_numbers_are_refused() {
        let levels = NoiseLevels::new(Parameterization::Flow, 3.0).unwrap();
        for steps in [0, 1001] {
            assert!(
                Schedule::Simple
                    .sigmas(steps, &levels)
                    .unwrap_err()
                    .to_string()
                    .contains("steps")
            );
        }
        for shift in [0.0, -3.0, f64::NAN, f64::INFINITY] {
            assert!(
                NoiseLevels::new(Parameterization::Flow, shift)
                    .unwrap_err()
                    .to_string()
                    .contains("shift")
            );
        }
    }
}
