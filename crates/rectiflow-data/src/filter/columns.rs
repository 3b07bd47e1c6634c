//! The columns that a filter can name, and the values that a sample has for them.

use std::collections::BTreeMap;

/// What the values of a column are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Numbers.
    Number,
    /// Texts, also dates: they are compared letter by letter.
    Text,
    /// True or false.
    Flag,
    /// Lists and objects, which cannot be compared.
    List,
    /// Values of more than one kind.
    Any,
}

impl Kind {
    /// The word in a message.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Number => "a number",
            Self::Text => "a text",
            Self::Flag => "true or false",
            Self::List => "a list",
            Self::Any => "a value of any kind",
        }
    }
}

/// Columns that every sample has, with a table or without one: the picture's own size in pixels,
/// and the number of its tags.
pub(crate) const OWN: [&str; 3] = ["width", "height", "num_tags"];

/// Columns by name, in small letters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Columns(BTreeMap<String, Kind>);

impl Columns {
    /// The columns that every sample has.
    pub(crate) fn own() -> Self {
        let mut columns = Self::default();
        for name in OWN {
            columns.0.insert(name.to_owned(), Kind::Number);
        }
        columns
    }

    /// Adds a column. One that is there with another kind becomes [`Kind::Any`].
    pub(crate) fn add(&mut self, name: &str, kind: Kind) {
        // Most columns of JSON lines are known from the line before.
        if self.0.get(name) == Some(&kind) {
            return;
        }
        let known = self.0.entry(name.to_lowercase()).or_insert(kind);
        if *known != kind {
            *known = Kind::Any;
        }
    }

    /// Adds the columns of `others`, except those that every sample has.
    pub(crate) fn extend(&mut self, others: &Self) {
        for (name, &kind) in &others.0 {
            if !OWN.contains(&name.as_str()) {
                self.add(name, kind);
            }
        }
    }

    /// The kind of a column. None if there is no such column.
    pub(crate) fn kind(&self, name: &str) -> Option<Kind> {
        self.0.get(&name.to_lowercase()).copied()
    }

    /// The names of all columns.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The name that is nearest to `name`, if one is near.
    pub(crate) fn nearest(&self, name: &str) -> Option<&str> {
        nearest(name, self.names())
    }
}

/// The one of `names` that is nearest to `name`, if one is near.
pub(crate) fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let name = name.to_lowercase();
    let mut best = None;
    for other in names {
        let likeness = strsim::normalized_damerau_levenshtein(&name, other);
        if likeness >= 0.5 && best.is_none_or(|(most, _)| likeness > most) {
            best = Some((likeness, other));
        }
    }
    best.map(|(_, other)| other)
}

/// A value of a column.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    /// A number.
    Number(f64),
    /// A text.
    Text(String),
    /// True or false.
    Flag(bool),
}

impl Value {
    /// As a number: true is 1, and a text is what it spells. None if it is no number.
    pub(crate) fn number(&self) -> Option<f64> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Flag(flag) => Some(f64::from(u8::from(*flag))),
            Self::Text(text) => text.trim().parse().ok(),
        }
    }

    /// As a flag: numbers but 0 are true, and so are the texts `true` and `t`. None if it is none.
    pub(crate) fn flag(&self) -> Option<bool> {
        match self {
            Self::Number(number) => Some(*number != 0.0),
            Self::Flag(flag) => Some(*flag),
            Self::Text(text) => match text.trim().to_lowercase().as_str() {
                "true" | "t" | "1" => Some(true),
                "false" | "f" | "0" => Some(false),
                _ => None,
            },
        }
    }

    /// As a text.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Flag(flag) => flag.to_string(),
            Self::Text(text) => text.clone(),
        }
    }
}

/// What a filter asks about a sample.
pub(crate) trait Sample {
    /// The value of a column, whose name is in small letters. None if it is missing.
    fn value(&self, column: &str) -> Option<Value>;

    /// Whether it has a tag, spelled as [`tag_key`] spells it.
    fn has_tag(&self, tag: &str) -> bool;
}

/// The spelling of a tag in which tags are compared: small letters, spaces for underscores.
pub(crate) fn tag_key(tag: &str) -> String {
    tag.trim().to_lowercase().replace('_', " ")
}

/// The letter of a rating: `g`, `s`, `q` or `e`, for the words of the boards too. None for another
/// word.
pub(crate) fn rating_letter(word: &str) -> Option<&'static str> {
    match word.trim().to_lowercase().as_str() {
        "g" | "general" => Some("g"),
        "s" | "sensitive" | "safe" => Some("s"),
        "q" | "questionable" => Some("q"),
        "e" | "explicit" => Some("e"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_of_two_kinds_is_of_any_kind() {
        let mut columns = Columns::own();
        columns.add("Score", Kind::Number);
        columns.add("score", Kind::Number);
        assert_eq!(columns.kind("SCORE"), Some(Kind::Number));
        columns.add("score", Kind::Text);
        assert_eq!(columns.kind("score"), Some(Kind::Any));
        assert_eq!(columns.kind("width"), Some(Kind::Number));
        assert_eq!(columns.nearest("scroe"), Some("score"));
        assert_eq!(columns.nearest("parent_id"), None);
    }

    #[test]
    fn values_are_read_as_the_kind_that_is_asked_for() {
        for (value, number, flag) in [
            (Value::Number(2.0), Some(2.0), Some(true)),
            (Value::Number(0.0), Some(0.0), Some(false)),
            (Value::Flag(true), Some(1.0), Some(true)),
            (Value::Text("t".to_owned()), None, Some(true)),
            (Value::Text("F".to_owned()), None, Some(false)),
            (Value::Text(" 3.5 ".to_owned()), Some(3.5), None),
            (Value::Text("x".to_owned()), None, None),
        ] {
            assert_eq!((value.number(), value.flag()), (number, flag), "{value:?}");
        }
        assert_eq!(tag_key(" Long_Hair"), "long hair");
        assert_eq!(rating_letter("Explicit"), Some("e"));
        assert_eq!(rating_letter("x"), None);
    }
}
