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
    error::{Error, Result},
    format::{manifest::Split, record::SampleId},
    load::batch::{Batcher, Members, MicroBatch, Source},
    order::{RankOf, window::RowRef},
    rng::{Purpose, key_u64},
    text::{prompt::PromptSettings, token::MAX_CHUNKS},
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
            rows.push((data, shape.bucket, (0..num_rows(shape.num_rows)).collect()));
        }
    }
    fixed_batches(
        sources,
        Split::Test,
        rows,
        Fixed {
            micro_batch,
            seed,
            rank,
        },
    )
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
    let mut hashed = Vec::new();
    for (data, source) in (0..).zip(sources) {
        for shape in source.dataset.buckets(Split::Train) {
            hashed.extend((0..num_rows(shape.num_rows)).map(|row| {
                let words = [u64::from(data), u64::from(shape.bucket), u64::from(row)];
                (
                    key_u64(seed, Purpose::TestLoss, &words),
                    (data, shape.bucket, row),
                )
            }));
        }
    }
    if count < hashed.len() {
        hashed.select_nth_unstable(count);
        hashed.truncate(count);
    }
    let mut chosen: Vec<(u32, u32, u32)> = hashed.into_iter().map(|(_, row)| row).collect();
    chosen.sort_unstable();
    let of_bucket = chosen.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1));
    let rows = of_bucket
        .map(|rows| (rows[0].0, rows[0].1, rows.iter().map(|row| row.2).collect()))
        .collect();
    fixed_batches(
        sources,
        Split::Train,
        rows,
        Fixed {
            micro_batch,
            seed,
            rank,
        },
    )
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

/// A fixed pass over `rows`, each entry a data set, a bucket and rows of it.
fn fixed_batches(
    sources: &[Source],
    split: Split,
    rows: Vec<(u32, u32, Vec<u32>)>,
    Fixed {
        micro_batch,
        seed,
        rank,
    }: Fixed,
) -> Result<TestBatches> {
    if micro_batch == 0 || rank.rank >= rank.ranks {
        let reason = format!(
            "expected a micro-batch of at least 1 and a rank below the ranks, found {micro_batch}, {rank:?}"
        );
        return Err(Error::Invalid {
            what: "test".to_owned(),
            reason,
        });
    }
    for source in sources {
        source.prompt.check()?;
    }
    let fixed = sources.iter().map(|source| Source {
        prompt: PromptSettings {
            dropped: 0.0,
            ..source.prompt.clone()
        },
        ..source.clone()
    });
    let batcher = Batcher::new(fixed.collect(), split, seed);
    let mut members = Vec::new();
    let counted = side_by_side(&rows, |(data, bucket, rows)| {
        let row_refs: Vec<RowRef> = rows.iter().map(|&row| RowRef { row, pass: 0 }).collect();
        Ok((batcher.count(*data, *bucket, &row_refs)?, row_refs))
    });
    for ((data, bucket, _), counted) in rows.iter().zip(counted) {
        let (data, bucket, (counts, row_refs)) = (*data, *bucket, counted?);
        for chunks in 1..=MAX_CHUNKS as u8 {
            let of_count = row_refs
                .iter()
                .zip(&counts)
                .filter(|(_, count)| **count == chunks);
            let of_count: Vec<RowRef> = of_count.map(|(row_ref, _)| *row_ref).collect();
            let pieces = of_count.chunks(micro_batch).map(<[RowRef]>::to_vec);
            members.extend(pieces.map(|row_refs| (data, bucket, row_refs)));
        }
    }
    Ok(TestBatches {
        batcher,
        members: number(members),
        rank,
        next: 0,
        ready: VecDeque::new(),
    })
}

/// Concurrent reads of a fixed pass.
const AT_ONCE: usize = 16;

/// Runs `work` on each item, [`AT_ONCE`] at a time, each in a thread that can wait for the network.
/// Returns the results in the items' order.
fn side_by_side<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Vec<Result<R>> {
    let run = |items: &[T]| -> Vec<Result<R>> {
        thread::scope(|scope| {
            let threads: Vec<_> = items
                .iter()
                .map(|item| scope.spawn(|| work(item)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("reading does not panic"))
                .collect()
        })
    };
    items.chunks(AT_ONCE).flat_map(run).collect()
}

/// Assigns micro-batches their slots and first samples.
fn number(members: Vec<(u32, u32, Vec<RowRef>)>) -> Vec<Members> {
    let mut first_sample = 0;
    let numbered = (0..).zip(members).map(|(slot, (data, bucket, row_refs))| {
        let first = first_sample;
        first_sample += row_refs.len() as u64;
        Members {
            slot,
            first_sample: first,
            data,
            bucket,
            row_refs,
        }
    });
    numbered.collect()
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
