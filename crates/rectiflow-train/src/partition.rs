//! Which rank owns which part of the flat vector. Arithmetic alone.
//!
//! Rank r of R owns the elements `r c .. (r + 1) c`, `c = ceil(n / R)`, as far as there are any: equal parts but for the
//! last ones. A collective works on pieces of all parts at once ([`Partition::rounds`]), so that it needs a buffer of a
//! few megabytes and not a copy of the vector.

use std::ops::Range;

use rectiflow_data::order::RankOf;

/// A vector of `len` elements split over ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    len: i64,
    ranks: usize,
}

impl Partition {
    /// `len` elements over `ranks` ranks, at least 1.
    pub fn new(len: i64, ranks: usize) -> Self {
        assert!(ranks > 0 && len >= 0, "a vector is split over at least one rank");
        Self { len, ranks }
    }

    /// All elements.
    pub fn whole(&self) -> Range<i64> {
        0..self.len
    }

    /// Elements of a part, those of the last ones perhaps fewer.
    pub fn part_len(&self) -> i64 {
        (self.len + self.ranks as i64 - 1) / self.ranks as i64
    }

    /// What a rank owns.
    pub fn of(&self, rank: usize) -> Range<i64> {
        let part = self.part_len();
        let at = |rank: usize| (rank as i64 * part).min(self.len);
        at(rank)..at(rank + 1)
    }

    /// What the rank that this process is owns.
    pub fn own(&self, rank: RankOf) -> Range<i64> {
        self.of(rank.rank)
    }

    /// The rounds of a collective over the whole vector: in each, so many elements of every part, as offsets in it.
    /// A round takes at most `most` elements of all parts together, but at least one of each.
    pub fn rounds(&self, most: i64) -> impl Iterator<Item = Range<i64>> + use<> {
        let (part, step) = (self.part_len(), (most / self.ranks as i64).max(1));
        (0..part).step_by(step as usize).map(move |start| start..(start + step).min(part))
    }

    /// The elements of a rank's part that are at `offsets` of it: fewer, or none, at the end of the vector.
    pub fn at(&self, rank: usize, offsets: &Range<i64>) -> Range<i64> {
        let own = self.of(rank);
        let at = |offset: i64| (own.start + offset).min(own.end);
        at(offsets.start)..at(offsets.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_the_vector_in_order_and_even() {
        for (len, ranks) in [(0, 1), (1, 3), (7, 2), (8, 4), (10, 4), (2_567_463_684, 1024)] {
            let partition = Partition::new(len, ranks);
            let parts: Vec<Range<i64>> = (0..ranks).map(|rank| partition.of(rank)).collect();
            assert_eq!((parts[0].start, parts[ranks - 1].end), (0, len));
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start), "{parts:?}");
            assert!(parts.iter().all(|part| part.end - part.start <= partition.part_len()));
            // At most R - 1 elements would have to be added to make all parts equal.
            assert!(partition.part_len() * ranks as i64 - len < ranks as i64);
        }
    }

    #[test]
    fn rounds_take_every_element_once() {
        for (len, ranks, most) in [(10, 4, 4), (10, 4, 1), (1000, 3, 64), (5, 8, 100), (0, 2, 8)] {
            let partition = Partition::new(len, ranks);
            let mut seen = vec![0; len as usize];
            for round in partition.rounds(most) {
                assert!(round.end - round.start <= (most / ranks as i64).max(1));
                for element in (0..ranks).flat_map(|rank| partition.at(rank, &round)) {
                    seen[element as usize] += 1;
                }
            }
            assert!(seen.iter().all(|&times| times == 1), "{len} over {ranks}: {seen:?}");
        }
    }
}
