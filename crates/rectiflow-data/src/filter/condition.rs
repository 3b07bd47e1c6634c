//! Parts of a filter with their columns looked up, and what they say about a sample.
//!
//! A comparison with a missing value is false, `!=` too, and so `not` in front of it is true. `is
//! missing` asks for it.

use crate::filter::{
    columns::{Columns, Kind, Sample, Value, rating_letter, tag_key},
    syntax::{Expression, Node, Sign, Sum},
};

/// The column whose values are the four ratings, in any spelling.
const RATING: &str = "rating";

/// A part that is true or false.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Condition {
    Numbers(Sign, Number, Number),
    Text(Sign, String, String),
    Flag(String, bool),
    AnyOf(String, Vec<Value>),
    Tag(String),
    Missing(String),
    Not(Box<Self>),
    All(Vec<Self>),
    Any(Vec<Self>),
}

/// A part that is a number.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Number {
    Is(f64),
    Column(String),
    Negative(Box<Self>),
    Sum(Sum, Box<Self>, Box<Self>),
}

impl Condition {
    /// Whether a sample is as this part says.
    pub(crate) fn holds(&self, sample: &dyn Sample) -> bool {
        match self {
            Self::Numbers(sign, left, right) => match (left.value(sample), right.value(sample)) {
                (Some(left), Some(right)) => compares(*sign, &left, &right),
                _ => false,
            },
            Self::Text(sign, column, text) => sample
                .value(column)
                .is_some_and(|value| compares(*sign, &value.text().to_lowercase(), text)),
            Self::Flag(column, wanted) => {
                let flag = sample.value(column).and_then(|value| value.flag());
                flag == Some(*wanted)
            }
            Self::AnyOf(column, values) => sample
                .value(column)
                .is_some_and(|value| values.iter().any(|other| equals(&value, other))),
            Self::Tag(tag) => sample.has_tag(tag),
            Self::Missing(column) => sample.value(column).is_none(),
            Self::Not(inner) => !inner.holds(sample),
            Self::All(parts) => parts.iter().all(|part| part.holds(sample)),
            Self::Any(parts) => parts.iter().any(|part| part.holds(sample)),
        }
    }

    /// Adds the columns that this part reads.
    pub(crate) fn columns_into(&self, columns: &mut Vec<String>) {
        match self {
            Self::Numbers(_, left, right) => {
                left.columns_into(columns);
                right.columns_into(columns);
            }
            Self::Text(_, column, _)
            | Self::Flag(column, _)
            | Self::AnyOf(column, _)
            | Self::Missing(column) => columns.push(column.clone()),
            Self::Tag(_) => {}
            Self::Not(inner) => inner.columns_into(columns),
            Self::All(parts) | Self::Any(parts) => {
                for part in parts {
                    part.columns_into(columns);
                }
            }
        }
    }
}

impl Number {
    /// The number of a sample. None if a value is missing or no number.
    fn value(&self, sample: &dyn Sample) -> Option<f64> {
        match self {
            Self::Is(number) => Some(*number),
            Self::Column(column) => sample.value(column)?.number(),
            Self::Negative(inner) => Some(-inner.value(sample)?),
            Self::Sum(sum, left, right) => {
                let (left, right) = (left.value(sample)?, right.value(sample)?);
                Some(match sum {
                    Sum::Plus => left + right,
                    Sum::Minus => left - right,
                    Sum::Times => left * right,
                    Sum::Over => left / right,
                })
            }
        }
    }

    fn columns_into(&self, columns: &mut Vec<String>) {
        match self {
            Self::Is(_) => {}
            Self::Column(column) => columns.push(column.clone()),
            Self::Negative(inner) => inner.columns_into(columns),
            Self::Sum(_, left, right) => {
                left.columns_into(columns);
                right.columns_into(columns);
            }
        }
    }
}

fn compares<T: PartialOrd>(sign: Sign, left: &T, right: &T) -> bool {
    match sign {
        Sign::Equal => left == right,
        Sign::Unequal => left != right,
        Sign::Less => left < right,
        Sign::AtMost => left <= right,
        Sign::Greater => left > right,
        Sign::AtLeast => left >= right,
    }
}

/// Whether a sample's value is a value of a list, which has small letters.
fn equals(value: &Value, other: &Value) -> bool {
    match other {
        Value::Number(number) => value.number() == Some(*number),
        other => value.text().to_lowercase() == other.text(),
    }
}

/// Looks up the columns of filters, and what their values can be compared with.
#[derive(Debug)]
pub(crate) struct Checker<'a> {
    pub(crate) text: &'a str,
    pub(crate) columns: &'a Columns,
}

