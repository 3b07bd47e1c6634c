//! Windows: which samples a micro-batch holds, so that prompts of one length are grouped.
//!
//! A stream is cut into windows of whole micro-batches, at most as long as a pass (in `window` mode
//! at most a micro-batch longer). Inside a window samples are sorted by their number of 75-token
//! chunks (ties by the window's permutation) and cut into micro-batches, which are then shuffled.
//! So chunk counts are exact, at most two micro-batches of a window are mixed, and the number of
//! micro-batches never depends on text. This file sees text only through a function that counts
//! chunks.
//!
//! Memory per epoch: 1 byte per sample for counts, in `local` mode 4 more for rows, of the buckets
//! in use; in `window` mode 8 bytes per run of blocks; in `owned` mode up to 8 bytes per sample of
//! the lanes in use. Chunks are counted once per window if slots are resolved in ascending order.

use std::{collections::HashMap, ops::Range, sync::Arc};

use crate::{
    error::Result,
    order::{
        Order,
        pass::{Pass, RowSpan, pass_rng},
        stream::{Mode, Piece, Slot, Stream, split_passes},
    },
    rng::{Purpose, Rng},
};

/// A sample's occurrence in its bucket's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RowRef {
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

/// The state of one stream between calls.
#[derive(Debug, Default)]
struct StreamWindows {
    /// `local` mode: the first position in the stream whose row is in `rows`.
    start: u64,
    rows: Vec<u32>,
    /// `window` mode, and the first pass of `owned` mode: the orders of the last passes used.
    passes: Vec<(u64, Pass)>,
    /// `owned` mode: positions in the share, in the order of each of the last passes used.
    permutations: Vec<(u64, Vec<u32>)>,
    /// Chunk counts of the windows used in `epoch`, by first micro-batch and length, in stream
    /// order.
    counts: HashMap<(u64, u32), Vec<u8>>,
    epoch: u64,
}

/// A window can need the remainder of the pass before, and an epoch need not be a whole pass.
const PASSES_KEPT: usize = 3;

impl Windows {
    /// The windows of `order`.
    pub fn new(order: Arc<Order>) -> Self {
        let streams = order
            .streams()
            .iter()
            .map(|_| StreamWindows::default())
            .collect();
        Self { order, streams }
    }

    /// The samples of a slot. `count` returns the chunk counts of all samples of a window; it is
    /// not called if the window is a single micro-batch.
    ///
    /// # Errors
    /// The errors of `count`.
    pub fn samples<F>(&mut self, slot: &Slot, count: F) -> Result<Vec<RowRef>>
    where
        F: FnOnce(&Stream, &[RowRef]) -> Result<Vec<u8>>,
    {
        let row_refs = self.row_refs(slot);
        let known = self.streams[slot.stream as usize].take_counts(slot);
        let counts = match known {
            Some(counts) => counts,
            None => self.counts(slot, &row_refs, count)?,
        };
        let arranged = self.arrange(slot, &row_refs, &counts);
        if slot.window_len > 1 {
            let key = (slot.window_first, slot.window_len);
            let state = &mut self.streams[slot.stream as usize];
            state.counts.insert(key, counts);
        }
        let within = (slot.index - slot.window_first) as usize * slot.size as usize;
        Ok(arranged[within..within + slot.size as usize].to_vec())
    }

    /// The samples of a slot's window in the order of its micro-batches. Keeps no chunk counts.
    pub(crate) fn arranged<F>(&mut self, slot: &Slot, count: F) -> Result<Vec<RowRef>>
    where
        F: FnOnce(&Stream, &[RowRef]) -> Result<Vec<u8>>,
    {
        let row_refs = self.row_refs(slot);
        let counts = self.counts(slot, &row_refs, count)?;
        Ok(self.arrange(slot, &row_refs, &counts))
    }

    /// The chunk counts of a window, from `count` unless it is a single micro-batch.
    fn counts<F>(&self, slot: &Slot, row_refs: &[RowRef], count: F) -> Result<Vec<u8>>
    where
        F: FnOnce(&Stream, &[RowRef]) -> Result<Vec<u8>>,
    {
        if slot.window_len == 1 {
            return Ok(vec![1; row_refs.len()]);
        }
        count(&self.order.streams()[slot.stream as usize], row_refs)
    }

    fn arrange(&self, slot: &Slot, row_refs: &[RowRef], counts: &[u8]) -> Vec<RowRef> {
        assert_eq!(counts.len(), row_refs.len(), "one chunk count per sample");
        let facts = &self.order.streams()[slot.stream as usize];
        let arranged = arrange(self.order.settings().seed, facts, slot, counts);
        arranged
            .into_iter()
            .map(|at| row_refs[at as usize])
            .collect()
    }

    /// The samples of a slot's window in the order of the stream. They do not depend on text.
    pub(crate) fn row_refs(&mut self, slot: &Slot) -> Vec<RowRef> {
        let facts = self.order.streams()[slot.stream as usize];
        if facts.mode.has_windows() {
            return self.row_refs_of(&Piece {
                stream: slot.stream,
                first: slot.window_first,
                len: slot.window_len,
            });
        }
        let window = slot.window_first / facts.window;
        let state = &mut self.streams[slot.stream as usize];
        state.cover(self.order.settings().seed, &facts, window, slot.epoch);
        state.row_refs(&facts, window)
    }

