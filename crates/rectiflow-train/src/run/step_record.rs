//! The metrics of a step, from values known before its update and from its duration.

use std::{collections::BTreeMap, fs};

use rectiflow_data::batch::Step;

use crate::{
    measure::metrics::{Lossless, RankMetrics, StepMetrics},
    ranks::{exchange::Passes, straggler::Slowest, traffic::Traffic},
    state::{Position, TrainState},
};

/// Values of a step that are known before its update.
pub(super) struct Seen {
    loss: f64,
    gradient_norm: f64,
    norm_by_component: BTreeMap<String, Lossless>,
    lr: f64,
}

impl Seen {
    pub(super) fn of(passes: &Passes, state: &TrainState, lr: f64) -> Self {
        let groups = &state.parameters.groups;
        let mut norm_by_component = BTreeMap::new();
        for (group, &norm) in groups.iter().zip(&passes.norm_by_group) {
            norm_by_component.insert(group.component.clone(), Lossless(norm));
        }
        Self {
            loss: passes.loss,
            gradient_norm: passes.gradient_norm,
            norm_by_component,
            lr,
        }
    }

    /// Returns the metrics of an applied step that ends at `position`, for a single rank, without
    /// FLOPs and cost.
    pub(super) fn metrics(self, step: &Step, position: Position, secs: StepSecs) -> StepMetrics {
        StepMetrics {
            step: position.cursor,
            samples: position.samples,
            epoch: step.epoch,
            loss: self.loss,
            gradient_norm: self.gradient_norm,
            norm_by_component: self.norm_by_component,
            lr: self.lr,
            secs: secs.step,
            data_secs: secs.data,
            flops: 0,
            applied: true,
            spent: None,
            resident_bytes: resident_bytes(),
            ranks: None,
        }
    }
}

/// Returns the memory of this process that is resident; `None` where the system does not tell.
fn resident_bytes() -> Option<u64> {
    /// On x86-64.
    const PAGE_BYTES: u64 = 4096;
    let pages = fs::read_to_string("/proc/self/statm").ok()?;
    let resident: u64 = pages.split(' ').nth(1)?.parse().ok()?;
    Some(PAGE_BYTES * resident)
}

/// Seconds of a step, and of its parts before the update.
#[derive(Clone, Copy)]
pub(super) struct StepSecs {
    pub(super) step: f64,
    pub(super) data: f64,
    pub(super) passes: f64,
}

impl StepSecs {
    /// Returns this rank's share of the step, where there are several ranks.
    pub(super) fn rank_metrics(&self, traffic: Traffic, slowest: Option<Slowest>) -> RankMetrics {
        RankMetrics {
            passes_secs: self.passes,
            communication_secs: traffic.secs,
            hidden_secs: traffic.hidden_secs,
            update_secs: self.step - self.data - self.passes - traffic.secs,
            bytes: traffic.bytes,
            slowest,
        }
    }
}
