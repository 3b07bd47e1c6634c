//! The map of one picture onto its copy: the scale and the shift of each axis.
//!
//! A start is the best of the maps that windows stand for. It is refined
//! by Gauss and Newton's method from coarse to fine (Lucas and Kanade 1981), and held to the start
//! where a picture has no slopes that say more.
//!
//! Single precision in a fixed order, and only operations that IEEE 754 rounds correctly: the
//! same answer on every processor.

use crate::dedupe::{
    key::{WINDOWS, Window},
    signature::LUMA_SIDE,
};

/// Cells a side of the planes on which two pictures are registered, coarse to fine.
pub(crate) const SIDES: [usize; 4] = [8, 16, 32, LUMA_SIDE];

/// The place in the first picture of a place in the second: scale * place + shift. Places are -1 to
/// 1 from edge to edge.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Map {
    /// The scale of x, then of y.
    pub scale: [f32; 2],
    /// The shift of x, then of y.
    pub shift: [f32; 2],
}

/// Levels a cell.
const NOISE_SLOPE: f32 = 0.2;

/// The map of a picture onto itself.
pub const IDENTITY: Map = Map {
    scale: [1.0; 2],
    shift: [0.0; 2],
};

/// The luma of a thumbnail at several sizes: `SIDES`.
#[derive(Debug, Clone)]
pub(crate) struct Pyramid([Vec<f32>; 4]);

impl Pyramid {
    pub(crate) fn new(luma: &[u8]) -> Self {
        let fine = softened(luma, LUMA_SIDE);
        let half = halved(&fine, 64);
        let quarter = halved(&half, 32);
        let eighth = halved(&quarter, 16);
        Self([eighth, quarter, half, fine])
    }

    /// The plane of `LUMA_SIDE` cells a side.
    pub(crate) fn fine(&self) -> &[f32] {
        &self.0[3]
    }

    /// The variance of the coarsest plane.
    pub(crate) fn coarse_variance(&self) -> f32 {
        let plane = &self.0[0];
        let count = plane.len() as f32;
        let mean = plane.iter().sum::<f32>() / count;
        let squares: f32 = plane
            .iter()
            .map(|value| (value - mean) * (value - mean))
            .sum();
        squares / count
    }

    /// This picture, mirrored.
    pub(crate) fn mirrored(&self) -> Self {
        let turn = |level: usize| mirrored(&self.0[level], SIDES[level]);
        Self([turn(0), turn(1), turn(2), turn(3)])
    }
}

/// A plane, mirrored.
pub(crate) fn mirrored(plane: &[f32], side: usize) -> Vec<f32> {
    let mut turned = Vec::with_capacity(plane.len());
    for row in plane.chunks_exact(side) {
        turned.extend(row.iter().rev());
    }
    turned
}

impl Map {
    fn of_window(window: Window) -> Self {
        let share = |length: usize| length as f32 / 1000.0;
        let [left, top] = [share(window.left), share(window.top)];
        let [width, height] = [share(window.width), share(window.height)];
        Self {
            scale: [width, height],
            shift: [2.0 * left + width - 1.0, 2.0 * top + height - 1.0],
        }
    }

    fn inverse(self) -> Self {
        let [sx, sy] = self.scale;
        let [tx, ty] = self.shift;
        Self {
            scale: [1.0 / sx, 1.0 / sy],
            shift: [-tx / sx, -ty / sy],
        }
    }

    /// Whether one picture lies in the other, as a crop or what a border surrounds.
    pub(crate) fn is_inside(&self) -> bool {
        let inside = |axis: usize| {
            let room = (self.scale[axis] - 1.0).abs();
            self.shift[axis].abs() <= room + 0.04
        };
        inside(0) && inside(1)
    }

    /// Whether it moves nothing by more than a twentieth of a side.
    pub(crate) fn is_near_identity(&self) -> bool {
        let near =
            |axis: usize| (self.scale[axis] - 1.0).abs() <= 0.05 && self.shift[axis].abs() <= 0.05;
        near(0) && near(1)
    }

    /// What the other map must be changed by to be this one, in the order of `step`.
    fn minus(&self, other: &Self) -> [f32; 4] {
        let [sx, sy] = [0, 1].map(|axis| self.scale[axis] - other.scale[axis]);
        let [tx, ty] = [0, 1].map(|axis| self.shift[axis] - other.shift[axis]);
        [sx, tx, sy, ty]
    }
}

