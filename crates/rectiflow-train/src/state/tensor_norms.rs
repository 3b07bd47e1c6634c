//! The usual size of each tensor's gradient, and the limit that follows from it. Pure.
//!
//! A tensor that is updated during the backward pass is updated before the norm of the whole
//! gradient is known. Its own norm is known, and is compared with its running mean.

use serde::{Deserialize, Serialize};

/// The running mean of the norm of one tensor's gradients.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct NormMean {
    /// Number of norms in it.
    pub count: u64,
    /// Their mean, of which the newest has a share of 3%; those of the first updates have the same
    /// share.
    pub mean: f64,
}

/// Share of the newest norm, that of the guard's running means.
const SHARE: f64 = 0.03;
/// Number of norms before there is a limit.
const LEARNT: u64 = 10;

impl NormMean {
    /// Returns the largest norm of the next gradient, `ratio` times the mean; infinity while the
    /// mean is not known.
    pub(crate) fn limit(self, ratio: f64) -> f64 {
        if self.count < LEARNT || self.mean == 0.0 {
            return f64::INFINITY;
        }
        ratio * self.mean
    }

    /// Adds a norm, which must be finite.
    pub(crate) fn learn(&mut self, norm: f64) {
        self.count += 1;
        let share = SHARE.max(1.0 / self.count as f64);
        self.mean += share * (norm - self.mean);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_norm_is_limited_once_the_mean_is_known_and_the_mean_follows() {
        let mut mean = NormMean::default();
        for _ in 0..9 {
            mean.learn(2.0);
        }
        assert_eq!(mean.limit(3.0), f64::INFINITY, "nine norms are not enough");
        mean.learn(2.0);
        assert_eq!(mean.limit(3.0), 6.0);
        for _ in 0..200 {
            mean.learn(6.0);
        }
        assert!((mean.mean - 6.0).abs() < 0.05, "{mean:?}");
        let mut none = NormMean::default();
        for _ in 0..20 {
            none.learn(0.0);
        }
        assert_eq!(
            none.limit(3.0),
            f64::INFINITY,
            "a tensor that had no gradient yet"
        );
    }
}
