//! Posts as values with separators between them and a line of names above, as e621 exports them.
//!
//! Values have no types: the first rows say what each column has. An empty value is missing.

use std::{cell::Cell, fs::File, path::Path};

use csv::{ByteRecord, Reader, ReaderBuilder};

use crate::{
    filter::columns::{Columns, Kind},
    posts::{fields::Row, rows::Rows},
    text::{
        caption::MAX_SOURCE_BYTES,
        encoding::without_mark,
        separated::{Rationed, delimiter},
    },
    text_file,
};

/// Rows that say what kinds of values the columns have.
const NUM_SAMPLED: u32 = 100;
/// Names of columns that a table of posts has.
const KEYS: [&str; 3] = ["id", "md5", "post_id"];

/// Whether a file that begins so has a line of names, with the id or hash of posts.
pub(crate) fn begins_so(start: &[u8]) -> bool {
    let line = start.split(|&byte| byte == b'\n').next().unwrap_or(start);
    let Ok(line) = std::str::from_utf8(without_mark(line)) else {
        return false;
    };
    let separator = char::from(delimiter(line.as_bytes()));
    let mut names = line.split(separator).map(unquoted);
    line.contains(separator) && names.any(|name| KEYS.contains(&name.to_lowercase().as_str()))
}

fn unquoted(name: &str) -> &str {
    name.trim().trim_matches('"')
}

/// The columns, with the kinds of values of the first rows.
///
/// # Errors
/// Why it cannot be read.
pub(crate) fn columns(path: &Path) -> Result<Columns, String> {
    let mut columns = Columns::default();
    let names = with_reader(path, |names, reader, left| {
        let mut record = ByteRecord::new();
        for _ in 0..NUM_SAMPLED {
            left.set(MAX_SOURCE_BYTES);
            if !reader.read_byte_record(&mut record).map_err(broken)? {
                break;
            }
            for (name, value) in names.iter().zip(&record) {
                if let Some(kind) = kind_of(value) {
                    columns.add(name, kind);
                }
            }
        }
        Ok(names.to_vec())
    })?;
    for name in names {
        if columns.kind(&name).is_none() {
            columns.add(&name, Kind::Any);
        }
    }
    Ok(columns)
}

/// The kind of a value. None if it is missing.
fn kind_of(value: &[u8]) -> Option<Kind> {
    let text = String::from_utf8_lossy(value);
    let text = text.trim();
    match text {
        "" => None,
        "t" | "f" | "true" | "false" => Some(Kind::Flag),
        text if text.parse::<f64>().is_ok() => Some(Kind::Number),
        _ => Some(Kind::Text),
    }
}

/// Reads the columns `wanted` of the rows.
///
/// # Errors
/// Why it, or the rest of it, cannot be read.
pub(crate) fn read(path: &Path, wanted: &[String], rows: &mut dyn Rows) -> Result<(), String> {
    with_reader(path, |names, reader, left| {
        let mut record = ByteRecord::new();
        for number in 0..u32::MAX {
            left.set(MAX_SOURCE_BYTES);
            if !reader.read_byte_record(&mut record).map_err(broken)? {
                return Ok(());
            }
            if rows.wants(number) {
                rows.take(number, row_of(names, &record, wanted))?;
            }
        }
        Err(format!("it has more than {} rows", u32::MAX))
    })
}

fn row_of(names: &[String], record: &ByteRecord, wanted: &[String]) -> Result<Row, String> {
    let mut row = Row::new();
    for (name, value) in names.iter().zip(record) {
        if !wanted.contains(name) || value.trim_ascii().is_empty() {
            continue;
        }
        let text = std::str::from_utf8(value);
        let text = text.map_err(|error| format!("column {name}: {error}"))?;
        row.insert(name.clone(), text.into());
    }
    Ok(row)
}

/// Calls `work` with the names in small letters, a reader behind them, and the bytes that a row may
/// still take.
fn with_reader<T>(
    path: &Path,
    work: impl FnOnce(&[String], &mut Reader<Rationed<'_, File>>, &Cell<u64>) -> Result<T, String>,
) -> Result<T, String> {
    let file = text_file::open_regular(path).map_err(|error| error.to_string())?;
    let start = text_file::start(&file).map_err(|error| error.to_string())?;
    let left = Cell::new(MAX_SOURCE_BYTES);
    let mut reader = ReaderBuilder::new()
        .delimiter(delimiter(&start))
        .flexible(true)
        .from_reader(Rationed {
            source: file,
            left: &left,
        });
    let mut names = Vec::new();
    for name in reader.byte_headers().map_err(broken)? {
        let name = std::str::from_utf8(without_mark(name)).map_err(|error| error.to_string())?;
        names.push(unquoted(name).to_lowercase());
    }
    work(&names, &mut reader, &left)
}

fn broken(error: csv::Error) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_names_with_a_key_begins_a_table() {
        for start in [
            "id,uploader_id,created_at,md5\n1,2,3,4\n",
            "\u{feff}\"MD5\"\t\"rating\"\r\n",
            "rating;post_id",
        ] {
            assert!(begins_so(start.as_bytes()), "{start}");
        }
        for start in [
            "id\n1\n",
            "name,text\nid,x\n",
            "",
            "\u{1}\u{2}",
            "{\"id\": 1, \"a\": 2}",
        ] {
            assert!(!begins_so(start.as_bytes()), "{start}");
        }
        assert!(!begins_so(b"id,\xff"));
    }

    #[test]
    fn values_say_what_a_column_has() {
        for (value, kind) in [
            ("", None),
            (" ", None),
            ("t", Some(Kind::Flag)),
            ("-5", Some(Kind::Number)),
            ("2020-01-01", Some(Kind::Text)),
        ] {
            assert_eq!(kind_of(value.as_bytes()), kind, "{value}");
        }
    }
}