    /// The samples of a window of `window` or `owned` mode.
    pub(crate) fn row_refs_of(&mut self, piece: &Piece) -> Vec<RowRef> {
        let facts = self.order.streams()[piece.stream as usize];
        let mut row_refs = Vec::with_capacity(piece.len as usize * facts.size as usize);
        for (pass, positions) in facts.positions(piece.first..piece.first + u64::from(piece.len)) {
            if facts.mode == Mode::Owned && pass > 0 {
                let rows = self.permuted_rows(piece.stream, pass, positions);
                row_refs.extend(rows.into_iter().map(|row| RowRef { row, pass }));
                continue;
            }
            for span in self.pass_spans(piece.stream, pass, positions) {
                row_refs.extend(span.rows.map(|row| RowRef { row, pass }));
            }
        }
        row_refs
    }

    /// The rows at `positions` of a later pass over a share.
    fn permuted_rows(&mut self, stream: u32, pass: u64, positions: Range<u64>) -> Vec<u32> {
        let facts = &self.order.streams()[stream as usize];
        let layout = self.order.layout(stream);
        let state = &mut self.streams[stream as usize];
        let permutation = state.permutation(self.order.settings().seed, facts, pass);
        permutation[positions.start as usize..positions.end as usize]
            .iter()
            .map(|&position| layout.row(position))
            .collect()
    }

    /// The rows of a window of blocks, in any pass but a later one over a share.
    pub(crate) fn spans(&mut self, piece: &Piece) -> Vec<RowSpan> {
        let facts = self.order.streams()[piece.stream as usize];
        let mut spans = Vec::new();
        for (pass, positions) in facts.positions(piece.first..piece.first + u64::from(piece.len)) {
            spans.extend(self.pass_spans(piece.stream, pass, positions));
        }
        spans
    }

    fn pass_spans(&mut self, stream: u32, pass: u64, positions: Range<u64>) -> Vec<RowSpan> {
        let layout = self.order.layout(stream);
        let passes = &mut self.streams[stream as usize].passes;
        let known = passes.iter().position(|(number, _)| *number == pass);
        let at = known.unwrap_or_else(|| {
            if passes.len() == PASSES_KEPT {
                passes.remove(0);
            }
            let facts = &self.order.streams()[stream as usize];
            passes.push((pass, layout.pass(self.order.settings().seed, facts, pass)));
            passes.len() - 1
        });
        passes[at].1.spans(layout, positions).collect()
    }
}

impl StreamWindows {
    /// The order of a later pass over a share.
    fn permutation(&mut self, seed: u64, stream: &Stream, pass: u64) -> &[u32] {
        let known = self
            .permutations
            .iter()
            .position(|(number, _)| *number == pass);
        if let Some(at) = known {
            return &self.permutations[at].1;
        }
        // Keep those of one epoch and of the beginning of the next.
        if self.permutations.len() as u64 > stream.repeats_millionths.div_ceil(1_000_000) {
            self.permutations.remove(0);
        }
        assert!(stream.lane.is_some(), "a share belongs to a lane");
        let permutation = pass_rng(seed, stream, pass).permutation(stream.rows as u32);
        self.permutations.push((pass, permutation));
        &self.permutations[self.permutations.len() - 1].1
    }

    /// Takes the chunk counts of a slot's window, if they are known. Forgets those of other epochs.
    fn take_counts(&mut self, slot: &Slot) -> Option<Vec<u8>> {
        if self.epoch != slot.epoch {
            self.epoch = slot.epoch;
            self.counts.clear();
        }
        self.counts.remove(&(slot.window_first, slot.window_len))
    }

    /// Computes the rows of all windows of `epoch`, unless `rows` covers `window` already.
    fn cover(&mut self, seed: u64, stream: &Stream, window: u64, epoch: u64) {
        let samples = stream.window * u64::from(stream.size);
        let end = self.start + self.rows.len() as u64;
        if self.start <= window * samples && (window + 1) * samples <= end {
            return;
        }
        let first = stream.before_epoch(epoch) / stream.window;
        let past = stream.before_epoch(epoch + 1).div_ceil(stream.window);
        debug_assert!(
            (first..past).contains(&window),
            "the micro-batch belongs to this epoch"
        );
        self.start = first * samples;
        self.rows.clear();
        self.rows.reserve_exact(((past - first) * samples) as usize);
        for (pass, positions) in split_passes(self.start..past * samples, stream.rows, 0) {
            let permutation = pass_rng(seed, stream, pass).permutation(stream.rows as u32);
            let positions = positions.start as usize..positions.end as usize;
            self.rows.extend_from_slice(&permutation[positions]);
        }
    }

    fn row_refs(&self, stream: &Stream, window: u64) -> Vec<RowRef> {
        let samples = stream.window * u64::from(stream.size);
        let first = window * samples;
        let rows = &self.rows[(first - self.start) as usize..][..samples as usize];
        let mut row_refs = Vec::with_capacity(rows.len());
        for (position, &row) in (first..).zip(rows) {
            let pass = position / stream.rows;
            row_refs.push(RowRef { row, pass });
        }
        row_refs
    }
}

/// Indices into a window in the order of its micro-batches.
fn arrange(seed: u64, stream: &Stream, slot: &Slot, counts: &[u8]) -> Vec<u32> {
    // Windows of `local` mode are numbered; those of other modes differ in length, so their first
    // micro-batch is the key.
    let key = if stream.mode.has_windows() {
        slot.window_first
    } else {
        slot.window_first / stream.window
    };
    let mut words = vec![u64::from(stream.data), u64::from(stream.bucket), key];
    words.extend(stream.lane.map(u64::from));
    let mut rng = Rng::keyed(seed, Purpose::Window, &words);
    let mut sorted = rng.permutation(counts.len() as u32);
    sorted.sort_by_key(|&at| counts[at as usize]);
    let size = stream.size as usize;
    let mut arranged = Vec::with_capacity(sorted.len());
    for micro_batch in rng.permutation(slot.window_len) {
        arranged.extend_from_slice(&sorted[micro_batch as usize * size..][..size]);
    }
    arranged
}
