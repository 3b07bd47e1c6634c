//! An fp32 number as two halves of 16 bits: the nearest bf16, and the remainder.
//!
//! ```text
//! bits of the number = (bits of the bf16 << 16) + remainder      the remainder is signed
//! ```
//!
//! Ties are rounded away from zero: the bits plus 0x8000, shifted right by 16. Then the remainder
//! is from -0x8000 to 0x7fff, it is the lower half of the number's bits, and every number has one
//! pair. libtorch's conversion rounds ties to even, and a tie that it rounds towards zero has the
//! remainder 0x8000, which does not fit. Wherever the model's weights are rounded, it must be by
//! [`round_into`], so that a model that is loaded has the weights of the one that was trained.
//!
//! A number above the largest bf16 by half a step or more has infinity as its bf16, as with
//! libtorch, and is kept exactly. A NaN from 0x7fff8000 on (without its sign), which no arithmetic
//! makes, has a zero as its bf16.

use rectiflow_sdxl::write::write_to;
use tch::{Kind, Tensor, no_grad};

use crate::state::plain::{PIECE, is_plain, numbers, side_by_side};

/// Returns the bits of the nearest bf16, and the remainder.
pub(crate) fn split(number: f32) -> (u16, i16) {
    let bits = number.to_bits();
    let nearest = bits.wrapping_add(0x8000) >> 16;
    (nearest as u16, bits as i16)
}

/// Returns the number of two halves.
pub(crate) fn merge(nearest: u16, remainder: i16) -> f32 {
    let upper = u32::from(nearest) << 16;
    f32::from_bits(upper.wrapping_add_signed(i32::from(remainder)))
}

/// Returns the numbers `[m]` fp32 of the halves `[m]` bf16 and `[m]` int16.
pub(crate) fn merged(nearest: &Tensor, remainder: &Tensor) -> Tensor {
    if !is_plain(nearest, Kind::BFloat16) || !is_plain(remainder, Kind::Int16) {
        return merged_by_operations(nearest, remainder);
    }
    let whole = Tensor::empty(nearest.size(), (Kind::Float, nearest.device()));
    // SAFETY: `whole` is new; the others are only read, and outlive this call.
    let (whole_numbers, nearest, remainder) = unsafe {
        (
            numbers::<f32>(&whole),
            numbers::<u16>(nearest),
            numbers::<i16>(remainder),
        )
    };
    let pieces = whole_numbers
        .chunks_mut(PIECE)
        .zip(nearest.chunks(PIECE))
        .zip(remainder.chunks(PIECE));
    side_by_side(pieces.collect(), |((whole, nearest), remainder)| {
        for ((number, &nearest), &remainder) in whole.iter_mut().zip(nearest).zip(remainder) {
            *number = merge(nearest, remainder);
        }
    });
    whole
}

/// Overwrites the halves `[m]` bf16 and `[m]` int16 with those of `whole` `[m]` fp32.
pub(crate) fn split_into(nearest: &Tensor, remainder: &Tensor, whole: &Tensor) {
    let are_plain = is_plain(nearest, Kind::BFloat16)
        && is_plain(remainder, Kind::Int16)
        && is_plain(whole, Kind::Float);
    if !are_plain {
        return split_by_operations(nearest, remainder, whole);
    }
    // SAFETY: the three have dtypes of their own and so do not overlap; nothing else uses the
    // halves while they are written, and this call ends before the tensors do.
    let (nearest, remainder, whole) = unsafe {
        (
            numbers::<u16>(nearest),
            numbers::<i16>(remainder),
            numbers::<f32>(whole),
        )
    };
    let pieces = nearest
        .chunks_mut(PIECE)
        .zip(remainder.chunks_mut(PIECE))
        .zip(whole.chunks(PIECE));
    side_by_side(pieces.collect(), |((nearest, remainder), whole)| {
        for ((nearest, remainder), &number) in nearest.iter_mut().zip(remainder).zip(whole) {
            (*nearest, *remainder) = split(number);
        }
    });
}

/// Returns `source` in the dtype `kind`. From fp32 to bf16 it rounds as [`split`] does.
pub(crate) fn rounded(source: &Tensor, kind: Kind) -> Tensor {
    let source = source.detach();
    if kind == Kind::BFloat16 && source.kind() == Kind::Float {
        nearest_by_operations(&source)
    } else {
        source.to_kind(kind)
    }
}

/// Overwrites `target` with `source`, [`rounded`] to its dtype.
pub(crate) fn round_into(target: &Tensor, source: &Tensor) {
    write_to(target, &rounded(source, target.kind()));
}

/// As [`merged`], on any device.
fn merged_by_operations(nearest: &Tensor, remainder: &Tensor) -> Tensor {
    let upper = nearest.view_dtype(Kind::Int16).to_kind(Kind::Int);
    let bits: Tensor = upper * (1 << 16) + remainder.to_kind(Kind::Int);
    bits.view_dtype(Kind::Float)
}

