//! What a page is sent of a run: its curves in as many points as a screen can show, acts, previews.
//!
//! A curve with more points than that is divided into bins of equally many. Of each bin the
//! smallest and the largest value are sent with their steps, so that no spike is lost, and the
//! mean. Values that are not finite are listed by themselves.

use std::collections::BTreeMap;

use rectiflow_train::metrics::curves::CHARTS;
use serde::{Serialize, Serializer, ser::SerializeSeq};

use crate::watch::run_log::{Act, Curve, Moment, RunLog};

/// What the horizontal axis counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Axis {
    /// Steps.
    Step,
    /// Samples; moments that a rewind has undone are left out.
    Samples,
    /// Seconds since 1970.
    Time,
}

impl Axis {
    /// Returns the axis of a name: "step", "samples" or "time".
    pub(crate) fn of(name: &str) -> Option<Self> {
        match name {
            "step" => Some(Self::Step),
            "samples" => Some(Self::Samples),
            "time" => Some(Self::Time),
            _ => None,
        }
    }

    /// Returns where a moment is on this axis; `None` if it is not drawn.
    fn place(self, moment: &Moment) -> Option<f64> {
        match self {
            Self::Step => Some(moment.step as f64),
            Self::Samples => (!moment.is_undone).then_some(moment.samples as f64),
            Self::Time => Some(moment.unix_secs),
        }
    }
}

/// Which part of a run is drawn, and how finely.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame {
    /// What the horizontal axis counts.
    pub(crate) axis: Axis,
    /// Its lower end.
    pub(crate) from: f64,
    /// Its upper end.
    pub(crate) to: f64,
    /// Bins of a curve; it has at most twice as many points.
    pub(crate) bins: usize,
}

#[cfg(test)]
impl Frame {
    /// The whole run.
    pub(crate) fn whole(axis: Axis, bins: usize) -> Self {
        Self {
            axis,
            from: f64::NEG_INFINITY,
            to: f64::INFINITY,
            bins,
        }
    }
}

/// The curves of a part of a run.
#[derive(Debug, Serialize)]
pub(crate) struct View<'a> {
    /// Steps, samples and times of some moments: those in between are interpolated.
    pub(crate) axis: Moments,
    /// By name.
    pub(crate) curves: BTreeMap<&'a str, Points>,
}

/// Moments as columns.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Moments {
    step: Vec<u64>,
    samples: Vec<u64>,
    time: Vec<Brief>,
}

/// A curve's points, all of them or as bins.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(crate) struct Points {
    /// Steps; of bins, those of the smallest values.
    #[serde(rename = "s")]
    steps: Vec<u64>,
    /// Values; of bins, the smallest ones.
    #[serde(rename = "v")]
    values: Vec<Brief>,
    /// The other numbers of bins.
    #[serde(flatten)]
    bins: Option<Bins>,
    /// Steps and values that are not finite, the last ones if there are many.
    #[serde(rename = "bad", skip_serializing_if = "Vec::is_empty")]
    not_finite: Vec<(u64, String)>,
}

#[derive(Debug, Default, PartialEq, Serialize)]
struct Bins {
    /// Steps of the largest values.
    #[serde(rename = "t")]
    steps: Vec<u64>,
    /// The largest values.
    #[serde(rename = "hi")]
    largest: Vec<Brief>,
    #[serde(rename = "m")]
    means: Vec<Brief>,
    #[serde(rename = "n")]
    counts: Vec<u64>,
}

/// A number in seven digits, with which no screen is at its end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Brief(pub(crate) f64);

impl Brief {
    fn rounded(self) -> f64 {
        // Seconds since 1970 have ten digits before the point.
        if (1e7..1e12).contains(&self.0.abs()) {
            return (10.0 * self.0).round() / 10.0;
        }
        let digits = format!("{:.6e}", self.0);
        digits.parse().unwrap_or(self.0)
    }
}

impl Serialize for Brief {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.rounded())
    }
}

