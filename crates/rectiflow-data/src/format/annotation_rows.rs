//! Annotations as Parquet: the schema, the writer, and a reader that trusts nothing.

use std::{
    fs::File,
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Arc, LazyLock},
};

use parquet::{
    basic::Compression,
    column::writer::ColumnWriterImpl,
    data_type::{ByteArray, ByteArrayType, DataType, DoubleType, Int32Type, Int64Type},
    errors::ParquetError,
    file::{
        metadata::KeyValue,
        properties::WriterProperties,
        reader::{FileReader, SerializedFileReader},
        writer::{SerializedFileWriter, SerializedRowGroupWriter},
    },
    record::{Field, Row},
    schema::{parser::parse_message_type, types::TypePtr},
};

use crate::{
    error::{Error, Result},
    format::{
        annotation::{ANNOTATION_VERSION, Annotation, Kind, Status, malformed, parse_id},
        record::SampleId,
    },
    text_file,
};

const SCHEMA: &str = "
message annotations {
  required binary id (STRING);
  required binary source (STRING);
  required binary kind (STRING);
  required binary mode (STRING);
  required binary model (STRING);
  optional binary text (STRING);
  optional group tags (LIST) { repeated group list { required binary element (STRING); } }
  optional group tag_classes (LIST) { repeated group list { required binary element (STRING); } }
  optional double score;
  optional double rank;
  required binary status (STRING);
  optional binary reason (STRING);
  required int64 seed;
  required int32 attempt;
  optional int32 tokens;
}";
/// Columns without which a file is no table of annotations.
const NEEDED: [&str; 4] = ["id", "kind", "mode", "status"];
/// Key of the version in the footer.
const VERSION_KEY: &str = "rectiflow.annotations";
/// Rows of a row group.
const GROUP_ROWS: usize = 8192;
/// Most rows of a table: a small file can claim more than any disk holds.
const MAX_ROWS: i64 = 1 << 32;

static SCHEMA_TYPE: LazyLock<TypePtr> =
    LazyLock::new(|| Arc::new(parse_message_type(SCHEMA).expect("the schema above is valid")));

/// Writes a table to `W`.
pub struct AnnotationWriter<W: Write + Send> {
    file: SerializedFileWriter<W>,
    rows: Vec<Annotation>,
}

impl<W: Write + Send> std::fmt::Debug for AnnotationWriter<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AnnotationWriter").finish_non_exhaustive()
    }
}

type Parquet<T> = std::result::Result<T, ParquetError>;

impl<W: Write + Send> AnnotationWriter<W> {
    /// Begins a table. `about` is kept in its footer, by key.
    ///
    /// # Errors
    /// Those of the sink.
    pub fn new(out: W, about: &[(&str, &str)]) -> std::io::Result<Self> {
        let version = ANNOTATION_VERSION.to_string();
        let mut keys = vec![KeyValue::new(VERSION_KEY.to_owned(), version)];
        for (key, value) in about {
            keys.push(KeyValue::new((*key).to_owned(), (*value).to_owned()));
        }
        let properties = WriterProperties::builder()
            .set_created_by("rectiflow".to_owned())
            .set_compression(Compression::SNAPPY)
            .set_key_value_metadata(Some(keys))
            .build();
        let file = SerializedFileWriter::new(out, SCHEMA_TYPE.clone(), Arc::new(properties));
        Ok(Self {
            file: file.map_err(std::io::Error::other)?,
            rows: Vec::new(),
        })
    }

    /// Appends a row.
    ///
    /// # Errors
    /// Those of the sink.
    pub fn push(&mut self, row: Annotation) -> std::io::Result<()> {
        self.rows.push(row);
        if self.rows.len() < GROUP_ROWS {
            return Ok(());
        }
        self.flush().map_err(std::io::Error::other)
    }

    /// Writes the footer. Returns the sink.
    ///
    /// # Errors
    /// Those of the sink.
    pub fn finish(mut self) -> std::io::Result<W> {
        if !self.rows.is_empty() {
            self.flush().map_err(std::io::Error::other)?;
        }
        self.file.into_inner().map_err(std::io::Error::other)
    }

