//! The live line of `rectiflow train`: where training stands, redrawn on a terminal, and what is
//! printed above it.

use rectiflow_train::{
    metrics::{Event, GuardEvent, Start, StepMetrics, TestMetrics},
    recipe::Checked,
};

use crate::terminal::{
    log,
    numbers::{bytes, duration, flops, grouped, short},
    progress::Progress,
};

/// Weight of the newest value in the smoothed numbers of the line.
const NEWEST_SHARE: f64 = 0.05;

/// The line that shows where training stands.
pub(crate) struct Live {
    samples: u64,
    bar: Option<Progress>,
    loss: Option<f64>,
    /// Share of the time spent waiting for data, smoothed.
    waiting: Option<f64>,
    /// FLOP/s.
    speed: Option<f64>,
    /// Peak of the GPU, in FLOP/s, where it is known.
    peak: Option<f64>,
    test: Option<f64>,
    /// The guard's acts, in words.
    guard: String,
    skips: u64,
    rewinds: u64,
    said_stopping: bool,
}

impl Live {
    pub(crate) fn new(checked: &Checked) -> Self {
        let guard = if checked.recipe.guard.enabled {
            "guard quiet"
        } else {
            "guard off"
        };
        Self {
            samples: checked.recipe.train.samples,
            bar: None,
            loss: None,
            waiting: None,
            speed: None,
            peak: checked.peak_flops(),
            test: None,
            guard: guard.to_owned(),
            skips: 0,
            rewinds: 0,
            said_stopping: false,
        }
    }

    pub(crate) fn show(&mut self, event: &Event) {
        match event {
            Event::Start(start) => Self::show_start(start),
            Event::Step(step) => self.show_step(step),
            Event::Test(test) => self.show_test(test),
            Event::Checkpoint { name, secs, .. } => {
                log::line(&format!("saved {name} in {}", duration(*secs)))
            }
            Event::Guard(act) => self.show_guard(act),
            Event::Preview { name, secs, .. } => {
                log::line(&format!("drew previews/{name} in {}", duration(*secs)))
            }
            // A failed save is logged as an error already; vital signs go to the file only.
            Event::SaveFailed { .. } | Event::Vitals(_) | Event::End { .. } => {}
        }
    }

    fn show_start(start: &Start) {
        let begins = match &start.branched_from {
            Some(checkpoint) => format!("branching from {}", checkpoint.display()),
            None if start.step == 0 => "training".to_owned(),
            None => format!("resuming at step {}", start.step),
        };
        log::line(&format!(
            "{begins}: {} parameters, {} pictures in {} buckets, {} held out, {} threads",
            grouped(start.num_parameters),
            grouped(start.num_train),
            start.buckets.len(),
            grouped(start.num_test),
            start.threads
        ));
        if start.ranks > 1 {
            let idle = 100.0 * start.idle_share;
            log::line(&format!(
                "{} ranks; they wait {idle:.0}% of the time for the ranks with one lane more",
                start.ranks
            ));
        }
        for change in &start.changes {
            log::line(&format!("the recipe has changed: {change}"));
        }
        if start.snapshot_bytes > 0 {
            let memory = bytes(start.snapshot_bytes);
            log::line(&format!(
                "the guard's snapshots take up to {memory} of memory (guard.snapshot_updates)"
            ));
        }
        if start.num_test == 0 {
            tracing::warn!("the data has no test split, so no test loss is measured");
        }
    }

    fn show_test(&mut self, test: &TestMetrics) {
        self.test = Some(test.loss);
        let bins: Vec<String> = test
            .bins
            .iter()
            .filter(|bin| bin.count > 0)
            .map(|bin| short(bin.loss, 3))
            .collect();
        let at = grouped(test.samples);
        let also = [
            ("averaged weights", &test.ema),
            ("training samples", &test.training),
        ];
        let also = also
            .iter()
            .filter_map(|(of, losses)| Some(format!(", {of} {}", short(losses.as_ref()?.loss, 4))));
        log::line(&format!(
            "test loss {}{} at {at} samples (little noise to much: {})",
            short(test.loss, 4),
            also.collect::<String>(),
            bins.join(" ")
        ));
    }

    fn show_guard(&mut self, act: &GuardEvent) {
        match act.action.as_str() {
            // Clipping is routine.
            "clip" => return,
            "skip" => self.skips += 1,
            "rewind" => self.rewinds += 1,
            _ => {}
        }
        self.guard = format!("guard: {} skipped, {} rewound", self.skips, self.rewinds);
        let evidence = act
            .black_box
            .as_ref()
            .map_or_else(String::new, |name| format!(" (blackbox/{name})"));
        tracing::warn!(
            "guard, step {}: {}: {}{evidence}",
            act.step,
            act.action,
            act.reason
        );
    }

