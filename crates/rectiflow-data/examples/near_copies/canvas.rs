//! A picture to draw on, and a seeded generator of numbers.

use std::f32::consts::TAU;

/// A colour, red, green, blue.
pub(crate) type Colour = [u8; 3];

/// An RGB picture.
#[derive(Clone)]
pub(crate) struct Canvas {
    pub(crate) width: usize,
    pub(crate) height: usize,
    /// `[h, w, 3]`
    pub(crate) pixels: Vec<u8>,
}

/// Numbers from a seed (splitmix64).
#[derive(Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        let mut dice = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (stream << 20));
        dice.next();
        Self(dice.next() ^ stream)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from `low` up to, but not, `high`.
    pub(crate) fn whole(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() >> 11) as usize % (high - low)
    }

    pub(crate) fn real(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * ((self.next() >> 40) as f32 / (1u64 << 24) as f32)
    }

    pub(crate) fn chance(&mut self, share: f32) -> bool {
        self.real(0.0, 1.0) < share
    }

    pub(crate) fn colour(&mut self) -> Colour {
        [0; 3].map(|_: u8| self.whole(0, 256) as u8)
    }

    pub(crate) fn between(&mut self, low: u8, high: u8) -> Colour {
        [0; 3].map(|_: u8| self.whole(low as usize, high as usize + 1) as u8)
    }
}

/// The colour a share `t` of the way from `a` to `b`.
pub(crate) fn mix(a: Colour, b: Colour, t: f32) -> Colour {
    let t = t.clamp(0.0, 1.0);
    std::array::from_fn(|c| {
        let (a, b) = (f32::from(a[c]), f32::from(b[c]));
        (a + (b - a) * t).round() as u8
    })
}

impl Canvas {
    pub(crate) fn filled(width: usize, height: usize, colour: Colour) -> Self {
        let pixels = colour.repeat(width * height);
        Self {
            width,
            height,
            pixels,
        }
    }

    pub(crate) fn get(&self, x: usize, y: usize) -> Colour {
        let at = 3 * (y * self.width + x);
        [self.pixels[at], self.pixels[at + 1], self.pixels[at + 2]]
    }

    pub(crate) fn set(&mut self, x: i32, y: i32, colour: Colour) {
        if x >= 0 && y >= 0 && (x as usize) < self.width && (y as usize) < self.height {
            let at = 3 * (y as usize * self.width + x as usize);
            self.pixels[at..at + 3].copy_from_slice(&colour);
        }
    }

    pub(crate) fn rect(&mut self, x: i32, y: i32, w: i32, h: i32, colour: Colour) {
        for row in y.max(0)..(y + h).min(self.height as i32) {
            for column in x.max(0)..(x + w).min(self.width as i32) {
                self.set(column, row, colour);
            }
        }
    }

    pub(crate) fn ellipse(&mut self, cx: f32, cy: f32, rx: f32, ry: f32, colour: Colour) {
        for y in (cy - ry).floor() as i32..=(cy + ry).ceil() as i32 {
            for x in (cx - rx).floor() as i32..=(cx + rx).ceil() as i32 {
                let (dx, dy) = ((x as f32 - cx) / rx, (y as f32 - cy) / ry);
                if dx * dx + dy * dy <= 1.0 {
                    self.set(x, y, colour);
                }
            }
        }
    }

    /// A polygon, filled by the even-odd rule.
    pub(crate) fn polygon(&mut self, points: &[(f32, f32)], colour: Colour) {
        for y in 0..self.height as i32 {
            let line = y as f32 + 0.5;
            let mut cuts: Vec<f32> = Vec::new();
            for (i, &(ax, ay)) in points.iter().enumerate() {
                let (bx, by) = points[(i + 1) % points.len()];
                if (ay <= line) != (by <= line) {
                    cuts.push(ax + (line - ay) / (by - ay) * (bx - ax));
                }
            }
            cuts.sort_by(f32::total_cmp);
            for cut in cuts.chunks_exact(2) {
                for x in cut[0].round() as i32..cut[1].round() as i32 {
                    self.set(x, y, colour);
                }
            }
        }
    }

