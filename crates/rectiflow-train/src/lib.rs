//! The trainer: from a recipe, a packed data set and a base model to checkpoints, metrics and
//! pictures.
//!
//! A recipe is one TOML file, checked once ([`recipe::Recipe`] becomes [`recipe::Checked`]).
//! [`run::train`] is the whole run, from top to bottom: find where it begins, open the data and the
//! model, then repeat steps until all samples are used, the guard stops the run or the caller
//! interrupts it. All ranks of a run do the same at the same time.
//!
//! ```text
//! recipe -> checked | data set -> loader -> passes -> reduce -> guard -> update -> checkpoint
//!                   | base model --^                              \-> metrics, test loss, previews
//! ```
//!
//! The folders, from the top floor down; each uses only those below it:
//!
//! | folder | contents |
//! |---|---|
//! | `run` | the course of a run: setup, origin, steps, verdicts, saving, replay, evaluation |
//! | `plan` | hours, money and memory of a run, on hardware that need not exist yet |
//! | `pictures` | sampling with a whole model: the tokenizer and the sampler meet |
//! | `measure` | what a run reports: metrics, test loss, vital signs, findings |
//! | `checkpoint` | what a run can return to: checkpoints on disk, the guard's snapshots |
//! | `step` | one update: noise, forward and backward passes, loss |
//! | `recipe` | the TOML file: sections, overrides, unknown keys, changes since a checkpoint |
//! | `ranks` | many processes as one run: launch, rendezvous, collectives, exchange, dead ranks |
//! | `state` | what an update changes: parameters, gradients, optimiser; the owner of each part |
//! | `guard`, `lr`, `hardware`, `error` | verdicts; the learning rate; GPUs and links; errors |
//!
//! `TrainState` holds everything that an update changes, and every random number is a function of
//! the seed and a position, so that a resumed run is identical to an uninterrupted one, byte for
//! byte.

pub mod checkpoint;
pub mod error;
pub mod guard;
pub mod hardware;
pub mod lr;
mod measure;
mod pictures;
pub mod plan;
mod ranks;
pub mod recipe;
pub mod run;
pub mod state;
mod step;

pub use checkpoint::{bases, components, model, weights_hash};
pub use measure::{findings, metrics, testloss, trackers};
pub use pictures::{generate, preview, staged_model};
pub use plan::{counting, estimate, facts, gpu_memory, simulate};
pub use ranks::{comm, launch, straggler, traffic};
pub use run::{blackbox, eval, replay};
pub use state::{ema, flat, layout, optim, partition, precision};
pub use step::{step_flops, synthetic};

pub use error::{Error, Result};
