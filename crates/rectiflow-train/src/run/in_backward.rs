//! The course of a step that updates each tensor during its backward pass
//! (`train.update_in_backward`).
//!
//! The guard judges the loss before the backward pass, and may skip the step. A gradient that is
//! not finite is found when other tensors are already updated: the state is lost, and the run goes
//! back to a snapshot or, without any, to the newest checkpoint.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use rectiflow_data::batch::Step;

use crate::{
    checkpoint::{found::Found, restore},
    error::{Error, Result},
    guard::Verdict,
    measure::metrics::{Event, StepMetrics},
    ranks::exchange::Passes,
    run::{
        Run,
        step_record::{Seen, StepSecs},
    },
    step::{in_backward::Forward, step_flops::Configs},
};

impl Run<'_> {
    /// One step, and the measurements and checkpoints that are due after it.
    pub(super) fn step_in_backward(&mut self, stop: &AtomicBool) -> Result<()> {
        let comm = self.parts.comm;
        let number = self.state.position.cursor + 1;
        let began = Instant::now();

        // Read, predict, and let the guard judge.
        let mut step = self.read_step(number)?;
        let data_secs = began.elapsed().as_secs_f64();
        if let Some(before_step) = &mut self.before_step {
            before_step(&mut step, &mut self.state);
        }
        let lr = self.lr();
        let _doing = comm.work(|| format!("in the passes and updates of step {number}"));
        self.exchange.wait_gathers()?;
        let forward = self.stepper.forward(&step)?;
        let (passes, applied) = self.act_in_backward(&step, forward, lr)?;
        self.told_to_stop |= stop.load(Ordering::Relaxed);
        let is_written = self.saver.is_written();

        // Record the step, then do what is due after it.
        let secs = StepSecs {
            step: began.elapsed().as_secs_f64(),
            data: data_secs,
            passes: began.elapsed().as_secs_f64() - data_secs,
        };
        let metrics = Seen::of(&passes, &self.state, lr).metrics(&step, self.state.position, secs);
        self.emit(Event::Step(StepMetrics {
            flops: Configs::of(self.parts.model).step_flops(&self.recipe().train, &step),
            applied,
            spent: self.spent(),
            ..metrics
        }));
        if is_written {
            self.finish_saving()?;
        }
        self.after_step()
    }

    /// Asks the guard about the loss and acts on its verdict. Returns what was measured, and
    /// whether the update was applied.
    fn act_in_backward(
        &mut self,
        step: &Step,
        forward: Forward,
        lr: f64,
    ) -> Result<(Passes, bool)> {
        let config = &self.parts.checked.recipe.guard;
        let verdict = if config.enabled {
            self.guard.judge_loss(config, forward.value)
        } else if forward.value.is_finite() {
            Verdict::Continue
        } else {
            return Err(Error::NotFinite {
                step: step.step,
                what: "loss",
                value: forward.value,
            });
        };
        let before = forward.without_gradient();
        match verdict {
            Verdict::Continue | Verdict::Clip { .. } => {
                return self.update_in_backward(step, forward, lr);
            }
            Verdict::Skip { reason } => {
                self.remember(step, &before, lr);
                self.skip(step, reason)?;
            }
            Verdict::Rewind { back, reason } => {
                self.remember(step, &before, lr);
                self.go_back(step, back, reason)?;
            }
            Verdict::Stop { reason } => {
                self.remember(step, &before, lr);
                return Err(self.stop(step, reason));
            }
        }
        Ok((before, false))
    }

    /// Runs the backward pass with its updates.
    fn update_in_backward(
        &mut self,
        step: &Step,
        forward: Forward,
        lr: f64,
    ) -> Result<(Passes, bool)> {
        let updated = self.stepper.backward(&mut self.state, step, forward, lr)?;
        self.remember(step, &updated.passes, lr);
        if let Some(name) = updated.broken {
            self.recover(step, &name)?;
            return Ok((updated.passes, false));
        }
        if updated.num_scaled > 0 {
            let num_tensors = self.state.parameters.slices.len();
            tracing::debug!(
                "step {}: the gradients of {} of {num_tensors} tensors were scaled down to \
                 train.clip_ratio times their usual norm",
                step.step + 1,
                updated.num_scaled
            );
        }
        if !self.guard.is_suspicious() {
            self.ring
                .keep(&self.state, &self.guard.normal, self.parts.comm)?;
        }
        Ok((updated.passes, true))
    }

    /// Goes back, since a gradient was not finite after other tensors had been updated; ends the
    /// run without a checkpoint if there is nothing to go back to.
    fn recover(&mut self, step: &Step, name: &str) -> Result<()> {
        let config = &self.parts.checked.recipe.guard;
        let reason = format!("the gradient of {name} is not finite, and other tensors are updated");
        if !config.enabled {
            return Err(Error::HalfUpdated {
                step: step.step,
                tensor: name.to_owned(),
            });
        }
        match self.guard.judge_half_updated(config, reason) {
            Verdict::Rewind { back, reason } => self.go_back(step, back, reason),
            Verdict::Stop { reason } => Err(self.stop(step, reason)),
            Verdict::Continue | Verdict::Clip { .. } | Verdict::Skip { .. } => {
                unreachable!("a state that is lost is not continued")
            }
        }
    }

    /// Restores a snapshot or, if there are none, the newest checkpoint, and passes over all steps
    /// since then, this one included; stops the run if there is neither.
    fn go_back(&mut self, step: &Step, back: u64, reason: String) -> Result<()> {
        if !self.ring.is_useless() {
            return self.rewind(step, back, reason);
        }
        // The newest may still be being written.
        self.finish_saving()?;
        let Some(newest) = self.saver.last().map(Path::to_owned) else {
            let none = "there is neither a snapshot (guard.snapshot_gib) nor a checkpoint \
                        (checkpoint.every_steps) to go back to; no checkpoint is written";
            return Err(self.stop(step, format!("{reason}; {none}")));
        };
        let black_box = self.black_box("rewind", &reason)?;
        self.restore_checkpoint(step, newest)?;
        self.emit_guard("rewind", reason, black_box);
        Ok(())
    }

    fn restore_checkpoint(&mut self, step: &Step, newest: PathBuf) -> Result<()> {
        let Found { path, saved, .. } = Found::whole(&newest)?;
        restore::reload(&path, &saved, &mut self.state)?;
        self.guard.normal = saved.guard.normal.clone();
        self.state.pass_over(saved.position.cursor..step.step + 1);
        Ok(())
    }
}
