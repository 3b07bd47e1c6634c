//! One object: rows of one bucket as a safetensors file of latents and a Parquet file of text, in
//! the same order.
//!
//! The latents file is one tensor `latents`, `[n, C, h, w]`, in F16. Its header is padded to a
//! fixed 512 bytes, so that row r begins at 512 + r * row_bytes and a writer need not know n before
//! the end. `text_shard` writes the text; the manifest lists the objects of a data set. The whole
//! format:
//!
#![doc = include_str!("../../../../docs/format.md")]

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use half::f16;
use parquet::file::metadata::RowGroupMetaData;
use serde::Deserialize;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::{
    durable::DurableFile,
    error::{Error, Result},
    format::{
        block_table::{BLOCK_ROWS, Block},
        manifest::LATENTS_OFFSET,
        record::Record,
        text_shard::{TextWriter, group_table, has_sources},
    },
};

/// Writes one object, row by row. Nothing is visible under the final names before
/// [`ObjectWriter::finish`].
pub struct ObjectWriter {
    latents: DurableFile,
    root: PathBuf,
    /// Name of the text file.
    text: String,
    shape: [usize; 3],
    rows: u32,
    hasher: Xxh3,
    latents_xxh3: Vec<u64>,
    /// Kept to the end, because one of them says whether the file has sources of captions.
    records: Vec<Record>,
}

/// The parts of a finished object for the manifest and the block table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// Rows written.
    pub rows: u32,
    /// Length of the text file.
    pub text_bytes: u64,
    /// The object's blocks.
    pub blocks: Vec<Block>,
}

impl std::fmt::Debug for ObjectWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ObjectWriter")
            .field("text", &self.text)
            .field("rows", &self.rows)
            .finish_non_exhaustive()
    }
}

impl ObjectWriter {
    /// Begins an object of latents `[C, h, w]` in the data set at `root`. `latents` and `text` are
    /// the names for the manifest, for example `latents/1024x1024-00000.safetensors`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(root: &Path, latents: &str, text: &str, shape: [usize; 3]) -> Result<Self> {
        let latents_path = root.join(latents);
        for path in [&latents_path, &root.join(text)] {
            let folder = path
                .parent()
                .expect("names of objects are inside the data set");
            fs::create_dir_all(folder).map_err(Error::io(folder))?;
        }
        let mut latents = DurableFile::create(&latents_path)?;
        latents
            .write_all(&[b' '; LATENTS_OFFSET as usize])
            .map_err(latents.error())?;
        Ok(Self {
            latents,
            root: root.to_owned(),
            text: text.to_owned(),
            shape,
            rows: 0,
            hasher: Xxh3::new(),
            latents_xxh3: Vec::new(),
            records: Vec::new(),
        })
    }

    /// Rows pushed so far.
    pub fn rows(&self) -> u32 {
        self.rows
    }

    /// Appends a row: its latents, `[C, h, w]`, unscaled, and its record.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// If `latents` is not of the object's shape or not finite: the caller must reject such a row.
    pub fn push(&mut self, latents: &[f16], record: Record) -> Result<()> {
        assert_eq!(
            latents.len(),
            self.shape.iter().product::<usize>(),
            "latents of shape {:?}",
            self.shape
        );
        assert!(
            latents.iter().all(|x| x.is_finite()),
            "the latents of {} are not finite",
            record.source
        );
        let bytes: Vec<u8> = latents.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.latents
            .write_all(&bytes)
            .map_err(self.latents.error())?;
        self.hasher.update(&bytes);
        self.rows += 1;
        self.records.push(record);
        if self.rows.is_multiple_of(BLOCK_ROWS) {
            self.end_block();
        }
        Ok(())
    }

    /// Completes both files and moves them to their final names, the latents first.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// If no row was pushed.
    pub fn finish(mut self) -> Result<Finished> {
        assert!(self.rows > 0, "an object has at least one row");
        if !self.rows.is_multiple_of(BLOCK_ROWS) {
            self.end_block();
        }
        let header = latents_header(self.rows, self.shape);
        let mut file = self.latents.flushed()?;
        file.seek(SeekFrom::Start(0))
            .and_then(|_| file.write_all(&header))
            .map_err(self.latents.error())?;
        self.latents.commit()?;
        let (text_bytes, text) = write_text(&self.root, &self.text, &self.records)?;
        let blocks = self.latents_xxh3.into_iter().zip(text);
        let blocks = blocks
            .map(|(latents_xxh3, text)| Block {
                latents_xxh3,
                ..text
            })
            .collect();
        Ok(Finished {
            rows: self.rows,
            text_bytes,
            blocks,
        })
    }

    fn end_block(&mut self) {
        self.latents_xxh3.push(self.hasher.digest());
        self.hasher.reset();
    }
}

/// Writes `records` as the text file `text` of an object whose latents already exist. Returns the
/// file's length and its blocks; their latents checksums are 0, and the caller fills them in.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn write_text(root: &Path, text: &str, records: &[Record]) -> Result<(u64, Vec<Block>)> {
    let path = root.join(text);
    let file = DurableFile::create(&path)?;
    let mut writer = TextWriter::new(file, has_sources(records)).map_err(parquet_error(&path))?;
    for block in records.chunks(BLOCK_ROWS as usize) {
        writer.write_block(block).map_err(parquet_error(&path))?;
    }
    finish_text(writer, &path)
}

