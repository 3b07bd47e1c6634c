//! The learning rate as a pure function of the number of samples seen.
//!
//! The unit is samples, not updates, so that a recipe keeps its meaning when the batch size
//! changes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

use crate::error::Problems;

/// How the rate decays after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// No decay.
    Constant,
    /// Linear, to `min_ratio` of the peak at the last sample.
    Linear,
    /// Half a cosine, to `min_ratio` of the peak at the last sample.
    Cosine,
}

/// `[lr]`: warm-up and decay of the learning rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LrConfig {
    /// Peak learning rate, above 0. The default is the article's, at a batch of 4096; small batches
    /// need a lower rate or a longer warm-up.
    pub peak: f64,
    /// Samples over which the rate rises linearly from 0 to the peak; below `train.samples`.
    pub warmup_samples: u64,
    /// How the rate decays after the warm-up.
    pub decay: Decay,
    /// Rate at the end as a fraction of the peak, 0 to 1. The default is the article's; `constant`
    /// ignores it.
    pub min_ratio: f64,
    /// Learning rate of each component as a multiple of this schedule's; only those of trained
    /// components are used.
    pub ratio: LrRatios,
}

impl Default for LrConfig {
    fn default() -> Self {
        Self {
            peak: 1e-4,
            warmup_samples: 0,
            decay: Decay::Cosine,
            min_ratio: 0.0,
            ratio: LrRatios::default(),
        }
    }
}

/// `[lr.ratio]`: the learning rate of each component as a multiple of the schedule's, above 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LrRatios {
    /// Multiple for the UNet.
    pub unet: f64,
    /// Multiple for CLIP-L. Trained text encoders usually need a lower rate than the UNet.
    pub text_encoder: f64,
    /// Multiple for OpenCLIP bigG.
    pub text_encoder_2: f64,
}

impl Default for LrRatios {
    fn default() -> Self {
        Self {
            unet: 1.0,
            text_encoder: 1.0,
            text_encoder_2: 1.0,
        }
    }
}

impl LrRatios {
    /// Returns the multiple for a component, by its folder's name.
    ///
    /// # Panics
    /// If `component` is not the name of a trainable component.
    pub fn of(&self, component: &str) -> f64 {
        match component {
            "unet" => self.unet,
            "text_encoder" => self.text_encoder,
            "text_encoder_2" => self.text_encoder_2,
            other => unreachable!("{other} is never trained"),
        }
    }

    fn check(&self, problems: &mut Problems) {
        let ratios = [
            ("ratio.unet", self.unet),
            ("ratio.text_encoder", self.text_encoder),
            ("ratio.text_encoder_2", self.text_encoder_2),
        ];
        for (key, value) in ratios {
            if !(value > 0.0 && value.is_finite()) {
                let reason = format!(
                    "expected a number above 0, found {value}; to freeze a text encoder, set \
                     train.text_encoders"
                );
                problems.add(key, reason);
            }
        }
    }
}

impl LrConfig {
    /// Returns the rate of the update that begins after `seen` samples of a run of `total` samples.
    ///
    /// The warm-up counts the update's first sample as seen, so that the first update does not have
    /// a rate of 0.
    pub fn rate(&self, seen: u64, total: u64) -> f64 {
        if seen < self.warmup_samples {
            return self.peak * (seen + 1) as f64 / self.warmup_samples as f64;
        }
        let span = total.saturating_sub(self.warmup_samples).max(1);
        let done = ((seen - self.warmup_samples) as f64 / span as f64).min(1.0);
        let left = match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => 1.0 - done,
            Decay::Cosine => 0.5 * (1.0 + (PI * done).cos()),
        };
        let floor = if self.decay == Decay::Constant {
            0.0
        } else {
            self.min_ratio
        };
        self.peak * (floor + (1.0 - floor) * left)
    }

    /// Returns the problems of these settings for a run of `total` samples, as (key, reason) pairs.
    pub(crate) fn problems(&self, total: u64) -> Vec<(String, String)> {
        let mut problems = Problems::of("lr");
        problems.expect_above_0("peak", self.peak);
        problems.expect(
            "min_ratio",
            (0.0..=1.0).contains(&self.min_ratio),
            "0 to 1",
            self.min_ratio,
        );
        self.ratio.check(&mut problems);
        if self.warmup_samples >= total {
            let reason = format!(
                "expected less than train.samples = {total}, found {}: the rate would never reach \
                 its peak",
                self.warmup_samples
            );
            problems.add("warmup_samples", reason);
        }
        problems.into_pairs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn article() -> LrConfig {
        LrConfig {
            warmup_samples: 1_000_000,
            ..LrConfig::default()
        }
    }

    #[test]
    fn warm_up_rises_to_the_peak() {
        let lr = article();
        assert_eq!(lr.rate(0, 150_000_000), 1e-4 / 1e6);
        assert!((lr.rate(499_999, 150_000_000) - 0.5e-4).abs() < 1e-12);
        assert_eq!(lr.rate(1_000_000, 150_000_000), 1e-4);
    }

    #[test]
    fn cosine_passes_its_middle_and_ends_at_the_minimum() {
        let lr = article();
        assert!((lr.rate(75_500_000, 150_000_000) - 0.5e-4).abs() < 1e-12);
        assert!(lr.rate(150_000_000, 150_000_000).abs() < 1e-18);
        assert_eq!(
            lr.rate(200_000_000, 150_000_000),
            lr.rate(150_000_000, 150_000_000)
        );
        let floored = LrConfig {
            min_ratio: 0.1,
            ..article()
        };
        assert!((floored.rate(150_000_000, 150_000_000) - 1e-5).abs() < 1e-15);
    }

    #[test]
    fn linear_and_constant() {
        let linear = LrConfig {
            decay: Decay::Linear,
            ..article()
        };
        assert!((linear.rate(75_500_000, 150_000_000) - 0.5e-4).abs() < 1e-12);
        let constant = LrConfig {
            decay: Decay::Constant,
            min_ratio: 0.5,
            ..article()
        };
        assert_eq!(constant.rate(149_999_999, 150_000_000), 1e-4);
    }

    #[test]
    fn impossible_settings_are_named() {
        let lr = LrConfig {
            peak: f64::NAN,
            warmup_samples: 10,
            min_ratio: 2.0,
            ..LrConfig::default()
        };
        let lr = LrConfig {
            ratio: LrRatios {
                text_encoder_2: 0.0,
                ..LrRatios::default()
            },
            ..lr
        };
        let keys: Vec<String> = lr.problems(10).into_iter().map(|(key, _)| key).collect();
        assert_eq!(
            keys,
            [
                "lr.peak",
                "lr.min_ratio",
                "lr.ratio.text_encoder_2",
                "lr.warmup_samples"
            ]
        );
    }
}
