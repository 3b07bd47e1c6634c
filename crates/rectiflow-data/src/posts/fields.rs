//! What the columns of image boards hold: which one is the number, the hash, the rating, the score
//! and each class of tags of a post, in the spellings of Danbooru, e621, gallery-dl and others.
//!
//! A row is an object whose names have small letters. A path with dots leads into objects: e621
//! writes `score.total` and `tags.general`.

use serde_json::{Map, Value};

use crate::{
    filter::columns::{Columns, Kind, rating_letter},
    posts::size,
    text::keys,
};

/// A row of a table.
pub(crate) type Row = Map<String, Value>;

/// Columns with the number of a post.
const IDS: [&str; 2] = ["id", "post_id"];
/// Columns with the MD5 of a post's file.
const MD5S: [&str; 4] = ["md5", "file_md5", "file.md5", "media_asset.md5"];
/// Columns with the score of a post.
const SCORES: [&str; 2] = ["score", "score.total"];
/// Columns with the rating of a post.
const RATINGS: [&str; 1] = ["rating"];
/// Columns with the tags of all classes, which count if no class has a column of its own.
const ALL_TAGS: [&str; 2] = ["tag_string", "tags"];
/// Columns with sentences about the picture.
pub(crate) const CAPTIONS: [&str; 3] = ["caption", "captions", "text"];

/// A class of tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    Character,
    Copyright,
    Artist,
    Species,
    General,
    Meta,
    Lore,
    Contributor,
    Invalid,
}

/// All classes, in the order of their tags in a text.
pub(crate) const CLASSES: [Class; 9] = [
    Class::Character,
    Class::Copyright,
    Class::Artist,
    Class::Species,
    Class::General,
    Class::Meta,
    Class::Lore,
    Class::Contributor,
    Class::Invalid,
];

impl Class {
    /// The columns that can have its tags; the first that a row has is read.
    fn columns(self) -> [&'static str; 3] {
        match self {
            Self::Character => ["tag_string_character", "tags_character", "tags.character"],
            Self::Copyright => ["tag_string_copyright", "tags_copyright", "tags.copyright"],
            Self::Artist => ["tag_string_artist", "tags_artist", "tags.artist"],
            Self::Species => ["tag_string_species", "tags_species", "tags.species"],
            Self::General => ["tag_string_general", "tags_general", "tags.general"],
            Self::Meta => ["tag_string_meta", "tags_meta", "tags.meta"],
            Self::Lore => ["tag_string_lore", "tags_lore", "tags.lore"],
            Self::Contributor => [
                "tag_string_contributor",
                "tags_contributor",
                "tags.contributor",
            ],
            Self::Invalid => ["tag_string_invalid", "tags_invalid", "tags.invalid"],
        }
    }

    /// The tags of a row that are of this class. A row without classes has general tags alone.
    pub(crate) fn tags(self, row: &Row) -> Vec<String> {
        if self == Self::General && !has_classes(row) {
            return words(row, &ALL_TAGS);
        }
        words(row, &self.columns())
    }
}

/// Whether a column of a row is of one class of tags.
fn has_classes(row: &Row) -> bool {
    CLASSES
        .iter()
        .any(|class| first(row, &class.columns()).is_some())
}

/// The value at a path. None if it is missing or null.
pub(crate) fn at<'a>(row: &'a Row, path: &str) -> Option<&'a Value> {
    let value = match row.get(path) {
        Some(value) => value,
        None => {
            let (outer, inner) = path.split_once('.')?;
            return at(row.get(outer)?.as_object()?, inner);
        }
    };
    (!value.is_null()).then_some(value)
}

fn first<'a>(row: &'a Row, paths: &[&str]) -> Option<&'a Value> {
    paths.iter().find_map(|path| at(row, path))
}

/// The number of a row's post.
pub(crate) fn id(row: &Row) -> Option<u64> {
    match first(row, &IDS)? {
        Value::Number(number) => number.as_u64().or_else(|| whole(number.as_f64()?)),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

/// A float that is a whole number, as programs write a column that can be missing.
fn whole(number: f64) -> Option<u64> {
    let is_exact = number >= 0.0 && number.fract() == 0.0 && number < (1_u64 << 53) as f64;
    is_exact.then_some(number as u64)
}

/// The MD5 of a row's post.
pub(crate) fn md5(row: &Row) -> Option<[u32; 4]> {
    MD5S.iter()
        .find_map(|path| parse_md5(at(row, path)?.as_str()?))
}

/// The MD5 that 32 hexadecimal digits spell.
pub(crate) fn parse_md5(text: &str) -> Option<[u32; 4]> {
    let text = text.trim();
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let number = u128::from_str_radix(text, 16).ok()?;
    Some(parts(number))
}

/// The 32-bit parts of a key, the highest first.
pub(crate) fn parts(number: u128) -> [u32; 4] {
    [96, 64, 32, 0].map(|shift| (number >> shift) as u32)
}

/// The path of a row's file as it is written.
pub(crate) fn file(row: &Row) -> Option<&str> {
    keys::file_name(row)
}

/// The score of a row's post.
pub(crate) fn score(row: &Row) -> Option<f64> {
    SCORES.iter().find_map(|path| match at(row, path)? {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    })
}

/// The letter of a row's rating: `g`, `s`, `q` or `e`.
pub(crate) fn rating(row: &Row) -> Option<&'static str> {
    rating_letter(first(row, &RATINGS)?.as_str()?)
}

/// The words of the first of `paths` that a row has: a list, or a string with spaces between words;
/// with commas, if there is one.
pub(crate) fn words(row: &Row, paths: &[&str]) -> Vec<String> {
    match first(row, paths) {
        Some(Value::String(text)) => split(text),
        Some(Value::Array(values)) => strings(values),
        _ => Vec::new(),
    }
}

/// Whole texts of the first of `paths` that a row has.
pub(crate) fn texts(row: &Row, paths: &[&str]) -> Vec<String> {
    match first(row, paths) {
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(values)) => strings(values),
        _ => Vec::new(),
    }
}

