//! The part of a preparation that one of several workers does.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Samples that a worker reads in a row: sample `k` belongs to block `k / BLOCK_SAMPLES`.
pub(crate) const BLOCK_SAMPLES: usize = 512;
/// Most workers of a preparation.
const MAX_WORKERS: u32 = 4096;

/// A worker and the number of all: every n-th block of samples and every n-th object is its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The worker, from 0.
    pub worker: u32,
    /// The number of workers.
    pub num_workers: u32,
}

impl Part {
    /// Whether the worker reads the samples of `block`, or writes the object with this number in
    /// the plan.
    pub(crate) fn owns(self, number: usize) -> bool {
        number % self.num_workers as usize == self.worker as usize
    }

    /// The worker, of `num_workers`, that reads the sample with this number.
    pub(crate) fn owner(sample: usize, num_workers: usize) -> usize {
        sample / BLOCK_SAMPLES % num_workers
    }

    /// The blocks of `num_samples` samples that are the worker's, as ranges of samples.
    pub(crate) fn blocks(self, num_samples: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
        let own = (0..num_samples.div_ceil(BLOCK_SAMPLES)).filter(move |&block| self.owns(block));
        own.map(move |block| {
            let start = block * BLOCK_SAMPLES;
            start..num_samples.min(start + BLOCK_SAMPLES)
        })
    }

    /// Number of the samples that are the worker's.
    pub(crate) fn num_own(self, num_samples: usize) -> usize {
        self.blocks(num_samples).map(|block| block.len()).sum()
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.worker, self.num_workers)
    }
}

impl FromStr for Part {
    type Err = String;

    /// Parses `I/N`, worker I of N, from 0.
    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('/');
        let numbers =
            numbers.and_then(|(worker, all)| Some((worker.parse().ok()?, all.parse().ok()?)));
        let Some((worker, num_workers)) = numbers else {
            return Err(format!(
                "expected I/N, such as 0/8 for the first of eight workers, found {text:?}"
            ));
        };
        if num_workers == 0 || num_workers > MAX_WORKERS || worker >= num_workers {
            return Err(format!(
                "expected a worker from 0 to N - 1 of 1 to {MAX_WORKERS}, found {text}"
            ));
        }
        Ok(Self {
            worker,
            num_workers,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sample_belongs_to_one_worker() {
        for (num_samples, num_workers) in [(0, 3), (1, 3), (512, 2), (5_000, 3), (5_000, 100)] {
            let mut owners = vec![0; num_samples];
            for worker in 0..num_workers {
                let part = Part {
                    worker,
                    num_workers,
                };
                let mut num_own = 0;
                for block in part.blocks(num_samples) {
                    num_own += block.len();
                    assert_eq!(
                        Part::owner(block.start, num_workers as usize),
                        worker as usize
                    );
                    owners[block].iter_mut().for_each(|count| *count += 1);
                }
                assert_eq!(part.num_own(num_samples), num_own);
            }
            assert!(owners.iter().all(|&count| count == 1), "{num_samples}");
        }
    }

    #[test]
    fn what_is_no_part_is_refused_with_what_is_one() {
        assert_eq!("3/8".parse::<Part>().unwrap().to_string(), "3/8");
        for (text, expected) in [
            ("3", "0/8"),
            ("a/b", "0/8"),
            ("-1/2", "0/8"),
            ("8/8", "from 0 to N - 1"),
            ("0/0", "from 0 to N - 1"),
            ("0/5000", "1 to 4096"),
        ] {
            let error = text.parse::<Part>().unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
