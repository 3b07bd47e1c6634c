//! AdamW on flat vectors (Loshchilov and Hutter 2019, algorithm 2), number for number PyTorch's.

use std::ops::Range;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Tensor, no_grad};

use crate::{
    flat::part,
    workers::{Shared, Workers},
};

/// `[optimizer]`: AdamW. The defaults are the article's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// Decay of the mean of gradients, 0 to 1 exclusive.
    pub beta1: f64,
    /// Decay of the mean of squared gradients, 0 to 1 exclusive.
    pub beta2: f64,
    /// Added to the denominator; the update is damped where gradients are smaller than this.
    pub eps: f64,
    /// Decoupled weight decay, on all trained parameters.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 }
    }
}

impl AdamWConfig {
    /// What is wrong with these settings: (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Vec::new();
        for (key, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                problems
                    .push((format!("optimizer.{key}"), format!("expected 0 up to, not including, 1, found {value}")));
            }
        }
        for (key, value) in [("eps", self.eps), ("weight_decay", self.weight_decay)] {
            if !(value >= 0.0 && value.is_finite()) {
                problems.push((format!("optimizer.{key}"), format!("expected a number of at least 0, found {value}")));
            }
        }
        problems
    }
}

/// The optimiser's memory: two vectors as long as the parameters.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    /// Mean of gradients, `[n]` fp32.
    pub mean: Tensor,
    /// Mean of squared gradients, `[n]` fp32.
    pub mean_square: Tensor,
}

impl AdamW {
    /// A fresh optimiser for `values` `[n]`.
    pub fn new(config: AdamWConfig, values: &Tensor) -> Self {
        Self { config, mean: values.zeros_like(), mean_square: values.zeros_like() }
    }

    /// Update number `update` (from 1) of `values` by `gradients`; `rates` gives each part's learning rate.
    pub(crate) fn update(
        &mut self,
        values: &Tensor,
        gradients: &Tensor,
        update: u64,
        rates: &[(Range<i64>, f64)],
        workers: &Workers,
    ) {
        let chunks = |(range, rate): &(Range<i64>, f64)| {
            let (end, rate) = (range.end, *rate);
            range.clone().step_by(CHUNK).map(move |start| (start..end.min(start + CHUNK as i64), rate))
        };
        let chunks: Vec<(Range<i64>, f64)> = rates.iter().flat_map(chunks).collect();
        // SAFETY: each worker reads and writes the elements of its own chunks, and chunks do not overlap.
        let shared = unsafe { Shared::new((&*self, values, gradients)) };
        workers.map(&chunks, |(chunk, rate)| {
            let (optimizer, values, gradients) = shared.get();
            no_grad(|| optimizer.update_chunk(values, gradients, update, chunk, *rate));
        });
    }

    fn update_chunk(&self, values: &Tensor, gradients: &Tensor, update: u64, chunk: &Range<i64>, rate: f64) {
        let AdamWConfig { beta1, beta2, eps, weight_decay } = self.config;
        let correction1 = 1.0 - beta1.powf(update as f64);
        let correction2 = (1.0 - beta2.powf(update as f64)).sqrt();
        let gradient = part(gradients, chunk);
        let (mut value, mut mean) = (part(values, chunk), part(&self.mean, chunk));
        let mut mean_square = part(&self.mean_square, chunk);
        let _ = mean.lerp_(&gradient, 1.0 - beta1);
        mean_square *= beta2;
        mean_square += gradient.square() * (1.0 - beta2);
        let mut denominator = mean_square.sqrt();
        denominator /= correction2;
        denominator += eps;
        value *= 1.0 - rate * weight_decay;
        value -= mean / denominator * (rate / correction1);
    }
}

/// Elements updated at a time: a dozen passes over a chunk that stays in the cache instead of over all of memory.
const CHUNK: usize = 1 << 16;

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn workers() -> Workers {
        Workers::new(Device::Cpu, 2)
    }

    /// torch.optim.AdamW of torch 2.13.0, by scripts/golden/adamw.py.
    #[derive(Deserialize)]
    struct Golden {
        weight_decay: f64,
        rate: f64,
        start: Vec<f64>,
        gradients: Vec<Vec<f64>>,
        values: Vec<Vec<f64>>,
    }

    #[test]
    fn updates_equal_pytorch() {
        let cases: Vec<Golden> =
            serde_json::from_str(include_str!("../tests/golden/adamw.json")).expect("the golden file is JSON");
        assert_eq!(cases.len(), 2);
        for case in cases {
            let values = Tensor::from_slice(&case.start).to_kind(Kind::Float);
            let config = AdamWConfig { weight_decay: case.weight_decay, ..AdamWConfig::default() };
            let mut optimizer = AdamW::new(config, &values);
            for (index, (gradient, wanted)) in case.gradients.iter().zip(&case.values).enumerate() {
                let gradient = Tensor::from_slice(gradient).to_kind(Kind::Float);
                // Two parts of equal rate: the split must not show.
                let rates = [(0..2, case.rate), (2..case.start.len() as i64, case.rate)];
                optimizer.update(&values, &gradient, index as u64 + 1, &rates, &workers());
                let wanted = Tensor::from_slice(wanted).to_kind(Kind::Float);
                let error = (&values - &wanted).norm() / wanted.norm();
                assert!(f64::try_from(&error).expect("a scalar") < 1e-6, "update {}: {error}", index + 1);
            }
        }
    }

    #[test]
    fn a_part_without_rate_keeps_its_values() {
        let values = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]);
        let mut optimizer = AdamW::new(AdamWConfig::default(), &values);
        let ones = Tensor::ones([4], (Kind::Float, tch::Device::Cpu));
        optimizer.update(&values, &ones, 1, &[(0..2, 0.1), (2..4, 0.0)], &workers());
        let after = Vec::<f32>::try_from(&values).expect("a vector");
        assert!(after[0] < 1.0 && after[1] < 2.0);
        assert_eq!(after[2..], [3.0, 4.0]);
    }
}
