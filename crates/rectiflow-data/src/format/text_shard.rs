//! The text of rows as Parquet, in a plain form that lets a reader decode a row group from its
//! bytes alone.
//!
//! One row group per block of 32 rows; PLAIN encoding, no dictionary, no compression, one page per
//! column chunk, chunks back to back in schema order. So the lengths and value counts in the block
//! table replace the footer, and a remote reader needs one request for a block's text. Any Parquet
//! reader can open the file too. A file's bytes are untrusted: every count is checked against the
//! bytes that it describes before memory is reserved for it.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, LazyLock},
};

use parquet::{
    basic::{Compression, Encoding, Repetition},
    column::{
        page::{Page, PageMetadata, PageReader},
        reader::ColumnReaderImpl,
        writer::ColumnWriterImpl,
    },
    data_type::{BoolType, ByteArray, ByteArrayType, DataType, Int32Type, Int64Type},
    errors::ParquetError,
    file::{
        metadata::{ColumnChunkMetaData, RowGroupMetaData},
        properties::{EnabledStatistics, WriterProperties, WriterVersion},
        serialized_reader::SerializedPageReader,
        writer::{SerializedFileWriter, SerializedRowGroupWriter},
    },
    schema::{
        parser::parse_message_type,
        types::{ColumnDescPtr, SchemaDescriptor, TypePtr},
    },
};

use crate::format::{
    block_table::{BLOCK_ROWS, FIRST_COLUMNS, TEXT_COLUMNS},
    record::{Record, SampleId},
};

type Reason = String;

/// List columns of the schema.
const NUM_LISTS: usize = 4;
/// Size columns of the schema.
const NUM_SIZES: usize = 6;

/// The columns of version 1.
const FIRST_SCHEMA: &str = "
message rectiflow {
  required int64 id (INTEGER(64, false));
  required group captions (LIST) { repeated group list { required binary element (STRING); } }
  required group tags (LIST) { repeated group list { required binary element (STRING); } }
  required group important_tags (LIST) { repeated group list { required binary element (STRING); } }
  required group quality (LIST) { repeated group list { required binary element (STRING); } }
  required boolean verbatim;
  required int32 original_width_px (INTEGER(32, false));
  required int32 original_height_px (INTEGER(32, false));
  required int32 crop_left_px (INTEGER(32, false));
  required int32 crop_top_px (INTEGER(32, false));
  required int32 target_width_px (INTEGER(32, false));
  required int32 target_height_px (INTEGER(32, false));
  required binary source (STRING);
}";
/// The column that version 2 adds.
const LAST_COLUMN: &str = "  required group caption_sources (LIST) { repeated group list { required \
                           binary element (STRING); } }\n}";

/// The schema with or without the sources of captions.
static SCHEMAS: LazyLock<[TypePtr; 2]> = LazyLock::new(|| {
    let with_sources = FIRST_SCHEMA.replace("\n}", &format!("\n{LAST_COLUMN}"));
    [FIRST_SCHEMA, &with_sources]
        .map(|schema| Arc::new(parse_message_type(schema).expect("the schemas above are valid")))
});
static COLUMNS: LazyLock<SchemaDescriptor> =
    LazyLock::new(|| SchemaDescriptor::new(SCHEMAS[1].clone()));

/// Writes records to `W`, one row group at a time.
pub(crate) struct TextWriter<W: std::io::Write + Send> {
    file: SerializedFileWriter<W>,
    has_sources: bool,
}

/// Whether any of the records has a caption with a source, for which a file has a column.
pub(crate) fn has_sources<'a>(records: impl IntoIterator<Item = &'a Record>) -> bool {
    records
        .into_iter()
        .any(|record| !record.caption_sources.is_empty())
}

impl<W: std::io::Write + Send> TextWriter<W> {
    /// A writer of a file with or without the sources of captions.
    pub(crate) fn new(out: W, has_sources: bool) -> Result<Self, ParquetError> {
        let properties = WriterProperties::builder()
            .set_writer_version(WriterVersion::PARQUET_1_0)
            // Not the library's version: the same rows must always encode to the same bytes.
            .set_created_by("rectiflow".to_owned())
            .set_compression(Compression::UNCOMPRESSED)
            .set_encoding(Encoding::PLAIN)
            .set_dictionary_enabled(false)
            .set_statistics_enabled(EnabledStatistics::None)
            .set_offset_index_disabled(true)
            .set_data_page_size_limit(usize::MAX)
            .set_data_page_row_count_limit(usize::MAX)
            .build();
        let schema = SCHEMAS[usize::from(has_sources)].clone();
        Ok(Self {
            file: SerializedFileWriter::new(out, schema, Arc::new(properties))?,
            has_sources,
        })
    }

