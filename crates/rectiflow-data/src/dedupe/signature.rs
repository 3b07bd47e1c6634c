//! A picture's signature: what its near-duplicates are found and confirmed by.
//!
//! A picture is reduced to 64 x 64 area means. From these come a thumbnail of 32 x 32 luma and
//! 8 x 8 colour bytes, which confirms a pair, and two 256-bit keys, which find it: one of the
//! whole, one of the middle 29/32 of each side, as a crop's neighbour. A picture with borders has a
//! second signature, of the part inside them.
//!
//! A key is made of the slopes between neighbours on a grid of 9 x 9 means, 8 x 8 in each
//! direction, with two bits for each. A popular hash stores the sign of each slope or coefficient,
//! or its side of the median. In flat and drawn pictures most are nearly zero and such bits are
//! noise; here a slope must exceed the picture's mean one to set a bit. The slopes at two positions
//! that a mirror exchanges are stored as the sum and the difference: mirroring keeps one and
//! changes the sign of the other. Of the latter the key holds the size in two steps, so that a
//! picture and its mirror image have the same key.
//!
//! All arithmetic is in integers: the same pixels have the same signature on every processor.

use crate::{
    dedupe::border::{Pixels, core},
    dedupe::grid::{Rect, UNIT, area_means},
    dedupe::pairs::Hash,
};

/// Cells a side of the grid that everything is computed from.
const GRID_SIDE: usize = 64;
/// Cells a side of the thumbnail's luma.
pub const LUMA_SIDE: usize = 32;
/// Cells a side of the thumbnail's colour.
pub const COLOUR_SIDE: usize = 8;
/// The middle part that the second key is made of: 58 of 64 cells a side.
const MIDDLE: Rect = Rect {
    left: 3,
    top: 3,
    width: 58,
    height: 58,
};
/// Means a side of the grid that a key is made of, and slopes a side.
const KEY_SIDE: usize = 9;
const SLOPES: usize = KEY_SIDE - 1;

/// What is stored of a picture: [`Signature::BYTES`] bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Signature {
    /// Width and height in pixels.
    pub size_px: [u16; 2],
    /// Of the whole, and of its middle.
    pub keys: [Hash; 2],
    /// `[32, 32]`
    pub luma: [u8; LUMA_SIDE * LUMA_SIDE],
    /// Blue and red difference (JPEG's), `[2, 8, 8]`, 128 is none.
    pub colour: [u8; 2 * COLOUR_SIDE * COLOUR_SIDE],
}

impl std::fmt::Debug for Signature {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [width, height] = self.size_px;
        write!(
            formatter,
            "Signature({width}x{height} px, {:016x?})",
            self.keys[0]
        )
    }
}

impl Signature {
    /// The length of [`to_bytes`](Self::to_bytes).
    pub const BYTES: usize = 4 + 2 * 32 + LUMA_SIDE * LUMA_SIDE + 2 * COLOUR_SIDE * COLOUR_SIDE;

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

    /// The signature of a grid `[64, 64, 3]` of sixteenths of levels.
    pub fn of_grid(grid: &[u16], size_px: [u16; 2]) -> Self {
        let luma: Vec<u16> = grid.chunks_exact(3).map(luma).collect();
        let whole = Rect {
            left: 0,
            top: 0,
            width: GRID_SIDE,
            height: GRID_SIDE,
        };
        let reduced = reduce(&luma, whole, LUMA_SIDE);
        let keys = [whole, MIDDLE].map(|part| key(&reduce(&luma, part, KEY_SIDE)));
        let mut colour = [0; 2 * COLOUR_SIDE * COLOUR_SIDE];
        let (blue, red) = colour.split_at_mut(COLOUR_SIDE * COLOUR_SIDE);
        for (plane, weights) in [(blue, BLUE), (red, RED)] {
            let differences: Vec<u16> = grid
                .chunks_exact(3)
                .map(|pixel| difference(pixel, weights))
                .collect();
            let cells = reduce(&differences, whole, COLOUR_SIDE);
            for (byte, cell) in plane.iter_mut().zip(cells) {
                *byte = to_byte(cell);
            }
        }
        let luma = std::array::from_fn(|i| to_byte(reduced[i]));
        Self {
            size_px,
            keys,
            luma,
            colour,
        }
    }

