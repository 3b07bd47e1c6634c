//! Windows: which samples a micro-batch holds, so that prompts of one length meet.
//!
//! A stream is cut into windows of whole micro-batches, at most as long as a pass. Inside a window samples are sorted
//! by their number of 75-token chunks (ties by the window's permutation), cut into micro-batches, and those shuffled.
//! So chunk counts are exact, at most two micro-batches of a window are mixed, and how many there are never depends on
//! text. Text is known to this file only as a function that counts chunks.
//!
//! Memory: in an epoch 4 bytes a sample for rows and 1 for counts, of the buckets touched; counting is done once a
//! window as long as the walk stays in ascending order.

use std::{collections::HashMap, sync::Arc};

use crate::{
    error::Result,
    order::{Order, Stream},
    rng::{Purpose, Rng},
};

/// A sample's occurrence in its bucket's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// Row in the bucket.
    pub row: u32,
    /// The pass, from 0: a sample occurs once in each.
    pub pass: u64,
}

/// Resolves micro-batches to samples.
#[derive(Debug)]
pub struct Windows {
    order: Arc<Order>,
    streams: Vec<StreamWindows>,
}

/// What is remembered of a stream.
#[derive(Debug, Default)]
struct StreamWindows {
    /// First position in the stream whose row is in `rows`.
    start: u64,
    rows: Vec<u32>,
    /// Chunk counts of the windows asked for, by window, in stream order.
    counts: HashMap<u64, Box<[u8]>>,
}

impl Windows {
    /// The windows of `order`.
    pub fn new(order: Arc<Order>) -> Self {
        let streams = order.streams().iter().map(|_| StreamWindows::default()).collect();
        Self { order, streams }
    }

    /// The samples of a stream's micro-batch `index`, which belongs to `epoch`. `count` gives the chunk counts of all
    /// samples of a window; it is not asked where all of them end up in one micro-batch.
    ///
    /// # Errors
    /// Those of `count`.
    pub fn samples<F>(&mut self, stream: u32, index: u64, epoch: u64, count: F) -> Result<Vec<Place>>
    where
        F: FnOnce(&Stream, &[Place]) -> Result<Vec<u8>>,
    {
        let facts = &self.order.streams()[stream as usize];
        let state = &mut self.streams[stream as usize];
        let seed = self.order.settings().seed;
        let window = index / facts.window;
        state.cover(seed, facts, window, epoch);
        let places = state.places(facts, window);
        let counts = match state.counts.get(&window) {
            _ if facts.window == 1 => &vec![1; places.len()].into_boxed_slice(),
            Some(counts) => counts,
            None => {
                let counts = count(facts, &places)?;
                assert_eq!(counts.len(), places.len(), "one chunk count a sample");
                state.counts.entry(window).or_insert(counts.into_boxed_slice())
            }
        };
        let arranged = arrange(seed, facts, window, counts);
        let within = (index % facts.window) as usize * facts.size as usize;
        Ok(arranged[within..within + facts.size as usize].iter().map(|&at| places[at as usize]).collect())
    }
}

impl StreamWindows {
    /// Computes the rows of all windows of `epoch`, unless they hold `window` already.
    fn cover(&mut self, seed: u64, stream: &Stream, window: u64, epoch: u64) {
        let samples = stream.window * u64::from(stream.size);
        let end = self.start + self.rows.len() as u64;
        if self.start <= window * samples && (window + 1) * samples <= end {
            return;
        }
        let first = stream.before_epoch(epoch) / stream.window;
        let past = stream.before_epoch(epoch + 1).div_ceil(stream.window);
        debug_assert!((first..past).contains(&window), "the micro-batch belongs to this epoch");
        self.start = first * samples;
        self.rows.clear();
        self.rows.reserve_exact(((past - first) * samples) as usize);
        let mut position = self.start;
        while position < past * samples {
            let (pass, from) = (position / stream.rows, position % stream.rows);
            let until = stream.rows.min(from + past * samples - position);
            let words = [u64::from(stream.data), u64::from(stream.bucket), pass];
            let permutation = Rng::keyed(seed, Purpose::Pass, &words).permutation(stream.rows as u32);
            self.rows.extend_from_slice(&permutation[from as usize..until as usize]);
            position += until - from;
        }
        self.counts.retain(|window, _| (first..past).contains(window));
    }

    fn places(&self, stream: &Stream, window: u64) -> Vec<Place> {
        let samples = stream.window * u64::from(stream.size);
        let positions = window * samples..(window + 1) * samples;
        let row = |position: u64| self.rows[(position - self.start) as usize];
        positions.map(|position| Place { row: row(position), pass: position / stream.rows }).collect()
    }
}

/// Indices into a window in the order of its micro-batches.
fn arrange(seed: u64, stream: &Stream, window: u64, counts: &[u8]) -> Vec<u32> {
    let words = [u64::from(stream.data), u64::from(stream.bucket), window];
    let mut rng = Rng::keyed(seed, Purpose::Window, &words);
    let mut sorted = rng.permutation(counts.len() as u32);
    sorted.sort_by_key(|&at| counts[at as usize]);
    let size = stream.size as usize;
    let order = rng.permutation(stream.window as u32);
    order.into_iter().flat_map(|at| sorted[at as usize * size..][..size].iter().copied()).collect()
}