    /// Appends one row group: a block. All blocks but the last have [`BLOCK_ROWS`] rows.
    pub(crate) fn write_block(&mut self, records: &[Record]) -> Result<(), ParquetError> {
        assert!(
            records.len() <= BLOCK_ROWS as usize,
            "a block has at most {BLOCK_ROWS} rows"
        );
        let mut group = self.file.next_row_group()?;
        let ids: Vec<i64> = records.iter().map(|r| r.id.0.cast_signed()).collect();
        write_column::<Int64Type>(&mut group, &ids, None)?;
        write_lists(&mut group, records)?;
        let verbatim: Vec<bool> = records.iter().map(|r| r.verbatim).collect();
        write_column::<BoolType>(&mut group, &verbatim, None)?;
        write_sizes(&mut group, records)?;
        let sources: Vec<ByteArray> = records.iter().map(|r| r.source.as_str().into()).collect();
        write_column::<ByteArrayType>(&mut group, &sources, None)?;
        if self.has_sources {
            let (values, levels) = flatten(records.iter().map(|r| r.caption_sources.as_slice()));
            write_column::<ByteArrayType>(&mut group, &values, Some(&levels))?;
        } else {
            assert!(!has_sources(records), "the file has no column for sources");
        }
        group.close()?;
        Ok(())
    }

    /// Writes the footer. Returns the footer's metadata of the row groups, and the sink.
    pub(crate) fn finish(self) -> Result<(Vec<RowGroupMetaData>, W), ParquetError> {
        let groups = self.file.flushed_row_groups().to_vec();
        Ok((groups, self.file.into_inner()?))
    }
}

/// The whole text file of `records`, as [`TextWriter`] writes it.
///
/// # Errors
/// None that is known: the sink is memory.
pub(crate) fn encode(records: &[Record]) -> Result<Vec<u8>, ParquetError> {
    let mut writer = TextWriter::new(Vec::new(), has_sources(records))?;
    for block in records.chunks(BLOCK_ROWS as usize) {
        writer.write_block(block)?;
    }
    Ok(writer.finish()?.1)
}

type Group<'a, W> = SerializedRowGroupWriter<'a, W>;

/// Definition and repetition levels of a list column: 1/0 for a list's first element, 1/1 for each
/// further element, 0/0 for an empty list.
#[derive(Default)]
struct Levels {
    definition: Vec<i16>,
    repetition: Vec<i16>,
}

/// The list columns of a record, in schema order.
fn lists(record: &Record) -> [&[String]; NUM_LISTS] {
    [
        &record.captions,
        &record.tags,
        &record.important_tags,
        &record.quality,
    ]
}

/// As [`lists`], to be filled.
fn lists_mut(record: &mut Record) -> [&mut Vec<String>; NUM_LISTS] {
    [
        &mut record.captions,
        &mut record.tags,
        &mut record.important_tags,
        &mut record.quality,
    ]
}

/// The size columns of a record, in schema order.
fn sizes(record: &Record) -> [u32; NUM_SIZES] {
    [
        record.original_width_px,
        record.original_height_px,
        record.crop_left_px,
        record.crop_top_px,
        record.target_width_px,
        record.target_height_px,
    ]
}

/// As [`sizes`], to be filled.
fn sizes_mut(record: &mut Record) -> [&mut u32; NUM_SIZES] {
    [
        &mut record.original_width_px,
        &mut record.original_height_px,
        &mut record.crop_left_px,
        &mut record.crop_top_px,
        &mut record.target_width_px,
        &mut record.target_height_px,
    ]
}

