//! AdamW (Loshchilov and Hutter 2019, algorithm 2) and StableAdamW (Wortsman et al. 2023, arXiv 2304.13013, algorithm 2)
//! on flat vectors.
//!
//! AdamW is PyTorch's number for number. StableAdamW divides a tensor's learning rate by `max(1, RMS)`, where `RMS` is
//! the root mean square of `g / sqrt(v)` over that tensor: it is about 1 as long as the second moment knows how large
//! gradients are, and far above it when they have suddenly grown, which is when AdamW makes its too long steps.

use std::ops::Range;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, no_grad};

use crate::{
    error::Result,
    state::{
        gradient_vector::{Chunk, GradientVector},
        layout::narrow,
        one_pass::{AdamW, Vectors},
        workers::Workers,
    },
};

/// Which optimiser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum OptimizerName {
    /// AdamW, as PyTorch has it.
    #[default]
    #[serde(rename = "adamw")]
    AdamW,
    /// AdamW whose rate is lowered, tensor by tensor, where gradients have outgrown the second moment.
    #[serde(rename = "stable_adamw")]
    StableAdamW,
}

/// `[optimizer]`: AdamW or StableAdamW. The defaults are the article's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// `adamw` or `stable_adamw` (arXiv 2304.13013).
    pub name: OptimizerName,
    /// Decay of the mean of gradients, 0 to 1 exclusive.
    pub beta1: f64,
    /// Decay of the mean of squared gradients, 0 to 1 exclusive.
    pub beta2: f64,
    /// Added to the denominator; the update is damped where gradients are smaller than this.
    pub eps: f64,
    /// Decoupled weight decay, on all trained parameters.
    pub weight_decay: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self { name: OptimizerName::AdamW, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 }
    }
}

impl OptimizerConfig {
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

/// A piece of the flat vector that is updated as one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct UpdateRange {
    /// Its elements, as far as they are this rank's.
    pub(crate) range: Range<i64>,
    /// How many elements it has on all ranks.
    pub(crate) whole: i64,
    /// Its learning rate.
    pub(crate) rate: f64,
    /// Number of this update since the piece's moments were zero, from 1.
    pub(crate) update: u64,
}

/// The optimiser's memory: two vectors as long as the parameters.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    /// Mean of gradients, `[n]` fp32.
    pub mean: Tensor,
    /// Mean of squared gradients, `[n]` fp32.
    pub mean_square: Tensor,
}

impl Optimizer {
    /// A fresh optimiser for `values` `[n]`.
    pub fn new(config: OptimizerConfig, values: &Tensor) -> Self {
        Self { config, mean: values.zeros_like(), mean_square: values.zeros_like() }
    }

    /// Whether each tensor has to be a range of its own.
    pub(crate) fn works_by_tensor(&self) -> bool {
        self.config.name == OptimizerName::StableAdamW
    }

    /// Updates `values` by `gradients`, range by range. `total` makes sums over a rank's elements sums over all ranks'.
    pub(crate) fn update(
        &mut self,
        values: &Tensor,
        gradients: &GradientVector,
        ranges: &[UpdateRange],
        workers: &Workers,
        total: &dyn Fn(&[f64]) -> Result<Vec<f64>>,
    ) -> Result<()> {
        if !self.works_by_tensor() && self.update_in_one_pass(values, gradients, ranges) {
            return Ok(());
        }
        let mut chunks = self.chunks(values, gradients, ranges);
        if !self.works_by_tensor() {
            on_chunks(&mut chunks, workers, |chunk| {
                chunk.advance();
                chunk.apply(chunk.of.rate);
            });
            return Ok(());
        }
        let excess = on_chunks(&mut chunks, workers, |chunk| {
            chunk.advance();
            chunk.excess()
        });
        let mut own = vec![0.0; ranges.len()];
        for (chunk, excess) in chunks.iter().zip(excess) {
            own[chunk.index] += excess;
        }
        let rates = stable_rates(ranges, &total(&own)?);
        on_chunks(&mut chunks, workers, |chunk| chunk.apply(rates[chunk.index]));
        Ok(())
    }

