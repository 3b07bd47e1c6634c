//! Pictures reduced to a square grid of area means, in integers.
//!
//! A pixel that two cells share counts in each by the part that lies in it, so that a picture and
//! its smaller copy have the same means whatever their sizes are. Everything is exact until the one
//! rounding at the end: the same bytes make the same grid on every processor.

/// What 1 level of a pixel is in a grid: values are 0 to 4080.
pub const UNIT: u32 = 16;

/// A part of a picture, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rect {
    /// The first column.
    pub left: usize,
    /// The first row.
    pub top: usize,
    /// Number of columns, at least 1.
    pub width: usize,
    /// Number of rows, at least 1.
    pub height: usize,
}

/// The means of `side` x `side` cells of a part of a picture: `[side, side, channels]`, in
/// sixteenths of a level.
///
/// `row(y)` is row `y` of the whole picture with `channels` values a pixel; `unit` is what a level
/// of these values is worth in the result.
///
/// # Panics
/// If the part has no pixel or a row is too short for it.
pub fn area_means<'a, T>(
    row: impl Fn(usize) -> &'a [T],
    rect: Rect,
    channels: usize,
    side: usize,
    unit: u32,
) -> Vec<u16>
where
    T: Copy + Into<u32> + 'a,
{
    let area = rect.width as u64 * rect.height as u64;
    assert!(
        area > 0,
        "a part of a picture has at least one pixel, found {rect:?}"
    );
    let mut means = Vec::with_capacity(side * side * channels);
    let (first, end) = (rect.left * channels, (rect.left + rect.width) * channels);
    let mut whole = vec![0u32; rect.width * channels];
    for cell in 0..side {
        whole.fill(0);
        let inside = full_range(cell, rect.height, side);
        for y in inside.clone() {
            let values = &row(rect.top + y)[first..end];
            for (sum, &value) in whole.iter_mut().zip(values) {
                *sum = sum.wrapping_add(value.into());
            }
        }
        for sum in &mut whole {
            *sum = sum.wrapping_mul(side as u32);
        }
        for (y, weight) in partial(cell, rect.height, side) {
            let values = &row(rect.top + y)[first..end];
            for (sum, &value) in whole.iter_mut().zip(values) {
                *sum = sum.wrapping_add(value.into().wrapping_mul(weight));
            }
        }
        push_row(&whole, rect.width, channels, side, (area, unit), &mut means);
    }
    means
}

/// The cells of a row whose vertical sums are known.
fn push_row(
    sums: &[u32],
    width: usize,
    channels: usize,
    side: usize,
    (area, unit): (u64, u32),
    means: &mut Vec<u16>,
) {
    let mut cell_sums = [0u64; 4];
    for cell in 0..side {
        cell_sums[..channels].fill(0);
        let mut add = |x: usize, weight: u32| {
            let pixel = &sums[x * channels..(x + 1) * channels];
            for (sum, &value) in cell_sums.iter_mut().zip(pixel) {
                *sum += u64::from(value) * u64::from(weight);
            }
        };
        for x in full_range(cell, width, side) {
            add(x, side as u32);
        }
        for (x, weight) in partial(cell, width, side) {
            add(x, weight);
        }
        for sum in &cell_sums[..channels] {
            means.push(((sum * u64::from(unit) + area / 2) / area) as u16);
        }
    }
}

/// The pixels that lie completely in a cell. In units of which a pixel has `side` and a cell
/// `length`, pixel i begins at i * side and cell j at j * length.
fn full_range(cell: usize, length: usize, side: usize) -> std::ops::Range<usize> {
    let first = (cell * length).div_ceil(side);
    let end = (cell + 1) * length / side;
    first..end.max(first)
}

/// The pixels that lie partly in a cell, with the part in units: one before and one after those of
/// [`full_range`], or one that is larger than the cell.
fn partial(cell: usize, length: usize, side: usize) -> impl Iterator<Item = (usize, u32)> {
    let (begin, end) = (cell * length, (cell + 1) * length);
    let (first, last) = (begin / side, (end - 1) / side);
    let part = move |pixel: usize| {
        let weight = end.min((pixel + 1) * side) - begin.max(pixel * side);
        (pixel, weight as u32)
    };
    let pixels = [Some(first), (last > first).then_some(last)];
    pixels
        .into_iter()
        .flatten()
        .map(part)
        .filter(move |&(_, weight)| (weight as usize) < side)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn means(pixels: &[u8], width: usize, side: usize) -> Vec<u16> {
        let rect = Rect {
            left: 0,
            top: 0,
            width,
            height: pixels.len() / width,
        };
        area_means(|y| &pixels[y * width..(y + 1) * width], rect, 1, side, UNIT)
    }

    #[test]
    fn a_cell_is_the_mean_of_the_area_it_covers() {
        // Three pixels on two cells: the middle one belongs to both by half.
        let found = means(&[0, 90, 240, 0, 90, 240, 0, 90, 240], 3, 2);
        assert_eq!(found, [30 * 16, 190 * 16, 30 * 16, 190 * 16]);
    }

    #[test]
    fn a_picture_smaller_than_the_grid_is_enlarged() {
        assert_eq!(means(&[7, 9], 1, 4), [[112; 8], [144; 8]].concat());
        assert_eq!(means(&[5], 1, 3), [80; 9]);
    }

    #[test]
    fn a_part_is_reduced_as_a_picture_of_its_own() {
        let pixels: Vec<u8> = (0..120).map(|i| (i * 7 % 251) as u8).collect();
        let rect = Rect {
            left: 3,
            top: 2,
            width: 7,
            height: 8,
        };
        let part: Vec<u8> = (2..10)
            .flat_map(|y| pixels[y * 12 + 3..y * 12 + 10].to_vec())
            .collect();
        let found = area_means(|y| &pixels[y * 12..(y + 1) * 12], rect, 1, 5, UNIT);
        assert_eq!(found, means(&part, 7, 5));
    }

    #[test]
    fn every_pixel_counts_by_its_whole_area() {
        for length in 1..40 {
            for side in 1..20 {
                let mut weights = vec![0; length];
                for cell in 0..side {
                    full_range(cell, length, side).for_each(|pixel| weights[pixel] += side);
                    partial(cell, length, side).for_each(|(p, w)| weights[p] += w as usize);
                }
                assert_eq!(
                    weights,
                    vec![side; length],
                    "{length} pixels on {side} cells"
                );
            }
        }
    }
}