fn strings(values: &[Value]) -> Vec<String> {
    let strings = values.iter().filter_map(Value::as_str);
    strings.map(str::to_owned).collect()
}

fn split(text: &str) -> Vec<String> {
    let has_commas = text.contains(", ");
    let is_between = |letter: char| match has_commas {
        true => letter == ',',
        false => letter.is_whitespace(),
    };
    let words = text.split(is_between).map(str::trim);
    words
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Which of the columns that are needed a table has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) has_key: bool,
    pub(crate) has_files: bool,
    pub(crate) has_tags: bool,
    pub(crate) has_captions: bool,
}

impl Shape {
    /// The shape of a table with these columns.
    pub(crate) fn of(columns: &Columns) -> Self {
        let has = |paths: &[&str]| paths.iter().any(|path| columns.kind(path).is_some());
        let has_classes = CLASSES.iter().any(|class| has(&class.columns()));
        let is_rated = has(&RATINGS) || has(&SCORES);
        let is_file = |name: &str| {
            keys::is_file_key(name) && matches!(columns.kind(name), Some(Kind::Text | Kind::Any))
        };
        Self {
            has_key: has(&IDS) || has(&MD5S),
            has_files: columns.names().any(is_file),
            has_tags: has_classes || has(&["tag_string"]) || is_rated && has(&["tags"]),
            has_captions: has(&CAPTIONS),
        }
    }

    /// Whether a table with this shape is one of an image board although its user does not say so:
    /// its rows have a number or a hash and tags of a board, and name no files.
    pub(crate) fn is_of_board(self) -> bool {
        self.has_key && self.has_tags && !self.has_files
    }
}

/// The columns that say which picture a row is about, and where it stands among the others.
pub(crate) fn key_columns(columns: &Columns) -> Vec<String> {
    let mut wanted = Vec::new();
    for path in IDS.iter().chain(&MD5S).chain(&SCORES).chain(&RATINGS) {
        wanted.push((*path).to_owned());
    }
    for name in columns.names() {
        if keys::is_file_key(name) {
            wanted.push(name.to_owned());
        }
    }
    present(wanted, columns)
}

/// The columns with what a row says about its picture, and those of `others`.
pub(crate) fn text_columns(columns: &Columns, others: &[String]) -> Vec<String> {
    let mut wanted = key_columns(columns);
    for path in ALL_TAGS.iter().chain(&CAPTIONS) {
        wanted.push((*path).to_owned());
    }
    for class in CLASSES {
        wanted.extend(class.columns().map(str::to_owned));
    }
    for key in size::KEYS.as_flattened() {
        wanted.push((*key).to_owned());
    }
    wanted.extend_from_slice(others);
    present(wanted, columns)
}

/// The outermost columns of those of `wanted` that a table has.
fn present(wanted: Vec<String>, columns: &Columns) -> Vec<String> {
    let mut outermost = Vec::new();
    for path in wanted {
        if columns.kind(&path).is_some() {
            let outer = path.split('.').next().unwrap_or(&path);
            outermost.push(outer.to_owned());
        }
    }
    outermost.sort_unstable();
    outermost.dedup();
    outermost
}

/// Adds the columns that a filter finds under their usual names wherever a board has them.
pub(crate) fn add_usual(columns: &mut Columns) {
    let nested = columns.clone();
    for (name, paths, kind) in [
        ("id", &IDS[..], Kind::Number),
        ("md5", &MD5S[..], Kind::Text),
        ("score", &SCORES[..], Kind::Number),
    ] {
        let has_one = paths.iter().any(|path| nested.kind(path).is_some());
        if has_one && nested.kind(name).is_none() {
            columns.add(name, kind);
        }
    }
}

/// The value of a column for a filter.
pub(crate) fn filter_value<'a>(row: &'a Row, column: &str) -> Option<&'a Value> {
    at(row, column)
        .filter(|value| !value.is_object())
        .or_else(|| match column {
            "id" => first(row, &IDS),
            "md5" => first(row, &MD5S),
            "score" => at(row, "score.total"),
            _ => None,
        })
}