    fn show_step(&mut self, step: &StepMetrics) {
        if self.bar.is_none() {
            // The rate counts from here: steps of an earlier process and this one's first step do
            // not count.
            self.bar = Some(Progress::new(
                "train",
                "samples",
                step.samples,
                self.samples,
            ));
        }
        if step.applied && step.loss.is_finite() {
            follow(&mut self.loss, step.loss);
        }
        follow(&mut self.waiting, step.data_secs / step.secs.max(1e-9));
        follow(&mut self.speed, step.flops_per_sec());
        let note = self.note(step);
        if let Some(bar) = &mut self.bar {
            bar.set(step.samples, &note);
        }
    }

    /// The text beside the bar: everything but progress and rate.
    fn note(&self, step: &StepMetrics) -> String {
        let mut note = format!(
            "step {}, loss {}, gradient {}, lr {}",
            step.step,
            short(self.loss.unwrap_or(f64::NAN), 4),
            short(step.gradient_norm, 3),
            short(step.lr, 3)
        );
        if let Some(test) = self.test {
            note += &format!(", test loss {}", short(test, 4));
        }
        note += &format!(", {}", arithmetic(self.speed.unwrap_or(0.0), self.peak));
        note += &format!(
            ", {:.0}% waiting for data, {}",
            100.0 * self.waiting.unwrap_or(0.0),
            self.guard
        );
        if let Some(slowest) = step.ranks.as_ref().and_then(|ranks| ranks.slowest) {
            note += &format!(
                ", rank {} is {:.0}% slower than the others",
                slowest.rank,
                100.0 * slowest.lag
            );
        }
        if let Some(spent) = step.spent {
            note += &format!(", spent {spent:.2}");
        }
        note
    }

    pub(crate) fn say_stopping(&mut self) {
        if !std::mem::replace(&mut self.said_stopping, true) {
            log::line(
                "stopping: saving a checkpoint (Ctrl-C after this stops at once and loses the \
                 steps since the last one)",
            );
        }
    }

    pub(crate) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }
}

/// MFU where the peak is known, FLOP/s otherwise.
fn arithmetic(speed: f64, peak: Option<f64>) -> String {
    match peak {
        Some(peak) => format!("MFU {:.1}%", 100.0 * speed / peak),
        None => format!("{}/s", flops(speed)),
    }
}

/// Moves a running mean towards its newest number.
fn follow(mean: &mut Option<f64>, newest: f64) {
    let old = mean.unwrap_or(newest);
    *mean = Some(old + NEWEST_SHARE * (newest - old));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_all_that_a_person_watches() {
        let mut live = Live {
            samples: 1000,
            bar: None,
            loss: None,
            waiting: None,
            speed: None,
            peak: None,
            test: Some(0.25),
            guard: "guard quiet".into(),
            skips: 0,
            rewinds: 0,
            said_stopping: false,
        };
        let step = StepMetrics {
            step: 7,
            samples: 224,
            epoch: 0,
            loss: 0.5,
            gradient_norm: 1.25,
            norm_by_component: std::collections::BTreeMap::new(),
            lr: 1e-4,
            secs: 2.0,
            data_secs: 0.5,
            flops: 3_000_000_000_000,
            applied: true,
            spent: Some(3.456),
            resident_bytes: None,
            ranks: None,
        };
        live.show_step(&step);
        let line = "step 7, loss 0.5, gradient 1.25, lr 0.0001, test loss 0.25, 1.5 TFLOP/s, 25% waiting for data, guard quiet, \
                    spent 3.46";
        assert_eq!(live.note(&step), line);
        live.peak = Some(989.4e12);
        assert!(
            live.note(&step).contains(", MFU 0.2%, "),
            "{}",
            live.note(&step)
        );
        // A skipped step does not enter the smoothed loss.
        live.show_guard(&GuardEvent {
            step: 8,
            action: "skip".into(),
            reason: "the loss is 5e9".into(),
            update: 7,
            black_box: None,
        });
        let skipped = StepMetrics {
            loss: 5e9,
            applied: false,
            ..step
        };
        live.show_step(&skipped);
        assert!(
            live.note(&skipped).contains("loss 0.5, ")
                && live.note(&skipped).contains("guard: 1 skipped, 0 rewound")
        );
    }
}