    /// Writes the rows at hand as a row group.
    fn flush(&mut self) -> Parquet<()> {
        let rows = std::mem::take(&mut self.rows);
        let mut group = self.file.next_row_group()?;
        write_texts(&mut group, &rows, |row| row.id.to_string())?;
        write_texts(&mut group, &rows, |row| row.source.clone())?;
        write_texts(&mut group, &rows, |row| row.kind.as_str().to_owned())?;
        write_texts(&mut group, &rows, |row| row.mode.clone())?;
        write_texts(&mut group, &rows, |row| row.model.clone())?;
        write_optional::<ByteArrayType>(&mut group, &rows, |row| row.text.as_deref().map(bytes))?;
        write_lists(&mut group, &rows, |row| row.tags.as_deref())?;
        write_lists(&mut group, &rows, |row| row.tag_classes.as_deref())?;
        write_optional::<DoubleType>(&mut group, &rows, |row| row.score)?;
        write_optional::<DoubleType>(&mut group, &rows, |row| row.rank)?;
        write_texts(&mut group, &rows, |row| row.status.as_str().to_owned())?;
        write_optional::<ByteArrayType>(&mut group, &rows, |row| row.reason.as_deref().map(bytes))?;
        let seeds: Vec<i64> = rows.iter().map(|row| row.seed).collect();
        write_column::<Int64Type>(&mut group, &seeds, None, None)?;
        let attempts: Vec<i32> = rows.iter().map(|row| row.attempt.cast_signed()).collect();
        write_column::<Int32Type>(&mut group, &attempts, None, None)?;
        write_optional::<Int32Type>(&mut group, &rows, |row| row.tokens.map(u32::cast_signed))?;
        group.close()?;
        Ok(())
    }
}

type Group<'a, W> = SerializedRowGroupWriter<'a, W>;

fn bytes(text: &str) -> ByteArray {
    text.into()
}

fn write_texts<W: Write + Send>(
    group: &mut Group<'_, W>,
    rows: &[Annotation],
    text: impl Fn(&Annotation) -> String,
) -> Parquet<()> {
    let texts: Vec<ByteArray> = rows.iter().map(|row| text(row).as_str().into()).collect();
    write_column::<ByteArrayType>(group, &texts, None, None)
}

fn write_optional<T: DataType>(
    group: &mut Group<'_, impl Write + Send>,
    rows: &[Annotation],
    value: impl Fn(&Annotation) -> Option<T::T>,
) -> Parquet<()> {
    let mut values = Vec::new();
    let mut definition = Vec::with_capacity(rows.len());
    for row in rows {
        let value = value(row);
        definition.push(i16::from(value.is_some()));
        values.extend(value);
    }
    write_column::<T>(group, &values, Some(&definition), None)
}

/// Levels of an optional list: 0/0 for none, 1/0 for an empty list, 2/0 and 2/1 for its elements.
fn write_lists<W: Write + Send>(
    group: &mut Group<'_, W>,
    rows: &[Annotation],
    list: impl Fn(&Annotation) -> Option<&[String]>,
) -> Parquet<()> {
    let mut values = Vec::new();
    let mut definition = Vec::new();
    let mut repetition = Vec::new();
    for row in rows {
        let list = list(row);
        for (at, text) in list.unwrap_or_default().iter().enumerate() {
            values.push(bytes(text));
            definition.push(2);
            repetition.push(i16::from(at > 0));
        }
        if list.is_none_or(<[String]>::is_empty) {
            definition.push(i16::from(list.is_some()));
            repetition.push(0);
        }
    }
    write_column::<ByteArrayType>(group, &values, Some(&definition), Some(&repetition))
}

