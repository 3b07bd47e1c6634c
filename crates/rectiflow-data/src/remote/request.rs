//! Requests for whole blocks: one range of an object covers consecutive blocks, each verified by
//! its checksum on arrival.
//!
//! A request knows its blocks, their place and their checksums. `dataset::fetch` reads it from a
//! disk or a store.

use std::{ops::Range, path::PathBuf};

use bytes::Bytes;

use crate::{
    error::Result,
    remote::block_checksum::{BlockChecksum, BlockVerifier, num_bytes},
};

/// One of an object's two files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum ObjectFile {
    /// The safetensors file.
    Latents,
    /// The Parquet file.
    Text,
}

/// Consecutive blocks of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) file: ObjectFile,
    /// Index of the object in the manifest.
    pub(crate) object: usize,
    /// Number of the first block in it.
    pub(crate) first: u32,
    /// Name in the data set.
    pub(crate) name: String,
    /// Path or URL, for messages.
    pub(crate) path: PathBuf,
    pub(crate) start: u64,
    /// The step that needs it, for the cache, which keeps blocks that are needed again soon after.
    /// 0 if unknown.
    pub(crate) step: u64,
    /// The checksum of each block.
    pub(crate) blocks: Vec<BlockChecksum>,
}

impl Request {
    pub(crate) fn range(&self) -> Range<u64> {
        self.start..self.start + num_bytes(&self.blocks)
    }

    /// Splits `bytes` into blocks and verifies each.
    ///
    /// # Errors
    /// [`Error::Damaged`] for the first block whose checksum differs.
    pub(crate) fn verify(&self, mut bytes: Bytes) -> Result<Vec<Bytes>> {
        let mut start = self.start;
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for checksum in &self.blocks {
            let block = bytes.split_to(checksum.len as usize);
            checksum.verify(&block, &self.path, start)?;
            start += checksum.len;
            blocks.push(block);
        }
        Ok(blocks)
    }

    /// Verifies the bytes of its blocks as they come.
    pub(crate) fn verifier(&self) -> BlockVerifier<'_> {
        BlockVerifier::new(&self.blocks, &self.path, self.start)
    }

    /// The request for some of its blocks.
    pub(crate) fn part_of(&self, blocks: Range<u32>) -> Self {
        let range = blocks.start as usize..blocks.end as usize;
        Self {
            first: self.first + blocks.start,
            start: self.start + num_bytes(&self.blocks[..range.start]),
            blocks: self.blocks[range].to_vec(),
            ..self.clone()
        }
    }
}

/// Groups sorted block numbers of one object into runs of consecutive ones, each of at most
/// `longest` blocks.
pub(crate) fn coalesce(blocks: impl IntoIterator<Item = u32>, longest: u32) -> Vec<Range<u32>> {
    let mut runs: Vec<Range<u32>> = Vec::new();
    for block in blocks {
        match runs.last_mut() {
            Some(run) if run.end == block && run.end - run.start < longest => run.end += 1,
            _ => runs.push(block..block + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn neighbours_are_read_together() {
        assert_eq!(coalesce([0, 1, 2, 5, 6, 9], 8), [0..3, 5..7, 9..10]);
        assert_eq!(coalesce(0..5, 2), [0..2, 2..4, 4..5]);
        assert!(coalesce([], 2).is_empty());
    }

    #[test]
    fn blocks_are_told_apart_and_verified_one_by_one() {
        let bytes = Bytes::from_static(b"first, second");
        let blocks = vec![BlockChecksum::of(b"first"), BlockChecksum::of(b", second")];
        let (file, object, first) = (ObjectFile::Text, 0, 5);
        let request = Request {
            file,
            object,
            first,
            name: "n".into(),
            path: "p/n".into(),
            start: 100,
            step: 0,
            blocks,
        };
        assert_eq!(request.range(), 100..113);
        assert_eq!(
            request.verify(bytes.clone()).unwrap(),
            ["first", ", second"]
        );
        let second = request.part_of(1..2);
        assert_eq!((second.first, second.range()), (6, 105..113));
        assert_eq!(second.verify(bytes.slice(5..)).unwrap(), [", second"]);
        let error = request
            .verify(Bytes::from_static(b"first, sEcond"))
            .unwrap_err();
        assert!(matches!(error, Error::Damaged { range, .. } if range == (105..113)));
    }
}
