//! The posts of the tables of a folder: which row is about which picture of the folder.

use std::collections::BTreeMap;

use xxhash_rust::xxh3::xxh3_128;

use crate::{
    board::{
        index::{Keys, Repeat},
        names::{NamedKeys, keys_of},
        post::Ranks,
        scores::Scores,
    },
    posts::fields::{self, Row},
};

/// The row of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Match {
    Row(u32),
    /// There is none.
    Nothing,
    /// The name has the id of one row and the hash of another, or of none.
    Contradiction,
}

/// The keys of the rows of a folder's tables.
#[derive(Debug, Default)]
pub(crate) struct Scope {
    /// Relative to the source folder; empty for itself.
    pub(crate) folder: String,
    ids: Keys<2>,
    md5s: Keys<4>,
    files: Keys<4>,
    scores: Scores,
    has_g: bool,
    has_s: bool,
    pub(crate) ranks: Ranks,
}

impl Scope {
    /// The scope of `folder`, without rows.
    pub(crate) fn new(folder: &str) -> Self {
        Self {
            folder: folder.to_owned(),
            ..Self::default()
        }
    }

    /// Adds the keys of a row. Names of files are relative to `folder`. Returns whether there are
    /// any.
    pub(crate) fn add(&mut self, number: u32, row: &Row, folder: &str) -> bool {
        let mut has_key = false;
        if let Some(id) = fields::id(row) {
            self.ids.add(id_key(id), number);
            has_key = true;
        }
        if let Some(md5) = fields::md5(row) {
            self.md5s.add(md5, number);
            has_key = true;
        }
        if let Some(file) = file_of(row, folder) {
            self.files.add(file_key(&file), number);
            has_key = true;
        }
        if let Some(score) = fields::score(row) {
            self.scores.add(score);
        }
        match fields::rating(row) {
            Some("g") => self.has_g = true,
            Some("s") => self.has_s = true,
            _ => {}
        }
        has_key
    }

    /// Ends the adding. Returns the rows that repeat a key, in their order, each once.
    pub(crate) fn finish(&mut self, words: &BTreeMap<String, f64>) -> Vec<Repeat> {
        let mut repeats = self.ids.finish();
        repeats.extend(self.md5s.finish());
        repeats.extend(self.files.finish());
        repeats.sort_unstable();
        repeats.dedup_by_key(|repeat| repeat.row);
        self.ranks = Ranks {
            words: self.scores.words(words),
            s_is_safe: self.has_s && !self.has_g,
        };
        self.scores = Scores::default();
        repeats
    }

    /// Whether the picture at `path` is in this folder.
    pub(crate) fn has(&self, path: &str) -> bool {
        let folder = self.folder.as_str();
        let rest = path.strip_prefix(folder);
        folder.is_empty() || rest.is_some_and(|rest| rest.starts_with('/'))
    }

    /// The row of the picture at `path`, relative to the source folder.
    pub(crate) fn find(&self, path: &str) -> Match {
        if let Some(row) = self.files.find(file_key(path)) {
            return Match::Row(row);
        }
        let NamedKeys { id, md5 } = keys_of(path);
        let by_id = id.and_then(|id| self.ids.find(id_key(id)));
        let by_md5 = md5.and_then(|md5| self.md5s.find(md5));
        let checks_md5 = md5.is_some() && !self.md5s.is_empty();
        match (by_id, by_md5) {
            (Some(by_id), Some(by_md5)) if by_id != by_md5 => Match::Contradiction,
            (Some(_), None) if checks_md5 => Match::Contradiction,
            (Some(row), _) | (None, Some(row)) => Match::Row(row),
            (None, None) => Match::Nothing,
        }
    }

    /// Whether a row has a key that is found as this number: a second reading sees the same rows.
    pub(crate) fn owns(&self, number: u32, row: &Row, folder: &str) -> bool {
        let by_id = fields::id(row).and_then(|id| self.ids.find(id_key(id)));
        let by_md5 = fields::md5(row).and_then(|md5| self.md5s.find(md5));
        let by_file = file_of(row, folder).and_then(|file| self.files.find(file_key(&file)));
        [by_id, by_md5, by_file].contains(&Some(number))
    }
}