fn write_column<T: DataType>(
    group: &mut Group<'_, impl Write + Send>,
    values: &[T::T],
    definition: Option<&[i16]>,
    repetition: Option<&[i16]>,
) -> Parquet<()> {
    let mut column = group.next_column()?.expect("flush follows the schema");
    let writer: &mut ColumnWriterImpl<'_, T> = column.typed::<T>();
    writer.write_batch(values, definition, repetition)?;
    column.close()
}

/// What a footer says beside the rows, by key.
///
/// # Errors
/// [`Error::Io`]; [`Error::Malformed`] for what is no table of annotations.
pub fn about(path: &Path, key: &str) -> Result<Option<String>> {
    let reader = caught(path, || open(path))?;
    Ok(value_of(&reader, key).map(str::to_owned))
}

fn value_of<'a>(reader: &'a SerializedFileReader<File>, key: &str) -> Option<&'a str> {
    let footer = reader.metadata().file_metadata();
    let keys = footer.key_value_metadata()?;
    keys.iter().find(|found| found.key == key)?.value.as_deref()
}

/// Reads the rows of a Parquet file.
///
/// # Errors
/// As [`crate::format::annotation_table::read`].
pub(crate) fn read(path: &Path, each: &mut dyn FnMut(Annotation) -> Result<()>) -> Result<u64> {
    caught(path, || read_rows(path, each))
}

/// A damaged file can make the decoder panic.
fn caught<T>(path: &Path, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let result = catch_unwind(AssertUnwindSafe(work));
    result.unwrap_or_else(|_| Err(broken(path, "the decoder of Parquet failed on it")))
}

fn broken(path: &Path, reason: &str) -> Error {
    Error::Malformed {
        path: path.to_owned(),
        kind: "table of annotations",
        reason: reason.to_owned(),
    }
}

/// Opens a file that has the columns of a table.
fn open(path: &Path) -> Result<SerializedFileReader<File>> {
    let file = text_file::open(path)?;
    let reader = SerializedFileReader::new(file)
        .map_err(|error| broken(path, &format!("no Parquet file that can be read: {error}")))?;
    let version = value_of(&reader, VERSION_KEY).unwrap_or("1");
    if version
        .parse::<u32>()
        .ok()
        .is_none_or(|version| version > ANNOTATION_VERSION)
    {
        let reason = format!(
            "version {version:?}, this program reads {ANNOTATION_VERSION}: read it with a newer one"
        );
        return Err(broken(path, &reason));
    }
    let footer = reader.metadata().file_metadata();
    let columns = footer.schema().get_fields();
    for needed in NEEDED {
        if !columns.iter().any(|column| column.name() == needed) {
            let found: Vec<&str> = columns
                .iter()
                .take(20)
                .map(|column| column.name())
                .collect();
            let reason = format!(
                "it has no column {needed}: expected those that rectiflow caption, tag and score \
                 write, found {}",
                found.join(", ")
            );
            return Err(broken(path, &reason));
        }
    }
    if !(0..=MAX_ROWS).contains(&footer.num_rows()) {
        let reason = format!("{} rows, expected at most {MAX_ROWS}", footer.num_rows());
        return Err(broken(path, &reason));
    }
    Ok(reader)
}

fn read_rows(path: &Path, each: &mut dyn FnMut(Annotation) -> Result<()>) -> Result<u64> {
    let reader = open(path)?;
    let rows = reader.get_row_iter(None);
    let mut num_rows = 0;
    for row in rows.map_err(|error| broken(path, &error.to_string()))? {
        num_rows += 1;
        let row = row.map_err(|error| error.to_string());
        let row = row.and_then(|row| annotation_of(&row));
        each(row.map_err(|reason| malformed(path, num_rows, &reason))?)?;
    }
    Ok(num_rows)
}

