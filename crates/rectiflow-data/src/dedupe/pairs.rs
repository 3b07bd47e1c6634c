//! All pairs of 256-bit hashes within a Hamming distance, exactly, by banding.
//!
//! The bits are dealt into bands. A band has an allowance r: two hashes meet in it if they differ
//! there in at most r bits. If the allowances are such that the sum of (r + 1) over the bands is
//! more than the distance, two hashes that meet in no band differ by more than the distance (the
//! pigeonhole principle; Norouzi, Punjani and Fleet 2012, Qin et al. 2018), so that comparing those
//! that meet finds every pair. Allowances are 0 or 1, and a band with none (-1) is not looked at:
//! the bands in which the fewest hashes meet are used most.
//!
//! Hashes of pictures are not uniform: simple pictures share most of their bits. Two buckets whose
//! comparison would be long are joined as a problem of their own, by bands of the bits that are
//! left.

use rayon::prelude::*;

/// 256 bits.
pub type Hash = [u64; 4];

/// Bits of a hash.
const NUM_BITS: usize = 256;
/// The least number of bands: they have 22 bits or fewer, and a million hashes fill 20.
const MIN_BANDS: usize = 12;
/// The largest distance: 16 bands with an allowance of 1. Narrower bands would be crowded.
pub const MAX_DISTANCE: u32 = 31;
/// A bucket of more hashes is split by other bands before its hashes are compared.
const CROWD: usize = 1 << 11;
/// Crowded buckets inside crowded buckets that are split.
const MAX_DEPTH: usize = 3;
/// Hashes of a sample that costs are estimated from.
const SAMPLE: usize = 1 << 18;

/// The number of bits in which two hashes differ.
pub fn distance(a: &Hash, b: &Hash) -> u32 {
    let words = a.iter().zip(b);
    words.map(|(a, b)| (a ^ b).count_ones()).sum()
}

/// Whether two hashes are near: they differ in at most `max_distance` bits, and in at most
/// [`MAX_PERCENT`] of the bits that are set in them. Hashes with few set bits are all within a
/// small distance.
pub fn are_near(a: &Hash, b: &Hash, max_distance: u32) -> bool {
    let differing = distance(a, b);
    let set: u32 = a.iter().chain(b).map(|word| word.count_ones()).sum();
    differing <= max_distance && 100 * differing <= MAX_PERCENT * set
}

/// See [`are_near`].
pub const MAX_PERCENT: u32 = 33;

/// All pairs (i, j), i < j, of hashes that are near ([`are_near`]), in ascending order.
///
/// Equal hashes are pairs too: n of them make n (n - 1) / 2, so collapse them first.
///
/// # Panics
/// If `max_distance` exceeds [`MAX_DISTANCE`] or there are 2^32 hashes.
pub fn near_pairs(hashes: &[Hash], max_distance: u32) -> Vec<(u32, u32)> {
    near_pairs_of_first(hashes, hashes.len(), max_distance)
}

/// The pairs of [`near_pairs`] in which i is one of the first `num_first` hashes: the others are
/// not compared with each other.
///
/// # Panics
/// As [`near_pairs`].
pub fn near_pairs_of_first(
    hashes: &[Hash],
    num_first: usize,
    max_distance: u32,
) -> Vec<(u32, u32)> {
    assert!(
        max_distance <= MAX_DISTANCE,
        "bands cover {MAX_DISTANCE} bits, not {max_distance}"
    );
    assert!(
        u32::try_from(hashes.len()).is_ok(),
        "hashes are numbered with 32 bits"
    );
    let dealt: Vec<Hash> = hashes.par_iter().map(deal).collect();
    let plan = Plan::new(&dealt, num_first as u32, max_distance);
    let mut pairs = join(&dealt, &plan, 0);
    pairs.par_sort_unstable();
    pairs
}

