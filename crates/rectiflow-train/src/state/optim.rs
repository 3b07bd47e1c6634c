//! AdamW (Loshchilov and Hutter 2019, algorithm 2) and StableAdamW (Wortsman et al. 2023, arXiv
//! 2304.13013, algorithm 2) on flat vectors.
//!
//! AdamW equals PyTorch's number for number. StableAdamW divides a tensor's learning rate by
//! `max(1, RMS)`, where `RMS` is the root mean square of `g / sqrt(v)` over that tensor. It is
//! about 1 while the second moment reflects the size of the gradients, and far above 1 when they
//! have suddenly grown, which is when AdamW takes too long steps.

use std::ops::Range;

use rectiflow_sdxl::vectors;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    error::{Error, Result},
    state::{
        eight_bit::{
            blocks::Blocks,
            pass::{Decoded, EightBit},
        },
        flat::FlatParameters,
        gradient_vector::{Chunk, GradientVector},
        layout::narrow,
        masters::{Masters, Numbers, Part},
        moments::{Moments, MomentsKind},
        on_device,
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
    /// How both moments are stored. `fp32` takes 8 bytes a parameter. `8bit` takes 2.125:
    /// bitsandbytes' block-wise quantisation, mended for small gradients beside large ones
    /// (docs/one-card.md); only for `adamw`.
    pub state: MomentsKind,
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
            state: MomentsKind::Fp32,
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
        let is_eight_bit = self.state == MomentsKind::EightBit;
        if is_eight_bit && self.name == OptimizerName::StableAdamW {
            let reason = "expected \"fp32\", since stable_adamw measures all second moments before \
                          it applies any; found \"8bit\", which optimizer.name = \"adamw\" has";
            problems.push(("optimizer.state".to_owned(), reason.to_owned()));
        }
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

/// The optimiser and its state: two moments of each parameter.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    pub(crate) moments: Moments,
}

impl Optimizer {
    /// Returns an optimiser with zero moments for the masters that a rank owns of `parameters`.
    pub fn of(config: OptimizerConfig, parameters: &FlatParameters) -> Self {
        let FlatParameters {
            masters,
            slices,
            partition,
            share,
            ..
        } = parameters;
        Self::with_blocks(config, masters, Blocks::of(slices, partition, *share))
    }

    /// Returns an optimiser with zero moments for `masters` `[n]` of one tensor.
    pub fn new(config: OptimizerConfig, masters: &Masters) -> Self {
        Self::with_blocks(config, masters, Blocks::of_vector(masters.len()))
    }

    fn with_blocks(config: OptimizerConfig, masters: &Masters, blocks: Blocks) -> Self {
        let moments = Moments::zeros(config.state, masters.len(), blocks, masters.device());
        Self { config, moments }
    }

