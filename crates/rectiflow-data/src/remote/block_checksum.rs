//! The checksum of a block: its bytes are compared with it wherever they come from.

use std::path::Path;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

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
        self.compare(xxh3_64(block), path, start)
    }

    fn compare(&self, found: u64, path: &Path, start: u64) -> Result<()> {
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

/// Verifies consecutive blocks of a file whose bytes come piece by piece, each while it is in the
/// processor's cache.
pub(crate) struct BlockVerifier<'a> {
    path: &'a Path,
    /// The blocks that have not ended.
    blocks: &'a [BlockChecksum],
    /// Where the first of them begins in the file.
    start: u64,
    /// Bytes of it that have come.
    num_come: u64,
    hasher: Xxh3,
}

impl<'a> BlockVerifier<'a> {
    /// Verifies `blocks`, the first of which begins at `start` of the file at `path`.
    pub(crate) fn new(blocks: &'a [BlockChecksum], path: &'a Path, start: u64) -> Self {
        Self {
            path,
            blocks,
            start,
            num_come: 0,
            hasher: Xxh3::new(),
        }
    }

    /// Takes the next bytes, all of one block.
    ///
    /// # Errors
    /// [`Error::Damaged`] at the end of a block whose checksum differs.
    ///
    /// # Panics
    /// If the bytes extend past the block.
    pub(crate) fn update(&mut self, bytes: &[u8]) -> Result<()> {
        let (block, rest) = self.blocks.split_first().expect("a block has not ended");
        self.hasher.update(bytes);
        self.num_come += bytes.len() as u64;
        assert!(self.num_come <= block.len, "the bytes are of one block");
        if self.num_come < block.len {
            return Ok(());
        }
        block.compare(self.hasher.digest(), self.path, self.start)?;
        self.blocks = rest;
        self.start += block.len;
        self.num_come = 0;
        self.hasher.reset();
        Ok(())
    }
}

/// Bytes of blocks.
pub(crate) fn num_bytes(blocks: &[BlockChecksum]) -> u64 {
    blocks.iter().map(|block| block.len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_verified_as_their_block_is_whatever_their_length() {
        let bytes: Vec<u8> = (0..3000_u32).map(|at| (at * at / 7) as u8).collect();
        let blocks = [
            BlockChecksum::of(&bytes[..2000]),
            BlockChecksum::of(&bytes[2000..]),
        ];
        for piece_len in [1, 100, 250, 1000] {
            let mut verifier = BlockVerifier::new(&blocks, Path::new("p"), 512);
            for piece in bytes.chunks(piece_len) {
                verifier.update(piece).unwrap();
            }
            // One wrong bit, in the second block.
            let mut wrong = bytes.clone();
            wrong[2500] ^= 1;
            let mut verifier = BlockVerifier::new(&blocks, Path::new("p"), 512);
            let error = wrong
                .chunks(piece_len)
                .find_map(|piece| verifier.update(piece).err());
            assert!(matches!(error, Some(Error::Damaged { range, .. }) if range == (2512..3512)));
        }
    }
}
