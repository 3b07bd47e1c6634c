//! `window` and `owned` mode: which lane runs which windows of an epoch, and in which order. Pure.
//!
//! A window's samples lie in a few runs of blocks, so all its micro-batches belong to one lane: no
//! other lane has to read those blocks. The windows of an epoch are shuffled, laid end to end and
//! cut into one piece per lane, exactly as long as the lane has slots in that epoch. A cut can
//! divide a window into two smaller ones, which costs at most one block read twice. An epoch thus
//! holds its own micro-batches and no others, and seeking means computing another epoch. In `owned`
//! mode a lane first receives the windows of its shares, as many as every other lane; the windows
//! of the other streams fill its remaining slots; then its windows are shuffled. A lane keeps a few
//! windows open and draws each micro-batch from one of them at random. In the first epoch a lane's
//! first windows are small and grow, so that the first step needs few bytes.

use std::{collections::VecDeque, vec};

use num_integer::lcm;

use crate::{
    format::block_table::BLOCK_ROWS,
    order::{
        Order,
        stream::{Piece, Stream},
    },
    rng::{Purpose, Rng},
};

/// Windows that a lane keeps open: more of them with few lanes, so that a step mixes buckets.
pub(crate) fn open_windows(lanes: usize) -> usize {
    16usize.div_ceil(lanes).clamp(2, 4)
}

/// One epoch, walked in the order of its slots.
#[derive(Debug)]
pub(crate) struct LaneWalk {
    pub(crate) epoch: u64,
    /// First micro-batch of the next epoch, counted over the run.
    end: u64,
    /// The next micro-batch, counted over the run.
    next: u64,
    lanes: Vec<Lane>,
}

#[derive(Debug)]
struct Lane {
    waiting: VecDeque<Piece>,
    /// Open windows, each with the number of its micro-batches already taken.
    open: Vec<(Piece, u32)>,
    rng: Rng,
}

impl LaneWalk {
    pub(crate) fn new(order: &Order, epoch: u64) -> Self {
        let open = open_windows(order.lanes());
        let mut lanes = Vec::with_capacity(order.lanes());
        for (lane, mut pieces) in (0..).zip(deal(order, epoch)) {
            if epoch == 0 {
                pieces = grow(order, pieces, open);
            }
            let rng = Rng::keyed(order.settings().seed, Purpose::Lane, &[epoch, lane]);
            lanes.push(Lane::new(pieces, open, rng));
        }
        Self {
            epoch,
            end: order.epoch_start(epoch + 1),
            next: order.epoch_start(epoch),
            lanes,
        }
    }

    /// Whether the walk can reach a micro-batch without a restart.
    pub(crate) fn is_ahead(&self, micro_batch: u64) -> bool {
        (self.next..self.end).contains(&micro_batch)
    }

    /// The window of a micro-batch, and its number in the window. Skips everything before it.
    pub(crate) fn take(&mut self, micro_batch: u64) -> (Piece, u32) {
        assert!(
            self.is_ahead(micro_batch),
            "micro-batch {micro_batch} is behind the walk or in another epoch"
        );
        loop {
            let lane = (self.next % self.lanes.len() as u64) as usize;
            let taken = self.lanes[lane].take();
            self.next += 1;
            if self.next > micro_batch {
                return taken;
            }
        }
    }

    /// All windows of the epoch. Correct only before the first micro-batch is taken.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        self.lanes.iter().flat_map(Lane::pieces)
    }
}

impl Lane {
    /// A lane that runs `pieces` and keeps up to `open` of them open.
    fn new(pieces: Vec<Piece>, open: usize, rng: Rng) -> Self {
        let mut waiting = VecDeque::from(pieces);
        let first = waiting.len().min(open);
        let open = waiting.drain(..first).map(|piece| (piece, 0)).collect();
        Self { waiting, open, rng }
    }

    /// Its open windows, then those that wait.
    fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        let open = self.open.iter().map(|(piece, _)| piece);
        open.chain(&self.waiting).copied()
    }

    fn take(&mut self) -> (Piece, u32) {
        let at = self.rng.below(self.open.len() as u64) as usize;
        let (piece, taken) = &mut self.open[at];
        let result = (*piece, *taken);
        *taken += 1;
        if *taken == piece.len {
            match self.waiting.pop_front() {
                Some(next) => self.open[at] = (next, 0),
                None => drop(self.open.swap_remove(at)),
            }
        }
        result
    }
}

/// The windows of an epoch in the order in which they begin, each with its first micro-batch,
/// counted over the run, and its lane.
pub(crate) fn beginnings(order: &Order, epoch: u64) -> impl Iterator<Item = (u64, usize, Piece)> {
    let mut walk = LaneWalk::new(order, epoch);
    let lanes = walk.lanes.len() as u64;
    let begins = move |micro_batch| {
        let (piece, number) = walk.take(micro_batch);
        (number == 0).then_some((micro_batch, (micro_batch % lanes) as usize, piece))
    };
    (order.epoch_start(epoch)..order.epoch_start(epoch + 1)).filter_map(begins)
}

