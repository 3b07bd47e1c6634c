//! Tables of annotations that are merged into the texts of pictures: captions, tags and ranks that
//! models gave to them, found by the pictures' ids.
//!
//! Only ids and places are in memory, 24 bytes a row; the rows are in a file without a name. Rows
//! without a usable answer are counted and not kept.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use crate::{
    board::classes::{Place, TagSettings},
    error::{Error, Result},
    format::{
        annotation::{Annotation, Kind, Status},
        annotation_table,
        record::SampleId,
    },
    posts::fields::{CLASSES, Class},
    reject::{Reason, Remark},
    source::rows::{RowFile, Span, read_span},
    text::{
        caption::{Reading, Text, clean},
        prompt::OWN_SOURCE,
        quality_ranks::{QualityRank, word_of},
    },
};

/// What is merged, and how.
#[derive(Debug, Default)]
pub(crate) struct Annotations {
    tables: Vec<Table>,
    /// By id, then by table and mode.
    rows: Vec<Row>,
    /// None without tables.
    file: Option<File>,
    tags: TagSettings,
    quality_ranks: Vec<QualityRank>,
}

/// A table, as the user names it.
#[derive(Debug)]
struct Table {
    path: PathBuf,
    num_rows: u64,
    num_usable: u64,
}

/// A row of a table.
#[derive(Debug, Clone, Copy)]
struct Row {
    id: SampleId,
    table: u32,
    span: Span,
}

impl Annotations {
    /// Reads tables. Their rows are kept in the folder `work`.
    ///
    /// # Errors
    /// [`Error::Malformed`] for what is no table; [`Error::Io`].
    pub(crate) fn open(
        paths: &[PathBuf],
        work: &Path,
        tags: &TagSettings,
        quality_ranks: &[QualityRank],
    ) -> Result<Self> {
        if paths.is_empty() {
            return Ok(Self::default());
        }
        let mut all = Self {
            tags: tags.clone(),
            quality_ranks: quality_ranks.to_vec(),
            ..Self::default()
        };
        let mut file = RowFile::create(work).map_err(Error::io(work))?;
        for (number, path) in (0..).zip(paths) {
            let mut num_usable = 0;
            let num_rows = annotation_table::read(path, &mut |row| {
                if row.status != Status::Ok {
                    return Ok(());
                }
                num_usable += 1;
                let id = row.id;
                let span = file.push(&as_map(&row)).map_err(Error::io(work))?;
                all.rows.push(Row {
                    id,
                    table: number,
                    span,
                });
                Ok(())
            })?;
            all.tables.push(Table {
                path: path.clone(),
                num_rows,
                num_usable,
            });
        }
        // Stable: rows of a table keep their order.
        all.rows.sort_by_key(|row| (row.id, row.table));
        all.file = Some(file.finish().map_err(Error::io(work))?);
        Ok(all)
    }

    /// The rows about a picture, in the order of the tables, and in each by mode.
    fn rows_of(&self, id: SampleId) -> Vec<Annotation> {
        let Some(file) = &self.file else {
            return Vec::new();
        };
        let first = self.rows.partition_point(|row| row.id < id);
        let mut found = Vec::new();
        for row in self.rows[first..].iter().take_while(|row| row.id == id) {
            let line = read_span(file, row.span).expect("this process has written the row");
            let parsed = Annotation::from_line(&line);
            found.push((row.table, parsed.expect("this process has checked the row")));
        }
        found.sort_by(|(a, one), (b, other)| (a, &one.mode).cmp(&(b, &other.mode)));
        found.into_iter().map(|(_, row)| row).collect()
    }

    /// Adds what the tables say about a picture to its text: captions after its own, tags that it
    /// has not, and quality words if it has none.
    pub(crate) fn merge(&self, id: SampleId, text: &mut Text, reading: &Reading) {
        let mut captions = Vec::new();
        for row in self.rows_of(id) {
            match row.kind {
                Kind::Caption => {
                    let source = source_of(&row);
                    for caption in clean(row.text, reading) {
                        captions.push((caption, source.clone()));
                    }
                }
                Kind::Tags => self.add_tags(&row, text, &mut captions, reading),
                Kind::Score if text.quality.is_empty() => {
                    text.quality
                        .extend(row.rank.and_then(|rank| self.word(rank)));
                }
                Kind::Score => {}
            }
        }
        if !captions.is_empty() {
            text.caption_sources = vec![OWN_SOURCE.to_owned(); text.captions.len()];
        }
        for (caption, source) in captions {
            text.captions.push(caption);
            text.caption_sources.push(source);
        }
        text.mark(reading, text.verbatim);
    }