/// Completes a text file and reads it back for the checksums of its row groups, so that they are
/// those of the bytes on the disk.
fn finish_text(writer: TextWriter<DurableFile>, path: &Path) -> Result<(u64, Vec<Block>)> {
    let (groups, mut file) = writer.finish().map_err(parquet_error(path))?;
    let reader = file.flushed()?;
    let text_bytes = reader.metadata().map_err(Error::io(path))?.len();
    let mut blocks = Vec::with_capacity(groups.len());
    for group in &groups {
        blocks.push(text_block(reader, group).map_err(Error::io(path))?);
    }
    file.commit()?;
    Ok((text_bytes, blocks))
}

/// The block of a row group, with the checksum of the bytes in `file`. The checksum of its latents
/// is 0.
fn text_block(mut file: &File, group: &RowGroupMetaData) -> io::Result<Block> {
    let (text_offset, columns) = group_table(group);
    let mut block = Block {
        latents_xxh3: 0,
        text_offset,
        text_xxh3: 0,
        columns,
    };
    let mut bytes = vec![0; block.text_bytes() as usize];
    file.seek(SeekFrom::Start(text_offset))?;
    file.read_exact(&mut bytes)?;
    block.text_xxh3 = xxh3_64(&bytes);
    Ok(block)
}

/// Maps an error of the Parquet writer, which can only come from its sink.
fn parquet_error(path: &Path) -> impl FnOnce(parquet::errors::ParquetError) -> Error {
    let path = path.to_owned();
    |error| Error::Io {
        path,
        source: std::io::Error::other(error),
    }
}

/// The first 512 bytes of a latents file: the length word, and a header padded with spaces, which
/// safetensors allows.
fn latents_header(rows: u32, [channels, height, width]: [usize; 3]) -> Vec<u8> {
    let bytes = rows as usize * channels * height * width * 2;
    let json = format!(
        "{{\"latents\":{{\"dtype\":\"F16\",\"shape\":[{rows},{channels},{height},{width}],\
         \"data_offsets\":[0,{bytes}]}}}}"
    );
    let len = LATENTS_OFFSET - 8;
    let mut header = Vec::from(len.to_le_bytes());
    header.extend(json.as_bytes());
    header.resize(LATENTS_OFFSET as usize, b' ');
    header
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LatentsHeader {
    latents: LatentsTensor,
}

#[derive(Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct LatentsTensor {
    dtype: String,
    shape: [u64; 4],
    data_offsets: [u64; 2],
}

impl LatentsTensor {
    /// The tensor of `rows` latents `[C, h, w]`.
    fn of(rows: u32, shape: [usize; 3]) -> Self {
        let [channels, height, width] = shape.map(|n| n as u64);
        Self {
            dtype: "F16".to_owned(),
            shape: [u64::from(rows), channels, height, width],
            data_offsets: [0, data_bytes(rows, shape)],
        }
    }
}

/// Checks that an open latents file holds exactly `rows` latents `[C, h, w]`.
///
/// # Errors
/// [`Error::Io`], or [`Error::Malformed`] with the first difference.
pub(crate) fn check_latents(
    path: &Path,
    mut file: &File,
    rows: u32,
    shape: [usize; 3],
) -> Result<()> {
    let expected = LATENTS_OFFSET + data_bytes(rows, shape);
    let len = file.metadata().map_err(Error::io(path))?.len();
    if len != expected {
        let reason = format!("it has {len} bytes, {rows} rows of {shape:?} need {expected}");
        return Err(malformed(path, reason));
    }
    let mut header = [0; LATENTS_OFFSET as usize];
    file.seek(SeekFrom::Start(0))
        .and_then(|_| file.read_exact(&mut header))
        .map_err(Error::io(path))?;
    check_header(path, &header, rows, shape)
}

/// Checks the first 512 bytes of a latents file of `rows` latents `[C, h, w]`.
///
/// # Errors
/// [`Error::Malformed`] with the first difference.
///
/// # Panics
/// If `header` is shorter than 8 bytes.
pub(crate) fn check_header(path: &Path, header: &[u8], rows: u32, shape: [usize; 3]) -> Result<()> {
    let header_bytes = LATENTS_OFFSET - 8;
    if header[..8] != header_bytes.to_le_bytes() {
        let reason = format!("its header is not {header_bytes} bytes long");
        return Err(malformed(path, reason));
    }
    let found = match serde_json::from_slice::<LatentsHeader>(&header[8..]) {
        Ok(header) => header.latents,
        Err(error) => return Err(malformed(path, format!("its header: {error}"))),
    };
    let expected = LatentsTensor::of(rows, shape);
    if found != expected {
        let reason = format!(
            "it holds {} {:?} at {:?}, expected F16 {:?} at {:?}",
            found.dtype, found.shape, found.data_offsets, expected.shape, expected.data_offsets
        );
        return Err(malformed(path, reason));
    }
    Ok(())
}

/// Bytes of `rows` latents `[C, h, w]`.
fn data_bytes(rows: u32, shape: [usize; 3]) -> u64 {
    let [channels, height, width] = shape.map(|n| n as u64);
    u64::from(rows) * channels * height * width * 2
}

fn malformed(path: &Path, reason: String) -> Error {
    Error::Malformed {
        path: path.into(),
        kind: "latents file",
        reason,
    }
}
