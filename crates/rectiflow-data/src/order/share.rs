//! `owned` mode: which rows of a bucket each lane has for the whole run. Pure.
//!
//! The runs of a bucket, shuffled once, are laid end to end and cut into one piece per lane, all of
//! the same length: whole micro-batches and, if no rows are deleted, whole blocks. Equal lengths
//! make the lanes' parts of an epoch equal. Each piece, a share, is a stream of its own. The
//! remainder is a stream of `window` mode, dealt again each epoch: per lane it is smaller than the
//! smallest piece (the least number of rows that is both whole micro-batches and whole blocks), or
//! larger by one such piece if it would otherwise be a ragged micro-batch. A bucket without one
//! such piece for each lane is not shared at all.

use num_integer::lcm;

use crate::{
    format::block_table::BLOCK_ROWS,
    order::{
        pass::Layout,
        stream::{Mode, Stream},
    },
    rng::{Purpose, Rng},
};

/// The streams of the bucket `whole` and the layout of each: a share for each lane, then the
/// remainder.
pub(crate) fn deal(
    seed: u64,
    whole: &Stream,
    layout: &Layout,
    lanes: usize,
) -> (Vec<Stream>, Vec<Layout>) {
    let words = [u64::from(whole.data), u64::from(whole.bucket)];
    let dealt = layout.shuffled(&mut Rng::keyed(seed, Purpose::Deal, &words));
    let streams = cut(whole, lanes);
    let mut layouts = Vec::with_capacity(streams.len());
    let mut first = 0;
    for stream in &streams {
        let spans = dealt.spans(layout, first..first + stream.rows);
        layouts.push(Layout::of(spans.collect()));
        first += stream.rows;
    }
    (streams, layouts)
}

/// A share of the bucket `whole` for each lane, then the remainder.
fn cut(whole: &Stream, lanes: usize) -> Vec<Stream> {
    let rows = share_rows(whole, lanes as u64);
    let mut streams = Vec::new();
    if rows > 0 {
        for lane in 0..lanes as u32 {
            streams.push(Stream {
                rows,
                mode: Mode::Owned,
                lane: Some(lane),
                ..*whole
            });
        }
    }
    let left = whole.rows - rows * lanes as u64;
    if left > 0 {
        streams.push(Stream {
            rows: left,
            ..*whole
        });
    }
    streams
}

/// Rows of each lane's share.
fn share_rows(whole: &Stream, lanes: u64) -> u64 {
    let size = u64::from(whole.size);
    let step = lcm(u64::from(BLOCK_ROWS), size);
    let rows = whole.rows / lanes / step * step;
    let left = whole.rows - rows * lanes;
    if left > 0 && left < size {
        rows.saturating_sub(step)
    } else {
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(rows: u64, size: u32) -> Stream {
        let (data, bucket, window, repeats_millionths) = (0, 0, 16, 1_000_000);
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
    fn shares_are_whole_blocks_and_micro_batches_and_leave_no_ragged_rest() {
        // With 3 lanes and micro-batches of 16 the smallest share is 32 rows.
        for (rows, share) in [
            (95, 0),
            (96, 32),
            (97, 0),
            (111, 0),
            (112, 32),
            (192, 64),
            (193, 32),
            (1000, 320),
        ] {
            assert_eq!(share_rows(&whole(rows, 16), 3), share, "{rows} rows");
        }
        assert_eq!(share_rows(&whole(1000, 12), 3), 288, "a multiple of 96");
    }

    #[test]
    fn every_row_is_in_one_share_or_left() {
        let ends: Vec<u32> = (1..=9).map(|run| (run * 128).min(1100)).collect();
        let layout = Layout::new(&ends);
        let (streams, layouts) = deal(5, &whole(1100, 16), &layout, 4);
        assert_eq!(
            streams.iter().map(|stream| stream.rows).collect::<Vec<_>>(),
            [256, 256, 256, 256, 76]
        );
        let rows = streams.iter().zip(&layouts).flat_map(|(stream, layout)| {
            (0..stream.rows as u32)
                .map(|position| layout.row(position))
                .collect::<Vec<_>>()
        });
        let mut rows: Vec<u32> = rows.collect();
        assert!(
            rows[..256].iter().any(|&row| row > 256),
            "they are shuffled"
        );
        rows.sort_unstable();
        assert_eq!(rows, (0..1100).collect::<Vec<_>>());
    }
}
