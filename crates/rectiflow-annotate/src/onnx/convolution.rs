//! Pillow's resize of 8-bit pixels, bit by bit. Pure.
//!
//! Models were trained on pictures that Pillow has resized, and what they say is compared with what
//! they say in Python. `fast_image_resize` rounds the weights of a filter to 16 bits as Pillow-SIMD
//! does, so up to one value in 60 differs by one from Pillow's, which rounds them to 22: a score
//! differs by 2e-4. Here the weights, the rounding between the passes and the order of the passes
//! are those of Pillow 13.0.0; 12.0.0 has another order (findings/).

use std::f64::consts::PI;

/// Bits of a weight behind the point: 8 of a 32-bit sum are for the value, one for the sign, and
/// one because the negative weights of a filter let others add up to more than 1.
const WEIGHT_BITS: u32 = 32 - 8 - 2;
/// Values that are summed side by side: eight pixels of three channels.
const LANES: usize = 24;

/// A filter: its value at a distance from the middle, and how far it reaches, before it is widened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel {
    value: fn(f64) -> f64,
    reach: f64,
}

impl Kernel {
    /// Pillow's BILINEAR.
    pub(crate) const BILINEAR: Self = Self {
        value: bilinear,
        reach: 1.0,
    };
    /// Pillow's BICUBIC.
    pub(crate) const BICUBIC: Self = Self {
        value: bicubic,
        reach: 2.0,
    };
    /// Pillow's LANCZOS.
    pub(crate) const LANCZOS: Self = Self {
        value: lanczos,
        reach: 3.0,
    };
}

fn bilinear(x: f64) -> f64 {
    (1.0 - x.abs()).max(0.0)
}

