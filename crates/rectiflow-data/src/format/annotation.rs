//! Tables of annotations: what models say about pictures, one row for a picture, a kind and a mode.
//!
//! `rectiflow caption`, `tag` and `score` write them as Parquet, `rectiflow prep --annotations`
//! merges them into a data set. JSON lines have the same keys; journals and other programs use
//! them. A table is untrusted input: whatever its bytes are, a reader returns rows that keep the
//! rules of [`Annotation::check`], or an error. `docs/captions.md` is the specification.

use std::{fmt, path::Path};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{error::Error, format::record::SampleId};

/// The version of the tables that this crate writes, and the newest that it reads.
pub const ANNOTATION_VERSION: u32 = 1;
/// Longest text of a row in bytes; a model that writes more is in a loop.
pub const MAX_TEXT_BYTES: usize = 1 << 20;
/// Most tags of a row.
const MAX_TAGS: usize = 1 << 16;
/// Longest name of a mode or a model in bytes.
const MAX_NAME_BYTES: usize = 1 << 10;

/// What a row says about its picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A caption.
    Caption,
    /// Tags with their classes.
    Tags,
    /// A score, and its rank among the scores of the set.
    Score,
}

/// What became of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The answer can be used.
    Ok,
    /// The model answered with nothing.
    Empty,
    /// The answer ends at the limit of tokens.
    Cut,
    /// The model declined.
    Refused,
    /// The answer repeats itself.
    Loop,
    /// The server failed on this picture, and not on others.
    Failed,
    /// The picture cannot be read.
    Unreadable,
}

/// All kinds.
pub const KINDS: [Kind; 3] = [Kind::Caption, Kind::Tags, Kind::Score];
/// All statuses.
pub const STATUSES: [Status; 7] = [
    Status::Ok,
    Status::Empty,
    Status::Cut,
    Status::Refused,
    Status::Loop,
    Status::Failed,
    Status::Unreadable,
];

impl Kind {
    /// The word in a table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Caption => "caption",
            Self::Tags => "tags",
            Self::Score => "score",
        }
    }

    /// The kind that a word means.
    pub fn parse(word: &str) -> Option<Self> {
        KINDS.into_iter().find(|kind| kind.as_str() == word)
    }
}

impl Status {
    /// The word in a table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Empty => "empty",
            Self::Cut => "cut",
            Self::Refused => "refused",
            Self::Loop => "loop",
            Self::Failed => "failed",
            Self::Unreadable => "unreadable",
        }
    }

    /// The status that a word means.
    pub fn parse(word: &str) -> Option<Self> {
        STATUSES.into_iter().find(|status| status.as_str() == word)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A row of a table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Annotation {
    /// The picture: sixteen hexadecimal digits in a table.
    #[serde(serialize_with = "digits", deserialize_with = "from_digits")]
    pub id: SampleId,
    /// Address of the picture in the source that was annotated.
    pub source: String,
    /// What the row says.
    pub kind: Kind,
    /// The caption mode, or the name of the tagger or scorer.
    pub mode: String,
    /// The model that answered, as the server or the file calls it.
    #[serde(default)]
    pub model: String,
    /// The caption. Answers that cannot be used are kept here too, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Tags, the surest first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<Vec<String>>,
    /// The class of each tag, such as "general" or "character".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag_classes: Option<Vec<String>>,
    /// The score.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    /// Share of the set that scores lower, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<f64>,
    /// What became of the picture.
    pub status: Status,
    /// Why it has no usable answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The seed that the model was asked with.
    #[serde(default)]
    pub seed: i64,
    /// Which attempt this is, from 1.
    #[serde(default)]
    pub attempt: u32,
    /// Tokens of the answer, as the server counted them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u32>,
}

fn digits<S: Serializer>(id: &SampleId, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(id)
}

fn from_digits<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<SampleId, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_id(&text).map_err(serde::de::Error::custom)
}

