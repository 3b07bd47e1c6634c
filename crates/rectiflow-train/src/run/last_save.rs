//! The end of a run: the last checkpoint, for which it waits if it has to.
//!
//! Until then a failed write is only a warning, since the next checkpoint may be written. The last
//! one has no next: a disk that is full, or a share that is away, is tried again for as long as
//! `checkpoint.retry_secs` says. All ranks count tries instead of seconds, so that they give up
//! together. After that it is written elsewhere (`spare_save`).

use std::{iter, mem, path::Path, thread, time::Duration};

use crate::{
    checkpoint::Checkpoints,
    error::{Error, Result},
    measure::metrics::Event,
    run::{Run, options::Outcome, saver::failed},
};

/// The longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

impl Run<'_> {
    /// Completes a checkpoint that was begun, if the run ends with an error that all ranks share or
    /// has only one rank: the checkpoint is still valid.
    pub(super) fn keep_what_is_written(&mut self, error: &Error) {
        if self.parts.comm.rank().ranks == 1 || matches!(error, Error::NotFinite { .. }) {
            // The error that ended the run is the one to report; a failed write has been logged.
            let _ = self.finish_saving();
        }
    }

    /// Tells the watchers of the error that ends the run; the guard's stop was an event of its own.
    pub(super) fn tell_watchers_of(mut self, error: &Error) {
        let watchers = mem::take(&mut self.watchers);
        let told = (!matches!(error, Error::Stopped { .. })).then_some(error);
        watchers.leave(told, self.began.elapsed().as_secs_f64());
    }

    /// Saves the last checkpoint and records the end.
    pub(super) fn leave(mut self, reason: &str) -> Result<Outcome> {
        self.finish_saving()?;
        self.save_last()?;
        self.exchange.wait_gathers()?;
        let position = self.state.position;
        let secs = self.began.elapsed().as_secs_f64();
        self.emit(Event::End {
            step: position.cursor,
            reason: reason.to_owned(),
            secs,
            reporting_secs: self.watchers.spent_secs(),
        });
        let watchers = mem::take(&mut self.watchers);
        watchers.leave(None, secs);
        let checkpoint = self.saver.last().map(Path::to_owned);
        Ok(Outcome {
            finished: reason == "finished",
            position,
            checkpoint,
        })
    }

    /// Saves the last checkpoint, in as many tries as there is time for.
    fn save_last(&mut self) -> Result<()> {
        let patience = self.recipe().checkpoint.retry_secs;
        for pause in pauses(patience) {
            let Err(error) = self.try_to_save() else {
                return Ok(());
            };
            if error.concerns_all_ranks() {
                return Err(error);
            }
            let step = self.state.position.cursor;
            tracing::error!(
                "the last checkpoint could NOT be written: {error}. The weights are still in \
                 memory: the next try is in {} s, the last one after {patience} s, and a second \
                 signal gives them up. {}",
                pause.as_secs(),
                self.saver.advice()
            );
            self.emit(failed(step, &error));
            let _doing = self.parts.comm.long("waiting to save again");
            thread::sleep(pause);
        }
        match self.try_to_save() {
            Err(error) if !error.concerns_all_ranks() => Err(self.save_in_spare(error)),
            saved => saved,
        }
    }

    fn try_to_save(&mut self) -> Result<()> {
        self.try_to_save_in(self.parts.checkpoints)
    }

    /// Writes a checkpoint to the folder of `checkpoints`.
    pub(super) fn try_to_save_in(&mut self, checkpoints: &Checkpoints) -> Result<()> {
        self.begin_saving_in(checkpoints, false)?;
        let event = self.saver.end_in(checkpoints)?;
        self.emit_if_any(event);
        Ok(())
    }
}

/// Returns the pauses between tries, which double up to a minute and take `total_secs` together.
fn pauses(total_secs: u64) -> impl Iterator<Item = Duration> {
    let mut left = Duration::from_secs(total_secs);
    let mut next = Duration::from_secs(1);
    iter::from_fn(move || {
        let pause = next.min(left);
        left -= pause;
        next = (2 * next).min(LONGEST_PAUSE);
        (!pause.is_zero()).then_some(pause)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_minute_and_last_as_long_as_asked() {
        let secs = |total: u64| {
            pauses(total)
                .map(|pause| pause.as_secs())
                .collect::<Vec<_>>()
        };
        assert_eq!(secs(0), [0; 0]);
        assert_eq!(secs(1), [1]);
        assert_eq!(secs(10), [1, 2, 4, 3]);
        let hour = secs(3600);
        assert_eq!(
            (hour.iter().sum::<u64>(), hour.iter().max()),
            (3600, Some(&60))
        );
    }
}
