//! The block table beside the manifest: 128 or 136 bytes of checksums and lengths for each block of
//! 32 rows.
//!
//! It grows with the samples, so it is a binary file of its own, which the manifest names by its
//! hash. Like the manifest it is untrusted input. `docs/format.md` is the specification.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The version of data sets whose texts have no sources of captions. All other rules of the two
/// versions are the same.
pub const FIRST_VERSION: u32 = 1;
/// The newest version that this crate writes and reads.
pub const FORMAT_VERSION: u32 = 2;
/// Rows of a block: the unit of reading, checksumming and ownership.
pub const BLOCK_ROWS: u32 = 32;
/// Columns of a text object, hence column chunks of a row group, at most: the last one, the sources
/// of captions, is in version 2 alone, and there only where a caption has one.
pub const TEXT_COLUMNS: usize = 14;
/// Columns of a text object of version 1.
pub const FIRST_COLUMNS: usize = 13;

/// Columns of an entry of a version.
pub(crate) fn num_columns(version: u32) -> usize {
    if version == FIRST_VERSION {
        FIRST_COLUMNS
    } else {
        TEXT_COLUMNS
    }
}

/// Bytes of a block's entry in the block table of a version.
pub(crate) fn entry_bytes(version: u32) -> usize {
    24 + 8 * num_columns(version)
}

const MAGIC: &[u8; 8] = b"RFBLOCKS";
const TABLE_HEADER_BYTES: usize = 16;

/// The binary file with the block table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockTableFile {
    /// Name, relative to the data set.
    pub file: String,
    /// Length of the file.
    pub bytes: u64,
    /// Hex BLAKE3 of the file.
    pub hash: String,
}

/// The block table's entry for one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// XXH3-64 of the block's rows in the latents file.
    pub latents_xxh3: u64,
    /// Where the block's row group begins in the text file.
    pub text_offset: u64,
    /// XXH3-64 of the row group's bytes.
    pub text_xxh3: u64,
    /// For each column chunk, in schema order: bytes (page header included) and number of values
    /// (levels). A last one without bytes is not there.
    #[serde(with = "columns")]
    pub columns: [(u32, u32); TEXT_COLUMNS],
}

/// The column chunks of a block in journals: without the last one if it is not there, as in
/// version 1.
mod columns {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    use super::{FIRST_COLUMNS, TEXT_COLUMNS};

    type Columns = [(u32, u32); TEXT_COLUMNS];

    pub(super) fn serialize<S: Serializer>(all: &Columns, to: S) -> Result<S::Ok, S::Error> {
        match all.last() {
            Some((0, 0)) => all[..FIRST_COLUMNS].serialize(to),
            _ => all.as_slice().serialize(to),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Columns, D::Error> {
        let mut found = Vec::<(u32, u32)>::deserialize(from)?;
        if found.len() == FIRST_COLUMNS {
            found.push((0, 0));
        }
        let num = found.len();
        let columns = Columns::try_from(found);
        columns.map_err(|_| D::Error::custom(format!("{num} columns, expected {TEXT_COLUMNS}")))
    }
}

impl Block {
    /// Bytes of the block's row group.
    pub fn text_bytes(&self) -> u64 {
        self.columns
            .iter()
            .map(|&(bytes, _)| u64::from(bytes))
            .sum()
    }

    /// Whether its captions have sources.
    fn has_sources(&self) -> bool {
        self.columns[FIRST_COLUMNS] != (0, 0)
    }

    /// Appends the block's entry, little-endian, in the order of the fields.
    fn write(&self, version: u32, out: &mut Vec<u8>) {
        for word in [self.latents_xxh3, self.text_offset, self.text_xxh3] {
            out.extend(word.to_le_bytes());
        }
        for (bytes, values) in &self.columns[..num_columns(version)] {
            out.extend(bytes.to_le_bytes());
            out.extend(values.to_le_bytes());
        }
    }

    fn read(entry: &[u8]) -> Self {
        let mut columns = [(0, 0); TEXT_COLUMNS];
        let num_columns = (entry.len() - 24) / 8;
        for (at, column) in (24..).step_by(8).zip(&mut columns[..num_columns]) {
            *column = (u32_at(entry, at), u32_at(entry, at + 4));
        }
        Self {
            latents_xxh3: u64_at(entry, 0),
            text_offset: u64_at(entry, 8),
            text_xxh3: u64_at(entry, 16),
            columns,
        }
    }
}

fn u64_at(entry: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(entry[at..at + 8].try_into().expect("8 bytes were sliced"))
}

fn u32_at(entry: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(entry[at..at + 4].try_into().expect("4 bytes were sliced"))
}

/// The block table: one entry per block, objects in the manifest's order, blocks in row order.
#[derive(Clone)]
pub struct BlockTable {
    version: u32,
    bytes: Vec<u8>,
    /// Index of each object's first block.
    first: Vec<u64>,
}

impl std::fmt::Debug for BlockTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockTable")
            .field("bytes", &self.bytes.len())
            .finish_non_exhaustive()
    }
}

