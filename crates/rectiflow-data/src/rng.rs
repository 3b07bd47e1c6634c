//! Keyed random numbers: every draw is a pure function of (seed, purpose, words).
//!
//! No generator has a state that must be saved: the same key draws the same numbers. A key is
//! hashed with BLAKE3 to the 256-bit state of xoshiro256++ (Blackman and Vigna, 2019), so that
//! neighbouring keys are unrelated. Both are written out here or versioned by their paper, because
//! the order of a run must not change when a dependency does. Not for cryptography.

/// The use of a stream of random numbers: two purposes never share a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Row order inside a bucket when a data set is written.
    WriteOrder = 1,
    /// Position of a random crop.
    Crop = 2,
    /// Prompt text of a sample in a pass.
    Prompt = 3,
    /// A bucket's permutation in a pass.
    Pass = 4,
    /// Order of micro-batches inside a window.
    Window = 5,
    /// Order of micro-batches inside an epoch.
    Epoch = 6,
    /// Training sigmas of a step.
    Sigma = 7,
    /// Training noise of a micro-batch.
    Noise = 8,
    /// The fixed table of the test loss.
    TestLoss = 9,
    /// Selection of the held-out samples when a data set is written.
    Split = 11,
    /// Initial weights.
    Weights = 10,
    /// Choice among a lane's open windows for its next read.
    Lane = 12,
    /// Assignment of a bucket's runs to lanes.
    Deal = 14,
    /// Order of a lane's windows in an epoch of `owned` mode.
    LaneOrder = 15,
    /// Mode of a picture's caption.
    CaptionMode = 16,
    /// Seeds that are sent to captioning models.
    CaptionSeed = 17,
    /// Pauses between attempts at a request; the only purpose whose seed is the time.
    Jitter = 13,
}

/// A keyed stream of random numbers.
#[derive(Debug, Clone)]
pub struct Rng {
    state: [u64; 4],
}

impl Rng {
    /// The stream of a key. `words` distinguish the uses of a purpose: sample, pass, step, slot.
    pub fn keyed(seed: u64, purpose: Purpose, words: &[u64]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.update(&(purpose as u64).to_le_bytes());
        for word in words {
            hasher.update(&word.to_le_bytes());
        }
        let hash = hasher.finalize();
        let mut state = [0; 4];
        for (word, bytes) in state.iter_mut().zip(hash.as_bytes().chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().expect("chunks_exact(8) returns 8 bytes"));
        }
        Self { state }
    }

    /// The next 64 uniform bits (xoshiro256++).
    pub fn next_u64(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// A uniform number in `0..bound`, without bias (Lemire 2019, multiply and reject).
    ///
    /// # Panics
    /// If `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "a draw needs at least one outcome");
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(bound);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// A uniform number in `[0, 1)` with 53 random bits.
    pub fn f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * 2f64.powi(-53)
    }

    /// Puts `items` in a uniformly random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }

    /// A uniformly random permutation of `0..len`.
    pub fn permutation(&mut self, len: u32) -> Vec<u32> {
        let mut items: Vec<u32> = (0..len).collect();
        self.shuffle(&mut items);
        items
    }
}

/// The first 64-bit value of a key's stream, e.g. to seed another library's generator.
pub fn key_u64(seed: u64, purpose: Purpose, words: &[u64]) -> u64 {
    Rng::keyed(seed, purpose, words).next_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frozen values: a change here changes the order of every run ever made.
    #[test]
    fn streams_are_frozen() {
        let mut rng = Rng::keyed(7, Purpose::Pass, &[1, 2]);
        let first: Vec<u64> = (0..2).map(|_| rng.next_u64()).collect();
        assert_eq!(first, FROZEN);
        assert_eq!(key_u64(7, Purpose::Pass, &[1, 2]), first[0]);
        assert_ne!(key_u64(7, Purpose::Pass, &[2, 1]), first[0]);
        assert_ne!(key_u64(7, Purpose::Window, &[1, 2]), first[0]);
        assert_ne!(key_u64(8, Purpose::Pass, &[1, 2]), first[0]);
    }
    const FROZEN: [u64; 2] = [4_623_639_354_259_540_611, 14_866_828_814_384_813_990];

    /// The first outputs of the reference implementation from the state 1, 2, 3, 4.
    #[test]
    fn generator_is_xoshiro256plusplus() {
        let mut rng = Rng {
            state: [1, 2, 3, 4],
        };
        let drawn: Vec<u64> = (0..4).map(|_| rng.next_u64()).collect();
        assert_eq!(
            drawn,
            [41943041, 58720359, 3588806011781223, 3591011842654386]
        );
    }

    #[test]
    fn draws_are_uniform() {
        let mut rng = Rng::keyed(0, Purpose::Crop, &[]);
        let mut counts = [0u32; 6];
        for _ in 0..60_000 {
            counts[rng.below(6) as usize] += 1;
        }
        // Five standard deviations of a binomial with n = 60,000 and p = 1/6.
        assert!(
            counts.iter().all(|&n| n.abs_diff(10_000) < 457),
            "{counts:?}"
        );
        let mean = (0..60_000).map(|_| rng.f64()).sum::<f64>() / 60_000.0;
        assert!(
            (mean - 0.5).abs() < 5.0 * (1.0 / 12f64).sqrt() / 60_000f64.sqrt(),
            "{mean}"
        );
    }

    #[test]
    fn permutation_has_every_item_once() {
        let mut items = Rng::keyed(3, Purpose::Pass, &[]).permutation(1000);
        assert_ne!(items, (0..1000).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..1000).collect::<Vec<_>>());
    }
}