/// The most values of a curve that are not finite and sent.
const MOST_NOT_FINITE: usize = 100;
/// The most acts that are sent, and of clips alone.
const MOST_ACTS: usize = 1000;
const MOST_CLIPS: usize = 300;
/// Moments of the axis.
const AXIS_MOMENTS: usize = 800;

impl<'a> View<'a> {
    /// Returns the curves in `frame`, each with one point outside it at either side.
    pub(crate) fn of(log: &'a RunLog, frame: &Frame) -> Self {
        let mut curves = BTreeMap::new();
        for (name, curve) in &log.curves {
            if is_drawn(name) {
                curves.insert(name.as_ref(), points(log, curve, frame));
            }
        }
        let drawn: Vec<&Moment> = log
            .moments
            .iter()
            .filter(|moment| frame.axis.place(moment).is_some())
            .collect();
        let mut axis = Moments::default();
        for index in spread(drawn.len(), AXIS_MOMENTS) {
            axis.push(drawn[index]);
        }
        Self { axis, curves }
    }

    /// Returns the points of the moments from `first` on.
    pub(crate) fn since(log: &'a RunLog, first: usize) -> Self {
        let mut curves = BTreeMap::new();
        for (name, curve) in &log.curves {
            let begin = curve.at.partition_point(|&at| (at as usize) < first);
            if begin < curve.at.len() && is_drawn(name) {
                let mut points = Points::default();
                for index in begin..curve.at.len() {
                    points.add(step_of(log, curve, index), curve.values[index]);
                }
                curves.insert(name.as_ref(), points);
            }
        }
        let mut axis = Moments::default();
        for moment in log.moments.iter().skip(first) {
            axis.push(moment);
        }
        Self { axis, curves }
    }
}

impl Moments {
    fn push(&mut self, moment: &Moment) {
        self.step.push(moment.step);
        self.samples.push(moment.samples);
        self.time.push(Brief(moment.unix_secs));
    }
}

impl Points {
    fn add(&mut self, step: u64, value: f64) {
        if value.is_finite() {
            self.steps.push(step);
            self.values.push(Brief(value));
        } else {
            self.add_not_finite(step, value);
        }
    }

    fn add_not_finite(&mut self, step: u64, value: f64) {
        if self.not_finite.len() == MOST_NOT_FINITE {
            self.not_finite.remove(0);
        }
        self.not_finite.push((step, value.to_string()));
    }

    /// Adds a bin; one without finite values is left out.
    fn add_bin(&mut self, log: &RunLog, curve: &Curve, indices: &[usize]) {
        let mut lowest: Option<usize> = None;
        let mut highest: Option<usize> = None;
        let is_finite = |&&index: &&usize| curve.values[index].is_finite();
        let count = indices.iter().filter(is_finite).count();
        let mut mean = 0.0;
        for &index in indices {
            let value = curve.values[index];
            if !value.is_finite() {
                self.add_not_finite(step_of(log, curve, index), value);
                continue;
            }
            // Divided first: a sum of huge values would overflow.
            mean += value / count as f64;
            if lowest.is_none_or(|lowest| value < curve.values[lowest]) {
                lowest = Some(index);
            }
            if highest.is_none_or(|highest| value > curve.values[highest]) {
                highest = Some(index);
            }
        }
        let (Some(lowest), Some(highest)) = (lowest, highest) else {
            return;
        };
        self.steps.push(step_of(log, curve, lowest));
        self.values.push(Brief(curve.values[lowest]));
        let bins = self.bins.get_or_insert_default();
        bins.steps.push(step_of(log, curve, highest));
        bins.largest.push(Brief(curve.values[highest]));
        bins.means.push(Brief(mean));
        bins.counts.push(count as u64);
    }
}

fn step_of(log: &RunLog, curve: &Curve, index: usize) -> u64 {
    log.moments[curve.at[index] as usize].step
}

/// Whether the page draws a curve: not those of single modules.
fn is_drawn(name: &str) -> bool {
    let chart = name.split('/').next().unwrap_or(name);
    CHARTS
        .iter()
        .any(|known| known.name == chart && !known.is_detail)
}

