//! Scores that another program has computed, in a table: CSV, Parquet, JSON lines or SQLite with a
//! column of scores, and `id` or `source` of the picture.
//!
//! A table of annotations is one too: a served model scores pictures through `rectiflow caption`,
//! by a mode that asks for a number, and the first number of its text is the score.

use std::{collections::HashMap, path::Path};

use rectiflow_data::{SampleId, annotation::parse_id, error::Error as DataError, values};
use serde_json::{Map, Value};

use crate::error::Result;

/// Column of texts in a table of annotations.
const TEXT: &str = "text";

/// Where the scores of a table are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its name, in small letters.
    pub name: String,
    /// The mode of the rows that count, in a table of annotations of several modes.
    pub mode: Option<String>,
}

/// Scores by picture.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GivenScores {
    by_id: HashMap<u64, f64>,
    by_source: HashMap<String, f64>,
    /// Rows without a score.
    pub num_empty: u64,
}

impl GivenScores {
    /// Reads the table `path`.
    ///
    /// # Errors
    /// Those of [`values::read`]; [`DataError::Malformed`] for a row whose score is no number,
    /// which names no picture, or whose picture has another score already.
    pub fn read(path: &Path, column: &Column) -> Result<Self> {
        let mut given = Self::default();
        let wanted = ["id", "source", "mode", "status", &column.name];
        values::read(path, &wanted, &column.name, &mut |_, row| {
            given.add(row, column)
        })?;
        if given.is_empty() {
            let of_mode = match &column.mode {
                Some(mode) => format!(" of the mode {mode:?}"),
                None => String::new(),
            };
            return Err(DataError::Malformed {
                path: path.to_owned(),
                kind: "table of scores",
                reason: format!(
                    "no row{of_mode} has a number in the column {:?}",
                    column.name
                ),
            }
            .into());
        }
        Ok(given)
    }

    /// Number of scores.
    pub fn len(&self) -> usize {
        self.by_id.len() + self.by_source.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The score of a picture, by its id if the table has ids.
    pub fn of(&self, id: Option<SampleId>, source: &str) -> Option<f64> {
        let by_id = id.and_then(|id| self.by_id.get(&id.0));
        by_id.or_else(|| self.by_source.get(source)).copied()
    }

    fn add(
        &mut self,
        row: &Map<String, Value>,
        column: &Column,
    ) -> std::result::Result<(), String> {
        let text = |name: &str| row.get(name).and_then(Value::as_str);
        let is_other = column
            .mode
            .as_deref()
            .is_some_and(|mode| text("mode") != Some(mode));
        if is_other || text("status").is_some_and(|status| status != "ok") {
            return Ok(());
        }
        let Some(number) = number_of(row, column)? else {
            self.num_empty += 1;
            return Ok(());
        };
        let id = text("id").map(|id| parse_id(id.trim()));
        let old = match (id, text("source")) {
            (Some(Ok(id)), _) => self.by_id.insert(id.0, number),
            // Another program's id, such as a board's.
            (_, Some(source)) => self.by_source.insert(source.to_owned(), number),
            (Some(Err(reason)), None) => return Err(reason),
            (None, None) => return Err(NO_PICTURE.to_owned()),
        };
        match old {
            Some(old) if old != number => Err(format!(
                "its picture has two scores, {old} and {number}: keep one"
            )),
            _ => Ok(()),
        }
    }
}

const NO_PICTURE: &str = "it names no picture: expected a column id, sixteen hexadecimal digits, \
                          or source, the picture's address";

/// The score of a row. None if it has none.
fn number_of(
    row: &Map<String, Value>,
    column: &Column,
) -> std::result::Result<Option<f64>, String> {
    let Some(value) = row.get(&column.name).filter(|value| !value.is_null()) else {
        return Ok(None);
    };
    let number = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) if column.name == TEXT => return Ok(first_number(text)),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    match number.filter(|number: &f64| number.is_finite()) {
        Some(number) => Ok(Some(number)),
        None => Err(format!("{} is {value}: expected a number", column.name)),
    }
}

/// The first number of a text: 7.5 of "Score: 7.5/10.".
fn first_number(text: &str) -> Option<f64> {
    let is_part = |c: char| c.is_ascii_digit() || c == '.' || c == '-';
    let mut words = text
        .split(|c| !is_part(c))
        .map(|word| word.trim_matches('.'));
    words.find_map(|word| word.parse().ok())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    fn column(name: &str, mode: Option<&str>) -> Column {
        Column {
            name: name.to_owned(),
            mode: mode.map(str::to_owned),
        }
    }

    fn read(text: &str) -> Result<GivenScores> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scores.csv");
        fs::write(&path, text).unwrap();
        GivenScores::read(&path, &column("score", None))
    }

    #[test]
    fn scores_are_found_by_id_or_source() {
        let given = read("source,score\na.png,1.5\nb.png,\nb.png,-2e3\n").unwrap();
        assert_eq!((given.len(), given.num_empty), (2, 1));
        assert_eq!(given.of(None, "a.png"), Some(1.5));
        assert_eq!(given.of(Some(SampleId(7)), "b.png"), Some(-2000.0));
        assert_eq!(given.of(None, "c.png"), None);
        let given = read("id,score\n00000000000000ff,3\n").unwrap();
        assert_eq!(given.of(Some(SampleId(255)), "x"), Some(3.0));
        assert_eq!(given.of(None, "x"), None);
    }

    #[test]
    fn rows_that_cannot_be_used_are_named() {
        for (text, expected) in [
            ("source,points\na,1\n", "no column \"score\""),
            (
                "source,score\na,1\nb,good\n",
                "row 2: score is \"good\": expected a number",
            ),
            ("source,score\na,inf\n", "row 1: score is \"inf\""),
            ("name,score\na,1\n", "row 1: it names no picture"),
            ("id,score\n12,1\n", "sixteen hexadecimal digits"),
            (
                "source,score\na,1\na,2\n",
                "row 2: its picture has two scores, 1 and 2",
            ),
            ("source,score\na,\n", "no row has a number"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
        assert_eq!(read("source,score\na,1\na,1\n").unwrap().len(), 1);
    }

    #[test]
    fn a_served_model_scores_through_its_texts() {
        for (text, number) in [
            ("7", Some(7.0)),
            ("Score: 7.5/10.", Some(7.5)),
            ("I would say -2.", Some(-2.0)),
            ("10 out of 10", Some(10.0)),
            ("good - very good...", None),
            ("", None),
        ] {
            assert_eq!(first_number(text), number, "{text}");
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("answers.jsonl");
        let mut lines = String::new();
        for (id, mode, status, text) in [
            (1, "rate", "ok", "8/10"),
            (2, "rate", "refused", "3"),
            (3, "rate", "ok", "lovely"),
            (1, "long", "ok", "2 cats"),
        ] {
            let id = format!("{id:016x}");
            let row = json!({ "id": id, "mode": mode, "status": status, "text": text });
            lines += &format!("{row}\n");
        }
        fs::write(&path, lines).unwrap();
        let given = GivenScores::read(&path, &column("text", Some("rate"))).unwrap();
        assert_eq!((given.len(), given.num_empty), (1, 1));
        assert_eq!(given.of(Some(SampleId(1)), "x"), Some(8.0));
        let error = GivenScores::read(&path, &column("text", Some("short"))).unwrap_err();
        assert!(
            error.to_string().contains("no row of the mode \"short\""),
            "{error}"
        );
    }
}