    /// The chunks of all ranges, in order.
    pub(crate) fn chunks<'a>(
        &'a self,
        values: &Tensor,
        gradients: &GradientVector,
        ranges: &'a [UpdateRange],
    ) -> Vec<ChunkViews<'a>> {
        let mut chunks = Vec::new();
        for (index, range) in ranges.iter().enumerate() {
            chunks.extend(gradients.chunks(&range.range).map(|chunk| self.views(values, chunk, range, index)));
        }
        chunks
    }

    /// A chunk of the range `of`, in all vectors.
    fn views<'a>(&'a self, values: &Tensor, chunk: Chunk, of: &'a UpdateRange, index: usize) -> ChunkViews<'a> {
        let Chunk { range, gradient } = chunk;
        ChunkViews {
            config: &self.config,
            of,
            index,
            values: narrow(values, &range),
            mean: narrow(&self.mean, &range),
            mean_square: narrow(&self.mean_square, &range),
            gradient,
        }
    }

    /// AdamW where one pass over memory does it.
    fn update_in_one_pass(&self, values: &Tensor, gradients: &GradientVector, ranges: &[UpdateRange]) -> bool {
        let OptimizerConfig { beta1, beta2, eps, weight_decay, .. } = self.config;
        ranges.iter().all(|of| {
            let adamw = AdamW { beta1, beta2, eps, weight_decay, rate: of.rate, update: of.update };
            gradients.over(&of.range).all(|(range, gradients)| {
                let [values, mean, mean_square] =
                    [values, &self.mean, &self.mean_square].map(|vector| narrow(vector, &range));
                adamw.update(Vectors { values: &values, mean: &mean, mean_square: &mean_square, gradients: &gradients })
            })
        })
    }
}

/// A chunk of a range, as views of the vectors: what changes them changes the vectors.
#[derive(Debug)]
pub(crate) struct ChunkViews<'a> {
    config: &'a OptimizerConfig,
    of: &'a UpdateRange,
    /// Which of the update's ranges that is.
    index: usize,
    pub(crate) values: Tensor,
    mean: Tensor,
    mean_square: Tensor,
    pub(crate) gradient: Tensor,
}

impl ChunkViews<'_> {
    /// Takes gradients into both moments.
    fn advance(&mut self) {
        let OptimizerConfig { beta1, beta2, .. } = *self.config;
        let _ = self.mean.lerp_(&self.gradient, 1.0 - beta1);
        self.mean_square *= beta2;
        self.mean_square += self.gradient.square() * (1.0 - beta2);
    }

    /// Sum of `g^2 / max(v, eps^2)`, with the second moment after this update and corrected for its start at zero.
    pub(crate) fn excess(&self) -> f64 {
        let OptimizerConfig { beta2, eps, .. } = *self.config;
        let correction = 1.0 - beta2.powf(self.of.update as f64);
        let mean_square = (&self.mean_square / correction).clamp_min(eps * eps);
        (self.gradient.square() / mean_square).sum(Kind::Double).double_value(&[])
    }

    /// Changes values by both moments.
    fn apply(&mut self, rate: f64) {
        self.values *= 1.0 - rate * self.config.weight_decay;
        self.values -= self.step(rate);
    }

    /// What an update at `rate` takes from the values, weight decay apart.
    pub(crate) fn step(&self, rate: f64) -> Tensor {
        let OptimizerConfig { beta1, beta2, eps, .. } = *self.config;
        let correction1 = 1.0 - beta1.powf(self.of.update as f64);
        let correction2 = (1.0 - beta2.powf(self.of.update as f64)).sqrt();
        let mut denominator = self.mean_square.sqrt();
        denominator /= correction2;
        denominator += eps;
        &self.mean / denominator * (rate / correction1)
    }
}

