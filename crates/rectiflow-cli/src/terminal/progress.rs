//! How far a long job is: a bar on a terminal, a plain line every few seconds in a log.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use crate::terminal::{log, numbers};

/// In a log, one line in so many seconds.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// The progress of one job.
#[derive(Debug)]
pub(crate) struct Progress {
    what: String,
    unit: &'static str,
    bar: Option<ProgressBar>,
    began: Instant,
    last_line: Instant,
    /// What was done before this process began, which says nothing about its speed.
    start: u64,
    total: u64,
    done: u64,
}

impl Progress {
    /// A job of `total` units, `start` of them done before.
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
        Self { what, unit, bar, began: now, last_line: now, start, total, done: start }
    }

    /// Says how far the job is, with a few words about where it stands.
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
            log::line(&format!("{}: {}", self.what, joined(&[&far, &self.speed(), note])));
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }

    /// Nothing before there is something to judge by.
    fn speed(&self) -> String {
        if self.done <= self.start {
            return String::new();
        }
        let secs = self.began.elapsed().as_secs_f64();
        let rate = (self.done - self.start) as f64 / secs.max(1e-3);
        let left = (self.total - self.done.min(self.total)) as f64 / rate;
        format!("{}/s, {} left", numbers::short(rate, 3), numbers::duration(left))
    }
}

/// What there is to say, with commas between.
fn joined(parts: &[&str]) -> String {
    parts.iter().copied().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ")
}
