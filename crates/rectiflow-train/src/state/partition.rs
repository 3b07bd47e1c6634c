//! Which rank owns which part of the flat vector. Pure.
//!
//! The vector is cut into buckets, and every bucket of `len` elements into pieces of
//! `ceil(len / R)` elements, one for each of R ranks; the last pieces may be shorter or empty. A
//! rank owns its pieces, one after the other; an "own" range counts elements within this
//! concatenation. A collective handles one bucket, so it can begin as soon as that bucket's
//! gradients are complete, and needs memory for that bucket alone.

use std::ops::Range;

use rectiflow_data::order::RankOf;

/// A vector that is split over ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    ranks: usize,
    buckets: Vec<Bucket>,
}

/// A range of the vector that is split over ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// Elements in the vector.
    pub range: Range<i64>,
    /// Number of elements in a piece; the last pieces may be shorter.
    pub piece: i64,
}

/// A rank's piece of a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Elements in the vector.
    pub range: Range<i64>,
    /// The same elements within those that the rank owns.
    pub own: Range<i64>,
}

impl Partition {
    /// Returns a partition of one bucket of `len` elements over `ranks` ranks, at least 1.
    pub fn new(len: i64, ranks: usize) -> Self {
        Self::of_buckets([len], ranks)
    }

    /// Returns a partition of one bucket of `rows` rows of `width` elements, which cuts no row.
    pub fn of_rows(rows: i64, width: i64, ranks: usize) -> Self {
        let Self { ranks, mut buckets } = Self::new(rows, ranks);
        for bucket in &mut buckets {
            *bucket = Bucket {
                range: 0..bucket.range.end * width,
                piece: bucket.piece * width,
            };
        }
        Self { ranks, buckets }
    }

    /// Returns a partition with buckets of these lengths.
    pub fn of_buckets(lengths: impl IntoIterator<Item = i64>, ranks: usize) -> Self {
        Self::in_multiples(lengths, ranks, 1)
    }

    /// Like [`Self::of_buckets`], with pieces of several ranks that are multiples of `multiple`
    /// elements, so that they do not cut blocks of as many.
    pub fn in_multiples(
        lengths: impl IntoIterator<Item = i64>,
        ranks: usize,
        multiple: i64,
    ) -> Self {
        assert!(ranks > 0, "a vector is split over at least one rank");
        let unit = if ranks == 1 { 1 } else { multiple };
        let mut buckets = Vec::new();
        let mut end = 0;
        for len in lengths {
            assert!(len >= 0, "a bucket has no negative length");
            let start = end;
            end += len;
            buckets.push(Bucket {
                range: start..end,
                piece: piece_of(len, ranks as i64, unit),
            });
        }
        Self { ranks, buckets }
    }

    /// Returns the number of elements.
    pub fn len(&self) -> i64 {
        self.buckets.last().map_or(0, |bucket| bucket.range.end)
    }

    /// Returns whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Returns the buckets in the order of their elements.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Returns the largest number of elements that a rank owns.
    pub fn most_owned(&self) -> i64 {
        self.buckets.iter().map(|bucket| bucket.piece).sum()
    }

    /// Returns a rank's pieces, one for each bucket. Those of the last ranks may be empty.
    pub fn pieces(&self, rank: RankOf) -> impl Iterator<Item = Piece> + use<'_> {
        let mut end = 0;
        self.buckets.iter().map(move |bucket| {
            let range = bucket.of(rank.rank);
            let start = end;
            end += range.end - range.start;
            Piece {
                range,
                own: start..end,
            }
        })
    }

    /// Returns the number of elements that a rank owns.
    pub fn owned(&self, rank: RankOf) -> i64 {
        self.pieces(rank).last().map_or(0, |piece| piece.own.end)
    }

    /// Returns the part of `range` that a rank owns, as a range within its own elements.
    pub fn own_part(&self, rank: RankOf, range: &Range<i64>) -> Range<i64> {
        self.owned_before(rank, range.start)..self.owned_before(rank, range.end)
    }

    /// Returns the number of elements before `end` that a rank owns.
    fn owned_before(&self, rank: RankOf, end: i64) -> i64 {
        let mut owned = 0;
        for Piece { range, .. } in self.pieces(rank) {
            owned += (end - range.start).clamp(0, range.end - range.start);
        }
        owned
    }
}

