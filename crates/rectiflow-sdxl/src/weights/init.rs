//! Random initial weights: each tensor's values are a pure function of (seed, name, element).
//!
//! They are not drawn by libtorch, whose generator exists once per process: the values would depend
//! on the order of construction and on other threads. The distributions are the initial ones of
//! PyTorch, diffusers and transformers. Like diffusers, this file does *not* zero the UNet's last
//! convolution.

/// A distribution of initial values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Uniform in `[-bound, bound)`.
    Uniform {
        /// Largest magnitude.
        bound: f64,
    },
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// All 0.
    Zeros,
    /// All 1.
    Ones,
}

impl Init {
    /// Returns PyTorch's default for the weight and bias of a linear layer or convolution with
    /// `fan_in` inputs per output (Kaiming-uniform with a = sqrt 5, which equals 1 / sqrt(fan_in)).
    pub fn fan_in(fan_in: i64) -> Self {
        Self::Uniform {
            bound: 1.0 / (fan_in.max(1) as f64).sqrt(),
        }
    }

    /// Returns `num_values` values for the tensor `name`.
    pub fn values(self, seed: u64, name: &str, num_values: usize) -> Vec<f32> {
        let mut stream = Stream::keyed(seed, name);
        match self {
            Self::Uniform { bound } => (0..num_values)
                .map(|_| ((2.0 * stream.unit() - 1.0) * bound) as f32)
                .collect(),
            Self::Normal { std } => {
                let mut values = Vec::with_capacity(num_values + 1);
                while values.len() < num_values {
                    let (a, b) = stream.normal_pair();
                    values.push((a * std) as f32);
                    values.push((b * std) as f32);
                }
                values.truncate(num_values);
                values
            }
            Self::Zeros => vec![0.0; num_values],
            Self::Ones => vec![1.0; num_values],
        }
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014): a counter and a mixing function, of sufficient quality
/// for initial weights.
struct Stream {
    counter: u64,
}

impl Stream {
    fn keyed(seed: u64, name: &str) -> Self {
        // FNV-1a of the name, mixed with the seed, so that streams of neighbouring seeds and names
        // are independent.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        Self {
            counter: mix(mix(seed).wrapping_add(hash)),
        }
    }

    fn next(&mut self) -> u64 {
        self.counter = self.counter.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.counter)
    }

    /// Returns a uniform number in [0, 1) with 53 random bits.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Returns two independent standard normal numbers (Box and Muller, 1958).
    fn normal_pair(&mut self) -> (f64, f64) {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.unit()).sin_cos();
        (radius * cos, radius * sin)
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(values: &[f32]) -> (f64, f64) {
        let n = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        (
            mean,
            (values
                .iter()
                .map(|&v| (f64::from(v) - mean).powi(2))
                .sum::<f64>()
                / n)
                .sqrt(),
        )
    }

    #[test]
    fn distributions_have_their_moments() {
        let (mean, std) = moments(&Init::Normal { std: 0.02 }.values(1, "w", 100_001));
        assert!(
            mean.abs() < 3e-4 && (std / 0.02 - 1.0).abs() < 0.01,
            "{mean} {std}"
        );
        let uniform = Init::fan_in(16).values(1, "w", 100_000);
        let (mean, std) = moments(&uniform);
        assert!(
            mean.abs() < 3e-3 && (std * 3f64.sqrt() / 0.25 - 1.0).abs() < 0.01,
            "{mean} {std}"
        );
        assert!(uniform.iter().all(|v| v.abs() <= 0.25));
    }

    #[test]
    fn seed_and_name_decide_and_lengths_are_prefixes() {
        let init = Init::Normal { std: 1.0 };
        assert_eq!(init.values(1, "a", 7), init.values(1, "a", 8)[..7]);
        assert_ne!(init.values(1, "a", 8), init.values(2, "a", 8));
        assert_ne!(init.values(1, "a", 8), init.values(1, "b", 8));
    }
}
