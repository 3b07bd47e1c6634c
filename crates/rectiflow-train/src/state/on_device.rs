//! The parts of an update's vectors for a device that is no CPU: lists that few calls of libtorch
//! update ([`rectiflow_sdxl::vectors`]), where a CPU has loops of one pass over memory.

use std::ops::Range;

use rectiflow_sdxl::vectors::{Part, lerp_averages};
use tch::Tensor;

use crate::{
    error::{Error, Result},
    state::{
        gradient_vector::GradientVector,
        layout::narrow,
        masters::{Masters, Numbers},
    },
};

/// The vectors of an optimiser's update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vectors<'a> {
    pub(crate) masters: &'a Masters,
    pub(crate) gradients: &'a GradientVector,
    /// `[n]` fp32.
    pub(crate) mean: &'a Tensor,
    /// `[n]` fp32.
    pub(crate) mean_square: &'a Tensor,
}

impl Vectors<'_> {
    /// Returns a range in parts whose masters and gradients lie next to each other in memory.
    pub(crate) fn parts(&self, range: &Range<i64>, rate: f64) -> Vec<Part> {
        let mut found = Vec::new();
        for chunk in self.gradients.over(range) {
            let start = chunk.range.start;
            for part in self.masters.over(&chunk.range) {
                let inside = part.range.start - start..part.range.end - start;
                let (master, remainder) = halves(&part.numbers);
                found.push(Part {
                    master,
                    remainder,
                    mean: Some(narrow(self.mean, &part.range)),
                    mean_square: Some(narrow(self.mean_square, &part.range)),
                    gradient: Some(narrow(&chunk.gradient, &inside)),
                    average: None,
                    rate,
                });
            }
        }
        found
    }
}

/// Sets `average` to `keep * average + (1 - keep) * masters` in place, `[n]` fp32.
pub(crate) fn lerp_towards(average: &Tensor, masters: &Masters, keep: f64) -> Result<()> {
    let mut parts = Vec::new();
    for part in masters.over(&(0..masters.len())) {
        let (master, remainder) = halves(&part.numbers);
        parts.push(Part {
            master,
            remainder,
            mean: None,
            mean_square: None,
            gradient: None,
            average: Some(narrow(average, &part.range)),
            rate: 0.0,
        });
    }
    lerp_averages(&parts, 1.0 - keep).map_err(Error::torch("the average of the weights"))
}

/// Returns fp32 masters, or both halves.
fn halves(numbers: &Numbers) -> (Tensor, Option<Tensor>) {
    match numbers {
        Numbers::Whole(whole) => (whole.shallow_clone(), None),
        Numbers::Halves(nearest, remainder) => {
            (nearest.shallow_clone(), Some(remainder.shallow_clone()))
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::state::{ema, workers::Workers};

    #[test]
    fn averages_move_as_on_a_cpu() {
        let numbers = (Tensor::arange(70_003, (Kind::Float, Device::Cpu)) * 0.37).sin();
        for masters in [Masters::whole(numbers.copy()), Masters::halves(&numbers)] {
            let (ours, theirs) = (numbers.cos(), numbers.cos());
            lerp_towards(&ours, &masters, 0.9).expect("there is memory");
            ema::lerp_towards(&theirs, &masters, 0.9, &Workers::new(Device::Cpu, 1));
            let difference = (ours - theirs).abs().max().double_value(&[]);
            assert!(difference <= 1.2e-7, "{difference}");
            assert!(masters.to_tensor().equal(&numbers), "masters stay");
        }
    }
}
