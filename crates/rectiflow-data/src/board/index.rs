//! From the keys of posts to rows: 12 bytes for a number, 20 for a hash.
//!
//! Rows are numbered through all tables. Keys are sorted in place and searched by halving, since a
//! hash table of 13 million rows would be half empty and its keys padded.

/// A key of `N` 32-bit parts, and its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Entry<const N: usize> {
    key: [u32; N],
    row: u32,
}

/// Keys of one kind and their rows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Keys<const N: usize> {
    entries: Vec<Entry<N>>,
}

/// A row whose key a row before it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Repeat {
    pub(crate) row: u32,
    pub(crate) first: u32,
}

impl<const N: usize> Keys<N> {
    /// Adds a key. It is found after [`Keys::finish`].
    pub(crate) fn add(&mut self, key: [u32; N], row: u32) {
        self.entries.push(Entry { key, row });
    }

    /// Sorts the keys. Of equal ones the first row stays; the others are returned.
    pub(crate) fn finish(&mut self) -> Vec<Repeat> {
        self.entries.sort_unstable();
        let mut copies = Vec::new();
        self.entries.dedup_by(|next, first| {
            let is_copy = next.key == first.key;
            if is_copy {
                copies.push(Repeat {
                    row: next.row,
                    first: first.row,
                });
            }
            is_copy
        });
        self.entries.shrink_to_fit();
        copies
    }

    /// The row of a key.
    pub(crate) fn find(&self, key: [u32; N]) -> Option<u32> {
        let at = self.entries.binary_search_by(|entry| entry.key.cmp(&key));
        at.ok().map(|at| self.entries[at].row)
    }

    /// Whether there are no keys.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of memory.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Entry<N>>()
    }
}

/// A set of rows: a bit a row.
#[derive(Debug, Clone, Default)]
pub(crate) struct RowSet {
    bits: Vec<u64>,
}

impl RowSet {
    /// An empty set of rows below `num_rows`.
    pub(crate) fn of(num_rows: u32) -> Self {
        Self {
            bits: vec![0; (num_rows as usize).div_ceil(64)],
        }
    }

    pub(crate) fn insert(&mut self, row: u32) {
        self.bits[row as usize / 64] |= 1 << (row % 64);
    }

    pub(crate) fn contains(&self, row: u32) -> bool {
        let word = self.bits.get(row as usize / 64);
        word.is_some_and(|word| word >> (row % 64) & 1 == 1)
    }

    /// Bytes of memory.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.bits.capacity() * size_of::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Most bytes that a row may take of the memory: the promise of 1,000,000 rows within 1 GB
    /// leaves 1,000, and 13,000,000 rows must fit beside their facts.
    const MOST_BYTES_A_ROW: usize = 64;

    #[test]
    fn the_first_row_of_a_key_wins() {
        let mut keys = Keys::default();
        for (row, key) in (0..).zip([[0, 7], [0, 3], [0, 7], [1, 7], [0, 7], [0, 3]]) {
            keys.add(key, row);
        }
        let copies = keys.finish();
        let copies: Vec<(u32, u32)> = copies.iter().map(|copy| (copy.row, copy.first)).collect();
        assert_eq!(copies, [(5, 1), (2, 0), (4, 0)]);
        assert_eq!(keys.find([0, 7]), Some(0));
        assert_eq!(keys.find([0, 3]), Some(1));
        assert_eq!(keys.find([1, 7]), Some(3));
        assert_eq!(keys.find([0, 4]), None);
    }

    #[test]
    fn a_million_rows_are_few_bytes_each() {
        let num_rows = 1_000_000_u32;
        let mut ids = Keys::<2>::default();
        let mut hashes = Keys::<4>::default();
        for row in 0..num_rows {
            let mixed = row.wrapping_mul(2_654_435_761);
            ids.add([0, mixed], row);
            hashes.add([mixed, row, 0, mixed], row);
        }
        assert_eq!((ids.finish().len(), hashes.finish().len()), (0, 0));
        let matched = RowSet::of(num_rows);
        let bytes = ids.bytes() + hashes.bytes() + matched.bytes();
        assert!(bytes <= MOST_BYTES_A_ROW * num_rows as usize, "{bytes}");
        assert!(bytes >= 32 * num_rows as usize, "all keys are counted");
        assert_eq!(ids.find([0, 5_u32.wrapping_mul(2_654_435_761)]), Some(5));
    }

    #[test]
    fn a_set_has_what_was_put_into_it() {
        let mut set = RowSet::of(130);
        for row in [0, 64, 129] {
            set.insert(row);
        }
        let found: Vec<u32> = (0..200).filter(|&row| set.contains(row)).collect();
        assert_eq!(found, [0, 64, 129]);
    }
}
