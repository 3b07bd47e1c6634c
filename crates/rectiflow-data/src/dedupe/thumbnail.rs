//! Whether two signatures are of copies of one picture.
//!
//! First the thumbnails are compared as they are, then after a registration: the scale and the
//! shift of each axis that map one onto the other, found by Gauss and Newton's method from coarse
//! to fine (Lucas and Kanade 1981). It finds crops and borders that were trimmed a little
//! differently. Both are tried with the second picture mirrored.
//!
//! A difference is judged against the picture's detail: what is left of its contrast without its
//! mean and slopes. Pictures with little detail (flat ones, gradients) must agree in level and are
//! never registered, since a part of a gradient is like every other gradient.
//!
//! Single precision in a fixed order, and only operations that IEEE 754 rounds correctly: the
//! same answer on every processor.

use crate::dedupe::signature::{COLOUR_SIDE, LUMA_SIDE, Signature};

const N: usize = LUMA_SIDE;
/// The map of a picture onto itself.
const IDENTITY: [f32; 4] = [1.0, 0.0, 1.0, 0.0];
/// Positions up to here are in the middle.
const MIDDLE: f32 = 0.625;

/// The limits of [`Thumbnail::matches`]; levels are those of 8-bit pixels.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Root mean square of the luma differences of a plain picture.
    pub plain_levels: f32,
    /// The same in the middle, where 1.8 times the shares below are allowed.
    pub middle_levels: f32,
    /// Root mean square of the luma differences, as a share of the detail.
    pub share: f32,
    /// The same after a registration.
    pub registered_share: f32,
    /// The same on a plane of 16 x 16 cells; either is enough.
    pub coarse_share: f32,
    /// Detail below which nothing is registered.
    pub registered_detail: f32,
    /// Kurtosis of the luma above which nothing is registered: the detail is in few cells, as of a
    /// moon in the night, and one moon fits every other.
    pub registered_kurtosis: f32,
    /// Root mean square of the colour differences of a picture with little colour.
    pub colour_levels: f32,
    /// The same as a share of the colours' contrast, doubled after a registration.
    pub colour_share: f32,
    /// The largest relative scale of an axis.
    pub scale: f32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            plain_levels: 1.5,
            middle_levels: 1.0,
            share: 0.22,
            registered_share: 0.25,
            coarse_share: 0.15,
            registered_detail: 3.0,
            registered_kurtosis: 12.0,
            colour_levels: 2.5,
            colour_share: 0.25,
            scale: 1.25,
        }
    }
}

/// A signature prepared for comparisons.
#[derive(Debug, Clone)]
pub struct Thumbnail {
    luma: [f32; N * N],
    /// Without the finest detail, which cannot be moved by a part of a cell.
    soft: [f32; N * N],
    colour: [f32; 2 * COLOUR_SIDE * COLOUR_SIDE],
    /// Root mean square of what no plane explains, in levels.
    detail: f32,
    colour_contrast: f32,
    kurtosis: f32,
    /// Width divided by height.
    aspect: f32,
}

/// How two thumbnails differ.
#[derive(Debug, Clone, Copy)]
pub struct Difference {
    /// Root mean square of the luma differences, in levels.
    pub luma: f32,
    /// The largest luma difference.
    pub largest: f32,
    /// Root mean square of the colour differences.
    pub colour: f32,
    /// The larger detail of the two where they overlap.
    pub detail: f32,
    /// As `luma` and `detail`, in the middle five eighths of each side: a frame and what it holds
    /// can differ in likeness.
    pub middle: [f32; 2],
    /// The standard deviation of the colours of the first.
    pub colour_contrast: f32,
    /// Of (x, y): position in the first = scale * position in the second + shift, from -1 to 1.
    pub map: [f32; 4],
}

impl Thumbnail {
    /// Prepares a signature.
    pub fn new(signature: &Signature) -> Self {
        let luma = signature.luma.map(f32::from);
        let [width, height] = signature.size_px.map(|side| f32::from(side.max(1)));
        let colour = signature.colour.map(f32::from);
        Self {
            soft: softened(&luma),
            detail: detail(&luma),
            colour_contrast: contrast(&colour),
            kurtosis: kurtosis(&luma),
            aspect: width / height,
            luma,
            colour,
        }
    }

    /// Whether `other` is a copy of this picture, as it is or mirrored.
    pub fn matches(&self, other: &Self, limits: &Limits) -> bool {
        self.plain_match(other, limits) || self.registered_match(other, limits)
    }

    /// Whether the two are copies without a registration.
    pub fn plain_match(&self, other: &Self, limits: &Limits) -> bool {
        let ratio = self.aspect / other.aspect;
        if ratio > limits.scale || ratio * limits.scale < 1.0 {
            return false;
        }
        [false, true].into_iter().any(|mirrored| {
            let difference = self.difference(other, mirrored);
            limits.allow(&difference)
        })
    }

