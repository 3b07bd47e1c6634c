//! The samplers by name, and what each needs to run: its noise, its levels, its quirks.
//!
//! The names are ComfyUI's, and so are the quirks: `uni_pc` requests one more step from the
//! schedule and drops the last level above 0; `dpmpp_2m_sde` moves a flow model's first level
//! slightly below 1, where its logarithm is infinite. The methods themselves are in
//! [`crate::solvers`], [`crate::stochastic`] and [`crate::unipc`].

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    error::{Error, Result},
    flow::Parameterization,
    sample::{
        brownian::BrownianPath,
        denoise::Denoise,
        noise::{self, StepNoise},
        schedule::{NoiseLevels, Schedule},
        solvers::{self, Watch},
        stochastic::{self, Stochastic},
        unipc,
    },
};

/// A method that steps through the noise levels.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// Euler's method.
    #[default]
    Euler,
    /// Euler's method with new noise in each step.
    EulerAncestral,
    /// Heun's method: order 2, two evaluations per step.
    Heun,
    /// DPM-Solver++(2M): order 2 from the last two predictions.
    #[serde(rename = "dpmpp_2m")]
    DpmPp2m,
    /// DPM-Solver++(2M) with new noise in each step.
    #[serde(rename = "dpmpp_2m_sde")]
    DpmPp2mSde,
    /// UniPC of order 3.
    UniPc,
    /// DDIM without noise: the same numbers as Euler's method, to rounding.
    Ddim,
}

/// What a sampler needs besides the model and the latents.
#[derive(Clone, Copy, Debug)]
pub struct Course<'a> {
    /// The levels to visit, ending in 0, as [`Sampler::sigmas`] returns them.
    pub sigmas: &'a [f64],
    /// The parameterization, which defines the latents at a level.
    pub parameterization: Parameterization,
    /// All levels of the model.
    pub levels: &'a NoiseLevels,
    /// Seed of the picture, which also seeds the noise of the steps.
    pub seed: u64,
}

impl Sampler {
    /// All samplers with their names in recipes and on the command line.
    pub const ALL: [(&'static str, Self); 7] = [
        ("euler", Self::Euler),
        ("euler_ancestral", Self::EulerAncestral),
        ("heun", Self::Heun),
        ("dpmpp_2m", Self::DpmPp2m),
        ("dpmpp_2m_sde", Self::DpmPp2mSde),
        ("uni_pc", Self::UniPc),
        ("ddim", Self::Ddim),
    ];

    /// Returns the name in AUTOMATIC1111's web interface.
    pub fn web_name(self) -> &'static str {
        match self {
            Self::Euler => "Euler",
            Self::EulerAncestral => "Euler a",
            Self::Heun => "Heun",
            Self::DpmPp2m => "DPM++ 2M",
            Self::DpmPp2mSde => "DPM++ 2M SDE",
            Self::UniPc => "UniPC",
            Self::Ddim => "DDIM",
        }
    }

    /// Returns the noise levels that the sampler visits, as ComfyUI's KSampler picks them.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `steps` is not in `1..=1000`.
    pub fn sigmas(
        self,
        schedule: Schedule,
        steps: usize,
        levels: &NoiseLevels,
    ) -> Result<Vec<f64>> {
        if self != Self::UniPc {
            return schedule.sigmas(steps, levels);
        }
        let mut sigmas = schedule.sigmas_with_one_more(steps, levels)?;
        let last_above_zero = sigmas.len() - 2;
        sigmas.remove(last_above_zero);
        // At 1001 steps `simple` returns a level twice; a step of length 0 has no slope.
        sigmas.dedup();
        Ok(sigmas)
    }

    /// Returns the clean latents for `x`, latents at the first level.
    ///
    /// # Errors
    /// Errors of `denoise`.
    pub fn run(
        self,
        denoise: &mut Denoise<'_>,
        x: Tensor,
        course: Course<'_>,
        watch: &mut Watch<'_>,
    ) -> Result<Tensor> {
        let Course {
            sigmas,
            parameterization,
            ..
        } = course;
        match self {
            Self::Euler => solvers::euler(denoise, x, sigmas, watch),
            Self::Heun => solvers::heun(denoise, x, sigmas, watch),
            Self::DpmPp2m => solvers::dpmpp_2m(denoise, x, sigmas, watch),
            Self::Ddim => solvers::ddim(denoise, x, sigmas, parameterization, watch),
            Self::UniPc => {
                let end = unipc::uni_pc(denoise, x, sigmas, watch)?;
                // UniPC stops just above 0, where a flow model's latents are scaled by 1 - sigma.
                let is_flow = parameterization == Parameterization::Flow;
                Ok(if is_flow {
                    end / (1.0 - unipc::LAST_SIGMA)
                } else {
                    end
                })
            }
            Self::EulerAncestral => euler_ancestral(denoise, x, course, watch),
            Self::DpmPp2mSde => dpmpp_2m_sde(denoise, x, course, watch),
        }
    }
}

