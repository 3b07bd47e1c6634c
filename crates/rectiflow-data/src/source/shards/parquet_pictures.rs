//! Parquet files that hold pictures, as Hugging Face's datasets write them: a column
//! `image: struct{bytes, path}`, or a column of bytes, beside columns of text.
//!
//! A picture is read by its row: pages before it are skipped by their headers, and one page is in
//! memory at a time.

use std::{
    io,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use bytes::Bytes;
use parquet::{
    basic::Type as Physical,
    column::reader::ColumnReader,
    data_type::ByteArray,
    errors::ParquetError,
    file::{
        reader::{ChunkReader, FileReader, Length},
        serialized_reader::{ReadOptionsBuilder, SerializedFileReader},
    },
    schema::types::{SchemaDescriptor, Type, TypePtr},
};
use serde_json::Map;

use crate::{
    error::{Error, Result},
    reject::{Fault, Reason},
    source::{
        parquet_rows::{explained, is_text, value_of},
        shards::{row_texts::enter, shard::Shard},
    },
};

/// Names of columns of bytes that are pictures.
const PICTURE_COLUMNS: [&str; 12] = [
    "image",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "picture",
    "image_bytes",
    "img_bytes",
    "image_data",
    "bytes",
    "content",
];
/// Bytes that are read at once where a header is expected.
const READ_AHEAD: u64 = 16 << 10;

/// A Parquet file whose pictures are read by their rows.
#[derive(Debug)]
pub(crate) struct Pictures {
    reader: Reader,
    column: Column,
    /// The first row of each row group, and the number of all rows.
    pub(crate) starts: Vec<u64>,
}

struct Reader(SerializedFileReader<ShardBytes>);

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Reader").finish_non_exhaustive()
    }
}

/// The leaves of the column of pictures.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Column {
    bytes: usize,
    path: Option<usize>,
}

/// Runs work that a damaged file can make panic.
pub(crate) fn contained<T>(shard: &Shard, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let result = catch_unwind(AssertUnwindSafe(work));
    let damaged = || shard.malformed("the decoder failed on it: it is damaged".to_owned());
    result.unwrap_or_else(|_| Err(damaged()))
}

