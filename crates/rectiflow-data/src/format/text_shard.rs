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
        types::{SchemaDescriptor, TypePtr},
    },
};

use crate::format::{
    block_table::{BLOCK_ROWS, TEXT_COLUMNS},
    record::{Record, SampleId},
};

type Reason = String;

const SCHEMA: &str = "
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

static SCHEMA_TYPE: LazyLock<TypePtr> =
    LazyLock::new(|| Arc::new(parse_message_type(SCHEMA).expect("the schema above is valid")));
static COLUMNS: LazyLock<SchemaDescriptor> =
    LazyLock::new(|| SchemaDescriptor::new(SCHEMA_TYPE.clone()));

/// Writes records to `W`, one row group at a time.
pub(crate) struct TextWriter<W: std::io::Write + Send> {
    file: SerializedFileWriter<W>,
}

impl<W: std::io::Write + Send> TextWriter<W> {
    pub(crate) fn new(out: W) -> Result<Self, ParquetError> {
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
        Ok(Self {
            file: SerializedFileWriter::new(out, SCHEMA_TYPE.clone(), Arc::new(properties))?,
        })
    }

    /// Appends one row group: a block. All blocks but the last have [`BLOCK_ROWS`] rows.
    pub(crate) fn write_block(&mut self, records: &[Record]) -> Result<(), ParquetError> {
        assert!(
            records.len() <= BLOCK_ROWS as usize,
            "a block has at most {BLOCK_ROWS} rows"
        );
        let mut group = self.file.next_row_group()?;
        fn ints(
            group: &mut Group<'_, impl std::io::Write + Send>,
            values: Vec<u32>,
        ) -> Result<(), ParquetError> {
            let values: Vec<i32> = values.into_iter().map(u32::cast_signed).collect();
            write_column::<Int32Type>(group, &values, None)
        }
        let ids: Vec<i64> = records.iter().map(|r| r.id.0.cast_signed()).collect();
        write_column::<Int64Type>(&mut group, &ids, None)?;
        for list in [lists(records, |r| &r.captions), lists(records, |r| &r.tags)] {
            write_column::<ByteArrayType>(&mut group, &list.0, Some(&list.1))?;
        }
        for list in [
            lists(records, |r| &r.important_tags),
            lists(records, |r| &r.quality),
        ] {
            write_column::<ByteArrayType>(&mut group, &list.0, Some(&list.1))?;
        }
        write_column::<BoolType>(
            &mut group,
            &records.iter().map(|r| r.verbatim).collect::<Vec<_>>(),
            None,
        )?;
        ints(
            &mut group,
            records.iter().map(|r| r.original_width_px).collect(),
        )?;
        ints(
            &mut group,
            records.iter().map(|r| r.original_height_px).collect(),
        )?;
        ints(&mut group, records.iter().map(|r| r.crop_left_px).collect())?;
        ints(&mut group, records.iter().map(|r| r.crop_top_px).collect())?;
        ints(
            &mut group,
            records.iter().map(|r| r.target_width_px).collect(),
        )?;
        ints(
            &mut group,
            records.iter().map(|r| r.target_height_px).collect(),
        )?;
        let sources: Vec<ByteArray> = records.iter().map(|r| r.source.as_str().into()).collect();
        write_column::<ByteArrayType>(&mut group, &sources, None)?;
        group.close()?;
        Ok(())
    }

    /// Writes the footer. Returns the footer's metadata of the row groups, and the sink.
    pub(crate) fn finish(self) -> Result<(Vec<RowGroupMetaData>, W), ParquetError> {
        let groups = self.file.flushed_row_groups().to_vec();
        Ok((groups, self.file.into_inner()?))
    }
}

type Group<'a, W> = SerializedRowGroupWriter<'a, W>;

/// Definition and repetition levels of a list column: 1/0 for a list's first element, 1/1 for each
/// further element, 0/0 for an empty list.
struct Levels {
    definition: Vec<i16>,
    repetition: Vec<i16>,
}

