//! A pass over a bucket in `window` mode, or the first over a share in `owned` mode: runs of whole
//! blocks in random order.
//!
//! A run is up to [`RUN_BLOCKS`] consecutive blocks of one object, read with one request. Rows were
//! written in random order, so consecutive rows are as good a sample as any. Each pass permutes the
//! runs; runs that are not whole blocks come last, so that all windows of a pass but the last begin
//! and end between blocks. Rows are plain numbers here: `dataset` maps them to objects. Pure.

use std::ops::Range;

use crate::{
    format::block_table::BLOCK_ROWS,
    order::stream::Stream,
    rng::{Purpose, Rng},
};

/// Blocks of a run: 128 rows, 17 MB at 1024 x 1024. With single blocks a request would read 16
/// samples on average, because the text of a block is another request. With longer runs the same
/// samples would share a window more often (`docs/streaming.md`).
pub const RUN_BLOCKS: u32 = 4;

/// Where the rows of a stream lie: runs, or parts of runs that were divided among lanes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Spans of whole blocks, then the others.
    spans: Vec<RowSpan>,
    num_whole: usize,
    /// Position after each span's last row.
    ends: Vec<u32>,
}

/// Consecutive rows, all in one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RowSpan {
    /// All rows of the run; blocks are counted from its first row.
    pub(crate) run: Range<u32>,
    pub(crate) rows: Range<u32>,
}

impl Layout {
    /// The layout of a bucket whose runs end before the rows `ends`.
    pub(crate) fn new(ends: &[u32]) -> Self {
        let mut spans = Vec::with_capacity(ends.len());
        let mut start = 0;
        for &end in ends {
            spans.push(RowSpan {
                run: start..end,
                rows: start..end,
            });
            start = end;
        }
        Self::of(spans)
    }

    /// The layout of `spans`.
    pub(crate) fn of(spans: Vec<RowSpan>) -> Self {
        let is_whole = |span: &RowSpan| span.rows.len().is_multiple_of(BLOCK_ROWS as usize);
        let (mut spans, short): (Vec<RowSpan>, Vec<RowSpan>) =
            spans.into_iter().partition(is_whole);
        let num_whole = spans.len();
        spans.extend(short);
        let ends = ends(spans.iter());
        Self {
            spans,
            num_whole,
            ends,
        }
    }

    /// The row of the bucket at a position of the layout.
    pub(crate) fn row(&self, position: u32) -> u32 {
        let at = self.ends.partition_point(|&end| end <= position);
        self.spans[at].rows.end - (self.ends[at] - position)
    }

    /// The order of `pass`.
    pub(crate) fn pass(&self, seed: u64, stream: &Stream, pass: u64) -> Pass {
        self.shuffled(&mut pass_rng(seed, stream, pass))
    }

    /// The spans in random order; those that are not whole blocks come last.
    pub(crate) fn shuffled(&self, rng: &mut Rng) -> Pass {
        let mut spans: Vec<u32> = (0..self.spans.len() as u32).collect();
        let (whole, short) = spans.split_at_mut(self.num_whole);
        rng.shuffle(whole);
        rng.shuffle(short);
        let ends = ends(spans.iter().map(|&span| &self.spans[span as usize]));
        Pass { spans, ends }
    }
}

/// Position after each span's last row.
fn ends<'a>(spans: impl Iterator<Item = &'a RowSpan>) -> Vec<u32> {
    let mut ends = Vec::new();
    let mut end = 0;
    for span in spans {
        end += span.rows.len() as u32;
        ends.push(end);
    }
    ends
}

/// The random numbers that permute a pass over a stream.
pub(crate) fn pass_rng(seed: u64, stream: &Stream, pass: u64) -> Rng {
    let mut words = vec![u64::from(stream.data), u64::from(stream.bucket), pass];
    words.extend(stream.lane.map(u64::from));
    Rng::keyed(seed, Purpose::Pass, &words)
}

/// The order of one pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pass {
    /// Indices into the layout's spans.
    spans: Vec<u32>,
    /// Position after each span's last row.
    ends: Vec<u32>,
}

impl Pass {
    /// The rows at `positions` of the pass, in order.
    pub(crate) fn spans<'a>(
        &'a self,
        layout: &'a Layout,
        positions: Range<u64>,
    ) -> impl Iterator<Item = RowSpan> + 'a {
        let positions = positions.start as u32..positions.end as u32;
        let first = self.ends.partition_point(|&end| end <= positions.start);
        (first..self.spans.len())
            .map(move |at| self.part_of_span(layout, at, &positions))
            .take_while(|span| !span.rows.is_empty())
    }

    /// The part of span `at` of the pass that is at `positions`.
    fn part_of_span(&self, layout: &Layout, at: usize, positions: &Range<u32>) -> RowSpan {
        let RowSpan { run, rows } = layout.spans[self.spans[at] as usize].clone();
        let len = rows.len() as u32;
        let start = self.ends[at] - len;
        let stop = positions.end.saturating_sub(start).min(len);
        let skip = positions.start.saturating_sub(start).min(stop);
        RowSpan {
            run,
            rows: rows.start + skip..rows.start + stop,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::stream::Mode;

    fn stream(rows: u64) -> Stream {
        let (data, bucket, size, window, repeats_millionths) = (0, 3, 4, 16, 1_000_000);
        Stream {
            data,
            bucket,
            rows,
            size,
            window,
            repeats_millionths,
            mode: Mode::Window,
            lane: None,
        }
    }

    #[test]
    fn a_pass_is_a_permutation_with_short_runs_last() {
        let layout = Layout::new(&[128, 256, 300, 396, 401]);
        let passes: Vec<Pass> = (0..4)
            .map(|pass| layout.pass(1, &stream(401), pass))
            .collect();
        for pass in &passes {
            let rows: Vec<u32> = pass
                .spans(&layout, 0..401)
                .flat_map(|span| span.rows)
                .collect();
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