/// Adds the kinds of a row's values, those inside of objects too.
pub(crate) fn observe(columns: &mut Columns, row: &Row) {
    observe_inside(columns, row, "");
}

fn observe_inside(columns: &mut Columns, row: &Row, outer: &str) {
    for (name, value) in row {
        let kind = match value {
            Value::Null => continue,
            Value::Bool(_) => Kind::Flag,
            Value::Number(_) => Kind::Number,
            Value::String(_) => Kind::Text,
            Value::Array(_) => Kind::List,
            Value::Object(inner) => {
                observe_inside(columns, inner, &format!("{outer}{name}."));
                continue;
            }
        };
        if outer.is_empty() {
            columns.add(name, kind);
        } else {
            columns.add(&format!("{outer}{name}"), kind);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(value: Value) -> Row {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn posts_of_every_board_are_understood() {
        let danbooru = row(json!({
            "id": 5, "md5": "00000001000000020000000300000004", "rating": "q", "score": -3,
            "tag_string": "1girl x_x a b", "tag_string_general": "1girl x_x",
            "tag_string_artist": "a", "tag_string_meta": "", "tag_string_character": null,
        }));
        assert_eq!(id(&danbooru), Some(5));
        assert_eq!(md5(&danbooru), Some([1, 2, 3, 4]));
        assert_eq!(
            (rating(&danbooru), score(&danbooru)),
            (Some("q"), Some(-3.0))
        );
        assert_eq!(Class::General.tags(&danbooru), ["1girl", "x_x"]);
        assert_eq!(Class::Artist.tags(&danbooru), ["a"]);
        assert!(Class::Character.tags(&danbooru).is_empty());

        let e621 = row(json!({
            "id": "7", "file": {"md5": "000000010000000200000003000000FF", "width": 3},
            "score": {"up": 4, "down": -1, "total": 3}, "rating": "safe",
            "tags": {"general": ["solo", "red_fur"], "species": ["fox"], "invalid": ["x"]},
        }));
        assert_eq!((id(&e621), md5(&e621)), (Some(7), Some([1, 2, 3, 255])));
        assert_eq!((rating(&e621), score(&e621)), (Some("s"), Some(3.0)));
        assert_eq!(Class::General.tags(&e621), ["solo", "red_fur"]);
        assert_eq!(Class::Species.tags(&e621), ["fox"]);
        assert_eq!(file(&e621), None);
        assert_eq!(filter_value(&e621, "score"), Some(&json!(3)));

        let export = row(json!({"post_id": 9.0, "tags": "a b_c", "rating": 3}));
        assert_eq!((id(&export), rating(&export)), (Some(9), None));
        assert_eq!(Class::General.tags(&export), ["a", "b_c"]);
        let commas = row(json!({"tags_general": "long hair, smile"}));
        assert_eq!(Class::General.tags(&commas), ["long hair", "smile"]);
    }

    #[test]
    fn what_is_no_key_is_none() {
        for bad in [json!(-1), json!(1.5), json!("x"), json!([1]), json!(1e30)] {
            assert_eq!(id(&row(json!({ "id": bad }))), None);
        }
        for bad in [
            json!("0"),
            json!("g".repeat(32)),
            json!(5),
            json!("é".repeat(16)),
        ] {
            assert_eq!(md5(&row(json!({ "md5": bad }))), None);
        }
    }

    #[test]
    fn tables_of_boards_are_told_from_others() {
        let shape = |names: &[&str]| {
            let mut columns = Columns::default();
            for name in names {
                columns.add(name, Kind::Text);
            }
            Shape::of(&columns)
        };
        for names in [
            &["id", "tag_string_general"][..],
            &["md5", "tag_string"],
            &["id", "tags", "rating"],
            &["id", "tags.general", "file.md5"],
        ] {
            assert!(shape(names).is_of_board(), "{names:?}");
        }
        for names in [
            &["file_name", "id", "tag_string"][..],
            &["id", "tags"],
            &["id", "caption"],
            &["tag_string", "rating"],
        ] {
            assert!(!shape(names).is_of_board(), "{names:?}");
        }
    }

    #[test]
    fn columns_inside_of_objects_have_paths() {
        let mut columns = Columns::own();
        let e621 = json!({"id": 1, "score": {"total": 3}, "tags": {"general": ["a"]}, "x": null});
        observe(&mut columns, &row(e621));
        add_usual(&mut columns);
        assert_eq!(columns.kind("score.total"), Some(Kind::Number));
        assert_eq!(columns.kind("score"), Some(Kind::Number));
        assert_eq!(columns.kind("tags.general"), Some(Kind::List));
        assert_eq!((columns.kind("x"), columns.kind("md5")), (None, None));
        assert_eq!(key_columns(&columns), ["id", "score"]);
        let wanted = ["height", "id", "score", "tags", "width"];
        assert_eq!(text_columns(&columns, &[]), wanted);
    }
}