fn lists<'a>(
    records: &'a [Record],
    field: impl Fn(&'a Record) -> &'a Vec<String>,
) -> (Vec<ByteArray>, Levels) {
    let (mut definition, mut repetition, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for record in records {
        let list = field(record);
        definition.extend(std::iter::repeat_n(1, list.len()));
        repetition.extend((0..list.len()).map(|i| i16::from(i > 0)));
        if list.is_empty() {
            definition.push(0);
            repetition.push(0);
        }
        values.extend(list.iter().map(|text| ByteArray::from(text.as_str())));
    }
    (
        values,
        Levels {
            definition,
            repetition,
        },
    )
}

fn write_column<T: DataType>(
    group: &mut Group<'_, impl std::io::Write + Send>,
    values: &[T::T],
    levels: Option<&Levels>,
) -> Result<(), ParquetError> {
    let mut column = group
        .next_column()?
        .expect("write_block follows the schema");
    let writer: &mut ColumnWriterImpl<'_, T> = column.typed::<T>();
    let (definition, repetition) = (
        levels.map(|l| l.definition.as_slice()),
        levels.map(|l| l.repetition.as_slice()),
    );
    writer.write_batch(values, definition, repetition)?;
    column.close()
}

/// Offset of a row group's first byte, and the byte length and value count of each of its column
/// chunks.
pub(crate) fn group_table(group: &RowGroupMetaData) -> (u64, [(u32, u32); TEXT_COLUMNS]) {
    let narrow = |n: i64| {
        u32::try_from(n).expect("a block of text is far below 4 GiB, because captions are limited")
    };
    let columns = group
        .columns()
        .iter()
        .map(|c| (narrow(c.compressed_size()), narrow(c.num_values())));
    let columns: Vec<_> = columns.collect();
    (
        group.column(0).byte_range().0,
        columns
            .try_into()
            .expect("the schema has `TEXT_COLUMNS` leaf columns"),
    )
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
        let [mut captions, mut tags] = [self.list()?, self.list()?].map(Vec::into_iter);
        let [mut important_tags, mut quality] = [self.list()?, self.list()?].map(Vec::into_iter);
        let verbatim = self.flat::<BoolType>()?;
        let sizes = [(); 6].map(|()| self.flat::<Int32Type>());
        let [ow, oh, left, top, tw, th] = sizes;
        let (ow, oh, left, top, tw, th) = (ow?, oh?, left?, top?, tw?, th?);
        let sources = self.flat::<ByteArrayType>()?;
        let complete = "`list` checks that there is one list per row";
        (0..self.num_rows)
            .map(|i| {
                Ok(Record {
                    id: SampleId(ids[i].cast_unsigned()),
                    captions: captions.next().expect(complete),
                    tags: tags.next().expect(complete),
                    important_tags: important_tags.next().expect(complete),
                    quality: quality.next().expect(complete),
                    verbatim: verbatim[i],
                    original_width_px: ow[i].cast_unsigned(),
                    original_height_px: oh[i].cast_unsigned(),
                    crop_left_px: left[i].cast_unsigned(),
                    crop_top_px: top[i].cast_unsigned(),
                    target_width_px: tw[i].cast_unsigned(),
                    target_height_px: th[i].cast_unsigned(),
                    source: string(&sources[i])?,
                })
            })
            .collect()
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
        let (mut lists, mut values) = (Vec::<Vec<String>>::new(), values.iter());
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
        let nested = descriptor.self_type().get_basic_info().repetition() == Repetition::REQUIRED
            && descriptor.max_rep_level() > 0;
        // An element takes at least the 4 bytes of its length; only empty lists, one per row, take
        // none.
        let most = if nested {
            self.num_rows as u64 + u64::from(len) / 4
        } else {
            self.num_rows as u64
        };
        if u64::from(num_values) > most {
            return Err(format!(
                "column {} claims {num_values} values in {len} bytes",
                self.column
            ));
        }
        let read = || -> Result<_, ParquetError> {
            let page = only_page(bytes, descriptor.clone(), num_values)?;
            let mut reader =
                ColumnReaderImpl::<T>::new(descriptor.clone(), Box::new(OnePage(Some(page))));
            let (mut values, mut definition, mut repetition) = (Vec::new(), Vec::new(), Vec::new());
            let rows = self.num_rows;
            reader.read_records(
                rows,
                Some(&mut definition),
                Some(&mut repetition),
                &mut values,
            )?;
            Ok((
                values,
                Levels {
                    definition,
                    repetition,
                },
            ))
        };
        read().map_err(|error| format!("column {}: {error}", self.column))
    }
}

/// The page of a chunk, which must consist of one PLAIN data page with `num_values` values.
fn only_page(
    bytes: &[u8],
    descriptor: parquet::schema::types::ColumnDescPtr,
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
    match &page {
        Page::DataPage {
            num_values: n,
            encoding: Encoding::PLAIN,
            ..
        } if *n == num_values => Ok(page),
        other => Err(ParquetError::General(format!(
            "expected one PLAIN data page of {num_values} values, found {:?} with {} values in {:?}",
            other.page_type(),
            other.num_values(),
            other.encoding()
        ))),
    }
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
        let mut writer = TextWriter::new(Vec::new()).unwrap();
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
        fn row_group_is_read_from_its_bytes_alone(records in prop::collection::vec(record(), 1..70)) {
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
