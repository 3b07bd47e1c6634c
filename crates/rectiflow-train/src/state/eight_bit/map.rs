//! The maps from 8 bits to numbers from -1 to 1 or from 0 to 1, and the rounding to them.

use std::sync::LazyLock;

/// The map of numbers with a sign: the first moment.
pub(crate) static SIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(true));
/// The map of numbers that are at least 0: the root of the second moment.
pub(crate) static UNSIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(false));

/// The chance that rounds to the nearest number.
pub(crate) const NEAREST: f32 = 0.5;

/// bitsandbytes' dynamic map of 8 bits: 7 decades, of which each has twice as many numbers, evenly
/// spaced, as the one below it.
#[derive(Debug)]
pub(crate) struct Map {
    has_sign: bool,
    /// The number of each code, ascending.
    pub(crate) numbers: [f32; 256],
    /// The numbers from 0 on; infinity after the last one.
    levels: [f32; 257],
    /// For each level, 1 over the distance to the next one.
    inverse_gaps: [f32; 257],
    /// For each cell of fp32 numbers, which have the same exponent and the same first seven bits,
    /// the largest level that is not above them. A cell has at most one level inside.
    below: [u8; CELLS],
}

/// Decades of a map.
const DECADES: u32 = 7;
/// The smallest cell: 2^-22, below every level.
const LOWEST_CELL: u32 = (127 - 22) << 7;
/// Cells up to that of 1.
const CELLS: usize = (22 << 7) + 1;

impl Map {
    fn new(has_sign: bool) -> Self {
        let mut positive = vec![0.0];
        for decade in 0..DECADES {
            // The numbers between two boundaries, as bitsandbytes calculates them in fp32.
            let intervals = 1 << if has_sign { decade } else { decade + 1 };
            let unit = 10f64.powi(decade as i32 + 1 - DECADES as i32) as f32;
            for index in 0..intervals {
                let edges = boundary(index, intervals) + boundary(index + 1, intervals);
                positive.push(edges / 2.0 * unit);
            }
        }
        positive.push(1.0);

        let mut numbers = positive.clone();
        if has_sign {
            // There is no -1.
            let negative = positive[1..positive.len() - 1].iter().map(|number| -number);
            numbers.splice(0..0, negative.rev());
        }
        let numbers = numbers.try_into().expect("8 bits have 256 numbers");
        Self::of_levels(has_sign, numbers, &positive)
    }

    fn of_levels(has_sign: bool, numbers: [f32; 256], positive: &[f32]) -> Self {
        let mut levels = [f32::INFINITY; 257];
        levels[..positive.len()].copy_from_slice(positive);
        let mut inverse_gaps = [0.0; 257];
        for (index, pair) in positive.windows(2).enumerate() {
            inverse_gaps[index] = 1.0 / (pair[1] - pair[0]);
        }
        let mut below = [0; CELLS];
        let mut level = 0;
        for (cell, below) in (LOWEST_CELL..).zip(&mut below) {
            let start = f32::from_bits(cell << 16);
            while levels[level + 1] <= start {
                level += 1;
            }
            *below = level as u8;
        }
        Self {
            has_sign,
            numbers,
            levels,
            inverse_gaps,
            below,
        }
    }

    /// Returns the code of `ratio`, which is in the range of the map. Of the two numbers beside it,
    /// the upper one (by size) is taken if the ratio's part of the way from the lower to the upper
    /// one is above `chance`, from 0 to 1. With a `chance` that is uniform, the mean is right.
    #[inline(always)]
    pub(crate) fn code(&self, ratio: f32, chance: f32) -> u8 {
        let size = ratio.abs();
        let cell = (size.to_bits() >> 16).saturating_sub(LOWEST_CELL) as usize;
        let mut level = usize::from(self.below[cell.min(CELLS - 1)]);
        level += usize::from(size >= self.levels[level + 1]);
        let part = (size - self.levels[level]) * self.inverse_gaps[level];
        level += usize::from(part > chance);
        if !self.has_sign {
            // Above 0 there is a floor.
            return level.max(usize::from(size > 0.0)) as u8;
        }
        let zero = 127;
        if ratio < 0.0 {
            (zero - level.min(zero)) as u8
        } else {
            (zero + level) as u8
        }
    }
}

/// Returns a boundary of equal intervals from 0.1 to 1, as `torch.linspace` calculates it in fp32:
/// the upper half from the end, each product added without being rounded.
fn boundary(index: u32, intervals: u32) -> f32 {
    let step = (1.0 - 0.1f32) / intervals as f32;
    if index < intervals.div_ceil(2) {
        step.mul_add(index as f32, 0.1)
    } else {
        (-step).mul_add((intervals - index) as f32, 1.0)
    }
}

