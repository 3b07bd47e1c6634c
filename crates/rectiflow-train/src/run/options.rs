//! The options of a run besides its recipe, and the outcome of a run.

use std::{fmt, path::PathBuf};

use rectiflow_data::batch::Step;

use crate::{
    ranks::launch::Launch,
    state::{Position, TrainState},
};

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Whether all samples of the recipe have been trained on; otherwise the run was interrupted.
    pub finished: bool,
    /// Position at the end.
    pub position: Position,
    /// Path of the last checkpoint.
    pub checkpoint: Option<PathBuf>,
}

/// Called with each step and the state before it.
pub type BeforeStep<'a> = dyn FnMut(&mut Step, &mut TrainState) + 'a;

/// Options of a run besides its recipe.
#[derive(Default)]
pub struct Options<'a> {
    /// Checkpoint that a new run begins from, instead of `model.base`.
    pub branch_from: Option<PathBuf>,
    /// Model where the parts that a checkpoint references are, if they have moved.
    pub base: Option<PathBuf>,
    /// Whether to continue a run that the guard has stopped.
    pub acknowledge_stop: bool,
    /// Whether to resume a run although its learning rate jumps, since it was made longer.
    pub accept_rate_jump: bool,
    /// This process's place among those of the run; `None` if it is the only one.
    pub launch: Option<Launch>,
    /// Called before each step with write access to it, so that tests can provoke the guard.
    pub before_step: Option<&'a mut BeforeStep<'a>>,
}

impl fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            branch_from,
            base,
            acknowledge_stop,
            accept_rate_jump,
            launch,
            ..
        } = self;
        write!(
            f,
            "Options {{ branch_from: {branch_from:?}, base: {base:?}, \
             acknowledge_stop: {acknowledge_stop}, accept_rate_jump: {accept_rate_jump}, \
             launch: {launch:?} }}"
        )
    }
}