/// A side of a comparison.
enum Side {
    Column(String, Kind),
    /// A value, or a column that there is not.
    Word(String),
    Quoted(String),
    Number(Number),
}

impl Checker<'_> {
    /// A part that must be true or false.
    ///
    /// # Errors
    /// A message: an unknown column, or a value of another kind.
    pub(crate) fn condition(&self, part: &Expression) -> Result<Condition, String> {
        match &part.node {
            Node::Not(inner) => Ok(Condition::Not(Box::new(self.condition(inner)?))),
            Node::And(parts) => Ok(Condition::All(self.conditions(parts)?)),
            Node::Or(parts) => Ok(Condition::Any(self.conditions(parts)?)),
            Node::Tag(tag) => Ok(Condition::Tag(tag_key(tag))),
            Node::Missing(inner) => self.missing(inner),
            Node::Compare(sign, left, right) => self.comparison(*sign, left, right),
            Node::In(left, values) => self.any_of(left, values),
            Node::Word(word) => self.flag(word),
            Node::Number(_) | Node::Quoted(_) | Node::Negative(_) | Node::Sum(..) => Err(format!(
                "{:?} is neither true nor false: compare it, such as score >= 5",
                self.written(part)
            )),
        }
    }

    fn conditions(&self, parts: &[Expression]) -> Result<Vec<Condition>, String> {
        parts.iter().map(|part| self.condition(part)).collect()
    }

    fn missing(&self, inner: &Expression) -> Result<Condition, String> {
        match self.side(inner)? {
            Side::Column(column, _) => Ok(Condition::Missing(column)),
            Side::Word(word) => Err(self.unknown(&word)),
            _ => Err(format!(
                "{:?} is no column: only a column can be missing",
                self.written(inner)
            )),
        }
    }

    /// A column that stands alone.
    fn flag(&self, word: &str) -> Result<Condition, String> {
        let column = word.to_lowercase();
        match self.columns.kind(&column) {
            None => Err(self.unknown(word)),
            Some(Kind::Flag | Kind::Number | Kind::Any) => Ok(Condition::Flag(column, true)),
            Some(kind) => Err(format!(
                "column {column} is {}, neither true nor false: {}",
                kind.as_str(),
                advice(&column, kind)
            )),
        }
    }

    fn comparison(
        &self,
        sign: Sign,
        left: &Expression,
        right: &Expression,
    ) -> Result<Condition, String> {
        match (self.side(left)?, self.side(right)?) {
            (Side::Column(column, kind), word @ (Side::Word(_) | Side::Quoted(_))) => {
                self.with_word(sign, &column, kind, &word)
            }
            (word @ (Side::Word(_) | Side::Quoted(_)), Side::Column(column, kind)) => {
                self.with_word(reversed(sign), &column, kind, &word)
            }
            (left_side, right_side) => {
                let left = self.number(left_side, left)?;
                let right = self.number(right_side, right)?;
                Ok(Condition::Numbers(sign, left, right))
            }
        }
    }

    /// A column compared with a word.
    fn with_word(
        &self,
        sign: Sign,
        column: &str,
        kind: Kind,
        word: &Side,
    ) -> Result<Condition, String> {
        let (Side::Word(text) | Side::Quoted(text)) = word else {
            unreachable!("only words are compared here");
        };
        let is_equality = matches!(sign, Sign::Equal | Sign::Unequal);
        let flag = match text.to_lowercase().as_str() {
            "true" => Some(true),
            "false" => Some(false),
            _ => None,
        };
        match (kind, flag) {
            (Kind::Flag | Kind::Number | Kind::Any, Some(flag)) if is_equality => {
                let wanted = flag == (sign == Sign::Equal);
                Ok(Condition::Flag(column.to_owned(), wanted))
            }
            (Kind::Text | Kind::Any, _) => {
                let text = self.text_value(column, text)?;
                Ok(Condition::Text(sign, column.to_owned(), text))
            }
            // A word without quotation marks may be meant as a column.
            (Kind::Number, None) if matches!(word, Side::Word(_)) => Err(format!(
                "column {column} is {}; {}",
                kind.as_str(),
                self.unknown(text)
            )),
            _ => Err(format!(
                "column {column} is {}, which cannot be compared so with {text:?}: {}",
                kind.as_str(),
                advice(column, kind)
            )),
        }
    }

    fn any_of(&self, left: &Expression, values: &[Expression]) -> Result<Condition, String> {
        let (column, kind) = match self.side(left)? {
            Side::Column(column, kind) => (column, kind),
            Side::Word(word) => return Err(self.unknown(&word)),
            _ => {
                return Err(format!(
                    "{:?} is no column: a list stands behind a column, such as rating in [g, s]",
                    self.written(left)
                ));
            }
        };
        let mut wanted = Vec::with_capacity(values.len());
        for value in values {
            let value = match (self.constant(value), kind) {
                (Some(Value::Number(number)), Kind::Number | Kind::Any) => Value::Number(number),
                (Some(Value::Number(_)), Kind::Text) => {
                    Value::Text(self.text_value(&column, self.written(value))?)
                }
                (Some(Value::Text(text)), Kind::Text | Kind::Any) => {
                    Value::Text(self.text_value(&column, &text)?)
                }
                _ => {
                    return Err(format!(
                        "column {column} is {}, which {:?} in the list is not: {}",
                        kind.as_str(),
                        self.written(value),
                        advice(&column, kind)
                    ));
                }
            };
            wanted.push(value);
        }
        Ok(Condition::AnyOf(column, wanted))
    }

    /// The value of a list that a part is. None if it is computed.
    fn constant(&self, part: &Expression) -> Option<Value> {
        match &part.node {
            Node::Number(number) => Some(Value::Number(*number)),
            Node::Word(text) | Node::Quoted(text) => Some(Value::Text(text.clone())),
            Node::Negative(inner) => match self.constant(inner)? {
                Value::Number(number) => Some(Value::Number(-number)),
                _ => None,
            },
            _ => None,
        }
    }

    /// A text to compare a column with, in small letters; a rating as its letter.
    fn text_value(&self, column: &str, text: &str) -> Result<String, String> {
        if column != RATING {
            return Ok(text.to_lowercase());
        }
        let letter = rating_letter(text).ok_or_else(|| {
            format!(
                "{text:?} is no rating: expected g (general), s (sensitive, safe), q \
                 (questionable) or e (explicit)"
            )
        })?;
        Ok(letter.to_owned())
    }

    /// A part that stands on a side of a comparison.
    fn side(&self, part: &Expression) -> Result<Side, String> {
        match &part.node {
            Node::Word(word) => {
                let column = word.to_lowercase();
                Ok(match self.columns.kind(&column) {
                    Some(kind) => Side::Column(column, kind),
                    None => Side::Word(word.clone()),
                })
            }
            Node::Quoted(text) => Ok(Side::Quoted(text.clone())),
            Node::Number(number) => Ok(Side::Number(Number::Is(*number))),
            Node::Negative(inner) => {
                let inner = self.number(self.side(inner)?, inner)?;
                Ok(Side::Number(Number::Negative(Box::new(inner))))
            }
            Node::Sum(sum, left, right) => {
                let left = Box::new(self.number(self.side(left)?, left)?);
                let right = Box::new(self.number(self.side(right)?, right)?);
                Ok(Side::Number(Number::Sum(*sum, left, right)))
            }
            _ => Err(format!(
                "{:?} is true or false, which cannot be compared; `not` in front of it turns it \
                 round",
                self.written(part)
            )),
        }
    }

    /// A side that must be a number.
    fn number(&self, side: Side, part: &Expression) -> Result<Number, String> {
        match side {
            Side::Number(number) => Ok(number),
            Side::Column(column, Kind::Number | Kind::Any | Kind::Flag) => {
                Ok(Number::Column(column))
            }
            Side::Column(column, kind) => Err(format!(
                "column {column} is {}, and a number is expected: {}",
                kind.as_str(),
                advice(&column, kind)
            )),
            Side::Word(word) => Err(self.unknown(&word)),
            Side::Quoted(_) => Err(format!(
                "{:?} is a text, and a number is expected",
                self.written(part)
            )),
        }
    }

    fn unknown(&self, word: &str) -> String {
        let mut message = format!("there is no column {word:?}");
        if let Some(near) = self.columns.nearest(word) {
            message += &format!(" (is {near} meant?)");
        }
        let names: Vec<&str> = self.columns.names().collect();
        message + &format!("; the columns are {}", names.join(", "))
    }

    /// A part as it is written.
    fn written(&self, part: &Expression) -> &str {
        self.text.get(part.span.clone()).unwrap_or(self.text)
    }
}

/// How to ask for a value of a column.
fn advice(column: &str, kind: Kind) -> String {
    match kind {
        Kind::List => "ask for a tag with tag:name".to_owned(),
        Kind::Number => format!("write {column} >= 5"),
        Kind::Flag => format!("write {column}, or not {column}"),
        Kind::Text | Kind::Any => format!("write {column} = \"value\""),
    }
}

fn reversed(sign: Sign) -> Sign {
    match sign {
        Sign::Less => Sign::Greater,
        Sign::AtMost => Sign::AtLeast,
        Sign::Greater => Sign::Less,
        Sign::AtLeast => Sign::AtMost,
        sign => sign,
    }
}