/// Chances of an update's roundings, uniform from 0 to below 1: a function of the update and of the
/// place of a number in the flat vector, so that neither a resume nor the number of ranks or
/// threads changes them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chances(u32);

impl Chances {
    /// Returns the chances of an update.
    pub(crate) fn of_update(update: u64) -> Self {
        Self(mixed(
            (update as u32).wrapping_mul(0x9e37_79b9) ^ (update >> 32) as u32,
        ))
    }

    /// Returns the chance of an element.
    #[inline(always)]
    pub(crate) fn of(self, element: u64) -> f32 {
        let bits = mixed(element as u32 ^ self.0);
        (bits >> 8) as f32 / 16_777_216.0
    }
}

/// Mixes the bits of a number: each bit of the result depends on all of them (the hash `lowbias32`
/// of Chris Wellons).
#[inline(always)]
fn mixed(bits: u32) -> u32 {
    let mut bits = bits;
    bits ^= bits >> 16;
    bits = bits.wrapping_mul(0x7feb_352d);
    bits ^= bits >> 15;
    bits = bits.wrapping_mul(0x846c_a68b);
    bits ^ (bits >> 16)
}

/// The same on any device.
mod operations {
    use tch::{Kind, Tensor};

    use super::{Chances, Map};

    impl Map {
        /// As [`Map::code`], `[m]` uint8 of `[m]` fp32.
        pub(crate) fn codes_by_operations(&self, ratios: &Tensor, chances: &Tensor) -> Tensor {
            let device = ratios.device();
            let table = |numbers: &[f32]| Tensor::from_slice(numbers).to_device(device);
            let (levels, gaps) = (table(&self.levels), table(&self.inverse_gaps));
            let sizes = ratios.abs();
            // The largest level that is not above the number.
            let level = Tensor::bucketize(&sizes, &levels, false, true) - 1;
            let level = level.clamp(0, 255);
            let part = (sizes - levels.index_select(0, &level)) * gaps.index_select(0, &level);
            let level = level + part.gt_tensor(chances).to_kind(Kind::Int64);
            let code = if self.has_sign {
                let negative: Tensor = 127 - level.clamp_max(127);
                negative.where_self(&ratios.lt(0.0), &(level + 127))
            } else {
                level.maximum(&ratios.gt(0.0).to_kind(Kind::Int64))
            };
            code.to_kind(Kind::Uint8)
        }
    }

    impl Chances {
        /// As [`Chances::of`], `[m]` fp32 of `[m]` int64.
        pub(crate) fn by_operations(self, elements: &Tensor) -> Tensor {
            let low = |bits: Tensor| bits.bitwise_and(0xffff_ffffi64);
            let shifted = |bits: &Tensor, by: i64| bits.bitwise_right_shift_tensor_scalar(by);
            // A product of 32 bits: neither half's product reaches the sign.
            let product = |bits: &Tensor, factor: i64| {
                let upper = low(bits.bitwise_and(0xffff_0000i64) * (factor & 0xffff));
                let upper_factor = (bits.bitwise_and(0xffff) * (factor >> 16)).bitwise_and(0xffff);
                low(bits.bitwise_and(0xffff) * (factor & 0xffff) + upper + upper_factor * 65536)
            };
            let mut bits = low(elements.bitwise_xor(i64::from(self.0)));
            bits = bits.bitwise_xor_tensor(&shifted(&bits, 16));
            bits = product(&bits, 0x7feb_352d);
            bits = bits.bitwise_xor_tensor(&shifted(&bits, 15));
            bits = product(&bits, 0x846c_a68b);
            bits = bits.bitwise_xor_tensor(&shifted(&bits, 16));
            shifted(&bits, 8).to_kind(Kind::Float) / 16_777_216.0
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use tch::{Kind, Tensor};

    use super::*;

    /// What bitsandbytes 0.50.2 does on a CPU, by scripts/golden/eight_bit.py.
    #[derive(Deserialize)]
    struct Golden {
        signed: bool,
        block: usize,
        map: Vec<f64>,
        numbers: Vec<f64>,
        codes: Vec<u8>,
        scales: Vec<f64>,
    }

    fn golden() -> Vec<Golden> {
        let text = include_str!("../../../tests/golden/eight_bit.json");
        let cases: Vec<Golden> = serde_json::from_str(text).expect("JSON");
        assert_eq!(cases.len(), 2);
        cases
    }

    fn map_of(golden: &Golden) -> &'static Map {
        if golden.signed { &SIGNED } else { &UNSIGNED }
    }