    pub(crate) fn line(&mut self, from: (f32, f32), to: (f32, f32), thick: f32, colour: Colour) {
        let length = (to.0 - from.0).hypot(to.1 - from.1).max(1.0);
        let steps = length.ceil() as usize;
        for step in 0..=steps {
            let t = step as f32 / steps as f32;
            let (x, y) = (from.0 + (to.0 - from.0) * t, from.1 + (to.1 - from.1) * t);
            let half = thick / 2.0;
            self.rect(
                (x - half).round() as i32,
                (y - half).round() as i32,
                thick.round().max(1.0) as i32,
                thick.round().max(1.0) as i32,
                colour,
            );
        }
    }

    /// A gradient over the whole picture, `angle` in turns.
    pub(crate) fn gradient(&mut self, a: Colour, b: Colour, angle: f32) {
        let (dx, dy) = ((angle * TAU).cos(), (angle * TAU).sin());
        let span = (dx.abs() * self.width as f32 + dy.abs() * self.height as f32).max(1.0);
        let (mx, my) = (self.width as f32 / 2.0, self.height as f32 / 2.0);
        for y in 0..self.height {
            for x in 0..self.width {
                let along = (x as f32 - mx) * dx + (y as f32 - my) * dy;
                self.set(x as i32, y as i32, mix(a, b, 0.5 + along / span));
            }
        }
    }

    /// Uniform noise of up to `strength` levels, the same in the three channels.
    pub(crate) fn noise(&mut self, dice: &mut Dice, strength: f32) {
        for pixel in self.pixels.chunks_exact_mut(3) {
            let shift = dice.real(-strength, strength);
            for value in pixel {
                *value = (f32::from(*value) + shift).round().clamp(0.0, 255.0) as u8;
            }
        }
    }

    pub(crate) fn paste(&mut self, other: &Self, left: usize, top: usize) {
        for y in 0..other.height {
            for x in 0..other.width {
                self.set((left + x) as i32, (top + y) as i32, other.get(x, y));
            }
        }
    }

    pub(crate) fn crop(&self, left: usize, top: usize, width: usize, height: usize) -> Self {
        let mut pixels = Vec::with_capacity(3 * width * height);
        for y in top..top + height {
            let at = 3 * (y * self.width + left);
            pixels.extend_from_slice(&self.pixels[at..at + 3 * width]);
        }
        Self {
            width,
            height,
            pixels,
        }
    }

    pub(crate) fn mirrored(&self) -> Self {
        let mut out = self.clone();
        for y in 0..self.height {
            for x in 0..self.width {
                out.set(x as i32, y as i32, self.get(self.width - 1 - x, y));
            }
        }
        out
    }
}

/// Smooth noise in 0..1 with octaves, over a square lattice that `seed` fills.
pub(crate) fn fractal(seed: u64, x: f32, y: f32, octaves: u32) -> f32 {
    let (mut sum, mut weight, mut total, mut scale) = (0.0, 1.0, 0.0, 1.0);
    for octave in 0..octaves {
        sum += weight * smooth(seed.wrapping_add(u64::from(octave)), x * scale, y * scale);
        total += weight;
        weight *= 0.55;
        scale *= 2.0;
    }
    sum / total
}

fn smooth(seed: u64, x: f32, y: f32) -> f32 {
    let (left, top) = (x.floor(), y.floor());
    let ease = |t: f32| t * t * (3.0 - 2.0 * t);
    let (u, v) = (ease(x - left), ease(y - top));
    let at = |dx: i64, dy: i64| lattice(seed, left as i64 + dx, top as i64 + dy);
    let upper = at(0, 0) + u * (at(1, 0) - at(0, 0));
    let lower = at(0, 1) + u * (at(1, 1) - at(0, 1));
    upper + v * (lower - upper)
}

fn lattice(seed: u64, x: i64, y: i64) -> f32 {
    let mut z = seed ^ (x as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 31)).wrapping_add((y as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9));
    z = (z ^ (z >> 30)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 29)) >> 40) as f32 / (1u64 << 24) as f32
}