/// A row's columns by name, in any order; those of other programs are not read.
fn annotation_of(row: &Row) -> std::result::Result<Annotation, String> {
    let mut id = None;
    let mut kind = None;
    let mut status = None;
    let mut found = Annotation::new(SampleId(0), "", Kind::Caption, "");
    for (name, field) in row.get_column_iter() {
        match name.as_str() {
            "id" => id = Some(parse_id(text_of(name, field)?.as_deref().unwrap_or(""))?),
            "kind" => kind = text_of(name, field)?,
            "status" => status = text_of(name, field)?,
            "source" => found.source = text_of(name, field)?.unwrap_or_default(),
            "mode" => found.mode = text_of(name, field)?.unwrap_or_default(),
            "model" => found.model = text_of(name, field)?.unwrap_or_default(),
            "text" => found.text = text_of(name, field)?,
            "reason" => found.reason = text_of(name, field)?,
            "tags" => found.tags = list_of(name, field)?,
            "tag_classes" => found.tag_classes = list_of(name, field)?,
            "score" => found.score = float_of(name, field)?,
            "rank" => found.rank = float_of(name, field)?,
            "seed" => found.seed = whole_of(name, field)?.unwrap_or_default(),
            "attempt" => found.attempt = small_of(name, field)?.unwrap_or(1),
            "tokens" => found.tokens = small_of(name, field)?,
            _ => {}
        }
    }
    found.id = id.ok_or("it has no id")?;
    let kind = kind.unwrap_or_default();
    found.kind = Kind::parse(&kind)
        .ok_or_else(|| format!("kind {kind:?}: expected caption, tags or score"))?;
    let status = status.unwrap_or_default();
    found.status = Status::parse(&status).ok_or_else(|| {
        format!("status {status:?}: expected ok, empty, cut, refused, loop, failed or unreadable")
    })?;
    found.check()?;
    Ok(found)
}

type Value<T> = std::result::Result<Option<T>, String>;

fn other<T>(name: &str, expected: &str) -> Value<T> {
    Err(format!("{name}: expected {expected}, found another type"))
}

fn text_of(name: &str, field: &Field) -> Value<String> {
    match field {
        Field::Null => Ok(None),
        Field::Str(text) => Ok(Some(text.clone())),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Ok(Some(text.to_owned())),
            Err(_) => other(name, "UTF-8"),
        },
        _ => other(name, "text"),
    }
}

fn list_of(name: &str, field: &Field) -> Value<Vec<String>> {
    let list = match field {
        Field::Null => return Ok(None),
        Field::ListInternal(list) => list,
        _ => return other(name, "a list of texts"),
    };
    let mut texts = Vec::with_capacity(list.elements().len());
    for element in list.elements() {
        texts.push(text_of(name, element)?.unwrap_or_default());
    }
    Ok(Some(texts))
}

fn float_of(name: &str, field: &Field) -> Value<f64> {
    match field {
        Field::Null => Ok(None),
        Field::Float(number) => Ok(Some(f64::from(*number))),
        Field::Double(number) => Ok(Some(*number)),
        _ => other(name, "a number"),
    }
}

fn whole_of(name: &str, field: &Field) -> Value<i64> {
    match field {
        Field::Null => Ok(None),
        Field::Int(number) => Ok(Some((*number).into())),
        Field::Long(number) => Ok(Some(*number)),
        Field::UInt(number) => Ok(Some((*number).into())),
        _ => other(name, "a whole number"),
    }
}