    fn add_tags(
        &self,
        row: &Annotation,
        text: &mut Text,
        captions: &mut Vec<(String, String)>,
        reading: &Reading,
    ) {
        let none = Vec::new();
        let mut words = Vec::new();
        for (number, tag) in row.tags.as_ref().unwrap_or(&none).iter().enumerate() {
            let class = row
                .tag_classes
                .as_ref()
                .map_or("general", |all| all[number].as_str());
            let (tag, place) = self.placed(tag, class);
            for tag in clean([tag], reading) {
                match place {
                    Place::Tags => add_new(&mut text.tags, &text.important_tags, tag),
                    Place::Important => add_new(&mut text.important_tags, &[], tag),
                    Place::Quality => add_new(&mut text.quality, &[], tag),
                    Place::Caption => words.push(tag),
                    Place::Nothing => {}
                }
            }
        }
        if !words.is_empty() {
            captions.push((words.join(", "), source_of(row)));
        }
    }

    /// A tag as it is written in texts, and where it goes.
    fn placed(&self, tag: &str, class: &str) -> (String, Place) {
        if class == "rating" {
            let letter = tag.chars().next().unwrap_or('e').to_ascii_lowercase();
            let word = self.tags.rating_word(&letter.to_string(), false);
            return (word.to_owned(), self.tags.rating);
        }
        let class = CLASSES.into_iter().find(|known| name_of(*known) == class);
        let class = class.unwrap_or(Class::General);
        match self.tags.drops(tag) {
            true => (tag.to_owned(), Place::Nothing),
            false => (self.tags.spelled(tag, class), self.tags.place(class)),
        }
    }

    /// The quality word of a rank.
    fn word(&self, rank: f64) -> Option<String> {
        word_of(&self.quality_ranks, rank).map(str::to_owned)
    }

    /// What of the tables is about no picture, once all pictures are known.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a table that is about none of them.
    pub(crate) fn check(&self, ids: &dyn Fn(SampleId) -> bool, num: u64) -> Result<Vec<Remark>> {
        let mut matched = vec![0_u64; self.tables.len()];
        for row in &self.rows {
            matched[row.table as usize] += u64::from(ids(row.id));
        }
        let mut remarks = Vec::new();
        for (table, matched) in self.tables.iter().zip(matched) {
            let name = table.path.display().to_string();
            if table.num_rows > 0 && table.num_usable == 0 {
                let reason = format!("none of its {} rows has status ok", table.num_rows);
                return Err(Error::Invalid { what: name, reason });
            }
            if matched == 0 && table.num_usable > 0 {
                let reason = format!(
                    "none of its {} usable rows is about one of the {num} pictures here: it was \
                     made from other files; a picture is known by its bytes",
                    table.num_usable
                );
                return Err(Error::Invalid { what: name, reason });
            }
            if matched < table.num_usable {
                let others = table.num_usable - matched;
                let detail = format!(
                    "{others} of its {} usable rows are about no picture here",
                    table.num_usable
                );
                remarks.push(Remark::new(name, Reason::OrphanCaption, detail));
            }
        }
        Ok(remarks)
    }
}

/// Adds a tag that neither list has.
fn add_new(list: &mut Vec<String>, other: &[String], tag: String) {
    if !list.contains(&tag) && !other.contains(&tag) {
        list.push(tag);
    }
}

/// The mode and the model of a row.
fn source_of(row: &Annotation) -> String {
    match row.model.as_str() {
        "" => row.mode.clone(),
        model => format!("{} by {model}", row.mode),
    }
}

fn as_map(row: &Annotation) -> Map<String, Value> {
    match serde_json::to_value(row) {
        Ok(Value::Object(map)) => map,
        _ => unreachable!("a row is an object of strings and finite numbers"),
    }
}