/// A record of which only the id is known.
fn blank(id: SampleId) -> Record {
    Record {
        id,
        captions: Vec::new(),
        caption_sources: Vec::new(),
        tags: Vec::new(),
        important_tags: Vec::new(),
        quality: Vec::new(),
        verbatim: false,
        original_width_px: 0,
        original_height_px: 0,
        crop_left_px: 0,
        crop_top_px: 0,
        target_width_px: 0,
        target_height_px: 0,
        source: String::new(),
    }
}

/// The values and levels of a list column.
fn flatten<'a>(column: impl Iterator<Item = &'a [String]>) -> (Vec<ByteArray>, Levels) {
    let mut values = Vec::new();
    let mut levels = Levels::default();
    for list in column {
        for (at, text) in list.iter().enumerate() {
            values.push(ByteArray::from(text.as_str()));
            levels.definition.push(1);
            levels.repetition.push(i16::from(at > 0));
        }
        if list.is_empty() {
            levels.definition.push(0);
            levels.repetition.push(0);
        }
    }
    (values, levels)
}

fn write_lists(
    group: &mut Group<'_, impl std::io::Write + Send>,
    records: &[Record],
) -> Result<(), ParquetError> {
    for column in 0..NUM_LISTS {
        let (values, levels) = flatten(records.iter().map(|r| lists(r)[column]));
        write_column::<ByteArrayType>(group, &values, Some(&levels))?;
    }
    Ok(())
}

fn write_sizes(
    group: &mut Group<'_, impl std::io::Write + Send>,
    records: &[Record],
) -> Result<(), ParquetError> {
    for column in 0..NUM_SIZES {
        let sizes = records.iter().map(|r| sizes(r)[column].cast_signed());
        let sizes: Vec<i32> = sizes.collect();
        write_column::<Int32Type>(group, &sizes, None)?;
    }
    Ok(())
}

fn write_column<T: DataType>(
    group: &mut Group<'_, impl std::io::Write + Send>,
    values: &[T::T],
    levels: Option<&Levels>,
) -> Result<(), ParquetError> {
    let mut column = group
        .next_column()?
        .expect("write_block follows the schema");
    let definition = levels.map(|l| l.definition.as_slice());
    let repetition = levels.map(|l| l.repetition.as_slice());
    let writer: &mut ColumnWriterImpl<'_, T> = column.typed::<T>();
    writer.write_batch(values, definition, repetition)?;
    column.close()
}

/// Offset of a row group's first byte, and the byte length and value count of each of its column
/// chunks.
pub(crate) fn group_table(group: &RowGroupMetaData) -> (u64, [(u32, u32); TEXT_COLUMNS]) {
    let chunks = group.columns();
    assert!(
        [FIRST_COLUMNS, TEXT_COLUMNS].contains(&chunks.len()),
        "these are the leaf columns of the schemas"
    );
    let mut columns = [(0, 0); TEXT_COLUMNS];
    for (column, chunk) in columns.iter_mut().zip(chunks) {
        *column = (narrow(chunk.compressed_size()), narrow(chunk.num_values()));
    }
    (group.column(0).byte_range().0, columns)
}

fn narrow(n: i64) -> u32 {
    u32::try_from(n).expect("a block of text is far below 4 GiB, because captions are limited")
}

/// Decodes one row group of `num_rows` rows from its bytes and its columns' (bytes, values),
/// without a footer.
///
/// # Errors
/// The first mistake in the row group. Whatever the bytes are, it never panics and reserves no more
/// memory than `bytes` can fill.
pub(crate) fn decode_block(
    bytes: &[u8],
    columns: &[(u32, u32); TEXT_COLUMNS],
    num_rows: usize,
) -> Result<Vec<Record>, Reason> {
    let total: u64 = columns.iter().map(|&(len, _)| u64::from(len)).sum();
    if total != bytes.len() as u64 || num_rows > BLOCK_ROWS as usize {
        return Err(format!(
            "{} bytes for {num_rows} rows, the block table says {total}",
            bytes.len()
        ));
    }
    // The library is meant never to panic on any input; a reader of untrusted files does not rely
    // on it.
    let decoded = catch_unwind(AssertUnwindSafe(|| {
        Decoder {
            bytes,
            columns,
            num_rows,
            at: 0,
            column: 0,
        }
        .records()
    }));
    decoded.unwrap_or_else(|_| Err("the Parquet decoder panicked".to_owned()))
}

