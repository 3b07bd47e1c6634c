//! A path of Brownian motion over noise levels, identical to torchsde's `BrownianTree` of the same
//! seed.
//!
//! SDE samplers in ComfyUI take their noise from such a path (torchsde 0.2, always on the CPU): the
//! increment between two levels depends on the seed, the shape and the two outermost levels, not on
//! the levels that a sampler visits between them. So a seed produces nearly the same picture at any
//! number of steps.
//!
//! The path is bisected. Given an interval's increment, the increment of its left half is a normal
//! variable with half that mean, drawn from a generator whose seed is hashed from (seed, place in
//! the tree). The hash is NumPy's `SeedSequence` (O'Neill's seed_seq_fe), implemented here as far
//! as needed. Levels are rounded to 1e-6, where bisection ends.
//!
//! Golden-tested against torchsde in `tests/samplers.rs`.

use tch::{Device, Tensor};

use crate::sample::noise::initial_noise;

/// Size of the entropy pool of torchsde's tree, in 32-bit words.
const POOL_WORDS: usize = 24;

/// A path between two noise levels.
#[derive(Debug)]
pub struct BrownianPath {
    seed: u64,
    shape: Vec<i64>,
    root: Interval,
    whole: Tensor,
}

/// A node of the bisection tree.
#[derive(Debug, Clone, Copy)]
struct Interval {
    start: f64,
    end: f64,
    /// Index in its row of the tree, from 0.
    place: u64,
    depth: u64,
}

impl BrownianPath {
    /// Makes the path of `seed` for latents of `shape`, from the lowest level above 0 to the
    /// highest.
    pub fn new(seed: u64, shape: &[i64], [lowest, highest]: [f64; 2]) -> Self {
        let root = Interval {
            start: rounded(lowest),
            end: rounded(highest),
            place: 0,
            depth: 0,
        };
        let whole =
            initial_noise(seed_of(seed, &[]).into(), shape) * (highest - lowest).max(0.0).sqrt();
        Self {
            seed,
            shape: shape.to_vec(),
            root,
            whole,
        }
    }

    /// Returns the increment for a step from `from` down to `to`, scaled to unit variance. fp32 on
    /// the CPU
    ///
    /// The sign is the opposite of a path of rising sigma, as in ComfyUI.
    pub fn noise(&self, from: f64, to: f64) -> Tensor {
        let (low, high) = (from.min(to), from.max(to));
        let within = |level: f64| rounded(level.clamp(self.root.start, self.root.end));
        let increment = self.increment(self.root, &self.whole, within(low), within(high));
        let sign = if from > to { -1.0 } else { 1.0 };
        increment * (sign / (high - low).sqrt())
    }

    /// Returns [`Self::noise`] as a source of noise on a device.
    pub fn on(&self, device: Device) -> impl FnMut(f64, f64) -> Tensor + '_ {
        move |from, to| self.noise(from, to).to_device(device)
    }

    /// Returns the increment over the part of `interval` between two levels; `over` is the
    /// increment over all of it.
    fn increment(&self, interval: Interval, over: &Tensor, low: f64, high: f64) -> Tensor {
        let Interval { start, end, .. } = interval;
        if low >= high {
            return over.zeros_like();
        }
        if low <= start && high >= end {
            return over.shallow_clone();
        }
        let middle = rounded(0.5 * (end + start));
        let left = interval.child(start, middle, 0);
        let over_left = self.over_left_half(interval, over, middle);
        if high <= middle {
            return self.increment(left, &over_left, low, high);
        }
        let right = interval.child(middle, end, 1);
        let over_right = over - &over_left;
        if low >= middle {
            return self.increment(right, &over_right, low, high);
        }
        let in_left = self.increment(left, &over_left, low, middle);
        in_left + self.increment(right, &over_right, middle, high)
    }

    fn over_left_half(&self, interval: Interval, over: &Tensor, middle: f64) -> Tensor {
        let left = middle - interval.start;
        let right = interval.end - middle;
        let length = interval.end - interval.start;
        let noise = initial_noise(
            seed_of(self.seed, &[interval.place, interval.depth]).into(),
            &self.shape,
        );
        over * (left / length) + noise * (left * right / length).sqrt()
    }
}

