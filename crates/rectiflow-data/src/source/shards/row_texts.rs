//! The texts of a row that has its picture itself, as the JSON object that a row of a table is.

use serde_json::{Map, Value};

use crate::{
    reject::{Reason, Remark},
    source::{
        rows::RowFile,
        sample::{Line, Table},
    },
    text::caption::MAX_SOURCE_BYTES,
};

/// The only table of a source whose rows have their pictures.
pub(crate) fn only_table() -> Table {
    Table {
        path: String::new(),
        file: None,
    }
}

/// Enters the value of a column under the key that texts are read by: `txt` is what WebDataset's
/// converters call a text, and the object of a column `json` has keys of its own.
pub(crate) fn enter(object: &mut Map<String, Value>, column: &str, value: Value) {
    match (column, value) {
        ("json", Value::Object(inner)) => {
            for (key, value) in inner {
                object.entry(key).or_insert(value);
            }
        }
        ("txt", value) => {
            object.entry("text").or_insert(value);
        }
        // Columns for programs, such as `__key__`.
        (column, _) if column.starts_with("__") => {}
        (column, value) => {
            object.insert(column.to_owned(), value);
        }
    }
}

/// Keeps the texts of the row at `address`. None without any.
///
/// # Errors
/// Those of the disk.
pub(crate) fn keep(
    object: &Map<String, Value>,
    address: &str,
    row_file: &mut RowFile,
    remarks: &mut Vec<Remark>,
) -> std::io::Result<Option<Line>> {
    if object.is_empty() {
        return Ok(None);
    }
    let span = row_file.push(object)?;
    if u64::from(span.len) > MAX_SOURCE_BYTES {
        let detail = format!("its texts are longer than {MAX_SOURCE_BYTES} bytes");
        remarks.push(Remark::new(address, Reason::BadCaption, detail));
        return Ok(None);
    }
    Ok(Some(Line {
        table: 0,
        number: 0,
        span,
    }))
}
