//! A log of records as W&B writes it: LevelDB's log with a head of its own.
//!
//! The file begins with 7 bytes: `:W&B`, 0xBEE1 as a little-endian u16, and the version, 0. It is
//! then read in blocks of 32 KiB, of which the first includes the head. A block holds chunks: a
//! checksum (u32, little-endian), the number of bytes (u16), the kind (u8), the bytes. The checksum
//! is the CRC-32 of zlib over kind and bytes; LevelDB's own is another one. A record is one chunk
//! of the kind `FULL`, or several: `FIRST`, any number of `MIDDLE`, `LAST`. Where a block has fewer
//! than 7 bytes left, they are 0. `make peers-watch` reads such files with wandb.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crc32fast::Hasher;

use crate::error::{Error, Result};

const HEAD: [u8; 7] = [b':', b'W', b'&', b'B', 0xe1, 0xbe, 0];
const BLOCK_BYTES: usize = 32 << 10;
/// Checksum, number of bytes, kind.
const CHUNK_HEAD_BYTES: usize = 7;
/// Largest record that is read, 64 MiB.
const MAX_RECORD_BYTES: usize = 64 << 20;

const FULL: u8 = 1;
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const LAST: u8 = 4;

/// A log that is open for appending.
#[derive(Debug)]
pub(super) struct RecordLog {
    file: File,
    path: PathBuf,
    /// Bytes of the records that are whole.
    num_bytes: u64,
}

impl RecordLog {
    /// Creates a log without records.
    ///
    /// # Errors
    /// [`Error::Io`], also if the file is there.
    pub(super) fn create(path: &Path) -> Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(path);
        let file = file.map_err(Error::io(path))?;
        file.write_all_at(&HEAD, 0).map_err(Error::io(path))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            num_bytes: HEAD.len() as u64,
        })
    }

    /// Opens a log and cuts it off before the first record that `keep` refuses, or that is not
    /// whole.
    ///
    /// # Errors
    /// [`Error::Io`], also if the file is no log.
    pub(super) fn reopen(path: &Path, keep: &mut dyn FnMut(&[u8]) -> bool) -> Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).open(path);
        let mut file = file.map_err(Error::io(path))?;
        let num_bytes = read(&mut file, keep).map_err(Error::io(path))?;
        file.set_len(num_bytes).map_err(Error::io(path))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            num_bytes,
        })
    }

    /// Appends a record. After a failure, as on a full disk, the next one takes its place.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn append(&mut self, record: &[u8]) -> Result<()> {
        let bytes = chunks(self.num_bytes, record);
        self.file
            .write_all_at(&bytes, self.num_bytes)
            .map_err(Error::io(&self.path))?;
        self.num_bytes += bytes.len() as u64;
        Ok(())
    }
}

/// A record as chunks that begin at an offset of the file.
fn chunks(offset: u64, record: &[u8]) -> Vec<u8> {
    let mut place = (offset % BLOCK_BYTES as u64) as usize;
    let mut bytes = Vec::new();
    let mut rest = record;
    let mut is_first = true;
    loop {
        let left = BLOCK_BYTES - place;
        if left < CHUNK_HEAD_BYTES {
            bytes.resize(bytes.len() + left, 0);
            place = 0;
            continue;
        }
        let num_bytes = rest.len().min(left - CHUNK_HEAD_BYTES);
        let (part, later) = rest.split_at(num_bytes);
        let kind = match (is_first, later.is_empty()) {
            (true, true) => FULL,
            (true, false) => FIRST,
            (false, false) => MIDDLE,
            (false, true) => LAST,
        };
        bytes.extend(checksum(kind, part).to_le_bytes());
        bytes.extend((num_bytes as u16).to_le_bytes());
        bytes.push(kind);
        bytes.extend(part);
        if later.is_empty() {
            return bytes;
        }
        place = (place + CHUNK_HEAD_BYTES + num_bytes) % BLOCK_BYTES;
        rest = later;
        is_first = false;
    }
}

fn checksum(kind: u8, bytes: &[u8]) -> u32 {
    let mut hasher = Hasher::new();
    hasher.update(&[kind]);
    hasher.update(bytes);
    hasher.finalize()
}