/// The id that sixteen hexadecimal digits mean.
///
/// # Errors
/// What is wrong with it.
pub fn parse_id(text: &str) -> std::result::Result<SampleId, String> {
    let is_digits = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    match u64::from_str_radix(text, 16) {
        Ok(id) if is_digits => Ok(SampleId(id)),
        _ => Err(format!(
            "id {:?}: expected sixteen hexadecimal digits",
            shortened(text)
        )),
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}

impl Annotation {
    /// A row about a picture that has no answer yet: status ok, attempt 1.
    pub fn new(id: SampleId, source: &str, kind: Kind, mode: &str) -> Self {
        Self {
            id,
            source: source.to_owned(),
            kind,
            mode: mode.to_owned(),
            model: String::new(),
            text: None,
            tags: None,
            tag_classes: None,
            score: None,
            rank: None,
            status: Status::Ok,
            reason: None,
            seed: 0,
            attempt: 1,
            tokens: None,
        }
    }

    /// Checks the rules of a row.
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn check(&self) -> std::result::Result<(), String> {
        let num_tags = self.tags.as_ref().map_or(0, Vec::len);
        let num_classes = self.tag_classes.as_ref().map_or(num_tags, Vec::len);
        if num_classes != num_tags {
            return Err(format!("{num_tags} tags with {num_classes} classes"));
        }
        if num_tags > MAX_TAGS {
            return Err(format!("{num_tags} tags, at most {MAX_TAGS} are read"));
        }
        for (name, text, limit) in [
            ("source", self.source.len(), MAX_TEXT_BYTES),
            ("mode", self.mode.len(), MAX_NAME_BYTES),
            ("model", self.model.len(), MAX_NAME_BYTES),
            ("text", length(&self.text), MAX_TEXT_BYTES),
            ("reason", length(&self.reason), MAX_TEXT_BYTES),
        ] {
            if text > limit {
                return Err(format!("{name} of {text} bytes, expected at most {limit}"));
            }
        }
        if self.score.is_some_and(|score| !score.is_finite()) {
            return Err("its score is not finite".to_owned());
        }
        match self.rank {
            Some(rank) if !(0.0..=1.0).contains(&rank) => {
                Err(format!("rank {rank}: expected 0 to 1"))
            }
            _ => Ok(()),
        }
    }

    /// The row as a line of JSON, without its end.
    pub fn to_line(&self) -> String {
        serde_json::to_string(self).expect("a row is strings and finite numbers")
    }

    /// The row of a line of JSON.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_line(line: &[u8]) -> std::result::Result<Self, String> {
        let row: Self = serde_json::from_slice(line).map_err(|error| error.to_string())?;
        row.check()?;
        Ok(row)
    }
}

fn length(text: &Option<String>) -> usize {
    text.as_ref().map_or(0, String::len)
}

/// The error about a row, counted from 1.
pub(crate) fn malformed(path: &Path, number: u64, reason: &str) -> Error {
    Error::Malformed {
        path: path.to_owned(),
        kind: "table of annotations",
        reason: format!("row {number}: {reason}"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A caption of one picture.
    pub(crate) fn row() -> Annotation {
        Annotation {
            text: Some("a cat".to_owned()),
            ..Annotation::new(SampleId(7), "a.png", Kind::Caption, "short")
        }
    }

    #[test]
    fn a_line_is_read_as_it_was_written() {
        let full = Annotation {
            model: "m".to_owned(),
            tags: Some(vec!["cat".to_owned(), String::new()]),
            tag_classes: Some(vec!["general".to_owned(), "x".to_owned()]),
            score: Some(0.1),
            rank: Some(1.0),
            status: Status::Loop,
            reason: Some("said \"cat\" 9 times\n".to_owned()),
            seed: -3,
            attempt: 2,
            tokens: Some(u32::MAX),
            ..row()
        };
        for row in [row(), full] {
            let line = row.to_line();
            assert!(!line.contains('\n'));
            assert_eq!(Annotation::from_line(line.as_bytes()).unwrap(), row);
        }
        assert!(row().to_line().starts_with(r#"{"id":"0000000000000007","#));
    }

    #[test]
    fn words_and_values_are_each_others() {
        for kind in KINDS {
            assert_eq!(Kind::parse(kind.as_str()), Some(kind));
            let json = serde_json::to_string(&kind).unwrap();
            assert_eq!(json, format!("\"{kind}\""));
        }
        for status in STATUSES {
            assert_eq!(Status::parse(status.as_str()), Some(status));
            let json = serde_json::to_string(&status).unwrap();
            assert_eq!(json, format!("\"{status}\""));
        }
    }
}
