//! Where rows are: maps the number of a live row to its object and its row in the object. Pure.
//!
//! The live rows of a split and bucket are numbered through its objects, in the manifest's order;
//! deleted rows have no number.

use std::collections::BTreeMap;

use crate::format::{
    block_table::BLOCK_ROWS,
    manifest::{Object, Split},
};

/// Object, and row in the object, deleted rows counted.
pub(crate) type ObjectRow = (usize, u32);
/// Object, and block of the object.
pub(crate) type BlockKey = (usize, u32);

/// The live rows of a data set.
#[derive(Debug)]
pub(crate) struct RowIndex {
    /// By split and bucket; each has at least one span.
    rows: BTreeMap<(Split, u32), Vec<Span>>,
}

/// The live rows of one object, at least one.
#[derive(Debug)]
pub(crate) struct Span {
    pub(crate) object: usize,
    /// Number of the object's first live row.
    first: u64,
    /// Live rows of the object.
    num_rows: u64,
    /// Rows of the object, deleted ones included.
    num_stored: u32,
    /// Row in the object of each live row. None if no row is deleted.
    live: Option<Vec<u32>>,
}

impl RowIndex {
    /// The index of the rows of a manifest's `objects`.
    pub(crate) fn new(objects: &[Object]) -> Self {
        let mut rows = BTreeMap::<(Split, u32), Vec<Span>>::new();
        for (object, entry) in objects.iter().enumerate() {
            let live = live_rows(entry);
            let num_rows = match &live {
                Some(live) => live.len() as u64,
                None => u64::from(entry.rows),
            };
            if num_rows == 0 {
                continue;
            }
            let spans = rows.entry((entry.split, entry.bucket)).or_default();
            let first = spans.last().map_or(0, Span::end);
            spans.push(Span {
                object,
                first,
                num_rows,
                num_stored: entry.rows,
                live,
            });
        }
        Self { rows }
    }

    /// The spans of a bucket, in row order. Empty if it has no live row.
    pub(crate) fn spans(&self, split: Split, bucket: u32) -> &[Span] {
        self.rows.get(&(split, bucket)).map_or(&[], Vec::as_slice)
    }

    /// The object of a live row, and its row in the object. None if there is no such row.
    pub(crate) fn locate(&self, split: Split, bucket: u32, row: u64) -> Option<ObjectRow> {
        let spans = self.spans(split, bucket);
        let after = spans.partition_point(|span| span.first <= row);
        let span = &spans[after.checked_sub(1)?];
        let at = row - span.first;
        (at < span.num_rows).then(|| (span.object, span.stored_row(at)))
    }

    /// The buckets with live rows of `split`, each with its number of them, in the manifest's
    /// order.
    pub(crate) fn buckets(&self, split: Split) -> impl Iterator<Item = (u32, u64)> + '_ {
        let of_split = self.rows.keys().filter(move |(of, _)| *of == split);
        of_split.map(move |&(_, bucket)| (bucket, self.num_rows(split, bucket)))
    }

    /// Number of live rows of a bucket.
    pub(crate) fn num_rows(&self, split: Split, bucket: u32) -> u64 {
        self.spans(split, bucket)
            .iter()
            .map(|span| span.num_rows)
            .sum()
    }

    /// Rows of those objects of a bucket that have live rows, deleted rows included.
    pub(crate) fn num_stored(&self, split: Split, bucket: u32) -> u64 {
        self.spans(split, bucket)
            .iter()
            .map(|span| u64::from(span.num_stored))
            .sum()
    }

    /// Ends of the runs of up to `longest` consecutive blocks of an object, counted in live rows of
    /// the bucket. Runs without a live row are omitted.
    pub(crate) fn run_ends(&self, split: Split, bucket: u32, longest: u32) -> Vec<u32> {
        let run_rows = longest * BLOCK_ROWS;
        let mut ends = Vec::new();
        let mut last = 0;
        for span in self.spans(split, bucket) {
            let first = u32::try_from(span.first).expect("the order rejects buckets of 2^32 rows");
            for run in 1..=span.num_stored.div_ceil(run_rows) {
                let end = first + span.live_before((run * run_rows).min(span.num_stored));
                if end > last {
                    ends.push(end);
                    last = end;
                }
            }
        }
        ends
    }
}

impl Span {
    /// Number after the object's last live row.
    fn end(&self) -> u64 {
        self.first + self.num_rows
    }

    /// The row in the object of the span's live row `at`.
    fn stored_row(&self, at: u64) -> u32 {
        match &self.live {
            Some(live) => live[at as usize],
            None => at as u32,
        }
    }

    /// Number of live rows of the object before its row `row`.
    fn live_before(&self, row: u32) -> u32 {
        match &self.live {
            Some(live) => live.partition_point(|&live| live < row) as u32,
            None => row,
        }
    }

    /// The elements of live rows of `all`, which has one element for each row of the object.
    pub(crate) fn live_of<T>(&self, all: Vec<T>) -> Vec<T> {
        let Some(live) = &self.live else { return all };
        let mut all: Vec<Option<T>> = all.into_iter().map(Some).collect();
        live.iter()
            .filter_map(|&row| all[row as usize].take())
            .collect()
    }
}

/// Rows of an object that are live. None if no row is deleted.
fn live_rows(object: &Object) -> Option<Vec<u32>> {
    let bits = object.deleted_bits()?;
    let mut live = Vec::new();
    for row in 0..object.rows {
        if bits[row as usize / 8] >> (row % 8) & 1 == 0 {
            live.push(row);
        }
    }
    Some(live)
}

/// The blocks with `rows`, sorted, each once.
pub(crate) fn blocks_of(rows: impl Iterator<Item = ObjectRow>) -> Vec<BlockKey> {
    let mut blocks: Vec<BlockKey> = rows
        .map(|(object, row)| (object, row / BLOCK_ROWS))
        .collect();
    blocks.sort_unstable();
    blocks.dedup();
    blocks
}