/// Returns the length of the pieces of `len` elements: the least multiple of `unit` that suffices.
fn piece_of(len: i64, ranks: i64, unit: i64) -> i64 {
    let least = (len + ranks - 1) / ranks;
    (least + unit - 1) / unit * unit
}

impl Bucket {
    /// Returns a rank's elements of this bucket.
    pub fn of(&self, rank: usize) -> Range<i64> {
        self.start_of(rank)..self.start_of(rank + 1)
    }

    fn start_of(&self, rank: usize) -> i64 {
        (self.range.start + rank as i64 * self.piece).min(self.range.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_vector_in_order_and_even() {
        for (lengths, ranks) in [
            (vec![0], 1),
            (vec![1], 3),
            (vec![7], 2),
            (vec![8, 5], 4),
            (vec![10, 1, 0, 3], 4),
            (vec![2_567_463_684], 1024),
        ] {
            let partition = Partition::of_buckets(lengths.iter().copied(), ranks);
            assert_eq!(partition.len(), lengths.iter().sum::<i64>());
            for bucket in partition.buckets() {
                let pieces: Vec<Range<i64>> = (0..ranks).map(|rank| bucket.of(rank)).collect();
                assert_eq!(
                    (pieces[0].start, pieces[ranks - 1].end),
                    (bucket.range.start, bucket.range.end)
                );
                assert!(
                    pieces.windows(2).all(|pair| pair[0].end == pair[1].start),
                    "{pieces:?}"
                );
                assert!(
                    pieces
                        .iter()
                        .all(|piece| piece.end - piece.start <= bucket.piece)
                );
                // At most R - 1 elements of padding make all pieces equally long.
                assert!(
                    bucket.piece * ranks as i64 - (bucket.range.end - bucket.range.start)
                        < ranks as i64
                );
            }
            let owned: i64 = (0..ranks)
                .map(|rank| partition.owned(RankOf { rank, ranks }))
                .sum();
            assert_eq!(owned, partition.len());
            assert_eq!(
                partition.owned(RankOf { rank: 0, ranks }),
                partition.most_owned()
            );
        }
    }

    #[test]
    fn rows_are_not_cut() {
        let bucket = Partition::of_rows(5, 10, 3).buckets()[0].clone();
        let pieces: Vec<Range<i64>> = (0..3).map(|rank| bucket.of(rank)).collect();
        assert_eq!(pieces, [0..20, 20..40, 40..50]);
        assert_eq!(
            Partition::of_rows(1, 10, 3).buckets()[0].of(2),
            10..10,
            "more ranks than rows"
        );
    }

    #[test]
    fn every_element_has_one_place_among_what_one_rank_owns() {
        let partition = Partition::of_buckets([10, 1, 0, 7], 3);
        let mut owners = vec![0; 18];
        for rank in 0..3 {
            let rank = RankOf { rank, ranks: 3 };
            for piece in partition.pieces(rank) {
                assert_eq!(
                    piece.range.end - piece.range.start,
                    piece.own.end - piece.own.start
                );
                assert_eq!(partition.own_part(rank, &piece.range), piece.own);
                piece
                    .range
                    .for_each(|element| owners[element as usize] += 1);
            }
            assert_eq!(partition.own_part(rank, &(0..18)), 0..partition.owned(rank));
        }
        assert!(owners.iter().all(|&times| times == 1), "{owners:?}");
        // Rank 1 owns 4..8 of the first bucket, nothing of the second, 14..17 of the last.
        assert_eq!(
            partition.own_part(RankOf { rank: 1, ranks: 3 }, &(6..16)),
            2..6
        );
        assert_eq!(
            partition.own_part(RankOf { rank: 1, ranks: 3 }, &(8..14)),
            4..4
        );
    }
}
