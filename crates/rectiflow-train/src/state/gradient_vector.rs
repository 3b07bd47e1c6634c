//! The sum of a step's gradients: one vector in several stretches of memory.
//!
//! A bucket's stretch is allocated when its first gradient arrives. By then the backward pass has
//! freed the activations of later layers, and the stretch reuses their memory. A single allocation
//! for the whole vector fits into none of these gaps and would take new memory in every step
//! (docs/log.md, 2026-11-26).

use std::ops::Range;

use rectiflow_sdxl::vectors;
use tch::{Device, Tensor};

use crate::state::{
    layout::{chunks, intersect, narrow},
    one_pass,
};

/// Why sums and products of finished vectors do not fail.
const LIBTORCH: &str = "the device has memory for a number of each stretch";

/// A vector `[n]` fp32 in stretches, in order and without gaps.
#[derive(Debug)]
pub(crate) struct GradientVector(Vec<Stretch>);

#[derive(Debug)]
struct Stretch {
    /// Elements in the vector.
    range: Range<i64>,
    numbers: Tensor,
}

/// A range of the vector.
#[derive(Debug)]
pub(crate) struct Chunk {
    /// Elements in the vector.
    pub(crate) range: Range<i64>,
    /// View of these elements.
    pub(crate) gradient: Tensor,
}

impl GradientVector {
    /// Returns the concatenation of `vectors`, without copying them.
    pub(crate) fn new(vectors: impl IntoIterator<Item = Tensor>) -> Self {
        let mut stretches = Vec::new();
        let mut end = 0;
        for numbers in vectors {
            let start = end;
            end += numbers.numel() as i64;
            stretches.push(Stretch {
                range: start..end,
                numbers,
            });
        }
        Self(stretches)
    }

    /// Returns the part of a vector that begins with element `start`.
    pub(crate) fn at(start: i64, numbers: Tensor) -> Self {
        let range = start..start + numbers.numel() as i64;
        Self(vec![Stretch { range, numbers }])
    }

    /// Returns the elements of a range in order, one chunk for each stretch.
    pub(crate) fn over(&self, range: &Range<i64>) -> Vec<Chunk> {
        let mut found = Vec::new();
        let first = self
            .0
            .partition_point(|stretch| stretch.range.end <= range.start);
        for stretch in &self.0[first..] {
            if stretch.range.start >= range.end {
                break;
            }
            let common = intersect(range, &stretch.range);
            if !common.is_empty() {
                let start = stretch.range.start;
                let inside = common.start - start..common.end - start;
                found.push(Chunk {
                    range: common,
                    gradient: narrow(&stretch.numbers, &inside),
                });
            }
        }
        found
    }

    /// Returns a range in chunks of a size that suits the device.
    pub(crate) fn chunks(&self, range: &Range<i64>) -> Vec<Chunk> {
        let mut found = Vec::new();
        for stretch in self.over(range) {
            let start = stretch.range.start;
            for range in chunks(&stretch.range, stretch.gradient.device()) {
                let inside = range.start - start..range.end - start;
                let gradient = narrow(&stretch.gradient, &inside);
                found.push(Chunk { range, gradient });
            }
        }
        found
    }

    /// Returns the sum of the squares of a range.
    pub(crate) fn square_norm(&self, range: &Range<i64>) -> f64 {
        let stretches = self.over(range);
        if stretches
            .iter()
            .any(|chunk| chunk.gradient.device() != Device::Cpu)
        {
            let all: Vec<&Tensor> = stretches.iter().map(|chunk| &chunk.gradient).collect();
            return vectors::square_norm(&all).expect(LIBTORCH);
        }
        stretches
            .iter()
            .map(|stretch| one_pass::square_norm(&stretch.gradient))
            .sum()
    }

    /// Multiplies the vector by `factor`.
    pub(crate) fn scale(&mut self, factor: f64) {
        let is_on_cpu = |stretch: &Stretch| stretch.numbers.device() == Device::Cpu;
        if !self.0.iter().all(is_on_cpu) {
            let all: Vec<&Tensor> = self.0.iter().map(|stretch| &stretch.numbers).collect();
            return vectors::scale(&all, factor).expect(LIBTORCH);
        }
        for stretch in &mut self.0 {
            stretch.numbers *= factor;
        }
    }
}

#[cfg(test)]
impl GradientVector {
    /// Returns a contiguous copy.
    pub(crate) fn joined(&self) -> Tensor {
        let stretches: Vec<&Tensor> = self.0.iter().map(|stretch| &stretch.numbers).collect();
        Tensor::cat(&stretches, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_found_in_its_stretches() {
        let lengths = [3i64, 1, 0, 4];
        let numbers = Tensor::arange(8, (tch::Kind::Float, tch::Device::Cpu));
        let mut vector = GradientVector::new(numbers.split_with_sizes(lengths, 0));
        for range in [0..8, 0..3, 2..4, 3..4, 4..5, 7..8, 5..5, 8..8] {
            let found = vector.over(&range);
            let ranges: Vec<i64> = found.iter().flat_map(|chunk| chunk.range.clone()).collect();
            assert_eq!(ranges, range.clone().collect::<Vec<_>>());
            assert!(
                found
                    .iter()
                    .all(|chunk| chunk.gradient.equal(&narrow(&numbers, &chunk.range))),
                "{range:?}"
            );
            let square = range.clone().map(|x| (x * x) as f64).sum::<f64>();
            assert!((vector.square_norm(&range) - square).abs() < 1e-9);
        }
        let halved = &numbers * 0.5;
        vector.clip(2.0, 4.0);
        vector.clip(2.0, 1.0);
        assert!(vector.joined().equal(&halved));
    }
}
