//! A run whose folder is deleted; only the observed events remain.

use std::{env, fs, path::Path, sync::atomic::AtomicBool};

use rectiflow_train::{
    Result,
    metrics::Event,
    recipe::{Checked, Recipe},
    run::{Options, train},
};

/// Trains by the recipe with the overrides applied, after `alter` has changed the checked recipe.
///
/// The run folder is in the system's temporary folder and is removed; `name` distinguishes it from
/// this program's other runs.
pub(crate) fn run(
    recipe: &Path,
    overrides: &[String],
    name: &str,
    alter: impl FnOnce(&mut Checked),
    options: Options<'_>,
    observe: &mut dyn FnMut(&Event),
) -> Result<()> {
    let folder = env::temp_dir().join(format!("rectiflow-{}-{name}", std::process::id()));
    let own = format!("run.dir={:?}", folder.display().to_string());
    let mut checked = Recipe::load(recipe, &[overrides, &[own]].concat())?;
    alter(&mut checked);
    let outcome = train(&checked, options, &AtomicBool::new(false), observe);
    // A folder that cannot be removed stays in the temporary folder.
    let _ = fs::remove_dir_all(&folder);
    outcome.map(|_| ())
}