/// The pairs of a plan, in any order. `depth` counts the crowded buckets around.
fn join(dealt: &[Hash], plan: &Plan, depth: usize) -> Vec<(u32, u32)> {
    let mut pairs = Vec::new();
    for band in plan.bands.iter().filter(|band| band.allowance >= 0) {
        let buckets = Buckets::new(dealt, band);
        pairs.append(&mut buckets.pairs(dealt, plan, band, depth));
    }
    pairs
}

/// Deals the bits out: a band's bits are neighbours in the result, but not in the hash, where
/// neighbours depend on each other.
fn deal(hash: &Hash) -> Hash {
    let mut dealt = [0; 4];
    for to in 0..NUM_BITS {
        let bit = to * 77 % NUM_BITS;
        dealt[to / 64] |= (hash[bit / 64] >> (bit % 64) & 1) << (to % 64);
    }
    dealt
}

/// A range of bits of a dealt hash, and what it is used for.
#[derive(Clone)]
struct Band {
    first: usize,
    num_bits: usize,
    /// -1 (not looked at), 0 or 1.
    allowance: i32,
}

impl Band {
    /// Band `number` of `of`.
    fn new(number: usize, of: usize) -> Self {
        let first = number * NUM_BITS / of;
        Self {
            first,
            num_bits: (number + 1) * NUM_BITS / of - first,
            allowance: -1,
        }
    }

    fn value(&self, hash: &Hash) -> u32 {
        let (word, shift) = (self.first / 64, self.first % 64);
        let next = if word < 3 {
            u128::from(hash[word + 1]) << 64
        } else {
            0
        };
        let bits = (u128::from(hash[word]) | next) >> shift;
        bits as u32 & ((1 << self.num_bits) - 1)
    }

    fn meets(&self, a: &Hash, b: &Hash) -> bool {
        (self.value(a) ^ self.value(b)).count_ones() as i32 <= self.allowance
    }
}

/// What each band is used for.
struct Plan {
    max_distance: u32,
    /// Of a pair, one has a smaller number than this.
    num_first: u32,
    /// The least crowded first: a pair is reported where it meets first.
    bands: Vec<Band>,
    /// An estimate of twice the number of comparisons.
    cost: u64,
}

impl Plan {
    /// Allows most where the fewest hashes meet.
    fn new(dealt: &[Hash], num_first: u32, max_distance: u32) -> Self {
        let num_bands = MIN_BANDS.max((max_distance as usize + 2) / 2);
        let step = (dealt.len() / SAMPLE).max(1);
        let sample: Vec<Hash> = dealt.iter().step_by(step).copied().collect();
        let sampled_first = (num_first as usize).div_ceil(step) as u32;
        let mut bands: Vec<(Band, [u64; 2])> = (0..num_bands)
            .into_par_iter()
            .map(|number| {
                let band = Band::new(number, num_bands);
                let costs = Buckets::new(&sample, &band).costs(&band, sampled_first);
                (band, costs)
            })
            .collect();
        let mut cost = 0;
        for _ in 0..=max_distance {
            let next = |(band, costs): &(Band, [u64; 2])| match band.allowance {
                -1 => costs[0],
                0 => costs[1],
                _ => u64::MAX,
            };
            let cheapest = (0..num_bands).min_by_key(|&band| next(&bands[band]));
            let cheapest = cheapest.expect("there are bands");
            cost += next(&bands[cheapest]);
            bands[cheapest].0.allowance += 1;
        }
        bands.sort_by_key(|(_, costs)| costs[0]);
        Self {
            max_distance,
            num_first,
            bands: bands.into_iter().map(|(band, _)| band).collect(),
            cost,
        }
    }

    /// Whether `band` is the first in which two hashes meet.
    fn meet_first(&self, a: &Hash, b: &Hash, band: &Band) -> bool {
        let first = self.bands.iter().find(|band| band.meets(a, b));
        first.is_some_and(|first| first.first == band.first)
    }
}

