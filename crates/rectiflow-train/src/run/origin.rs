//! Where a run begins: at its base model, at its own newest checkpoint, or at another run's
//! checkpoint (a branch).
//!
//! ```text
//! base      weights of model.base, no samples seen
//! resume    everything is the checkpoint's; the recipe may differ only in keys that do not change
//!           what is learnt
//! branch    weights, samples seen and the moments that fit are the checkpoint's; everything else
//!           is the recipe's: batch, rate, frozen set, objective, data
//! ```
//!
//! A branch over the same data continues at the old run's position in it, counted in epochs; over
//! other data it begins with the first epoch.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rectiflow_data::order::Order;
use rectiflow_sdxl::model::Component;
use serde::{Deserialize, Serialize};

use crate::{
    checkpoint::{
        Ancestor, Checkpoints, STATE, Saved, bases::Bases, components::Components, found::Found,
        sums::hash_file,
    },
    error::{Error, Result},
    ranks::comm::Comm,
    recipe::{
        Checked,
        changes::{Change, changes},
    },
};

/// Where a run begins.
#[derive(Debug)]
pub(crate) enum Origin {
    /// At the base model.
    Base,
    /// At its own checkpoint, with the changes of the recipe since then.
    Resume(Found, Vec<String>),
    /// At a checkpoint of another run.
    Branch(Found, Ancestor),
}

/// What rank 0 found, in the form in which it is sent to the other ranks.
#[derive(Debug, Serialize, Deserialize)]
enum Choice {
    Base,
    Resume(PathBuf, Vec<String>),
    Branch(PathBuf, Ancestor),
}

impl Choice {
    fn of(origin: &Origin) -> Self {
        match origin {
            Origin::Base => Self::Base,
            Origin::Resume(found, changed) => Self::Resume(found.path.clone(), changed.clone()),
            Origin::Branch(found, ancestor) => Self::Branch(found.path.clone(), ancestor.clone()),
        }
    }

    /// Reads the checkpoint that rank 0 has verified.
    fn read(self) -> Result<Origin> {
        Ok(match self {
            Self::Base => Origin::Base,
            Self::Resume(path, changed) => Origin::Resume(Found::unverified(&path)?, changed),
            Self::Branch(path, ancestor) => Origin::Branch(Found::unverified(&path)?, ancestor),
        })
    }
}

impl Origin {
    /// Finds where the run of a recipe begins.
    ///
    /// # Errors
    /// [`Error::Changed`] if the recipe has changed in keys that a resumed run must keep,
    /// [`Error::Branch`] if the branch asked for is impossible, [`Error::Checkpoint`] if all
    /// checkpoints are damaged.
    pub(crate) fn find(
        checked: &Checked,
        checkpoints: &Checkpoints,
        branch_from: Option<&Path>,
    ) -> Result<Self> {
        if let Some(found) = checkpoints.newest_sound()? {
            if let Some(asked) = branch_from {
                check_came_from(checked, &found.saved, asked)?;
            }
            let changed = allowed_changes(checked, &found)?;
            return Ok(Self::Resume(found, changed));
        }
        let Some(path) = branch_from else {
            return Ok(Self::Base);
        };
        let (found, ancestor) = ancestor(checked, path)?;
        Ok(Self::Branch(found, ancestor))
    }

    /// As [`Self::find`], but done by rank 0 for all ranks, since it may set damaged checkpoints
    /// aside.
    ///
    /// # Errors
    /// As [`Self::find`], [`Error::OtherRank`], [`Error::Collective`].
    pub(crate) fn find_together(
        checked: &Checked,
        checkpoints: &Checkpoints,
        branch_from: Option<&Path>,
        comm: &Comm,
    ) -> Result<Self> {
        let mut found = None;
        let choice = comm.first(|| {
            let origin = Self::find(checked, checkpoints, branch_from)?;
            let choice = Choice::of(&origin);
            found = Some(origin);
            Ok(choice)
        })?;
        match found {
            Some(origin) => Ok(origin),
            None => choice.read(),
        }
    }

