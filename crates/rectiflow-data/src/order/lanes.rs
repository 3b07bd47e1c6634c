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

use std::collections::VecDeque;

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
        let (start, end) = (order.epoch_start(epoch), order.epoch_start(epoch + 1));
        let open = open_windows(order.lanes());
        let lanes =
            deal(order, epoch, start..end)
                .into_iter()
                .zip(0..)
                .map(|(mut pieces, lane)| {
                    if epoch == 0 {
                        pieces = grow(order, pieces, open);
                    }
                    let mut waiting = VecDeque::from(pieces);
                    let first = waiting.len().min(open);
                    let open = waiting.drain(..first).map(|piece| (piece, 0)).collect();
                    let rng = Rng::keyed(order.settings().seed, Purpose::Lane, &[epoch, lane]);
                    Lane { waiting, open, rng }
                });
        Self {
            epoch,
            end,
            next: start,
            lanes: lanes.collect(),
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
        let of_lane = |lane: &'_ Lane| -> Vec<Piece> {
            lane.open
                .iter()
                .map(|(piece, _)| *piece)
                .chain(lane.waiting.iter().copied())
                .collect()
        };
        self.lanes.iter().flat_map(of_lane)
    }
}

impl Lane {
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
fn deal(order: &Order, epoch: u64, span: std::ops::Range<u64>) -> Vec<Vec<Piece>> {
    let mut windows: Vec<Piece> = Vec::new();
    let mut owned: Vec<Vec<Piece>> = vec![Vec::new(); order.lanes()];
    for (stream, facts) in (0..).zip(order.streams()) {
        let (mut at, end) = (facts.before_epoch(epoch), facts.before_epoch(epoch + 1));
        while at < end {
            let until = facts.window_of(at).end.min(end);
            let to = facts
                .lane
                .map_or(&mut windows, |lane| &mut owned[lane as usize]);
            to.push(Piece {
                stream,
                first: at,
                len: (until - at) as u32,
            });
            at = until;
        }
    }
    Rng::keyed(order.settings().seed, Purpose::Epoch, &[epoch]).shuffle(&mut windows);
    let num_lanes = order.lanes() as u64;
    // Slots s < n with s mod L == lane.
    let below = |n: u64, lane: u64| n / num_lanes + u64::from(n % num_lanes > lane);
    let mut windows = windows.into_iter();
    let mut left: Option<Piece> = None;
    let fill = |(lane, mut pieces): (u64, Vec<Piece>)| {
        let is_owner = !pieces.is_empty();
        let taken: u64 = pieces.iter().map(|piece| u64::from(piece.len)).sum();
        let mut room = below(span.end, lane) - below(span.start, lane) - taken;
        while room > 0 {
            let mut piece = left
                .take()
                .or_else(|| windows.next())
                .expect("lanes have no more slots than micro-batches");
            if u64::from(piece.len) > room {
                let rest = Piece {
                    first: piece.first + room,
                    len: piece.len - room as u32,
                    ..piece
                };
                piece.len = room as u32;
                left = Some(rest);
            }
            room -= u64::from(piece.len);
            pieces.push(piece);
        }
        if is_owner {
            Rng::keyed(order.settings().seed, Purpose::LaneOrder, &[epoch, lane])
                .shuffle(&mut pieces);
        }
        pieces
    };
    (0..).zip(owned).map(fill).collect()
}

/// Cuts the first windows of a lane into small ones that grow; cuts fall between blocks.
fn grow(order: &Order, pieces: Vec<Piece>, num_windows: usize) -> Vec<Piece> {
    let mut grown = Vec::with_capacity(pieces.len());
    // Parts of all these windows alternate, so that all of a lane's open windows are small at
    // first.
    let mut parts: Vec<VecDeque<Piece>> = Vec::new();
    for piece in &pieces[..num_windows.min(pieces.len())] {
        let mut len = smallest(&order.streams()[piece.stream as usize]);
        let (mut at, end) = (piece.first, piece.first + u64::from(piece.len));
        let mut cut = VecDeque::new();
        while at < end {
            let part = len.min((end - at) as u32);
            cut.push_back(Piece {
                stream: piece.stream,
                first: at,
                len: part,
            });
            at += u64::from(part);
            len = len.saturating_mul(2);
        }
        parts.push(cut);
    }
    while parts.iter().any(|cut| !cut.is_empty()) {
        grown.extend(parts.iter_mut().filter_map(VecDeque::pop_front));
    }
    grown.extend(pieces.into_iter().skip(num_windows));
    grown
}

/// Micro-batches of the smallest window that consists of whole blocks.
fn smallest(stream: &Stream) -> u32 {
    let (block, size) = (u64::from(BLOCK_ROWS), u64::from(stream.size));
    (lcm(block, size) / size) as u32
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
