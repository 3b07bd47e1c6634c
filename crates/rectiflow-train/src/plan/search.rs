//! The cheapest set-up of a run that fits the GPU, beside the recipe's own. Pure.
//!
//! What is searched: the micro-batch, with the samples of a step kept; which blocks are recomputed;
//! how state is split; and the number of ranks, up to those asked for. Fewer ranks always cost less
//! and take longer, so that a limit on the hours belongs to the question; without one it is the
//! recipe's own hours. If nothing fits, smaller ways to update are tried, which change what a run
//! learns (`UpdateMode`): moments in 8 bits, then updates in the backward pass as well, where one
//! micro-batch has all samples of a step. Set-ups whose prices differ by less than the model can
//! tell apart are chosen between by the larger micro-batch, of which less is assumed.

use std::cmp::Ordering;

use serde::Serialize;

use crate::{
    plan::{
        estimate::UpdateMode,
        facts::Facts,
        gpu_memory::RUNTIME_BYTES,
        planner::{Planner, Time},
        setup::{GIB, Question, Setup},
    },
    ranks::launch::Sharding,
    recipe::{Checked, sections::Checkpointing},
    state::{moments::MomentsKind, optim::OptimizerName},
};

/// Share of a GPU's memory that a set-up leaves free for what is not counted: losses of the
/// allocator, workspaces of the libraries. Assumed.
pub const FREE_SHARE: f64 = 0.05;
/// Set-ups that cost at most this share more than the cheapest are as good. Assumed.
const SAME_PRICE: f64 = 0.01;
/// Micro-batches that are tried, as multiples of the recipe's, in sixteenths.
const SIXTEENTHS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
/// The largest micro-batch that is tried, unless the recipe's own is larger.
const LARGEST: usize = 256;
const SHARDINGS: [Sharding; 3] = [Sharding::Once, Sharding::Each, Sharding::None];

/// A set-up with its predicted time and memory.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Priced {
    /// The settings.
    #[serde(flatten)]
    pub setup: Setup,
    /// Number of blocks that are recomputed in the backward pass.
    pub recomputed_blocks: usize,
    /// Memory of one GPU.
    pub memory_bytes: f64,
    /// Time and money.
    pub time: Time,
}

/// What the search found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Setups {
    /// The recipe's own set-up, whether it fits or not.
    pub recipe: Priced,
    /// The cheapest that fits; `None` if none does.
    pub cheapest: Option<Priced>,
    /// Hours that it may take at most.
    pub within_hours: f64,
    /// Memory of one GPU that it may take at most.
    pub within_bytes: f64,
    /// Number of blocks that can be recomputed.
    pub num_blocks: usize,
}

impl Priced {
    pub(crate) fn of(planner: &Planner<'_>) -> Self {
        Self {
            setup: planner.setup,
            recomputed_blocks: planner.facts.num_recomputed(&planner.memory.recomputed),
            memory_bytes: planner.memory.total_bytes(),
            time: planner.time(),
        }
    }

    /// Returns what is minimised: GPU-hours, which are proportional to money.
    fn price(&self) -> f64 {
        self.time.gpu_hours
    }

    /// Compares two set-ups of the same price: the one with fewer hours first, then that with the
    /// larger micro-batch, then that which waits less for the links.
    fn better_first(&self, other: &Self) -> Ordering {
        let more_gpus = other.setup.gpus.cmp(&self.setup.gpus);
        let larger = other.setup.micro_batch.cmp(&self.setup.micro_batch);
        let hours = |of: &Self| of.time.simulated_hours;
        more_gpus
            .then(larger)
            .then(self.price().total_cmp(&other.price()))
            .then(hours(self).total_cmp(&hours(other)))
    }
}

/// Searches the set-ups beside that of `recipe`.
pub(crate) fn search(recipe: &Planner<'_>) -> Setups {
    let own = Priced::of(recipe);
    let limits = Search {
        checked: recipe.checked,
        facts: recipe.facts,
        question: recipe.question,
        // The recipe's own hours are a limit that its own set-up meets.
        within_hours: recipe
            .question
            .within_hours
            .unwrap_or(own.time.hours * (1.0 + 1e-9)),
        within_bytes: (1.0 - FREE_SHARE) * recipe.question.hardware.memory_bytes,
    };
    let own_update = UpdateMode::of_recipe(&recipe.checked.recipe);
    Setups {
        cheapest: limits
            .cheapest(&own, own_update)
            .or_else(|| limits.smaller(&own)),
        within_hours: limits.within_hours,
        within_bytes: limits.within_bytes,
        num_blocks: recipe.facts.num_blocks(),
        recipe: own,
    }
}

/// A search and its limits.
#[derive(Clone, Copy)]
struct Search<'a> {
    checked: &'a Checked,
    facts: &'a Facts,
    question: &'a Question,
    within_hours: f64,
    within_bytes: f64,
}

