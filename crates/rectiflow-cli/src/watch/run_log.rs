//! A run in memory: what its events say, as curves, acts and previews.
//!
//! After a resume the steps since the checkpoint come again: theirs are the values that count.
//! After a rewind of the guard the step numbers go on, but the samples come again: the moments in
//! between stay, since they happened, and are marked as undone.

use std::{borrow::Cow, collections::BTreeMap};

use rectiflow_train::metrics::{
    Event, GuardEvent, Start, StepMetrics, TestMetrics,
    curves::{Curves, Number},
};

/// A point in a run at which numbers were measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    /// Steps done.
    pub(crate) step: u64,
    /// Samples of all applied updates.
    pub(crate) samples: u64,
    /// Seconds since 1970, from the process's start and the seconds of what it did since then.
    pub(crate) unix_secs: f64,
    /// Whether a rewind has undone its update.
    pub(crate) is_undone: bool,
}

/// The values of a curve, by moment.
#[derive(Debug, Default)]
pub(crate) struct Curve {
    /// Indices of moments, ascending.
    pub(crate) at: Vec<u32>,
    /// As many.
    pub(crate) values: Vec<f64>,
}

/// Something that is marked in every chart.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Act {
    /// Steps done.
    pub(crate) step: u64,
    /// Samples of all applied updates.
    pub(crate) samples: u64,
    /// Seconds since 1970.
    pub(crate) unix_secs: f64,
    /// "clip", "skip", "rewind", "stop", "acknowledged", "resume" or "save failed".
    pub(crate) action: String,
    /// In words.
    pub(crate) reason: String,
    /// Name of the file below `blackbox/`.
    pub(crate) black_box: Option<String>,
}

/// A preview.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Preview {
    /// Steps done.
    pub(crate) step: u64,
    /// Samples of all applied updates.
    pub(crate) samples: u64,
    /// As the events name it: not to be trusted as a path.
    pub(crate) name: String,
}

/// The newest of what a run said of itself.
#[derive(Debug, Default)]
pub(crate) struct Newest {
    /// The last process.
    pub(crate) start: Option<Start>,
    /// The last step.
    pub(crate) step: Option<StepMetrics>,
    /// The last test loss.
    pub(crate) test: Option<TestMetrics>,
    /// Steps of the last checkpoint.
    pub(crate) checkpoint: Option<u64>,
    /// Why the last process ended; `None` while it runs, or if it was killed.
    pub(crate) end: Option<String>,
}

/// A run.
#[derive(Debug, Default)]
pub(crate) struct RunLog {
    pub(crate) moments: Vec<Moment>,
    /// By name.
    pub(crate) curves: BTreeMap<Cow<'static, str>, Curve>,
    pub(crate) acts: Vec<Act>,
    /// In order of steps, each once.
    pub(crate) previews: Vec<Preview>,
    pub(crate) newest: Newest,
    /// Number of processes that worked on the run.
    pub(crate) num_starts: u64,
    /// Changes when something that a viewer may have is no longer so.
    pub(crate) generation: u64,
    /// Indices of the moments that are not undone.
    valid: Vec<u32>,
    numbers: Curves,
    unix_secs: f64,
}

impl RunLog {
    /// Takes the next event.
    pub(crate) fn take(&mut self, event: Event) {
        let numbers = self.numbers.of(&event);
        match event {
            Event::Start(start) => self.take_start(start),
            Event::Step(step) => {
                self.pass(step.secs);
                self.undo_above(step.samples);
                self.add(step.step, step.samples, numbers);
                self.newest.step = Some(step);
            }
            Event::Test(test) => {
                self.pass(test.secs);
                self.add(test.step, test.samples, numbers);
                self.newest.test = Some(test);
            }
            Event::Vitals(vitals) => self.add(vitals.step, self.samples(), numbers),
            Event::Guard(act) => self.take_guard(act),
            Event::Preview { step, name, secs } => {
                self.pass(secs);
                self.take_preview(step, name);
            }
            Event::Checkpoint { step, .. } => self.newest.checkpoint = Some(step),
            Event::SaveFailed { step, reason } => self.mark(step, "save failed", reason, None),
            Event::End { reason, .. } => self.newest.end = Some(reason),
        }
    }

    /// Returns the moments that are not undone.
    pub(crate) fn valid(&self) -> impl DoubleEndedIterator<Item = &Moment> {
        self.valid.iter().map(|&at| &self.moments[at as usize])
    }

    /// Returns the samples of all applied updates.
    pub(crate) fn samples(&self) -> u64 {
        self.moments.last().map_or(0, |last| last.samples)
    }

    /// A process begins: the steps after its checkpoint were lost and come again.
    fn take_start(&mut self, start: Start) {
        self.drop_after(start.step);
        // A clock that was set back does not turn time around.
        self.unix_secs = self.unix_secs.max(start.unix_secs as f64);
        if self.num_starts > 0 {
            let changes = start.changes.join("; ");
            self.mark(start.step, "resume", changes, None);
        }
        self.num_starts += 1;
        self.newest.end = None;
        self.newest.start = Some(start);
    }

    fn drop_after(&mut self, step: u64) {
        let kept = self.moments.iter().position(|moment| moment.step > step);
        if let Some(kept) = kept {
            self.moments.truncate(kept);
            let kept = kept as u32;
            self.valid
                .truncate(self.valid.partition_point(|&at| at < kept));
            for curve in self.curves.values_mut() {
                curve.at.truncate(curve.at.partition_point(|&at| at < kept));
                curve.values.truncate(curve.at.len());
            }
            self.generation += 1;
        }
        // A stop stays to be seen; other acts come again.
        self.acts
            .retain(|act| act.step <= step || act.action == "stop");
        self.previews.retain(|preview| preview.step <= step);
    }