    /// Returns the components of the model that the run begins from. Components that a branch
    /// freezes are copied out of the other run's checkpoint, since that may be removed later.
    ///
    /// # Errors
    /// As [`Components::find`], or [`Error::Io`], [`Error::OtherRank`], [`Error::Collective`].
    pub(crate) fn components(
        &self,
        checked: &Checked,
        bases: &Bases,
        comm: &Comm,
    ) -> Result<Components> {
        let mut components = match self {
            Self::Base => Components::find(&checked.recipe.model.base, bases)?,
            Self::Resume(found, _) | Self::Branch(found, _) => {
                Components::of_checkpoint(found.clone(), bases)?
            }
        };
        let Self::Branch(found, _) = self else {
            return Ok(components);
        };
        for component in Component::ALL {
            let folder = components.folder(component).to_owned();
            if checked.recipe.train.trains(component) || !folder.starts_with(&found.path) {
                continue;
            }
            let place = checked.recipe.run.dir.join("base").join(component.folder());
            comm.first(|| keep(&folder, &place))?;
            components.replace(component, place);
        }
        Ok(components)
    }

    /// Returns the checkpoints that the run descends from, oldest first.
    pub(crate) fn lineage(&self) -> Vec<Ancestor> {
        match self {
            Self::Base => Vec::new(),
            Self::Resume(found, _) => found.saved.lineage.clone(),
            Self::Branch(found, ancestor) => {
                [found.saved.lineage.clone(), vec![ancestor.clone()]].concat()
            }
        }
    }
}

/// Returns the step of `order` at which `epochs` epochs are completed, rounded down to a whole
/// step.
pub(crate) fn step_at(order: &Order, epochs: f64) -> u64 {
    let epoch = epochs.floor() as u64;
    let start = order.epoch_start(epoch);
    let end = order.epoch_start(epoch + 1);
    let micro_batch = start + ((end - start) as f64 * epochs.fract()).round() as u64;
    micro_batch / order.settings().micro_batches as u64
}

/// Returns the epochs completed after `step` steps of `order`.
pub(crate) fn epochs_at(order: &Order, step: u64) -> f64 {
    let micro_batch = step * order.settings().micro_batches as u64;
    let epoch = order.epoch_of(micro_batch);
    let start = order.epoch_start(epoch);
    let end = order.epoch_start(epoch + 1);
    epoch as f64 + (micro_batch - start) as f64 / (end - start).max(1) as f64
}

/// Checks that the run descends from `asked`: repeating the command that began a branch resumes it,
/// even if the ancestor has been removed since.
fn check_came_from(checked: &Checked, saved: &Saved, asked: &Path) -> Result<()> {
    let full = asked
        .canonicalize()
        .or_else(|_| std::path::absolute(asked))
        .map_err(Error::io(asked))?;
    if let Some(ancestor) = saved.lineage.last()
        && (ancestor.checkpoint == full || is_ancestor(ancestor, &full))
    {
        return Ok(());
    }
    let run_dir = checked.recipe.run.dir.display();
    let reason =
        format!("{run_dir} has checkpoints of a run that began elsewhere; choose another run.dir");
    Err(no_branch(asked, reason))
}

/// Whether a checkpoint is the ancestor, though it has moved.
fn is_ancestor(ancestor: &Ancestor, checkpoint: &Path) -> bool {
    hash_file(&checkpoint.join(STATE)).is_ok_and(|hash| hash == ancestor.blake3)
}

/// Returns the checkpoint to branch from, and its record for the lineage.
fn ancestor(checked: &Checked, path: &Path) -> Result<(Found, Ancestor)> {
    let found = sound_checkpoint(path)?;
    let seen = found.saved.position.samples;
    let samples = checked.recipe.train.samples;
    if seen >= samples {
        let reason = format!(
            "it has seen {seen} samples, and train.samples = {samples} includes them; raise it"
        );
        return Err(no_branch(path, reason));
    }
    let changed = match recipe_changes(checked, &found) {
        Ok(changes) => lines(changes),
        Err(reason) => return Err(no_branch(path, reason)),
    };
    let ancestor = Ancestor {
        checkpoint: found.path.clone(),
        blake3: hash_file(&found.path.join(STATE))?,
        position: found.saved.position,
        changed,
    };
    Ok((found, ancestor))
}