fn points(log: &RunLog, curve: &Curve, frame: &Frame) -> Points {
    let indices = indices(log, curve, frame);
    let mut points = Points::default();
    if indices.len() <= 2 * frame.bins {
        for index in indices {
            points.add(step_of(log, curve, index), curve.values[index]);
        }
        return points;
    }
    for bin in 0..frame.bins {
        let begin = bin * indices.len() / frame.bins;
        let end = (bin + 1) * indices.len() / frame.bins;
        points.add_bin(log, curve, &indices[begin..end]);
    }
    points
}

/// The points of a curve in a frame, and one at either side, to which lines are drawn.
fn indices(log: &RunLog, curve: &Curve, frame: &Frame) -> Vec<usize> {
    let mut found = Vec::new();
    let mut before = None;
    for (index, &at) in curve.at.iter().enumerate() {
        let Some(place) = frame.axis.place(&log.moments[at as usize]) else {
            continue;
        };
        if place < frame.from {
            before = Some(index);
            continue;
        }
        found.extend(before.take());
        found.push(index);
        if place > frame.to {
            break;
        }
    }
    found
}

/// At most `most` indices of `0..len`, evenly, both ends included.
pub(crate) fn spread(len: usize, most: usize) -> Vec<usize> {
    if len <= most {
        (0..len).collect()
    } else {
        (0..most).map(|i| i * (len - 1) / (most - 1)).collect()
    }
}

/// The acts that are sent, in the order of time, and how many there are of each kind.
#[derive(Debug, Serialize)]
pub(crate) struct Acts<'a> {
    marks: Marks<'a>,
    /// All acts, by kind.
    counts: BTreeMap<&'a str, u64>,
}

#[derive(Debug)]
struct Marks<'a>(Vec<&'a Act>);

impl<'a> Acts<'a> {
    /// Returns the newest acts, and some of the clips, which are routine.
    pub(crate) fn of(log: &'a RunLog) -> Self {
        let mut counts = BTreeMap::new();
        let mut clips = Vec::new();
        let mut marks = Vec::new();
        for act in &log.acts {
            *counts.entry(act.action.as_str()).or_default() += 1;
            if act.action == "clip" {
                clips.push(act);
            } else {
                marks.push(act);
            }
        }
        marks.drain(..marks.len().saturating_sub(MOST_ACTS));
        for index in spread(clips.len(), MOST_CLIPS) {
            marks.push(clips[index]);
        }
        marks.sort_by(|a, b| a.unix_secs.total_cmp(&b.unix_secs));
        Self {
            marks: Marks(marks),
            counts,
        }
    }
}