impl BlockTable {
    /// The table of `objects`, each a list of its blocks, in the first version that can hold them.
    pub fn new<'a>(objects: impl IntoIterator<Item = &'a [Block], IntoIter: Clone>) -> Self {
        let objects = objects.into_iter();
        let has_sources = objects.clone().flatten().any(Block::has_sources);
        let version = if has_sources {
            FORMAT_VERSION
        } else {
            FIRST_VERSION
        };
        let mut bytes = header(version);
        let mut first = Vec::new();
        let mut count = 0;
        for blocks in objects {
            first.push(count);
            count += blocks.len() as u64;
            for block in blocks {
                block.write(version, &mut bytes);
            }
        }
        Self {
            version,
            bytes,
            first,
        }
    }

    /// Reads the table that a manifest names as `file` and checks it against the manifest's hash.
    /// `num_blocks` has the number of blocks of each of the manifest's objects.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Malformed`] if it is not the file that the manifest was written
    /// with.
    pub fn read(
        root: &Path,
        file: &BlockTableFile,
        num_blocks: impl IntoIterator<Item = u32>,
    ) -> Result<Self> {
        let path = root.join(&file.file);
        let bytes = read_at_most(&path, file.bytes, "block table")?;
        Self::parse(&path, bytes, file, num_blocks)
    }

    /// Checks the table's bytes, which come from `path`, as [`BlockTable::read`] does.
    pub(crate) fn parse(
        path: &Path,
        bytes: Vec<u8>,
        file: &BlockTableFile,
        num_blocks: impl IntoIterator<Item = u32>,
    ) -> Result<Self> {
        let mut first = Vec::new();
        let mut count = 0;
        for num_blocks in num_blocks {
            first.push(count);
            count += u64::from(num_blocks);
        }
        let checked = check_table(&bytes, file, count);
        let version = checked.map_err(|reason| Error::Malformed {
            path: path.into(),
            kind: "block table",
            reason,
        })?;
        Ok(Self {
            version,
            bytes,
            first,
        })
    }

    /// Block `block` of object `object` (indices in the manifest).
    ///
    /// # Panics
    /// If there is no such block.
    pub fn block(&self, object: usize, block: u32) -> Block {
        let index = (self.first[object] + u64::from(block)) as usize;
        let entry_bytes = entry_bytes(self.version);
        let at = TABLE_HEADER_BYTES + index * entry_bytes;
        Block::read(&self.bytes[at..at + entry_bytes])
    }

    /// The version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The file's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The manifest's entry for the table. The file name contains the hash, so that a new table
    /// never replaces one in use.
    pub fn file(&self) -> BlockTableFile {
        let hash = blake3::hash(&self.bytes).to_hex().to_string();
        BlockTableFile {
            file: format!("blocks-{}.bin", &hash[..16]),
            bytes: self.bytes.len() as u64,
            hash,
        }
    }
}

/// Checks the bytes of a table, except its entries, against `file`. Returns its version.
///
/// # Errors
/// The first difference.
fn check_table(
    bytes: &[u8],
    file: &BlockTableFile,
    num_blocks: u64,
) -> std::result::Result<u32, String> {
    if bytes.len() as u64 != file.bytes {
        return Err(format!(
            "{} bytes, the manifest says {}",
            bytes.len(),
            file.bytes
        ));
    }
    let hash = blake3::hash(bytes).to_hex();
    if hash.as_str() != file.hash {
        return Err(format!(
            "its BLAKE3 is {hash}, the manifest says {}",
            file.hash
        ));
    }
    // The length says the version, and the header must say the same.
    for version in [FIRST_VERSION, FORMAT_VERSION] {
        let header = header(version);
        if bytes.len() as u64 != table_bytes(num_blocks, version) {
            continue;
        }
        if !bytes.starts_with(&header) {
            return Err(format!("it must begin with the bytes {header:?}"));
        }
        return Ok(version);
    }
    Err(format!("{} bytes for {num_blocks} blocks", bytes.len()))
}

