//! A picture's signature: what its near-copies are found and confirmed by.
//!
//! A thumbnail of 64 x 64 luma bytes and 16 x 16 of each colour difference. A picture with borders
//! has a second signature, of the part inside them. The keys by which copies meet are made of the
//! thumbnail when they are needed ([`crate::dedupe::key`]).
//!
//! The luma is filtered before it is sampled, so that a page of text, whose lines are finer than
//! the cells, and its crop do not show two different moirés.
//!
//! All arithmetic is in integers: the same pixels have the same signature on every processor.

use crate::{
    dedupe::border::{Pixels, core},
    dedupe::grid::{Rect, UNIT, area_means},
};

/// Cells a side of the thumbnail's luma.
pub const LUMA_SIDE: usize = 64;
/// Cells a side of the thumbnail's colour.
pub const COLOUR_SIDE: usize = 16;
/// Cells of the luma.
pub const LUMA_CELLS: usize = LUMA_SIDE * LUMA_SIDE;
/// Cells of a colour difference.
pub const COLOUR_CELLS: usize = COLOUR_SIDE * COLOUR_SIDE;
/// Cells a side of the grid that everything is computed from.
const GRID_SIDE: usize = 2 * LUMA_SIDE;

/// What is stored of a picture: [`Signature::BYTES`] bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Signature {
    /// Width and height in pixels.
    pub size_px: [u16; 2],
    /// `[64, 64]`
    pub luma: [u8; LUMA_CELLS],
    /// Blue and red difference (JPEG's), `[2, 16, 16]`, 128 is none.
    pub colour: [u8; 2 * COLOUR_CELLS],
}

impl std::fmt::Debug for Signature {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [width, height] = self.size_px;
        write!(formatter, "Signature({width}x{height} px)")
    }
}

impl Signature {
    /// The length of [`to_bytes`](Self::to_bytes).
    pub const BYTES: usize = 4 + LUMA_CELLS + 2 * COLOUR_CELLS;

    /// The signatures of an sRGB picture, `[h, w, 3]`: of the whole, and of the part inside its
    /// borders where it has some.
    ///
    /// # Panics
    /// If `rgb` is not `3 * width * height` bytes or the picture has no pixel.
    pub fn of(rgb: &[u8], width: usize, height: usize) -> (Self, Option<Self>) {
        assert!(
            width * height > 0 && rgb.len() == 3 * width * height,
            "{} bytes are no {width}x{height} RGB picture",
            rgb.len()
        );
        let pixels = Pixels { bytes: rgb, width };
        let whole = Rect {
            left: 0,
            top: 0,
            width,
            height,
        };
        let inside = core(&pixels);
        let inside = (inside != whole).then(|| Self::of_part(&pixels, inside));
        (Self::of_part(&pixels, whole), inside)
    }

    fn of_part(pixels: &Pixels<'_>, rect: Rect) -> Self {
        let grid = area_means(|y| pixels.row(y), rect, 3, GRID_SIDE, UNIT);
        let side = |length: usize| u16::try_from(length).unwrap_or(u16::MAX);
        Self::of_grid(&grid, [side(rect.width), side(rect.height)])
    }

    /// The signature of a grid `[128, 128, 3]` of sixteenths of levels.
    fn of_grid(grid: &[u16], size_px: [u16; 2]) -> Self {
        let light: Vec<u16> = grid.chunks_exact(3).map(luma).collect();
        let mut colour = [0; 2 * COLOUR_CELLS];
        let (blue, red) = colour.split_at_mut(COLOUR_CELLS);
        for (plane, weights) in [(blue, BLUE), (red, RED)] {
            let pixels = grid.chunks_exact(3);
            let differences: Vec<u16> = pixels.map(|pixel| difference(pixel, weights)).collect();
            let cells = reduce(&differences, COLOUR_SIDE);
            for (byte, cell) in plane.iter_mut().zip(cells) {
                *byte = to_byte(cell.into());
            }
        }
        Self {
            size_px,
            luma: halved(&light),
            colour,
        }
    }

