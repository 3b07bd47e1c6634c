//! Which rank owns which part of the flat vector. Arithmetic alone.
//!
//! The vector is cut into buckets, and every bucket of `len` elements into a piece of `ceil(len / R)` elements for each of
//! R ranks, as far as there are any: the last pieces may be shorter. What a rank owns is its pieces, one behind the other
//! ("own" elements are counted in there). So a collective is about one bucket: it can begin when that bucket's gradients
//! are there, and needs memory for that bucket alone.

use std::ops::Range;

use rectiflow_data::order::RankOf;

/// A vector split over ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    ranks: usize,
    buckets: Vec<Bucket>,
}

/// Some elements of a vector, split over ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// Its elements in the vector.
    pub range: Range<i64>,
    /// Elements of a piece, those of the last ones perhaps fewer.
    pub piece: i64,
}

/// A rank's piece of a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Its elements in the vector.
    pub range: Range<i64>,
    /// The same in what the rank owns.
    pub own: Range<i64>,
}

impl Partition {
    /// `len` elements in one bucket over `ranks` ranks, at least 1.
    pub fn new(len: i64, ranks: usize) -> Self {
        Self::of_buckets([len], ranks)
    }

    /// `rows` rows of `width` elements in one bucket, no row being cut.
    pub fn of_rows(rows: i64, width: i64, ranks: usize) -> Self {
        let Self { ranks, mut buckets } = Self::new(rows, ranks);
        for bucket in &mut buckets {
            *bucket = Bucket { range: 0..bucket.range.end * width, piece: bucket.piece * width };
        }
        Self { ranks, buckets }
    }

    /// Buckets of these lengths.
    pub fn of_buckets(lengths: impl IntoIterator<Item = i64>, ranks: usize) -> Self {
        assert!(ranks > 0, "a vector is split over at least one rank");
        let mut end = 0;
        let bucket = |len: i64| {
            assert!(len >= 0, "a bucket has no negative length");
            let start = end;
            end += len;
            Bucket { range: start..end, piece: (len + ranks as i64 - 1) / ranks as i64 }
        };
        Self { ranks, buckets: lengths.into_iter().map(bucket).collect() }
    }

    /// Number of elements.
    pub fn len(&self) -> i64 {
        self.buckets.last().map_or(0, |bucket| bucket.range.end)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Over how many ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// The buckets in the order of their elements.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Elements that a rank owns at most.
    pub fn most_owned(&self) -> i64 {
        self.buckets.iter().map(|bucket| bucket.piece).sum()
    }

    /// A rank's pieces, one a bucket, some of the last rank's perhaps empty.
    pub fn pieces(&self, rank: RankOf) -> impl Iterator<Item = Piece> + use<'_> {
        let mut end = 0;
        self.buckets.iter().map(move |bucket| {
            let range = bucket.of(rank.rank);
            let start = end;
            end += range.end - range.start;
            Piece { range, own: start..end }
        })
    }

    /// Elements that a rank owns.
    pub fn owned(&self, rank: RankOf) -> i64 {
        self.pieces(rank).last().map_or(0, |piece| piece.own.end)
    }

    /// Those of `range` that a rank owns, counted among what it owns.
    pub fn own_part(&self, rank: RankOf, range: &Range<i64>) -> Range<i64> {
        let below = |end: i64| {
            let of = |piece: Piece| (end - piece.range.start).clamp(0, piece.range.end - piece.range.start);
            self.pieces(rank).map(of).sum()
        };
        below(range.start)..below(range.end)
    }
}

impl Bucket {
    /// A rank's elements of it.
    pub fn of(&self, rank: usize) -> Range<i64> {
        let at = |rank: usize| (self.range.start + rank as i64 * self.piece).min(self.range.end);
        at(rank)..at(rank + 1)
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
                assert_eq!((pieces[0].start, pieces[ranks - 1].end), (bucket.range.start, bucket.range.end));
                assert!(pieces.windows(2).all(|pair| pair[0].end == pair[1].start), "{pieces:?}");
                assert!(pieces.iter().all(|piece| piece.end - piece.start <= bucket.piece));
                // At most R - 1 elements would have to be added to make all pieces equal.
                assert!(bucket.piece * ranks as i64 - (bucket.range.end - bucket.range.start) < ranks as i64);
            }
            let owned: i64 = (0..ranks).map(|rank| partition.owned(RankOf { rank, ranks })).sum();
            assert_eq!(owned, partition.len());
            assert_eq!(partition.owned(RankOf { rank: 0, ranks }), partition.most_owned());
        }
    }

    #[test]
    fn rows_are_not_cut() {
        let bucket = Partition::of_rows(5, 10, 3).buckets()[0].clone();
        let pieces: Vec<Range<i64>> = (0..3).map(|rank| bucket.of(rank)).collect();
        assert_eq!(pieces, [0..20, 20..40, 40..50]);
        assert_eq!(Partition::of_rows(1, 10, 3).buckets()[0].of(2), 10..10, "more ranks than rows");
    }

    #[test]
    fn every_element_has_one_place_among_what_one_rank_owns() {
        let partition = Partition::of_buckets([10, 1, 0, 7], 3);
        let mut owners = vec![0; 18];
        for rank in 0..3 {
            let rank = RankOf { rank, ranks: 3 };
            for piece in partition.pieces(rank) {
                assert_eq!(piece.range.end - piece.range.start, piece.own.end - piece.own.start);
                assert_eq!(partition.own_part(rank, &piece.range), piece.own);
                piece.range.for_each(|element| owners[element as usize] += 1);
            }
            assert_eq!(partition.own_part(rank, &(0..18)), 0..partition.owned(rank));
        }
        assert!(owners.iter().all(|&times| times == 1), "{owners:?}");
        // Rank 1 owns 4..8 of the first bucket, nothing of the second, 14..17 of the last.
        assert_eq!(partition.own_part(RankOf { rank: 1, ranks: 3 }, &(6..16)), 2..6);
        assert_eq!(partition.own_part(RankOf { rank: 1, ranks: 3 }, &(8..14)), 4..4);
    }
}
