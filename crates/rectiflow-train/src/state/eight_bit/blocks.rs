//! Where the blocks of a rank's elements begin. Pure.
//!
//! Blocks begin at every 64th element of a bucket, and at the beginning of each tensor. They depend
//! neither on the number of ranks, since the pieces of a bucket are multiples of 64 elements
//! (`partition`), nor does a block span two tensors, which are updated at different times with
//! `train.update_in_backward`.

use std::ops::Range;

use rectiflow_data::order::RankOf;

use crate::state::{
    layout::{Slice, intersect},
    partition::Partition,
};

/// Elements of a block. The last one of a tensor, and the first one of a tensor that begins within
/// 64 elements, have fewer.
pub(crate) const BLOCK: i64 = 64;

/// The blocks of the elements that a rank owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Blocks {
    /// In order and without gaps.
    runs: Vec<Run>,
}

/// Blocks next to each other, all of 64 elements except the first and the last one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    /// Elements among those that the rank owns.
    pub(crate) own: Range<i64>,
    /// The first one's place in the flat vector.
    pub(crate) element: i64,
    /// Its blocks among those of the rank.
    pub(crate) blocks: Range<i64>,
    /// Elements that the first block lacks at its beginning.
    pub(crate) lacks: i64,
}

impl Blocks {
    /// Returns the blocks of the elements that the rank `share` owns.
    pub(crate) fn of(slices: &[Slice], partition: &Partition, share: RankOf) -> Self {
        let mut blocks = Self { runs: Vec::new() };
        for (bucket, piece) in partition.buckets().iter().zip(partition.pieces(share)) {
            let first = slices.partition_point(|slice| slice.range.end <= piece.range.start);
            for slice in &slices[first..] {
                if slice.range.start >= piece.range.end {
                    break;
                }
                let held = intersect(&slice.range, &piece.range);
                let lacks = (held.start - bucket.range.start) % BLOCK;
                let start = piece.own.start + held.start - piece.range.start;
                blocks.push(start..start + held.end - held.start, held.start, lacks);
            }
        }
        blocks
    }

    /// Returns the blocks of a vector of one tensor.
    pub(crate) fn of_vector(len: i64) -> Self {
        let mut blocks = Self { runs: Vec::new() };
        blocks.push(0..len, 0, 0);
        blocks
    }

    /// Appends a tensor's elements. A tensor that begins where a block would, joins the last run.
    fn push(&mut self, own: Range<i64>, element: i64, lacks: i64) {
        let num_blocks = (lacks + own.end - own.start + BLOCK - 1) / BLOCK;
        let start = self.len();
        if let Some(last) = self.runs.last_mut()
            && lacks == 0
            && last.ends_a_block()
            && last.element - last.own.start == element - own.start
        {
            last.own.end = own.end;
            last.blocks.end += num_blocks;
            return;
        }
        self.runs.push(Run {
            own,
            element,
            blocks: start..start + num_blocks,
            lacks,
        });
    }

    /// Returns the number of blocks.
    pub(crate) fn len(&self) -> i64 {
        self.runs.last().map_or(0, |run| run.blocks.end)
    }

    /// Returns the blocks that have elements of `range`, whole, in order.
    pub(crate) fn over(&self, range: &Range<i64>) -> Vec<Run> {
        let mut found = Vec::new();
        let first = self.runs.partition_point(|run| run.own.end <= range.start);
        for run in &self.runs[first..] {
            if run.own.start >= range.end {
                break;
            }
            let common = intersect(range, &run.own);
            if !common.is_empty() {
                found.push(run.around(&common));
            }
        }
        found
    }
}

impl Run {
    /// Whether its last block has all its elements.
    fn ends_a_block(&self) -> bool {
        (self.lacks + self.own.end - self.own.start) % BLOCK == 0
    }

    /// Returns the blocks that have elements of `range`, which is inside of the run.
    fn around(&self, range: &Range<i64>) -> Self {
        // Places in a run whose first block lacks nothing.
        let place = |own: i64| own - self.own.start + self.lacks;
        let first = place(range.start) / BLOCK;
        let end = (place(range.end) + BLOCK - 1) / BLOCK;
        let start = self.own.start + (first * BLOCK - self.lacks).max(0);
        let stop = (self.own.start + end * BLOCK - self.lacks).min(self.own.end);
        Self {
            own: start..stop,
            element: self.element + start - self.own.start,
            blocks: self.blocks.start + first..self.blocks.start + end,
            lacks: if first == 0 { self.lacks } else { 0 },
        }
    }

