//! Filters of a preparation: `rating in [g, s] and score >= 5 and width*height >= 65536 and not
//! tag:comic`.
//!
//! A filter is checked against the columns that there are before the first sample is asked: an
//! unknown column, or a number where a text is expected, ends the preparation with a message. What
//! the columns are and where values come from is the caller's: a [`Sample`](columns::Sample). The
//! parts that `and` joins are its clauses; a sample is removed by the first that is false.

pub(crate) mod columns;
pub(crate) mod condition;
mod lexer;
pub(crate) mod syntax;

use crate::filter::{
    columns::{Columns, Sample},
    condition::{Checker, Condition},
};

/// A filter whose columns are known.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Filter {
    clauses: Vec<Clause>,
}

/// A part that every sample must be as.
#[derive(Debug, Clone, PartialEq)]
struct Clause {
    text: String,
    condition: Condition,
}

/// What is wrong with the words and signs of a filter, whatever the columns are.
pub(crate) fn problem(text: &str) -> Option<String> {
    syntax::clauses(text).err()
}

impl Filter {
    /// Parses a filter of samples with these columns. An empty text keeps every sample.
    ///
    /// # Errors
    /// A message: what, where, what was expected and found.
    pub(crate) fn new(text: &str, columns: &Columns) -> Result<Self, String> {
        let checker = Checker { text, columns };
        let mut clauses = Vec::new();
        for part in syntax::clauses(text)? {
            clauses.push(Clause {
                text: text.get(part.span.clone()).unwrap_or(text).to_owned(),
                condition: checker.condition(&part)?,
            });
        }
        Ok(Self { clauses })
    }

    /// Whether it keeps every sample.
    pub(crate) fn is_empty(&self) -> bool {
        self.clauses.is_empty()
    }

    /// The clauses as they are written.
    pub(crate) fn clauses(&self) -> impl Iterator<Item = &str> {
        self.clauses.iter().map(|clause| clause.text.as_str())
    }

    /// The columns that it reads, in small letters.
    pub(crate) fn columns(&self) -> Vec<String> {
        let mut columns = Vec::new();
        for clause in &self.clauses {
            clause.condition.columns_into(&mut columns);
        }
        columns.sort_unstable();
        columns.dedup();
        columns
    }

