//! Rows of a Parquet file that another program wrote.

use std::{
    fs::File,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use parquet::{
    basic::{ConvertedType, LogicalType, Type as Physical},
    errors::ParquetError,
    file::reader::{FileReader, SerializedFileReader},
    record::Field,
    schema::types::{Type, TypePtr},
};
use serde_json::{Map, Value};

use crate::{
    reject::{Fault, Reason},
    source::rows::{Rows, without_images},
    text::keys,
};

/// Reads the columns of `file` that are text or lists of texts.
///
/// # Errors
/// Why it cannot be read.
pub(crate) fn read(file: File, rows: &mut Rows<'_>) -> Result<(), Fault> {
    // A damaged file can make the decoder panic.
    let result = catch_unwind(AssertUnwindSafe(|| read_columns(file, rows)));
    result.unwrap_or_else(|_| Err(bad("the decoder failed on it: it is damaged")))
}

fn bad(reason: impl std::fmt::Display) -> Fault {
    Fault::new(
        Reason::BadCaption,
        format!("not a Parquet file that can be read: {reason}"),
    )
}

fn read_columns(file: File, rows: &mut Rows<'_>) -> Result<(), Fault> {
    let broken = |error: ParquetError| bad(explained(&error.to_string()));
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let schema = reader.metadata().file_metadata().schema();
    let columns: Vec<TypePtr> = schema.get_fields().to_vec();
    let has_images = |column: &TypePtr| keys::is_file_key(column.name()) && is_text(column);
    if !columns.iter().any(has_images) {
        return Err(no_images(&columns));
    }
    let texts: Vec<TypePtr> = columns.into_iter().filter(is_text).collect();
    let projection = Type::group_type_builder(schema.name())
        .with_fields(texts)
        .build()
        .map_err(broken)?;
    let records = reader.get_row_iter(Some(projection)).map_err(broken)?;
    for (number, record) in (1..).zip(records) {
        let record = record.map_err(broken)?;
        let mut object = Map::new();
        for (name, field) in record.get_column_iter() {
            if let Some(value) = value_of(field) {
                object.insert(name.clone(), value);
            }
        }
        rows.push(number, &object)?;
    }
    Ok(())
}

/// A decoder's message, with what to do about a compression that is not read.
pub(crate) fn explained(message: &str) -> String {
    if message.contains("Disabled feature") {
        format!("{message}; write it again with Snappy, gzip or Zstandard")
    } else {
        message.to_owned()
    }
}

/// The fault of a file without a column of names; some have the pictures themselves.
fn no_images(columns: &[TypePtr]) -> Fault {
    let mut fault = without_images(columns.iter().map(|column| column.name()));
    let is_picture = |column: &&TypePtr| keys::is_file_key(column.name()) && column.is_group();
    if let Some(column) = columns.iter().find(is_picture) {
        let name = column.name();
        fault.detail += &format!(
            "; its column {name} has the pictures themselves: write them to files with captions \
             beside them"
        );
    }
    fault
}

/// Whether a column is text or a list of texts.
pub(crate) fn is_text(column: &Arc<Type>) -> bool {
    match &**column {
        Type::PrimitiveType {
            basic_info,
            physical_type,
            ..
        } => {
            let is_string = matches!(basic_info.logical_type_ref(), Some(LogicalType::String));
            let is_utf8 = basic_info.converted_type() == ConvertedType::UTF8;
            *physical_type == Physical::BYTE_ARRAY && (is_string || is_utf8)
        }
        Type::GroupType { fields, .. } => fields.len() == 1 && is_text(&fields[0]),
    }
}

pub(crate) fn value_of(field: &Field) -> Option<Value> {
    match field {
        Field::Str(text) => Some(text.as_str().into()),
        Field::ListInternal(list) => {
            let texts: Vec<Value> = list.elements().iter().filter_map(value_of).collect();
            Some(texts.into())
        }
        _ => None,
    }
}