impl Search<'_> {
    /// Returns the cheapest set-up with less memory for updates than the recipe's own, if it does
    /// not fit with its own. Its hours are then no limit, since it cannot take them.
    fn smaller(&self, own: &Priced) -> Option<Priced> {
        let recipe = &self.checked.recipe;
        if recipe.optimizer.name != OptimizerName::AdamW || own.memory_bytes <= self.within_bytes {
            return None;
        }
        let search = Self {
            within_hours: self.question.within_hours.unwrap_or(f64::INFINITY),
            ..*self
        };
        let moments = MomentsKind::EightBit;
        let modes = [false, true].map(|in_backward| UpdateMode {
            moments,
            in_backward,
        });
        modes
            .into_iter()
            .find_map(|update| search.cheapest(own, update))
    }

    /// Returns the cheapest set-up that updates so; the recipe's own, if that is as good.
    fn cheapest(&self, own: &Priced, update: UpdateMode) -> Option<Priced> {
        let mut found = Vec::new();
        for micro_batch in micro_batches(self.checked, update) {
            for gpus in self.numbers_of_gpus(micro_batch) {
                for sharding in SHARDINGS {
                    found.extend(self.fitting(micro_batch, gpus, sharding, update));
                }
            }
        }
        let least = found.iter().map(Priced::price).min_by(f64::total_cmp)?;
        let is_cheap = |priced: &Priced| priced.price() <= least * (1.0 + SAME_PRICE);
        found.retain(is_cheap);
        let best = found.into_iter().min_by(Priced::better_first)?;
        let is_as_good = is_cheap(own)
            && self.fits(own)
            && own.setup.gpus >= best.setup.gpus
            && own.setup.micro_batch >= best.setup.micro_batch;
        Some(if is_as_good { own.clone() } else { best })
    }

    fn fits(&self, priced: &Priced) -> bool {
        priced.memory_bytes <= self.within_bytes && priced.time.hours <= self.within_hours
    }

    /// Returns the set-up with these settings that recomputes as little as fits, if any fits.
    fn fitting(
        &self,
        micro_batch: usize,
        gpus: usize,
        sharding: Sharding,
        update: UpdateMode,
    ) -> Option<Priced> {
        // One rank splits nothing.
        if gpus == 1 && sharding != Sharding::Once {
            return None;
        }
        let base = Setup {
            gpus,
            micro_batch,
            micro_batches: self.checked.batch() as usize / micro_batch,
            checkpointing: Checkpointing::Off,
            budget_gib: None,
            sharding,
            update,
        };
        let off = self.priced(base)?;
        // Recomputation only adds to the time.
        if off.time.hours > self.within_hours {
            return None;
        }
        if off.memory_bytes <= self.within_bytes {
            return Some(off);
        }
        let budget = self.priced(Setup {
            checkpointing: Checkpointing::Budget,
            budget_gib: Some(self.budget_gib()),
            ..base
        })?;
        self.fits(&budget).then_some(budget)
    }

    /// Returns the budget that fills a GPU up to the limit, in whole GiB: it leaves out what CUDA
    /// takes for itself.
    fn budget_gib(&self) -> f64 {
        ((self.within_bytes - RUNTIME_BYTES) / GIB).floor().max(1.0)
    }

    /// Returns the time and memory of a set-up; `None` if its lanes cannot be dealt to its ranks.
    fn priced(&self, setup: Setup) -> Option<Priced> {
        let order = Facts::order_of(self.checked, setup).ok()?;
        let planner = Planner::new(self.checked, self.facts, self.question, setup, &order).ok()?;
        Some(Priced::of(&planner))
    }

    /// Returns the numbers of GPUs to try: those asked for, and fewer that share the lanes evenly
    /// and are a part of a machine or whole machines.
    fn numbers_of_gpus(&self, micro_batch: usize) -> Vec<usize> {
        let asked = self.question.gpus;
        let per_node = self.question.hardware.gpus_per_node;
        let setup = Setup {
            micro_batch,
            micro_batches: self.checked.batch() as usize / micro_batch,
            ..Setup::of_recipe(self.checked, asked)
        };
        let Ok(order) = Facts::order_of(self.checked, setup) else {
            return Vec::new();
        };
        let lanes = order.lanes();
        let is_tried = |&gpus: &usize| {
            let is_whole = gpus.is_multiple_of(per_node) || per_node.is_multiple_of(gpus);
            gpus == asked || is_whole && lanes.is_multiple_of(gpus)
        };
        (1..=asked.min(lanes)).filter(is_tried).collect()
    }
}

/// Returns the sizes of a micro-batch to try, all of which divide a step's samples.
fn micro_batches(checked: &Checked, update: UpdateMode) -> Vec<usize> {
    let batch = checked.batch() as usize;
    if update.in_backward {
        return vec![batch];
    }
    let own = checked.recipe.train.micro_batch;
    SIXTEENTHS
        .into_iter()
        .filter(|sixteenths| (own * sixteenths).is_multiple_of(16))
        .map(|sixteenths| own * sixteenths / 16)
        .filter(|size| batch.is_multiple_of(*size) && *size <= own.max(LARGEST))
        .collect()
}