/// Passes the records of a log to `keep` until it refuses one; returns the bytes up to the last one
/// that was kept.
fn read(file: &mut File, keep: &mut dyn FnMut(&[u8]) -> bool) -> io::Result<u64> {
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    let mut record = Vec::new();
    // A record's first chunk may be empty.
    let mut is_begun = false;
    let mut kept = HEAD.len() as u64;
    for number in 0_u64.. {
        block.clear();
        Read::by_ref(file)
            .take(BLOCK_BYTES as u64)
            .read_to_end(&mut block)?;
        let mut place = 0;
        if number == 0 {
            if !block.starts_with(&HEAD) {
                let reason = "expected a run of W&B, found other bytes; move the file away";
                return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
            }
            place = HEAD.len();
        }
        while BLOCK_BYTES - place >= CHUNK_HEAD_BYTES {
            let Some((kind, part)) = chunk_at(&block, place) else {
                return Ok(kept);
            };
            place += CHUNK_HEAD_BYTES + part.len();
            let continues = kind == MIDDLE || kind == LAST;
            if continues != is_begun || record.len() + part.len() > MAX_RECORD_BYTES {
                return Ok(kept);
            }
            is_begun = true;
            record.extend_from_slice(part);
            if kind == FULL || kind == LAST {
                if !keep(&record) {
                    return Ok(kept);
                }
                kept = number * BLOCK_BYTES as u64 + place as u64;
                record.clear();
                is_begun = false;
            }
        }
    }
    Ok(kept)
}

/// The kind and the bytes of a chunk; `None` if it is not whole.
fn chunk_at(block: &[u8], place: usize) -> Option<(u8, &[u8])> {
    let head = block.get(place..place + CHUNK_HEAD_BYTES)?;
    let expected = u32::from_le_bytes(head[..4].try_into().ok()?);
    let num_bytes = usize::from(u16::from_le_bytes([head[4], head[5]]));
    let (kind, begin) = (head[6], place + CHUNK_HEAD_BYTES);
    let part = block.get(begin..begin + num_bytes)?;
    let is_whole = (FULL..=LAST).contains(&kind) && checksum(kind, part) == expected;
    is_whole.then_some((kind, part))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use super::*;

    /// The records of a log.
    pub(crate) fn records(path: &Path) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        let mut file = File::open(path).expect("opens");
        let keep = &mut |record: &[u8]| {
            found.push(record.to_vec());
            true
        };
        let end = read(&mut file, keep).expect("a log");
        assert_eq!(end, file.metadata().expect("a file").len());
        found
    }

    /// Records whose ends fall everywhere around the ends of blocks.
    fn awkward() -> Vec<Vec<u8>> {
        let mut lengths = vec![1, 100_000];
        for left in 0..20 {
            lengths.extend([BLOCK_BYTES - 30, 4 + left, 3]);
        }
        let mut records = Vec::new();
        for (index, length) in lengths.into_iter().enumerate() {
            records.push(vec![index as u8; length]);
        }
        records
    }

    #[test]
    fn records_come_back_as_written() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("run.wandb");
        let mut log = RecordLog::create(&path).expect("creates");
        let written = awkward();
        for record in &written {
            log.append(record).expect("appends");
        }
        assert_eq!(records(&path), written);
        assert!(RecordLog::create(&path).is_err(), "it is there");
    }

    /// `scripts/golden/wandb_run.py` made the file with wandb's offline mode.
    #[test]
    fn a_log_of_wandb_has_the_same_bytes() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/offline.wandb");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("run.wandb");
        let mut log = RecordLog::create(&path).expect("creates");
        let records = records(Path::new(golden));
        assert!(records.len() >= 20);
        for record in records {
            log.append(&record).expect("appends");
        }
        let same = fs::read(&path).expect("reads") == fs::read(golden).expect("reads");
        assert!(same);
    }

    #[test]
    fn a_log_is_cut_where_a_record_is_refused_or_torn() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("run.wandb");
        let mut log = RecordLog::create(&path).expect("creates");
        let written = awkward();
        for record in &written {
            log.append(record).expect("appends");
        }
        drop(log);
        let whole = fs::metadata(&path).expect("a file").len();
        let file = OpenOptions::new().write(true).open(&path).expect("opens");
        file.set_len(whole - 1).expect("cuts");
        let mut log = RecordLog::reopen(&path, &mut |_| true).expect("opens");
        log.append(b"new").expect("appends");
        let mut expected = written.clone();
        expected.pop();
        expected.push(b"new".to_vec());
        assert_eq!(records(&path), expected);

        let refused = written[2].clone();
        let mut log = RecordLog::reopen(&path, &mut |record| record != refused).expect("opens");
        log.append(b"new").expect("appends");
        let expected = [&written[0][..], &written[1], b"new"];
        assert_eq!(records(&path), expected);
    }

    #[test]
    fn other_files_are_left_alone() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("run.wandb");
        fs::write(&path, "something else").expect("writes");
        assert!(RecordLog::reopen(&path, &mut |_| true).is_err());
        assert_eq!(fs::read(&path).expect("reads"), b"something else");
    }
}
