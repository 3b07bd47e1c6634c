//! Fixed passes: every test sample, or a fixed subset of the training samples, each once, in a
//! fixed order, in micro-batches of one chunk count each.
//!
//! The tuples of a test loss must not change between measurements or with the number of ranks: each
//! sample always has the prompt of pass 0, and no prompt is dropped (a loss with dropped prompts
//! would measure their number, not how well prompts are followed). Micro-batch i goes to rank
//! i mod R. Ranks with fewer micro-batches receive extra ones of weight 0, so that all ranks make
//! the same number of calls.

use std::{collections::VecDeque, iter::FusedIterator, thread};

use crate::{
    dataset::BucketShape,
    error::{Error, Result},
    format::{manifest::Split, record::SampleId},
    load::batch::{Batcher, Members, MicroBatch, Source},
    order::{RankOf, window::RowRef},
    rng::{Purpose, key_u64},
    text::token::MAX_CHUNKS,
};

/// One rank's part of the test samples of `sources`, each once whatever the amount of its data set.
/// Micro-batches have at most `micro_batch` samples of one bucket and one chunk count; `slot`
/// counts micro-batches and `first_sample` samples over all ranks. Draws and tokenises all prompts
/// at once and reads latents as it iterates, sixteen buckets or micro-batches at a time: over a
/// network each of them is a request of its own.
///
/// # Errors
/// [`Error::Invalid`] for impossible settings; the errors of reading text.
pub fn test_batches(
    sources: &[Source],
    micro_batch: usize,
    seed: u64,
    rank: RankOf,
) -> Result<TestBatches> {
    let mut rows = Vec::new();
    for (data, source) in (0..).zip(sources) {
        for shape in source.dataset.buckets(Split::Test) {
            rows.push(ChosenRows {
                data,
                bucket: shape.bucket,
                rows: (0..num_rows(shape.num_rows)).collect(),
            });
        }
    }
    let fixed = Fixed {
        micro_batch,
        seed,
        rank,
    };
    fixed_batches(sources, Split::Test, rows, fixed)
}

/// As [`test_batches`], with `count` of the training samples, or all if there are fewer: those with
/// the lowest hash of seed, data set, bucket and row. Rows that are added later leave most of the
/// selection unchanged.
///
/// # Errors
/// As [`test_batches`].
pub fn training_batches(
    sources: &[Source],
    count: usize,
    micro_batch: usize,
    seed: u64,
    rank: RankOf,
) -> Result<TestBatches> {
    let mut rows: Vec<ChosenRows> = Vec::new();
    for ChosenRow { data, bucket, row } in choose(sources, count, seed) {
        match rows.last_mut() {
            Some(last) if (last.data, last.bucket) == (data, bucket) => last.rows.push(row),
            _ => rows.push(ChosenRows {
                data,
                bucket,
                rows: vec![row],
            }),
        }
    }
    let fixed = Fixed {
        micro_batch,
        seed,
        rank,
    };
    fixed_batches(sources, Split::Train, rows, fixed)
}

/// The `count` training samples with the lowest hashes, or all if there are fewer, sorted.
fn choose(sources: &[Source], count: usize, seed: u64) -> Vec<ChosenRow> {
    let mut hashed = Vec::new();
    for (data, source) in (0..).zip(sources) {
        for BucketShape {
            bucket,
            num_rows: count,
            ..
        } in source.dataset.buckets(Split::Train)
        {
            for row in 0..num_rows(count) {
                let words = [u64::from(data), u64::from(bucket), u64::from(row)];
                let hash = key_u64(seed, Purpose::TestLoss, &words);
                hashed.push((hash, ChosenRow { data, bucket, row }));
            }
        }
    }
    if count < hashed.len() {
        hashed.select_nth_unstable(count);
        hashed.truncate(count);
    }
    let mut chosen: Vec<ChosenRow> = hashed.into_iter().map(|(_, row)| row).collect();
    chosen.sort_unstable();
    chosen
}

/// A training sample: data set, bucket and row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct ChosenRow {
    data: u32,
    bucket: u32,
    row: u32,
}

/// Rows of one bucket.
#[derive(Debug)]
struct ChosenRows {
    data: u32,
    bucket: u32,
    rows: Vec<u32>,
}

impl ChosenRows {
    fn row_refs(&self) -> impl Iterator<Item = RowRef> + '_ {
        self.rows.iter().map(|&row| RowRef { row, pass: 0 })
    }

    /// The chunk count of each row.
    fn count(&self, batcher: &Batcher) -> Result<Vec<u8>> {
        let row_refs: Vec<RowRef> = self.row_refs().collect();
        batcher.count(self.data, self.bucket, &row_refs)
    }

    /// The rows whose chunk count, in `counts`, is `chunks`.
    fn with_chunks(&self, chunks: u8, counts: &[u8]) -> Vec<RowRef> {
        let mut row_refs = Vec::new();
        for (row_ref, &count) in self.row_refs().zip(counts) {
            if count == chunks {
                row_refs.push(row_ref);
            }
        }
        row_refs
    }
}

