//! The test loss of any checkpoint, as a run would measure it: the same table, whatever the batch size.

use std::path::{Path, PathBuf};

use rectiflow_sdxl::model::OpenOptions;
use serde::Serialize;

use crate::{
    checkpoint::{EMA, adopt, components::Components, model},
    error::{Error, Result},
    measure::testloss::{Losses, Tables},
    ranks::comm::Comm,
    recipe::Checked,
    run::setup::{check_vae, open_sources},
    step::Stepper,
};

/// The test loss of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// The checkpoint, or another model.
    pub checkpoint: PathBuf,
    /// Test samples.
    pub num_test: usize,
    /// Fixed training samples.
    pub num_training: usize,
    /// Of the weights as trained.
    pub trained: Losses,
    /// Of the averaged weights, where the checkpoint has some.
    pub ema: Option<Losses>,
}

/// Measures a checkpoint, or a model of any origin, on the tables of a recipe.
///
/// # Errors
/// [`Error::Checkpoint`] where the model predicts something else than the recipe's objective is about, or its VAE did
/// not make the data set; [`Error::Model`], [`Error::Data`].
pub fn evaluate(checked: &Checked, checkpoint: &Path) -> Result<Evaluation> {
    let sources = open_sources(checked)?;
    let tables = Tables::new(checked, &sources)?;
    let losses = |path: &Path| {
        let components = Components::find(path)?;
        check_vae(checked, &components, &sources)?;
        let options = OpenOptions { device: checked.device, ..OpenOptions::default() };
        let model = model::open_components(path, &components, &options)?;
        let expected = checked.recipe.objective.parameterization;
        if let Some(found) = model.parameterization.filter(|found| *found != expected) {
            let reason = format!("the recipe's objective is {expected}, but this model predicts {found}");
            return Err(Error::Checkpoint { path: path.to_owned(), reason });
        }
        adopt::apply_frozen(checked.recipe.train.dtype, &model);
        tables.measure(&Stepper::new(checked, &model), &sources, &Comm::alone())
    };
    let trained = losses(checkpoint)?;
    let averaged = checkpoint.join(EMA);
    let ema = if averaged.is_dir() { Some(losses(&averaged)?) } else { None };
    let (num_test, num_training) = (tables.test.len(), tables.training.len());
    Ok(Evaluation { checkpoint: checkpoint.to_owned(), num_test, num_training, trained, ema })
}