/// The planes on which a look is taken, and those on which the start is chosen.
const GLANCE: usize = 0;
const CHOICE: usize = 2;

/// The least mean square of what differs on the coarsest plane, by all maps that windows stand for,
/// of `b` onto `a`.
pub(crate) fn glance(a: &Pyramid, b: &Pyramid) -> f32 {
    best(a, b, GLANCE).1
}

/// The best of the maps that windows stand for, of `b` onto `a`. It is chosen on a fine plane: on
/// the coarsest a pattern is flat.
pub(crate) fn start(a: &Pyramid, b: &Pyramid) -> Map {
    best(a, b, CHOICE).0
}

fn best(a: &Pyramid, b: &Pyramid, level: usize) -> (Map, f32) {
    let mut best = (IDENTITY, error(a, b, &IDENTITY, level));
    for window in &WINDOWS[1..] {
        let map = Map::of_window(*window);
        for map in [map, map.inverse()] {
            let error = error(a, b, &map, level);
            if error < best.1 {
                best = (map, error);
            }
        }
    }
    best
}

/// The mean square of what differs on the coarsest plane.
pub(crate) fn coarse_error(a: &Pyramid, b: &Pyramid, map: &Map) -> f32 {
    error(a, b, map, GLANCE)
}

fn error(a: &Pyramid, b: &Pyramid, map: &Map, level: usize) -> f32 {
    let (first, second, side) = (&a.0[level], &b.0[level], SIDES[level]);
    let (mut sum, mut count) = (0.0f32, 0.0f32);
    each_cell(first, side, map, 0, |x, y, value| {
        let difference = second[y * side + x] - value;
        sum += difference * difference;
        count += 1.0;
    });
    sum / count.max(1.0)
}

/// The map that starts at `map`, refined. None if it leaves the range of copies.
pub(crate) fn refined(a: &Pyramid, b: &Pyramid, mut map: Map) -> Option<Map> {
    let from = map;
    for (level, steps) in [(1, 4), (2, 3), (3, 2)] {
        for _ in 0..steps {
            step(&a.0[level], &b.0[level], SIDES[level], &from, &mut map)?;
        }
    }
    Some(map)
}

/// A plane blurred by 1 2 1 in both directions.
pub(crate) fn softened(plane: &[u8], side: usize) -> Vec<f32> {
    let blur = |plane: &[f32], stride: usize| -> Vec<f32> {
        let mut out = Vec::with_capacity(plane.len());
        for (i, &value) in plane.iter().enumerate() {
            let at = i / stride % side;
            let before = if at > 0 { plane[i - stride] } else { value };
            let after = if at + 1 < side {
                plane[i + stride]
            } else {
                value
            };
            out.push((before + 2.0 * value + after) * 0.25);
        }
        out
    };
    let plane: Vec<f32> = plane.iter().map(|&value| f32::from(value)).collect();
    blur(&blur(&plane, 1), side)
}

/// A plane of half as many cells a side.
fn halved(plane: &[f32], side: usize) -> Vec<f32> {
    let half = side / 2;
    let mut out = Vec::with_capacity(half * half);
    for y in 0..half {
        for x in 0..half {
            let at = 2 * y * side + 2 * x;
            let upper = plane[at] + plane[at + 1];
            let lower = plane[at + side] + plane[at + side + 1];
            out.push((upper + lower) * 0.25);
        }
    }
    out
}

/// A column or a row of one plane, and where it lies in the other plane.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// The column or row.
    cell: usize,
    /// Its middle, from -1 to 1.
    position: f32,
    /// The one before its place in the other plane.
    before: usize,
    /// The way from there to the next, 0 to 1.
    way: f32,
}

/// The columns or rows of a plane of `side` cells that a map leaves in the other plane. Half a cell
/// at the edges counts as inside.
fn places(scale: f32, shift: f32, side: usize) -> Vec<Place> {
    let last = side as f32 - 1.0;
    let mut all = Vec::with_capacity(side);
    for cell in 0..side {
        let position = (2.0 * cell as f32 + 1.0) / side as f32 - 1.0;
        let at = (scale * position + shift + 1.0) * side as f32 / 2.0 - 0.5;
        if at < -0.5 || at > last + 0.5 {
            continue;
        }
        let at = at.clamp(0.0, last);
        let before = (at as usize).min(side - 2);
        all.push(Place {
            cell,
            position,
            before,
            way: at - before as f32,
        });
    }
    all
}

