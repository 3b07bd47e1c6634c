//! A run of which only what was seen of it is kept.

use std::{env, fs, path::Path, sync::atomic::AtomicBool};

use rectiflow_train::{
    Result,
    metrics::Event,
    recipe::{Checked, Recipe},
    run::{Options, train},
};

/// Trains as the recipe says with these overrides, `alter` having had a look at it, in a folder of the system's temporary one
/// that is removed; `name` tells it from the other runs of this program.
pub(crate) fn run(
    recipe: &Path,
    overrides: &[String],
    name: &str,
    alter: impl FnOnce(&mut Checked),
    options: Options<'_>,
    observe: &mut dyn FnMut(&Event),
) -> Result<()> {
    let folder = env::temp_dir().join(format!("rectiflow-{}-{name}", std::process::id()));
    let own = [format!("run.dir={:?}", folder.display().to_string())];
    let mut checked = Recipe::load(recipe, &[overrides, &own].concat())?;
    alter(&mut checked);
    let outcome = train(&checked, options, &AtomicBool::new(false), observe);
    // Where it cannot be removed, the system's temporary folder is a good place for it.
    let _ = fs::remove_dir_all(&folder);
    outcome.map(|_| ())
}
