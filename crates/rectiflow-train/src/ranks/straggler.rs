//! Which rank keeps the others waiting. Pure.

use serde::{Deserialize, Serialize};

/// A rank that is slower than the others.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Slowest {
    /// Which.
    pub rank: usize,
    /// How much longer than the mean of the others it takes for a micro-batch, data included: 0.25 is a quarter.
    pub lag: f64,
}

/// The time that each rank spends on a micro-batch, as a running mean.
#[derive(Debug, Default)]
pub(crate) struct MicroBatchTimes {
    means: Vec<f64>,
}

/// Share of the newest step in the means.
const NEWEST_SHARE: f64 = 0.2;
/// A rank that is slower by this is worth a word.
const WORTH_A_WORD: f64 = 0.1;

impl MicroBatchTimes {
    /// Takes the seconds of a step; returns the slowest rank if it lags by more than a tenth.
    pub(crate) fn observe(&mut self, busy: &[f64]) -> Option<Slowest> {
        if self.means.len() != busy.len() {
            self.means = busy.to_vec();
        }
        for (mean, newest) in self.means.iter_mut().zip(busy) {
            *mean += NEWEST_SHARE * (newest - *mean);
        }
        let (rank, slowest) = self.means.iter().copied().enumerate().max_by(|a, b| a.1.total_cmp(&b.1))?;
        let others = (self.means.iter().sum::<f64>() - slowest) / (self.means.len() as f64 - 1.0);
        let lag = slowest / others - 1.0;
        (lag > WORTH_A_WORD && lag.is_finite()).then_some(Slowest { rank, lag })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_that_lags_by_more_than_a_tenth_is_named() {
        let mut times = MicroBatchTimes::default();
        assert_eq!(times.observe(&[1.0, 1.05, 1.0]), None);
        let found = (0..30).fold(None, |_, _| times.observe(&[1.0, 1.0, 1.5])).expect("rank 2 is slow");
        assert!(found.rank == 2 && (found.lag - 0.5).abs() < 0.01, "{found:?}");
        assert_eq!(MicroBatchTimes::default().observe(&[1.0]), None, "a rank alone waits for nobody");
    }

    #[test]
    fn one_slow_step_is_forgotten() {
        let mut times = MicroBatchTimes::default();
        times.observe(&[1.0, 1.0]);
        assert!(times.observe(&[1.0, 3.0]).is_some());
        assert_eq!((0..30).fold(None, |_, _| times.observe(&[1.0, 1.0])), None);
    }
}
