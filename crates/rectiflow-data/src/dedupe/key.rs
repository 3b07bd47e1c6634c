//! Keys by which near-copies meet: 256 bits of a thumbnail or of a part of it.
//!
//! A key is made of the slopes between neighbours on a grid of 9 x 9 means, 8 x 8 in each
//! direction, with two bits for each. A popular hash stores the sign of each slope or coefficient,
//! or its side of the median. In flat and drawn pictures most are nearly zero and such bits are
//! noise; here a slope must exceed the picture's mean one to set a bit. The slopes at two positions
//! that a mirror exchanges are stored as the sum and the difference: mirroring keeps one and
//! changes the sign of the other. Of the latter the key holds the size in two steps, so that a
//! picture and its mirror image have the same key.
//!
//! A thumbnail has a key of the whole and one of each of some windows: the whole of a crop is a
//! window of its original, and the whole of a picture a window of its copy in a border.
//!
//! All arithmetic is in integers.

use crate::dedupe::{
    pairs::Hash,
    signature::{LUMA_CELLS, LUMA_SIDE, Signature},
};

/// Means a side of the grid that a key is made of, and slopes a side.
const KEY_SIDE: usize = 9;
const SLOPES: usize = KEY_SIDE - 1;
/// A slope must exceed this to set a bit: the sum of four differences of a level.
const LEAST_SLOPE: i32 = 64;

/// A part of a thumbnail, in thousandths of its sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The left edge.
    pub left: usize,
    /// The upper edge.
    pub top: usize,
    /// The width.
    pub width: usize,
    /// The height.
    pub height: usize,
}

const fn window(left: usize, top: usize, width: usize, height: usize) -> Window {
    Window {
        left,
        top,
        width,
        height,
    }
}

/// The whole thumbnail.
pub const WHOLE: Window = window(0, 0, 1000, 1000);

/// A crop of nine tenths of each side.
const fn square(left: usize, top: usize) -> Window {
    window(left, top, 900, 900)
}

/// A crop of nine tenths of the area.
const fn large(left: usize, top: usize) -> Window {
    window(left, top, 949, 949)
}

/// The parts that have keys: the whole, what a border surrounds, and crops.
pub const WINDOWS: [Window; 22] = [
    WHOLE,
    window(65, 65, 870, 870),
    square(0, 0),
    square(33, 0),
    square(67, 0),
    square(100, 0),
    square(0, 33),
    square(33, 33),
    square(67, 33),
    square(100, 33),
    square(0, 67),
    square(33, 67),
    square(67, 67),
    square(100, 67),
    square(0, 100),
    square(33, 100),
    square(67, 100),
    square(100, 100),
    large(13, 13),
    large(38, 13),
    large(13, 38),
    large(38, 38),
];

/// The keys of a thumbnail, in the order of [`WINDOWS`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys([Hash; WINDOWS.len()]);

impl Keys {
    /// The keys of a signature.
    pub fn new(signature: &Signature) -> Self {
        let sums = Sums::new(&signature.luma);
        Self(WINDOWS.map(|window| sums.key(window)))
    }

    /// The key of the whole.
    pub fn whole(&self) -> Hash {
        self.0[0]
    }

    /// The keys of the windows.
    pub fn windows(&self) -> &[Hash] {
        &self.0[1..]
    }
}

/// The sums of all cells above and to the left of each corner of a thumbnail's cells.
#[derive(Debug)]
struct Sums(Vec<u32>);

/// Corners a side.
const CORNERS: usize = LUMA_SIDE + 1;
/// Units of a cell's side: a ninth of a thousandth of a thumbnail's side is 8.
const CELL: usize = 1125;

impl Sums {
    /// Of a thumbnail's luma.
    fn new(luma: &[u8; LUMA_CELLS]) -> Self {
        let mut sums = vec![0u32; CORNERS * CORNERS];
        for y in 0..LUMA_SIDE {
            let mut row = 0;
            for x in 0..LUMA_SIDE {
                row += u32::from(luma[y * LUMA_SIDE + x]);
                sums[(y + 1) * CORNERS + x + 1] = sums[y * CORNERS + x + 1] + row;
            }
        }
        Self(sums)
    }

    /// The key of a part.
    fn key(&self, part: Window) -> Hash {
        key(&self.means(part))
    }

    /// The sum above and to the left of a place, in level cells of `CELL` x `CELL` units.
    fn up_to(&self, x: usize, y: usize) -> u64 {
        let (left, top) = ((x / CELL).min(LUMA_SIDE - 1), (y / CELL).min(LUMA_SIDE - 1));
        let (across, down) = ((x - left * CELL) as u64, (y - top * CELL) as u64);
        let at = |x: usize, y: usize| u64::from(self.0[y * CORNERS + x]);
        let cell = CELL as u64;
        let upper = at(left, top) * (cell - across) + at(left + 1, top) * across;
        let lower = at(left, top + 1) * (cell - across) + at(left + 1, top + 1) * across;
        upper * (cell - down) + lower * down
    }

