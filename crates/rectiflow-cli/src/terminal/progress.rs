//! Progress of a long job: a bar on a terminal, a plain line every few seconds in a log.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use crate::terminal::{log, numbers};

/// Seconds between two lines in a log.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// The progress of one job.
#[derive(Debug)]
pub(crate) struct Progress {
    what: String,
    unit: &'static str,
    bar: Option<ProgressBar>,
    began: Instant,
    last_line: Instant,
    /// Units done before this process started; they do not enter its rate.
    start: u64,
    total: u64,
    done: u64,
}

impl Progress {
    /// A job of `total` units, of which `start` are done already.
    pub(crate) fn new(what: impl Into<String>, unit: &'static str, start: u64, total: u64) -> Self {
        let what = what.into();
        let bar = io::stderr().is_terminal().then(|| {
            let bar = log::bars().add(ProgressBar::new(total));
            let style = ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len} {msg}");
            bar.set_style(style.expect("the template is a constant and valid"));
            bar.set_prefix(what.clone());
            bar
        });
        let now = Instant::now();
        Self {
            what,
            unit,
            bar,
            began: now,
            last_line: now,
            start,
            total,
            done: start,
        }
    }

    /// Shows `done` units, with a short note beside them.
    pub(crate) fn set(&mut self, done: u64, note: &str) {
        self.done = done;
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(joined(&[&self.speed(), note]));
        } else if self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let percent = 100 * done / self.total.max(1);
            let unit = self.unit;
            let (done, total) = (numbers::grouped(done), numbers::grouped(self.total));
            let far = format!("{done} of {total} {unit} ({percent}%)");
            log::line(&format!(
                "{}: {}",
                self.what,
                joined(&[&far, &self.speed(), note])
            ));
        }
    }

    /// Removes the bar.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }

    /// `None` before there is enough to judge by.
    fn speed(&self) -> String {
        if self.done <= self.start {
            return String::new();
        }
        let secs = self.began.elapsed().as_secs_f64();
        let rate = (self.done - self.start) as f64 / secs.max(1e-3);
        let left = (self.total - self.done.min(self.total)) as f64 / rate;
        format!(
            "{}/s, {} left",
            numbers::short(rate, 3),
            numbers::duration(left)
        )
    }
}

/// The parts that are not empty, joined by commas.
fn joined(parts: &[&str]) -> String {
    parts
        .iter()
        .copied()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join(", ")
}
