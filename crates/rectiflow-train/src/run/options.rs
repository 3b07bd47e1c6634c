//! What may be asked of a run besides its recipe, and how a run is left.

use std::{fmt, path::PathBuf};

use rectiflow_data::batch::Step;

use crate::{
    ranks::launch::Launch,
    state::{Position, TrainState},
};

/// How a run was left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Whether all samples of the recipe have been trained on; if not, the run was asked to stop.
    pub finished: bool,
    /// How far it is.
    pub position: Position,
    /// The last checkpoint.
    pub checkpoint: Option<PathBuf>,
}

/// Called with each step and the state before it.
pub type BeforeStep<'a> = dyn FnMut(&mut Step, &mut TrainState) + 'a;

/// What may be asked of a run besides its recipe.
#[derive(Default)]
pub struct Options<'a> {
    /// Begin a new run from this checkpoint instead of `model.base`.
    pub branch_from: Option<PathBuf>,
    /// Go on although the guard has stopped the run.
    pub acknowledge_stop: bool,
    /// Which of the processes of the run this one is; none: the only one.
    pub launch: Option<Launch>,
    /// Sees each step before it is worked on, and may spoil it: how tests show what the guard does.
    pub before_step: Option<&'a mut BeforeStep<'a>>,
}

impl fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { branch_from, acknowledge_stop, launch, .. } = self;
        write!(
            f,
            "Options {{ branch_from: {branch_from:?}, acknowledge_stop: {acknowledge_stop}, launch: {launch:?} }}"
        )
    }
}