/// The first bytes of every table of a version.
fn header(version: u32) -> Vec<u8> {
    let mut header = Vec::from(MAGIC);
    header.extend(version.to_le_bytes());
    header.extend((entry_bytes(version) as u32).to_le_bytes());
    header
}

/// Length of a table of `num_blocks` blocks.
pub(crate) fn table_bytes(num_blocks: u64, version: u32) -> u64 {
    TABLE_HEADER_BYTES as u64 + num_blocks * entry_bytes(version) as u64
}

/// Reads a whole file of at most `limit` bytes.
pub(crate) fn read_at_most(path: &Path, limit: u64, kind: &'static str) -> Result<Vec<u8>> {
    let len = fs::metadata(path).map_err(Error::io(path))?.len();
    if len > limit {
        let reason = format!("{len} bytes, at most {limit} are expected");
        return Err(Error::Malformed {
            path: PathBuf::from(path),
            kind,
            reason,
        });
    }
    fs::read(path).map_err(Error::io(path))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A block of version 1.
    pub(crate) fn block(seed: u64) -> Block {
        let mut columns = std::array::from_fn(|i| (seed as u32 + i as u32, i as u32));
        columns[FIRST_COLUMNS] = (0, 0);
        Block {
            latents_xxh3: seed,
            text_offset: seed * 3,
            text_xxh3: !seed,
            columns,
        }
    }

    #[test]
    fn sources_of_captions_make_version_2() {
        let with_sources = |seed| Block {
            columns: std::array::from_fn(|i| (seed + i as u32, i as u32)),
            ..block(u64::from(seed))
        };
        for (blocks, version, num_bytes) in [
            (
                vec![vec![block(1), block(2)], vec![block(3)]],
                1,
                16 + 3 * 128,
            ),
            (
                vec![vec![block(1), with_sources(2)], vec![block(3)]],
                2,
                16 + 3 * 136,
            ),
        ] {
            let table = BlockTable::new(blocks.iter().map(Vec::as_slice));
            assert_eq!(
                (table.version(), table.as_bytes().len()),
                (version, num_bytes)
            );
            let bytes = table.as_bytes().to_vec();
            let read = BlockTable::parse(Path::new("t"), bytes, &table.file(), [2, 1]).unwrap();
            assert_eq!(read.version(), version);
            for (object, blocks) in blocks.iter().enumerate() {
                for (number, block) in (0..).zip(blocks) {
                    assert_eq!(read.block(object, number), *block);
                    let json = serde_json::to_string(block).unwrap();
                    assert_eq!(serde_json::from_str::<Block>(&json).unwrap(), *block);
                    let num = serde_json::from_str::<serde_json::Value>(&json).unwrap();
                    let num = num["columns"].as_array().unwrap().len();
                    assert_eq!(num, if block.has_sources() { 14 } else { 13 });
                }
            }
        }
    }

    #[test]
    fn block_table_must_be_the_one_that_was_written() {
        let blocks = [vec![block(1), block(2)], vec![block(3)]];
        let table = BlockTable::new(blocks.iter().map(Vec::as_slice));
        let (file, bytes) = (table.file(), table.as_bytes().to_vec());
        let fails = |bytes: Vec<u8>, file: &BlockTableFile, word: &str| {
            let error = BlockTable::parse(Path::new("t"), bytes, file, [2, 1])
                .unwrap_err()
                .to_string();
            assert!(error.contains(word), "{error}");
        };
        fails(
            bytes[..bytes.len() - 1].to_vec(),
            &file,
            "the manifest says 400",
        );
        let mut flipped = bytes.clone();
        flipped[100] ^= 1;
        fails(flipped, &file, "BLAKE3");
        // Right hash, wrong content: a forged table.
        let mut foreign = bytes;
        foreign[0] = b'X';
        let mut lying = file;
        lying.hash = blake3::hash(&foreign).to_hex().to_string();
        fails(foreign, &lying, "must begin with");
    }
}
