//! Repeats the steps before an action of the guard, in memory only, and reports each of them.
//!
//! A black box names the checkpoint before the action and holds the recipe. From that checkpoint
//! the same steps are repeated and judged by the same guard: what it skipped is skipped again. If
//! the guard rewound the run after the checkpoint, the replay ends there, since it has no
//! snapshots.

use std::path::Path;

use rectiflow_data::{batch::Step, loader::Loader, order::RankOf};

use crate::{
    checkpoint::{Saved, components::Components, model, restore, verify},
    error::{Error, Result},
    guard::{GuardState, Observation, Verdict},
    plan::estimate::RecomputedBlocks,
    ranks::{
        comm::Comm,
        exchange::{Exchange, Passes, RankReport},
    },
    recipe::{Checked, Recipe, sections::Checkpointing},
    run::{
        blackbox::{BlackBox, SeenSample, samples_of},
        setup::{fresh_state, open_sources},
    },
    state::TrainState,
    step::{Rates, Stepper},
};

/// A repeated step.
#[derive(Debug, Clone, PartialEq)]
pub struct Replayed {
    /// Number of the step in the order, from 0.
    pub step: u64,
    /// Mean loss of its samples.
    pub loss: f64,
    /// Norm of its gradient before clipping.
    pub gradient_norm: f64,
    /// Loss and gradient norm that the run measured, if the black box has the step.
    pub seen: Option<(f64, f64)>,
    /// Why the guard did not apply the step; `None` if it was applied.
    pub wrong: Option<String>,
    /// The first sample whose loss is not finite, or the sample with the highest loss.
    pub worst: SeenSample,
}

impl Replayed {
    /// Whether loss and norm are those of the run, except for the last bit, which JSON may lose;
    /// `None` if the black box does not have the step.
    pub fn is_as_seen(&self) -> Option<bool> {
        let same = |a: f64, b: f64| {
            a == b || (a - b).abs() <= 1e-15 * b.abs() || (a.is_nan() && b.is_nan())
        };
        self.seen
            .map(|(loss, norm)| same(self.loss, loss) && same(self.gradient_norm, norm))
    }
}

/// Replays a black box up to the step that the guard acted on; each step is passed to `observe`.
///
/// # Errors
/// [`Error::Checkpoint`] if the checkpoint is missing or damaged, or if the data has changed since;
/// [`Error::Model`], [`Error::Data`].
pub fn replay(path: &Path, observe: &mut dyn FnMut(&Replayed)) -> Result<()> {
    let black_box = BlackBox::read(path)?;
    let checked = Recipe::parse(&black_box.recipe, path)?;
    let Some(end) = black_box.steps.last().map(|step| step.step + 1) else {
        return Err(Error::Checkpoint {
            path: path.to_owned(),
            reason: "it has no steps".to_owned(),
        });
    };
    let sources = open_sources(&checked)?;
    let mut loader = Loader::new(sources, checked.order.clone(), RankOf::ONLY)?;
    let start = black_box.checkpoint.as_deref();
    let place = start.unwrap_or(&checked.recipe.model.base);
    let random = if start.is_none() {
        &checked.random[..]
    } else {
        &[]
    };
    let options = model::base_options(checked.device, random, checked.recipe.run.seed);
    let mut model = model::open_components(place, &Components::find(place)?, &options)?;
    // Gradients do not depend on which blocks are recomputed.
    RecomputedBlocks::All(checked.recipe.memory.checkpointing != Checkpointing::Off)
        .apply(&mut model.unet);
    let stepper = Stepper::new(&checked, &model);
    let comm = Comm::alone();
    let mut state = fresh_state(&checked, &model, &comm);
    let mut guard = GuardState::default();
    if let Some(checkpoint) = start {
        guard = go_to(checkpoint, &loader, &mut state)?;
    }
    loader.seek(state.position.cursor);
    while state.position.cursor < end {
        let step = loader.next_step()?;
        let again = make(&checked, &stepper, &mut state, &mut guard, &step)?;
        let known = black_box.steps.iter().find(|known| known.step == step.step);
        let seen = known.map(|known| (known.loss, known.gradient_norm));
        observe(&Replayed {
            seen,
            ..again.replayed
        });
        if again.ends {
            break;
        }
    }
    Ok(())
}

/// Restores a checkpoint into the state and returns its guard.
fn go_to(checkpoint: &Path, loader: &Loader, state: &mut TrainState) -> Result<GuardState> {
    verify(checkpoint)?;
    let saved = Saved::read(checkpoint)?;
    if saved.order_hash != loader.order_hash() {
        let reason = "the data has changed since: the same steps cannot be repeated".to_owned();
        return Err(Error::Checkpoint {
            path: checkpoint.to_owned(),
            reason,
        });
    }
    restore::restore(checkpoint, &saved, state)?;
    Ok(saved.guard)
}

/// A repeated step, and whether the replay ends with it.
struct Again {
    replayed: Replayed,
    ends: bool,
}

fn make(
    checked: &Checked,
    stepper: &Stepper<'_>,
    state: &mut TrainState,
    guard: &mut GuardState,
    step: &Step,
) -> Result<Again> {
    let recipe = &checked.recipe;
    let lr = recipe.lr.rate(state.position.samples, recipe.train.samples) * guard.acts.rate;
    let comm = Comm::alone();
    let exchange = Exchange::new(&comm, recipe.ranks.sharding);
    let summed = stepper.passes(&state.parameters, step, &exchange)?;
    let report = RankReport {
        stop: false,
        is_written: true,
        busy: 0.0,
    };
    let (passes, _) = exchange.reduce(summed, &state.parameters, report)?;
    let (loss, gradient_norm) = (passes.loss, passes.gradient_norm);
    let worst = worst(step, &passes);
    let verdict = guard.judge(
        &recipe.guard,
        Observation {
            loss,
            gradient_norm,
        },
    );
    let (norm, wrong, ends) = match verdict {
        Verdict::Continue => (f64::INFINITY, None, false),
        Verdict::Clip { norm, .. } => (norm, None, false),
        Verdict::Skip { reason } => (0.0, Some(reason), false),
        Verdict::Rewind { reason, .. } | Verdict::Stop { reason } => (0.0, Some(reason), true),
    };
    if wrong.is_none() {
        let _gradients = stepper.update(state, step, passes, Rates { norm, lr }, &exchange)?;
    } else {
        state.position.cursor = step.step + 1;
    }
    let replayed = Replayed {
        step: step.step,
        loss,
        gradient_norm,
        seen: None,
        wrong,
        worst,
    };
    Ok(Again { replayed, ends })
}

fn worst(step: &Step, passes: &Passes) -> SeenSample {
    let badness = |sample: &SeenSample| {
        if sample.loss.is_nan() {
            f64::INFINITY
        } else {
            sample.loss
        }
    };
    let worse = |a: SeenSample, b: SeenSample| if badness(&b) > badness(&a) { b } else { a };
    samples_of(step, passes)
        .into_iter()
        .reduce(worse)
        .expect("a step has samples")
}