fn on_chunks<R: Send>(
    chunks: &mut [ChunkViews<'_>],
    workers: &Workers,
    act: impl Fn(&mut ChunkViews<'_>) -> R + Send + Sync,
) -> Vec<R> {
    workers.map_mut(chunks, |chunk| no_grad(|| act(chunk)))
}

/// StableAdamW's learning rate of each range, from the sum of its chunks' [`ChunkViews::excess`] over all ranks.
fn stable_rates(ranges: &[UpdateRange], excess: &[f64]) -> Vec<f64> {
    let rate = |(range, excess): (&UpdateRange, &f64)| {
        let rms = (excess / range.whole as f64).sqrt();
        range.rate / rms.max(1.0)
    };
    ranges.iter().zip(excess).map(rate).collect()
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::state::layout::CHUNK;

    fn workers() -> Workers {
        Workers::new(Device::Cpu, 2)
    }

    fn a_range(range: Range<i64>, rate: f64, update: u64) -> UpdateRange {
        UpdateRange { whole: range.end - range.start, range, rate, update }
    }

    /// An update by a rank alone.
    fn update(optimizer: &mut Optimizer, values: &Tensor, gradients: &Tensor, ranges: &[UpdateRange]) {
        let gradients = GradientVector::new([gradients.shallow_clone()]);
        optimizer
            .update(values, &gradients, ranges, &workers(), &|own| Ok(own.to_vec()))
            .expect("nothing is exchanged");
    }

    /// torch.optim.AdamW of torch 2.13.0, by scripts/golden/adamw.py, or StableAdamW as scripts/golden/stable_adamw.py
    /// states it.
    #[derive(Deserialize)]
    struct Golden {
        weight_decay: f64,
        rate: f64,
        start: Vec<f64>,
        gradients: Vec<Vec<f64>>,
        values: Vec<Vec<f64>>,
    }

    /// Goes through all updates of all cases, with the vector in these ranges.
    fn compare(name: OptimizerName, golden: &str, cuts: &[Range<i64>]) {
        let cases: Vec<Golden> = serde_json::from_str(golden).expect("the golden file is JSON");
        assert_eq!(cases.len(), 2);
        for case in cases {
            let values = Tensor::from_slice(&case.start).to_kind(Kind::Float);
            let config = OptimizerConfig { name, weight_decay: case.weight_decay, ..OptimizerConfig::default() };
            let mut optimizer = Optimizer::new(config, &values);
            for (update_number, (gradient, wanted)) in (1..).zip(case.gradients.iter().zip(&case.values)) {
                let gradient = Tensor::from_slice(gradient).to_kind(Kind::Float);
                let ranges: Vec<UpdateRange> =
                    cuts.iter().map(|range| a_range(range.clone(), case.rate, update_number)).collect();
                update(&mut optimizer, &values, &gradient, &ranges);
                let wanted = Tensor::from_slice(wanted).to_kind(Kind::Float);
                let error = (&values - &wanted).norm() / wanted.norm();
                assert!(f64::try_from(&error).expect("a scalar") < 1e-6, "update {update_number}: {error}");
            }
        }
    }

    #[test]
    fn updates_equal_pytorch() {
        // Two ranges of equal rate: the split must not show.
        compare(OptimizerName::AdamW, include_str!("../../tests/golden/adamw.json"), &[0..2, 2..7]);
    }

    #[test]
    fn stable_updates_equal_the_reference() {
        // The second tensor's gradients grow a hundredfold half-way.
        compare(OptimizerName::StableAdamW, include_str!("../../tests/golden/stable_adamw.json"), &[0..3, 3..8]);
    }

    #[test]
    fn a_tensor_longer_than_a_chunk_has_one_rms() {
        let size = 2 * CHUNK as i64;
        let run = |gradient: &Tensor, name| {
            let values = Tensor::zeros([size], (Kind::Float, Device::Cpu));
            let mut optimizer = Optimizer::new(OptimizerConfig { name, ..OptimizerConfig::default() }, &values);
            let ones = values.ones_like();
            update(&mut optimizer, &values, &ones, &[a_range(0..size, 0.1, 1)]);
            update(&mut optimizer, &values, gradient, &[a_range(0..size, 0.1, 2)]);
            values
        };
        // Gradients grow only in the second chunk, whose rate must fall as the first one's does.
        let gradient = Tensor::ones([size], (Kind::Float, Device::Cpu));
        let _ = gradient.narrow(0, CHUNK as i64, CHUNK as i64).fill_(1e4);
        let (plain, stable) = (run(&gradient, OptimizerName::AdamW), run(&gradient, OptimizerName::StableAdamW));
        let second = |values: &Tensor, at: i64| values.double_value(&[at]) + 0.1;
        let (ratio_first, ratio_second) =
            (second(&stable, 0) / second(&plain, 0), second(&stable, CHUNK as i64) / second(&plain, CHUNK as i64));
        assert!(ratio_first < 0.9 && (ratio_first - ratio_second).abs() < 1e-3, "{ratio_first} {ratio_second}");
    }

    #[test]
    fn a_part_without_rate_keeps_its_values() {
        let values = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]);
        let mut optimizer = Optimizer::new(OptimizerConfig::default(), &values);
        let ones = Tensor::ones([4], (Kind::Float, Device::Cpu));
        update(&mut optimizer, &values, &ones, &[a_range(0..2, 0.1, 1), a_range(2..4, 0.0, 1)]);
        let after = Vec::<f32>::try_from(&values).expect("a vector");
        assert!(after[0] < 1.0 && after[1] < 2.0);
        assert_eq!(after[2..], [3.0, 4.0]);
    }
}