    /// The 9 x 9 means of a part, in sixteenths of levels.
    fn means(&self, part: Window) -> [i32; KEY_SIDE * KEY_SIDE] {
        let across = |i: usize| 8 * (KEY_SIDE * part.left + i * part.width);
        let down = |i: usize| 8 * (KEY_SIDE * part.top + i * part.height);
        let mut sums = [[0u64; KEY_SIDE + 1]; KEY_SIDE + 1];
        for (y, row) in sums.iter_mut().enumerate() {
            for (x, sum) in row.iter_mut().enumerate() {
                *sum = self.up_to(across(x), down(y));
            }
        }
        let area = (64 * part.width * part.height) as u64;
        std::array::from_fn(|cell| {
            let (x, y) = (cell % KEY_SIDE, cell / KEY_SIDE);
            let sum = sums[y + 1][x + 1] + sums[y][x] - sums[y][x + 1] - sums[y + 1][x];
            ((16 * sum + area / 2) / area) as i32
        })
    }
}

/// The key of 9 x 9 luma means in sixteenths of levels.
fn key(luma: &[i32; KEY_SIDE * KEY_SIDE]) -> Hash {
    let pairs = mirror_pairs(luma);
    let mut sum = 0;
    for [kept, turned] in pairs {
        sum += kept.abs() + turned.abs();
    }
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
fn mirror_pairs(luma: &[i32; KEY_SIDE * KEY_SIDE]) -> [[i32; 2]; SLOPES * SLOPES] {
    let at = |x: usize, y: usize| luma[y * KEY_SIDE + x];
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
    use crate::dedupe::{
        MAX_DISTANCE,
        pairs::distance,
        signature::tests::{disc, drawn},
    };

    fn keys(width: usize, height: usize, shape: impl Fn(f32, f32) -> [u8; 3]) -> Keys {
        Keys::new(&Signature::of(&drawn(width, height, shape), width, height).0)
    }

    #[test]
    fn a_smaller_copy_has_nearly_the_same_keys() {
        let (large, small) = (keys(640, 480, disc), keys(200, 150, disc));
        for (a, b) in large.0.iter().zip(&small.0) {
            assert!(distance(a, b) <= 6, "{}", distance(a, b));
        }
    }

    #[test]
    fn a_mirror_image_has_the_same_keys_in_mirrored_windows() {
        let picture = keys(256, 192, disc);
        let mirror = keys(256, 192, |x, y| disc(1.0 - x, y));
        assert_eq!(picture.whole(), mirror.whole());
        let (mut ours, mut theirs) = (picture.0, mirror.0);
        ours.sort_unstable();
        theirs.sort_unstable();
        assert_eq!(ours, theirs);
    }

    #[test]
    fn a_crop_meets_a_window_and_a_picture_the_inside_of_its_border() {
        let picture = keys(400, 300, disc);
        let nearest = |whole: &Keys, of: &Keys| {
            let distances = of.windows().iter().map(|key| distance(key, &whole.whole()));
            distances.min().unwrap()
        };
        let crop = keys(360, 270, |x, y| disc(0.04 + 0.9 * x, 0.09 + 0.9 * y));
        assert!(nearest(&crop, &picture) <= MAX_DISTANCE);
        let bordered = keys(400, 300, |x, y| {
            let (x, y) = ((x - 0.07) / 0.86, (y - 0.07) / 0.86);
            match (0.0..1.0).contains(&x) && (0.0..1.0).contains(&y) {
                true => disc(x, y),
                false => [90, 140, 120],
            }
        });
        assert!(nearest(&picture, &bordered) <= MAX_DISTANCE);
    }

    #[test]
    fn flat_pictures_have_empty_keys_and_another_picture_has_a_distant_one() {
        assert_eq!(
            keys(40, 30, |_, _| [250, 10, 10]).0,
            [[0; 4]; WINDOWS.len()]
        );
        let other = keys(256, 192, |x, y| {
            [
                ((x * 14.0).sin() * 90.0 + 128.0) as u8,
                (y * 200.0) as u8,
                9,
            ]
        });
        assert!(distance(&other.whole(), &keys(256, 192, disc).whole()) > 40);
    }

    /// Frozen, since thresholds were measured with these keys.
    #[test]
    fn the_key_of_a_known_picture_is_frozen() {
        let pixels: Vec<u8> = (0..3 * 64 * 64u32)
            .map(|i| (i * i / 7 + (i / 192) * (i % 61)) as u8)
            .collect();
        let keys = Keys::new(&Signature::of(&pixels, 64, 64).0);
        assert_eq!([keys.whole(), keys.windows()[0]], FROZEN);
    }
    const FROZEN: [Hash; 2] = [
        [
            145_242_334_067_233_028,
            2_324_139_209_403_666_725,
            317_047_271_520_739_330,
            1_233_992_637_843_571_973,
        ],
        [
            144_433_084_377_464_850,
            2_603_081_735_957_774_689,
            67_097_427_778_216_204,
            1_154_610_354_539_266_116,
        ],
    ];
}
