//! Some columns of a table of any format, row by row, for programs outside of this crate.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{
    error::{Error, Result},
    posts::{
        Format,
        fields::Row,
        rows::{Rows, in_row, listed},
    },
};

/// Takes a row by its number, from 0, or says why no more can be taken.
pub type TakeRow<'a> =
    &'a mut dyn FnMut(u64, &Map<String, Value>) -> std::result::Result<(), String>;

/// Reads the columns `wanted`, names in small letters, of every row of a table: Parquet, SQLite,
/// JSON lines or CSV. A row lacks what is missing in it; CSV has strings alone.
///
/// # Errors
/// [`Error::Io`]; [`Error::Malformed`] if it is no such table, if it has no column `needed`, or for
/// a row that cannot be read or taken, with its number from 1.
pub fn read(path: &Path, wanted: &[&str], needed: &str, take: TakeRow<'_>) -> Result<()> {
    let malformed = |reason: String| Error::Malformed {
        path: path.to_owned(),
        kind: "table",
        reason,
    };
    let found = Format::of(path).map_err(Error::io(path))?;
    let Some(format) = found.or_else(|| by_name(path)) else {
        let reason = "expected Parquet, SQLite, JSON lines, or a .csv with a line of names";
        return Err(malformed(reason.to_owned()));
    };
    let columns = format.columns(path).map_err(malformed)?;
    if columns.kind(needed).is_none() {
        let names = listed(columns.names());
        return Err(malformed(format!(
            "it has no column {needed:?}, only {names}"
        )));
    }
    let wanted: Vec<String> = wanted.iter().map(|&name| name.to_owned()).collect();
    format
        .read(path, &wanted, &mut Taking { take })
        .map_err(malformed)
}

/// CSV has no first bytes of its own.
fn by_name(path: &Path) -> Option<Format> {
    let ending = path.extension()?.to_str()?.to_lowercase();
    matches!(ending.as_str(), "csv" | "tsv").then_some(Format::Csv)
}

struct Taking<'a> {
    take: TakeRow<'a>,
}

impl Rows for Taking<'_> {
    fn take(
        &mut self,
        number: u32,
        row: std::result::Result<Row, String>,
    ) -> std::result::Result<(), String> {
        let taken = row.and_then(|row| (self.take)(number.into(), &row));
        taken.map_err(|reason| in_row(number, &reason))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn rows(name: &str, text: &str) -> Result<Vec<Map<String, Value>>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        let mut rows = Vec::new();
        read(&path, &["source", "score"], "score", &mut |number, row| {
            assert_eq!(number as usize, rows.len());
            rows.push(row.clone());
            Ok(())
        })?;
        Ok(rows)
    }

    #[test]
    fn tables_of_each_format_have_the_same_rows() {
        for (name, text) in [
            ("a.csv", "source,Score,other\na.png,1.5,x\nb.png,2,y\n"),
            ("a.tsv", "source\tscore\na.png\t1.5\nb.png\t2\n"),
            (
                "a.jsonl",
                "{\"source\": \"a.png\", \"score\": \"1.5\"}\n{\"source\": \"b.png\", \"score\": \"2\"}\n",
            ),
        ] {
            let rows = rows(name, text).unwrap();
            assert_eq!(rows.len(), 2, "{name}");
            assert_eq!(rows[0]["source"], "a.png");
            assert_eq!(
                (&rows[0]["score"], &rows[1]["score"]),
                (&"1.5".into(), &"2".into())
            );
        }
    }

    #[test]
    fn other_files_are_refused() {
        for (name, text, expected) in [
            ("a.txt", "hello", "expected Parquet, SQLite, JSON lines"),
            (
                "a.csv",
                "source,points\na,1\n",
                "no column \"score\", only points, source",
            ),
            ("a.parquet", "PAR1 and then nothing", "Parquet"),
        ] {
            let error = rows(name, text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.csv");
        fs::write(&path, "source,score\na,1\nb,2\n").unwrap();
        let mut count = 0;
        let error = read(&path, &["score"], "score", &mut |_, _| {
            count += 1;
            match count {
                1 => Ok(()),
                _ => Err("two is too much".to_owned()),
            }
        });
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("row 2: two is too much")
        );
    }
}
