//! AdamW (Loshchilov and Hutter 2019, algorithm 2) and StableAdamW (Wortsman et al. 2023, arXiv
//! 2304.13013, algorithm 2) on flat vectors.
//!
//! AdamW equals PyTorch's number for number. StableAdamW divides a tensor's learning rate by
//! `max(1, RMS)`, where `RMS` is the root mean square of `g / sqrt(v)` over that tensor. It is
//! about 1 while the second moment reflects the size of the gradients, and far above 1 when they
//! have suddenly grown, which is when AdamW takes too long steps.

use std::ops::Range;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, no_grad};

use crate::{
    error::Result,
    state::{
        gradient_vector::{Chunk, GradientVector},
        layout::narrow,
        masters::{Masters, Numbers},
        one_pass::{AdamW, Vectors},
        workers::Workers,
    },
};

/// The optimiser's algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum OptimizerName {
    /// AdamW as in PyTorch.
    #[default]
    #[serde(rename = "adamw")]
    AdamW,
    /// AdamW with a learning rate that is reduced, tensor by tensor, when gradients outgrow the
    /// second moment.
    #[serde(rename = "stable_adamw")]
    StableAdamW,
}

/// `[optimizer]`: AdamW or StableAdamW. The defaults are those of the paper.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// `adamw` or `stable_adamw` (arXiv 2304.13013).
    pub name: OptimizerName,
    /// Decay of the mean of gradients, from 0 to below 1.
    pub beta1: f64,
    /// Decay of the mean of squared gradients, from 0 to below 1.
    pub beta2: f64,
    /// Added to the denominator; damps updates whose gradients are smaller than this.
    pub eps: f64,
    /// Decoupled weight decay of all trained parameters.
    pub weight_decay: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            name: OptimizerName::AdamW,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.1,
        }
    }
}

impl OptimizerConfig {
    /// Returns the problems of these settings as (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Vec::new();
        for (key, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                problems.push((
                    format!("optimizer.{key}"),
                    format!("expected a number from 0 to below 1, found {value}"),
                ));
            }
        }
        for (key, value) in [("eps", self.eps), ("weight_decay", self.weight_decay)] {
            if !(value >= 0.0 && value.is_finite()) {
                problems.push((
                    format!("optimizer.{key}"),
                    format!("expected a number of at least 0, found {value}"),
                ));
            }
        }
        problems
    }
}

/// A part of the flat vector that is updated as one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct UpdateRange {
    /// Its elements on this rank.
    pub(crate) range: Range<i64>,
    /// Number of its elements on all ranks together.
    pub(crate) whole: i64,
    /// Learning rate.
    pub(crate) rate: f64,
    /// Index of this update since its moments were zero, from 1.
    pub(crate) update: u64,
}

/// The optimiser and its state: two vectors as long as the parameters.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    /// Mean of gradients, `[n]` fp32.
    pub mean: Tensor,
    /// Mean of squared gradients, `[n]` fp32.
    pub mean_square: Tensor,
}

impl Optimizer {
    /// Returns an optimiser for `masters` `[n]` with zero moments.
    pub fn new(config: OptimizerConfig, masters: &Masters) -> Self {
        Self {
            config,
            mean: masters.zeros(),
            mean_square: masters.zeros(),
        }
    }

    /// Returns whether each tensor must be a range of its own.
    pub(crate) fn works_by_tensor(&self) -> bool {
        self.config.name == OptimizerName::StableAdamW
    }

    /// Updates `masters` with `gradients`, range by range. `total` turns sums over this rank's
    /// elements into sums over all elements.
    pub(crate) fn update(
        &mut self,
        masters: &Masters,
        gradients: &GradientVector,
        ranges: &[UpdateRange],
        workers: &Workers,
        total: &dyn Fn(&[f64]) -> Result<Vec<f64>>,
    ) -> Result<()> {
        if self.works_by_tensor() {
            let mut chunks = self.chunks(masters, gradients, ranges);
            return update_stably(&mut chunks, ranges, workers, total);
        }
        if !self.update_in_one_pass(masters, gradients, ranges) {
            let mut chunks = self.chunks(masters, gradients, ranges);
            on_chunks(&mut chunks, workers, |chunk| {
                chunk.advance();
                chunk.apply(chunk.of.rate);
            });
        }
        Ok(())
    }