    /// The colour at a place of the thumbnail, both coordinates from 0 to 1; sRGB, for people.
    pub fn colour_at(&self, x: f32, y: f32) -> [u8; 3] {
        let luma = smooth(&self.luma, LUMA_SIDE, x, y);
        let blue = smooth(&self.colour[..COLOUR_CELLS], COLOUR_SIDE, x, y) - 128.0;
        let red = smooth(&self.colour[COLOUR_CELLS..], COLOUR_SIDE, x, y) - 128.0;
        let green = 0.344_136 * blue + 0.714_136 * red;
        [luma + 1.402 * red, luma - green, luma + 1.772 * blue].map(|level| level.round() as u8)
    }

    /// The bytes that a row stores: sizes (little-endian), luma, colour.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let (sides, cells) = bytes.split_at_mut(4);
        let [width, height] = self.size_px.map(u16::to_le_bytes);
        sides[..2].copy_from_slice(&width);
        sides[2..].copy_from_slice(&height);
        let (luma, colour) = cells.split_at_mut(LUMA_CELLS);
        luma.copy_from_slice(&self.luma);
        colour.copy_from_slice(&self.colour);
        bytes
    }

    /// The signature whose [`to_bytes`](Self::to_bytes) these are.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let side = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let (luma, colour) = bytes[4..].split_at(LUMA_CELLS);
        Self {
            size_px: [side(0), side(2)],
            luma: luma.try_into().expect("the first part is the luma"),
            colour: colour.try_into().expect("the second part is the colour"),
        }
    }
}

/// A plane `[side, side]` between the centres of its cells, bilinear.
fn smooth(plane: &[u8], side: usize, x: f32, y: f32) -> f32 {
    let last = (side - 1) as f32;
    let place = |at: f32| (at * side as f32 - 0.5).clamp(0.0, last);
    let (x, y) = (place(x), place(y));
    let (left, top) = (x as usize, y as usize);
    let (right, bottom) = ((left + 1).min(side - 1), (top + 1).min(side - 1));
    let (across, down) = (x - left as f32, y - top as f32);
    let at = |x: usize, y: usize| f32::from(plane[y * side + x]);
    let upper = at(left, top) * (1.0 - across) + at(right, top) * across;
    let lower = at(left, bottom) * (1.0 - across) + at(right, bottom) * across;
    upper * (1.0 - down) + lower * down
}

/// A plane `[128, 128]` with half the cells a side, each a mean of 4 x 4 with the weights 1 3 3 1.
fn halved(plane: &[u16]) -> [u8; LUMA_CELLS] {
    const WEIGHTS: [u32; 4] = [1, 3, 3, 1];
    let mut across = vec![0u32; GRID_SIDE * LUMA_SIDE];
    for (row, out) in plane
        .chunks_exact(GRID_SIDE)
        .zip(across.chunks_exact_mut(LUMA_SIDE))
    {
        for (x, sum) in out.iter_mut().enumerate() {
            *sum = (0..4).map(|i| WEIGHTS[i] * u32::from(row[tap(x, i)])).sum();
        }
    }
    std::array::from_fn(|cell| {
        let (x, y) = (cell % LUMA_SIDE, cell / LUMA_SIDE);
        let column = |i: usize| across[tap(y, i) * LUMA_SIDE + x];
        let sum: u32 = (0..4).map(|i| WEIGHTS[i] * column(i)).sum();
        to_byte(sum.div_ceil(64))
    })
}

/// The place in the larger grid of one of the four values of a cell.
fn tap(cell: usize, i: usize) -> usize {
    (2 * cell + i).saturating_sub(1).min(GRID_SIDE - 1)
}

fn reduce(plane: &[u16], side: usize) -> Vec<u16> {
    let whole = Rect {
        left: 0,
        top: 0,
        width: GRID_SIDE,
        height: GRID_SIDE,
    };
    let row = |y: usize| &plane[y * GRID_SIDE..(y + 1) * GRID_SIDE];
    area_means(row, whole, 1, side, 1)
}

fn to_byte(sixteenths: u32) -> u8 {
    ((sixteenths + UNIT / 2) / UNIT).min(255) as u8
}

/// BT.601 in thousandths.
fn luma(pixel: &[u16]) -> u16 {
    let [r, g, b] = [pixel[0], pixel[1], pixel[2]].map(u32::from);
    ((299 * r + 587 * g + 114 * b + 500) / 1000) as u16
}

const BLUE: [i32; 3] = [-169, -331, 500];
const RED: [i32; 3] = [500, -419, -81];

