//! Everything that changes during training, as one value: what a resume needs is what is in here.

pub mod ema;
pub mod flat;
pub(crate) mod gradient_vector;
pub(crate) mod gradients;
pub mod layout;
pub(crate) mod one_pass;
pub mod optim;
pub mod partition;
pub mod precision;
pub(crate) mod workers;
pub(crate) mod write;

use std::ops::Range;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    lr::LrRatios,
    state::{
        flat::FlatParameters,
        optim::{Optimizer, UpdateRange},
    },
};

/// How far a run is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Steps of the order that have been passed: the next step to read.
    pub cursor: u64,
    /// Updates made. It falls behind the cursor where batches are passed over.
    pub update: u64,
    /// Samples that these updates were made of. The learning rate and the end of the run go by it: what is passed over
    /// or undone by a rewind is made up for with the samples that follow.
    pub samples: u64,
}

/// The state of a run between two steps.
#[derive(Debug)]
pub struct TrainState {
    /// How far the run is.
    pub position: Position,
    /// The trained parameters, and the masters of those that this rank updates: all of them, or its part.
    pub parameters: FlatParameters,
    /// The optimiser's memory of what this rank updates.
    pub optimizer: Optimizer,
    /// For each group of the parameters, the number of updates that were made when its moments were zero: 0, or where
    /// a branch began to train it.
    pub moments_from: Vec<u64>,
    /// Average of what this rank updates, fp32, where one is kept.
    pub average: Option<Tensor>,
    /// Steps of the order that the guard passed over, in order, without overlap.
    pub passed_over: Vec<Range<u64>>,
}

impl TrainState {
    /// What the optimiser works on in the next update at rate `lr`: the groups, or each tensor where it works by
    /// tensor; of each what is this rank's, counted among what it owns. The position must already count
    /// that update.
    pub(crate) fn update_ranges(&self, lr: f64, ratios: &LrRatios) -> Vec<UpdateRange> {
        let mut ranges = Vec::new();
        for (group, from) in self.parameters.groups.iter().zip(&self.moments_from) {
            let (rate, update) = (lr * ratios.of(&group.component), self.position.update - from);
            let of = |whole: &Range<i64>| UpdateRange {
                range: self.parameters.own_part(whole),
                whole: whole.end - whole.start,
                rate,
                update,
            };
            if self.optimizer.works_by_tensor() {
                let inside = self.parameters.slices.iter().filter(|slice| group.range.contains(&slice.range.start));
                ranges.extend(inside.map(|slice| of(&slice.range)));
            } else {
                ranges.push(of(&group.range));
            }
        }
        ranges
    }

    /// Goes on behind the steps `steps`, and notes that the guard passed over them.
    pub(crate) fn pass_over(&mut self, mut steps: Range<u64>) {
        self.position.cursor = steps.end;
        // A rewind may reach behind earlier ranges.
        while let Some(last) = self.passed_over.pop_if(|last| last.end >= steps.start) {
            steps = steps.start.min(last.start)..steps.end.max(last.end);
        }
        self.passed_over.push(steps);
    }
}
