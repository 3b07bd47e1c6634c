//! Checkpoints of a running run: each is begun, written while training continues, and receives its
//! name some steps later. A failed write is only a warning, since space may be freed before the
//! next checkpoint is due.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use crate::{
    checkpoint::{
        Checkpoints, Saved,
        found::Found,
        saving::{Pending, Save},
    },
    error::{Error, Result},
    guard::GuardState,
    measure::metrics::Event,
    run::setup::Parts,
    state::TrainState,
};

/// Writes a run's checkpoints. Methods return the event to record, if there is one.
pub(super) struct Saver<'a> {
    parts: Parts<'a>,
    /// The part of a checkpoint's `state.json` that is the same for all checkpoints of this
    /// process.
    template: Saved,
    /// The checkpoint that is being written.
    pending: Option<Pending>,
    /// Step and path of the newest checkpoint.
    last: Option<(u64, PathBuf)>,
    /// Seconds that earlier processes spent on the run, up to the checkpoint resumed from.
    secs_before: f64,
}

/// What a checkpoint is written from.
pub(super) struct Moment<'a> {
    pub(super) state: &'a TrainState,
    pub(super) guard: &'a GuardState,
    /// Epochs of the data completed, with the fraction of the current one.
    pub(super) epochs: f64,
    /// Seconds spent on the run, those of earlier processes included.
    pub(super) secs: f64,
}

impl<'a> Saver<'a> {
    /// Creates a saver for a run without checkpoints.
    pub(super) fn new(parts: Parts<'a>, template: Saved) -> Self {
        Self {
            parts,
            template,
            pending: None,
            last: None,
            secs_before: 0.0,
        }
    }

    /// Continues from the checkpoint that the run is resumed from.
    pub(super) fn resume(&mut self, found: &Found) {
        self.secs_before = found.saved.secs;
        self.last = Some((found.saved.position.cursor, found.path.clone()));
    }

    /// Whether a checkpoint was trained on this run's data sets.
    pub(super) fn is_same_data(&self, saved: &Saved) -> bool {
        saved.data == self.template.data
    }

    /// Returns the path of the newest checkpoint.
    pub(super) fn last(&self) -> Option<&Path> {
        self.last.as_ref().map(|(_, place)| place.as_path())
    }

    /// Returns the seconds that earlier processes spent on the run.
    pub(super) fn secs_before(&self) -> f64 {
        self.secs_before
    }

    /// Whether this rank has no files left to write.
    pub(super) fn is_written(&self) -> bool {
        self.pending.as_ref().is_none_or(Pending::is_written)
    }

    /// Begins to write a checkpoint to the folder of `checkpoints` unless this step has one.
    /// `goes_on`: whether training continues meanwhile.
    pub(super) fn begin_in(
        &mut self,
        checkpoints: &Checkpoints,
        moment: &Moment<'_>,
        goes_on: bool,
    ) -> Result<()> {
        let step = moment.state.position.cursor;
        if self.last.as_ref().is_some_and(|(saved, _)| *saved == step) {
            return Ok(());
        }
        let comm = self.parts.comm;
        let _doing = comm.long("saving a checkpoint");
        self.pending = Some(checkpoints.begin(&Save {
            saved: &self.saved(moment),
            recipe: &self.parts.checked.recipe.to_toml(),
            trained: self.parts.trained,
            state: moment.state,
            comm,
            goes_on,
        })?);
        Ok(())
    }

    /// Returns the `state.json` of a checkpoint.
    fn saved(&self, moment: &Moment<'_>) -> Saved {
        let state = moment.state;
        let mut moments_from = BTreeMap::new();
        for (group, from) in state.parameters.groups.iter().zip(&state.moments_from) {
            moments_from.insert(group.component.clone(), *from);
        }
        let mut passed_over = Vec::new();
        for steps in &state.passed_over {
            passed_over.push((steps.start, steps.end));
        }
        Saved {
            position: state.position,
            epochs: moment.epochs,
            tensor_norms: state.tensor_norms.clone(),
            moments_from,
            passed_over,
            guard: moment.guard.clone(),
            secs: moment.secs,
            ..self.template.clone()
        }
    }

    /// Waits for the checkpoint that is being written, if any, and renames it to its final name.
    pub(super) fn end(&mut self) -> Result<Option<Event>> {
        self.end_in(self.parts.checkpoints)
    }

    /// As [`Self::end`], for a checkpoint in the folder of `checkpoints`.
    pub(super) fn end_in(&mut self, checkpoints: &Checkpoints) -> Result<Option<Event>> {
        let Some(pending) = self.pending.take() else {
            return Ok(None);
        };
        let comm = self.parts.comm;
        let _doing = comm.long("saving a checkpoint");
        let step = pending.step;
        let began = pending.began;
        let place = checkpoints.finish(pending, comm)?;
        let name = place.file_name().unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        self.last = Some((step, place));
        Ok(Some(Event::Checkpoint {
            step,
            name,
            secs: began.elapsed().as_secs_f64(),
        }))
    }

    /// As [`Self::end`], but a failed write is only a warning.
    pub(super) fn finish(&mut self) -> Result<Option<Event>> {
        let step = self.pending.as_ref().map_or(0, |pending| pending.step);
        let ended = self.end();
        self.or_warn(step, ended)
    }

    /// Turns a failed write into a warning and an event: a full disk is no reason to stop
    /// training, since space may be freed before the next checkpoint is due. Errors that concern
    /// all ranks stay errors.
    pub(super) fn or_warn(&self, step: u64, saved: Result<Option<Event>>) -> Result<Option<Event>> {
        match saved {
            Err(error) if error.concerns_all_ranks() => Err(error),
            Err(error) => {
                tracing::error!(
                    "the checkpoint of step {step} could NOT be written: {error}. If the run ends \
                     without another one, everything since the last checkpoint is lost. {}",
                    self.advice()
                );
                Ok(Some(failed(step, &error)))
            }
            Ok(event) => Ok(event),
        }
    }

    /// Returns what a user can do about a checkpoint that cannot be written.
    pub(super) fn advice(&self) -> String {
        format!(
            "Free some space, or move {} to another disk and put a link in its place",
            self.parts.checkpoints.folder().display()
        )
    }
}

/// Returns the event of a checkpoint that could not be written.
pub(super) fn failed(step: u64, error: &Error) -> Event {
    Event::SaveFailed {
        step,
        reason: error.to_string(),
    }
}
