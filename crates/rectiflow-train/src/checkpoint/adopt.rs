//! Turns a model that was opened in fp32 into the one that a recipe trains: converts each component
//! to its dtypes and moves the trained ones into one vector.

use rectiflow_data::order::RankOf;
use rectiflow_sdxl::model::{Component, Model};

use crate::{
    checkpoint::model,
    recipe::{Checked, TRAINABLE, sections::TrainConfig},
    state::{flat::FlatParameters, precision::Precision},
};

/// Converts every component except the autoencoder to the dtypes of the recipe, and moves the
/// trained ones into one vector, of which this rank owns `share`. The models hold fp32 until then.
pub(crate) fn apply(checked: &Checked, model: &Model, share: RankOf) -> FlatParameters {
    let TrainConfig { dtype, .. } = checked.recipe.train;
    let (trained, frozen): (Vec<Component>, Vec<_>) = TRAINABLE
        .into_iter()
        .partition(|&component| checked.recipe.train.trains(component));
    for component in frozen {
        dtype.convert(model::parameters(model, component));
    }
    let trained: Vec<_> = trained
        .into_iter()
        .map(|part| (part.folder(), model::parameters(model, part)))
        .collect();
    let multiple = checked.recipe.optimizer.state.multiple();
    FlatParameters::adopt_multiples(&trained, dtype, share, multiple)
}

/// Like [`apply`], for a model that is not trained.
pub(crate) fn apply_frozen(precision: Precision, model: &Model) {
    TRAINABLE
        .iter()
        .for_each(|&component| precision.convert(model::parameters(model, component)));
}