    /// Returns the run in parts of at most `size` elements, a multiple of 64, of whole blocks.
    pub(crate) fn parts(&self, size: i64) -> Vec<Self> {
        let mut found = Vec::new();
        let mut start = self.own.start;
        while start < self.own.end {
            let lacks = if start == self.own.start {
                self.lacks
            } else {
                0
            };
            let end = (start + size - lacks).min(self.own.end);
            found.push(self.around(&(start..end)));
            start = end;
        }
        found
    }

    /// Returns the number of its blocks.
    pub(crate) fn num_blocks(&self) -> i64 {
        self.blocks.end - self.blocks.start
    }

    /// Returns the lengths of its blocks, in order.
    pub(crate) fn lengths(&self) -> impl Iterator<Item = usize> + use<> {
        let mut left = self.own.end - self.own.start;
        let mut next = BLOCK - self.lacks;
        (self.blocks.clone()).map(move |_| {
            let length = next.min(left);
            left -= length;
            next = BLOCK;
            length as usize
        })
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    /// Tensors of these lengths, one after the other.
    fn slices(lengths: &[i64]) -> Vec<Slice> {
        let mut start = 0;
        let mut found = Vec::new();
        for (index, length) in lengths.iter().enumerate() {
            found.push(Slice {
                name: format!("unet.{index}"),
                shape: vec![*length],
                range: start..start + length,
                kind: Kind::Float,
            });
            start += length;
        }
        found
    }

    /// The blocks of a rank as ranges of the flat vector.
    fn blocks_of(lengths: &[i64], buckets: &[i64], rank: usize, ranks: usize) -> Vec<Range<i64>> {
        let partition = Partition::in_multiples(buckets.iter().copied(), ranks, BLOCK);
        let blocks = Blocks::of(&slices(lengths), &partition, RankOf { rank, ranks });
        let mut found = Vec::new();
        for run in &blocks.runs {
            let mut start = run.element;
            assert_eq!(
                run.lengths().count() as i64,
                run.blocks.end - run.blocks.start
            );
            for length in run.lengths() {
                found.push(start..start + length as i64);
                start += length as i64;
            }
            assert_eq!(start - run.element, run.own.end - run.own.start);
        }
        assert_eq!(found.len() as i64, blocks.len());
        found
    }

    #[test]
    fn blocks_are_the_same_at_any_number_of_ranks_and_never_of_two_tensors() {
        let lengths = [300, 64, 5, 70, 128, 1, 640];
        let buckets = [369, 198, 641];
        let alone = blocks_of(&lengths, &buckets, 0, 1);
        // The bucket's own grid, and the beginning of each tensor.
        assert_eq!(alone[..3], [0..64, 64..128, 128..192]);
        assert_eq!(
            alone[4..9],
            [256..300, 300..320, 320..364, 364..369, 369..433]
        );
        for ranks in 2..=7 {
            let all = |rank| blocks_of(&lengths, &buckets, rank, ranks);
            let together: Vec<Range<i64>> = (0..ranks).flat_map(all).collect();
            let mut together = together;
            together.sort_by_key(|range| range.start);
            assert_eq!(together, alone, "{ranks}");
        }
        for slice in slices(&lengths) {
            let inside = |block: &&Range<i64>| !intersect(block, &slice.range).is_empty();
            for block in alone.iter().filter(inside) {
                assert_eq!(intersect(block, &slice.range), *block);
            }
        }
    }

    #[test]
    fn a_range_is_found_in_whole_blocks_and_parts_are_all_of_a_run() {
        let partition = Partition::in_multiples([400], 1, BLOCK);
        let blocks = Blocks::of(&slices(&[10, 390]), &partition, RankOf::ONLY);
        let own = |range| -> Vec<Range<i64>> {
            blocks.over(&range).into_iter().map(|run| run.own).collect()
        };
        assert_eq!(own(0..400), [0..10, 10..400]);
        assert_eq!(own(11..12), std::slice::from_ref(&(10..64)));
        assert_eq!(own(9..64), [0..10, 10..64]);
        assert_eq!(own(64..65), std::slice::from_ref(&(64..128)));
        assert_eq!(own(390..400), std::slice::from_ref(&(384..400)));
        assert!(own(20..20).is_empty());
        let run = blocks.over(&(10..400)).remove(0);
        let parts = run.parts(128);
        let ranges: Vec<Range<i64>> = parts.iter().map(|part| part.own.clone()).collect();
        assert_eq!(ranges, [10..128, 128..256, 256..384, 384..400]);
        let counted: Vec<i64> = parts.iter().flat_map(|part| part.blocks.clone()).collect();
        assert_eq!(counted, run.blocks.collect::<Vec<i64>>());
    }
}