/// Keys' cubic with a = -0.5, in Pillow's order of operations.
fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn lanczos(x: f64) -> f64 {
    if (-3.0..3.0).contains(&x) {
        sinc(x) * sinc(x / 3.0)
    } else {
        0.0
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let x = x * PI;
    x.sin() / x
}

/// The values that make up one value of the result: which, and their weights.
#[derive(Debug)]
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// The taps of each of `to` values along a side of `from`.
fn taps(from: u32, to: u32, kernel: Kernel) -> Vec<Taps> {
    let scale = f64::from(from) / f64::from(to);
    let widened = scale.max(1.0);
    let reach = kernel.reach * widened;
    let mut all = Vec::with_capacity(to as usize);
    for at in 0..to {
        let middle = (f64::from(at) + 0.5) * scale;
        let first = (middle - reach + 0.5).max(0.0) as u32;
        let end = ((middle + reach + 0.5) as u32).min(from);
        let mut weights = Vec::with_capacity((end - first) as usize);
        let mut sum = 0.0;
        for tap in first..end {
            let weight = (kernel.value)((f64::from(tap) - middle + 0.5) * (1.0 / widened));
            weights.push(weight);
            sum += weight;
        }
        let fixed = |weight: f64| (weight / sum * f64::from(1 << WEIGHT_BITS)).round() as i32;
        all.push(Taps {
            first: first as usize,
            weights: weights.into_iter().map(fixed).collect(),
        });
    }
    all
}

/// Resizes one picture after the other, and keeps the memory that it needs.
#[derive(Debug, Default)]
pub(crate) struct Resizer {
    /// Lines of a picture side by side: the values of one pass, and its results.
    lines: Vec<[u8; LANES]>,
    results: Vec<[u8; LANES]>,
    /// What is between the two passes.
    between: Vec<u8>,
}

/// Width and height in pixels.
pub(crate) type Size = (u32, u32);

impl Resizer {
    /// Resizes pixels `[h, w, 3]`.
    pub(crate) fn resize(
        &mut self,
        pixels: &[u8],
        from: Size,
        to: Size,
        kernel: Kernel,
    ) -> Vec<u8> {
        let mut resized = Vec::new();
        let mut between = std::mem::take(&mut self.between);
        match (from.0 == to.0, from.1 == to.1) {
            (true, true) => resized.extend_from_slice(pixels),
            (false, true) => self.columns(pixels, (from.0, to.0), kernel, &mut resized),
            (true, false) => self.rows(pixels, from, to.1, kernel, &mut resized),
            (false, false) if is_height_first(from, to) => {
                self.rows(pixels, from, to.1, kernel, &mut between);
                self.columns(&between, (from.0, to.0), kernel, &mut resized);
            }
            (false, false) => {
                self.columns(pixels, (from.0, to.0), kernel, &mut between);
                self.rows(&between, (to.0, from.1), to.1, kernel, &mut resized);
            }
        }
        self.between = between;
        resized
    }

    /// Another width: eight rows at a time, of which the pixels of a column are brought together.
    fn columns(
        &mut self,
        pixels: &[u8],
        (from, to): (u32, u32),
        kernel: Kernel,
        out: &mut Vec<u8>,
    ) {
        let (from_bytes, to_bytes) = (3 * from as usize, 3 * to as usize);
        let taps = taps(from, to, kernel);
        out.resize(pixels.len() / from_bytes * to_bytes, 0);
        self.lines.resize(from as usize, [0; LANES]);
        let rows = out.chunks_mut(LANES / 3 * to_bytes);
        for (rows, out) in pixels.chunks(LANES / 3 * from_bytes).zip(rows) {
            for (number, row) in rows.chunks_exact(from_bytes).enumerate() {
                for (line, pixel) in self.lines.iter_mut().zip(row.as_chunks::<3>().0) {
                    line.as_chunks_mut::<3>().0[number] = *pixel;
                }
            }
            self.sum(&taps);
            for (number, row) in out.chunks_exact_mut(to_bytes).enumerate() {
                for (line, pixel) in self.results.iter().zip(row.as_chunks_mut::<3>().0) {
                    *pixel = line.as_chunks::<3>().0[number];
                }
            }
        }
    }

    /// Another height: a strip of eight columns at a time.
    fn rows(&mut self, pixels: &[u8], from: Size, to: u32, kernel: Kernel, out: &mut Vec<u8>) {
        let row_bytes = 3 * from.0 as usize;
        let taps = taps(from.1, to, kernel);
        out.resize(to as usize * row_bytes, 0);
        self.lines.resize(from.1 as usize, [0; LANES]);
        for left in (0..row_bytes).step_by(LANES) {
            let strip = left..row_bytes.min(left + LANES);
            let width = strip.len();
            for (line, row) in self.lines.iter_mut().zip(pixels.chunks_exact(row_bytes)) {
                line[..width].copy_from_slice(&row[strip.clone()]);
            }
            self.sum(&taps);
            for (line, row) in self.results.iter().zip(out.chunks_exact_mut(row_bytes)) {
                row[strip.clone()].copy_from_slice(&line[..width]);
            }
        }
    }

    /// Sums the lines by their weights.
    fn sum(&mut self, taps: &[Taps]) {
        self.results.resize(taps.len(), [0; LANES]);
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the instructions.
            unsafe { sum_avx2(&self.lines, taps, &mut self.results) };
            return;
        }
        sum_lines(&self.lines, taps, &mut self.results);
    }
}

/// Whether Pillow begins with the height: if it gets smaller by more than twice what the width
/// loses.
fn is_height_first(from: Size, to: Size) -> bool {
    let lost_width = i64::from(from.0) - i64::from(to.0);
    let lost_height = i64::from(from.1) - i64::from(to.1);
    lost_height > 0 && lost_height > 2 * lost_width
}

/// [`sum_lines`] with the multiplication of eight 32-bit integers, which not every processor has.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(lines: &[[u8; LANES]], taps: &[Taps], results: &mut [[u8; LANES]]) {
    sum_lines(lines, taps, results);
}