    fn registered_match(&self, other: &Self, limits: &Limits) -> bool {
        let ratio = self.aspect / other.aspect;
        if self.detail.min(other.detail) < limits.registered_detail
            || self.kurtosis.max(other.kurtosis) > limits.registered_kurtosis
            || ratio > limits.scale
            || ratio * limits.scale < 1.0
        {
            return false;
        }
        [false, true].into_iter().any(|mirrored| {
            let found = if mirrored {
                self.registered(&other.mirrored())
            } else {
                self.registered(other)
            };
            found.is_some_and(|[coarse, fine]| {
                limits.allow_registered(&coarse, limits.coarse_share)
                    || limits.allow_registered(&fine, limits.registered_share)
            })
        })
    }

    /// The difference cell by cell.
    pub fn difference(&self, other: &Self, mirrored: bool) -> Difference {
        let side = |i: usize, side: usize| {
            if mirrored {
                i / side * side + (side - 1 - i % side)
            } else {
                i
            }
        };
        let other_luma: [f32; N * N] = std::array::from_fn(|i| other.luma[side(i, N)]);
        let mut difference = overlap(&self.luma, &other_luma, N, &IDENTITY)
            .expect("the identity maps every cell into the plane");
        let mut colour = 0.0f32;
        for (i, &value) in self.colour.iter().enumerate() {
            let d = value - other.colour[side(i, COLOUR_SIDE)];
            colour += d * d;
        }
        difference.colour = (colour / self.colour.len() as f32).sqrt();
        difference.colour_contrast = self.colour_contrast;
        difference.detail = self.detail.max(other.detail);
        difference
    }

    /// This thumbnail, mirrored.
    pub fn mirrored(&self) -> Self {
        let turned =
            |plane: &[f32; N * N]| std::array::from_fn(|i| plane[i / N * N + (N - 1 - i % N)]);
        let (luma, soft) = (turned(&self.luma), turned(&self.soft));
        let c = COLOUR_SIDE;
        let colour = std::array::from_fn(|i| self.colour[i / c * c + (c - 1 - i % c)]);
        Self {
            luma,
            soft,
            colour,
            ..*self
        }
    }

    /// The differences after the registration of `other` onto this one, on a plane of 16 x 16 cells
    /// and on that of 32 x 32; `None` if there is none.
    pub fn registered(&self, other: &Self) -> Option<[Difference; 2]> {
        let coarse = [&self.soft, &other.soft].map(|plane| reduced(plane, 8));
        let mut map = start(&coarse[0], &coarse[1])?;
        let mut found = [None, None];
        for side in [8, 16, N] {
            let (a, b) = (reduced(&self.soft, side), reduced(&other.soft, side));
            for _ in 0..4 {
                step(&a, &b, side, &mut map)?;
            }
            let part = overlap(&a, &b, side, &map)?;
            if part.luma > 0.7 * part.detail {
                return None;
            }
            found = [found[1], Some(part)];
        }
        let cells = COLOUR_SIDE * COLOUR_SIDE;
        let mut sum = 0.0;
        for plane in [0..cells, cells..2 * cells] {
            let planes = [&self.colour[plane.clone()], &other.colour[plane]];
            let part = overlap(planes[0], planes[1], COLOUR_SIDE, &map)?;
            sum += part.luma * part.luma;
        }
        let with_colour = |difference: Difference| Difference {
            colour: (sum / 2.0).sqrt(),
            colour_contrast: self.colour_contrast,
            ..difference
        };
        Some([with_colour(found[0]?), with_colour(found[1]?)])
    }
}

impl Limits {
    fn allow(&self, d: &Difference) -> bool {
        d.luma <= self.plain_levels.max(self.share * d.detail)
            && d.largest <= 4.0f32.max(2.0 * d.detail)
            && d.middle[0] <= self.middle_levels.max(1.8 * self.share * d.middle[1])
            && d.colour
                <= self
                    .colour_levels
                    .max(self.colour_share * d.colour_contrast)
    }

    fn allow_registered(&self, d: &Difference, share: f32) -> bool {
        let [sx, tx, sy, ty] = d.map;
        let near = |scale: f32| scale <= self.scale && scale * self.scale >= 1.0;
        // One lies inside the other: a crop, or a border that was not trimmed. Another picture of
        // one thing, such as a moon, has it elsewhere.
        let inside = |scale: f32, shift: f32| shift.abs() <= (scale - 1.0).abs() + 0.04;
        near(sx)
            && near(sy)
            && near(sx / sy)
            && inside(sx, tx)
            && inside(sy, ty)
            && d.luma <= share * d.detail
            && d.middle[0] <= self.middle_levels.max(1.8 * share * d.middle[1])
            && d.colour
                <= (2.0 * self.colour_levels).max(2.0 * self.colour_share * d.colour_contrast)
    }
}