    /// Returns the chunks of all ranges, in order.
    pub(crate) fn chunks<'a>(
        &'a self,
        masters: &Masters,
        gradients: &GradientVector,
        ranges: &'a [UpdateRange],
    ) -> Vec<ChunkViews<'a>> {
        let mut chunks = Vec::new();
        for (index, of) in ranges.iter().enumerate() {
            for chunk in gradients.chunks(&of.range) {
                for (numbers, Chunk { range, gradient }) in parts(masters, &chunk) {
                    chunks.push(ChunkViews {
                        config: &self.config,
                        of,
                        index,
                        numbers,
                        mean: narrow(&self.mean, &range),
                        mean_square: narrow(&self.mean_square, &range),
                        gradient,
                    });
                }
            }
        }
        chunks
    }

    /// Updates with AdamW in one pass over memory. Returns `false` and changes nothing if the
    /// vectors are not in CPU memory.
    fn update_in_one_pass(
        &self,
        masters: &Masters,
        gradients: &GradientVector,
        ranges: &[UpdateRange],
    ) -> bool {
        for range in ranges {
            let adamw = AdamW {
                beta1: self.config.beta1,
                beta2: self.config.beta2,
                eps: self.config.eps,
                weight_decay: self.config.weight_decay,
                rate: range.rate,
                update: range.update,
            };
            for chunk in gradients.over(&range.range) {
                for (numbers, Chunk { range, gradient }) in parts(masters, &chunk) {
                    let vectors = Vectors {
                        masters: &numbers,
                        mean: &narrow(&self.mean, &range),
                        mean_square: &narrow(&self.mean_square, &range),
                        gradients: &gradient,
                    };
                    if !adamw.update(vectors) {
                        return false;
                    }
                }
            }
        }
        true
    }
}

/// Returns a chunk of the gradient in parts whose masters are next to each other in memory.
fn parts(masters: &Masters, chunk: &Chunk) -> Vec<(Numbers, Chunk)> {
    let mut found = Vec::new();
    for part in masters.over(&chunk.range) {
        let start = chunk.range.start;
        let inside = part.range.start - start..part.range.end - start;
        let gradient = narrow(&chunk.gradient, &inside);
        let range = part.range;
        found.push((part.numbers, Chunk { range, gradient }));
    }
    found
}

/// A chunk of a range, as views of masters and vectors. Changes to the views change these.
#[derive(Debug)]
pub(crate) struct ChunkViews<'a> {
    config: &'a OptimizerConfig,
    of: &'a UpdateRange,
    /// Index of `of` among the ranges of the update.
    index: usize,
    pub(crate) numbers: Numbers,
    mean: Tensor,
    mean_square: Tensor,
    pub(crate) gradient: Tensor,
}

impl ChunkViews<'_> {
    /// Updates both moments with the gradient.
    fn advance(&mut self) {
        let OptimizerConfig { beta1, beta2, .. } = *self.config;
        let _ = self.mean.lerp_(&self.gradient, 1.0 - beta1);
        self.mean_square *= beta2;
        self.mean_square += self.gradient.square() * (1.0 - beta2);
    }

    /// Returns the sum of `g^2 / max(v, eps^2)`, with the bias-corrected second moment after this
    /// update.
    pub(crate) fn excess(&self) -> f64 {
        let OptimizerConfig { beta2, eps, .. } = *self.config;
        let correction = 1.0 - beta2.powf(self.of.update as f64);
        let mean_square = (&self.mean_square / correction).clamp_min(eps * eps);
        (self.gradient.square() / mean_square)
            .sum(Kind::Double)
            .double_value(&[])
    }

    /// Applies weight decay and the step to the masters.
    fn apply(&mut self, rate: f64) {
        let mut values = self.numbers.fp32();
        values *= 1.0 - rate * self.config.weight_decay;
        values -= self.step(rate);
        self.numbers.store(&values);
    }

    /// Returns what an update at `rate` subtracts from the masters, without weight decay.
    pub(crate) fn step(&self, rate: f64) -> Tensor {
        let OptimizerConfig {
            beta1, beta2, eps, ..
        } = *self.config;
        let correction1 = 1.0 - beta1.powf(self.of.update as f64);
        let correction2 = (1.0 - beta2.powf(self.of.update as f64)).sqrt();
        let mut denominator = self.mean_square.sqrt();
        denominator /= correction2;
        denominator += eps;
        &self.mean / denominator * (rate / correction1)
    }
}