/// A colour difference of 128 levels is 0.
fn difference(pixel: &[u16], weights: [i32; 3]) -> u16 {
    let products = pixel.iter().zip(weights);
    let sum: i32 = products
        .map(|(&value, weight)| i32::from(value) * weight)
        .sum();
    let shifted = sum.div_euclid(1000) + 128 * UNIT as i32;
    shifted.clamp(0, 255 * UNIT as i32) as u16
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A picture of smooth shapes.
    pub(crate) fn drawn(
        width: usize,
        height: usize,
        shape: impl Fn(f32, f32) -> [u8; 3],
    ) -> Vec<u8> {
        let share = |at: usize, of: usize| (at as f32 + 0.5) / of as f32;
        let cells =
            (0..width * height).map(|i| (share(i % width, width), share(i / width, height)));
        cells.flat_map(|(x, y)| shape(x, y)).collect()
    }

    pub(crate) fn disc(x: f32, y: f32) -> [u8; 3] {
        let inside = (x - 0.3).powi(2) + (y - 0.6).powi(2) < 0.05;
        if inside {
            [200, 40, 30]
        } else {
            [(90.0 * x) as u8, (140.0 * y) as u8, 120]
        }
    }

    #[test]
    fn a_smaller_copy_has_nearly_the_same_thumbnail() {
        let large = Signature::of(&drawn(640, 480, disc), 640, 480).0;
        let small = Signature::of(&drawn(200, 150, disc), 200, 150).0;
        let mut pairs = large.luma.iter().zip(&small.luma);
        assert!(pairs.all(|(a, b)| a.abs_diff(*b) <= 12));
    }

    #[test]
    fn a_mirror_image_has_the_mirrored_thumbnail() {
        let picture = Signature::of(&drawn(256, 192, disc), 256, 192).0;
        let mirror = Signature::of(&drawn(256, 192, |x, y| disc(1.0 - x, y)), 256, 192).0;
        let planes = [
            (&picture.luma[..], &mirror.luma[..], LUMA_SIDE),
            (&picture.colour, &mirror.colour, COLOUR_SIDE),
        ];
        for (plane, mirrored, side) in planes {
            let rows = plane.chunks_exact(side).zip(mirrored.chunks_exact(side));
            for (row, mirrored) in rows {
                assert!(row.iter().eq(mirrored.iter().rev()));
            }
            assert_ne!(plane, mirrored);
        }
    }

    #[test]
    fn lines_finer_than_the_cells_are_nearly_grey() {
        // 96 dark lines on 64 cells; unfiltered means would be 85 and 170.
        let lines = |_, y: f32| {
            if ((y * 192.0) as u32).is_multiple_of(2) {
                [0; 3]
            } else {
                [255; 3]
            }
        };
        let signature = Signature::of(&drawn(200, 768, lines), 200, 768).0;
        let inside = &signature.luma[LUMA_SIDE..LUMA_CELLS - LUMA_SIDE];
        assert!(inside.iter().all(|&luma| luma.abs_diff(128) <= 24));
    }

    #[test]
    fn flat_pictures_have_their_own_colour() {
        let red = Signature::of(&[250, 10, 10].repeat(40 * 30), 40, 30).0;
        let blue = Signature::of(&[10, 10, 250].repeat(40 * 30), 40, 30).0;
        assert_ne!(red.colour, blue.colour);
        let shown = red.colour_at(0.5, 0.5);
        assert!(
            shown
                .iter()
                .zip([250, 10, 10])
                .all(|(a, b)| a.abs_diff(b) <= 2)
        );
    }

    #[test]
    fn the_bytes_hold_all() {
        let signature = Signature::of(&drawn(90, 70, disc), 90, 70).0;
        assert_eq!(Signature::from_bytes(&signature.to_bytes()), signature);
    }

    /// Frozen: stored signatures must be comparable with those that a later version computes.
    #[test]
    fn the_signature_of_a_known_picture_is_frozen() {
        let pixels: Vec<u8> = (0..3 * 64 * 64u32)
            .map(|i| (i * i / 7 + (i / 192) * (i % 61)) as u8)
            .collect();
        let bytes = Signature::of(&pixels, 64, 64).0.to_bytes();
        assert_eq!(blake3::hash(&bytes).to_hex().as_str(), FROZEN);
    }
    const FROZEN: &str = "36cf6795f6001f8040d66a65d8f3ebc870311a47fbba41700607d29496b07ec9";
}