struct Decoder<'a> {
    bytes: &'a [u8],
    columns: &'a [(u32, u32); TEXT_COLUMNS],
    num_rows: usize,
    /// Offset and index of the next column chunk.
    at: usize,
    column: usize,
}

impl Decoder<'_> {
    fn records(mut self) -> Result<Vec<Record>, Reason> {
        let ids = self.flat::<Int64Type>()?;
        let mut records: Vec<Record> = ids
            .into_iter()
            .map(|id| blank(SampleId(id.cast_unsigned())))
            .collect();
        // The other columns, in schema order.
        self.lists(&mut records)?;
        for (record, verbatim) in records.iter_mut().zip(self.flat::<BoolType>()?) {
            record.verbatim = verbatim;
        }
        self.sizes(&mut records)?;
        for (record, source) in records.iter_mut().zip(self.flat::<ByteArrayType>()?) {
            record.source = string(&source)?;
        }
        if self.columns[FIRST_COLUMNS] == (0, 0) {
            return Ok(records);
        }
        for (record, sources) in records.iter_mut().zip(self.list()?) {
            let (num_sources, num_captions) = (sources.len(), record.captions.len());
            if num_sources != 0 && num_sources != num_captions {
                return Err(format!(
                    "{num_captions} captions with {num_sources} sources"
                ));
            }
            record.caption_sources = sources;
        }
        Ok(records)
    }

    fn lists(&mut self, records: &mut [Record]) -> Result<(), Reason> {
        for column in 0..NUM_LISTS {
            for (record, list) in records.iter_mut().zip(self.list()?) {
                *lists_mut(record)[column] = list;
            }
        }
        Ok(())
    }

    fn sizes(&mut self, records: &mut [Record]) -> Result<(), Reason> {
        for column in 0..NUM_SIZES {
            for (record, size) in records.iter_mut().zip(self.flat::<Int32Type>()?) {
                *sizes_mut(record)[column] = size.cast_unsigned();
            }
        }
        Ok(())
    }

    /// A required column: one value per row.
    fn flat<T: DataType>(&mut self) -> Result<Vec<T::T>, Reason> {
        let (values, _) = self.chunk::<T>()?;
        if values.len() != self.num_rows {
            return Err(format!(
                "column {} has {} values for {} rows",
                self.column,
                values.len(),
                self.num_rows
            ));
        }
        Ok(values)
    }

    /// A list column: one list per row.
    fn list(&mut self) -> Result<Vec<Vec<String>>, Reason> {
        let (values, levels) = self.chunk::<ByteArrayType>()?;
        let mut lists = Vec::<Vec<String>>::new();
        let mut values = values.iter();
        for (&definition, &repetition) in levels.definition.iter().zip(&levels.repetition) {
            if repetition == 0 {
                lists.push(Vec::new());
            }
            if definition == 1 {
                let value = values
                    .next()
                    .ok_or("a list has fewer values than its levels say")?;
                lists
                    .last_mut()
                    .ok_or("a list begins with a continuation")?
                    .push(string(value)?);
            }
        }
        if lists.len() != self.num_rows || values.next().is_some() {
            return Err(format!(
                "column {} has {} lists for {} rows",
                self.column,
                lists.len(),
                self.num_rows
            ));
        }
        Ok(lists)
    }

    /// The values and levels of the next column chunk.
    fn chunk<T: DataType>(&mut self) -> Result<(Vec<T::T>, Levels), Reason> {
        let (len, num_values) = self.columns[self.column];
        let bytes = &self.bytes[self.at..self.at + len as usize];
        let descriptor = COLUMNS.column(self.column);
        self.at += len as usize;
        self.column += 1;
        if u64::from(num_values) > self.most_values(&descriptor, len) {
            return Err(format!(
                "column {} claims {num_values} values in {len} bytes",
                self.column
            ));
        }
        only_page(bytes, descriptor.clone(), num_values)
            .and_then(|page| read_page::<T>(page, descriptor, self.num_rows))
            .map_err(|error| format!("column {}: {error}", self.column))
    }

    /// The largest possible number of values in a column chunk of `len` bytes.
    fn most_values(&self, descriptor: &ColumnDescPtr, len: u32) -> u64 {
        let is_required =
            descriptor.self_type().get_basic_info().repetition() == Repetition::REQUIRED;
        let num_rows = self.num_rows as u64;
        // An element of a list takes at least the 4 bytes of its length; only empty lists, one per
        // row, take none.
        if is_required && descriptor.max_rep_level() > 0 {
            num_rows + u64::from(len) / 4
        } else {
            num_rows
        }
    }
}