    /// The colour at a place of the thumbnail, both coordinates from 0 to 1; sRGB, for people.
    pub fn colour_at(&self, x: f32, y: f32) -> [u8; 3] {
        const CHROMA: usize = COLOUR_SIDE * COLOUR_SIDE;
        let luma = smooth(&self.luma, LUMA_SIDE, x, y);
        let blue = smooth(&self.colour[..CHROMA], COLOUR_SIDE, x, y) - 128.0;
        let red = smooth(&self.colour[CHROMA..], COLOUR_SIDE, x, y) - 128.0;
        let green = 0.344_136 * blue + 0.714_136 * red;
        [luma + 1.402 * red, luma - green, luma + 1.772 * blue].map(|level| level.round() as u8)
    }

    /// The bytes that a row stores: sizes, keys, luma, colour; integers are little-endian.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let sides = self.size_px.iter().flat_map(|side| side.to_le_bytes());
        let words = self
            .keys
            .iter()
            .flatten()
            .flat_map(|word| word.to_le_bytes());
        let mut all = sides.chain(words).chain(self.luma).chain(self.colour);
        std::array::from_fn(|_| all.next().expect("the parts have BYTES bytes"))
    }

    /// The signature whose [`to_bytes`](Self::to_bytes) these are.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let side = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| {
            let word = bytes[at..at + 8].try_into();
            u64::from_le_bytes(word.expect("eight bytes were sliced"))
        };
        let key = |at: usize| std::array::from_fn(|i| word(at + 8 * i));
        let (luma, colour) = bytes[68..].split_at(LUMA_SIDE * LUMA_SIDE);
        Self {
            size_px: [side(0), side(2)],
            keys: [key(4), key(36)],
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

fn reduce(plane: &[u16], rect: Rect, side: usize) -> Vec<u16> {
    area_means(
        |y| &plane[y * GRID_SIDE..(y + 1) * GRID_SIDE],
        rect,
        1,
        side,
        1,
    )
}

fn to_byte(sixteenths: u16) -> u8 {
    ((u32::from(sixteenths) + UNIT / 2) / UNIT).min(255) as u8
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

/// A slope must exceed this to set a bit: the sum of four differences of a level.
const LEAST_SLOPE: i32 = 64;

/// The key of 9 x 9 luma means in sixteenths of levels.
pub fn key(luma: &[u16]) -> Hash {
    let pairs = mirror_pairs(luma);
    let sum: i32 = pairs
        .iter()
        .map(|[kept, turned]| kept.abs() + turned.abs())
        .sum();
    let least = (sum / (2 * pairs.len() as i32)).max(LEAST_SLOPE);
    let mut key = [0u64; 4];
    for (i, [kept, turned]) in pairs.into_iter().enumerate() {
        let bits = u64::from(kept > least)
            | u64::from(kept < -least) << 1
            | u64::from(turned.abs() > least) << 2
            | u64::from(turned.abs() > 2 * least) << 3;
        key[i / 16] |= bits << (4 * (i % 16));
    }
    key
}

/// For each of two positions that a mirror exchanges, and for both directions: the combination of
/// their slopes that a mirror keeps, and the one whose sign it changes.
fn mirror_pairs(luma: &[u16]) -> [[i32; 2]; SLOPES * SLOPES] {
    let at = |x: usize, y: usize| i32::from(luma[y * KEY_SIDE + x]);
    let across = |x: usize, y: usize| at(x + 1, y) + at(x + 1, y + 1) - at(x, y) - at(x, y + 1);
    let down = |x: usize, y: usize| at(x, y + 1) + at(x + 1, y + 1) - at(x, y) - at(x + 1, y);
    std::array::from_fn(|i| {
        let (x, y) = (i % (SLOPES / 2), i / 2 / (SLOPES / 2));
        let other = SLOPES - 1 - x;
        if (i / (SLOPES / 2)).is_multiple_of(2) {
            let (a, b) = (across(x, y), across(other, y));
            [a - b, a + b]
        } else {
            let (a, b) = (down(x, y), down(other, y));
            [a + b, a - b]
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dedupe::pairs::distance;

    /// A picture of smooth shapes.
    fn drawn(width: usize, height: usize, shape: impl Fn(f32, f32) -> [u8; 3]) -> Vec<u8> {
        let share = |at: usize, of: usize| (at as f32 + 0.5) / of as f32;
        let cells =
            (0..width * height).map(|i| (share(i % width, width), share(i / width, height)));
        cells.flat_map(|(x, y)| shape(x, y)).collect()
    }

    fn disc(x: f32, y: f32) -> [u8; 3] {
        let inside = (x - 0.3).powi(2) + (y - 0.6).powi(2) < 0.05;
        if inside {
            [200, 40, 30]
        } else {
            [(90.0 * x) as u8, (140.0 * y) as u8, 120]
        }
    }

    #[test]
    fn a_smaller_copy_has_nearly_the_same_signature() {
        let large = Signature::of(&drawn(640, 480, disc), 640, 480).0;
        let small = Signature::of(&drawn(200, 150, disc), 200, 150).0;
        for (a, b) in large.keys.iter().zip(&small.keys) {
            assert!(distance(a, b) <= 6, "{}", distance(a, b));
        }
        assert!(
            large
                .luma
                .iter()
                .zip(&small.luma)
                .all(|(a, b)| a.abs_diff(*b) <= 12)
        );
    }

    #[test]
    fn a_mirror_image_has_the_same_keys_and_the_mirrored_thumbnail() {
        let picture = Signature::of(&drawn(256, 192, disc), 256, 192).0;
        let mirror = Signature::of(&drawn(256, 192, |x, y| disc(1.0 - x, y)), 256, 192).0;
        assert_eq!(picture.keys, mirror.keys);
        let rows = picture
            .luma
            .chunks_exact(LUMA_SIDE)
            .zip(mirror.luma.chunks_exact(LUMA_SIDE));
        for (row, mirrored) in rows {
            assert!(row.iter().eq(mirrored.iter().rev()));
        }
        assert_ne!(picture.luma, mirror.luma);
    }

    #[test]
    fn flat_pictures_have_an_empty_key_and_their_own_colour() {
        let red = Signature::of(&[250, 10, 10].repeat(40 * 30), 40, 30).0;
        let blue = Signature::of(&[10, 10, 250].repeat(40 * 30), 40, 30).0;
        assert_eq!(red.keys, [[0; 4]; 2]);
        assert_eq!(blue.keys, red.keys);
        assert_ne!(red.colour, blue.colour);
    }

    #[test]
    fn another_picture_has_a_distant_key() {
        let other = |x: f32, y: f32| {
            [
                ((x * 14.0).sin() * 90.0 + 128.0) as u8,
                (y * 200.0) as u8,
                9,
            ]
        };
        let a = Signature::of(&drawn(256, 192, disc), 256, 192).0;
        let b = Signature::of(&drawn(256, 192, other), 256, 192).0;
        assert!(distance(&a.keys[0], &b.keys[0]) > 40);
    }

    #[test]
    fn the_bytes_hold_all() {
        let signature = Signature::of(&drawn(90, 70, disc), 90, 70).0;
        assert_eq!(Signature::from_bytes(&signature.to_bytes()), signature);
    }

    /// Frozen: stored keys must be comparable with those that a later version computes.
    #[test]
    fn the_key_of_a_known_picture_is_frozen() {
        let pixels: Vec<u8> = (0..3 * 64 * 64u32)
            .map(|i| (i * i / 7 + (i / 192) * (i % 61)) as u8)
            .collect();
        assert_eq!(Signature::of(&pixels, 64, 64).0.keys[0], FROZEN);
    }
    const FROZEN: Hash = [
        145_242_334_067_233_028,
        2_612_369_585_555_378_469,
        317_047_271_789_174_786,
        1_233_992_672_203_318_533,
    ];
}
