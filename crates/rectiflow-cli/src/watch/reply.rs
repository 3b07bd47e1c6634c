//! The answers to a page's questions, as JSON.

use std::collections::BTreeMap;

use rectiflow_train::metrics::curves::{CHARTS, Scale};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::watch::{
    ranks::{self, PARTS, RankSecs},
    run_log::{Preview, RunLog},
    source::Source,
    status::Status,
    view::{Acts, Axis, Brief, Frame, View},
};

/// What a page asks of a run.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub(crate) struct Question {
    /// "step", "samples" or "time".
    axis: String,
    from: Option<f64>,
    to: Option<f64>,
    bins: usize,
    /// What the page has: the generation, and how many moments, acts and previews. Without a
    /// generation it has nothing.
    generation: Option<u64>,
    moments: usize,
    acts: usize,
    previews: usize,
}

impl Default for Question {
    fn default() -> Self {
        Self {
            axis: "step".to_owned(),
            from: None,
            to: None,
            bins: 600,
            generation: None,
            moments: 0,
            acts: 0,
            previews: 0,
        }
    }
}

/// What a page is sent of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Reply<'a> {
    name: &'a str,
    generation: u64,
    /// Seconds since 1970 of the run's first moment.
    began: Brief,
    moments: usize,
    num_acts: usize,
    num_previews: usize,
    /// Whether `view` holds the whole frame, and not only what is new.
    is_whole: bool,
    view: View<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    acts: Option<Acts<'a>>,
    /// Steps and samples.
    #[serde(skip_serializing_if = "Option::is_none")]
    previews: Option<Vec<(u64, u64)>>,
    status: Status,
    ranks: Vec<RankSecs>,
    /// What is wrong with the run's file, in words.
    problem: Option<String>,
}

/// More new moments than this are not sent one by one.
const MOST_NEW: usize = 2000;
const FEWEST_BINS: usize = 16;
const MOST_BINS: usize = 4000;

impl Question {
    /// The whole run by steps.
    pub(crate) fn whole(bins: usize) -> Self {
        Self {
            bins,
            ..Self::default()
        }
    }

    /// Returns the frame that is asked for; `None` for an axis that does not exist.
    fn frame(&self) -> Option<Frame> {
        Some(Frame {
            axis: Axis::of(&self.axis)?,
            from: self.from.unwrap_or(f64::NEG_INFINITY),
            to: self.to.unwrap_or(f64::INFINITY),
            bins: self.bins.clamp(FEWEST_BINS, MOST_BINS),
        })
    }

    /// The moments that the page has, if the rest can be sent one by one.
    fn known(&self, log: &RunLog) -> Option<usize> {
        let is_known = self.generation == Some(log.generation) && self.moments <= log.moments.len();
        let num_new = log.moments.len().saturating_sub(self.moments);
        (is_known && num_new <= MOST_NEW).then_some(self.moments)
    }
}

/// A run that has been read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct About<'a> {
    pub(crate) name: &'a str,
    pub(crate) source: &'a Source,
    pub(crate) log: &'a RunLog,
    /// Lines of its file that are no events.
    pub(crate) num_passed_over: u64,
}

impl<'a> Reply<'a> {
    /// Returns the answer about a run; `None` if the question makes no sense.
    pub(crate) fn of(run: About<'a>, question: &Question) -> Option<Self> {
        let log = run.log;
        let frame = question.frame()?;
        let known = question.known(log);
        let acts = (known.is_none() || question.acts != log.acts.len()).then(|| Acts::of(log));
        let has_previews = known.is_some() && question.previews == log.previews.len();
        let start = log.newest.start.as_ref();
        Some(Self {
            name: run.name,
            generation: log.generation,
            began: Brief(log.moments.first().map_or(0.0, |first| first.unix_secs)),
            moments: log.moments.len(),
            num_acts: log.acts.len(),
            num_previews: log.previews.len(),
            is_whole: known.is_none(),
            view: match known {
                Some(first) => View::since(log, first),
                None => View::of(log, &frame),
            },
            acts,
            previews: (!has_previews).then(|| previews(&log.previews)),
            status: Status::of(log, run.source.quiet_secs()),
            ranks: ranks::of(run.source, start.map_or(1, |start| start.ranks)),
            problem: problem(run.num_passed_over),
        })
    }
}

fn previews(previews: &[Preview]) -> Vec<(u64, u64)> {
    let mut list = Vec::with_capacity(previews.len());
    for preview in previews {
        list.push((preview.step, preview.samples));
    }
    list
}

fn problem(num_passed_over: u64) -> Option<String> {
    (num_passed_over > 0).then(|| {
        format!(
            "{num_passed_over} lines of metrics.jsonl are no events that this version of rectiflow \
             knows ({}): a crash has cut them, or another version has written them.",
            env!("CARGO_PKG_VERSION")
        )
    })
}

/// What a page has to know before it asks for runs.
pub(crate) fn charts() -> Value {
    let mut charts = Vec::new();
    for chart in CHARTS.iter().filter(|chart| !chart.is_detail) {
        let scale = match chart.scale {
            Scale::Log => "log",
            Scale::FromZero => "zero",
            Scale::Share => "share",
            Scale::Bytes => "bytes",
        };
        charts.push(json!({
            "name": chart.name, "title": chart.title, "unit": chart.unit, "scale": scale,
            "ramp": chart.is_ramp,
        }));
    }
    json!({ "charts": charts, "parts": PARTS, "version": env!("CARGO_PKG_VERSION") })
}

/// The text of a script element: nothing in it ends the element, and no browser takes a part of it
/// for markup.
pub(crate) fn for_script(value: &impl Serialize) -> String {
    let text = serde_json::to_string(value).expect("plain data that JSON can hold");
    let escapes = BTreeMap::from([
        ('<', "\\u003c"),
        ('>', "\\u003e"),
        ('&', "\\u0026"),
        ('\u{2028}', "\\u2028"),
        ('\u{2029}', "\\u2029"),
    ]);
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match escapes.get(&letter) {
            Some(escape) => safe += escape,
            None => safe.push(letter),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_leaves_its_script_element() {
        let hostile = "</script><script>alert(1)</script><!-- & \u{2028}";
        let text = for_script(&json!({ "reason": hostile }));
        assert!(!text.contains(['<', '>', '&', '\u{2028}']), "{text}");
        let back: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(back["reason"], hostile);
    }
}
