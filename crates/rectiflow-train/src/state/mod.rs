//! Everything that changes during training, as one value: exactly what a resume needs.

pub(crate) mod eight_bit;
pub mod ema;
pub mod flat;
pub(crate) mod gradient_clip;
pub(crate) mod gradient_vector;
pub(crate) mod gradients;
pub(crate) mod halves;
pub mod layout;
pub mod masters;
pub mod moments;
pub(crate) mod on_device;
pub(crate) mod one_pass;
pub mod optim;
pub mod partition;
pub(crate) mod plain;
pub mod precision;
pub mod tensor_norms;
pub(crate) mod tensor_updates;
pub(crate) mod workers;

use std::ops::Range;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    lr::LrRatios,
    state::{
        flat::FlatParameters,
        optim::{Optimizer, UpdateRange},
        tensor_norms::NormMean,
    },
};

/// Progress of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Steps of the order that have been consumed; the index of the next step to read.
    pub cursor: u64,
    /// Number of updates. Smaller than the cursor if batches were skipped.
    pub update: u64,
    /// Samples in these updates. The learning rate and the end of the run depend on this number, so
    /// skipped and rewound samples are made up for by those that follow.
    pub samples: u64,
}

/// The state of a run between two steps.
#[derive(Debug)]
pub struct TrainState {
    /// Progress of the run.
    pub position: Position,
    /// The trained parameters, and the masters of those that this rank updates, which may be all.
    pub parameters: FlatParameters,
    /// Optimiser state of the parameters that this rank updates.
    pub optimizer: Optimizer,
    /// For each group of the parameters, the number of updates before its moments started from
    /// zero: 0, or later if a branch began to train the group.
    pub moments_from: Vec<u64>,
    /// Average of the parameters that this rank updates, `[k]` fp32, if one is kept.
    pub average: Option<Tensor>,
    /// The usual norm of each tensor's gradient, in order; empty without
    /// `train.update_in_backward`.
    pub tensor_norms: Vec<NormMean>,
    /// Steps of the order that the guard skipped, sorted and without overlap.
    pub passed_over: Vec<Range<u64>>,
}

impl TrainState {
    /// Returns the ranges of the next update at rate `lr`: one for each group, or one for each
    /// tensor if the optimiser works by tensor. Each is restricted to this rank's elements and
    /// counted within them. The position must already include that update.
    pub(crate) fn update_ranges(&self, lr: f64, ratios: &LrRatios) -> Vec<UpdateRange> {
        let mut ranges = Vec::new();
        for (group, from) in self.parameters.groups.iter().zip(&self.moments_from) {
            let rate = lr * ratios.of(&group.component);
            let update = self.position.update - from;
            if !self.optimizer.works_by_tensor() {
                ranges.push(self.update_range(&group.range, rate, update));
                continue;
            }
            for slice in &self.parameters.slices {
                if group.range.contains(&slice.range.start) {
                    ranges.push(self.update_range(&slice.range, rate, update));
                }
            }
        }
        ranges
    }

    /// Returns the range of each tensor in the next update at rate `lr`. The position must not yet
    /// include that update.
    pub(crate) fn tensor_ranges(&self, lr: f64, ratios: &LrRatios) -> Vec<UpdateRange> {
        let mut ranges = Vec::new();
        for (group, from) in self.parameters.groups.iter().zip(&self.moments_from) {
            let rate = lr * ratios.of(&group.component);
            let update = self.position.update + 1 - from;
            for slice in &self.parameters.slices {
                if group.range.contains(&slice.range.start) {
                    ranges.push(self.update_range(&slice.range, rate, update));
                }
            }
        }
        ranges
    }

    fn update_range(&self, whole: &Range<i64>, rate: f64, update: u64) -> UpdateRange {
        UpdateRange {
            range: self.parameters.own_part(whole),
            whole: whole.end - whole.start,
            rate,
            update,
        }
    }

    /// Moves the cursor behind `steps` and records that the guard skipped them.
    pub(crate) fn pass_over(&mut self, mut steps: Range<u64>) {
        self.position.cursor = steps.end;
        // After a rewind, the range may overlap earlier ones.
        while let Some(last) = self.passed_over.pop_if(|last| last.end >= steps.start) {
            steps = steps.start.min(last.start)..steps.end.max(last.end);
        }
        self.passed_over.push(steps);
    }
}