    /// Marks moments with more samples as undone.
    fn undo_above(&mut self, samples: u64) {
        while let Some(&last) = self.valid.last() {
            let moment = &mut self.moments[last as usize];
            if moment.samples <= samples {
                break;
            }
            moment.is_undone = true;
            self.valid.pop();
            self.generation += 1;
        }
    }

    fn add(&mut self, step: u64, samples: u64, numbers: Vec<Number>) {
        let Ok(at) = u32::try_from(self.moments.len()) else {
            return;
        };
        self.valid.push(at);
        self.moments.push(Moment {
            step,
            samples,
            unix_secs: self.unix_secs,
            is_undone: false,
        });
        for Number { name, value } in numbers {
            let curve = self.curves.entry(name).or_default();
            curve.at.push(at);
            curve.values.push(value);
        }
    }

    fn take_guard(&mut self, act: GuardEvent) {
        self.mark(act.step, &act.action, act.reason, act.black_box);
    }

    fn mark(&mut self, step: u64, action: &str, reason: String, black_box: Option<String>) {
        self.acts.push(Act {
            step,
            samples: self.samples(),
            unix_secs: self.unix_secs,
            action: action.to_owned(),
            reason,
            black_box,
        });
    }

    fn take_preview(&mut self, step: u64, name: String) {
        let before = self.previews.partition_point(|known| known.step < step);
        // A garbled file may name steps in any order.
        self.previews.truncate(before);
        self.previews.push(Preview {
            step,
            samples: self.samples(),
            name,
        });
    }

    fn pass(&mut self, secs: f64) {
        /// A garbled number does not put the next steps beyond all dates.
        const A_YEAR: f64 = 3.2e7;
        if secs.is_finite() && secs > 0.0 {
            self.unix_secs += secs.min(A_YEAR);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    /// A log from lines of JSON.
    pub(crate) fn log_of(lines: &[serde_json::Value]) -> RunLog {
        let mut log = RunLog::default();
        for line in lines {
            log.take(serde_json::from_value(line.clone()).expect("an event"));
        }
        log
    }

    pub(crate) fn start(step: u64) -> serde_json::Value {
        json!({
            "event": "start", "step": step, "unix_secs": 1_795_639_471_u64, "order_hash": "74",
            "num_parameters": 2_624_772, "num_train": 5680, "num_test": 200, "threads": 2,
            "buckets": [[128, 128, 4727, 157]], "total_samples": 800,
        })
    }

    pub(crate) fn step(step: u64, samples: u64, loss: f64) -> serde_json::Value {
        json!({
            "event": "step", "step": step, "samples": samples, "epoch": 0, "loss": loss,
            "gradient_norm": 1.0, "lr": 1e-4, "secs": 0.5, "data_secs": 0.01,
        })
    }

    fn losses(log: &RunLog) -> &[f64] {
        &log.curves["loss/training"].values
    }

    #[test]
    fn after_a_resume_the_new_values_count() {
        let mut lines = vec![start(0)];
        for number in 1..=8 {
            lines.push(step(number, 8 * number, 1.0));
        }
        lines.push(
            json!({"event": "guard", "step": 7, "action": "skip", "reason": "r", "update": 6}),
        );
        lines.push(
            json!({"event": "guard", "step": 8, "action": "stop", "reason": "r", "update": 7}),
        );
        lines.push(start(5));
        for number in 6..=9 {
            lines.push(step(number, 8 * number, 2.0));
        }
        let log = log_of(&lines);
        assert_eq!(losses(&log), [1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]);
        let steps: Vec<u64> = log.moments.iter().map(|moment| moment.step).collect();
        assert_eq!(steps, (1..=9).collect::<Vec<_>>());
        let acts: Vec<_> = log
            .acts
            .iter()
            .map(|act| (act.step, act.action.as_str()))
            .collect();
        assert_eq!(acts, [(8, "stop"), (5, "resume")]);
        assert_eq!((log.generation, log.num_starts), (1, 2));
    }

    #[test]
    fn a_rewind_undoes_the_moments_whose_samples_come_again() {
        let mut lines = vec![start(0)];
        for number in 1..=6 {
            lines.push(step(number, 8 * number, 1.0));
        }
        lines.push(json!({
            "event": "guard", "step": 7, "action": "rewind", "reason": "the loss is 9", "update": 3,
            "black_box": "step-7.json",
        }));
        lines.push(step(7, 24, 9.0));
        lines.push(step(8, 32, 0.5));
        let log = log_of(&lines);
        let undone: Vec<u64> = log
            .moments
            .iter()
            .filter(|m| m.is_undone)
            .map(|m| m.step)
            .collect();
        assert_eq!(undone, [4, 5, 6]);
        let valid: Vec<u64> = log.valid().map(|moment| moment.step).collect();
        assert_eq!(valid, [1, 2, 3, 7, 8]);
        assert_eq!(losses(&log).len(), 8);
        assert_eq!(log.acts[0].black_box.as_deref(), Some("step-7.json"));
    }

    #[test]
    fn garbled_numbers_do_no_harm() {
        let log = log_of(&[
            step(u64::MAX, u64::MAX, 1.0),
            start(u64::MAX),
            start(0),
            step(3, 1, f64::MAX),
            step(1, u64::MAX, 0.0),
            step(2, 0, -1.0),
            json!({"event": "preview", "step": 9, "name": "../../x", "secs": 1e308}),
            json!({"event": "preview", "step": 2, "name": "b", "secs": -1.0}),
        ]);
        assert_eq!(log.moments.len(), 3);
        assert!(log.unix_secs < 2e9);
        assert_eq!(log.previews.len(), 1);
    }
}