fn small_of(name: &str, field: &Field) -> Value<u32> {
    // An INT32 holds the bits of the number.
    if let Field::Int(number) = field {
        return Ok(Some(number.cast_unsigned()));
    }
    match whole_of(name, field)?.map(u32::try_from) {
        None => Ok(None),
        Some(Ok(number)) => Ok(Some(number)),
        Some(Err(_)) => other(name, "a number from 0 to 4294967295"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;
    use crate::format::annotation::{KINDS, STATUSES};

    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            Just(String::new()),
            Just("ein \u{1f431}\n".to_owned()),
            "[a-z ]{0,20}"
        ]
    }

    fn tags() -> impl Strategy<Value = Option<(Vec<String>, Vec<String>)>> {
        let pairs = prop::collection::vec((text(), text()), 0..4);
        prop::option::of(pairs.prop_map(|pairs| pairs.into_iter().unzip()))
    }

    prop_compose! {
        fn row()(
            id: u64, names in (text(), text(), text()), words in (0..3_usize, 0..7_usize),
            said in (prop::option::of(text()), prop::option::of(text())), tags in tags(),
            numbers in (prop::option::of(-1e9..1e9_f64), prop::option::of(0.0..=1.0_f64)),
            seed: i64, attempt: u32, tokens in prop::option::of(any::<u32>()),
        ) -> Annotation {
            let (tags, tag_classes) = tags.unzip();
            Annotation {
                model: names.2, text: said.0, tags, tag_classes, score: numbers.0,
                rank: numbers.1, status: STATUSES[words.1], reason: said.1, seed,
                attempt, tokens,
                ..Annotation::new(SampleId(id), &names.0, KINDS[words.0], &names.1)
            }
        }
    }

    fn table_of(rows: &[Annotation]) -> Vec<u8> {
        let mut writer = AnnotationWriter::new(Vec::new(), &[("k", "v")]).unwrap();
        for row in rows {
            writer.push(row.clone()).unwrap();
        }
        writer.finish().unwrap()
    }

    fn read_all(path: &Path) -> Result<Vec<Annotation>> {
        let mut rows = Vec::new();
        read(path, &mut |row| {
            rows.push(row);
            Ok(())
        })?;
        Ok(rows)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_table_is_read_as_it_was_written(rows in prop::collection::vec(row(), 0..40)) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.parquet");
            fs::write(&path, table_of(&rows)).unwrap();
            prop_assert_eq!(read_all(&path).unwrap(), rows);
            prop_assert_eq!(about(&path, "k").unwrap(), Some("v".to_owned()));
            prop_assert_eq!(about(&path, "l").unwrap(), None);
        }

        #[test]
        fn damaged_tables_are_survived(
            rows in prop::collection::vec(row(), 1..20),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            keep in any::<prop::sample::Index>(), is_short: bool,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.parquet");
            let mut bytes = table_of(&rows);
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if is_short {
                bytes.truncate(keep.index(bytes.len()));
            }
            fs::write(&path, bytes).unwrap();
            if let Ok(rows) = read_all(&path) {
                for row in rows {
                    prop_assert_eq!(row.check(), Ok(()));
                }
            }
        }
    }

    #[test]
    fn many_rows_are_several_groups() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        let mut rows = Vec::new();
        for number in 0..2 * GROUP_ROWS as u64 + 1 {
            let row = Annotation::new(SampleId(number), "a", Kind::Score, "m");
            rows.push(Annotation {
                score: Some(number as f64),
                ..row
            });
        }
        fs::write(&path, table_of(&rows)).unwrap();
        assert_eq!(open(&path).unwrap().num_row_groups(), 3);
        assert_eq!(read_all(&path).unwrap(), rows);
    }

    #[test]
    fn other_tables_and_newer_versions_are_refused_with_what_was_expected() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        let schema = "message m { required binary url (STRING); required int32 id; }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let writer = SerializedFileWriter::new(Vec::new(), schema, Arc::default()).unwrap();
        fs::write(&path, writer.into_inner().unwrap()).unwrap();
        let error = read_all(&path).unwrap_err().to_string();
        assert!(error.contains("it has no column kind"), "{error}");
        assert!(error.contains("found url, id"), "{error}");

        let keys = vec![KeyValue::new(VERSION_KEY.to_owned(), "2".to_owned())];
        let properties = WriterProperties::builder()
            .set_key_value_metadata(Some(keys))
            .build();
        let writer =
            SerializedFileWriter::new(Vec::new(), SCHEMA_TYPE.clone(), Arc::new(properties));
        fs::write(&path, writer.unwrap().into_inner().unwrap()).unwrap();
        let error = read_all(&path).unwrap_err().to_string();
        assert!(
            error.contains("version \"2\", this program reads 1"),
            "{error}"
        );
    }
}