/// The page of a chunk, which must consist of one PLAIN data page with `num_values` values.
fn only_page(
    bytes: &[u8],
    descriptor: ColumnDescPtr,
    num_values: u32,
) -> Result<Page, ParquetError> {
    let len = bytes.len() as i64;
    let metadata = ColumnChunkMetaData::builder(descriptor)
        .set_compression(Compression::UNCOMPRESSED)
        .set_num_values(i64::from(num_values))
        .set_total_compressed_size(len)
        .set_total_uncompressed_size(len)
        .set_data_page_offset(0)
        .build()?;
    let source = Arc::new(bytes::Bytes::copy_from_slice(bytes));
    let mut pages = SerializedPageReader::new(source, &metadata, num_values as usize, None)?;
    let page = pages
        .get_next_page()?
        .ok_or_else(|| ParquetError::General("it has no page".to_owned()))?;
    if is_plain_page(&page, num_values) {
        return Ok(page);
    }
    Err(ParquetError::General(format!(
        "expected one PLAIN data page of {num_values} values, found {:?} with {} values in {:?}",
        page.page_type(),
        page.num_values(),
        page.encoding()
    )))
}

fn is_plain_page(page: &Page, expected_values: u32) -> bool {
    matches!(
        page,
        Page::DataPage {
            num_values,
            encoding: Encoding::PLAIN,
            ..
        } if *num_values == expected_values
    )
}

/// The values and levels of a page with `num_rows` rows.
fn read_page<T: DataType>(
    page: Page,
    descriptor: ColumnDescPtr,
    num_rows: usize,
) -> Result<(Vec<T::T>, Levels), ParquetError> {
    let mut reader = ColumnReaderImpl::<T>::new(descriptor, Box::new(OnePage(Some(page))));
    let mut values = Vec::new();
    let mut levels = Levels::default();
    reader.read_records(
        num_rows,
        Some(&mut levels.definition),
        Some(&mut levels.repetition),
        &mut values,
    )?;
    Ok((values, levels))
}

struct OnePage(Option<Page>);

impl Iterator for OnePage {
    type Item = Result<Page, ParquetError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.take().map(Ok)
    }
}