fn id_key(id: u64) -> [u32; 2] {
    [(id >> 32) as u32, id as u32]
}

fn file_key(path: &str) -> [u32; 4] {
    fields::parts(xxh3_128(path.as_bytes()))
}

/// The path of a row's file relative to the source folder. None if it leads out of `folder`.
fn file_of(row: &Row, folder: &str) -> Option<String> {
    let named = fields::file(row)?.trim().replace('\\', "/");
    if named.is_empty() || named.starts_with('/') {
        return None;
    }
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in named.split('/') {
        match part {
            "" | "." => {}
            ".." => return None,
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// The keys of a row in a message.
pub(crate) fn described(row: &Row) -> String {
    let mut keys = Vec::new();
    if let Some(id) = fields::id(row) {
        keys.push(format!("id {id}"));
    }
    if let Some(md5) = fields::md5(row) {
        let digits: Vec<String> = md5.iter().map(|part| format!("{part:08x}")).collect();
        keys.push(format!("md5 {}", digits.concat()));
    }
    if let Some(file) = fields::file(row) {
        keys.push(format!("file {file:?}"));
    }
    keys.join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const HASHES: [&str; 2] = [
        "00000001000000020000000300000004",
        "f0000001000000020000000300000004",
    ];

    fn scope(rows: &[Value]) -> (Scope, Vec<Repeat>) {
        let mut scope = Scope::default();
        for (number, row) in (0..).zip(rows) {
            scope.add(number, row.as_object().unwrap(), "sub");
        }
        let repeats = scope.finish(&BTreeMap::new());
        (scope, repeats)
    }

    #[test]
    fn pictures_find_their_rows_and_contradictions_are_none() {
        let (scope, repeats) = scope(&[
            json!({"id": 5, "md5": HASHES[0], "rating": "s"}),
            json!({"id": 6, "md5": HASHES[1]}),
            json!({"id": 7, "file_name": ".\\x//y.png"}),
            json!({"id": 6}),
            json!({"id": 8, "md5": HASHES[0]}),
            json!({"md5": "x", "file_name": "../z.png"}),
        ]);
        let repeats: Vec<(u32, u32)> = repeats
            .iter()
            .map(|repeat| (repeat.row, repeat.first))
            .collect();
        assert_eq!(repeats, [(3, 1), (4, 0)]);
        for (path, found) in [
            ("5.jpg".to_owned(), Match::Row(0)),
            (format!("a/{}.webp", HASHES[1]), Match::Row(1)),
            (format!("danbooru_5_{}.jpg", HASHES[0]), Match::Row(0)),
            ("sub/x/y.png".to_owned(), Match::Row(2)),
            (
                format!("danbooru_5_{}.jpg", HASHES[1]),
                Match::Contradiction,
            ),
            (
                format!("danbooru_7_{}.jpg", "a".repeat(32)),
                Match::Contradiction,
            ),
            (format!("danbooru_9_{}.jpg", HASHES[1]), Match::Row(1)),
            ("9.jpg".to_owned(), Match::Nothing),
            ("x/y.png".to_owned(), Match::Nothing),
        ] {
            assert_eq!(scope.find(&path), found, "{path}");
        }
        assert!(scope.ranks.s_is_safe);
    }

    #[test]
    fn a_second_reading_must_see_the_same_rows() {
        let rows = [json!({"id": 5}), json!({"id": 6})];
        let (scope, _) = scope(&rows);
        let row = |index: usize| rows[index].as_object().unwrap();
        assert!(scope.owns(0, row(0), "") && scope.owns(1, row(1), ""));
        assert!(!scope.owns(0, row(1), ""));
        assert_eq!(described(row(0)), "id 5");
    }

    #[test]
    fn a_scope_has_the_pictures_of_its_folder() {
        let scope = Scope::new("a/b");
        assert!(scope.has("a/b/1.png") && scope.has("a/b/c/1.png"));
        assert!(!scope.has("a/bc/1.png") && !scope.has("1.png"));
        assert!(Scope::new("").has("1.png"));
    }
}
