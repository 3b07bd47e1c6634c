//! Single-pass CPU loops over flat fp32 vectors, for which libtorch would need a dozen operations.
//!
//! AdamW reads and writes each number once. Split into operations it passes through the cache a
//! dozen times, and each of these operations synchronises its threads (docs/log.md, 2026-11-26).
//! Sums of squares over more than a few thousand numbers are accumulated in fp64: over the 48
//! million parameters of a small UNet, libtorch's fp32 sum is 0.3% too small, so gradients scaled
//! by it would be too large.
//!
//! No result depends on the number of threads: pieces have a fixed size, and their sums are added
//! in order.

use std::thread;

use tch::{Device, Kind, Tensor};

use crate::state::workers;

/// Elements in a piece, the unit of work of a thread.
const PIECE: usize = 1 << 16;

/// The scalars of an AdamW update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamW {
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) eps: f64,
    pub(crate) weight_decay: f64,
    /// Learning rate.
    pub(crate) rate: f64,
    /// Index of this update since the moments were zero, from 1.
    pub(crate) update: u64,
}

/// The vectors that an update reads and writes, each `[n]` fp32 and contiguous.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vectors<'a> {
    pub(crate) values: &'a Tensor,
    pub(crate) mean: &'a Tensor,
    pub(crate) mean_square: &'a Tensor,
    pub(crate) gradients: &'a Tensor,
}

impl AdamW {
    /// Updates values and moments. Returns `false` and changes nothing if they are not in CPU
    /// memory.
    pub(crate) fn update(&self, vectors: Vectors<'_>) -> bool {
        let Vectors {
            values,
            mean,
            mean_square,
            gradients,
        } = vectors;
        if ![values, mean, mean_square, gradients]
            .into_iter()
            .all(is_plain)
        {
            return false;
        }
        // SAFETY: the four vectors do not overlap and nothing else uses them during an update; this
        // call ends before they do.
        let (values, mean, mean_square) =
            unsafe { (numbers(values), numbers(mean), numbers(mean_square)) };
        // SAFETY: as above, and only read.
        let gradients: &[f32] = unsafe { numbers(gradients) };
        let cut = values
            .chunks_mut(PIECE)
            .zip(mean.chunks_mut(PIECE))
            .zip(mean_square.chunks_mut(PIECE))
            .zip(gradients.chunks(PIECE));
        let mut pieces = Vec::new();
        for (((values, mean), mean_square), gradients) in cut {
            pieces.push(Piece {
                values,
                mean,
                mean_square,
                gradients,
            });
        }
        let constants = Constants::new(self);
        side_by_side(pieces, |piece| constants.update(piece));
        true
    }
}

/// Equally long parts of the four vectors.
struct Piece<'a> {
    values: &'a mut [f32],
    mean: &'a mut [f32],
    mean_square: &'a mut [f32],
    gradients: &'a [f32],
}

/// Constants of an element's update, rounded to fp32 as libtorch rounds a scalar that is combined
/// with a vector.
#[derive(Debug, Clone, Copy)]
struct Constants {
    new_mean: f32,
    old_square: f32,
    new_square: f32,
    keep: f32,
    correction: f32,
    eps: f32,
    step: f32,
}

impl Constants {
    fn new(of: &AdamW) -> Self {
        let correction1 = 1.0 - of.beta1.powf(of.update as f64);
        let correction2 = 1.0 - of.beta2.powf(of.update as f64);
        Self {
            new_mean: (1.0 - of.beta1) as f32,
            old_square: of.beta2 as f32,
            new_square: (1.0 - of.beta2) as f32,
            keep: (1.0 - of.rate * of.weight_decay) as f32,
            correction: correction2.sqrt() as f32,
            eps: of.eps as f32,
            step: (of.rate / correction1) as f32,
        }
    }

    /// Updates one piece.
    fn update(self, piece: Piece<'_>) {
        let elements = piece
            .values
            .iter_mut()
            .zip(piece.mean)
            .zip(piece.mean_square)
            .zip(piece.gradients);
        for (((value, mean), square), &gradient) in elements {
            *mean += self.new_mean * (gradient - *mean);
            *square = *square * self.old_square + gradient * gradient * self.new_square;
            *value = *value * self.keep
                - *mean / (square.sqrt() / self.correction + self.eps) * self.step;
        }
    }
}

/// Returns the square of an fp32 vector's Euclidean norm, summed in fp64.
pub(crate) fn square_norm(vector: &Tensor) -> f64 {
    if !is_plain(vector) {
        let norm = vector.norm_scalaropt_dtype(2, Kind::Double);
        return norm.double_value(&[]).powi(2);
    }
    // SAFETY: nothing writes a vector while it is measured; this call ends before the vector does.
    let numbers: &[f32] = unsafe { numbers(vector) };
    let mut sums = vec![0.0; numbers.len().div_ceil(PIECE)];
    let pieces = numbers.chunks(PIECE).zip(&mut sums);
    side_by_side(pieces.collect(), |(piece, sum)| {
        *sum = sum_of_squares(piece)
    });
    sums.into_iter().sum()
}