/// The hashes sorted by their value in a band.
struct Buckets {
    /// Distinct values, ascending.
    values: Vec<u32>,
    /// Bucket i is `starts[i]..starts[i + 1]` of `sorted`.
    starts: Vec<u32>,
    /// The numbers of the hashes.
    sorted: Vec<u32>,
    /// Where the values with each beginning start; the rest of a value has `rest` bits.
    beginnings: Vec<u32>,
    rest: usize,
}

impl Buckets {
    fn new(dealt: &[Hash], band: &Band) -> Self {
        let number = |(i, hash): (usize, &Hash)| (band.value(hash), i as u32);
        let mut entries: Vec<(u32, u32)> = dealt.par_iter().enumerate().map(number).collect();
        entries.par_sort_unstable();
        let (mut values, mut starts) = (Vec::new(), Vec::new());
        for (at, &(value, _)) in entries.iter().enumerate() {
            if values.last() != Some(&value) {
                values.push(value);
                starts.push(at as u32);
            }
        }
        starts.push(entries.len() as u32);
        let begin = (values.len().max(2).ilog2() as usize).min(band.num_bits);
        let rest = band.num_bits - begin;
        let mut beginnings = vec![0u32; (1 << begin) + 1];
        for value in &values {
            beginnings[(value >> rest) as usize + 1] += 1;
        }
        for i in 0..1 << begin {
            beginnings[i + 1] += beginnings[i];
        }
        let sorted = entries.into_iter().map(|(_, number)| number).collect();
        Self {
            values,
            starts,
            sorted,
            beginnings,
            rest,
        }
    }

    fn range(&self, bucket: usize) -> std::ops::Range<usize> {
        self.starts[bucket] as usize..self.starts[bucket + 1] as usize
    }

    /// The bucket of a value.
    fn find(&self, value: u32) -> Option<usize> {
        let begin = (value >> self.rest) as usize;
        let (from, to) = (
            self.beginnings[begin] as usize,
            self.beginnings[begin + 1] as usize,
        );
        let found = self.values[from..to].binary_search(&value);
        found.ok().map(|at| from + at)
    }

    /// The buckets whose value differs from a bucket's in one bit and is greater.
    fn neighbours(&self, bucket: usize, band: &Band) -> impl Iterator<Item = usize> {
        let value = self.values[bucket];
        let unset = (0..band.num_bits).filter(move |bit| value >> bit & 1 == 0);
        unset.filter_map(move |bit| self.find(value | 1 << bit))
    }

    /// The numbers of hashes of a bucket: of the first `num_first`, and of the others.
    fn counts(&self, bucket: usize, num_first: u32) -> [u64; 2] {
        let numbers = &self.sorted[self.range(bucket)];
        let first = numbers.partition_point(|&number| number < num_first);
        [first as u64, (numbers.len() - first) as u64]
    }

    /// The comparisons that the allowance 0 costs, and those that 1 costs on top, both twice.
    fn costs(&self, band: &Band, num_first: u32) -> [u64; 2] {
        let (mut equal, mut near) = (0, 0);
        for bucket in 0..self.values.len() {
            let [first, rest] = self.counts(bucket, num_first);
            equal += first * (first + 2 * rest);
            for other in self.neighbours(bucket, band) {
                let [other_first, other_rest] = self.counts(other, num_first);
                near += 2 * (first * (other_first + other_rest) + rest * other_first);
            }
        }
        [equal, near]
    }

    /// The pairs that meet first in this band.
    fn pairs(&self, dealt: &[Hash], plan: &Plan, band: &Band, depth: usize) -> Vec<(u32, u32)> {
        // Side by side in memory, as they are compared.
        let entries: Vec<(Hash, u32)> = self
            .sorted
            .par_iter()
            .map(|&number| (dealt[number as usize], number))
            .collect();
        let of_bucket = |bucket: usize| {
            let mut found = Vec::new();
            let mut search = Search {
                plan,
                band,
                depth,
                found: &mut found,
            };
            let own = &entries[self.range(bucket)];
            search.within(own);
            if band.allowance == 1 {
                for other in self.neighbours(bucket, band) {
                    search.between(own, &entries[self.range(other)]);
                }
            }
            found
        };
        (0..self.values.len())
            .into_par_iter()
            .with_min_len(16)
            .flat_map_iter(of_bucket)
            .collect()
    }
}