/// A plane blurred by 1 2 1 in both directions.
fn softened(plane: &[f32; N * N]) -> [f32; N * N] {
    let blur = |plane: &[f32; N * N], stride: usize| -> [f32; N * N] {
        std::array::from_fn(|i| {
            let at = i / stride % N;
            let before = if at > 0 { plane[i - stride] } else { plane[i] };
            let after = if at + 1 < N {
                plane[i + stride]
            } else {
                plane[i]
            };
            (before + 2.0 * plane[i] + after) * 0.25
        })
    };
    blur(&blur(plane, 1), N)
}

/// A square plane with fewer cells.
fn reduced(plane: &[f32; N * N], side: usize) -> Vec<f32> {
    let cell = N / side;
    let mut out = vec![0.0; side * side];
    for y in 0..N {
        for x in 0..N {
            out[y / cell * side + x / cell] += plane[y * N + x];
        }
    }
    for value in &mut out {
        *value /= (cell * cell) as f32;
    }
    out
}

/// Position from -1 to 1 of the middle of a cell.
fn position(cell: usize, side: usize) -> f32 {
    (2.0 * cell as f32 + 1.0) / side as f32 - 1.0
}

/// A value between cells and its slopes, per unit of position; `None` outside of the plane. Half a
/// cell at the edges counts as inside.
fn sample(plane: &[f32], side: usize, x: f32, y: f32) -> Option<(f32, f32, f32)> {
    let at = |position: f32| (position + 1.0) * side as f32 / 2.0 - 0.5;
    let (x, y) = (at(x), at(y));
    let last = side as f32 - 1.0;
    if x < -0.5 || y < -0.5 || x > last + 0.5 || y > last + 0.5 {
        return None;
    }
    let (x, y) = (x.clamp(0.0, last), y.clamp(0.0, last));
    let (left, top) = ((x as usize).min(side - 2), (y as usize).min(side - 2));
    let (u, v) = (x - left as f32, y - top as f32);
    let cell = top * side + left;
    let (a, b) = (plane[cell], plane[cell + 1]);
    let (c, d) = (plane[cell + side], plane[cell + side + 1]);
    let (upper, lower) = (a + u * (b - a), c + u * (d - c));
    let slope = side as f32 / 2.0;
    let along_x = ((b - a) + v * ((d - c) - (b - a))) * slope;
    Some((
        upper + v * (lower - upper),
        along_x,
        (lower - upper) * slope,
    ))
}

/// The best of the maps that crops and borders have, on a plane of 8 x 8 cells: five scales, and
/// the smaller in the middle, at the edges and in the corners of the larger. `None` if none is
/// near.
fn start(a: &[f32], b: &[f32]) -> Option<[f32; 4]> {
    let mut best: Option<(f32, [f32; 4])> = None;
    for scale in [1.0f32, 0.9, 0.84, 1.1, 1.18] {
        let most = (1.0 - scale).abs();
        for place in 0..9 {
            let shift = |which: usize| (which as f32 - 1.0) * most;
            let map = [scale, shift(place % 3), scale, shift(place / 3)];
            if let Some(part) = overlap(a, b, 8, &map) {
                let share = part.luma / part.detail.max(1.0);
                if best.is_none_or(|(least, _)| share < least) {
                    best = Some((share, map));
                }
            }
        }
    }
    best.filter(|&(share, _)| share < 0.8).map(|(_, map)| map)
}

/// One step of Gauss and Newton's method on the map of `b` onto `a`. `None` without a solution or
/// with a map that is far from a copy's.
fn step(a: &[f32], b: &[f32], side: usize, map: &mut [f32; 4]) -> Option<()> {
    let (mut normal, mut right) = ([[0.0f32; 4]; 4], [0.0f32; 4]);
    for (cell, &seen) in b.iter().enumerate() {
        let (x, y) = (position(cell % side, side), position(cell / side, side));
        let mapped = sample(a, side, map[0] * x + map[1], map[2] * y + map[3]);
        let Some((value, along_x, along_y)) = mapped else {
            continue;
        };
        let gradient = [along_x * x, along_x, along_y * y, along_y];
        let difference = seen - value;
        for i in 0..4 {
            right[i] += gradient[i] * difference;
            for j in 0..4 {
                normal[i][j] += gradient[i] * gradient[j];
            }
        }
    }
    for (i, row) in normal.iter_mut().enumerate() {
        row[i] *= 1.001;
        row[i] += 1e-3;
    }
    let change = solved(normal, right)?;
    for (value, change) in map.iter_mut().zip(change) {
        *value += change.clamp(-0.1, 0.1);
    }
    let far = |scale: f32, shift: f32| (scale - 1.0).abs() > 0.35 || shift.abs() > 0.35;
    (!far(map[0], map[1]) && !far(map[2], map[3])).then_some(())
}

