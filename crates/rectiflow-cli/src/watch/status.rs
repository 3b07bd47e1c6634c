//! How a run stands, in words and numbers for the head of its page.

use std::time::{SystemTime, UNIX_EPOCH};

use rectiflow_train::metrics::{Start, StepMetrics};
use serde::Serialize;

use crate::{
    terminal::numbers::{bytes, duration, flops, grouped, short},
    watch::run_log::{Moment, RunLog},
};

/// A number with its name.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Tile {
    name: &'static str,
    value: String,
    /// More about it, in a few words.
    note: String,
}

/// How a run stands.
#[derive(Debug, Serialize)]
pub(crate) struct Status {
    /// "waiting", "running", "silent", "finished", "interrupted" or "stopped".
    pub(crate) state: String,
    /// In words, for the line below the name.
    pub(crate) line: String,
    /// Share of the samples that are done, 0 to 1; `None` if their number is not known.
    pub(crate) progress: Option<f64>,
    pub(crate) tiles: Vec<Tile>,
}

/// Moments over which rates are averaged.
const RECENT: usize = 200;
/// A run that writes nothing for this many seconds, and for many of its steps, is called silent.
const SILENT_SECS: f64 = 120.0;
const SILENT_STEPS: f64 = 20.0;

impl Status {
    /// Returns how the run stands; its file was written `quiet_secs` ago, if that is known.
    pub(crate) fn of(log: &RunLog, quiet_secs: Option<f64>) -> Self {
        let recent = Recent::of(log);
        let state = state(log, quiet_secs, &recent);
        let line = line(log, &state, quiet_secs);
        let mut status = Self {
            state,
            line,
            progress: progress(log),
            tiles: Vec::new(),
        };
        if let Some(step) = &log.newest.step {
            status.add_course(log, step, &recent);
            status.add_machine(log, step, &recent);
        }
        status
    }

    fn add(&mut self, name: &'static str, value: String, note: String) {
        self.tiles.push(Tile { name, value, note });
    }

    /// Adds what is learnt and how long it takes.
    fn add_course(&mut self, log: &RunLog, step: &StepMetrics, recent: &Recent) {
        let of = match total(log) {
            Some(total) => format!("of {}", grouped(total)),
            None => format!("epoch {}", step.epoch.saturating_add(1)),
        };
        self.add("Samples", grouped(step.samples), of);
        let left = recent.secs_left(log);
        if let (Some(secs), "running") = (left, self.state.as_str()) {
            self.add("Time left", duration(secs), at_clock(secs));
        }
        let note = format!("mean of {} steps", recent.losses);
        self.add("Training loss", short(recent.loss, 4), note);
        if let Some(test) = &log.newest.test {
            let note = format!("at step {}", grouped(test.step));
            self.add("Test loss", short(test.loss, 4), note);
        }
        let note = format!("rate {}", short(step.lr, 3));
        self.add("Gradient norm", short(step.gradient_norm, 3), note);
    }

    /// Adds what it costs.
    fn add_machine(&mut self, log: &RunLog, step: &StepMetrics, recent: &Recent) {
        let secs = format!("{} a step", duration(recent.step_secs));
        self.add("Samples/s", short(recent.samples_per_sec, 3), secs);
        let waiting = format!("{} %", short(100.0 * recent.waiting, 2));
        self.add("Waiting for data", waiting, String::new());
        let speed = recent.flops_per_sec;
        let peak = log.newest.start.as_ref().and_then(|start| start.peak_flops);
        match peak {
            Some(peak) if speed > 0.0 => {
                let share = format!("{} %", short(100.0 * speed / peak, 3));
                self.add("MFU", share, format!("{}/s", flops(speed)));
            }
            None if speed > 0.0 => {
                self.add("Arithmetic", format!("{}/s", flops(speed)), String::new());
            }
            _ => {}
        }
        if let Some(resident) = step.resident_bytes {
            self.add("Memory", bytes(resident), "of the process".to_owned());
        }
        if let Some(spent) = step.spent {
            let mut note = String::new();
            if let (Some(progress), "running") = (self.progress, self.state.as_str())
                && progress > 0.0
            {
                note = format!("about {} in all", short(spent / progress, 4));
            }
            self.add("Spent", short(spent, 4), note);
        }
        if let Some(checkpoint) = log.newest.checkpoint {
            let note = format!("resumed {} times", log.num_starts.saturating_sub(1));
            self.add("Checkpoint", format!("step {}", grouped(checkpoint)), note);
        }
    }
}

/// Means over the last moments.
#[derive(Debug, Default)]
struct Recent {
    loss: f64,
    /// Steps whose loss is in the mean.
    losses: usize,
    /// Everything between steps included.
    samples_per_sec: f64,
    step_secs: f64,
    waiting: f64,
    flops_per_sec: f64,
}