/// Returns the checkpoint at a path, by its full path, with all files verified.
fn sound_checkpoint(path: &Path) -> Result<Found> {
    let folder = match path.canonicalize() {
        Ok(folder) => folder,
        Err(error) => return Err(no_branch(path, error.to_string())),
    };
    match Found::whole(&folder) {
        Ok(found) => Ok(found),
        Err(error) => {
            let reason = format!("expected a sound checkpoint: {error}");
            Err(no_branch(path, reason))
        }
    }
}

fn no_branch(path: &Path, reason: String) -> Error {
    Error::Branch {
        checkpoint: path.to_owned(),
        reason,
    }
}

fn lines(changes: Vec<Change>) -> Vec<String> {
    let mut lines = Vec::with_capacity(changes.len());
    for change in changes {
        lines.push(change.line);
    }
    lines
}

fn recipe_changes(checked: &Checked, found: &Found) -> std::result::Result<Vec<Change>, String> {
    let old = found.recipe().map_err(|error| error.to_string())?;
    changes(&old, &checked.recipe).map_err(|error| format!("its recipe cannot be read: {error}"))
}

/// Returns the changes of the recipe since the run's checkpoint, if a resumed run may have them.
fn allowed_changes(checked: &Checked, found: &Found) -> Result<Vec<String>> {
    let changes = match recipe_changes(checked, found) {
        Ok(changes) => changes,
        Err(reason) => return Err(Error::checkpoint(&found.path, reason)),
    };
    let mut refused = changes.clone();
    refused.retain(|change| !change.is_harmless());
    if refused.is_empty() {
        return Ok(lines(changes));
    }
    Err(Error::Changed {
        run_dir: checked.recipe.run.dir.clone(),
        checkpoint: found.path.clone(),
        changes: lines(refused),
    })
}

/// Copies a component's folder into the run folder.
fn keep(folder: &Path, place: &Path) -> Result<()> {
    // Removes what an interrupted branch left behind.
    let _ = fs::remove_dir_all(place);
    fs::create_dir_all(place).map_err(Error::io(place))?;
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if let Some(name) = path.file_name().filter(|_| path.is_file()) {
            let to = place.join(name);
            fs::copy(&path, &to).map_err(Error::io(&to))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rectiflow_data::order::{Amount, BucketRows, DataShape, Mode, OrderSettings};

    use super::*;

    fn order(micro_batch: usize, micro_batches: usize) -> Order {
        let buckets = [(0, 100), (1, 33), (2, 3)];
        let buckets = buckets
            .map(|(bucket, rows)| BucketRows {
                bucket,
                rows,
                run_ends: vec![],
            })
            .to_vec();
        let shape = DataShape {
            identity: "a".into(),
            text: "b".into(),
            amount: Amount::Repeats(1.0),
            buckets,
        };
        let settings = OrderSettings {
            seed: 0,
            micro_batch,
            micro_batches,
            lanes: None,
            mode: Mode::Local,
            window_samples: 2048,
        };
        Order::new(&[shape], settings).expect("an order")
    }

    #[test]
    fn a_branch_is_where_the_old_run_was_in_the_data() {
        let (old, new) = (order(4, 2), order(8, 4));
        for step in [0, 1, 7, 50, 1000] {
            assert_eq!(
                step_at(&old, epochs_at(&old, step)),
                step,
                "the same order: the same step"
            );
            let there = epochs_at(&new, step_at(&new, epochs_at(&old, step)));
            // At most one step of the new order behind, which is about a quarter of an epoch.
            let behind = epochs_at(&old, step) - there;
            assert!((-0.02..0.26).contains(&behind), "step {step}: {behind}");
        }
    }
}