impl Serialize for Marks<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Mark<'a> {
            step: u64,
            samples: u64,
            time: Brief,
            action: &'a str,
            reason: &'a str,
            black_box: Option<&'a str>,
        }
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        for act in &self.0 {
            list.serialize_element(&Mark {
                step: act.step,
                samples: act.samples,
                time: Brief(act.unix_secs),
                action: &act.action,
                reason: &act.reason,
                black_box: act.black_box.as_deref(),
            })?;
        }
        list.end()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::watch::run_log::tests::{log_of, start, step};

    fn json_of(log: &RunLog, frame: &Frame) -> Value {
        serde_json::to_value(View::of(log, frame)).expect("serialises")
    }

    /// The largest value of a curve that is sent, with its step.
    fn largest(points: &Value) -> (f64, u64) {
        let values = points["hi"].as_array().expect("bins");
        let mut best = (f64::NEG_INFINITY, 0);
        for (value, step) in values.iter().zip(points["t"].as_array().expect("steps")) {
            let value = value.as_f64().expect("a number");
            if value > best.0 {
                best = (value, step.as_u64().expect("a step"));
            }
        }
        best
    }

    #[test]
    fn one_spike_among_40_000_steps_is_sent_up_and_down() {
        let mut lines = vec![start(0)];
        for number in 1..=40_000_u64 {
            let loss = match number {
                31_337 => 7.5,
                12_345 => 0.001,
                _ => 0.25,
            };
            lines.push(step(number, 8 * number, loss));
        }
        let log = log_of(&lines);
        for bins in [16, 100, 600] {
            for axis in [Axis::Step, Axis::Samples, Axis::Time] {
                let view = json_of(&log, &Frame::whole(axis, bins));
                let loss = &view["curves"]["loss/training"];
                assert_eq!(loss["n"].as_array().expect("counts").len(), bins);
                assert_eq!(largest(loss), (7.5, 31_337));
                let lowest = loss["v"].as_array().expect("values");
                let place = lowest.iter().position(|value| value == &json!(0.001));
                assert_eq!(loss["s"][place.expect("the dip is sent")], json!(12_345));
            }
        }
        let text = json_of(&log, &Frame::whole(Axis::Step, 600)).to_string();
        assert!(text.len() < 400_000, "{} bytes", text.len());
    }

    #[test]
    fn a_part_of_a_run_is_sent_step_by_step_with_its_neighbours() {
        let mut lines = vec![start(0)];
        for number in 1..=1000 {
            lines.push(step(number, 8 * number, number as f64));
        }
        let log = log_of(&lines);
        let frame = Frame {
            from: 100.0,
            to: 103.0,
            ..Frame::whole(Axis::Step, 100)
        };
        let view = json_of(&log, &frame);
        let loss = &view["curves"]["loss/training"];
        assert_eq!(loss["s"], json!([99, 100, 101, 102, 103, 104]));
        let more = serde_json::to_value(View::since(&log, 998)).expect("serialises");
        assert_eq!(more["curves"]["loss/training"]["v"], json!([999.0, 1000.0]));
        assert_eq!(more["axis"]["samples"], json!([7992, 8000]));
    }

    #[test]
    fn numbers_that_are_not_finite_are_listed_and_do_no_harm() {
        let mut lines = vec![start(0)];
        for number in 1..=500 {
            lines.push(step(number, 8 * number, 1e308));
        }
        lines[250]["loss"] = json!("NaN");
        lines[251]["loss"] = json!("inf");
        let log = log_of(&lines);
        let view = json_of(&log, &Frame::whole(Axis::Step, 20));
        let loss = &view["curves"]["loss/training"];
        assert_eq!(loss["bad"], json!([[250, "NaN"], [251, "inf"]]));
        for column in ["v", "hi", "m"] {
            for value in loss[column].as_array().expect("a column") {
                let value = value.as_f64().expect("a number");
                assert!((value / 1e308 - 1.0).abs() < 1e-6, "{column}: {value}");
            }
        }
    }

    #[test]
    fn after_a_rewind_the_axis_of_samples_has_the_new_values_alone() {
        let mut lines = vec![start(0)];
        for number in 1..=6 {
            lines.push(step(number, 8 * number, 1.0));
        }
        lines.push(step(7, 16, 9.0));
        lines.push(step(8, 24, 0.5));
        let log = log_of(&lines);
        let of =
            |axis| json_of(&log, &Frame::whole(axis, 100))["curves"]["loss/training"]["s"].clone();
        assert_eq!(of(Axis::Samples), json!([1, 2, 7, 8]));
        assert_eq!(of(Axis::Step), json!([1, 2, 3, 4, 5, 6, 7, 8]));
    }

    #[test]
    fn many_clips_are_thinned_and_the_other_acts_are_not() {
        let mut lines = vec![start(0)];
        for number in 1..=5000_u64 {
            let action = if number == 77 { "rewind" } else { "clip" };
            let act = json!({"event": "guard", "step": number, "action": action, "reason": "r", "update": 1});
            lines.push(act);
        }
        let log = log_of(&lines);
        let acts = serde_json::to_value(Acts::of(&log)).expect("serialises");
        let marks = acts["marks"].as_array().expect("marks");
        assert_eq!(marks.len(), MOST_CLIPS + 1);
        assert!(marks.iter().any(|mark| mark["action"] == "rewind"));
        assert_eq!(acts["counts"], json!({"clip": 4999, "rewind": 1}));
    }
}