/// As [`split_into`], on any device.
fn split_by_operations(nearest: &Tensor, remainder: &Tensor, whole: &Tensor) {
    let whole = whole.to_device(nearest.device());
    write_to(nearest, &nearest_by_operations(&whole));
    // The conversion keeps the lower half of the bits.
    let lower = whole.view_dtype(Kind::Int).to_kind(Kind::Int16);
    write_to(remainder, &lower);
}

/// Returns the nearest bf16 numbers, of the same shape.
fn nearest_by_operations(whole: &Tensor) -> Tensor {
    no_grad(|| {
        let bits: Tensor = whole.contiguous().view_dtype(Kind::Int) + 0x8000;
        let upper = bits.bitwise_right_shift_tensor_scalar(16);
        upper.to_kind(Kind::Int16).view_dtype(Kind::BFloat16)
    })
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// Numbers whose upper halves are `uppers`, each with all 65,536 lower halves.
    fn all_below(uppers: &[u32]) -> Vec<f32> {
        let mut found = Vec::new();
        for upper in uppers {
            found.extend((0..=0xffffu32).map(|lower| f32::from_bits(upper << 16 | lower)));
        }
        found
    }

    /// Even and odd bf16 numbers of both signs, zeros, subnormals, the largest, infinity.
    const UPPERS: [u32; 12] = [
        0x3f80, 0x3f81, 0xbf80, 0xbf81, 0x0000, 0x8000, 0x0001, 0x8001, 0x7f7e, 0x7f7f, 0xff7f,
        0x7f80,
    ];

    #[test]
    fn every_number_comes_back_bit_for_bit() {
        for number in all_below(&UPPERS) {
            let (nearest, remainder) = split(number);
            assert_eq!(merge(nearest, remainder).to_bits(), number.to_bits());
        }
    }

    #[test]
    fn the_bf16_is_the_nearest_and_ties_go_away_from_zero() {
        let bf16 = |bits: u16| f64::from(f32::from_bits(u32::from(bits) << 16));
        // Below infinity, whose neighbours have no distance.
        for number in all_below(&UPPERS[..9]) {
            let (nearest, _) = split(number);
            let exact = f64::from(number);
            let distance = |bits: u16| (bf16(bits) - exact).abs();
            let found = distance(nearest);
            assert!(found < distance(nearest + 1));
            if nearest & 0x7fff != 0 {
                let inwards = distance(nearest - 1);
                let is_tie = found == inwards && bf16(nearest).abs() > exact.abs();
                assert!(found < inwards || is_tie);
            }
        }
        assert_eq!(split(f32::from_bits(0x3f80_8000)).0, 0x3f81);
        assert_eq!(split(f32::from_bits(0x3f81_8000)).0, 0x3f82);
        assert_eq!(split(f32::from_bits(0xbf80_8000)).0, 0xbf81);
        assert_eq!(
            split(f32::MAX),
            (0x7f80, -1),
            "infinity, and the number stays"
        );
    }

    #[test]
    fn loops_and_operations_agree() {
        let mut all = all_below(&UPPERS);
        all.truncate(all.len() - 0xffff); // one infinity, no NaN
        let whole = Tensor::from_slice(&all);
        let run = |split: fn(&Tensor, &Tensor, &Tensor), merge: fn(&Tensor, &Tensor) -> Tensor| {
            let nearest = Tensor::zeros(whole.size(), (Kind::BFloat16, Device::Cpu));
            let remainder = Tensor::zeros(whole.size(), (Kind::Int16, Device::Cpu));
            split(&nearest, &remainder, &whole);
            let bits = |tensor: &Tensor| tensor.view_dtype(Kind::Int16);
            let back = merge(&nearest, &remainder).view_dtype(Kind::Int);
            assert!(back.equal(&whole.view_dtype(Kind::Int)));
            (bits(&nearest), remainder)
        };
        let loops = run(split_into, merged);
        let operations = run(split_by_operations, merged_by_operations);
        assert!(loops.0.equal(&operations.0) && loops.1.equal(&operations.1));
        let rounded = Tensor::zeros(whole.size(), (Kind::BFloat16, Device::Cpu));
        round_into(&rounded, &whole);
        assert!(rounded.view_dtype(Kind::Int16).equal(&loops.0));
    }

    #[test]
    fn libtorch_rounds_only_ties_otherwise() {
        let all = all_below(&UPPERS[..9]);
        let whole = Tensor::from_slice(&all);
        let ours = Tensor::zeros(whole.size(), (Kind::BFloat16, Device::Cpu));
        round_into(&ours, &whole);
        let theirs = whole.to_kind(Kind::BFloat16);
        let differ: Vec<f32> = (0..all.len())
            .zip(Vec::<bool>::try_from(ours.ne_tensor(&theirs)).expect("booleans"))
            .filter_map(|(index, differs)| differs.then_some(all[index]))
            .collect();
        // A tie whose nearest even number is the one towards zero.
        assert!(
            differ
                .iter()
                .all(|number| number.to_bits() & 0x1_ffff == 0x8000)
        );
        assert_eq!(differ.len(), 5);
    }
}