impl Recent {
    fn of(log: &RunLog) -> Self {
        let losses = finite_tail(log, "loss/training");
        let mut recent = Self {
            loss: mean(&losses),
            losses: losses.len(),
            step_secs: mean(&finite_tail(log, "step_secs/step")),
            waiting: mean(&finite_tail(log, "waiting/share")),
            flops_per_sec: mean(&finite_tail(log, "arithmetic/flops_per_sec")),
            samples_per_sec: 0.0,
        };
        let last: Vec<&Moment> = log.valid().rev().take(RECENT).collect();
        if let (Some(newest), Some(oldest)) = (last.first(), last.last()) {
            let secs = newest.unix_secs - oldest.unix_secs;
            if secs > 0.0 {
                let samples = newest.samples.saturating_sub(oldest.samples);
                recent.samples_per_sec = samples as f64 / secs;
            }
        }
        recent
    }

    fn secs_left(&self, log: &RunLog) -> Option<f64> {
        let left = total(log)?.saturating_sub(log.samples());
        (self.samples_per_sec > 0.0).then(|| left as f64 / self.samples_per_sec)
    }
}

/// The finite ones of a curve's last values.
fn finite_tail(log: &RunLog, name: &str) -> Vec<f64> {
    let values = log.curves.get(name).map_or(&[][..], |curve| &curve.values);
    let tail = &values[values.len().saturating_sub(RECENT)..];
    tail.iter()
        .copied()
        .filter(|value| value.is_finite())
        .collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn total(log: &RunLog) -> Option<u64> {
    let start = log.newest.start.as_ref()?;
    (start.total_samples > 0).then_some(start.total_samples)
}

fn progress(log: &RunLog) -> Option<f64> {
    let share = log.samples() as f64 / total(log)? as f64;
    Some(share.min(1.0))
}

fn state(log: &RunLog, quiet_secs: Option<f64>, recent: &Recent) -> String {
    let patience = SILENT_SECS.max(SILENT_STEPS * recent.step_secs);
    let state = match &log.newest.end {
        Some(reason) => reason.as_str(),
        None if log.newest.start.is_none() => "waiting",
        None if quiet_secs.is_some_and(|secs| secs > patience) => "silent",
        None => "running",
    };
    state.to_owned()
}

fn line(log: &RunLog, state: &str, quiet_secs: Option<f64>) -> String {
    let Some(start) = &log.newest.start else {
        return "No process has begun this run yet.".to_owned();
    };
    let mut line = facts(start);
    match (state, quiet_secs) {
        ("running", Some(secs)) => line += &format!(" Last event {} ago.", duration(secs.floor())),
        ("silent", Some(secs)) => {
            line += &format!(
                " Nothing has been written for {}: it may have been killed, or a step hangs.",
                duration(secs.floor())
            );
        }
        ("stopped", _) => {
            line += " The guard has stopped it; it goes on with --acknowledge-stop.";
        }
        _ => {}
    }
    line
}

fn facts(start: &Start) -> String {
    let mut line = format!(
        "{} parameters, {} pictures in {} buckets, {} held out, ",
        grouped(start.num_parameters),
        grouped(start.num_train),
        start.buckets.len(),
        grouped(start.num_test)
    );
    line += &match start.ranks {
        1 => format!("{} threads.", start.threads),
        ranks => format!("{ranks} ranks."),
    };
    if let Some(ancestor) = &start.branched_from {
        line += &format!(" Branched from {}.", ancestor.display());
    }
    line
}

/// The time of day in UTC, `secs` from now.
fn at_clock(secs: f64) -> String {
    const DAY: u64 = 86_400;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_secs());
    let then = now.saturating_add(secs as u64);
    let days = then / DAY - now / DAY;
    let (hour, minute) = (then % DAY / 3600, then % 3600 / 60);
    match days {
        0 => format!("until {hour:02}:{minute:02} UTC"),
        days => format!("until {hour:02}:{minute:02} UTC, +{days} d"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::watch::run_log::tests::{log_of, start, step};

    fn value<'a>(status: &'a Status, name: &str) -> Option<&'a str> {
        let tile = status.tiles.iter().find(|tile| tile.name == name);
        tile.map(|tile| tile.value.as_str())
    }

    #[test]
    fn a_running_run_says_how_long_it_still_takes() {
        let mut lines = vec![start(0)];
        for number in 1..=40 {
            lines.push(step(number, 8 * number, 0.5));
        }
        let status = Status::of(&log_of(&lines), Some(0.4));
        assert_eq!(
            (status.state.as_str(), status.progress),
            ("running", Some(0.4))
        );
        // 800 samples in all, 16 a second.
        assert_eq!(value(&status, "Time left"), Some("30 s"));
        assert_eq!(value(&status, "Training loss"), Some("0.5"));
        assert_eq!(value(&status, "Waiting for data"), Some("2 %"));
    }

    #[test]
    fn the_end_of_a_run_and_its_silence_are_told() {
        let run = [start(0), step(1, 8, 0.5)];
        assert_eq!(Status::of(&log_of(&run), Some(1e4)).state, "silent");
        assert_eq!(Status::of(&log_of(&[]), None).state, "waiting");
        let end = json!({"event": "end", "step": 1, "reason": "stopped", "secs": 1.0});
        let [first, second] = run;
        let status = Status::of(&log_of(&[first, second, end]), Some(1e4));
        assert_eq!(status.state, "stopped");
        assert!(
            status.line.contains("--acknowledge-stop"),
            "{}",
            status.line
        );
        assert_eq!(value(&status, "Time left"), None);
    }
}
