//! What a run writes down of a step, from what was seen of it before its update and how long it took.

use std::collections::BTreeMap;

use rectiflow_data::batch::Step;

use crate::{
    measure::metrics::{Lossless, RankMetrics, StepMetrics},
    ranks::{exchange::Passes, straggler::Slowest, traffic::Traffic},
    state::{Position, TrainState},
};

/// What was known of a step before its update.
pub(super) struct Seen {
    loss: f64,
    gradient_norm: f64,
    norm_by_component: BTreeMap<String, Lossless>,
    lr: f64,
}

impl Seen {
    pub(super) fn of(passes: &Passes, state: &TrainState, lr: f64) -> Self {
        let groups = state.parameters.groups.iter().map(|group| group.component.clone());
        Self {
            loss: passes.loss,
            gradient_norm: passes.gradient_norm,
            norm_by_component: groups.zip(passes.norm_by_group.iter().copied().map(Lossless)).collect(),
            lr,
        }
    }

    /// The metrics of an applied step that ends at `position`, of a rank alone, without arithmetic and money.
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
            ranks: None,
        }
    }
}

/// Seconds of a step, and of what it does before its update.
#[derive(Clone, Copy)]
pub(super) struct StepSecs {
    pub(super) step: f64,
    pub(super) data: f64,
    pub(super) passes: f64,
}

impl StepSecs {
    /// What the step was like for one of several ranks.
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