impl Pictures {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::Malformed`] for one without a column of pictures, or with several.
    pub(crate) fn open(shard: &Arc<Shard>) -> Result<Self> {
        let failed = |error: ParquetError| failed(shard, &error);
        let options = ReadOptionsBuilder::new().with_page_index().build();
        let bytes = ShardBytes(shard.clone());
        let reader = SerializedFileReader::new_with_options(bytes, options).map_err(failed)?;
        let column = picture_column(reader.metadata().file_metadata().schema_descr());
        let column = column.map_err(|reason| shard.malformed(reason))?;
        let mut starts = vec![0];
        let mut rows = 0;
        for group in reader.metadata().row_groups() {
            let in_group = u64::try_from(group.num_rows());
            rows += in_group.map_err(|_| shard.malformed("a row group has < 0 rows".to_owned()))?;
            starts.push(rows);
        }
        Ok(Self {
            reader: Reader(reader),
            column,
            starts,
        })
    }

    /// Passes the texts of each row to `take`, in the order of the rows.
    pub(crate) fn texts(
        &self,
        shard: &Shard,
        mut take: impl FnMut(u64, Map<String, serde_json::Value>) -> Result<()>,
    ) -> Result<()> {
        let failed = |error: ParquetError| failed(shard, &error);
        let reader = &self.reader.0;
        let schema = reader.metadata().file_metadata().schema();
        let is_wanted = |column: &&TypePtr| is_text(column);
        let columns: Vec<TypePtr> = schema
            .get_fields()
            .iter()
            .filter(is_wanted)
            .cloned()
            .collect();
        if columns.is_empty() {
            return Ok(());
        }
        let projection = Type::group_type_builder(schema.name())
            .with_fields(columns)
            .build();
        let records = reader.get_row_iter(Some(projection.map_err(failed)?));
        for (row, record) in (0..).zip(records.map_err(failed)?) {
            let record = record.map_err(failed)?;
            let mut object = Map::new();
            for (name, field) in record.get_column_iter() {
                if let Some(value) = value_of(field) {
                    enter(&mut object, name, value);
                }
            }
            take(row, object)?;
        }
        Ok(())
    }

    /// Reads the picture in a row.
    ///
    /// # Errors
    /// Its fault; also if there are no bytes.
    pub(crate) fn read(&self, shard: &Shard, row: u64) -> std::result::Result<Vec<u8>, Fault> {
        let cell = contained(shard, || self.cell(shard, self.column.bytes, row));
        let unreadable = |error: Error| Fault::new(Reason::Unreadable, error.to_string());
        if let Some(bytes) = cell.map_err(unreadable)? {
            return Ok(bytes.data().to_vec());
        }
        let path = self.column.path.map(|leaf| self.cell(shard, leaf, row));
        let detail = match path.transpose().map_err(unreadable)?.flatten() {
            Some(path) => format!(
                "its bytes are null; there is only the path {:?}, which is not followed: write the \
                 pictures into the file (datasets: Dataset.map with decode, or embed_storage)",
                String::from_utf8_lossy(path.data())
            ),
            None => "its bytes are null".to_owned(),
        };
        Err(Fault::new(Reason::NoPicture, detail))
    }

    /// The bytes in a row of a leaf. None for null.
    fn cell(&self, shard: &Shard, leaf: usize, row: u64) -> Result<Option<ByteArray>> {
        let failed = |error: ParquetError| failed(shard, &error);
        let group = self.starts.partition_point(|start| *start <= row) - 1;
        let reader = self.reader.0.get_row_group(group).map_err(failed)?;
        let column = reader.get_column_reader(leaf).map_err(failed)?;
        let ColumnReader::ByteArrayColumnReader(mut column) = column else {
            return Err(shard.malformed("its pictures are no bytes".to_owned()));
        };
        let before = (row - self.starts[group]) as usize;
        let skipped = column.skip_records(before).map_err(failed)?;
        let mut values = Vec::new();
        let mut levels = Vec::new();
        let read = column.read_records(1, Some(&mut levels), None, &mut values);
        let (num_read, ..) = read.map_err(failed)?;
        if skipped < before || num_read == 0 {
            return Err(shard.malformed(format!("row {row} is missing")));
        }
        Ok(values.pop())
    }
}

/// What an error says of a file with several columns of pictures.
pub(crate) const SEVERAL: &str = "several columns of pictures";

/// The column of pictures: the only struct with `bytes`, else the only column of bytes with a name
/// that says so.
fn picture_column(schema: &SchemaDescriptor) -> std::result::Result<Column, String> {
    let mut structs = Vec::new();
    let mut plain = Vec::new();
    for (leaf, column) in schema.columns().iter().enumerate() {
        if column.physical_type() != Physical::BYTE_ARRAY || column.max_rep_level() > 0 {
            continue;
        }
        let parts = column.path().parts();
        match parts {
            [name, part] if part == "bytes" => structs.push((name, leaf)),
            [name] if PICTURE_COLUMNS.contains(&name.to_ascii_lowercase().as_str()) => {
                let root = schema.get_column_root(leaf);
                if !(root.is_primitive() && is_text_leaf(root)) {
                    plain.push((name, leaf));
                }
            }
            _ => {}
        }
    }
    let found = if structs.is_empty() { plain } else { structs };
    match found[..] {
        [(name, bytes)] => Ok(Column {
            bytes,
            path: leaf_of(schema, name, "path"),
        }),
        [] => {
            let mut names = Vec::new();
            for field in schema.root_schema().get_fields().iter().take(20) {
                names.push(field.name());
            }
            Err(format!(
                "it has no column of pictures; its columns: {}",
                names.join(", ")
            ))
        }
        _ => {
            let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
            Err(format!(
                "it has {SEVERAL} ({}): write a file with one of them",
                names.join(", ")
            ))
        }
    }
}

fn is_text_leaf(column: &Type) -> bool {
    is_text(&Arc::new(column.clone()))
}

/// The leaf `part` of the struct `name`.
fn leaf_of(schema: &SchemaDescriptor, name: &str, part: &str) -> Option<usize> {
    let is_it = |parts: &[String]| parts.len() == 2 && parts[0] == name && parts[1] == part;
    let mut columns = schema.columns().iter();
    columns.position(|column| is_it(column.path().parts()))
}

/// A decoder's error. What a shard's bytes cannot be read for is passed on as it is.
fn failed(shard: &Shard, error: &ParquetError) -> Error {
    if let ParquetError::External(cause) = error
        && let Some(Error::Remote {
            object,
            range,
            attempts,
            missing,
            reason,
        }) = cause_of(cause.as_ref())
    {
        return Error::Remote {
            object: object.clone(),
            range: range.clone(),
            attempts: *attempts,
            missing: *missing,
            reason: reason.clone(),
        };
    }
    shard.malformed(explained(&error.to_string()))
}

fn cause_of<'a>(cause: &'a (dyn std::error::Error + Send + Sync + 'static)) -> Option<&'a Error> {
    if let Some(error) = cause.downcast_ref::<Error>() {
        return Some(error);
    }
    cause.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref()
}

/// The bytes of a shard as Parquet's reader asks for them.
struct ShardBytes(Arc<Shard>);

impl Length for ShardBytes {
    fn len(&self) -> u64 {
        self.0.bytes
    }
}

impl ChunkReader for ShardBytes {
    type T = Ahead;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Ahead> {
        Ok(Ahead {
            shard: self.0.clone(),
            at: start,
            bytes: Bytes::new(),
        })
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let range: Range<u64> = start..start.saturating_add(length as u64);
        let bytes = self.0.read(range);
        bytes.map_err(|error| ParquetError::External(Box::new(error)))
    }
}

/// Reads on from a place, a little at a time: a header is short, and what follows it is asked for
/// at once.
struct Ahead {
    shard: Arc<Shard>,
    at: u64,
    bytes: Bytes,
}

impl io::Read for Ahead {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.bytes.is_empty() {
            let end = (self.at + READ_AHEAD.max(out.len() as u64)).min(self.shard.bytes);
            let range = self.at.min(end)..end;
            self.bytes = self.shard.read(range).map_err(io::Error::other)?;
            self.at = end;
        }
        let num_read = out.len().min(self.bytes.len());
        out[..num_read].copy_from_slice(&self.bytes.split_to(num_read));
        Ok(num_read)
    }
}
