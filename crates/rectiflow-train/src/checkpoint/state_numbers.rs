//! The numbers of `state.json`: the range of each, and the totals and the order that several have.
//!
//! Sums protect the file against damage, not against a program or a hand that wrote other numbers.
//! Whatever later arithmetic relies on is checked here, so that it cannot overflow; whether the
//! tensors are those of the run's model is checked where both are known (`restore`).

use std::{collections::BTreeSet, fmt::Display};

use rectiflow_sdxl::flow::Objective;
use serde_json::Value;

use crate::{checkpoint::Saved, guard::MOST_UPDATES, recipe::TRAINABLE, state::Position};

/// The most samples of a run; a recipe allows as many.
const MOST_SAMPLES: u64 = 1 << 50;
/// The most ranks of a run.
const MOST_SHARDS: usize = 1 << 16;
/// The most elements of the flat vector: 400 times those of SDXL.
const MOST_ELEMENTS: i128 = 1 << 40;
/// The most seconds of a run, 3000 years.
const MOST_SECS: f64 = 1e11;
/// What rounding can take a variance below 0.
const ROUNDING: f64 = 1e-9;

impl Saved {
    /// Returns what is wrong with the numbers, one message each: key, expected, found.
    pub(crate) fn number_problems(&self) -> Vec<String> {
        let mut problems = Problems::default();
        self.check_progress(&mut problems);
        self.check_passed_over(&mut problems);
        self.check_tensors(&mut problems);
        self.check_moments_from(&mut problems);
        self.check_norms(&mut problems);
        self.check_guard(&mut problems);
        if let Err(error) = Objective::new(self.objective.clone()) {
            problems.add("objective", error);
        }
        for (index, ancestor) in self.lineage.iter().enumerate() {
            let key = format!("lineage[{index}].position");
            check_position(&key, &ancestor.position, &mut problems);
        }
        problems.0
    }

    fn check_progress(&self, problems: &mut Problems) {
        let Position { cursor, update, .. } = self.position;
        check_position("position", &self.position, problems);
        // A branch over other data begins with its first step.
        let fits = update <= cursor || !self.lineage.is_empty();
        let expected = format!("at most position.cursor = {cursor}");
        problems.expect("position.update", fits, expected, update);
        let fits = (0.0..=MOST_UPDATES as f64).contains(&self.epochs);
        problems.expect("epochs", fits, "0 to 2^31", self.epochs);
        let fits = (0.0..=MOST_SECS).contains(&self.secs);
        problems.expect("secs", fits, "0 to 10^11", self.secs);
    }

    /// Checks that the ranges of steps are not empty, ascend and do not overlap, and lie behind the
    /// cursor.
    fn check_passed_over(&self, problems: &mut Problems) {
        let mut last = 0;
        for (index, &(first, end)) in self.passed_over.iter().enumerate() {
            let fits = last <= first && first < end && end <= self.position.cursor;
            let cursor = self.position.cursor;
            let expected = format!("a range of steps from {last} to {cursor}");
            let key = format!("passed_over[{index}]");
            problems.expect(&key, fits, expected, format!("[{first}, {end}]"));
            last = end;
        }
    }

    /// Checks the names and shapes of the optimiser's vectors, and how they are split.
    fn check_tensors(&self, problems: &mut Problems) {
        let mut total = 0i128;
        let mut names = BTreeSet::new();
        for (index, (name, shape)) in self.layout.iter().enumerate() {
            let key = format!("layout[{index}]");
            let is_known = is_of_trainable(name) && names.insert(name);
            problems.expect(&key, is_known, "the name of another trained tensor", name);
            match num_elements(shape) {
                Some(count) => total += count,
                None => problems.add(&key, format!("expected a shape, found {shape:?}")),
            }
        }
        let fits = total <= MOST_ELEMENTS;
        problems.expect("layout", fits, "at most 2^40 elements", total);
        let fits = (1..=MOST_SHARDS).contains(&self.shards);
        problems.expect("shards", fits, "1 to 65536", self.shards);
        self.check_buckets(total, problems);
    }

    /// Checks that the buckets are as long as the `total` of all tensors.
    fn check_buckets(&self, total: i128, problems: &mut Problems) {
        if self.buckets.is_empty() {
            return;
        }
        let mut sum = 0i128;
        for (index, &len) in self.buckets.iter().enumerate() {
            let key = format!("buckets[{index}]");
            problems.expect(&key, len >= 0, "a length of at least 0", len);
            sum += i128::from(len);
        }
        let expected = format!("lengths that sum to the layout's {total} elements");
        problems.expect("buckets", sum == total, expected, sum);
    }

    /// Checks the usual norms of the tensors, of which there are none or one each.
    fn check_norms(&self, problems: &mut Problems) {
        let count = self.tensor_norms.len();
        let fits = count == 0 || count == self.layout.len();
        let expected = format!("0 or {} numbers", self.layout.len());
        problems.expect("tensor_norms", fits, expected, count);
        for (index, norm) in self.tensor_norms.iter().enumerate() {
            let fits = norm.mean.is_finite() && norm.mean >= 0.0;
            let key = format!("tensor_norms[{index}]");
            problems.expect(&key, fits, "a mean of at least 0", norm.mean);
            let fits = norm.count <= MOST_UPDATES;
            problems.expect(&key, fits, "a count of 0 to 2^31", norm.count);
        }
    }

