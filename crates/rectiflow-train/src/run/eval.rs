//! The test loss of any checkpoint, on the same tables that a run uses, independent of the batch
//! size.

use std::path::{Path, PathBuf};

use rectiflow_data::batch::Source;
use rectiflow_sdxl::model::{Model, OpenOptions};
use serde::Serialize;

use crate::{
    checkpoint::{EMA, adopt, bases::Bases, components::Components, model},
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
    /// Path of the checkpoint or other model.
    pub checkpoint: PathBuf,
    /// Number of test samples.
    pub num_test: usize,
    /// Number of fixed training samples.
    pub num_training: usize,
    /// Losses of the trained weights.
    pub trained: Losses,
    /// Losses of the averaged weights, if the checkpoint has them.
    pub ema: Option<Losses>,
}

/// Measures a checkpoint, or a model from any source, on the tables of a recipe. `base` is where
/// the parts that a checkpoint references are, if they have moved.
///
/// # Errors
/// [`Error::Checkpoint`] if the model predicts something other than the recipe's objective, or if
/// its VAE did not encode the data set; [`Error::Model`], [`Error::Data`].
pub fn evaluate(checked: &Checked, checkpoint: &Path, base: Option<&Path>) -> Result<Evaluation> {
    let sources = open_sources(checked)?;
    let tables = Tables::new(checked, &sources)?;
    // Parts that the averaged weights share with the others are hashed once.
    let bases = Bases::new(Some(&checked.recipe.model.base), base);
    let measured = |path: &Path| {
        let model = open_model(checked, &Components::find(path, &bases)?, &sources)?;
        tables.measure(&Stepper::new(checked, &model), &sources, &Comm::alone())
    };
    let trained = measured(checkpoint)?;
    let averaged = checkpoint.join(EMA);
    let ema = if averaged.is_dir() {
        Some(measured(&averaged)?)
    } else {
        None
    };
    Ok(Evaluation {
        checkpoint: checkpoint.to_owned(),
        num_test: tables.test.len(),
        num_training: tables.training.len(),
        trained,
        ema,
    })
}

/// Opens a model that predicts the recipe's objective, with the VAE of the data sets.
fn open_model(checked: &Checked, components: &Components, sources: &[Source]) -> Result<Model> {
    check_vae(checked, components, sources)?;
    let options = OpenOptions {
        device: checked.device,
        ..OpenOptions::default()
    };
    let model = model::open_components(components, &options)?;
    let expected = checked.recipe.objective.parameterization;
    if let Some(found) = model.parameterization
        && found != expected
    {
        let reason =
            format!("the recipe's objective is {expected}, but this model predicts {found}");
        return Err(Error::checkpoint(components.model(), reason));
    }
    adopt::apply_frozen(checked.recipe.train.dtype, &model);
    Ok(model)
}
