//! Which folders of a run are its checkpoints, and the removal of old ones.
//!
//! A folder is a checkpoint if its name has eight digits and they are the step in its `state.json`.
//! Copies under other names are the user's: they are neither resumed from nor counted, moved or
//! removed. A checkpoint with a damaged `state.json` is listed, so that it can be set aside, but
//! never removed.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

use rectiflow_data::text_file;
use rectiflow_sdxl::durable::rename_folder;
use serde::Deserialize;

use crate::{
    checkpoint::{Checkpoints, STATE, UNFINISHED, step_of},
    error::{Error, Result},
    state::Position,
};

/// Extension of a checkpoint that is being removed.
const REMOVED: &str = "removed";
/// Extension of a folder that had the name of a checkpoint and was none.
const ASIDE: &str = "aside";

impl Checkpoints {
    /// Creates the folder and removes what an interrupted save or removal left. The caller holds
    /// the run's lock.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn clean(&self) -> Result<()> {
        fs::create_dir_all(&self.folder).map_err(Error::io(&self.folder))?;
        for path in self.entries()? {
            if is_leftover(&path) {
                fs::remove_dir_all(&path).map_err(Error::io(&path))?;
            } else if step_of(&path).is_some() && !path.join(STATE).is_file() {
                tracing::warn!(
                    "{} is no checkpoint, since it has no {STATE}: a copy or a removal was cut \
                     off; complete it, or delete it",
                    path.display()
                );
            }
        }
        Ok(())
    }

    /// Returns the folders of all checkpoints, oldest first.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn list(&self) -> Result<Vec<PathBuf>> {
        let mut found = self.entries()?;
        found.retain(|path| is_checkpoint_or_damaged(path));
        found.sort_by_key(|path| step_of(path));
        Ok(found)
    }

    /// Removes the oldest checkpoints that need not be kept, but never `written`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn prune(&self, written: &Path) -> Result<()> {
        let mut all = self.list()?;
        all.retain(|path| step_in(path) == step_of(path));
        let steps: Vec<u64> = all.iter().filter_map(|path| step_of(path)).collect();
        for step in self.old_ones(&steps) {
            let old = self.place(step);
            // One that is being copied is removed after the next checkpoint.
            if old != written && !self.pin.holds(step) {
                self.remove(&old)?;
            }
        }
        Ok(())
    }

    /// Returns those of the steps, oldest first, whose checkpoints need not be kept.
    pub(crate) fn old_ones(&self, steps: &[u64]) -> Vec<u64> {
        let num_old = steps.len().saturating_sub(self.keep);
        let mut old = steps[..num_old].to_vec();
        old.retain(|step| !self.keeps_for_ever(*step));
        old
    }

    /// Frees the name that a checkpoint is about to get. A checkpoint of the same step is removed:
    /// the new one is as good. Anything else is kept under another name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn make_way(&self, place: &Path) -> Result<()> {
        if !place.exists() {
            return Ok(());
        }
        if step_in(place) == step_of(place) {
            return self.remove(place);
        }
        let mut aside = place.with_extension(ASIDE);
        let mut number = 1;
        while aside.exists() {
            number += 1;
            aside = place.with_extension(format!("{ASIDE}-{number}"));
        }
        tracing::warn!(
            "{} is not the checkpoint of its name: it becomes {}",
            place.display(),
            aside.display()
        );
        rename_folder(place, &aside)?;
        Ok(())
    }

    fn keeps_for_ever(&self, step: u64) -> bool {
        self.keep_every_steps > 0 && step.is_multiple_of(self.keep_every_steps)
    }

    /// Removes a folder, first its name: a kill leaves nothing that looks like a checkpoint.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn remove(&self, folder: &Path) -> Result<()> {
        let removed = folder.with_extension(REMOVED);
        if removed.exists() {
            fs::remove_dir_all(&removed).map_err(Error::io(&removed))?;
        }
        rename_folder(folder, &removed)?;
        fs::remove_dir_all(&removed).map_err(Error::io(&removed))
    }

    fn entries(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(Error::io(&self.folder))? {
            found.push(entry.map_err(Error::io(&self.folder))?.path());
        }
        Ok(found)
    }
}

/// Whether a folder is what an interrupted save or removal of a checkpoint left.
fn is_leftover(path: &Path) -> bool {
    let extension = path.extension().and_then(OsStr::to_str);
    matches!(extension, Some(UNFINISHED | REMOVED)) && step_of(&path.with_extension("")).is_some()
}

/// Whether a folder is the checkpoint that its name says, or cannot be told from it because its
/// `state.json` is damaged.
fn is_checkpoint_or_damaged(path: &Path) -> bool {
    let Some(step) = step_of(path) else {
        return false;
    };
    path.join(STATE).is_file() && step_in(path).is_none_or(|found| found == step)
}

/// The part of `state.json` that says which step it is of.
#[derive(Deserialize)]
struct OfStep {
    position: Position,
}