    #[test]
    fn the_maps_are_those_of_bitsandbytes() {
        for golden in golden() {
            let wanted: Vec<u32> = golden
                .map
                .iter()
                .map(|number| (*number as f32).to_bits())
                .collect();
            let found: Vec<u32> = map_of(&golden)
                .numbers
                .iter()
                .map(|x| x.to_bits())
                .collect();
            assert_eq!(found, wanted);
        }
    }

    /// Returns the middle of a ratio's bin. On a CPU bitsandbytes looks codes up in 65,536 bins of
    /// equal width, each of which has the code of its middle: ratios below 1.5e-5 are all alike.
    fn middle_of_bin(ratio: f32) -> f32 {
        let bin = ((ratio + 1.0) * 32768.0).floor().min(65535.0);
        ((f64::from(bin) + 0.5) / 32768.0 - 1.0) as f32
    }

    /// With its block and its scale, the number of the largest size without sign.
    #[test]
    fn the_nearest_codes_are_those_of_bitsandbytes() {
        for golden in golden() {
            let map = map_of(&golden);
            let blocks = golden.numbers.chunks(golden.block);
            let codes = golden.codes.chunks(golden.block);
            let mut num_equal = 0;
            for ((block, codes), scale) in blocks.zip(codes).zip(&golden.scales) {
                for (number, &wanted) in block.iter().zip(codes) {
                    let ratio = *number as f32 / *scale as f32;
                    let found = map.code(middle_of_bin(ratio), NEAREST);
                    assert_eq!(found, wanted, "{number} of {scale}");
                    let is_equal = map.code(ratio, NEAREST) == wanted;
                    assert!(is_equal || ratio.abs() < 0.01, "{ratio}");
                    num_equal += usize::from(is_equal);
                }
            }
            assert!((400..549).contains(&num_equal), "{num_equal}");
        }
    }

    #[test]
    fn a_code_is_the_nearest_of_all() {
        for map in [&*SIGNED, &*UNSIGNED] {
            let lowest = if map.has_sign { -1.0 } else { 0.0 };
            for step in 0..=40_000 {
                let size = 10f64.powf(-8.0 * f64::from(step / 2) / 20_000.0) as f32;
                let ratio = if step % 2 == 0 { size } else { size * lowest };
                let distance = |number: f32| (f64::from(number) - f64::from(ratio)).abs();
                let found = map.numbers[usize::from(map.code(ratio, NEAREST))];
                let nearest = map.numbers.iter().map(|&number| distance(number));
                let nearest = nearest.fold(f64::INFINITY, f64::min);
                let is_floor = !map.has_sign && ratio > 0.0 && found == map.numbers[1];
                // Half-way between two, fp32 may round to either.
                let fits = distance(found) <= nearest + 1e-7 * f64::from(size);
                assert!(fits || is_floor, "{ratio}: {found}");
            }
        }
    }

    #[test]
    fn random_rounding_has_the_right_mean_and_never_reaches_nothing() {
        let map = &*UNSIGNED;
        for ratio in [0.0123f32, 0.5, 0.9999, 1e-4, 3e-6] {
            let mut sum = 0.0;
            let count = 20_000;
            for element in 0..count {
                let chance = Chances::of_update(7).of(element);
                assert!((0.0..1.0).contains(&chance));
                sum += f64::from(map.numbers[usize::from(map.code(ratio, chance))]);
            }
            // The steps of the map are at most 36% of a number.
            let error = sum / count as f64 / f64::from(ratio) - 1.0;
            assert!(error.abs() < 0.006, "{ratio}: {error}");
        }
        assert_eq!(map.code(1e-30, 0.9), 1);
        assert_eq!(map.code(0.0, 0.9), 0);
        assert_eq!(map.code(1.0, 0.0), 255);
        assert_eq!(SIGNED.code(-1.0, 0.0), 0);
        assert_eq!(SIGNED.code(0.0, NEAREST), 127);
    }

    #[test]
    fn loops_and_operations_agree() {
        let chances = Chances::of_update((1 << 33) + 12_345);
        for map in [&*SIGNED, &*UNSIGNED] {
            let mut ratios = Vec::new();
            let mut of_loops = Vec::new();
            for element in 0..5000u64 {
                let size = 10f32.powf(-8.0 * (element % 997) as f32 / 997.0);
                let ratio = if map.has_sign && element % 3 == 0 {
                    -size
                } else {
                    size
                };
                ratios.push(ratio);
                of_loops.push(map.code(ratio, chances.of(element)));
            }
            let elements = Tensor::arange(5000, (Kind::Int64, tch::Device::Cpu));
            let chances = chances.by_operations(&elements);
            let found = map.codes_by_operations(&Tensor::from_slice(&ratios), &chances);
            assert_eq!(Vec::<u8>::try_from(found).expect("codes"), of_loops);
        }
    }
}
