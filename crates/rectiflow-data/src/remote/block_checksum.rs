//! The checksum of a block: its bytes are compared with it wherever they come from.

use std::path::Path;

use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Result};

/// Length and XXH3-64 of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlockChecksum {
    /// Bytes.
    pub(crate) len: u64,
    pub(crate) xxh3: u64,
}

impl BlockChecksum {
    /// The checksum of `block`.
    #[cfg(test)]
    pub(crate) fn of(block: &[u8]) -> Self {
        Self {
            len: block.len() as u64,
            xxh3: xxh3_64(block),
        }
    }

    /// Whether `block` is what was written.
    pub(crate) fn matches(&self, block: &[u8]) -> bool {
        block.len() as u64 == self.len && xxh3_64(block) == self.xxh3
    }

    /// Verifies a block of this length that begins at `start` of the file at `path`.
    ///
    /// # Errors
    /// [`Error::Damaged`] if its checksum differs.
    pub(crate) fn verify(&self, block: &[u8], path: &Path, start: u64) -> Result<()> {
        let found = xxh3_64(block);
        if found == self.xxh3 {
            return Ok(());
        }
        Err(Error::Damaged {
            path: path.to_owned(),
            range: start..start + self.len,
            expected: self.xxh3,
            found,
        })
    }
}

/// Bytes of blocks.
pub(crate) fn num_bytes(blocks: &[BlockChecksum]) -> u64 {
    blocks.iter().map(|block| block.len).sum()
}
