//! Steps: the shuffled micro-batches of all epochs, one after the other, A per step.
//!
//! An epoch's list holds one shuffled index per micro-batch (4 bytes); arithmetic maps an index to
//! a stream and a micro-batch of it. Two lists are kept, because a step can straddle two epochs.
//! Seeking means computing another list. In `window` and `owned` mode the windows of an epoch
//! replace the list (`lanes`), and memory is proportional to their number.

use std::{ops::Range, sync::Arc};

use crate::{
    order::{Order, lanes::LaneWalk, stream::Slot},
    rng::{Purpose, Rng},
};

/// All slots of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepPlan {
    /// The step, from 0.
    pub step: u64,
    /// The epoch of its first micro-batch.
    pub epoch: u64,
    /// Samples of the step, over all ranks.
    pub num_samples: u64,
    /// Its A slots.
    pub slots: Vec<Slot>,
}

/// Plans the steps of an order, in any sequence; ascending is fastest.
#[derive(Debug)]
pub struct Steps {
    order: Arc<Order>,
    /// Lists of `local` mode, at most two.
    epochs: Vec<Epoch>,
    /// The epoch of `window` and `owned` mode.
    lanes: Option<LaneWalk>,
}

impl Steps {
    /// The steps of `order`.
    pub fn new(order: Arc<Order>) -> Self {
        Self {
            order,
            epochs: Vec::new(),
            lanes: None,
        }
    }

    /// The slots of a step.
    pub fn plan(&mut self, step: u64) -> StepPlan {
        let num_slots = self.order.settings().micro_batches as u64;
        let mut slots = Vec::with_capacity(num_slots as usize);
        let mut num_samples = 0;
        for slot in 0..num_slots {
            let slot = self.slot(step * num_slots + slot, slot as u32, num_samples);
            num_samples += u64::from(slot.size);
            slots.push(slot);
        }
        StepPlan {
            step,
            epoch: slots[0].epoch,
            num_samples,
            slots,
        }
    }

    /// Micro-batch `micro_batch` of the run: slot `slot` of its step, after `first_sample` samples.
    fn slot(&mut self, micro_batch: u64, slot: u32, first_sample: u64) -> Slot {
        let place = if self.order.settings().mode.has_windows() {
            self.place_in_lanes(micro_batch)
        } else {
            self.place_in_list(micro_batch)
        };
        let Place {
            epoch,
            stream,
            index,
            window,
        } = place;
        Slot {
            slot,
            epoch,
            stream,
            index,
            window_first: window.start,
            window_len: (window.end - window.start) as u32,
            size: self.order.streams()[stream as usize].size,
            first_sample,
        }
    }

    /// The place of a micro-batch of `local` mode.
    fn place_in_list(&mut self, micro_batch: u64) -> Place {
        let epoch = self.epoch_with(micro_batch);
        let number = epoch.epoch;
        let (stream, index) = epoch.locate(micro_batch);
        Place {
            epoch: number,
            stream,
            index,
            window: self.order.streams()[stream as usize].window_of(index),
        }
    }

    /// The place of a micro-batch of `window` or `owned` mode.
    fn place_in_lanes(&mut self, micro_batch: u64) -> Place {
        let walk = match self.lanes.take() {
            Some(walk) if walk.is_ahead(micro_batch) => walk,
            _ => LaneWalk::new(&self.order, self.order.epoch_of(micro_batch)),
        };
        let walk = self.lanes.insert(walk);
        let (piece, number) = walk.take(micro_batch);
        Place {
            epoch: walk.epoch,
            stream: piece.stream,
            index: piece.first + u64::from(number),
            window: piece.first..piece.first + u64::from(piece.len),
        }
    }

    fn epoch_with(&mut self, micro_batch: u64) -> &Epoch {
        let known = self
            .epochs
            .iter()
            .position(|epoch| epoch.holds(micro_batch));
        if let Some(at) = known {
            return &self.epochs[at];
        }
        if self.epochs.len() == 2 {
            self.epochs.remove(0);
        }
        let number = self.order.epoch_of(micro_batch);
        self.epochs.push(Epoch::new(&self.order, number));
        &self.epochs[self.epochs.len() - 1]
    }
}

/// A micro-batch's stream, its number there, and the micro-batches of its window.
struct Place {
    epoch: u64,
    stream: u32,
    index: u64,
    window: Range<u64>,
}

/// The shuffled list of one epoch.
#[derive(Debug)]
struct Epoch {
    epoch: u64,
    /// Micro-batches of the run before this epoch.
    start: u64,
    shuffled: Vec<u32>,
    /// For each stream, micro-batches of this epoch in the streams before it; then the total.
    ends: Vec<u64>,
    /// For each stream, its micro-batches in the earlier epochs.
    before: Vec<u64>,
}

impl Epoch {
    fn new(order: &Order, epoch: u64) -> Self {
        let mut ends = vec![0];
        for count in order.epoch_counts(epoch) {
            ends.push(ends[ends.len() - 1] + count);
        }
        let total = u32::try_from(ends[ends.len() - 1])
            .expect("Order::new bounds the micro-batches of an epoch");
        let shuffled =
            Rng::keyed(order.settings().seed, Purpose::Epoch, &[epoch]).permutation(total);
        let before = order
            .streams()
            .iter()
            .map(|stream| stream.before_epoch(epoch))
            .collect();
        Self {
            epoch,
            start: order.epoch_start(epoch),
            shuffled,
            ends,
            before,
        }
    }

    fn holds(&self, micro_batch: u64) -> bool {
        micro_batch >= self.start && micro_batch - self.start < self.shuffled.len() as u64
    }

    /// The stream of a micro-batch of this epoch, and its number there.
    fn locate(&self, micro_batch: u64) -> (u32, u64) {
        let index = u64::from(self.shuffled[(micro_batch - self.start) as usize]);
        let stream = self.ends.partition_point(|end| *end <= index) - 1;
        (
            stream as u32,
            self.before[stream] + index - self.ends[stream],
        )
    }
}
