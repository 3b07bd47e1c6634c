//! A vector in 8 bits a number, with the scale of each block: read, written, and rounded.
//!
//! On a CPU there are loops over the memory (here and in `pass`), on other devices operations of
//! libtorch. Both round alike, bit for bit.

use tch::{Device, Kind, Tensor, no_grad};

use crate::state::{
    eight_bit::{
        blocks::{BLOCK, Blocks, Run},
        map::{Chances, Map, NEAREST},
    },
    layout::narrow,
    plain::{is_plain, numbers},
};

/// The numbers of a vector `[k]`.
#[derive(Debug)]
pub(crate) struct Codes {
    map: &'static Map,
    /// One code for each number, `[k]` uint8.
    pub(crate) codes: Tensor,
    /// The number of the largest size of each block, `[b]` fp32.
    pub(crate) scales: Tensor,
}

/// How numbers that are between two of a map are rounded.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rounding {
    /// To the nearest.
    Nearest,
    /// At random, with the right mean.
    Random(Chances),
}

impl Rounding {
    /// Returns the chance of an element.
    #[inline(always)]
    pub(crate) fn chance(self, element: u64) -> f32 {
        match self {
            Self::Nearest => NEAREST,
            Self::Random(chances) => chances.of(element),
        }
    }
}

impl Codes {
    /// Returns the numbers of codes `[k]` uint8 and scales `[b]` fp32.
    pub(crate) fn new(map: &'static Map, [codes, scales]: [Tensor; 2]) -> Self {
        Self { map, codes, scales }
    }

    /// Returns another handle of the same memory.
    pub(crate) fn shallow_clone(&self) -> Self {
        let memory = [&self.codes, &self.scales].map(Tensor::shallow_clone);
        Self::new(self.map, memory)
    }

    /// Returns zeros for these blocks.
    pub(crate) fn zeros(map: &'static Map, len: i64, blocks: &Blocks, device: Device) -> Self {
        let zero = i64::from(map.code(0.0, NEAREST));
        Self {
            map,
            codes: Tensor::full([len], zero, (Kind::Uint8, device)),
            scales: Tensor::zeros([blocks.len()], (Kind::Float, device)),
        }
    }

    /// Whether the loops can read and write it.
    pub(crate) fn is_plain(&self) -> bool {
        is_plain(&self.codes, Kind::Uint8) && is_plain(&self.scales, Kind::Float)
    }

    /// Returns the numbers of some blocks, `[m]` fp32.
    pub(crate) fn read(&self, run: &Run) -> Tensor {
        if !self.is_plain() {
            return self.read_by_operations(run);
        }
        let codes = narrow(&self.codes, &run.own);
        let scales = narrow(&self.scales, &run.blocks);
        let found = Tensor::empty(codes.size(), (Kind::Float, Device::Cpu));
        // SAFETY: `found` is new; the others are only read, and outlive this call.
        let (mut found_numbers, mut codes, scales) = unsafe {
            (
                numbers::<f32>(&found),
                &*numbers::<u8>(&codes),
                &*numbers::<f32>(&scales),
            )
        };
        for (length, &scale) in run.lengths().zip(scales) {
            let (block, rest) = found_numbers.split_at_mut(length);
            let (of_block, other) = codes.split_at(length);
            for (number, &code) in block.iter_mut().zip(of_block) {
                *number = self.map.numbers[usize::from(code)] * scale;
            }
            (found_numbers, codes) = (rest, other);
        }
        found
    }

    /// Overwrites some blocks with `new` `[m]` fp32, rounded.
    pub(crate) fn write(&self, run: &Run, new: &Tensor, rounding: Rounding) {
        if !self.is_plain() || !is_plain(new, Kind::Float) {
            return self.write_by_operations(run, new, rounding);
        }
        let codes = narrow(&self.codes, &run.own);
        let scales = narrow(&self.scales, &run.blocks);
        // SAFETY: the three have memory of their own, nothing else uses the first two meanwhile,
        // and this call ends before they do.
        let (mut codes, scales, mut new) = unsafe {
            (
                numbers::<u8>(&codes),
                numbers::<f32>(&scales),
                &*numbers::<f32>(new),
            )
        };
        let mut element = run.element as u64;
        for (length, scale) in run.lengths().zip(scales) {
            let (of_block, other) = codes.split_at_mut(length);
            let (block, rest) = new.split_at(length);
            *scale = encode(self.map, block, of_block, |index| {
                rounding.chance(element + index as u64)
            });
            element += length as u64;
            (codes, new) = (other, rest);
        }
    }

