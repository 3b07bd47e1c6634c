//! The names of a tagger's outputs: a CSV with a row for each, as WD taggers have beside the model
//! (`selected_tags.csv`: `tag_id,name,category,count`).

use std::path::Path;

use csv::StringRecord;
use rectiflow_data::{classes::spaced, error::Error as DataError, text_file};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A class of tags, by Danbooru's numbers; 9 is the WD taggers' own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// 9: one of its tags is the picture's.
    Rating,
    /// 4.
    Character,
    /// 3: the names of series.
    Copyright,
    /// 1.
    Artist,
    /// 0.
    General,
    /// 5: about the file.
    Meta,
}

/// All classes, in the order of their tags in a row.
pub const CLASSES: [Class; 6] = [
    Class::Rating,
    Class::Character,
    Class::Copyright,
    Class::Artist,
    Class::General,
    Class::Meta,
];

impl Class {
    /// Its name in a table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rating => "rating",
            Self::Character => "character",
            Self::Copyright => "copyright",
            Self::Artist => "artist",
            Self::General => "general",
            Self::Meta => "meta",
        }
    }

    /// The class of this name.
    pub fn parse(name: &str) -> Option<Self> {
        CLASSES.into_iter().find(|class| class.as_str() == name)
    }

    fn of_category(category: &str) -> Option<Self> {
        match category.trim() {
            "0" => Some(Self::General),
            "1" => Some(Self::Artist),
            "3" => Some(Self::Copyright),
            "4" => Some(Self::Character),
            "5" => Some(Self::Meta),
            "9" => Some(Self::Rating),
            _ => None,
        }
    }
}

/// The name of an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// The tag as it is written in prompts: spaces for underscores, except in faces such as `^_^`.
    pub tag: String,
    /// Its class.
    pub class: Class,
}

/// Longest list of names in bytes.
const MAX_BYTES: u64 = 1 << 26;

/// Reads the names of a model's outputs. `keep_underscores` leaves tags as they are.
///
/// # Errors
/// Those of the file; [`Error::Invalid`] if it is no such list, with the line.
pub fn read(path: &Path, keep_underscores: bool) -> Result<Vec<Label>> {
    let bytes = text_file::bytes(path, MAX_BYTES).map_err(DataError::io(path))?;
    let labels = parse(&bytes, keep_underscores);
    labels.map_err(|reason| Error::invalid(path.display().to_string(), reason))
}

fn parse(bytes: &[u8], keep_underscores: bool) -> std::result::Result<Vec<Label>, String> {
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(bytes);
    let columns = columns(reader.headers().map_err(|error| error.to_string())?)?;
    let mut labels = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| error.to_string())?;
        labels.push(label_of(&record, columns, keep_underscores)?);
    }
    match labels.is_empty() {
        true => Err("it has no row below its line of names".to_owned()),
        false => Ok(labels),
    }
}

/// The columns of names and of categories.
fn columns(names: &StringRecord) -> std::result::Result<(usize, usize), String> {
    let names: Vec<String> = names.iter().map(heading).collect();
    let column = |name: &str| names.iter().position(|found| found == name);
    column("name").zip(column("category")).ok_or_else(|| {
        format!(
            "its columns are {}: expected tag_id,name,category,count, as in a WD tagger's \
             selected_tags.csv",
            names.join(", ")
        )
    })
}

fn label_of(
    record: &StringRecord,
    (name, category): (usize, usize),
    keep_underscores: bool,
) -> std::result::Result<Label, String> {
    let line = record.position().map_or(0, csv::Position::line);
    let tag = record.get(name).unwrap_or_default().trim();
    let category = record.get(category).unwrap_or_default();
    if tag.is_empty() {
        return Err(format!("line {line} has no name"));
    }
    let Some(class) = Class::of_category(category) else {
        return Err(format!(
            "line {line}: category {category:?} of {tag:?}: expected 0 (general), 1 (artist), \
             3 (copyright), 4 (character), 5 (meta) or 9 (rating)"
        ));
    };
    let tag = match class {
        _ if keep_underscores => tag.to_owned(),
        Class::General => spaced(tag),
        _ => tag.replace('_', " "),
    };
    Ok(Label { tag, class })
}

fn heading(name: &str) -> String {
    name.trim_start_matches('\u{feff}').trim().to_lowercase()
}

/// Checks that a list has a name for each of `width` outputs.
///
/// # Errors
/// [`Error::Invalid`] with both numbers.
pub fn check(path: &Path, labels: &[Label], model: &Path, width: usize) -> Result<()> {
    if labels.len() == width {
        return Ok(());
    }
    Err(Error::invalid(
        path.display().to_string(),
        format!(
            "it names {} tags, but {} returns {width} numbers a picture: name the list that \
             belongs to the model",
            labels.len(),
            model.display()
        ),
    ))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn read_text(text: &str) -> Result<Vec<Label>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("selected_tags.csv");
        fs::write(&path, text).unwrap();
        read(&path, false)
    }

    #[test]
    fn names_and_classes_are_read() {
        let labels = read_text(
            "tag_id,name,category,count\n9999999,general,9,8\n1,long_hair,0,5\n2,>_<,0,4\n\
             3,\"hatsune_miku,_the\",4,3\n",
        )
        .unwrap();
        let found: Vec<_> = labels
            .iter()
            .map(|label| (label.tag.as_str(), label.class))
            .collect();
        let expected = [
            ("general", Class::Rating),
            ("long hair", Class::General),
            (">_<", Class::General),
            ("hatsune miku, the", Class::Character),
        ];
        assert_eq!(found, expected);
        for class in CLASSES {
            assert_eq!(Class::parse(class.as_str()), Some(class));
        }
    }

    #[test]
    fn other_lists_are_refused_in_one_line() {
        for (text, expected) in [
            ("", "expected tag_id,name,category,count"),
            ("a,b\n1,2\n", "its columns are a, b"),
            ("name,category\n", "no row"),
            ("name,category\nx,7\n", "line 2: category \"7\" of \"x\""),
            ("name,category\nx,0\n,0\n", "line 3 has no name"),
            ("name,category\nx\n", "line 2: category \"\""),
            ("name,category\n\"x\0\u{fffd},0", "category \"\""),
        ] {
            let error = read_text(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
        let labels = read_text("name,category\nx,0\n").unwrap();
        let error = check(Path::new("a.csv"), &labels, Path::new("m.onnx"), 5).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("names 1 tags, but m.onnx returns 5 numbers"),
            "{error}"
        );
        check(Path::new("a.csv"), &labels, Path::new("m.onnx"), 1).unwrap();
    }
}