/// Returns the step in a checkpoint's `state.json`; `None` if that cannot be read.
fn step_in(checkpoint: &Path) -> Option<u64> {
    let text = text_file::read(&checkpoint.join(STATE)).ok()?;
    let state: OfStep = serde_json::from_str(&text).ok()?;
    Some(state.position.cursor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::sections::CheckpointConfig;

    /// Checkpoints of which `keep` are kept, and their folder.
    fn checkpoints(keep: usize, keep_every_steps: u64) -> (tempfile::TempDir, Checkpoints) {
        let run = tempfile::tempdir().expect("a temporary folder");
        let config = CheckpointConfig {
            keep,
            keep_every_steps,
            ..CheckpointConfig::default()
        };
        let checkpoints = Checkpoints::at(run.path(), &config);
        checkpoints.clean().expect("a writable folder");
        (run, checkpoints)
    }

    /// Makes the folder `name` with the `state.json` of a step.
    fn make(checkpoints: &Checkpoints, name: &str, step: u64) {
        let state = format!(r#"{{"position": {{"cursor": {step}, "update": 0, "samples": 0}}}}"#);
        make_with(checkpoints, name, &state);
    }

    fn make_with(checkpoints: &Checkpoints, name: &str, state: &str) {
        let folder = checkpoints.folder.join(name);
        fs::create_dir_all(folder.join("unet")).expect("a writable folder");
        fs::write(folder.join("unet/weights"), "weights").expect("writes");
        fs::write(folder.join(STATE), state).expect("writes");
    }

    fn names(checkpoints: &Checkpoints) -> Vec<String> {
        let entries = checkpoints.entries().expect("a readable folder");
        let name = |path: &PathBuf| {
            path.file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into()
        };
        let mut names: Vec<String> = entries.iter().map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn only_checkpoints_of_the_run_are_counted_and_removed() {
        let (_run, checkpoints) = checkpoints(1, 0);
        for (name, step) in [
            ("step-00000004", 4),
            ("step-00000008", 8),
            // Copies, under names that are not checkpoints' or of other steps.
            ("step-9", 8),
            ("step-000000009", 9),
            ("step-+0000009", 9),
            ("step-00000099", 8),
            ("step-00000008.damaged", 8),
            ("step-00000008.bak", 8),
            ("best", 8),
        ] {
            make(&checkpoints, name, step);
        }
        make_with(&checkpoints, "step-00000002", "{");
        let written = checkpoints.place(8);
        checkpoints.prune(&written).expect("removes");
        let expected = [
            "best",
            "step-+0000009",
            "step-000000009",
            "step-00000002",
            "step-00000008",
            "step-00000008.bak",
            "step-00000008.damaged",
            "step-00000099",
            "step-9",
        ];
        assert_eq!(names(&checkpoints), expected);
        let listed = checkpoints.list().expect("lists");
        assert_eq!(listed, [checkpoints.place(2), written]);
    }

    #[test]
    fn what_was_just_written_stays() {
        let (_run, checkpoints) = checkpoints(2, 0);
        for step in [3, 100, 200, 300] {
            make(&checkpoints, &format!("step-{step:08}"), step);
        }
        checkpoints.prune(&checkpoints.place(3)).expect("removes");
        let expected = ["step-00000003", "step-00000200", "step-00000300"];
        assert_eq!(names(&checkpoints), expected);
    }

    #[test]
    fn what_is_being_copied_stays_until_it_is_copied() {
        let (_run, checkpoints) = checkpoints(1, 0);
        for step in [4, 8] {
            make(&checkpoints, &format!("step-{step:08}"), step);
        }
        // The copy is made by a thread with a clone.
        checkpoints.clone().pin().hold(4);
        checkpoints.prune(&checkpoints.place(8)).expect("removes");
        assert_eq!(names(&checkpoints), ["step-00000004", "step-00000008"]);
        checkpoints.pin().release();
        checkpoints.prune(&checkpoints.place(8)).expect("removes");
        assert_eq!(names(&checkpoints), ["step-00000008"]);
    }

    #[test]
    fn a_name_is_freed_without_losing_what_is_no_checkpoint_of_its_step() {
        let (_run, checkpoints) = checkpoints(3, 0);
        let place = checkpoints.place(12);
        for (step, left) in [
            (12, &[][..]),
            (8, &["step-00000012.aside"]),
            (4, &["step-00000012.aside", "step-00000012.aside-2"]),
        ] {
            make(&checkpoints, "step-00000012", step);
            checkpoints.make_way(&place).expect("frees the name");
            assert_eq!(names(&checkpoints), left, "{step}");
        }
        checkpoints.make_way(&place).expect("it is free");
    }

    #[test]
    fn what_a_kill_left_is_removed_and_what_others_made_is_not() {
        let (_run, checkpoints) = checkpoints(3, 0);
        for name in [
            "step-00000004.removed",
            "step-00000008.unfinished",
            "step-00000012",
            "notes.unfinished",
            "my-removed",
            "step-9.removed",
        ] {
            make(&checkpoints, name, 12);
        }
        let headless = checkpoints.folder.join("step-00000002/unet");
        fs::create_dir_all(headless).expect("a writable folder");
        checkpoints.clean().expect("removes");
        let expected = [
            "my-removed",
            "notes.unfinished",
            "step-00000002",
            "step-00000012",
            "step-9.removed",
        ];
        assert_eq!(names(&checkpoints), expected);
        // A removal that was cut off before is no obstacle to the next.
        make(&checkpoints, "step-00000012.removed", 12);
        checkpoints.remove(&checkpoints.place(12)).expect("removes");
        assert!(!names(&checkpoints).contains(&"step-00000012".to_owned()));
        assert!(!names(&checkpoints).contains(&"step-00000012.removed".to_owned()));
    }
}