    /// As [`Self::read`], on any device.
    fn read_by_operations(&self, run: &Run) -> Tensor {
        let map = Tensor::from_slice(&self.map.numbers).to_device(self.codes.device());
        let codes = narrow(&self.codes, &run.own).to_kind(Kind::Int);
        let ratios = in_rows(&map.index_select(0, &codes), run);
        let scales = narrow(&self.scales, &run.blocks).unsqueeze(1);
        out_of_rows(&(ratios * scales), run)
    }

    /// As [`Self::write`], on any device.
    fn write_by_operations(&self, run: &Run, new: &Tensor, rounding: Rounding) {
        no_grad(|| {
            let rows = in_rows(&new.to_device(self.codes.device()), run);
            let scales = scales_of_rows(&rows);
            let divisors = scales.where_self(&scales.ne(0.0), &scales.ones_like());
            let ratios = out_of_rows(&(rows / divisors.unsqueeze(1)), run);
            let chances = chances_by_operations(run, rounding, self.codes.device());
            let codes = self.map.codes_by_operations(&ratios, &chances);
            narrow(&self.codes, &run.own).copy_(&codes);
            narrow(&self.scales, &run.blocks).copy_(&scales);
        });
    }
}

/// Overwrites the codes of a block with those of `new`, and returns the block's scale. `chance`
/// returns that of a number by its index.
#[inline(always)]
pub(crate) fn encode(
    map: &Map,
    new: &[f32],
    codes: &mut [u8],
    chance: impl Fn(usize) -> f32,
) -> f32 {
    let scale = scale_of(new);
    let divisor = if scale == 0.0 { 1.0 } else { scale };
    for (index, (code, &number)) in codes.iter_mut().zip(new).enumerate() {
        *code = map.code(number / divisor, chance(index));
    }
    scale
}

/// Returns the number of the largest size; NaN if any is not finite.
#[inline(always)]
fn scale_of(block: &[f32]) -> f32 {
    let (mut largest, mut smallest, mut nothing) = (0f32, 0f32, 0f32);
    for &number in block {
        largest = largest.max(number);
        smallest = smallest.min(number);
        // 0, or NaN.
        nothing += number * 0.0;
    }
    let scale = if -smallest > largest {
        smallest
    } else {
        largest
    };
    scale + nothing
}

/// As [`scale_of`], for each row of `[b, 64]`.
fn scales_of_rows(rows: &Tensor) -> Tensor {
    let largest = rows.amax([1i64].as_slice(), false).clamp_min(0.0);
    let smallest = rows.amin([1i64].as_slice(), false).clamp_max(0.0);
    let is_negative = (-&smallest).gt_tensor(&largest);
    let nothing = (rows * 0.0).sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    smallest.where_self(&is_negative, &largest) + nothing
}

/// Returns the numbers of whole blocks, `[m]`, as `[b, 64]`: zeros stand where a block is shorter.
fn in_rows(numbers: &Tensor, run: &Run) -> Tensor {
    let end = padding_at_end(run);
    let padded = if run.lacks == 0 && end == 0 {
        numbers.shallow_clone()
    } else {
        numbers.constant_pad_nd([run.lacks, end])
    };
    padded.view([-1, BLOCK])
}

/// Returns the numbers that [`in_rows`] has put into rows.
fn out_of_rows(rows: &Tensor, run: &Run) -> Tensor {
    let flat = rows.flatten(0, 1);
    narrow(
        &flat,
        &(run.lacks..flat.numel() as i64 - padding_at_end(run)),
    )
}

fn padding_at_end(run: &Run) -> i64 {
    let places = (run.blocks.end - run.blocks.start) * BLOCK;
    places - run.lacks - (run.own.end - run.own.start)
}

/// Returns the chance of each element of some blocks, `[m]` fp32.
fn chances_by_operations(run: &Run, rounding: Rounding, device: Device) -> Tensor {
    let len = run.own.end - run.own.start;
    match rounding {
        Rounding::Nearest => Tensor::full([len], f64::from(NEAREST), (Kind::Float, device)),
        Rounding::Random(chances) => {
            let elements =
                Tensor::arange_start(run.element, run.element + len, (Kind::Int64, device));
            chances.by_operations(&elements)
        }
    }
}

