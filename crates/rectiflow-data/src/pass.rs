//! A pass over a bucket in `window` mode: runs of whole blocks in random order.
//!
//! A run is up to [`RUN_BLOCKS`] consecutive blocks of one object, which are one request. Rows were put in random order
//! when they were written, so that consecutive ones are as good a sample as any. Each pass permutes the runs; those
//! that are not whole blocks come last, so that all windows but a pass's last begin and end between blocks. Rows are
//! known by their numbers only: which object holds them is `dataset`'s business. Pure.

use std::ops::Range;

use crate::{
    manifest::BLOCK_ROWS,
    order::Stream,
    rng::{Purpose, Rng},
};

/// Blocks of a run: 128 rows, 17 MB at 1024 x 1024. With single blocks a request would bring 16 samples, since the text of
/// a block is another request; with more, the same samples would meet more often (`docs/streaming.md`).
pub const RUN_BLOCKS: u32 = 4;

/// The runs of a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Number of the row after each run's last.
    ends: Vec<u32>,
    /// Runs of whole blocks, then the others.
    runs: Vec<u32>,
    num_whole: usize,
}

impl Layout {
    /// The layout of runs that end before the rows `ends`.
    pub(crate) fn new(ends: &[u32]) -> Self {
        let mut layout = Self { ends: ends.to_vec(), runs: Vec::new(), num_whole: 0 };
        let is_whole = |run: &u32| layout.rows(*run).len().is_multiple_of(BLOCK_ROWS as usize);
        let (mut runs, short): (Vec<u32>, Vec<u32>) = (0..ends.len() as u32).partition(is_whole);
        layout.num_whole = runs.len();
        runs.extend(short);
        layout.runs = runs;
        layout
    }

    /// Rows of a run.
    fn rows(&self, run: u32) -> Range<u32> {
        let before = (run as usize).checked_sub(1).map_or(0, |run| self.ends[run]);
        before..self.ends[run as usize]
    }

    /// The row after the run that begins with row `start`.
    pub(crate) fn run_end(&self, start: u32) -> u32 {
        self.ends[self.ends.partition_point(|&end| end <= start)]
    }

    /// The order of `pass`.
    pub(crate) fn pass(&self, seed: u64, stream: &Stream, pass: u64) -> Pass {
        let words = [u64::from(stream.data), u64::from(stream.bucket), pass];
        let mut rng = Rng::keyed(seed, Purpose::Pass, &words);
        let mut runs = self.runs.clone();
        let (whole, short) = runs.split_at_mut(self.num_whole);
        rng.shuffle(whole);
        rng.shuffle(short);
        let mut end = 0;
        let ends = runs.iter().map(|&run| {
            end += self.rows(run).len() as u32;
            end
        });
        let ends = ends.collect();
        Pass { runs, ends }
    }
}

/// One pass's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pass {
    runs: Vec<u32>,
    /// Position after each run's last row.
    ends: Vec<u32>,
}

/// Consecutive rows, all in one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RowSpan {
    /// First row of the run, from which blocks are counted.
    pub(crate) run_start: u32,
    pub(crate) rows: Range<u32>,
}

impl Pass {
    /// The rows at `positions` of the pass, in order.
    pub(crate) fn spans<'a>(&'a self, layout: &'a Layout, positions: Range<u64>) -> impl Iterator<Item = RowSpan> + 'a {
        let (from, to) = (positions.start as u32, positions.end as u32);
        let first = self.ends.partition_point(|&end| end <= from);
        let runs = (first..self.runs.len()).map(move |at| {
            let rows = layout.rows(self.runs[at]);
            let start = self.ends[at] - rows.len() as u32;
            let (skip, stop) = (from.saturating_sub(start), to.saturating_sub(start).min(rows.len() as u32));
            RowSpan { run_start: rows.start, rows: rows.start + skip.min(stop)..rows.start + stop }
        });
        runs.take_while(|span| !span.rows.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::Mode;

    fn stream(rows: u64) -> Stream {
        let (data, bucket, size, window, repeats_millionths) = (0, 3, 4, 16, 1_000_000);
        Stream { data, bucket, rows, size, window, repeats_millionths, mode: Mode::Window }
    }

    #[test]
    fn a_pass_is_a_permutation_with_short_runs_last() {
        let layout = Layout::new(&[128, 256, 300, 396, 401]);
        let passes: Vec<Pass> = (0..4).map(|pass| layout.pass(1, &stream(401), pass)).collect();
        for pass in &passes {
            let rows: Vec<u32> = pass.spans(&layout, 0..401).flat_map(|span| span.rows).collect();
            let mut sorted = rows.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..401).collect::<Vec<_>>());
            let mut last = rows[352..].to_vec();
            last.sort_unstable();
            assert_eq!(last, (256..300).chain(396..401).collect::<Vec<_>>());
            for (from, to) in [(0, 1), (100, 140), (351, 353), (400, 401), (7, 7)] {
                let part = pass.spans(&layout, from..to).flat_map(|span| span.rows);
                assert_eq!(part.collect::<Vec<_>>(), rows[from as usize..to as usize]);
            }
        }
        assert!(passes.iter().any(|pass| *pass != passes[0]));
    }
}
