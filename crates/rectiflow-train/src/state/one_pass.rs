//! Single-pass CPU loops over flat fp32 vectors, for which libtorch would need a dozen operations.
//!
//! AdamW reads and writes each number once. Split into operations it passes through the cache a
//! dozen times, and each of these operations synchronises its threads (docs/log.md, 2026-11-26).
//! Sums of squares over more than a few thousand numbers are accumulated in fp64: over the 48
//! million parameters of a small UNet, libtorch's fp32 sum is 0.3% too small, so gradients scaled
//! by it would be too large.
//!
//! No result depends on the number of threads: sums of pieces are added in order.

use tch::{Kind, Tensor};

use crate::state::{
    halves::{merge, split},
    masters::Numbers,
    plain::{PIECE, is_plain, numbers, side_by_side},
};

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

/// What an update reads and writes: masters `[n]`, and vectors `[n]` fp32, all contiguous.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vectors<'a> {
    pub(crate) masters: &'a Numbers,
    pub(crate) mean: &'a Tensor,
    pub(crate) mean_square: &'a Tensor,
    pub(crate) gradients: &'a Tensor,
}

impl AdamW {
    /// Updates masters and moments. Returns `false` and changes nothing if they are not in CPU
    /// memory.
    pub(crate) fn update(&self, vectors: Vectors<'_>) -> bool {
        let Vectors {
            masters,
            mean,
            mean_square,
            gradients,
        } = vectors;
        let plain = |vector| is_plain(vector, Kind::Float);
        let all_plain = [mean, mean_square, gradients].into_iter().all(plain);
        if !all_plain || !masters.is_plain() {
            return false;
        }
        // SAFETY: the vectors do not overlap and nothing else uses them during an update; this call
        // ends before they do.
        let (mean, mean_square) = unsafe { (numbers(mean), numbers(mean_square)) };
        // SAFETY: as above, and only read.
        let gradients: &[f32] = unsafe { numbers(gradients) };
        let moments = mean
            .chunks_mut(PIECE)
            .zip(mean_square.chunks_mut(PIECE))
            .zip(gradients.chunks(PIECE));
        let mut pieces = Vec::new();
        for (values, ((mean, mean_square), gradients)) in
            pieces_of(masters).into_iter().zip(moments)
        {
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

/// Equally long parts of masters and vectors.
struct Piece<'a> {
    values: Values<'a>,
    mean: &'a mut [f32],
    mean_square: &'a mut [f32],
    gradients: &'a [f32],
}

/// A part of the masters.
enum Values<'a> {
    Whole(&'a mut [f32]),
    /// The nearest bf16 numbers, as bits, and the remainders.
    Halves(&'a mut [u16], &'a mut [i16]),
}

/// Returns masters in CPU memory in pieces. Nothing else may use them meanwhile.
fn pieces_of(masters: &Numbers) -> Vec<Values<'_>> {
    match masters {
        Numbers::Whole(whole) => {
            // SAFETY: required of the caller, and `masters` outlives the pieces.
            let whole: &mut [f32] = unsafe { numbers(whole) };
            whole.chunks_mut(PIECE).map(Values::Whole).collect()
        }
        Numbers::Halves(nearest, remainder) => {
            // SAFETY: as above.
            let (nearest, remainder): (&mut [u16], &mut [i16]) =
                unsafe { (numbers(nearest), numbers(remainder)) };
            let pairs = nearest.chunks_mut(PIECE).zip(remainder.chunks_mut(PIECE));
            pairs
                .map(|(nearest, remainder)| Values::Halves(nearest, remainder))
                .collect()
        }
    }
}

/// Constants of an element's update, rounded to fp32 as libtorch rounds a scalar that is combined
/// with a vector.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Constants {
    new_mean: f32,
    old_square: f32,
    new_square: f32,
    keep: f32,
    correction: f32,
    eps: f32,
    step: f32,
}

impl Constants {
    pub(crate) fn new(of: &AdamW) -> Self {
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
        let moments = piece
            .mean
            .iter_mut()
            .zip(piece.mean_square)
            .zip(piece.gradients);
        match piece.values {
            Values::Whole(values) => {
                for (value, ((mean, square), &gradient)) in values.iter_mut().zip(moments) {
                    *value = self.updated(*value, mean, square, gradient);
                }
            }
            Values::Halves(nearest, remainder) => {
                let halves = nearest.iter_mut().zip(remainder);
                for ((nearest, remainder), ((mean, square), &gradient)) in halves.zip(moments) {
                    let value = merge(*nearest, *remainder);
                    let new = self.updated(value, mean, square, gradient);
                    (*nearest, *remainder) = split(new);
                }
            }
        }
    }

    /// As [`Self::updated`], with the root of the second moment.
    #[inline(always)]
    pub(crate) fn updated_by_root(
        self,
        value: f32,
        mean: &mut f32,
        root: &mut f32,
        gradient: f32,
    ) -> f32 {
        let mut square = *root * *root;
        let new = self.updated(value, mean, &mut square, gradient);
        *root = square.sqrt();
        new
    }

    /// As [`Self::updated_by_root`], for a value in halves.
    #[inline(always)]
    pub(crate) fn update_halves_by_root(
        self,
        (nearest, remainder): (&mut u16, &mut i16),
        mean: &mut f32,
        root: &mut f32,
        gradient: f32,
    ) {
        let value = merge(*nearest, *remainder);
        let new = self.updated_by_root(value, mean, root, gradient);
        (*nearest, *remainder) = split(new);
    }

    /// Updates the moments of an element. Returns its new value.
    #[inline(always)]
    fn updated(self, value: f32, mean: &mut f32, square: &mut f32, gradient: f32) -> f32 {
        *mean += self.new_mean * (gradient - *mean);
        *square = *square * self.old_square + gradient * gradient * self.new_square;
        let denominator = square.sqrt() / self.correction + self.eps;
        value * self.keep - *mean / denominator * self.step
    }
}

/// Returns the square of an fp32 vector's Euclidean norm, summed in fp64.
pub(crate) fn square_norm(vector: &Tensor) -> f64 {
    if !is_plain(vector, Kind::Float) {
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

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::state::masters::Masters;

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
        let run = |threads, take: fn(Tensor) -> Masters| {
            tch::set_num_threads(threads);
            let [values, mean, mean_square, gradients] = [0.1, 0.2, 0.3, 0.4].map(numbers);
            let mean_square = mean_square.square();
            let masters = take(values);
            let part = masters.over(&(7..399_999)).remove(0);
            let [mean_part, square_part, gradient_part] =
                [&mean, &mean_square, &gradients].map(|vector| vector.narrow(0, 7, 399_992));
            let vectors = Vectors {
                masters: &part.numbers,
                mean: &mean_part,
                mean_square: &square_part,
                gradients: &gradient_part,
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
            (norm(&gradients), [masters.to_tensor(), mean, mean_square])
        };
        let before = tch::get_num_threads();
        let alone = run(1, Masters::whole);
        let together = run(3, Masters::whole);
        let halves = run(3, |vector| Masters::halves(&vector));
        tch::set_num_threads(before);
        assert!(alone.0 == together.0);
        assert!(alone.1.iter().zip(&together.1).all(|(a, b)| a.equal(b)));
        assert!(alone.1.iter().zip(&halves.1).all(|(a, b)| a.equal(b)));
        assert!(
            alone.1[0].double_value(&[6]) == numbers(0.1).double_value(&[6]),
            "the element after the range stays"
        );
    }
}