impl Interval {
    fn child(self, start: f64, end: f64, side: u64) -> Self {
        Self {
            start,
            end,
            place: 2 * self.place + side,
            depth: self.depth + 1,
        }
    }
}

/// Rounds to six decimals as Python's `round`, which rounds the exact value, not its product with a
/// million.
fn rounded(level: f64) -> f64 {
    format!("{level:.6}")
        .parse()
        .expect("a formatted number parses")
}

/// Returns the first word of
/// `SeedSequence(entropy, spawn_key=key, pool_size=24).generate_state(1)`.
fn seed_of(entropy: u64, key: &[u64]) -> u32 {
    let mut words = words_of(entropy);
    if !key.is_empty() {
        words.resize(POOL_WORDS, 0);
        for &number in key {
            words.extend(words_of(number));
        }
    }
    let first = pool(&words)[0];
    let mut value = first ^ 0x8b51_f9dd;
    value = value.wrapping_mul(0x8b51_f9dd_u32.wrapping_mul(0x58f3_8ded));
    value ^ value >> 16
}

/// Returns a number as 32-bit words, least significant first; at least one.
fn words_of(number: u64) -> Vec<u32> {
    let low = number as u32;
    let high = (number >> 32) as u32;
    if high == 0 {
        vec![low]
    } else {
        vec![low, high]
    }
}

/// A hash whose constant changes with each use.
struct Hash {
    constant: u32,
}

impl Hash {
    fn of(&mut self, value: u32) -> u32 {
        let value = value ^ self.constant;
        self.constant = self.constant.wrapping_mul(0x931e_8875);
        let value = value.wrapping_mul(self.constant);
        value ^ value >> 16
    }
}

/// Mixes two words into one.
fn mixed(x: u32, y: u32) -> u32 {
    let value = 0xca01_f9dd_u32
        .wrapping_mul(x)
        .wrapping_sub(0x4973_f715_u32.wrapping_mul(y));
    value ^ value >> 16
}

/// Hashes words of entropy into a pool, so that each input bit changes every word of the pool.
fn pool(words: &[u32]) -> [u32; POOL_WORDS] {
    let mut hash = Hash {
        constant: 0x43b0_d7e5,
    };
    let mut pool = [0; POOL_WORDS];
    for (at, word) in pool.iter_mut().enumerate() {
        *word = hash.of(words.get(at).copied().unwrap_or(0));
    }
    for source in 0..POOL_WORDS {
        for target in (0..POOL_WORDS).filter(|&target| target != source) {
            pool[target] = mixed(pool[target], hash.of(pool[source]));
        }
    }
    for &word in words.iter().skip(POOL_WORDS) {
        for target in &mut pool {
            *target = mixed(*target, hash.of(word));
        }
    }
    pool
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn increments_add_up_whatever_is_asked_for() {
        let path = BrownianPath::new(5, &[1, 4, 2, 3], [0.1, 1.0]);
        let over = |from: f64, to: f64| path.noise(from, to) * (from - to).sqrt();
        let whole = over(1.0, 0.1);
        let levels = [1.0, 0.97, 0.7654321, 0.5, 0.2, 0.1];
        let parts: Tensor = levels
            .windows(2)
            .map(|pair| over(pair[0], pair[1]))
            .reduce(|a, b| a + b)
            .unwrap();
        assert!((parts - whole).abs().max().double_value(&[]) < 1e-5);
    }

    #[test]
    fn disjoint_increments_are_independent_and_of_unit_variance() {
        let path = BrownianPath::new(11, &[1, 4, 64, 64], [0.03, 14.6]);
        let (first, second) = (path.noise(14.6, 3.0), path.noise(3.0, 0.4));
        let mean = |x: Tensor| x.mean(tch::Kind::Float).double_value(&[]);
        // 16,384 numbers: a standard error of 0.008 for a mean, 0.011 for a variance.
        assert!(
            mean(first.shallow_clone()).abs() < 0.03 && (mean(first.square()) - 1.0).abs() < 0.04
        );
        assert!((mean(second.square()) - 1.0).abs() < 0.04);
        assert!(mean(first * second).abs() < 0.03);
    }
}