fn sum_of_squares(numbers: &[f32]) -> f64 {
    numbers.chunks(64 * LANES).map(sum_of_row).sum()
}

/// Fp32 sums of squares that are accumulated side by side, which a compiler can vectorise.
const LANES: usize = 16;

/// Returns the sum of squares of a row that is short enough for fp32.
fn sum_of_row(row: &[f32]) -> f64 {
    let mut lanes = [0f32; LANES];
    let whole = row.chunks_exact(LANES);
    let rest = whole.remainder().iter();
    let rest: f64 = rest.map(|&x| f64::from(x) * f64::from(x)).sum();
    for numbers in whole {
        for (lane, &x) in lanes.iter_mut().zip(numbers) {
            *lane += x * x;
        }
    }
    rest + lanes.into_iter().map(f64::from).sum::<f64>()
}

/// Returns whether a tensor is a contiguous fp32 vector in CPU memory.
fn is_plain(vector: &Tensor) -> bool {
    vector.device() == Device::Cpu
        && vector.kind() == Kind::Float
        && vector.dim() == 1
        && vector.is_contiguous()
}

/// Returns the elements of a vector as a slice.
///
/// # Safety
/// The vector is plain and outlives the returned slice. Meanwhile nothing else accesses it, or all
/// accesses are reads.
#[allow(
    clippy::mut_from_ref,
    reason = "a tensor is a reference to its elements, and any handle may write them"
)]
unsafe fn numbers<'a>(vector: &Tensor) -> &'a mut [f32] {
    let length = vector.numel();
    if length == 0 {
        return &mut [];
    }
    // SAFETY: required of the caller; the pointer is that of the tensor's first element.
    unsafe { std::slice::from_raw_parts_mut(vector.data_ptr().cast(), length) }
}

/// Calls `work` on each piece, with as many threads as libtorch has on this thread.
fn side_by_side<T: Send>(mut pieces: Vec<T>, work: impl Fn(T) + Sync) {
    let threads = workers::threads().min(pieces.len());
    if threads < 2 {
        return pieces.into_iter().for_each(work);
    }
    let share = pieces.len().div_ceil(threads);
    thread::scope(|scope| {
        while pieces.len() > share {
            let own = pieces.split_off(pieces.len() - share);
            scope.spawn(|| own.into_iter().for_each(&work));
        }
        pieces.into_iter().for_each(&work);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn norm(vector: &Tensor) -> f64 {
        square_norm(vector).sqrt()
    }

    #[test]
    fn a_long_vectors_norm_is_exact() {
        // An fp32 sum of this many ones would stop at 2^24 in each lane, or lose small terms beside
        // large ones.
        let size = 3 * (1 << 21) + 5;
        let vector = Tensor::full([size], 0.1f64, (Kind::Float, Device::Cpu));
        let exact = f64::from(0.1f32) * (size as f64).sqrt();
        assert!(
            (norm(&vector) / exact - 1.0).abs() < 1e-6,
            "{} {exact}",
            norm(&vector)
        );
        let every_second = vector.slice(0, None, None, 2);
        assert!(
            (norm(&every_second) / exact * 2f64.sqrt() - 1.0).abs() < 1e-6,
            "libtorch, in fp64"
        );
        assert!(norm(&vector.narrow(0, 0, 0)) == 0.0);
        assert!(norm(&Tensor::from_slice(&[1.0f32, f32::NAN])).is_nan());
    }

    #[test]
    fn the_number_of_threads_does_not_show() {
        let numbers =
            |seed: f64| (Tensor::arange(400_000, (Kind::Float, Device::Cpu)) * seed).sin();
        let run = |threads| {
            tch::set_num_threads(threads);
            let [values, mean, mean_square, gradients] = [0.1, 0.2, 0.3, 0.4].map(numbers);
            let mean_square = mean_square.square();
            let [a, b, c, d] = [&values, &mean, &mean_square, &gradients]
                .map(|vector| vector.narrow(0, 7, 399_992));
            let vectors = Vectors {
                values: &a,
                mean: &b,
                mean_square: &c,
                gradients: &d,
            };
            let adamw = AdamW {
                beta1: 0.9,
                beta2: 0.99,
                eps: 1e-8,
                weight_decay: 0.1,
                rate: 1e-3,
                update: 3,
            };
            assert!(adamw.update(vectors));
            (norm(&gradients), [values, mean, mean_square])
        };
        let before = tch::get_num_threads();
        let (alone, together) = (run(1), run(3));
        tch::set_num_threads(before);
        assert!(alone.0 == together.0);
        assert!(alone.1.iter().zip(&together.1).all(|(a, b)| a.equal(b)));
        assert!(
            alone.1[0].double_value(&[6]) == numbers(0.1).double_value(&[6]),
            "the element after the range stays"
        );
    }
}