impl PageReader for OnePage {
    fn get_next_page(&mut self) -> Result<Option<Page>, ParquetError> {
        Ok(self.0.take())
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>, ParquetError> {
        Ok(None)
    }

    fn skip_next_page(&mut self) -> Result<(), ParquetError> {
        self.0 = None;
        Ok(())
    }

    fn at_record_boundary(&mut self) -> Result<bool, ParquetError> {
        Ok(true)
    }
}

fn string(bytes: &ByteArray) -> Result<String, Reason> {
    Ok(bytes.as_utf8().map_err(|_| "text is not UTF-8")?.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text() -> impl Strategy<Value = String> {
        prop::collection::vec(any::<char>(), 0..12).prop_map(|chars| chars.into_iter().collect())
    }

    fn list() -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec(text(), 0..4)
    }

    fn record() -> impl Strategy<Value = Record> {
        let texts = (list(), list(), list(), list(), text());
        (any::<u64>(), texts, any::<bool>(), any::<[u32; 6]>()).prop_map(
            |(id, texts, verbatim, numbers)| Record {
                id: SampleId(id),
                caption_sources: if verbatim {
                    texts.0.clone()
                } else {
                    Vec::new()
                },
                captions: texts.0,
                tags: texts.1,
                important_tags: texts.2,
                quality: texts.3,
                verbatim,
                original_width_px: numbers[0],
                original_height_px: numbers[1],
                crop_left_px: numbers[2],
                crop_top_px: numbers[3],
                target_width_px: numbers[4],
                target_height_px: numbers[5],
                source: texts.4,
            },
        )
    }

    /// A row group's bytes and columns.
    type Group = (Vec<u8>, [(u32, u32); TEXT_COLUMNS]);

    fn encode(blocks: &[&[Record]]) -> (Vec<u8>, Vec<Group>) {
        let has_sources = has_sources(blocks.iter().copied().flatten());
        let mut writer = TextWriter::new(Vec::new(), has_sources).unwrap();
        blocks
            .iter()
            .for_each(|block| writer.write_block(block).unwrap());
        let (groups, file) = writer.finish().unwrap();
        let cut = |group| {
            let (offset, columns) = group_table(group);
            let len: u32 = columns.iter().map(|&(len, _)| len).sum();
            (
                file[offset as usize..offset as usize + len as usize].to_vec(),
                columns,
            )
        };
        let groups = groups.iter().map(cut).collect();
        (file, groups)
    }

    fn plain(caption: &str) -> Record {
        let texts = || vec![caption.to_owned(); 3];
        Record {
            id: SampleId(1),
            captions: texts(),
            caption_sources: texts(),
            tags: texts(),
            important_tags: Vec::new(),
            quality: Vec::new(),
            verbatim: false,
            original_width_px: 1,
            original_height_px: 2,
            crop_left_px: 3,
            crop_top_px: 4,
            target_width_px: 5,
            target_height_px: 6,
            source: "a.png".to_owned(),
        }
    }

    #[test]
    fn row_groups_follow_each_other_without_a_gap() {
        let records = vec![plain("x"); 32];
        let (file, groups) = encode(&[&records, &records, &records[..3]]);
        let len: usize = groups.iter().map(|(bytes, _)| bytes.len()).sum();
        let footer =
            u32::from_le_bytes(file[file.len() - 8..file.len() - 4].try_into().unwrap()) as usize;
        assert_eq!(file.len(), 4 + len + footer + 8);
        assert_eq!(groups[0].0, groups[1].0, "the same rows are the same bytes");
    }

    /// A caption of 100,000 characters must not be split into a second page.
    #[test]
    fn long_captions_stay_in_one_page() {
        let records = vec![plain(&"long ".repeat(20_000)); 32];
        let (_, groups) = encode(&[&records]);
        assert_eq!(
            decode_block(&groups[0].0, &groups[0].1, 32).unwrap(),
            records
        );
    }

    #[test]
    fn lying_block_tables_are_refused() {
        let records = vec![plain("caption"); 5];
        let (_, groups) = encode(&[&records]);
        let (bytes, columns) = &groups[0];
        let fails = |columns: [(u32, u32); TEXT_COLUMNS], rows: usize| {
            assert!(
                decode_block(bytes, &columns, rows).is_err(),
                "{columns:?} for {rows} rows"
            );
        };
        for rows in [0, 4, 6, 33, usize::MAX] {
            fails(*columns, rows);
        }
        for column in 0..TEXT_COLUMNS {
            for values in [0, columns[column].1 - 1, columns[column].1 + 1, u32::MAX] {
                let mut lie = *columns;
                lie[column].1 = values;
                fails(lie, 5);
            }
            let mut lie = *columns;
            lie[column].0 = u32::MAX;
            fails(lie, 5);
            let mut lie = *columns;
            lie[column].0 -= 1;
            lie[(column + 1) % TEXT_COLUMNS].0 += 1;
            fails(lie, 5);
        }
        assert!(decode_block(&[], &[(0, 0); TEXT_COLUMNS], 5).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn row_group_is_read_from_its_bytes_alone(
            records in prop::collection::vec(record(), 1..70),
        ) {
            let blocks: Vec<&[Record]> = records.chunks(BLOCK_ROWS as usize).collect();
            let (_, groups) = encode(&blocks);
            for (block, (bytes, columns)) in blocks.iter().zip(&groups) {
                prop_assert_eq!(&decode_block(bytes, columns, block.len()).unwrap(), block);
            }
        }

        #[test]
        fn damaged_row_groups_are_survived(
            records in prop::collection::vec(record(), 1..32),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let (_, mut groups) = encode(&[&records]);
            let (mut bytes, columns) = groups.remove(0);
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(decoded) = decode_block(&bytes, &columns, records.len()) {
                prop_assert_eq!(decoded.len(), records.len());
            }
        }
    }
}
