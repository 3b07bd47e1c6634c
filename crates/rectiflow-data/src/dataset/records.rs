//! Records of rows, decoded from blocks of text.

use std::path::Path;

use bytes::Bytes;

use crate::{
    dataset::Dataset,
    error::{Error, Result},
    format::{manifest::Split, record::Record, text_shard::decode_block},
    remote::request::ObjectFile,
};

impl Dataset {
    /// The records of a bucket's live rows, in row order. Empty if the bucket has none.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Remote`]; [`Error::Damaged`] if text does not match its checksum;
    /// [`Error::Malformed`] if a file contradicts the manifest or the block table.
    pub fn records(&self, split: Split, bucket: u32) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        for span in self.index.spans(split, bucket) {
            records.extend(span.live_of(self.object_records(span.object)?));
        }
        Ok(records)
    }

    /// The records of all rows of an object, deleted ones included.
    pub(crate) fn object_records(&self, object: usize) -> Result<Vec<Record>> {
        let entry = &self.manifest.objects[object];
        if self.remote.is_none() {
            // The manifest is untrusted: compare the length that it states with the file's own.
            let path = self.root.join(&entry.text);
            let found = std::fs::metadata(&path).map_err(Error::io(&path))?.len();
            check_len(&path, found, entry.text_bytes)?;
        }
        let blocks = self
            .start(ObjectFile::Text, object, 0..entry.num_blocks())?
            .wait()?;
        self.decode_text(object, 0, &blocks)
    }

    /// The records of the blocks of one text request, deleted rows included.
    pub(crate) fn decode_text(
        &self,
        object: usize,
        first_block: u32,
        blocks: &[Bytes],
    ) -> Result<Vec<Record>> {
        let entry = &self.manifest.objects[object];
        let mut records = Vec::new();
        for (block, bytes) in (first_block..).zip(blocks) {
            let columns = self.blocks.block(object, block).columns;
            let num_rows = self.block_rows(object, block) as usize;
            let decoded = decode_block(bytes, &columns, num_rows);
            records.extend(decoded.map_err(|reason| Error::Malformed {
                path: self.root.join(&entry.text),
                kind: "text file",
                reason,
            })?);
        }
        Ok(records)
    }
}

pub(crate) fn check_len(path: &Path, found: u64, expected: u64) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let reason = format!("it has {found} bytes, the manifest says {expected}");
    Err(Error::Malformed {
        path: path.into(),
        kind: "file of the data set",
        reason,
    })
}