fn num_rows(count: u64) -> u32 {
    u32::try_from(count).expect("a bucket has fewer than 2^32 rows")
}

/// The settings of a fixed pass.
#[derive(Debug, Clone, Copy)]
struct Fixed {
    micro_batch: usize,
    seed: u64,
    rank: RankOf,
}

impl Fixed {
    fn check(&self) -> Result<()> {
        let Self {
            micro_batch, rank, ..
        } = *self;
        if micro_batch > 0 && rank.rank < rank.ranks {
            return Ok(());
        }
        Err(Error::Invalid {
            what: "test".to_owned(),
            reason: format!(
                "expected a micro-batch of at least 1 and a rank below the ranks, found \
                 {micro_batch}, {rank:?}"
            ),
        })
    }
}

/// A fixed pass over `rows`.
fn fixed_batches(
    sources: &[Source],
    split: Split,
    rows: Vec<ChosenRows>,
    fixed: Fixed,
) -> Result<TestBatches> {
    fixed.check()?;
    let mut undropped = sources.to_vec();
    for source in &mut undropped {
        source.prompt.check()?;
        source.prompt.dropped = 0.0;
    }
    let batcher = Batcher::new(undropped, split, fixed.seed);
    Ok(TestBatches {
        members: group(&batcher, &rows, fixed.micro_batch)?,
        batcher,
        rank: fixed.rank,
        next: 0,
        ready: VecDeque::new(),
    })
}

/// Groups rows by their number of chunks into micro-batches of up to `micro_batch`.
fn group(batcher: &Batcher, rows: &[ChosenRows], micro_batch: usize) -> Result<Vec<Members>> {
    let counted = side_by_side(rows, |rows| rows.count(batcher));
    let mut members = Vec::new();
    let mut first_sample = 0;
    for (rows, counts) in rows.iter().zip(counted) {
        let counts = counts?;
        for chunks in 1..=MAX_CHUNKS as u8 {
            for row_refs in rows.with_chunks(chunks, &counts).chunks(micro_batch) {
                members.push(Members {
                    slot: members.len() as u32,
                    first_sample,
                    data: rows.data,
                    bucket: rows.bucket,
                    row_refs: row_refs.to_vec(),
                });
                first_sample += row_refs.len() as u64;
            }
        }
    }
    Ok(members)
}

/// Concurrent reads of a fixed pass.
const AT_ONCE: usize = 16;

/// Runs `work` on each item, [`AT_ONCE`] at a time, each in a thread that can wait for the network.
/// Returns the results in the items' order.
fn side_by_side<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Vec<Result<R>> {
    let mut results = Vec::with_capacity(items.len());
    for items in items.chunks(AT_ONCE) {
        thread::scope(|scope| {
            let mut threads = Vec::with_capacity(items.len());
            for item in items {
                threads.push(scope.spawn(|| work(item)));
            }
            for thread in threads {
                results.push(thread.join().expect("reading does not panic"));
            }
        });
    }
    results
}

/// One rank's part of a fixed pass, from [`test_batches`] or [`training_batches`].
#[derive(Debug)]
pub struct TestBatches {
    batcher: Batcher,
    members: Vec<Members>,
    rank: RankOf,
    /// The number of the next call.
    next: usize,
    /// Results of that call and those after it, as far as they have been read.
    ready: VecDeque<Result<MicroBatch>>,
}

impl TestBatches {
    /// Number of samples over all ranks.
    pub fn num_samples(&self) -> u64 {
        self.members
            .iter()
            .map(|members| members.row_refs.len() as u64)
            .sum()
    }

    /// Ids of these samples, in the order of the pass.
    ///
    /// # Errors
    /// The errors of reading text.
    pub fn ids(&self) -> Result<Vec<SampleId>> {
        let mut ids = Vec::new();
        for members in &self.members {
            ids.extend(self.batcher.ids(members)?);
        }
        Ok(ids)
    }

    /// Micro-batches of each rank, those of weight 0 included.
    pub fn num_calls(&self) -> usize {
        self.members.len().div_ceil(self.rank.ranks)
    }
}

impl TestBatches {
    /// Reads this rank's micro-batch of a call.
    fn read(&self, call: usize) -> Result<MicroBatch> {
        if let Some(members) = self.members.get(call * self.rank.ranks + self.rank.rank) {
            return self.batcher.assemble(members);
        }
        let last = self
            .members
            .last()
            .expect("a pass with a call has a micro-batch");
        self.batcher.assemble(last).map(|batch| MicroBatch {
            weights: vec![0.0; batch.weights.len()],
            ..batch
        })
    }
}

impl Iterator for TestBatches {
    type Item = Result<MicroBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ready.is_empty() {
            let calls: Vec<usize> = (self.next..self.num_calls()).take(AT_ONCE).collect();
            self.ready = side_by_side(&calls, |&call| self.read(call)).into();
        }
        let batch = self.ready.pop_front()?;
        self.next += 1;
        Some(batch)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.num_calls() - self.next;
        (left, Some(left))
    }
}

impl ExactSizeIterator for TestBatches {}
impl FusedIterator for TestBatches {}
