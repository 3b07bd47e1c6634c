//! Losses by noise level: sums over batches and ranks, and the means and standard errors that
//! follow from them.

use crate::{
    error::Result,
    measure::metrics::{SigmaBin, TableLoss},
    ranks::comm::Comm,
};

/// Equal ranges of noise levels from 0 to 1, each with the sums of its losses.
#[derive(Debug, Clone)]
pub(crate) struct Bins(Vec<Sums>);

impl Bins {
    /// Creates `count` empty ranges, at least one.
    pub(crate) fn new(count: usize) -> Self {
        Self(vec![Sums::default(); count.max(1)])
    }

    /// Adds the loss of a sample at its time; a weight of 0 leaves it out.
    pub(crate) fn add(&mut self, time: f64, loss: f64, weight: f64) {
        let bin = bin_of(time, self.0.len());
        self.0[bin].add(loss, weight);
    }

    /// Returns the sums over all ranks, the same on each.
    pub(crate) fn of_all(&self, comm: &Comm) -> Result<Self> {
        let own: Vec<f64> = self.0.iter().copied().flat_map(Sums::to_numbers).collect();
        let all = comm.sum_numbers(&own)?;
        let (bins, _) = all.as_chunks();
        Ok(Self(bins.iter().copied().map(Sums::from_numbers).collect()))
    }

    /// Returns the mean over all samples and the mean of each range.
    pub(crate) fn means(&self) -> TableLoss {
        let total = self.0.iter().fold(Sums::default(), |a, b| a.plus(b));
        let width = 1.0 / self.0.len() as f64;
        let bins = self
            .0
            .iter()
            .enumerate()
            .map(|(i, sums)| sums.bin(i as f64 * width, (i + 1) as f64 * width));
        TableLoss {
            loss: total.mean(),
            bins: bins.collect(),
        }
    }
}

/// Returns the range of a time; a range includes its upper end.
fn bin_of(time: f64, bins: usize) -> usize {
    ((time * bins as f64).ceil() as usize).clamp(1, bins) - 1
}

#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    count: f64,
    sum: f64,
    squares: f64,
}

impl Sums {
    fn to_numbers(self) -> [f64; 3] {
        [self.count, self.sum, self.squares]
    }

    fn from_numbers([count, sum, squares]: [f64; 3]) -> Self {
        Self {
            count,
            sum,
            squares,
        }
    }

    fn add(&mut self, loss: f64, weight: f64) {
        self.count += weight;
        self.sum += weight * loss;
        self.squares += weight * loss * loss;
    }

    fn plus(self, other: &Self) -> Self {
        Self {
            count: self.count + other.count,
            sum: self.sum + other.sum,
            squares: self.squares + other.squares,
        }
    }

    fn mean(&self) -> f64 {
        if self.count > 0.0 {
            self.sum / self.count
        } else {
            0.0
        }
    }

    fn bin(&self, from: f64, to: f64) -> SigmaBin {
        let variance = if self.count > 1.0 {
            ((self.squares - self.count * self.mean() * self.mean()) / (self.count - 1.0)).max(0.0)
        } else {
            0.0
        };
        let standard_error = if self.count > 0.0 {
            (variance / self.count).sqrt()
        } else {
            0.0
        };
        SigmaBin {
            from,
            to,
            loss: self.mean(),
            standard_error,
            count: self.count as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_hold_their_upper_end() {
        assert_eq!(
            [0.0, 0.05, 0.1, 0.1001, 1.0].map(|t| bin_of(t, 10)),
            [0, 0, 0, 1, 9]
        );
    }

    #[test]
    fn padding_of_weight_zero_does_not_count() {
        let mut sums = Sums::default();
        for (loss, weight) in [(1.0, 1.0), (3.0, 1.0), (100.0, 0.0)] {
            sums.add(loss, weight);
        }
        let bin = sums.bin(0.0, 0.1);
        assert_eq!((bin.loss, bin.count), (2.0, 2));
        // The sample standard deviation is sqrt(2); divided by the square root of 2 that is 1.
        assert!((bin.standard_error - 1.0).abs() < 1e-12);
    }
}
