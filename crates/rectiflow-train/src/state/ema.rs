//! Averaged weights: an exponential moving average of the parameters, which often samples better
//! than the trained parameters themselves.
//!
//! The half-life counts samples, not updates, so a recipe keeps its meaning when the batch size
//! changes: after `half_life_samples` samples an old value has half its weight. An average
//! remembers bad initial weights for a long time. At first the half-life is therefore only a
//! fraction (`ramp`) of the samples seen so far, as in Karras et al. 2022 (arXiv 2206.00364).

use rectiflow_sdxl::write::write_to;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Tensor, no_grad};

use crate::state::{
    layout::narrow,
    masters::{Masters, Numbers},
    workers::Workers,
};

/// `[ema]`: averaged weights, kept beside the trained ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EmaConfig {
    /// Samples after which an old value has half its weight. No average is kept if this is not set.
    /// An average takes 4 bytes a parameter.
    pub half_life_samples: Option<u64>,
    /// Upper limit of the half-life, as a fraction of the samples seen so far, so that an average
    /// forgets its start. Above 0.
    pub ramp: f64,
}

impl Default for EmaConfig {
    fn default() -> Self {
        Self {
            half_life_samples: None,
            ramp: 0.05,
        }
    }
}

impl EmaConfig {
    /// Returns the weight of the old average in an update of `batch` samples, after which the run
    /// has seen `seen` samples; `None` if no average is kept.
    pub fn keep(&self, batch: u64, seen: u64) -> Option<f64> {
        let half_life = (self.half_life_samples? as f64).min(self.ramp * seen as f64);
        Some(0.5f64.powf(batch as f64 / half_life))
    }

    /// Returns the problems of these settings as (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Vec::new();
        if self.half_life_samples == Some(0) {
            problems.push((
                "ema.half_life_samples".into(),
                "expected at least 1, found 0".into(),
            ));
        }
        if !(self.ramp > 0.0 && self.ramp.is_finite()) {
            problems.push((
                "ema.ramp".into(),
                format!("expected a number above 0, found {}", self.ramp),
            ));
        }
        problems
    }
}

/// Sets `average` to `keep * average + (1 - keep) * masters` in place, `[n]` fp32.
///
/// On a CPU; `on_device` has it for others.
pub(crate) fn lerp_towards(average: &Tensor, masters: &Masters, keep: f64, workers: &Workers) {
    on_chunks(average, masters, workers, |average, masters| {
        let _ = average.lerp_(&masters.fp32(), 1.0 - keep);
    });
}

/// Swaps masters and average `[n]` fp32, bit for bit, without memory for a third vector.
pub(crate) fn swap(masters: &Masters, average: &Tensor, workers: &Workers) {
    on_chunks(average, masters, workers, |average, masters| {
        let kept = masters.copy();
        masters.store(average);
        write_to(average, &kept);
    });
}

/// Calls `act` on each chunk of the average with its masters, on the workers.
fn on_chunks(
    average: &Tensor,
    masters: &Masters,
    workers: &Workers,
    act: impl Fn(&mut Tensor, &Numbers) + Send + Sync,
) {
    let mut views = Vec::new();
    for part in masters.chunks() {
        views.push((narrow(average, &part.range), part.numbers));
    }
    workers.map_mut(&mut views, |(average, masters)| {
        no_grad(|| act(average, masters));
    });
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn config(half_life: u64) -> EmaConfig {
        EmaConfig {
            half_life_samples: Some(half_life),
            ..EmaConfig::default()
        }
    }

    #[test]
    fn a_half_life_halves_however_it_is_cut_into_batches() {
        for batch in [1, 32, 1000] {
            let keep = config(1000)
                .keep(batch, 1_000_000)
                .expect("an average is kept");
            assert!((keep.powf(1000.0 / batch as f64) - 0.5).abs() < 1e-12);
        }
        assert_eq!(EmaConfig::default().keep(32, 1000), None);
    }

    #[test]
    fn at_first_the_half_life_is_a_part_of_what_was_seen() {
        // 5% of 2,000 samples are 100, so a batch of 100 samples halves the old weight.
        let keep = config(1_000_000)
            .keep(100, 2000)
            .expect("an average is kept");
        assert!((keep - 0.5).abs() < 1e-12);
    }

    #[test]
    fn the_average_of_a_constant_comes_closer_as_the_closed_form_says() {
        let workers = Workers::new(Device::Cpu, 2);
        let size = (1i64 << 16) + 3; // more than one chunk
        let (average, values) = (
            Tensor::zeros([size], (Kind::Float, Device::Cpu)),
            Tensor::ones([size], (Kind::Float, Device::Cpu)),
        );
        let masters = Masters::halves(&values);
        for _ in 0..10 {
            lerp_towards(&average, &masters, 0.9, &workers);
        }
        let expected = 1.0 - 0.9f64.powi(10);
        assert!((average.min().double_value(&[]) - expected).abs() < 1e-6);
        assert!((average.max().double_value(&[]) - expected).abs() < 1e-6);
    }

    #[test]
    fn swapping_twice_changes_nothing() {
        let workers = Workers::new(Device::Cpu, 2);
        tch::manual_seed(1);
        let old = Tensor::randn([100_000], (Kind::Float, Device::Cpu));
        let average = old.randn_like();
        let old_average = average.copy();
        for masters in [Masters::whole(old.copy()), Masters::halves(&old)] {
            swap(&masters, &average, &workers);
            assert!(masters.to_tensor().equal(&old_average) && average.equal(&old));
            swap(&masters, &average, &workers);
            assert!(masters.to_tensor().equal(&old) && average.equal(&old_average));
        }
    }

    #[test]
    fn impossible_settings_are_named() {
        let keys: Vec<String> = EmaConfig {
            half_life_samples: Some(0),
            ramp: f64::NAN,
        }
        .problems()
        .into_iter()
        .map(|(key, _)| key)
        .collect();
        assert_eq!(keys, ["ema.half_life_samples", "ema.ramp"]);
    }
}
