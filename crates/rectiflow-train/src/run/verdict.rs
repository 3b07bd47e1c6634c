//! The effects of the guard's verdicts on a run: skip, clip, rewind and stop, and the evidence that
//! each of them leaves.
//!
//! A verdict follows from numbers that are the same on all ranks, so that all ranks do the same.

use std::path::{Path, PathBuf};

use rectiflow_data::batch::Step;

use crate::{
    error::{Error, Result},
    guard::{Observation, Verdict},
    measure::{
        bins::Bins,
        metrics::{Event, GuardEvent, Lossless, VitalsMetrics},
        vitals,
    },
    ranks::exchange::Passes,
    run::{Run, blackbox::Evidence, stop_file},
    state::gradient_vector::GradientVector,
    step::Rates,
};

impl Run<'_> {
    /// Asks the guard and acts on its verdict. Returns whether the update was applied.
    pub(super) fn act(&mut self, step: &Step, passes: Passes, lr: f64) -> Result<bool> {
        let config = &self.parts.checked.recipe.guard;
        let seen = Observation {
            loss: passes.loss,
            gradient_norm: passes.gradient_norm,
        };
        let unclipped = Rates {
            norm: f64::INFINITY,
            lr,
        };
        if !config.enabled {
            check_finite(step, seen)?;
            self.update(step, passes, unclipped)?;
            return Ok(true);
        }
        match self.guard.judge(config, seen) {
            // The update is applied.
            Verdict::Continue => self.update(step, passes, unclipped)?,
            Verdict::Clip { norm, reason } => {
                self.update(step, passes, Rates { norm, lr })?;
                self.emit_guard("clip", reason, None);
            }
            // The update is not applied.
            Verdict::Skip { reason } => {
                self.skip(step, reason)?;
                return Ok(false);
            }
            Verdict::Rewind { back, reason } => {
                self.rewind(step, back, reason)?;
                return Ok(false);
            }
            Verdict::Stop { reason } => return Err(self.stop(step, reason)),
        }
        Ok(true)
    }

    /// Passes over a step without an update.
    pub(super) fn skip(&mut self, step: &Step, reason: String) -> Result<()> {
        let black_box = self.black_box("skip", &reason)?;
        self.state.pass_over(step.step..step.step + 1);
        self.emit_guard("skip", reason, black_box);
        Ok(())
    }

    fn update(&mut self, step: &Step, passes: Passes, rates: Rates) -> Result<()> {
        let gradients =
            self.stepper
                .update(&mut self.state, step, passes, rates, &self.exchange)?;
        let every = self.parts.checked.recipe.guard.vitals_every_updates;
        if every > 0 && self.state.position.update.is_multiple_of(every) {
            self.take_vitals(step, &gradients, rates.lr)?;
        }
        if !self.guard.is_suspicious() {
            self.ring
                .keep(&self.state, &self.guard.normal, self.parts.comm)?;
        }
        Ok(())
    }

    /// Measures and records the vital signs of the update just applied.
    fn take_vitals(&mut self, step: &Step, gradients: &GradientVector, lr: f64) -> Result<()> {
        let ratios = &self.stepper.ratios;
        let modules = vitals::measure(&self.state, gradients, lr, ratios, &self.exchange)?;

        // The losses by noise level since the last measurement.
        let comm = self.parts.comm;
        let empty = Bins::new(self.parts.checked.recipe.test.bins);
        let losses = std::mem::replace(&mut self.losses, empty);
        let training = losses.of_all(comm)?.means();

        let logits = comm.gather_number(self.stepper.largest_logit(step)?)?;
        let vitals = VitalsMetrics {
            step: self.state.position.cursor,
            modules,
            training,
            largest_logit: Some(Lossless(largest(&logits))),
        };
        self.recorder.record_vitals(&vitals);
        self.emit(Event::Vitals(vitals));
        Ok(())
    }

    /// Restores a snapshot and passes over all steps since then, this one included; stops the run
    /// if there is no room for snapshots.
    pub(super) fn rewind(&mut self, step: &Step, back: u64, reason: String) -> Result<()> {
        if self.ring.is_useless() {
            let none = "guard.snapshot_gib leaves no room for a snapshot to go back to";
            return Err(self.stop(step, format!("{reason}; {none}")));
        }
        let black_box = self.black_box("rewind", &reason)?;
        self.restore_snapshot(step, back)?;
        self.emit_guard("rewind", reason, black_box);
        Ok(())
    }

    fn restore_snapshot(&mut self, step: &Step, back: u64) -> Result<()> {
        let update = self.state.position.update;
        let snapshot = self
            .ring
            .back(update, back)
            .expect("the first snapshot was taken before the first step");
        // A gather that is not complete would overwrite what is restored.
        self.exchange.wait_gathers()?;
        let restored = snapshot.restore(&mut self.state);
        self.parts.comm.all_could(restored)?;
        self.exchange.publish(&self.state.parameters)?;
        self.guard.normal = snapshot.normal.clone();
        self.state
            .pass_over(snapshot.position.cursor..step.step + 1);
        Ok(())
    }

    /// Records the evidence and the reason, and returns the error that ends the run. The last
    /// checkpoint is not changed.
    pub(super) fn stop(&mut self, step: &Step, reason: String) -> Error {
        let run_dir = self.parts.checked.recipe.run.dir.clone();
        let black_box = match self.black_box("stop", &reason) {
            Ok(black_box) => black_box,
            Err(error) => return error,
        };
        self.state.position.cursor = step.step + 1;
        self.emit_guard("stop", reason.clone(), black_box);
        let secs = self.began.elapsed().as_secs_f64();
        self.emit(Event::End {
            step: self.state.position.cursor,
            reason: "stopped".to_owned(),
            secs,
            reporting_secs: self.watchers.spent_secs(),
        });
        // The file exists before any rank ends: a launcher that restarts all ranks must find it.
        match self
            .parts
            .comm
            .first(|| stop_file::write(&run_dir, &reason))
        {
            Ok(()) => Error::Stopped { run_dir, reason },
            Err(error) => error,
        }
    }

    /// Writes a black box of the last steps and returns its name; a failed write is only a warning.
    pub(super) fn black_box(&mut self, action: &str, reason: &str) -> Result<Option<String>> {
        // The black box names the newest checkpoint, from which its steps can be repeated.
        self.finish_saving()?;
        let comm = self.parts.comm;
        let recipe = self.parts.checked.recipe.to_toml();
        let checkpoint = self.saver.last().map(absolute);
        let steps = self.recorder.steps_of_all(comm)?;
        let evidence = Evidence {
            action: action.to_owned(),
            reason: reason.to_owned(),
            recipe,
            checkpoint,
            ranks: comm.rank().ranks,
            steps,
        };
        comm.first(|| match self.recorder.write(evidence) {
            Ok(name) => Ok(Some(name)),
            Err(error) => {
                tracing::warn!("the black box of this action could not be written: {error}");
                Ok(None)
            }
        })
    }

    pub(super) fn emit_guard(&mut self, action: &str, reason: String, black_box: Option<String>) {
        self.emit(Event::Guard(GuardEvent {
            step: self.state.position.cursor,
            action: action.to_owned(),
            reason,
            update: self.state.position.update,
            black_box,
        }));
    }
}

/// Returns the largest of the ranks' logits; NaN if any is NaN.
fn largest(logits: &[f64]) -> f64 {
    let mut largest = f64::NEG_INFINITY;
    for &logit in logits {
        if largest.is_nan() || logit.is_nan() {
            largest = f64::NAN;
        } else {
            largest = largest.max(logit);
        }
    }
    largest
}

/// Returns the absolute path of a checkpoint, or `place` if it cannot be resolved.
fn absolute(place: &Path) -> PathBuf {
    match place.canonicalize() {
        Ok(full) => full,
        Err(_) => place.to_owned(),
    }
}

fn check_finite(step: &Step, seen: Observation) -> Result<()> {
    for (what, value) in [("loss", seen.loss), ("gradient norm", seen.gradient_norm)] {
        if !value.is_finite() {
            return Err(Error::NotFinite {
                step: step.step,
                what,
                value,
            });
        }
    }
    Ok(())
}
