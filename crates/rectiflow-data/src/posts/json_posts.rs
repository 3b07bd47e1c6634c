//! Posts as JSON lines: an object a line.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
};

use serde_json::Value;

use crate::{
    filter::columns::Columns,
    posts::{
        fields::{self, Row},
        rows::Rows,
    },
    text::caption::MAX_SOURCE_BYTES,
    text_file,
};

/// Lines whose columns are looked at before a table is read.
const NUM_SAMPLED: u32 = 20;

/// The columns of the first lines.
///
/// # Errors
/// Why it cannot be read.
pub(crate) fn columns(path: &Path) -> Result<Columns, String> {
    let mut sampled = Sampled::default();
    // The sample ends the reading before the file ends.
    let read = read(path, &mut sampled);
    match read {
        Err(message) if sampled.num_rows < NUM_SAMPLED => Err(message),
        _ => Ok(sampled.columns),
    }
}

#[derive(Default)]
struct Sampled {
    columns: Columns,
    num_rows: u32,
}

impl Rows for Sampled {
    fn take(&mut self, _: u32, row: Result<Row, String>) -> Result<(), String> {
        if let Ok(row) = row {
            fields::observe(&mut self.columns, &row);
        }
        self.num_rows += 1;
        if self.num_rows >= NUM_SAMPLED {
            return Err("enough lines are read".to_owned());
        }
        Ok(())
    }
}

/// Reads the lines that are wanted. Blank lines are no rows.
///
/// # Errors
/// Why it, or the rest of it, cannot be read.
pub(crate) fn read(path: &Path, rows: &mut dyn Rows) -> Result<(), String> {
    let file = text_file::open_regular(path).map_err(|error| error.to_string())?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut line = Vec::new();
    for number in 0..u32::MAX {
        if !next_line(&mut reader, &mut line, number)? {
            return Ok(());
        }
        let text = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line);
        if !text.trim_ascii().is_empty() && rows.wants(number) {
            rows.take(number, row_of(text))?;
        }
    }
    Err(format!("it has more than {} lines", u32::MAX))
}

/// Reads the next line into `line`. Returns whether there is one.
fn next_line(
    reader: &mut BufReader<File>,
    line: &mut Vec<u8>,
    number: u32,
) -> Result<bool, String> {
    line.clear();
    // A line without an end would fill the memory.
    let mut limited = reader.take(MAX_SOURCE_BYTES + 1);
    let len = limited
        .read_until(b'\n', line)
        .map_err(|error| error.to_string())? as u64;
    if len > MAX_SOURCE_BYTES {
        let number = u64::from(number) + 1;
        return Err(format!(
            "line {number} is longer than {MAX_SOURCE_BYTES} bytes: is it one JSON document? \
             Write an object a line"
        ));
    }
    Ok(len > 0)
}

/// The object of a line, its names in small letters.
fn row_of(line: &[u8]) -> Result<Row, String> {
    match serde_json::from_slice(line) {
        Ok(Value::Object(row)) => Ok(lower(row)),
        Ok(_) => Err("expected a JSON object".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn lower(row: Row) -> Row {
    let is_small = |name: &String| !name.bytes().any(|byte| byte.is_ascii_uppercase());
    if row.keys().all(is_small) {
        return row;
    }
    let mut small = Row::new();
    for (name, value) in row {
        small.entry(name.to_lowercase()).or_insert(value);
    }
    small
}