#[inline(always)]
fn sum_lines(lines: &[[u8; LANES]], taps: &[Taps], results: &mut [[u8; LANES]]) {
    for (taps, result) in taps.iter().zip(results) {
        let mut sums = [1 << (WEIGHT_BITS - 1); LANES];
        for (&weight, line) in taps.weights.iter().zip(&lines[taps.first..]) {
            for (sum, &value) in sums.iter_mut().zip(line) {
                // Nothing wraps; checks would keep the loop from being vectorised.
                *sum = weight.wrapping_mul(i32::from(value)).wrapping_add(*sum);
            }
        }
        for (value, sum) in result.iter_mut().zip(sums) {
            *value = (sum >> WEIGHT_BITS).clamp(0, 255) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resized(pixels: &[u8], from: Size, to: Size, kernel: Kernel) -> Vec<u8> {
        Resizer::default().resize(pixels, from, to, kernel)
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1_u32;
        let mut values = Vec::with_capacity(length);
        for _ in 0..length {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            values.push((state >> 24) as u8);
        }
        values
    }

    /// The definition: sums of one value after the other.
    fn plain(pixels: &[u8], from: Size, to: Size, kernel: Kernel) -> Vec<u8> {
        let along = |pixels: &[u8], width: u32, taps: &[Taps], is_row: bool| {
            let height = pixels.len() / 3 / width as usize;
            let size = if is_row {
                (width as usize, taps.len())
            } else {
                (taps.len(), height)
            };
            let mut out = Vec::new();
            for at in 0..size.0 * size.1 * 3 {
                let (y, x, channel) = (at / 3 / size.0, at / 3 % size.0, at % 3);
                let taps = &taps[if is_row { y } else { x }];
                let mut sum = 1 << (WEIGHT_BITS - 1);
                for (number, weight) in taps.weights.iter().enumerate() {
                    let tap = taps.first + number;
                    let (y, x) = if is_row { (tap, x) } else { (y, tap) };
                    sum += weight * i32::from(pixels[3 * (y * width as usize + x) + channel]);
                }
                out.push((sum >> WEIGHT_BITS).clamp(0, 255) as u8);
            }
            out
        };
        let columns = taps(from.0, to.0, kernel);
        let rows = taps(from.1, to.1, kernel);
        if is_height_first(from, to) {
            let between = along(pixels, from.0, &rows, true);
            return along(&between, from.0, &columns, false);
        }
        let between = along(pixels, from.0, &columns, false);
        along(&between, to.0, &rows, true)
    }

    #[test]
    fn lines_side_by_side_are_sums_one_by_one() {
        let mut resizer = Resizer::default();
        for (from, to) in [
            ((1, 1), (5, 3)),
            ((7, 40), (9, 6)),
            ((33, 9), (8, 20)),
            ((17, 16), (17, 5)),
            ((50, 23), (11, 23)),
            ((2, 90), (90, 2)),
            ((3, 200), (1, 1)),
        ] {
            let pixels = noise(3 * (from.0 * from.1) as usize);
            for kernel in [Kernel::BILINEAR, Kernel::BICUBIC, Kernel::LANCZOS] {
                let expected = plain(&pixels, from, to, kernel);
                // Memory that a larger picture has left changes nothing.
                let found = resizer.resize(&pixels, from, to, kernel);
                assert_eq!(found, expected, "{from:?} {to:?}");
                assert_eq!(resized(&pixels, from, to, kernel), expected);
            }
        }
    }

    #[test]
    fn processors_without_wide_registers_sum_the_same() {
        let taps = taps(100, 13, Kernel::LANCZOS);
        let lines: Vec<[u8; LANES]> = noise(100 * LANES).as_chunks().0.to_vec();
        let mut plain = vec![[0; LANES]; taps.len()];
        sum_lines(&lines, &taps, &mut plain);
        let mut resizer = Resizer {
            lines,
            ..Resizer::default()
        };
        resizer.sum(&taps);
        assert_eq!(resizer.results, plain);
    }

    #[test]
    fn a_flat_picture_stays_flat() {
        for value in [0, 1, 128, 254, 255] {
            for kernel in [Kernel::BILINEAR, Kernel::BICUBIC, Kernel::LANCZOS] {
                let found = resized(&[value; 3 * 31 * 17], (31, 17), (12, 40), kernel);
                assert!(found.iter().all(|&found| found == value), "{value}");
            }
        }
    }

    #[test]
    fn the_height_is_first_where_pillow_has_it_first() {
        // From Pillow 13.0.0, at the borders of its rule.
        assert!(is_height_first((112, 76), (87, 17)));
        assert!(is_height_first((33, 102), (6, 31)));
        assert!(is_height_first((64, 64), (100, 20)));
        assert!(!is_height_first((64, 64), (48, 32)));
        assert!(!is_height_first((40, 80), (88, 82)));
        assert!(!is_height_first((75, 107), (21, 7)));
    }
}
