//! Records of a run of W&B, as few fields as its programs need.
//!
//! Numbers of fields are those of wandb's `wandb_internal.proto`, read back by wandb itself in
//! `make peers-watch`. Values are JSON texts; unlike JSON's own numbers, those of W&B may be `NaN`,
//! `Infinity` and `-Infinity`.

use crate::measure::trackers::protobuf::{Field, Fields, Message};

/// The curve that all others are drawn over: the step of the run. W&B's own step counts lines,
/// since it drops a line whose step is not above the last one.
pub(super) const STEP: &str = "trainer/step";

const HISTORY: u64 = 2;
const SUMMARY: u64 = 3;
const FILES: u64 = 6;
const METRIC: u64 = 12;
const RUN: u64 = 17;
const EXIT: u64 = 18;
const HEADER: u64 = 21;

/// Of an item of a history or a summary.
const ITEM: u64 = 1;
const ITEM_PATH: u64 = 2;
const ITEM_JSON: u64 = 16;

/// A value with its name: one word, or a path of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) path: Vec<String>,
    /// A JSON text.
    pub(super) json: String,
}

impl Item {
    pub(super) fn new(name: &str, json: String) -> Self {
        Self {
            path: vec![name.to_owned()],
            json,
        }
    }

    fn message(&self) -> Message {
        let mut message = Message::default();
        for word in &self.path {
            message.text(ITEM_PATH, word);
        }
        message.text(ITEM_JSON, &self.json);
        message
    }
}

/// A number as a JSON text of W&B.
pub(super) fn number_json(value: f64) -> String {
    if value.is_nan() {
        "NaN".to_owned()
    } else if value.is_infinite() {
        let text = if value > 0.0 { "Infinity" } else { "-Infinity" };
        text.to_owned()
    } else {
        serde_json::Value::from(value).to_string()
    }
}

/// Returns the first record: who wrote the file, and the oldest program that can read it.
pub(super) fn header() -> Message {
    let mut version = Message::default();
    version.text(1, concat!("rectiflow ", env!("CARGO_PKG_VERSION")));
    version.text(2, "0.70.0");
    let mut header = Message::default();
    header.message(1, &version);
    in_record(HEADER, &header)
}

/// What a run is.
#[derive(Debug)]
pub(super) struct RunFacts<'a> {
    pub(super) id: &'a str,
    pub(super) project: &'a str,
    pub(super) name: &'a str,
    pub(super) unix_secs: u64,
    /// Parts of the recipe, each a JSON text.
    pub(super) config: Vec<(String, String)>,
}

/// Returns the record of a run.
pub(super) fn run(facts: &RunFacts<'_>) -> Message {
    let mut config = Message::default();
    for (key, json) in &facts.config {
        let mut item = Message::default();
        item.text(1, key);
        item.text(ITEM_JSON, json);
        config.message(1, &item);
    }
    let mut time = Message::default();
    time.varint(1, facts.unix_secs);
    let mut run = Message::default();
    run.text(1, facts.id);
    run.text(3, facts.project);
    run.message(4, &config);
    run.text(8, facts.name);
    run.message(17, &time);
    in_record(RUN, &run)
}

/// Returns the records that declare [`STEP`], and that every other curve is drawn over it.
pub(super) fn curves() -> [Message; 2] {
    const DEFINED: u64 = 3;
    let mut options = Message::default();
    options.varint(DEFINED, 1);
    let mut step = Message::default();
    step.text(1, STEP);
    step.message(6, &options);

    let mut options = Message::default();
    // The step may be in the same line or in an earlier one.
    options.varint(1, 1);
    options.varint(DEFINED, 1);
    let mut others = Message::default();
    others.text(2, "*");
    others.text(4, STEP);
    others.message(6, &options);
    [in_record(METRIC, &step), in_record(METRIC, &others)]
}

/// Returns the record of a line of the history.
pub(super) fn history(line: u64, items: &[Item]) -> Message {
    let mut history = Message::default();
    for item in items {
        history.message(ITEM, &item.message());
    }
    let mut step = Message::default();
    step.varint(1, line);
    history.message(2, &step);
    in_record(HISTORY, &history)
}

