//! A file that holds many samples, on a disk or at a URL: its length, its version and ranges of its
//! bytes.
//!
//! At a URL short ranges are read in blocks of 64 KiB, some of which are kept: the header of a
//! member, its text and the next header then cost one request.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::UNIX_EPOCH,
};

use bytes::{Bytes, BytesMut};

use crate::{
    error::{Error, Result},
    remote::{Remote, runtime},
};

/// Bytes of a block that short ranges at a URL are read in.
const BLOCK_BYTES: u64 = 64 << 10;
/// Blocks that are kept, of all shards together: 32 MiB.
const NUM_BLOCKS: usize = 512;

/// A file with samples.
#[derive(Debug)]
pub(crate) struct Shard {
    /// Relative to what is prepared, with `/` between its parts.
    pub(crate) name: String,
    /// Its length.
    pub(crate) bytes: u64,
    /// Changes when its contents do: its modification time, at a URL with its tag.
    pub(crate) version: u128,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Local(PathBuf),
    Far { remote: Remote, blocks: Blocks },
}

impl Shard {
    /// The shard `name`, which is the file at `path`.
    ///
    /// # Errors
    /// Those of the system; one that says so for anything but a regular file.
    pub(crate) fn local(name: String, path: PathBuf) -> io::Result<Self> {
        let metadata = fs::metadata(&path)?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        let since = metadata.modified()?.duration_since(UNIX_EPOCH);
        Ok(Self {
            name,
            bytes: metadata.len(),
            version: since.unwrap_or_default().as_nanos(),
            place: Place::Local(path),
        })
    }

    /// The shard `name` below the prefix of `remote`.
    pub(crate) fn far(
        name: String,
        bytes: u64,
        version: u128,
        remote: Remote,
        blocks: Blocks,
    ) -> Self {
        let place = Place::Far { remote, blocks };
        Self {
            name,
            bytes,
            version,
            place,
        }
    }

    /// Whether each read is a request.
    pub(crate) fn is_far(&self) -> bool {
        matches!(self.place, Place::Far { .. })
    }

    /// Reads the bytes `range`.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Remote`]; [`Error::Malformed`] for a range beyond its end.
    pub(crate) fn read(&self, range: Range<u64>) -> Result<Bytes> {
        if range.end > self.bytes || range.start > range.end {
            return Err(self.malformed(format!(
                "bytes {}..{} are asked for, and it has {}",
                range.start, range.end, self.bytes
            )));
        }
        match &self.place {
            Place::Local(path) => {
                let mut bytes = vec![0; (range.end - range.start) as usize];
                let file = File::open(path).map_err(Error::io(path))?;
                file.read_exact_at(&mut bytes, range.start)
                    .map_err(Error::io(path))?;
                Ok(bytes.into())
            }
            Place::Far { remote, .. } if range.end - range.start > BLOCK_BYTES => {
                runtime().block_on(remote.read_range(&self.name, range, Ok))
            }
            Place::Far { remote, blocks } => self.read_blocks(remote, blocks, range),
        }
    }

    /// Reads a short range at a URL by its blocks.
    fn read_blocks(&self, remote: &Remote, blocks: &Blocks, range: Range<u64>) -> Result<Bytes> {
        let mut bytes = BytesMut::with_capacity((range.end - range.start) as usize);
        let mut at = range.start;
        while at < range.end {
            let number = at / BLOCK_BYTES;
            let start = number * BLOCK_BYTES;
            let block = match blocks.get(&self.name, number) {
                Some(block) => block,
                None => {
                    let whole = start..(start + BLOCK_BYTES).min(self.bytes);
                    let block = runtime().block_on(remote.read_range(&self.name, whole, Ok))?;
                    blocks.put(&self.name, number, block.clone());
                    block
                }
            };
            let end = range.end.min(start + BLOCK_BYTES);
            bytes.extend_from_slice(&block[(at - start) as usize..(end - start) as usize]);
            at = end;
        }
        Ok(bytes.freeze())
    }

    /// An error about the contents of the shard.
    pub(crate) fn malformed(&self, reason: String) -> Error {
        Error::Malformed {
            path: PathBuf::from(&self.name),
            kind: "shard",
            reason,
        }
    }
}

/// The blocks that were read last, of all shards of a source. Clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Blocks(Arc<Mutex<VecDeque<Block>>>);

#[derive(Debug)]
struct Block {
    shard: String,
    number: u64,
    bytes: Bytes,
}

impl Blocks {
    fn get(&self, shard: &str, number: u64) -> Option<Bytes> {
        let blocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |block: &&Block| block.number == number && block.shard == shard;
        blocks
            .iter()
            .rev()
            .find(is_it)
            .map(|block| block.bytes.clone())
    }

    fn put(&self, shard: &str, number: u64, bytes: Bytes) {
        let mut blocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if blocks.len() == NUM_BLOCKS {
            blocks.pop_front();
        }
        // Buffers of requests are shared: a copy lets go of its own.
        blocks.push_back(Block {
            shard: shard.to_owned(),
            number,
            bytes: Bytes::copy_from_slice(&bytes),
        });
    }
}
