//! The test pass: every test sample once, in a fixed order, in micro-batches of one chunk count each.
//!
//! The tuples of a test loss must not change from one measurement to the next, nor with the number of ranks: each
//! sample has one prompt for ever, that of pass 0, and none is dropped (a loss without text would tell how many were
//! dropped, not how well prompts are followed). Micro-batch i goes to rank i mod R. Ranks that run short get
//! micro-batches of weight 0, so that all make the same number of calls.

use std::iter::FusedIterator;

use crate::{
    batch::{Batcher, Members, MicroBatch, Source},
    dataset::Split,
    error::{Error, Result},
    order::RankOf,
    prompt::PromptSettings,
    token::MAX_CHUNKS,
    window::Place,
};

/// The test samples of `sources`, each once whatever its amount, as one rank sees them. Micro-batches are of at most
/// `micro_batch` samples of one bucket and one chunk count; `slot` counts them and `first_sample` their samples over
/// all ranks. Draws and tokenises all prompts at once, reads latents as it goes.
///
/// # Errors
/// [`Error::Invalid`] for impossible settings, otherwise what reading text met.
pub fn test_batches(sources: &[Source], micro_batch: usize, seed: u64, rank: RankOf) -> Result<TestBatches> {
    if micro_batch == 0 || rank.rank >= rank.ranks {
        let reason =
            format!("expected a micro-batch of at least 1 and a rank below the ranks, found {micro_batch}, {rank:?}");
        return Err(Error::Invalid { what: "test".to_owned(), reason });
    }
    let fixed = sources
        .iter()
        .map(|source| Source { prompt: PromptSettings { dropped: 0.0, ..source.prompt.clone() }, ..source.clone() });
    let batcher = Batcher::new(fixed.collect(), Split::Test, seed);
    let mut members = Vec::new();
    for (data, source) in (0..).zip(sources) {
        source.prompt.check()?;
        for shape in source.dataset.buckets(Split::Test) {
            let rows = 0..u32::try_from(shape.num_rows).expect("a test split has fewer than 2^32 rows");
            let places: Vec<Place> = rows.map(|row| Place { row, pass: 0 }).collect();
            let counts = batcher.count(data, shape.bucket, &places)?;
            for chunks in 1..=MAX_CHUNKS as u8 {
                let of_count = places.iter().zip(&counts).filter(|(_, count)| **count == chunks);
                let of_count: Vec<Place> = of_count.map(|(place, _)| *place).collect();
                let pieces = of_count.chunks(micro_batch).map(<[Place]>::to_vec);
                members.extend(pieces.map(|places| (data, shape.bucket, places)));
            }
        }
    }
    Ok(TestBatches { batcher, members: number(members), rank, next: 0 })
}

/// Gives micro-batches their slots and first samples.
fn number(members: Vec<(u32, u32, Vec<Place>)>) -> Vec<Members> {
    let mut first_sample = 0;
    let numbered = (0..).zip(members).map(|(slot, (data, bucket, places))| {
        let first = first_sample;
        first_sample += places.len() as u64;
        Members { slot, first_sample: first, data, bucket, places }
    });
    numbered.collect()
}

/// One rank's part of the test pass: see [`test_batches`].
#[derive(Debug)]
pub struct TestBatches {
    batcher: Batcher,
    members: Vec<Members>,
    rank: RankOf,
    next: usize,
}

impl TestBatches {
    /// Test samples over all ranks.
    pub fn num_samples(&self) -> u64 {
        self.members.iter().map(|members| members.places.len() as u64).sum()
    }

    /// Micro-batches that every rank gets, those of weight 0 included.
    pub fn num_calls(&self) -> usize {
        self.members.len().div_ceil(self.rank.ranks)
    }
}

impl Iterator for TestBatches {
    type Item = Result<MicroBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.num_calls() {
            return None;
        }
        let index = self.next * self.rank.ranks + self.rank.rank;
        self.next += 1;
        if let Some(members) = self.members.get(index) {
            return Some(self.batcher.assemble(members));
        }
        let last = self.members.last().expect("there is a call, so there is a micro-batch");
        Some(self.batcher.assemble(last).map(|batch| MicroBatch { weights: vec![0.0; batch.weights.len()], ..batch }))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.num_calls() - self.next;
        (left, Some(left))
    }
}

impl ExactSizeIterator for TestBatches {}
impl FusedIterator for TestBatches {}
