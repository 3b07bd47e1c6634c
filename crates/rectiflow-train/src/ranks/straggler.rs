//! Which rank keeps the others waiting. Pure.

use serde::{Deserialize, Serialize};

/// A rank that is slower than the others.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Slowest {
    /// The slower rank.
    pub rank: usize,
    /// Relative delay of a micro-batch, data included, against the mean of the other ranks: 0.25 is
    /// a quarter longer.
    pub lag: f64,
}

/// Running means of the time that each rank spends on a micro-batch.
#[derive(Debug, Default)]
pub(crate) struct MicroBatchTimes {
    means: Vec<f64>,
}

/// Weight of the newest step in the means.
const NEWEST_SHARE: f64 = 0.2;
/// Least relative delay that is reported.
const WORTH_A_WORD: f64 = 0.1;

impl MicroBatchTimes {
    /// Adds the seconds of a step. Returns the slowest rank if it lags by more than a tenth.
    pub(crate) fn observe(&mut self, busy: &[f64]) -> Option<Slowest> {
        if self.means.len() != busy.len() {
            self.means = busy.to_vec();
        }
        for (mean, newest) in self.means.iter_mut().zip(busy) {
            *mean += NEWEST_SHARE * (newest - *mean);
        }
        let (rank, slowest) = self
            .means
            .iter()
            .copied()
            .enumerate()
            .max_by(|a, b| a.1.total_cmp(&b.1))?;
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
        let found = (0..30)
            .fold(None, |_, _| times.observe(&[1.0, 1.0, 1.5]))
            .expect("rank 2 is slow");
        assert!(
            found.rank == 2 && (found.lag - 0.5).abs() < 0.01,
            "{found:?}"
        );
        assert_eq!(
            MicroBatchTimes::default().observe(&[1.0]),
            None,
            "a single rank waits for no other"
        );
    }

    #[test]
    fn one_slow_step_is_forgotten() {
        let mut times = MicroBatchTimes::default();
        times.observe(&[1.0, 1.0]);
        assert!(times.observe(&[1.0, 3.0]).is_some());
        assert_eq!((0..30).fold(None, |_, _| times.observe(&[1.0, 1.0])), None);
    }
}