/// The columns and the rows.
fn grid(map: &Map, side: usize) -> [Vec<Place>; 2] {
    [0, 1].map(|axis| places(map.scale[axis], map.shift[axis], side))
}

/// Passes each cell of a plane that lies in the plane `a` to `take`: its column and row, and the
/// value of `a` at its place. Cells of a `margin` are left out in both, since a border's colour
/// runs into them.
pub(crate) fn each_cell(
    a: &[f32],
    side: usize,
    map: &Map,
    margin: usize,
    mut take: impl FnMut(usize, usize, f32),
) {
    let mut both = grid(map, side);
    let inner = margin..side - margin;
    for places in &mut both {
        places.retain(|place| {
            let nearest = place.before + usize::from(place.way >= 0.5);
            inner.contains(&place.cell) && inner.contains(&nearest)
        });
    }
    let [columns, rows] = both;
    for row in &rows {
        let (upper, lower) = a[row.before * side..][..2 * side].split_at(side);
        for column in &columns {
            let (left, right) = (column.before, column.before + 1);
            let above = upper[left] + column.way * (upper[right] - upper[left]);
            let below = lower[left] + column.way * (lower[right] - lower[left]);
            take(column.cell, row.cell, above + row.way * (below - above));
        }
    }
}

/// The equations of a step of Gauss and Newton's method: of the scale and the shift of x, then of
/// y.
#[derive(Debug, Default)]
struct Equations {
    normal: [[f32; 4]; 4],
    right: [f32; 4],
    count: f32,
}

impl Equations {
    fn of(a: &[f32], b: &[f32], side: usize, map: &Map) -> Self {
        let [columns, rows] = grid(map, side);
        let half = side as f32 / 2.0;
        let mut all = Self::default();
        for row in &rows {
            let (upper, lower) = a[row.before * side..][..2 * side].split_at(side);
            let seen = &b[row.cell * side..][..side];
            for column in &columns {
                let (left, right) = (column.before, column.before + 1);
                let upper_step = upper[right] - upper[left];
                let lower_step = lower[right] - lower[left];
                let above = upper[left] + column.way * upper_step;
                let below = lower[left] + column.way * lower_step;
                let along_x = (upper_step + row.way * (lower_step - upper_step)) * half;
                let along_y = (below - above) * half;
                let difference = seen[column.cell] - (above + row.way * (below - above));
                let x_scale = along_x * column.position;
                let y_scale = along_y * row.position;
                all.add([x_scale, along_x, y_scale, along_y], difference);
            }
        }
        all
    }

    fn add(&mut self, gradient: [f32; 4], difference: f32) {
        self.count += 1.0;
        for (i, &slope) in gradient.iter().enumerate() {
            self.right[i] += slope * difference;
            for (sum, &other) in self.normal[i].iter_mut().zip(&gradient) {
                *sum += slope * other;
            }
        }
    }
}

/// One step of Gauss and Newton's method on the map of `b` onto `a`. None without a solution or
/// with a map that is far from a copy's.
fn step(a: &[f32], b: &[f32], side: usize, from: &Map, map: &mut Map) -> Option<()> {
    let mut equations = Equations::of(a, b, side, map);
    // Drawn to the start as by slopes of a fraction of a level a cell: noise does not move it.
    let slope = NOISE_SLOPE * side as f32 / 2.0;
    let weight = slope * slope * equations.count + 1e-3;
    for (i, away) in from.minus(map).into_iter().enumerate() {
        equations.normal[i][i] = equations.normal[i][i] * 1.001 + weight;
        equations.right[i] += weight * away;
    }
    let [sx, tx, sy, ty] = solved(equations.normal, equations.right)?;
    map.scale[0] += sx.clamp(-0.1, 0.1);
    map.shift[0] += tx.clamp(-0.1, 0.1);
    map.scale[1] += sy.clamp(-0.1, 0.1);
    map.shift[1] += ty.clamp(-0.1, 0.1);
    let far = |axis: usize| (map.scale[axis] - 1.0).abs() > 0.35 || map.shift[axis].abs() > 0.35;
    (!far(0) && !far(1)).then_some(())
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
