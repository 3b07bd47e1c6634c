//! Repeats the steps before an action of the guard, in memory only, and reports each of them.
//!
//! A black box names the checkpoint before the action and holds the recipe. From that checkpoint
//! the same steps are repeated and judged by the same guard: what it skipped is skipped again. If
//! the guard rewound the run after the checkpoint, the replay ends there, since it has no
//! snapshots.

use std::path::Path;

use rectiflow_data::{batch::Step, loader::Loader, order::RankOf};
use rectiflow_sdxl::model::Model;

use crate::{
    checkpoint::{bases::Bases, components::Components, found::Found, model, restore},
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
        let (loss, norm) = self.seen?;
        Some(is_same(self.loss, loss) && is_same(self.gradient_norm, norm))
    }
}

/// Whether two numbers differ by at most the last bit, or are both NaN.
fn is_same(a: f64, b: f64) -> bool {
    a == b || (a - b).abs() <= 1e-15 * b.abs() || (a.is_nan() && b.is_nan())
}

/// Replays a black box up to the step that the guard acted on; each step is passed to `observe`.
/// `base` is where the parts that a checkpoint references are, if they have moved.
///
/// # Errors
/// [`Error::Checkpoint`] if the checkpoint is missing or damaged, or if the data has changed since;
/// [`Error::Model`], [`Error::Data`].
pub fn replay(path: &Path, base: Option<&Path>, observe: &mut dyn FnMut(&Replayed)) -> Result<()> {
    let black_box = BlackBox::read(path)?;
    let checked = Recipe::parse(&black_box.recipe, path)?;
    let Some(last) = black_box.steps.last() else {
        return Err(Error::checkpoint(path, "it has no steps"));
    };

    // Open the data and the model, and go to where the steps begin.
    let sources = open_sources(&checked)?;
    let loader = Loader::new(sources, checked.order.clone(), RankOf::ONLY)?;
    let start = match &black_box.checkpoint {
        Some(checkpoint) => Some(Found::whole(checkpoint)?),
        None => None,
    };
    let bases = Bases::new(Some(&checked.recipe.model.base), base);
    let model = open_model(&checked, start.as_ref(), &bases)?;
    let mut replay = Replay {
        stepper: Stepper::new(&checked, &model),
        state: fresh_state(&checked, &model, &Comm::alone()),
        guard: GuardState::default(),
        checked: &checked,
        loader,
    };
    if let Some(checkpoint) = &start {
        replay.go_to(checkpoint)?;
    }
    replay.loader.seek(replay.state.position.cursor);

    // Repeat the steps.
    while replay.state.position.cursor <= last.step {
        let step = replay.loader.next_step()?;
        let mut repeated = replay.repeat(&step)?;
        repeated.replayed.seen = seen(&black_box, step.step);
        observe(&repeated.replayed);
        if repeated.ends {
            break;
        }
    }
    Ok(())
}

/// Returns loss and gradient norm of a step, if the black box has it.
fn seen(black_box: &BlackBox, step: u64) -> Option<(f64, f64)> {
    let known = black_box.steps.iter().find(|known| known.step == step)?;
    Some((known.loss, known.gradient_norm))
}

/// Opens the model of a checkpoint, or the base model of the recipe without one.
fn open_model(checked: &Checked, checkpoint: Option<&Found>, bases: &Bases) -> Result<Model> {
    let (components, random) = match checkpoint {
        Some(checkpoint) => {
            let components = Components::of_checkpoint(checkpoint.clone(), bases)?;
            (components, &[][..])
        }
        None => {
            let components = Components::find(&checked.recipe.model.base, bases)?;
            (components, &checked.random[..])
        }
    };
    let options = model::base_options(checked.device, random, checked.recipe.run.seed);
    let mut model = model::open_components(&components, &options)?;
    // Gradients do not depend on which blocks are recomputed.
    let is_recomputed = checked.recipe.memory.checkpointing != Checkpointing::Off;
    RecomputedBlocks::All(is_recomputed).apply(&mut model.unet);
    Ok(model)
}

/// A repeated step, and whether the replay ends with it.
struct Repeated {
    replayed: Replayed,
    ends: bool,
}

/// A verdict of the guard, as a replay acts on it.
struct Judged {
    /// Norm to clip the gradient to.
    norm: f64,
    /// Why the step is not applied; `None` if it is applied.
    wrong: Option<String>,
    ends: bool,
}