    /// Returns the memory of the moments with a name for each tensor.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        self.moments.tensors()
    }

    /// Returns another handle of the same memory.
    pub(crate) fn shallow_clone(&self) -> Self {
        Self {
            config: self.config.clone(),
            moments: self.moments.shallow_clone(),
        }
    }

    /// Returns how the moments are stored.
    pub(crate) fn moments_kind(&self) -> MomentsKind {
        self.config.state
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
        if let Some(vectors) = self.vectors(masters, gradients)
            && vectors.mean.device() != Device::Cpu
        {
            return self.update_on_device(&vectors, ranges, total);
        }
        if self.works_by_tensor() {
            let mut chunks = self.opened(masters, gradients, ranges);
            return update_stably(&mut chunks, ranges, workers, total);
        }
        match &self.moments {
            Moments::Fp32 { mean, mean_square } => {
                if !self.update_in_one_pass([mean, mean_square], masters, gradients, ranges) {
                    let mut chunks = self.opened(masters, gradients, ranges);
                    on_chunks(&mut chunks, workers, |chunk| {
                        chunk.advance();
                        chunk.apply(chunk.of.rate);
                    });
                }
            }
            Moments::EightBit(moments) => {
                for range in ranges {
                    for Chunk {
                        range: own,
                        gradient,
                    } in gradients.over(&range.range)
                    {
                        self.update_blocks(moments, masters, range, &own, &gradient);
                    }
                }
            }
        }
        Ok(())
    }

    /// Updates the masters of a whole tensor, or the part of it that this rank owns, with its
    /// gradient `[m]` fp32.
    pub(crate) fn update_tensor(&self, masters: &Masters, of: &UpdateRange, gradient: &Tensor) {
        assert!(
            !self.works_by_tensor(),
            "the rate must not depend on all tensors"
        );
        match &self.moments {
            Moments::Fp32 { mean, mean_square } => {
                let vector = GradientVector::at(of.range.start, gradient.shallow_clone());
                let ranges = std::slice::from_ref(of);
                if !self.update_in_one_pass([mean, mean_square], masters, &vector, ranges) {
                    for mut chunk in self.opened(masters, &vector, ranges) {
                        no_grad(|| {
                            chunk.advance();
                            chunk.apply(of.rate);
                        });
                    }
                }
            }
            Moments::EightBit(moments) => {
                self.update_blocks(moments, masters, of, &of.range, gradient);
            }
        }
    }

    /// Updates masters and moments in 8 bits of the elements `own` of a range, whole blocks, with
    /// their gradient `[m]`.
    fn update_blocks(
        &self,
        moments: &EightBit,
        masters: &Masters,
        of: &UpdateRange,
        own: &Range<i64>,
        gradient: &Tensor,
    ) {
        let adamw = self.adamw(of);
        for part in masters.over(own) {
            let inside = part.range.start - own.start..part.range.end - own.start;
            let gradient = narrow(gradient, &inside);
            if !moments.update(&adamw, &part, &gradient) {
                no_grad(|| self.update_blocks_by_operations(moments, of, &part, &gradient));
            }
        }
    }

    /// As [`EightBit::update`], on any device.
    fn update_blocks_by_operations(
        &self,
        moments: &EightBit,
        of: &UpdateRange,
        part: &Part,
        gradient: &Tensor,
    ) {
        for run in moments.blocks().over(&part.range) {
            for run in run.parts(OPERATIONS_AT_A_TIME) {
                let inside = run.own.start - part.range.start..run.own.end - part.range.start;
                let mut chunk = ChunkViews {
                    config: &self.config,
                    of,
                    index: 0,
                    numbers: part.numbers.narrow(&inside),
                    moments: moments.decode(&run),
                    gradient: narrow(gradient, &inside),
                };
                chunk.advance();
                chunk.apply(of.rate);
                moments.encode(&run, &chunk.moments, of.update);
            }
        }
    }

    /// Returns the chunks of all ranges, in order, as views.
    fn opened<'a>(
        &'a self,
        masters: &Masters,
        gradients: &GradientVector,
        ranges: &'a [UpdateRange],
    ) -> Vec<ChunkViews<'a>> {
        let places = self.chunks(masters, gradients, ranges).into_iter();
        places.map(ChunkPlace::open).collect()
    }

    /// The vectors of an update in few calls, which there is for moments in fp32 alone.
    fn vectors<'a>(
        &'a self,
        masters: &'a Masters,
        gradients: &'a GradientVector,
    ) -> Option<on_device::Vectors<'a>> {
        let Moments::Fp32 { mean, mean_square } = &self.moments else {
            return None;
        };
        Some(on_device::Vectors {
            masters,
            gradients,
            mean,
            mean_square,
        })
    }

    /// As [`Self::update`], in few calls.
    fn update_on_device(
        &self,
        vectors: &on_device::Vectors,
        ranges: &[UpdateRange],
        total: &dyn Fn(&[f64]) -> Result<Vec<f64>>,
    ) -> Result<()> {
        if !self.works_by_tensor() {
            for range in ranges {
                let parts = vectors.parts(&range.range, range.rate);
                let done = self.scalars(range.update).update(&parts);
                done.map_err(Error::torch("the update"))?;
            }
            return Ok(());
        }
        // The parts of all ranges with the same number of updates, and the ranges' indices.
        let mut runs: Vec<(u64, Vec<vectors::Part>, Vec<usize>)> = Vec::new();
        for (index, range) in ranges.iter().enumerate() {
            if runs
                .last()
                .is_none_or(|(update, _, _)| *update != range.update)
            {
                runs.push((range.update, Vec::new(), Vec::new()));
            }
            let (_, parts, indices) = runs.last_mut().expect("one was pushed");
            parts.extend(vectors.parts(&range.range, range.rate));
            indices.resize(parts.len(), index);
        }
        let mut own = vec![0.0; ranges.len()];
        for (update, parts, indices) in &runs {
            let excess = self.scalars(*update).advance(parts);
            let excess = excess.map_err(Error::torch("the update of the moments"))?;
            for (index, excess) in indices.iter().zip(excess) {
                own[*index] += excess;
            }
        }
        let rates = stable_rates(ranges, &total(&own)?);
        for (update, mut parts, indices) in runs {
            for (part, index) in parts.iter_mut().zip(indices) {
                part.rate = rates[index];
            }
            let done = self.scalars(update).apply(&parts);
            done.map_err(Error::torch("the update"))?;
        }
        Ok(())
    }

    /// Returns the scalars of the update with this index.
    fn scalars(&self, update: u64) -> vectors::AdamW {
        vectors::AdamW {
            beta1: self.config.beta1,
            beta2: self.config.beta2,
            eps: self.config.eps,
            weight_decay: self.config.weight_decay,
            update: update as f64,
        }
    }

    /// Returns the chunks of all ranges, in order.
    pub(crate) fn chunks<'a>(
        &'a self,
        masters: &Masters,
        gradients: &GradientVector,
        ranges: &'a [UpdateRange],
    ) -> Vec<ChunkPlace<'a>> {
        let mut chunks = Vec::new();
        for (index, of) in ranges.iter().enumerate() {
            for chunk in gradients.chunks(&of.range) {
                for (numbers, chunk) in parts(masters, &chunk) {
                    chunks.push(ChunkPlace {
                        optimizer: self,
                        of,
                        index,
                        numbers,
                        chunk,
                    });
                }
            }
        }
        chunks
    }

    fn adamw(&self, range: &UpdateRange) -> AdamW {
        AdamW {
            beta1: self.config.beta1,
            beta2: self.config.beta2,
            eps: self.config.eps,
            weight_decay: self.config.weight_decay,
            rate: range.rate,
            update: range.update,
        }
    }

    /// Updates with AdamW in one pass over memory. Returns `false` and changes nothing if the
    /// vectors are not in CPU memory.
    fn update_in_one_pass(
        &self,
        [mean, mean_square]: [&Tensor; 2],
        masters: &Masters,
        gradients: &GradientVector,
        ranges: &[UpdateRange],
    ) -> bool {
        for range in ranges {
            let adamw = self.adamw(range);
            for chunk in gradients.over(&range.range) {
                for (numbers, Chunk { range, gradient }) in parts(masters, &chunk) {
                    let vectors = Vectors {
                        masters: &numbers,
                        mean: &narrow(mean, &range),
                        mean_square: &narrow(mean_square, &range),
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

/// Elements of moments in 8 bits that are in fp32 at a time, where there is no loop over memory.
const OPERATIONS_AT_A_TIME: i64 = 1 << 24;

/// A chunk of a range.
#[derive(Debug)]
pub(crate) struct ChunkPlace<'a> {
    optimizer: &'a Optimizer,
    of: &'a UpdateRange,
    /// Index of `of` among the ranges of the update.
    index: usize,
    numbers: Numbers,
    chunk: Chunk,
}

impl<'a> ChunkPlace<'a> {
    /// Returns the views of its numbers.
    pub(crate) fn open(self) -> ChunkViews<'a> {
        let Chunk { range, gradient } = self.chunk;
        ChunkViews {
            config: &self.optimizer.config,
            of: self.of,
            index: self.index,
            numbers: self.numbers,
            moments: self.optimizer.moments.read(&range),
            gradient,
        }
    }
}

/// A chunk of a range, as views of masters and vectors. Changes to the views change these, except
/// for moments in 8 bits, which are copies.
#[derive(Debug)]
pub(crate) struct ChunkViews<'a> {
    config: &'a OptimizerConfig,
    of: &'a UpdateRange,
    index: usize,
    pub(crate) numbers: Numbers,
    moments: Decoded,
    pub(crate) gradient: Tensor,
}

impl ChunkViews<'_> {
    /// Updates both moments with the gradient.
    fn advance(&mut self) {
        let OptimizerConfig { beta1, beta2, .. } = *self.config;
        let Decoded { mean, mean_square } = &mut self.moments;
        let _ = mean.lerp_(&self.gradient, 1.0 - beta1);
        *mean_square *= beta2;
        *mean_square += self.gradient.square() * (1.0 - beta2);
    }

    /// Returns the sum of `g^2 / max(v, eps^2)`, with the bias-corrected second moment after this
    /// update.
    pub(crate) fn excess(&self) -> f64 {
        let OptimizerConfig { beta2, eps, .. } = *self.config;
        let correction = 1.0 - beta2.powf(self.of.update as f64);
        let mean_square = (&self.moments.mean_square / correction).clamp_min(eps * eps);
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
        let mut denominator = self.moments.mean_square.sqrt();
        denominator /= correction2;
        denominator += eps;
        &self.moments.mean / denominator * (rate / correction1)
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
    use std::slice::from_ref;

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
            let squares = [&of_apart, &of_halves].map(|of| of.tensors()[1].1);
            assert!(squares[0].equal(squares[1]));
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
    fn updates_in_few_calls_are_those_of_the_loops() {
        let size = 2 * CHUNK as i64 + 77;
        let numbers = |seed: f64| (Tensor::arange(size, (Kind::Float, Device::Cpu)) * seed).sin();
        let start = numbers(0.71);
        for name in [OptimizerName::AdamW, OptimizerName::StableAdamW] {
            for make in [Masters::halves, |start: &Tensor| {
                Masters::whole(start.copy())
            }] {
                let config = OptimizerConfig {
                    name,
                    ..OptimizerConfig::default()
                };
                let (loops, few) = (make(&start), make(&start));
                let mut of_loops = Optimizer::new(config.clone(), &loops);
                let of_few = Optimizer::new(config, &few);
                for number in 1..=20u64 {
                    // A hundredfold in the fifteenth update.
                    let grown = if number == 15 { 1e-1 } else { 1e-3 };
                    let gradient = numbers(0.1 + number as f64 * 0.01) * grown;
                    let ranges = [
                        a_range(0..1000, 1e-4, number),
                        a_range(1000..size, 1e-5, number),
                    ];
                    update(&mut of_loops, &loops, &gradient, &ranges);
                    let gradients = GradientVector::new(gradient.split(CHUNK as i64, 0));
                    let alone = |own: &[f64]| Ok(own.to_vec());
                    let vectors = of_few.vectors(&few, &gradients);
                    let vectors = vectors.expect("moments are in fp32");
                    of_few
                        .update_on_device(&vectors, &ranges, &alone)
                        .expect("there is memory");
                }
                let moved = (loops.to_tensor() - &start).norm();
                let apart = (loops.to_tensor() - few.to_tensor()).norm() / moved;
                // A step of 1e-5 of numbers near 1 is some hundred roundings of fp32.
                assert!(apart.double_value(&[]) < 2e-3, "{name:?} {apart:?}");
                let moments = of_loops.tensors().into_iter().zip(of_few.tensors());
                for ((_, of_loops), (_, of_few)) in moments {
                    let apart = (of_loops - of_few).norm() / of_loops.norm();
                    assert!(apart.double_value(&[]) < 1e-6, "{name:?} {apart:?}");
                }
            }
        }
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

    fn eight_bit() -> OptimizerConfig {
        OptimizerConfig {
            state: MomentsKind::EightBit,
            weight_decay: 0.0,
            ..OptimizerConfig::default()
        }
    }

    /// Returns how far ten updates move the elements of small gradients, in learning rates: mean,
    /// least, most. In each 256 elements one gradient is 1, all others are `ratio`.
    fn moved_beside_a_spike(ratio: f64, masters: fn(Tensor) -> Masters) -> [f64; 3] {
        let gradient = Tensor::full([4096], ratio, (Kind::Float, Device::Cpu));
        let _ = gradient.slice(0, 0, None, 256).fill_(1.0);
        let masters = masters(Tensor::zeros([4096], (Kind::Float, Device::Cpu)));
        let mut optimizer = Optimizer::new(eight_bit(), &masters);
        for number in 1..=10 {
            let range = a_range(0..4096, 1e-3, number);
            update(&mut optimizer, &masters, &gradient, &[range]);
        }
        // Those that share a block of 64 with the spike.
        let moved = masters.to_tensor().view([16, 256]).narrow(1, 1, 63) * -1e3;
        [moved.mean(Kind::Double), moved.min(), moved.max()].map(|number| number.double_value(&[]))
    }

    #[test]
    fn small_gradients_beside_a_large_one_move_as_far_as_with_fp32() {
        let kinds: [fn(Tensor) -> Masters; 2] = [Masters::whole, |vector| Masters::halves(&vector)];
        for (ratio, masters) in [1e-2, 1e-3, 1e-4, 1e-5]
            .into_iter()
            .zip(kinds.iter().cycle())
        {
            let [mean, least, most] = moved_beside_a_spike(ratio, *masters);
            assert!((8.0..12.0).contains(&mean), "{ratio}: {mean}");
            assert!(least > 6.0 && most < 12.0, "{ratio}: {least} {most}");
        }
    }

    /// Rounded to the nearest, the roots of the second moments would stay: the updates would be a
    /// third of what they are.
    #[test]
    fn second_moments_follow_gradients_that_become_smaller() {
        let config = |state| OptimizerConfig {
            state,
            ..eight_bit()
        };
        let steps = [MomentsKind::Fp32, MomentsKind::EightBit].map(|kind| {
            let masters = Masters::whole(Tensor::zeros([512], (Kind::Float, Device::Cpu)));
            let mut optimizer = Optimizer::new(config(kind), &masters);
            let mut last = Tensor::new();
            for number in 1..=2000u64 {
                let gradient = Tensor::arange(512, (Kind::Float, Device::Cpu)) * number as f64;
                let gradient = gradient.sin() * 0.1 + 0.01;
                if number > 300 {
                    let mut small = gradient.slice(0, 0, None, 2);
                    small /= 30.0;
                }
                last = masters.to_tensor();
                update(
                    &mut optimizer,
                    &masters,
                    &gradient,
                    &[a_range(0..512, 1e-3, number)],
                );
            }
            let step = (masters.to_tensor() - last).slice(0, 0, None, 2);
            step.norm().double_value(&[])
        });
        let ratio = steps[1] / steps[0];
        assert!((0.8..1.25).contains(&ratio), "{ratio}");
    }

    fn bits(tensors: &[(&str, &Tensor)]) -> Vec<Tensor> {
        tensors.iter().map(|(_, tensor)| tensor.copy()).collect()
    }

    #[test]
    fn an_update_of_8_bits_depends_on_neither_threads_nor_masters_nor_parts() {
        let size = 3 * CHUNK as i64 + 77;
        let numbers = |seed: f64| (Tensor::arange(size, (Kind::Float, Device::Cpu)) * seed).sin();
        let run = |threads, masters: Masters, parts: &[Range<i64>]| {
            tch::set_num_threads(threads);
            let mut optimizer = Optimizer::new(eight_bit(), &masters);
            for number in 1..=3u64 {
                let gradient = numbers(0.1 + number as f64 * 0.01) * 1e-3;
                let of = |range: &Range<i64>| a_range(range.clone(), 1e-3, number);
                if let [whole] = parts {
                    update(&mut optimizer, &masters, &gradient, &[of(whole)]);
                } else {
                    for part in parts {
                        let gradient = narrow(&gradient, part);
                        optimizer.update_tensor(&masters, &of(part), &gradient);
                    }
                }
            }
            (masters.to_tensor(), bits(&optimizer.tensors()))
        };
        let before = tch::get_num_threads();
        let all = 0..size;
        let alone = run(1, Masters::whole(numbers(0.7)), from_ref(&all));
        let together = run(3, Masters::halves(&numbers(0.7)), from_ref(&all));
        let apart = run(2, Masters::whole(numbers(0.7)), &[640..size, 0..640]);
        tch::set_num_threads(before);
        assert!(!alone.0.equal(&numbers(0.7)));
        for other in [together, apart] {
            assert!(alone.0.equal(&other.0));
            assert!(alone.1.iter().zip(&other.1).all(|(a, b)| a.equal(b)));
        }
    }

    #[test]
    fn loops_and_operations_update_8_bits_alike() {
        let size = 1000;
        let numbers = |seed: f64| (Tensor::arange(size, (Kind::Float, Device::Cpu)) * seed).sin();
        let masters = [
            Masters::halves(&numbers(0.7)),
            Masters::halves(&numbers(0.7)),
        ];
        let optimizers = [(), ()].map(|()| Optimizer::new(eight_bit(), &masters[0]));
        for number in 1..=5u64 {
            let gradient = numbers(0.1 + number as f64 * 0.01);
            let of = a_range(0..size, 1e-3, number);
            optimizers[0].update_tensor(&masters[0], &of, &gradient);
            let Moments::EightBit(moments) = &optimizers[1].moments else {
                panic!("moments in 8 bits");
            };
            for part in masters[1].over(&(0..size)) {
                no_grad(|| {
                    optimizers[1].update_blocks_by_operations(moments, &of, &part, &gradient);
                });
            }
        }
        let [loops, operations] = masters.map(|masters| masters.to_tensor() - numbers(0.7));
        let error = (&loops - &operations).norm() / loops.norm();
        assert!(error.double_value(&[]) < 1e-3, "{error:?}");
        for (loops, operations) in optimizers[0].tensors().iter().zip(optimizers[1].tensors()) {
            // A rounding before may decide one here.
            let equal = loops.1.eq_tensor(operations.1).to_kind(Kind::Float);
            let share = equal.mean(Kind::Double).double_value(&[]);
            assert!(
                share > 0.98 || loops.0.ends_with("scales"),
                "{}: {share}",
                loops.0
            );
        }
    }
}