    /// The number of the first clause that removes a sample. None if all keep it.
    pub(crate) fn removed_by(&self, sample: &dyn Sample) -> Option<usize> {
        let is_false = |clause: &Clause| !clause.condition.holds(sample);
        self.clauses.iter().position(is_false)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::filter::columns::{Kind, Value};

    struct Post(BTreeMap<&'static str, Value>, Vec<&'static str>);

    impl Sample for Post {
        fn value(&self, column: &str) -> Option<Value> {
            self.0.get(column).cloned()
        }

        fn has_tag(&self, tag: &str) -> bool {
            self.1.contains(&tag)
        }
    }

    fn columns() -> Columns {
        let mut columns = Columns::own();
        for (name, kind) in [
            ("rating", Kind::Text),
            ("score", Kind::Number),
            ("is_deleted", Kind::Flag),
            ("parent_id", Kind::Number),
            ("created_at", Kind::Text),
            ("mixed", Kind::Any),
            ("tags", Kind::List),
        ] {
            columns.add(name, kind);
        }
        columns
    }

    fn post() -> Post {
        let text = |text: &str| Value::Text(text.to_owned());
        let values = BTreeMap::from([
            ("rating", text("s")),
            ("score", Value::Number(7.0)),
            ("is_deleted", Value::Flag(false)),
            ("created_at", text("2023-05-01 10:00")),
            ("mixed", text("12")),
            ("width", Value::Number(800.0)),
            ("height", Value::Number(600.0)),
            ("num_tags", Value::Number(3.0)),
        ]);
        Post(values, vec!["1girl", "long hair", "saber (fate)"])
    }

    #[test]
    fn a_filter_keeps_what_all_its_clauses_hold_for() {
        for (text, kept) in [
            ("", true),
            (
                "rating in [g, s] and score >= 5 and width*height >= 65536 and not tag:comic",
                true,
            ),
            ("rating = Sensitive", true),
            ("\"safe\" = rating", true),
            ("rating in [questionable, e]", false),
            ("rating not in [q, e]", true),
            ("rating != g", true),
            ("score in [1, 7]", true),
            ("score in [-7]", false),
            ("-score < -6 and 6 < score", true),
            ("(score + 1) / 2 = 4 and 2 - 1 - 1 = 0", true),
            ("width / height >= 1.3 and width / height <= 1.4", true),
            ("score < 5 or tag:1GIRL", true),
            ("not (score < 5 or tag:1girl)", false),
            (
                "tag:long_hair and tag:\"long hair\" and tag:saber_(fate)",
                true,
            ),
            ("is_deleted", false),
            (
                "not is_deleted and is_deleted = false and is_deleted != true",
                true,
            ),
            ("created_at >= 2023-01-01", false),
            (
                "created_at >= \"2023-01-01\" and created_at < \"2024\"",
                true,
            ),
            ("mixed >= 12 and mixed = \"12\" and mixed in [12]", true),
            // A comparison with a missing value is false.
            ("parent_id > 0", false),
            ("parent_id != 5", false),
            ("not parent_id > 0", true),
            ("parent_id is missing and score is not missing", true),
            ("not parent_id", true),
        ] {
            let filter = Filter::new(text, &columns());
            let filter = match filter {
                Ok(filter) => filter,
                // A date without quotation marks is a sum.
                Err(message) if text.contains("2023-01-01") => {
                    assert!(message.contains("column created_at is a text"), "{message}");
                    continue;
                }
                Err(message) => panic!("{text}: {message}"),
            };
            assert_eq!(filter.removed_by(&post()).is_none(), kept, "{text}");
        }
    }

    #[test]
    fn the_first_false_clause_removes() {
        let filter = Filter::new("score > 1 and tag:comic and rating = e", &columns()).unwrap();
        assert_eq!(filter.removed_by(&post()), Some(1));
        let clauses: Vec<&str> = filter.clauses().collect();
        assert_eq!(clauses, ["score > 1", "tag:comic", "rating = e"]);
        assert_eq!(filter.columns(), ["rating", "score"]);
    }

    #[test]
    fn columns_and_kinds_are_checked() {
        for (text, part) in [
            (
                "scroe > 5",
                "there is no column \"scroe\" (is score meant?); the columns are created_at",
            ),
            (
                "score > widht",
                "there is no column \"widht\" (is width meant?)",
            ),
            ("raitng in [g]", "is rating meant?"),
            ("fav > 5", "there is no column \"fav\"; the columns"),
            (
                "rating >= 5",
                "column rating is a text, and a number is expected",
            ),
            (
                "rating = genral",
                "\"genral\" is no rating: expected g (general)",
            ),
            ("rating in [g, 5]", "\"5\" is no rating"),
            (
                "score = \"high\"",
                "column score is a number, which cannot be compared so with \"high\"",
            ),
            (
                "score in [g]",
                "column score is a number, which \"g\" in the list is not",
            ),
            ("score in [(1 + 1)]", "\"(1 + 1)\" in the list is not"),
            ("tags = comic", "column tags is a list"),
            ("rating", "column rating is a text, neither true nor false"),
            ("score + 1", "\"score + 1\" is neither true nor false"),
            (
                "tag:a = 5",
                "\"tag:a\" is true or false, which cannot be compared",
            ),
            ("(score > 5) > 3", "\"(score > 5)\" is true or false"),
            ("5 is missing", "only a column can be missing"),
            ("is_deleted > true", "column is_deleted is true or false"),
        ] {
            let message = Filter::new(text, &columns()).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    proptest! {
        #[test]
        fn no_filter_panics(words in proptest::collection::vec(
            prop_oneof![
                Just("("), Just(")"), Just("["), Just("]"), Just(","), Just("not"), Just("and"),
                Just("or"), Just("in"), Just("is"), Just("missing"), Just("score"), Just("rating"),
                Just("tag:x"), Just("'g'"), Just("-"), Just("/"), Just("="), Just("<"), Just("5"),
                Just("is_deleted"), Just("true"), Just("mixed"), Just("tags"), Just("nothing"),
            ],
            0..24,
        )) {
            if let Ok(filter) = Filter::new(&words.join(" "), &columns()) {
                filter.removed_by(&post());
            }
        }
    }
}