impl From<Verdict> for Judged {
    fn from(verdict: Verdict) -> Self {
        let (norm, wrong, ends) = match verdict {
            Verdict::Continue => (f64::INFINITY, None, false),
            Verdict::Clip { norm, .. } => (norm, None, false),
            Verdict::Skip { reason } => (0.0, Some(reason), false),
            Verdict::Rewind { reason, .. } | Verdict::Stop { reason } => (0.0, Some(reason), true),
        };
        Self { norm, wrong, ends }
    }
}

/// A replay between two steps.
struct Replay<'a> {
    checked: &'a Checked,
    loader: Loader,
    stepper: Stepper<'a>,
    state: TrainState,
    guard: GuardState,
}

impl Replay<'_> {
    /// Restores a checkpoint into the state and the guard.
    fn go_to(&mut self, checkpoint: &Found) -> Result<()> {
        let Found { path, saved, .. } = checkpoint;
        if saved.order_hash != self.loader.order_hash() {
            let reason = "the data has changed since: the same steps cannot be repeated";
            return Err(Error::checkpoint(path, reason));
        }
        restore::restore(path, saved, &mut self.state)?;
        self.guard = saved.guard.clone();
        Ok(())
    }

    /// Returns the result of a step's forward and backward passes.
    fn passes(&self, step: &Step, exchange: &Exchange<'_>) -> Result<Passes> {
        let parameters = &self.state.parameters;
        let summed = self.stepper.passes(parameters, step, exchange)?;
        let report = RankReport {
            stop: false,
            is_written: true,
            busy: 0.0,
        };
        let (passes, _) = exchange.reduce(summed, parameters, report)?;
        Ok(passes)
    }

    /// Repeats a step as the run did it, except for snapshots.
    fn repeat(&mut self, step: &Step) -> Result<Repeated> {
        let recipe = &self.checked.recipe;
        let seen_samples = self.state.position.samples;
        let lr = recipe.lr.rate(seen_samples, recipe.train.samples) * self.guard.acts.rate;

        if recipe.train.update_in_backward {
            return self.repeat_in_backward(step, lr);
        }

        // The forward and backward passes.
        let comm = Comm::alone();
        let exchange = Exchange::new(&comm, recipe.ranks.sharding);
        let passes = self.passes(step, &exchange)?;

        // The verdict, then the update.
        let seen = Observation {
            loss: passes.loss,
            gradient_norm: passes.gradient_norm,
        };
        let worst = worst(step, &passes);
        let judged = Judged::from(self.guard.judge(&recipe.guard, seen));
        if judged.wrong.is_none() {
            let rates = Rates {
                norm: judged.norm,
                lr,
            };
            let state = &mut self.state;
            let _gradients = self.stepper.update(state, step, passes, rates, &exchange)?;
        } else {
            self.state.position.cursor = step.step + 1;
        }
        Ok(Repeated {
            replayed: Replayed {
                step: step.step,
                loss: seen.loss,
                gradient_norm: seen.gradient_norm,
                seen: None,
                wrong: judged.wrong,
                worst,
            },
            ends: judged.ends,
        })
    }
}

impl Replay<'_> {
    /// Repeats a step that updates during its backward pass. After a gradient that is not finite
    /// the state is lost, and the replay ends.
    fn repeat_in_backward(&mut self, step: &Step, lr: f64) -> Result<Repeated> {
        let forward = self.stepper.forward(step)?;
        let config = &self.checked.recipe.guard;
        let judged = Judged::from(self.guard.judge_loss(config, forward.value));
        let (mut wrong, mut ends) = (judged.wrong, judged.ends);
        let passes = if wrong.is_none() {
            let updated = self.stepper.backward(&mut self.state, step, forward, lr)?;
            if let Some(name) = updated.broken {
                wrong = Some(format!("the gradient of {name} is not finite"));
                ends = true;
            }
            updated.passes
        } else {
            self.state.position.cursor = step.step + 1;
            forward.without_gradient()
        };
        Ok(Repeated {
            replayed: Replayed {
                step: step.step,
                loss: passes.loss,
                gradient_norm: passes.gradient_norm,
                seen: None,
                wrong,
                worst: worst(step, &passes),
            },
            ends,
        })
    }
}

/// Returns the first sample whose loss is not finite, or the sample with the highest loss.
fn worst(step: &Step, passes: &Passes) -> SeenSample {
    let mut samples = samples_of(step, passes).into_iter();
    let mut worst = samples.next().expect("a step has samples");
    for sample in samples {
        if badness(&sample) > badness(&worst) {
            worst = sample;
        }
    }
    worst
}

/// Returns the loss, or infinity for NaN.
fn badness(sample: &SeenSample) -> f64 {
    if sample.loss.is_nan() {
        f64::INFINITY
    } else {
        sample.loss
    }
}
