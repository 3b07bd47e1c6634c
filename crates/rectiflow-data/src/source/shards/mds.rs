//! Shards of MosaicML Streaming: `index.json` names them, and each begins with the places of its
//! samples.
//!
//! A shard: the number of samples and their offsets, 4 bytes each, then JSON, then the samples. A
//! sample: the lengths of those columns that have no fixed one, 4 bytes each, then all columns. A
//! listing reads lengths and texts and jumps over the pictures.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    error::{Error, Result},
    reject::{Reason, Remark},
    source::{
        listing::Listing,
        rows::RowFile,
        sample::{Place, Sample},
        shards::{
            files::Files,
            row_texts::{enter, keep, only_table},
            shard::Shard,
            tar_headers::remark_of,
        },
        walk::join,
    },
    text::caption::MAX_SOURCE_BYTES,
};

/// Largest list of shards in bytes.
const MAX_INDEX_BYTES: u64 = 1 << 28;
/// Encodings of pictures that are files.
const PICTURES: [&str; 2] = ["jpeg", "png"];
/// Names of columns of bytes that are pictures.
const PICTURE_COLUMNS: [&str; 7] = ["image", "img", "jpg", "jpeg", "png", "webp", "picture"];

#[derive(Debug, Deserialize)]
struct Index {
    shards: Vec<Entry>,
}

/// What the list says of a shard.
#[derive(Debug, Deserialize)]
struct Entry {
    format: String,
    column_names: Vec<String>,
    column_encodings: Vec<String>,
    /// None for a column whose values have lengths of their own.
    column_sizes: Vec<Option<u32>>,
    #[serde(default)]
    compression: Option<String>,
    raw_data: RawData,
    samples: u32,
}

#[derive(Debug, Deserialize)]
struct RawData {
    basename: String,
    bytes: u64,
}

/// Whether a file is a list of MDS shards.
///
/// # Errors
/// [`Error::Io`], [`Error::Remote`].
pub(crate) fn is_index(shard: &Shard) -> Result<bool> {
    if shard.bytes > MAX_INDEX_BYTES {
        return Ok(false);
    }
    let json = shard.read(0..shard.bytes)?;
    Ok(serde_json::from_slice::<Index>(&json).is_ok())
}

/// Lists the samples of the shards that the lists `indexes` name.
///
/// # Errors
/// [`Error::Remote`] if anything at a URL cannot be reached; [`Error::Io`] if the texts cannot be
/// kept. A bad shard is a remark.
pub(crate) fn list(files: &Files, indexes: &[String], row_file: RowFile) -> Result<Listing> {
    let mut listing = Listing::new(row_file);
    listing.tables.push(only_table());
    for name in indexes {
        let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
        match read_index(files, name) {
            Ok(index) => {
                for entry in &index.shards {
                    list_shard(files, folder, entry, &mut listing)?;
                }
            }
            Err(error @ Error::Remote { .. }) => return Err(error),
            Err(error) => {
                let remark = Remark::new(name, Reason::BadIndex, error.to_string());
                listing.remarks.push(remark);
            }
        }
    }
    Ok(listing)
}

fn read_index(files: &Files, name: &str) -> Result<Index> {
    let shard = files.shard(name)?;
    if shard.bytes > MAX_INDEX_BYTES {
        return Err(shard.malformed(format!("it is longer than {MAX_INDEX_BYTES} bytes")));
    }
    let json = shard.read(0..shard.bytes)?;
    serde_json::from_slice(&json).map_err(|error| shard.malformed(error.to_string()))
}

fn list_shard(files: &Files, folder: &str, entry: &Entry, listing: &mut Listing) -> Result<()> {
    let name = join(folder, &entry.raw_data.basename);
    let remark = |reason, detail: String| Remark::new(&name, reason, detail);
    if !is_plain(&entry.raw_data.basename) {
        let detail = "the name of a shard leads out of its folder".to_owned();
        listing.remarks.push(remark(Reason::BadIndex, detail));
        return Ok(());
    }
    let shard = match files.shard_if_any(&name) {
        Ok(Some(shard)) => shard,
        Ok(None) => {
            listing.remarks.push(missing(&name, entry));
            return Ok(());
        }
        Err(error @ Error::Remote { .. }) => return Err(error),
        Err(error) => {
            listing
                .remarks
                .push(remark(Reason::Unreadable, error.to_string()));
            return Ok(());
        }
    };
    if let Err(error) = list_samples(&shard, entry, listing) {
        listing.remarks.push(remark_of(&shard, error)?);
    }
    listing.shards.push(shard.into());
    Ok(())
}

/// Why a shard that the list names is not there.
fn missing(name: &str, entry: &Entry) -> Remark {
    let detail = match &entry.compression {
        Some(compression) => format!(
            "its {} samples are compressed ({compression}), and no sample can be read without all \
             before it: decompress the shard to this name (zstd -d)",
            entry.samples
        ),
        None => format!(
            "the index names it with {} samples, and it is not there",
            entry.samples
        ),
    };
    Remark::new(name, Reason::BadShard, detail)
}

/// Whether the name of a shard stays in its folder.
fn is_plain(name: &str) -> bool {
    let mut parts = name.split('/');
    !name.is_empty() && parts.all(|part| !matches!(part, "" | "." | ".."))
}

/// The columns of a shard.
struct Columns<'a> {
    entry: &'a Entry,
    picture: usize,
}

/// Where the columns of a sample are.
struct Row {
    /// Start and length of each column.
    columns: Vec<(u64, u64)>,
}

