//! The effects of the guard's verdicts on a run: skip, clip, rewind and stop, and the evidence that
//! each of them leaves.
//!
//! A verdict follows from numbers that are the same on all ranks, so that all ranks do the same.

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
    run::{Run, stop_file},
    state::{Position, gradient_vector::GradientVector},
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
            Verdict::Continue => self.update(step, passes, unclipped)?,
            Verdict::Clip { norm, reason } => {
                self.update(step, passes, Rates { norm, lr })?;
                self.emit_guard("clip", reason, None);
            }
            Verdict::Skip { reason } => {
                let black_box = self.black_box("skip", &reason)?;
                self.state.pass_over(step.step..step.step + 1);
                self.emit_guard("skip", reason, black_box);
                return Ok(false);
            }
            Verdict::Rewind { reason, .. } if self.ring.is_useless() => {
                let none = "guard.snapshot_gib leaves no room for a snapshot to go back to";
                return Err(self.stop(step, format!("{reason}; {none}")));
            }
            Verdict::Rewind { back, reason } => {
                let black_box = self.black_box("rewind", &reason)?;
                self.rewind(step, back)?;
                self.emit_guard("rewind", reason, black_box);
                return Ok(false);
            }
            Verdict::Stop { reason } => return Err(self.stop(step, reason)),
        }
        Ok(true)
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
        let modules = vitals::measure(
            &self.state,
            gradients,
            lr,
            &self.stepper.ratios,
            &self.exchange,
        )?;
        let losses = std::mem::replace(
            &mut self.losses,
            Bins::new(self.parts.checked.recipe.test.bins),
        );
        let training = losses.of_all(self.parts.comm)?.means();
        let largest = self
            .parts
            .comm
            .gather_number(self.stepper.largest_logit(step)?)?;
        let larger = |a: f64, b: f64| {
            if a.is_nan() || b.is_nan() {
                f64::NAN
            } else {
                a.max(b)
            }
        };
        let largest = largest.into_iter().fold(f64::NEG_INFINITY, larger);
        let (step, largest_logit) = (self.state.position.cursor, Some(Lossless(largest)));
        let vitals = VitalsMetrics {
            step,
            modules,
            training,
            largest_logit,
        };
        self.recorder.record_vitals(&vitals);
        self.emit(Event::Vitals(vitals));
        Ok(())
    }

    /// Restores a snapshot and passes over all steps since then, this one included.
    fn rewind(&mut self, step: &Step, back: u64) -> Result<()> {
        let update = self.state.position.update;
        let snapshot = self
            .ring
            .back(update, back)
            .expect("the first snapshot was taken before the first step");
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
    fn stop(&mut self, step: &Step, reason: String) -> Error {
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
    fn black_box(&mut self, action: &str, reason: &str) -> Result<Option<String>> {
        // The black box names the newest checkpoint, from which its steps can be repeated.
        self.finish_saving()?;
        let comm = self.parts.comm;
        let recipe = self.parts.checked.recipe.to_toml();
        let checkpoint = self
            .saver
            .last()
            .map(|place| place.canonicalize().unwrap_or_else(|_| place.to_owned()));
        let steps = self.recorder.steps_of_all(comm)?;
        let write = || match self.recorder.write(
            action,
            reason,
            recipe,
            checkpoint,
            (comm.rank().ranks, steps),
        ) {
            Ok(name) => Some(name),
            Err(error) => {
                tracing::warn!("the black box of this action could not be written: {error}");
                None
            }
        };
        comm.first(|| Ok(write()))
    }

    pub(super) fn emit_guard(&mut self, action: &str, reason: String, black_box: Option<String>) {
        let Position {
            cursor: step,
            update,
            ..
        } = self.state.position;
        self.emit(Event::Guard(GuardEvent {
            step,
            action: action.to_owned(),
            reason,
            update,
            black_box,
        }));
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