/// The windows of an epoch by lane.
fn deal(order: &Order, epoch: u64) -> Vec<Vec<Piece>> {
    let seed = order.settings().seed;
    let EpochWindows { mut shared, owned } = EpochWindows::new(order, epoch);
    Rng::keyed(seed, Purpose::Epoch, &[epoch]).shuffle(&mut shared);
    let mut shared = Cutter {
        windows: shared.into_iter(),
        rest: None,
    };
    let slots = order.epoch_start(epoch)..order.epoch_start(epoch + 1);
    let num_lanes = owned.len() as u64;
    let mut lanes = Vec::with_capacity(owned.len());
    for (lane, mut pieces) in (0..).zip(owned) {
        let is_owner = !pieces.is_empty();
        let taken: u64 = pieces.iter().map(|piece| u64::from(piece.len)).sum();
        let num_slots =
            slots_before(slots.end, lane, num_lanes) - slots_before(slots.start, lane, num_lanes);
        shared.cut(num_slots - taken, &mut pieces);
        if is_owner {
            Rng::keyed(seed, Purpose::LaneOrder, &[epoch, lane]).shuffle(&mut pieces);
        }
        lanes.push(pieces);
    }
    lanes
}

/// Number of slots s < n with s mod L == lane.
fn slots_before(n: u64, lane: u64, num_lanes: u64) -> u64 {
    n / num_lanes + u64::from(n % num_lanes > lane)
}

/// The windows of an epoch before they are dealt.
struct EpochWindows {
    /// Windows that any lane can run, stream by stream.
    shared: Vec<Piece>,
    /// For each lane, the windows of its shares.
    owned: Vec<Vec<Piece>>,
}

impl EpochWindows {
    fn new(order: &Order, epoch: u64) -> Self {
        let mut windows = Self {
            shared: Vec::new(),
            owned: vec![Vec::new(); order.lanes()],
        };
        for (stream, facts) in (0..).zip(order.streams()) {
            let to = match facts.lane {
                Some(lane) => &mut windows.owned[lane as usize],
                None => &mut windows.shared,
            };
            let end = facts.before_epoch(epoch + 1);
            let mut first = facts.before_epoch(epoch);
            while first < end {
                let until = facts.window_of(first).end.min(end);
                let len = (until - first) as u32;
                to.push(Piece { stream, first, len });
                first = until;
            }
        }
        windows
    }
}

/// Windows laid end to end, to be cut into the parts of lanes.
struct Cutter {
    windows: vec::IntoIter<Piece>,
    /// The rest of a window that a cut has divided.
    rest: Option<Piece>,
}

impl Cutter {
    /// Moves windows of `room` micro-batches in total to `pieces`.
    fn cut(&mut self, mut room: u64, pieces: &mut Vec<Piece>) {
        while room > 0 {
            let mut piece = self
                .rest
                .take()
                .or_else(|| self.windows.next())
                .expect("lanes have no more slots than micro-batches");
            if u64::from(piece.len) > room {
                self.rest = Some(Piece {
                    first: piece.first + room,
                    len: piece.len - room as u32,
                    ..piece
                });
                piece.len = room as u32;
            }
            room -= u64::from(piece.len);
            pieces.push(piece);
        }
    }
}

/// Cuts the first windows of a lane into small ones that grow; cuts fall between blocks.
fn grow(order: &Order, pieces: Vec<Piece>, num_windows: usize) -> Vec<Piece> {
    let mut grown = Vec::with_capacity(pieces.len());
    let mut parts = Vec::new();
    for piece in &pieces[..num_windows.min(pieces.len())] {
        let smallest = smallest(&order.streams()[piece.stream as usize]);
        parts.push(growing_parts(piece, smallest));
    }
    // Parts of all these windows alternate, so that all of a lane's open windows are small at
    // first.
    while parts.iter().any(|parts| !parts.is_empty()) {
        grown.extend(parts.iter_mut().filter_map(VecDeque::pop_front));
    }
    grown.extend(pieces.into_iter().skip(num_windows));
    grown
}

/// The parts of a window: `smallest` micro-batches, then twice as many in each further part.
fn growing_parts(piece: &Piece, smallest: u32) -> VecDeque<Piece> {
    let mut parts = VecDeque::new();
    let mut rest = *piece;
    let mut len = smallest;
    while rest.len > 0 {
        let part = len.min(rest.len);
        parts.push_back(Piece { len: part, ..rest });
        rest.first += u64::from(part);
        rest.len -= part;
        len = len.saturating_mul(2);
    }
    parts
}

/// Micro-batches of the smallest window that consists of whole blocks.
fn smallest(stream: &Stream) -> u32 {
    let size = u64::from(stream.size);
    (lcm(u64::from(BLOCK_ROWS), size) / size) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn least_common_multiples() {
        assert_eq!(
            [lcm(32, 16), lcm(32, 12), lcm(32, 7), lcm(1, 1)],
            [32, 96, 224, 1]
        );
    }

    #[test]
    fn few_lanes_keep_more_windows_open() {
        assert_eq!([1, 4, 8, 16, 64].map(open_windows), [4, 4, 2, 2, 2]);
    }
}