fn list_samples(shard: &Shard, entry: &Entry, listing: &mut Listing) -> Result<()> {
    let columns = Columns::of(shard, entry)?;
    let offsets = offsets(shard, entry)?;
    let number = listing.shards.len() as u32;
    let mut num_cut = 0;
    for (row, pair) in offsets.windows(2).enumerate() {
        let address = format!("{}#{row}", shard.name);
        let (start, end) = (u64::from(pair[0]), u64::from(pair[1]));
        if end > shard.bytes {
            num_cut += 1;
            continue;
        }
        let Some(place) = columns.places(shard, start, end)? else {
            let detail = "the lengths of its columns are not that of the sample: it is damaged";
            listing
                .remarks
                .push(Remark::new(address, Reason::BadShard, detail));
            continue;
        };
        let texts = columns.texts(shard, &place)?;
        let line = keep(
            &texts,
            &address,
            &mut listing.row_file,
            &mut listing.remarks,
        );
        let (offset, bytes) = place.columns[columns.picture];
        listing.samples.push(Sample {
            path: address,
            place: Place::Bytes {
                shard: number,
                offset,
                bytes,
                by_index: false,
            },
            sidecars: Box::default(),
            lines: line.map_err(Error::io(&shard.name))?.into_iter().collect(),
            sha256: None,
            listed_px: [0; 2],
        });
    }
    if num_cut > 0 || shard.bytes != entry.raw_data.bytes {
        let detail = format!(
            "it has {} bytes, the index says {}: {num_cut} of its {} samples are not there; copy \
             it again",
            shard.bytes, entry.raw_data.bytes, entry.samples
        );
        listing
            .remarks
            .push(Remark::new(&shard.name, Reason::Truncated, detail));
    }
    Ok(())
}

/// The offsets of the samples and of the end of the last one.
fn offsets(shard: &Shard, entry: &Entry) -> Result<Vec<u32>> {
    let num_bytes = 4 * (u64::from(entry.samples) + 2);
    let table = shard.read(0..num_bytes)?;
    let mut numbers = Vec::with_capacity(entry.samples as usize + 2);
    for bytes in table.chunks_exact(4) {
        numbers.push(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    }
    if numbers[0] != entry.samples {
        let (found, expected) = (numbers[0], entry.samples);
        return Err(shard.malformed(format!(
            "it begins with {found} samples, and its index says {expected}"
        )));
    }
    let offsets = numbers.split_off(1);
    if u64::from(offsets[0]) < num_bytes || !offsets.is_sorted() {
        return Err(shard.malformed("the offsets of its samples are not in order".to_owned()));
    }
    Ok(offsets)
}

impl<'a> Columns<'a> {
    fn of(shard: &Shard, entry: &'a Entry) -> Result<Self> {
        let num = entry.column_names.len();
        if entry.format != "mds" {
            return Err(shard.malformed(format!("a shard of format {:?}", entry.format)));
        }
        if entry.column_encodings.len() != num || entry.column_sizes.len() != num {
            return Err(shard.malformed("its columns have no encoding or no size".to_owned()));
        }
        let picture = picture_column(entry).map_err(|reason| shard.malformed(reason))?;
        Ok(Self { entry, picture })
    }

    /// Where the columns of the sample in `start..end` are. None if their lengths are not its own.
    fn places(&self, shard: &Shard, start: u64, end: u64) -> Result<Option<Row>> {
        let num_own = self
            .entry
            .column_sizes
            .iter()
            .filter(|size| size.is_none())
            .count();
        let mut at = start + 4 * num_own as u64;
        if at > end {
            return Ok(None);
        }
        let head = shard.read(start..at)?;
        let mut own = head.chunks_exact(4);
        let mut columns = Vec::with_capacity(self.entry.column_sizes.len());
        for size in &self.entry.column_sizes {
            let len = match size {
                Some(size) => *size,
                None => {
                    let bytes = own.next().expect("the head has a length for each");
                    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
                }
            };
            columns.push((at, u64::from(len)));
            at += u64::from(len);
        }
        Ok((at == end).then_some(Row { columns }))
    }

    /// The texts of a sample, by column.
    fn texts(&self, shard: &Shard, row: &Row) -> Result<Map<String, Value>> {
        let mut object = Map::new();
        let names = self
            .entry
            .column_names
            .iter()
            .zip(&self.entry.column_encodings);
        for ((name, encoding), &(at, len)) in names.zip(&row.columns) {
            if !matches!(encoding.as_str(), "str" | "json") || len > MAX_SOURCE_BYTES {
                continue;
            }
            let bytes = shard.read(at..at + len)?;
            let value = match encoding.as_str() {
                "json" => serde_json::from_slice(&bytes).unwrap_or_default(),
                _ => Value::from(String::from_utf8_lossy(&bytes).into_owned()),
            };
            enter(&mut object, name, value);
        }
        Ok(object)
    }
}

/// The column of pictures: the only one that is encoded as one, else the only one of bytes with a
/// name that says so.
fn picture_column(entry: &Entry) -> std::result::Result<usize, String> {
    let mut encoded = Vec::new();
    let mut plain = Vec::new();
    let columns = entry.column_names.iter().zip(&entry.column_encodings);
    for (column, (name, encoding)) in columns.enumerate() {
        if PICTURES.contains(&encoding.as_str()) {
            encoded.push(column);
        } else if encoding == "bytes"
            && PICTURE_COLUMNS.contains(&name.to_ascii_lowercase().as_str())
        {
            plain.push(column);
        }
    }
    let found = if encoded.is_empty() { plain } else { encoded };
    if let [column] = found[..] {
        return Ok(column);
    }
    let mut all = Vec::new();
    for (name, encoding) in entry.column_names.iter().zip(&entry.column_encodings) {
        all.push(format!("{name}: {encoding}"));
    }
    Err(format!(
        "expected one column of pictures (jpeg, png, or bytes called image), found {}: {}",
        found.len(),
        all.join(", ")
    ))
}