/// The word for a class in tables.
fn name_of(class: Class) -> &'static str {
    match class {
        Class::Character => "character",
        Class::Copyright => "copyright",
        Class::Artist => "artist",
        Class::Species => "species",
        Class::General => "general",
        Class::Meta => "meta",
        Class::Lore => "lore",
        Class::Contributor => "contributor",
        Class::Invalid => "invalid",
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn row(id: u64, kind: Kind, mode: &str) -> Annotation {
        Annotation::new(SampleId(id), "a.png", kind, mode)
    }

    fn caption(id: u64, mode: &str, text: &str) -> Annotation {
        Annotation {
            text: Some(text.to_owned()),
            model: "m".to_owned(),
            ..row(id, Kind::Caption, mode)
        }
    }

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    /// Opens tables of JSON lines with these rows.
    fn opened(tables: &[&[Annotation]]) -> Annotations {
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        for (number, rows) in tables.iter().enumerate() {
            let path = folder.path().join(format!("{number}.jsonl"));
            let lines: Vec<String> = rows.iter().map(Annotation::to_line).collect();
            fs::write(&path, lines.join("\n")).unwrap();
            paths.push(path);
        }
        let ranks = [("top", 0.9), ("low", 0.0)].map(|(word, from)| QualityRank {
            word: word.to_owned(),
            from,
        });
        Annotations::open(&paths, folder.path(), &TagSettings::default(), &ranks).unwrap()
    }

    #[test]
    fn captions_follow_the_pictures_own_with_their_sources() {
        let refused = Annotation {
            status: Status::Refused,
            ..caption(1, "x", "sorry")
        };
        let first = [caption(1, "short", "b"), caption(2, "short", "no"), refused];
        let second = [caption(1, "long", "c &amp; d"), caption(1, "a", "  ")];
        let annotations = opened(&[&first, &second]);
        let mut text = Text {
            captions: strings(&["own"]),
            verbatim: true,
            ..Text::default()
        };
        annotations.merge(SampleId(1), &mut text, &Reading::default());
        assert_eq!(text.captions, ["own", "b", "c & d"]);
        assert_eq!(text.caption_sources, ["source", "short by m", "long by m"]);
        assert!(text.verbatim, "an alt-text stays one");
        let mut other = Text::default();
        annotations.merge(SampleId(3), &mut other, &Reading::default());
        assert_eq!(other, Text::default());
    }

    #[test]
    fn tags_go_where_their_classes_go_and_ranks_become_words() {
        let tags = Annotation {
            tags: Some(strings(&[
                "long_hair",
                "saber",
                "general",
                "cat",
                "highres",
            ])),
            tag_classes: Some(strings(&[
                "general",
                "character",
                "rating",
                "general",
                "meta",
            ])),
            ..row(1, Kind::Tags, "wd")
        };
        let score = |id, rank| Annotation {
            rank: Some(rank),
            ..row(id, Kind::Score, "aesthetic")
        };
        let annotations = opened(&[&[tags, score(1, 0.9), score(2, 0.899)]]);
        let mut text = Text {
            tags: strings(&["cat"]),
            ..Text::default()
        };
        annotations.merge(SampleId(1), &mut text, &Reading::default());
        assert_eq!(text.tags, ["cat", "long hair"]);
        assert_eq!(text.important_tags, ["saber", "safe"]);
        assert_eq!(text.quality, ["top"]);
        let mut low = Text::default();
        annotations.merge(SampleId(2), &mut low, &Reading::default());
        assert_eq!(low.quality, ["low"]);
        let mut own = Text {
            quality: strings(&["mine"]),
            ..Text::default()
        };
        annotations.merge(SampleId(2), &mut own, &Reading::default());
        assert_eq!(own.quality, ["mine"]);
    }

    #[test]
    fn tables_about_other_pictures_are_refused() {
        let annotations = opened(&[&[caption(1, "m", "a"), caption(2, "m", "b")]]);
        let remarks = annotations.check(&|id| id.0 == 1, 7).unwrap();
        assert!(remarks[0].fault.detail.contains("1 of its 2 usable rows"));
        assert!(annotations.check(&|_| true, 7).unwrap().is_empty());
        let error = annotations.check(&|_| false, 7).unwrap_err().to_string();
        assert!(
            error.contains("none of its 2 usable rows is about one of the 7"),
            "{error}"
        );
        let failed = Annotation {
            status: Status::Failed,
            ..caption(1, "m", "a")
        };
        let error = opened(&[&[failed]])
            .check(&|_| true, 7)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("none of its 1 rows has status ok"),
            "{error}"
        );
    }
}