#[cfg(test)]
mod tests {
    use rectiflow_data::order::RankOf;

    use super::*;
    use crate::state::{
        eight_bit::map::{SIGNED, UNSIGNED},
        layout::Slice,
        partition::Partition,
    };

    /// Blocks of tensors of 10, 300, 64 and 70 elements, the last of which is a bucket of its own.
    fn blocks() -> Blocks {
        let mut start = 0;
        let slices = [10, 300, 64, 70].map(|length| {
            let range = start..start + length;
            start += length;
            Slice {
                name: String::new(),
                shape: vec![length],
                range,
                kind: Kind::Float,
            }
        });
        Blocks::of(&slices, &Partition::of_buckets([374, 70], 1), RankOf::ONLY)
    }

    fn vector(blocks_have_sign: bool) -> Tensor {
        let numbers = (Tensor::arange(444, (Kind::Float, Device::Cpu)) * 0.71).sin();
        let decades = (Tensor::arange(444, (Kind::Float, Device::Cpu)) * 0.37).cos() * 3.0;
        let numbers = numbers * (decades * 10f64.ln()).exp();
        if blocks_have_sign {
            numbers
        } else {
            numbers.abs()
        }
    }

    #[test]
    fn loops_and_operations_agree_and_what_was_rounded_stays() {
        let blocks = blocks();
        for (map, has_sign) in [(&SIGNED, true), (&UNSIGNED, false)] {
            let new = vector(has_sign);
            let random = Rounding::Random(Chances::of_update(3));
            let [loops, operations] =
                [(), ()].map(|()| Codes::zeros(map, 444, &blocks, Device::Cpu));
            for run in blocks.over(&(0..444)) {
                let part = narrow(&new, &run.own);
                loops.write(&run, &part, random);
                operations.write_by_operations(&run, &part, random);
                let found = loops.read(&run);
                assert!(found.equal(&loops.read_by_operations(&run)));
                let error = (&found - &part).norm() / part.norm();
                assert!(error.double_value(&[]) < 0.05, "{error:?}");
                // What a map has is not rounded again.
                operations.write(&run, &found, Rounding::Nearest);
                assert!(operations.read(&run).equal(&found));
                operations.write_by_operations(&run, &part, random);
            }
            assert!(loops.codes.equal(&operations.codes));
            assert!(loops.scales.equal(&operations.scales));
            // The number of the largest size of a block is exact, with either sign.
            let largest = narrow(&new, &(10..64));
            let at = largest.abs().argmax(None, false).int64_value(&[]);
            let scale = loops.scales.double_value(&[1]);
            assert_eq!(largest.double_value(&[at]), scale);
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_not_finite_shows() {
        let blocks = blocks();
        let run = blocks.over(&(0..10)).remove(0);
        for map in [&SIGNED, &UNSIGNED] {
            let codes = Codes::zeros(map, 444, &blocks, Device::Cpu);
            assert!(
                codes
                    .read(&run)
                    .equal(&Tensor::zeros([10], (Kind::Float, Device::Cpu)))
            );
            for bad in [f32::NAN, f32::INFINITY] {
                let mut numbers = [0.5f32; 10];
                numbers[3] = bad;
                codes.write(&run, &Tensor::from_slice(&numbers), Rounding::Nearest);
                let found = Vec::<f32>::try_from(codes.read(&run)).expect("a vector");
                assert!(found.iter().all(|number| number.is_nan()), "{found:?}");
                codes.write_by_operations(&run, &Tensor::from_slice(&numbers), Rounding::Nearest);
                let found = Vec::<f32>::try_from(codes.read(&run)).expect("a vector");
                assert!(found.iter().all(|number| number.is_nan()), "{found:?}");
            }
            codes.write(
                &run,
                &Tensor::zeros([10], (Kind::Float, Device::Cpu)),
                Rounding::Nearest,
            );
            assert!(
                codes
                    .read(&run)
                    .equal(&Tensor::zeros([10], (Kind::Float, Device::Cpu)))
            );
        }
    }
}