/// Comparisons inside a bucket and between two.
struct Search<'a> {
    plan: &'a Plan,
    band: &'a Band,
    /// Crowded buckets around.
    depth: usize,
    found: &'a mut Vec<(u32, u32)>,
}

impl Search<'_> {
    /// How many of a bucket's hashes, which ascend, are among the first.
    fn num_first(&self, bucket: &[(Hash, u32)]) -> usize {
        bucket.partition_point(|entry| entry.1 < self.plan.num_first)
    }

    fn within(&mut self, bucket: &[(Hash, u32)]) {
        let num_first = self.num_first(bucket);
        if num_first * bucket.len() > CROWD * CROWD && self.split(bucket, &[]) {
            return;
        }
        for (i, a) in bucket[..num_first].iter().enumerate() {
            self.compare(a, &bucket[i + 1..]);
        }
    }

    fn between(&mut self, bucket: &[(Hash, u32)], other: &[(Hash, u32)]) {
        let (first, other_first) = (self.num_first(bucket), self.num_first(other));
        let num_compared = first * other.len() + (bucket.len() - first) * other_first;
        let crowded = bucket.len().min(other.len()) > 16 && num_compared > CROWD * CROWD / 2;
        if crowded && self.split(bucket, other) {
            return;
        }
        for a in &bucket[..first] {
            self.compare(a, other);
        }
        for a in &other[..other_first] {
            self.compare(a, &bucket[first..]);
        }
    }

    fn compare(&mut self, a: &(Hash, u32), others: &[(Hash, u32)]) {
        let max = self.plan.max_distance;
        for b in others {
            // Half of the bits are enough to refuse most.
            let half = (a.0[0] ^ b.0[0]).count_ones() + (a.0[1] ^ b.0[1]).count_ones();
            if half > max {
                continue;
            }
            let rest = (a.0[2] ^ b.0[2]).count_ones() + (a.0[3] ^ b.0[3]).count_ones();
            if half + rest <= max
                && are_near(&a.0, &b.0, max)
                && self.plan.meet_first(&a.0, &b.0, self.band)
            {
                self.found.push((a.1.min(b.1), a.1.max(b.1)));
            }
        }
    }

    /// Joins one or two crowded buckets by a plan of their own, which uses the bands in which they
    /// differ. False if that would save less than half of the comparisons.
    fn split(&mut self, bucket: &[(Hash, u32)], other: &[(Hash, u32)]) -> bool {
        if self.depth == MAX_DEPTH {
            return false;
        }
        let (first, other_first) = (self.num_first(bucket), self.num_first(other));
        let twice = if other.is_empty() {
            first * (2 * bucket.len() - first)
        } else {
            2 * (first * other.len() + (bucket.len() - first) * other_first)
        };
        // Those among the first stand first again.
        let mut entries: Vec<(Hash, u32, bool)> = Vec::with_capacity(bucket.len() + other.len());
        entries.extend(bucket.iter().map(|&(hash, number)| (hash, number, false)));
        entries.extend(other.iter().map(|&(hash, number)| (hash, number, true)));
        entries.sort_unstable_by_key(|entry| entry.1);
        let hashes: Vec<Hash> = entries.iter().map(|entry| entry.0).collect();
        let num_first = (first + other_first) as u32;
        let plan = Plan::new(&hashes, num_first, self.plan.max_distance);
        if plan.cost > twice as u64 / 2 {
            return false;
        }
        for (i, j) in join(&hashes, &plan, self.depth + 1) {
            let (a, b) = (&entries[i as usize], &entries[j as usize]);
            let crosses = other.is_empty() || a.2 != b.2;
            if crosses && self.plan.meet_first(&a.0, &b.0, self.band) {
                self.found.push((a.1.min(b.1), a.1.max(b.1)));
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers from a seed (splitmix64).
    struct Numbers(u64);

    impl Numbers {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed ^ (mixed >> 27)
        }

        fn hash(&mut self) -> Hash {
            [0; 4].map(|_: u64| self.next())
        }

        /// `hash` with up to `most` bits changed.
        fn changed(&mut self, mut hash: Hash, most: u64) -> Hash {
            for _ in 0..self.next() % (most + 1) {
                let bit = self.next() as usize % 256;
                hash[bit / 64] ^= 1 << (bit % 64);
            }
            hash
        }
    }

    fn brute_force(hashes: &[Hash], max_distance: u32) -> Vec<(u32, u32)> {
        let mut pairs = Vec::new();
        for (i, a) in hashes.iter().enumerate() {
            for (j, b) in hashes.iter().enumerate().skip(i + 1) {
                if are_near(a, b, max_distance) {
                    pairs.push((i as u32, j as u32));
                }
            }
        }
        pairs
    }

    #[test]
    fn the_pairs_are_those_of_brute_force_at_every_distance() {
        let mut numbers = Numbers(1);
        let mut hashes: Vec<Hash> = (0..300).map(|_| numbers.hash()).collect();
        for i in 0..900 {
            let copy = numbers.changed(hashes[i % 300], 40);
            hashes.push(copy);
        }
        for max_distance in 0..=MAX_DISTANCE {
            let expected = brute_force(&hashes, max_distance);
            assert!(
                near_pairs(&hashes, max_distance) == expected,
                "distance {max_distance}"
            );
            assert!(max_distance < 10 || expected.len() > 100);
        }
    }

    #[test]
    fn a_crowded_band_value_loses_no_pair() {
        let mut numbers = Numbers(2);
        // Most bits are equal in all: half of the bands have one value or its neighbour.
        let mut hashes: Vec<Hash> = (0..3000)
            .map(|_| {
                let hash = numbers.hash().map(|word| word & 0x00ff_00ff_00ff_00ff);
                numbers.changed(hash, 2)
            })
            .collect();
        for i in 0..2000 {
            let copy = numbers.changed(hashes[i], 30);
            hashes.push(copy);
        }
        for max_distance in [3, 14, 24] {
            let expected = brute_force(&hashes, max_distance);
            assert!(expected.len() > 100);
            assert!(
                near_pairs(&hashes, max_distance) == expected,
                "distance {max_distance}"
            );
        }
    }

    #[test]
    fn only_pairs_with_one_of_the_first_are_found() {
        let mut numbers = Numbers(3);
        // A crowd too: half of the hashes share most bits.
        let mut hashes: Vec<Hash> = (0..1000).map(|_| numbers.hash()).collect();
        for hash in &mut hashes[500..] {
            *hash = hash.map(|word| word & 0x000f_000f_000f_000f);
        }
        for i in 0..1000 {
            let copy = numbers.changed(hashes[i], 25);
            hashes.push(copy);
        }
        for num_first in [0, 1, 700, 1600] {
            let mut expected = brute_force(&hashes, 18);
            expected.retain(|pair| (pair.0 as usize) < num_first);
            assert!(num_first < 2 || expected.len() > 100);
            assert!(
                near_pairs_of_first(&hashes, num_first, 18) == expected,
                "{num_first} first"
            );
        }
    }

    #[test]
    fn few_or_no_hashes_are_no_special_case() {
        assert_eq!(near_pairs(&[], 5), []);
        assert_eq!(near_pairs(&[[1; 4]], 5), []);
        assert_eq!(near_pairs(&[[1; 4], [1; 4]], 0), [(0, 1)]);
    }
}