/// Updates the chunks of all ranges with StableAdamW; see [`Optimizer::update`] for `total`.
fn update_stably(
    chunks: &mut [ChunkViews<'_>],
    ranges: &[UpdateRange],
    workers: &Workers,
    total: &dyn Fn(&[f64]) -> Result<Vec<f64>>,
) -> Result<()> {
    let excess = on_chunks(chunks, workers, |chunk| {
        chunk.advance();
        chunk.excess()
    });
    let mut own = vec![0.0; ranges.len()];
    for (chunk, excess) in chunks.iter().zip(excess) {
        own[chunk.index] += excess;
    }
    let rates = stable_rates(ranges, &total(&own)?);
    on_chunks(chunks, workers, |chunk| chunk.apply(rates[chunk.index]));
    Ok(())
}

fn on_chunks<R: Send>(
    chunks: &mut [ChunkViews<'_>],
    workers: &Workers,
    act: impl Fn(&mut ChunkViews<'_>) -> R + Send + Sync,
) -> Vec<R> {
    workers.map_mut(chunks, |chunk| no_grad(|| act(chunk)))
}

/// Returns StableAdamW's learning rate for each range, from the sum of its chunks'
/// [`ChunkViews::excess`] over all ranks.
fn stable_rates(ranges: &[UpdateRange], excess: &[f64]) -> Vec<f64> {
    let mut rates = Vec::new();
    for (range, excess) in ranges.iter().zip(excess) {
        let rms = (excess / range.whole as f64).sqrt();
        rates.push(range.rate / rms.max(1.0));
    }
    rates
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::state::{halves::round_into, layout::CHUNK};

    fn workers() -> Workers {
        Workers::new(Device::Cpu, 2)
    }

    fn a_range(range: Range<i64>, rate: f64, update: u64) -> UpdateRange {
        UpdateRange {
            whole: range.end - range.start,
            range,
            rate,
            update,
        }
    }

    /// Updates on a single rank.
    fn update(
        optimizer: &mut Optimizer,
        masters: &Masters,
        gradients: &Tensor,
        ranges: &[UpdateRange],
    ) {
        let gradients = GradientVector::new([gradients.shallow_clone()]);
        optimizer
            .update(masters, &gradients, ranges, &workers(), &|own| {
                Ok(own.to_vec())
            })
            .expect("nothing is exchanged");
    }

    /// Results of torch.optim.AdamW of torch 2.13.0, by scripts/golden/adamw.py, or of StableAdamW
    /// as specified by scripts/golden/stable_adamw.py.
    #[derive(Deserialize)]
    struct Golden {
        weight_decay: f64,
        rate: f64,
        start: Vec<f64>,
        gradients: Vec<Vec<f64>>,
        values: Vec<Vec<f64>>,
    }

    /// Compares all updates of all cases, with the vector split at `cuts`.
    fn compare(name: OptimizerName, golden: &str, cuts: &[Range<i64>]) {
        let cases: Vec<Golden> = serde_json::from_str(golden).expect("the golden file is JSON");
        assert_eq!(cases.len(), 2);
        for case in cases {
            let start = Tensor::from_slice(&case.start).to_kind(Kind::Float);
            compare_case(name, &case, Masters::halves(&start), cuts);
            compare_case(name, &case, Masters::whole(start), cuts);
        }
    }

    fn compare_case(name: OptimizerName, case: &Golden, masters: Masters, cuts: &[Range<i64>]) {
        let config = OptimizerConfig {
            name,
            weight_decay: case.weight_decay,
            ..OptimizerConfig::default()
        };
        let mut optimizer = Optimizer::new(config, &masters);
        for (number, (gradient, wanted)) in (1..).zip(case.gradients.iter().zip(&case.values)) {
            let gradient = Tensor::from_slice(gradient).to_kind(Kind::Float);
            let ranges: Vec<UpdateRange> = cuts
                .iter()
                .map(|range| a_range(range.clone(), case.rate, number))
                .collect();
            update(&mut optimizer, &masters, &gradient, &ranges);
            let wanted = Tensor::from_slice(wanted).to_kind(Kind::Float);
            let error = (masters.to_tensor() - &wanted).norm() / wanted.norm();
            let error = f64::try_from(&error).expect("a scalar");
            assert!(error < 1e-6, "update {number}: {error}");
        }
    }

    /// Masters apart from the weights, which are rounded after each update, are the reference.
    #[test]
    fn halves_are_updated_as_masters_apart_bit_for_bit() {
        let size = 2 * CHUNK as i64 + 77;
        let numbers = |seed: f64| (Tensor::arange(size, (Kind::Float, Device::Cpu)) * seed).sin();
        // As a base in fp16, one number in eight of which is half-way between two of bf16.
        let start = numbers(0.71).to_kind(Kind::Half).to_kind(Kind::Float);
        for name in [OptimizerName::AdamW, OptimizerName::StableAdamW] {
            let config = OptimizerConfig {
                name,
                ..OptimizerConfig::default()
            };
            let (apart, halves) = (Masters::whole(start.copy()), Masters::halves(&start));
            let mut of_apart = Optimizer::new(config.clone(), &apart);
            let mut of_halves = Optimizer::new(config, &halves);
            let weights = Tensor::zeros([size], (Kind::BFloat16, Device::Cpu));
            for number in 1..=200u64 {
                let gradient = numbers(0.1 + number as f64 * 0.01) * 1e-3;
                let ranges = [
                    a_range(0..1000, 1e-4, number),
                    a_range(1000..size, 1e-5, number),
                ];
                update(&mut of_apart, &apart, &gradient, &ranges);
                update(&mut of_halves, &halves, &gradient, &ranges);
                round_into(&weights, &apart.to_tensor());
                let (_, nearest) = halves.tensors().swap_remove(0);
                assert!(nearest.equal(&weights), "update {number}");
            }
            let bits = |masters: &Masters| masters.to_tensor().view_dtype(Kind::Int);
            assert!(bits(&apart).equal(&bits(&halves)));
            assert!(of_apart.mean_square.equal(&of_halves.mean_square));
            assert!(!apart.to_tensor().equal(&start));
        }
    }

    #[test]
    fn updates_equal_pytorch() {
        // Two ranges with the same rate: the split must not change the result.
        compare(
            OptimizerName::AdamW,
            include_str!("../../tests/golden/adamw.json"),
            &[0..2, 2..7],
        );
    }

    #[test]
    fn stable_updates_equal_the_reference() {
        // The second tensor's gradients grow a hundredfold half-way through.
        compare(
            OptimizerName::StableAdamW,
            include_str!("../../tests/golden/stable_adamw.json"),
            &[0..3, 3..8],
        );
    }

    #[test]
    fn a_tensor_longer_than_a_chunk_has_one_rms() {
        let size = 2 * CHUNK as i64;
        let run = |gradient: &Tensor, name| {
            let values = Tensor::zeros([size], (Kind::Float, Device::Cpu));
            let masters = Masters::whole(values.shallow_clone());
            let config = OptimizerConfig {
                name,
                ..OptimizerConfig::default()
            };
            let mut optimizer = Optimizer::new(config, &masters);
            let ones = values.ones_like();
            update(&mut optimizer, &masters, &ones, &[a_range(0..size, 0.1, 1)]);
            let second = [a_range(0..size, 0.1, 2)];
            update(&mut optimizer, &masters, gradient, &second);
            values
        };
        // Gradients grow only in the second chunk, yet the rates of both chunks must fall.
        let gradient = Tensor::ones([size], (Kind::Float, Device::Cpu));
        let _ = gradient.narrow(0, CHUNK as i64, CHUNK as i64).fill_(1e4);
        let (plain, stable) = (
            run(&gradient, OptimizerName::AdamW),
            run(&gradient, OptimizerName::StableAdamW),
        );
        let second = |values: &Tensor, at: i64| values.double_value(&[at]) + 0.1;
        let (ratio_first, ratio_second) = (
            second(&stable, 0) / second(&plain, 0),
            second(&stable, CHUNK as i64) / second(&plain, CHUNK as i64),
        );
        assert!(
            ratio_first < 0.9 && (ratio_first - ratio_second).abs() < 1e-3,
            "{ratio_first} {ratio_second}"
        );
    }

    #[test]
    fn a_part_without_rate_keeps_its_values() {
        let values = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]);
        let masters = Masters::whole(values.shallow_clone());
        let mut optimizer = Optimizer::new(OptimizerConfig::default(), &masters);
        let ones = Tensor::ones([4], (Kind::Float, Device::Cpu));
        update(
            &mut optimizer,
            &masters,
            &ones,
            &[a_range(0..2, 0.1, 1), a_range(2..4, 0.0, 1)],
        );
        let after = Vec::<f32>::try_from(&values).expect("a vector");
        assert!(after[0] < 1.0 && after[1] < 2.0);
        assert_eq!(after[2..], [3.0, 4.0]);
    }
}