/// Runs `euler_ancestral` with independent noise in each step.
fn euler_ancestral(
    denoise: &mut Denoise<'_>,
    x: Tensor,
    course: Course<'_>,
    watch: &mut Watch<'_>,
) -> Result<Tensor> {
    let Course {
        sigmas,
        parameterization,
        seed,
        ..
    } = course;
    let num_steps = sigmas.len().saturating_sub(1);
    let noise = noise::independent(seed, &x.size(), num_steps, x.device());
    let mut noise = noise.map_err(Error::torch(format!(
        "drawing the noise of {num_steps} steps"
    )))?;
    let mut stochastic = Stochastic {
        parameterization,
        eta: 1.0,
        noise: &mut noise,
    };
    stochastic::euler_ancestral(denoise, x, sigmas, &mut stochastic, watch)
}

/// Runs `dpmpp_2m_sde` with the increments of one Brownian path, starting just below the highest
/// level.
fn dpmpp_2m_sde(
    denoise: &mut Denoise<'_>,
    x: Tensor,
    course: Course<'_>,
    watch: &mut Watch<'_>,
) -> Result<Tensor> {
    let Course {
        sigmas,
        parameterization,
        levels,
        seed,
    } = course;
    let path = BrownianPath::new(seed, &x.size(), outermost(sigmas));
    let mut noise = path.on(x.device());
    let noise: &mut StepNoise<'_> = &mut noise;
    let mut stochastic = Stochastic {
        parameterization,
        eta: 1.0,
        noise,
    };
    stochastic::dpmpp_2m_sde(
        denoise,
        x,
        &levels.below_the_top(sigmas),
        &mut stochastic,
        watch,
    )
}

/// Returns the lowest level above 0 and the highest level.
fn outermost(sigmas: &[f64]) -> [f64; 2] {
    let above_zero = sigmas.iter().copied().filter(|&sigma| sigma > 0.0);
    [
        above_zero.clone().fold(f64::INFINITY, f64::min),
        above_zero.fold(0.0, f64::max),
    ]
}

impl fmt::Display for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, _) = Self::ALL
            .iter()
            .find(|(_, sampler)| sampler == self)
            .expect("ALL has every variant");
        f.write_str(name)
    }
}

impl FromStr for Sampler {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match Self::ALL.iter().find(|(known, _)| *known == name) {
            Some((_, sampler)) => Ok(*sampler),
            None => Err(Error::unknown_name(
                "sampler",
                name,
                &Self::ALL.map(|(name, _)| name),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_everywhere_and_unknown_ones_get_the_nearest() {
        for (name, sampler) in Sampler::ALL {
            assert_eq!(name.parse::<Sampler>().unwrap(), sampler);
            assert_eq!(sampler.to_string(), name);
            assert_eq!(
                serde_json::to_value(sampler).unwrap(),
                name,
                "recipes have the same names"
            );
        }
        let message = "dpmpp2m".parse::<Sampler>().unwrap_err().to_string();
        assert!(
            message.contains("\"dpmpp2m\"") && message.contains("did you mean dpmpp_2m?"),
            "{message}"
        );
    }

    #[test]
    fn uni_pc_drops_the_last_level_above_zero_of_a_longer_schedule() {
        let levels = NoiseLevels::new(Parameterization::Flow, 3.0).unwrap();
        let longer = Schedule::Simple.sigmas(9, &levels).unwrap();
        let sigmas = Sampler::UniPc.sigmas(Schedule::Simple, 8, &levels).unwrap();
        assert_eq!(sigmas[..8], longer[..8]);
        assert_eq!(sigmas[8..], [0.0]);
        for (name, schedule) in Schedule::ALL {
            for steps in [1, 2, 1000] {
                let sigmas = Sampler::UniPc.sigmas(schedule, steps, &levels).unwrap();
                assert!(
                    sigmas.windows(2).all(|pair| pair[0] > pair[1]),
                    "{name} {steps}"
                );
            }
        }
        assert!(
            Sampler::UniPc
                .sigmas(Schedule::Simple, 1001, &levels)
                .is_err()
        );
    }
}