    fn check_moments_from(&self, problems: &mut Problems) {
        let update = self.position.update;
        for (component, &from) in &self.moments_from {
            let key = format!("moments_from.{component}");
            let is_known = TRAINABLE.iter().any(|known| known.folder() == component);
            problems.expect(&key, is_known, "a component that is trained", component);
            let expected = format!("at most position.update = {update}");
            problems.expect(&key, from <= update, expected, from);
        }
    }

    /// Checks the guard's numbers: counts do not exceed the steps, and means are finite.
    fn check_guard(&self, problems: &mut Problems) {
        let json = serde_json::to_value(&self.guard).expect("the guard's state is plain data");
        check_tree("guard", &json, self.position.cursor, problems);
        let rate = self.guard.acts.rate;
        let fits = rate > 0.0 && rate <= 1.0;
        problems.expect("guard.acts.rate", fits, "above 0, at most 1", rate);
    }
}

fn check_position(key: &str, position: &Position, problems: &mut Problems) {
    let &Position {
        cursor,
        update,
        samples,
    } = position;
    for (part, count) in [("cursor", cursor), ("update", update)] {
        let fits = count <= MOST_UPDATES;
        problems.expect(&format!("{key}.{part}"), fits, "0 to 2^31", count);
    }
    let fits = samples <= MOST_SAMPLES && samples >= update && (update > 0 || samples == 0);
    let expected = format!("at most 2^50, and one or more for each of {update} updates");
    problems.expect(&format!("{key}.samples"), fits, expected, samples);
}

/// Whether a tensor's name begins with that of a component that can be trained.
fn is_of_trainable(name: &str) -> bool {
    let Some((component, rest)) = name.split_once('.') else {
        return false;
    };
    !rest.is_empty() && TRAINABLE.iter().any(|known| known.folder() == component)
}

/// Returns the elements of a tensor; `None` if that is no shape.
fn num_elements(shape: &[i64]) -> Option<i128> {
    let mut count = 1i128;
    for &size in shape {
        let is_size = (0..=i64::from(i32::MAX)).contains(&size);
        count *= i128::from(size);
        if !is_size || count > MOST_ELEMENTS {
            return None;
        }
    }
    Some(count)
}

/// Checks every number below `value`, which the guard counts or averages over at most `steps`
/// steps.
fn check_tree(key: &str, value: &Value, steps: u64, problems: &mut Problems) {
    match value {
        Value::Object(values) => {
            for (name, value) in values {
                check_tree(&format!("{key}.{name}"), value, steps, problems);
            }
        }
        Value::Number(number) => check_number(key, number, steps, problems),
        // A number that is not finite is text.
        other => problems.expect(key, false, "a finite number", other),
    }
}

fn check_number(key: &str, number: &serde_json::Number, steps: u64, problems: &mut Problems) {
    let Some(count) = number.as_u64() else {
        let is_variance = key.ends_with("variance");
        let fits = !is_variance || number.as_f64().is_some_and(|value| value >= -ROUNDING);
        problems.expect(key, fits, "a variance of at least 0", number);
        return;
    };
    if key.ends_with("cooldown") {
        // Four times the longest distance of a rewind.
        problems.expect(key, count <= 4 * MOST_UPDATES, "0 to 2^33", count);
        return;
    }
    let expected = format!("at most position.cursor = {steps}");
    problems.expect(key, count <= steps, expected, count);
}