/// Returns the record of the last values.
pub(super) fn summary(items: &[Item]) -> Message {
    let mut summary = Message::default();
    for item in items {
        summary.message(ITEM, &item.message());
    }
    in_record(SUMMARY, &summary)
}

/// Returns the record of a file below `files/`, which is sent with the run.
pub(super) fn file(path: &str) -> Message {
    let mut item = Message::default();
    item.text(1, path);
    let mut files = Message::default();
    files.message(1, &item);
    in_record(FILES, &files)
}

/// Returns the record of the end.
pub(super) fn exit(code: u64, runtime_secs: u64) -> Message {
    let mut exit = Message::default();
    exit.varint(1, code);
    exit.varint(2, runtime_secs);
    in_record(EXIT, &exit)
}

fn in_record(field: u64, message: &Message) -> Message {
    let mut record = Message::default();
    record.message(field, message);
    record
}

/// What a record that is read back says, as far as a resume needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    Run {
        /// When the run began.
        unix_secs: u64,
    },
    Line {
        /// W&B's own step.
        line: u64,
        /// The step of the run; `None` if the line does not have it.
        step: Option<u64>,
    },
    Exit,
    Other,
}

impl Known {
    pub(super) fn of(record: &[u8]) -> Self {
        for (field, _) in Fields(record) {
            let message = Fields::bytes_of(record, field);
            match field {
                RUN => {
                    let unix_secs = Fields::number_of(Fields::bytes_of(message, 17), 1);
                    return Self::Run { unix_secs };
                }
                HISTORY => {
                    let line = Fields::number_of(Fields::bytes_of(message, 2), 1);
                    let step = step_of(message);
                    return Self::Line { line, step };
                }
                EXIT => return Self::Exit,
                _ => {}
            }
        }
        Self::Other
    }
}

/// The step of the run in a line of the history.
fn step_of(history: &[u8]) -> Option<u64> {
    for (field, value) in Fields(history) {
        if let Field::Bytes(item) = value
            && field == ITEM
            && Fields::bytes_of(item, ITEM_PATH) == STEP.as_bytes()
        {
            let json = Fields::bytes_of(item, ITEM_JSON);
            return str::from_utf8(json).ok()?.parse().ok();
        }
    }
    None
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The items of a line of the history, by path and JSON text; none for other records.
    pub(crate) fn items(record: &[u8]) -> Vec<(String, String)> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("a text");
        let mut found = Vec::new();
        for (field, value) in Fields(Fields::bytes_of(record, HISTORY)) {
            let Field::Bytes(item) = value else { continue };
            if field != ITEM {
                continue;
            }
            let mut path = Vec::new();
            for (field, value) in Fields(item) {
                if let (ITEM_PATH, Field::Bytes(word)) = (field, value) {
                    path.push(text(word));
                }
            }
            found.push((path.join("."), text(Fields::bytes_of(item, ITEM_JSON))));
        }
        found
    }

    #[test]
    fn a_line_is_known_by_both_of_its_steps() {
        let items = [
            Item::new("loss/training", number_json(0.1 + 0.2)),
            Item::new(STEP, "700".to_owned()),
        ];
        let line = history(300, &items);
        let step = Some(700);
        assert_eq!(Known::of(&line.0), Known::Line { line: 300, step });
        let without = history(0, &items[..1]);
        let known = Known::Line {
            line: 0,
            step: None,
        };
        assert_eq!(Known::of(&without.0), known);
        assert_eq!(Known::of(&exit(0, 5).0), Known::Exit);
        assert_eq!(Known::of(&header().0), Known::Other);
        assert_eq!(Known::of(b"no message"), Known::Other);
    }

    #[test]
    fn numbers_are_json_of_w_and_b() {
        let texts = [0.1 + 0.2, 1e-300, f64::NAN, f64::INFINITY, -f64::INFINITY].map(number_json);
        let expected = [
            "0.30000000000000004",
            "1e-300",
            "NaN",
            "Infinity",
            "-Infinity",
        ];
        assert_eq!(texts, expected);
    }
}