/// The solution of four linear equations with a symmetric, positive matrix (Gauss).
#[allow(clippy::needless_range_loop, reason = "rows and columns of a matrix")]
fn solved(mut matrix: [[f32; 4]; 4], mut right: [f32; 4]) -> Option<[f32; 4]> {
    for i in 0..4 {
        if matrix[i][i] <= 1e-6 {
            return None;
        }
        for row in i + 1..4 {
            let factor = matrix[row][i] / matrix[i][i];
            for column in i..4 {
                matrix[row][column] -= factor * matrix[i][column];
            }
            right[row] -= factor * right[i];
        }
    }
    for i in (0..4).rev() {
        for column in i + 1..4 {
            right[i] -= matrix[i][column] * right[column];
        }
        right[i] /= matrix[i][i];
    }
    Some(right)
}

/// The difference where `b`, mapped, lies in `a`; `None` if that is less than three fifths of it.
fn overlap(a: &[f32], b: &[f32], side: usize, map: &[f32; 4]) -> Option<Difference> {
    let (mut cells, mut middle) = (Vec::with_capacity(side * side), Vec::new());
    let (mut sum, mut middle_sum, mut largest) = (0.0f32, 0.0f32, 0.0f32);
    for (cell, &seen) in b.iter().enumerate() {
        let (x, y) = (position(cell % side, side), position(cell / side, side));
        let mapped = sample(a, side, map[0] * x + map[1], map[2] * y + map[3]);
        let Some((value, ..)) = mapped else { continue };
        let d = seen - value;
        sum += d * d;
        largest = largest.max(d.abs());
        cells.push((x, y, seen));
        if x.abs().max(y.abs()) < MIDDLE {
            middle.push((x, y, seen));
            middle_sum += d * d;
        }
    }
    if 5 * cells.len() < 3 * side * side {
        return None;
    }
    let middle_luma = (middle_sum / middle.len().max(1) as f32).sqrt();
    Some(Difference {
        luma: (sum / cells.len() as f32).sqrt(),
        largest,
        colour: 0.0,
        detail: off_plane(&cells),
        middle: [middle_luma, off_plane(&middle)],
        colour_contrast: 0.0,
        map: *map,
    })
}

/// The fourth moment divided by the square of the second; 0 of a flat plane.
fn kurtosis(luma: &[f32; N * N]) -> f32 {
    let mean = luma.iter().sum::<f32>() / luma.len() as f32;
    let (mut second, mut fourth) = (0.0f32, 0.0f32);
    for value in luma {
        let square = (value - mean) * (value - mean);
        second += square;
        fourth += square * square;
    }
    fourth * luma.len() as f32 / (second * second).max(1.0)
}

/// The standard deviation of two planes of colour, together.
fn contrast(colour: &[f32; 2 * COLOUR_SIDE * COLOUR_SIDE]) -> f32 {
    let mut sum = 0.0f32;
    for plane in colour.chunks_exact(COLOUR_SIDE * COLOUR_SIDE) {
        let mean = plane.iter().sum::<f32>() / plane.len() as f32;
        sum += plane
            .iter()
            .map(|value| (value - mean) * (value - mean))
            .sum::<f32>();
    }
    (sum / colour.len() as f32).sqrt()
}

fn detail(luma: &[f32; N * N]) -> f32 {
    let cells = luma.iter().enumerate();
    let cells: Vec<_> = cells
        .map(|(i, &value)| (position(i % N, N), position(i / N, N), value))
        .collect();
    off_plane(&cells)
}

/// Root mean square of what is left of values without their mean and slopes. The positions are
/// those of a rectangle, in which the two slopes do not depend on each other.
fn off_plane(cells: &[(f32, f32, f32)]) -> f32 {
    let count = cells.len() as f32;
    let (mut mx, mut my, mut mv) = (0.0f32, 0.0f32, 0.0f32);
    for &(x, y, value) in cells {
        mx += x;
        my += y;
        mv += value;
    }
    let (mx, my, mv) = (mx / count, my / count, mv / count);
    let (mut xx, mut yy, mut xv, mut yv, mut vv) = (0.0f32, 0.0f32, 0.0f32, 0.0f32, 0.0f32);
    for &(x, y, value) in cells {
        let (x, y, value) = (x - mx, y - my, value - mv);
        xx += x * x;
        yy += y * y;
        xv += x * value;
        yv += y * value;
        vv += value * value;
    }
    let explained = xv * xv / xx.max(1e-6) + yv * yv / yy.max(1e-6);
    ((vv - explained).max(0.0) / count).sqrt()
}
