//! What a plan is asked, and the settings that it may choose. Pure.

use serde::Serialize;

use crate::{
    hardware::{Hardware, Network},
    plan::estimate::UpdateMode,
    ranks::launch::Sharding,
    recipe::{Checked, sections::Checkpointing},
};

/// The hardware and prices that a plan is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Question {
    /// GPU model.
    pub hardware: &'static Hardware,
    /// Number of GPUs; the search takes at most this many.
    pub gpus: usize,
    /// Network between machines.
    pub network: &'static Network,
    /// Share of its peak that one GPU reaches while it recomputes nothing and waits for nothing,
    /// 0 to 1; `None` takes what the published run spent.
    pub mfu: Option<f64>,
    /// Price of one GPU per hour, in any currency.
    pub price_per_gpu_hour: Option<f64>,
    /// Hours that a set-up found by the search may take at most; `None` takes the recipe's own.
    pub within_hours: Option<f64>,
}

impl Question {
    /// Returns the price of one GPU per hour: that of the question, or else the recipe's price
    /// divided by the number of GPUs asked for.
    pub(crate) fn gpu_hour_price(&self, checked: &Checked) -> Option<f64> {
        let of_recipe = checked.recipe.run.price_per_hour;
        self.price_per_gpu_hour
            .or(of_recipe.map(|price| price / self.gpus as f64))
    }
}

/// The settings of a run that change its time and memory, but not the samples of a step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Setup {
    /// Number of GPUs.
    pub gpus: usize,
    /// `train.micro_batch`: samples per micro-batch.
    pub micro_batch: usize,
    /// `train.micro_batches`: micro-batches per step over all ranks.
    pub micro_batches: usize,
    /// `memory.checkpointing`: which blocks are recomputed in the backward pass.
    pub checkpointing: Checkpointing,
    /// `memory.budget_gib`, with `checkpointing = "budget"`.
    pub budget_gib: Option<f64>,
    /// `ranks.sharding`: how state is split over the ranks.
    pub sharding: Sharding,
    /// `optimizer.state` and `train.update_in_backward`.
    #[serde(flatten)]
    pub update: UpdateMode,
}

impl Setup {
    /// Returns the recipe's own settings on `gpus` GPUs.
    pub(crate) fn of_recipe(checked: &Checked, gpus: usize) -> Self {
        let recipe = &checked.recipe;
        Self {
            gpus,
            micro_batch: recipe.train.micro_batch,
            micro_batches: recipe.train.micro_batches,
            checkpointing: recipe.memory.checkpointing,
            budget_gib: recipe.memory.budget_gib,
            sharding: recipe.ranks.sharding,
            update: UpdateMode::of_recipe(recipe),
        }
    }

    /// Returns the bytes of the budget, if there is one.
    pub(crate) fn budget_bytes(&self) -> Option<u64> {
        self.budget_gib.map(|gib| (gib * GIB) as u64)
    }
}

/// Bytes of a GiB.
pub(crate) const GIB: f64 = 1_073_741_824.0;
