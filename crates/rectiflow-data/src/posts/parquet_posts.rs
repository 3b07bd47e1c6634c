//! Posts in Parquet: row group by row group, and of each only the columns that are wanted.

use std::{
    fs::File,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use parquet::{
    basic::{ConvertedType, LogicalType, Type as Physical},
    errors::ParquetError,
    file::reader::{FileReader, SerializedFileReader},
    record::Field,
    schema::types::{Type, TypePtr},
};
use serde_json::{Number, Value};

use crate::{
    filter::columns::{Columns, Kind},
    posts::{fields::Row, rows::Rows},
    text_file,
};

/// The columns, those inside of groups with their paths.
///
/// # Errors
/// Why it cannot be read.
pub(crate) fn columns(path: &Path) -> Result<Columns, String> {
    caught(|| {
        let reader = open(path)?;
        let mut columns = Columns::default();
        let schema = reader.metadata().file_metadata().schema();
        add_columns(&mut columns, schema.get_fields(), "");
        Ok(columns)
    })
}

/// Reads the columns `wanted` of the rows.
///
/// # Errors
/// Why it, or the rest of it, cannot be read.
pub(crate) fn read(path: &Path, wanted: &[String], rows: &mut dyn Rows) -> Result<(), String> {
    caught(|| read_rows(path, wanted, rows))
}

/// A damaged file can make the decoder panic.
fn caught<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let result = catch_unwind(AssertUnwindSafe(work));
    result.unwrap_or_else(|_| Err("the decoder of Parquet failed on it: it is damaged".to_owned()))
}

fn open(path: &Path) -> Result<SerializedFileReader<File>, String> {
    let file = text_file::open_regular(path).map_err(|error| error.to_string())?;
    SerializedFileReader::new(file).map_err(broken)
}

fn broken(error: ParquetError) -> String {
    let message = error.to_string();
    let advice = match message.contains("Disabled feature") {
        true => "; write it again with Snappy, gzip or Zstandard",
        false => "",
    };
    format!("not a Parquet file that can be read: {message}{advice}")
}

fn read_rows(path: &Path, wanted: &[String], rows: &mut dyn Rows) -> Result<(), String> {
    let reader = open(path)?;
    let schema = reader.metadata().file_metadata().schema();
    let mut columns: Vec<TypePtr> = schema.get_fields().to_vec();
    columns.retain(|column| wanted.contains(&column.name().to_lowercase()));
    let projection = Type::group_type_builder(schema.name())
        .with_fields(columns)
        .build()
        .map_err(broken)?;
    let records = reader.get_row_iter(Some(projection)).map_err(broken)?;
    for (number, record) in records.enumerate() {
        let record = record.map_err(broken)?;
        let number = u32::try_from(number).map_err(|error| error.to_string())?;
        if rows.wants(number) {
            rows.take(number, Ok(row_of(record.get_column_iter())))?;
        }
    }
    Ok(())
}

fn row_of<'a>(fields: impl Iterator<Item = (&'a String, &'a Field)>) -> Row {
    let mut row = Row::new();
    for (name, field) in fields {
        let value = value_of(field);
        if !value.is_null() {
            row.insert(name.to_lowercase(), value);
        }
    }
    row
}

fn value_of(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(flag) => Value::Bool(*flag),
        Field::Byte(number) => (*number).into(),
        Field::Short(number) => (*number).into(),
        Field::Int(number) => (*number).into(),
        Field::Long(number) => (*number).into(),
        Field::UByte(number) => (*number).into(),
        Field::UShort(number) => (*number).into(),
        Field::UInt(number) => (*number).into(),
        Field::ULong(number) => (*number).into(),
        Field::Float16(number) => float(number.to_f64()),
        Field::Float(number) => float(f64::from(*number)),
        Field::Double(number) => float(*number),
        Field::Str(text) => Value::String(text.clone()),
        // Programs without types for text leave it as bytes.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Value::String(text.to_owned()),
            Err(_) => Value::Null,
        },
        Field::ListInternal(list) => list.elements().iter().map(value_of).collect(),
        Field::Group(group) => Value::Object(row_of(group.get_column_iter())),
        Field::MapInternal(_) => Value::Null,
        // Decimals, dates and times, as they are written.
        other => Value::String(other.to_string()),
    }
}

/// A float as JSON. Null if it is infinite or no number, which JSON has no words for.
fn float(number: f64) -> Value {
    Number::from_f64(number).map_or(Value::Null, Value::Number)
}

fn add_columns(columns: &mut Columns, fields: &[TypePtr], outer: &str) {
    for field in fields {
        let path = format!("{outer}{}", field.name());
        match kind_of(field) {
            Some(kind) => columns.add(&path, kind),
            None => add_columns(columns, field.get_fields(), &format!("{path}.")),
        }
    }
}

/// The kind of a column. None if it is a group of columns.
fn kind_of(column: &Type) -> Option<Kind> {
    let Type::PrimitiveType {
        basic_info,
        physical_type,
        ..
    } = column
    else {
        let info = column.get_basic_info();
        let logical = info.logical_type_ref();
        let is_list = matches!(logical, Some(LogicalType::List | LogicalType::Map))
            || matches!(
                info.converted_type(),
                ConvertedType::LIST | ConvertedType::MAP | ConvertedType::MAP_KEY_VALUE
            );
        return is_list.then_some(Kind::List);
    };
    let is_time = matches!(
        basic_info.logical_type_ref(),
        Some(
            LogicalType::Date
                | LogicalType::Time { .. }
                | LogicalType::Timestamp { .. }
                | LogicalType::Decimal { .. }
        )
    );
    Some(match physical_type {
        Physical::BOOLEAN => Kind::Flag,
        _ if is_time => Kind::Text,
        Physical::INT32 | Physical::INT64 | Physical::FLOAT | Physical::DOUBLE => Kind::Number,
        Physical::INT96 | Physical::BYTE_ARRAY | Physical::FIXED_LEN_BYTE_ARRAY => Kind::Text,
    })
}