/// Messages, one for each key that is wrong.
#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    fn add(&mut self, key: &str, reason: impl Display) {
        self.0.push(format!("{key}: {reason}"));
    }

    fn expect(&mut self, key: &str, fits: bool, expected: impl Display, found: impl Display) {
        if !fits {
            self.add(key, format!("expected {expected}, found {found}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use rectiflow_sdxl::flow::ObjectiveSettings;
    use serde_json::json;

    use super::*;

    /// A state with a value other than its own at a place.
    fn state_with(place: &str, value: &Value) -> Saved {
        let mut json = json!({
            "format": 5, "position": {"cursor": 12, "update": 11, "samples": 345},
            "order_hash": "", "objective": ObjectiveSettings::default(), "frozen": {}, "data": [],
            "program": "", "layout": [["unet.a", [2, 3]], ["text_encoder.b", [5]]], "shards": 2,
            "buckets": [6, 5], "epochs": 0.5, "moments_from": {"unet": 0, "text_encoder": 4},
            "passed_over": [[2, 3], [5, 7]], "guard": crate::guard::GuardState::default(),
            "secs": 3.5,
            "lineage": [{"checkpoint": "c", "blake3": "", "changed": [],
                "position": {"cursor": 3, "update": 3, "samples": 24}}],
        });
        if !place.is_empty() {
            *json.pointer_mut(place).expect("a place in the state") = value.clone();
        }
        serde_json::from_value(json).expect("a state")
    }

    fn problems(place: &str, value: &Value) -> Vec<String> {
        state_with(place, value).number_problems()
    }

    #[test]
    fn a_state_as_it_is_written_has_no_problem() {
        assert_eq!(problems("", &Value::Null), [""; 0]);
        for (place, value) in [
            ("/position/cursor", json!(11)),
            // A branch begins with the first step of other data.
            ("/position/cursor", json!(7)),
            ("/buckets", json!([])),
            ("/buckets", json!([0, 11])),
            ("/passed_over", json!([[0, 12]])),
            ("/guard/normal/loss_scatter/variance", json!(-1e-18)),
            ("/guard/normal/loss_scatter/mean", json!("-3.5")),
            ("/guard/acts/rate", json!(0.125)),
        ] {
            assert_eq!(problems(place, &value), [""; 0], "{place} {value}");
        }
    }

    #[test]
    fn a_number_out_of_range_is_named() {
        let most = u64::MAX;
        for (place, value, key) in [
            ("/position/update", json!(most), "position.update"),
            ("/position/cursor", json!(most), "position.cursor"),
            ("/position/samples", json!(most), "position.samples"),
            ("/position/samples", json!(3), "position.samples"),
            ("/epochs", json!(-1.0), "epochs"),
            ("/epochs", json!(1e300), "epochs"),
            ("/secs", json!(-0.5), "secs"),
            ("/secs", json!(1e308), "secs"),
            ("/shards", json!(0), "shards"),
            ("/shards", json!(1u64 << 40), "shards"),
            ("/moments_from/unet", json!(12), "moments_from.unet"),
            ("/guard/normal/updates", json!(most), "guard.normal.updates"),
            (
                "/guard/normal/drifting",
                json!(u32::MAX),
                "guard.normal.drifting",
            ),
            ("/guard/normal/above", json!(13), "guard.normal.above"),
            (
                "/guard/normal/loss_scatter/count",
                json!(most),
                "guard.normal.loss_scatter.count",
            ),
            ("/guard/acts/skips", json!(most), "guard.acts.skips"),
            ("/guard/acts/lowered", json!(u32::MAX), "guard.acts.lowered"),
            ("/guard/acts/cooldown", json!(most), "guard.acts.cooldown"),
            ("/guard/acts/rate", json!(0.0), "guard.acts.rate"),
            ("/guard/acts/rate", json!(1.5), "guard.acts.rate"),
            ("/guard/acts/rate", json!("NaN"), "guard.acts.rate"),
            (
                "/guard/normal/loss_long",
                json!("inf"),
                "guard.normal.loss_long",
            ),
            (
                "/guard/normal/norm_variance",
                json!(-1.0),
                "guard.normal.norm_variance",
            ),
            ("/objective/shift", json!(-3.0), "objective"),
            (
                "/lineage/0/position/samples",
                json!(most),
                "lineage[0].position.samples",
            ),
        ] {
            let found = problems(place, &value);
            assert!(
                found
                    .iter()
                    .any(|problem| problem.starts_with(&format!("{key}: "))),
                "{place} {value}: {found:?}"
            );
        }
    }

    #[test]
    fn totals_names_and_order_that_cannot_be_are_named() {
        for (place, value, key) in [
            ("/buckets", json!([-1]), "buckets[0]"),
            ("/buckets", json!([6, 4]), "buckets"),
            ("/buckets", json!([i64::MAX, i64::MAX]), "buckets"),
            ("/layout", json!([]), "buckets"),
            ("/layout/0/1", json!([2, -3]), "layout[0]"),
            ("/layout/0/1", json!([1u64 << 40]), "layout[0]"),
            ("/layout/0/1", json!([1 << 30, 1 << 30]), "layout[0]"),
            ("/layout/1/0", json!("unet.a"), "layout[1]"),
            ("/layout/1/0", json!("vae.a"), "layout[1]"),
            ("/layout/1/0", json!("unet"), "layout[1]"),
            ("/moments_from", json!({"vae": 0}), "moments_from.vae"),
            ("/passed_over", json!([[3, 3]]), "passed_over[0]"),
            ("/passed_over", json!([[5, 3]]), "passed_over[0]"),
            ("/passed_over", json!([[4, 6], [5, 7]]), "passed_over[1]"),
            ("/passed_over", json!([[5, 7], [2, 3]]), "passed_over[1]"),
            ("/passed_over", json!([[5, 13]]), "passed_over[0]"),
            ("/lineage", json!([]), ""),
        ] {
            let found = problems(place, &value);
            let starts = |problem: &String| problem.starts_with(&format!("{key}: "));
            assert_eq!(
                found.iter().any(starts),
                !key.is_empty(),
                "{place} {value}: {found:?}"
            );
        }
        let mut state = state_with("/position/cursor", &json!(10));
        state.lineage.clear();
        let found = state.number_problems();
        assert!(
            found[0].starts_with("position.update: expected at most"),
            "{found:?}"
        );
    }
}
