//! Verification of all bytes of an object.

use std::{fs::File, ops::Range, os::unix::fs::FileExt};

use bytes::Bytes;
use half::f16;

use crate::{
    dataset::{
        Dataset,
        latents::{BLOCKS_A_REQUEST, decode_row},
        records::check_len,
    },
    error::{Error, Result},
    format::{
        block_table::BLOCK_ROWS, manifest::LATENTS_OFFSET, record::Record, shard::check_header,
        text_shard::encode,
    },
    remote::{
        Remote,
        request::{ObjectFile, coalesce},
        runtime,
    },
};

impl Dataset {
    /// Checks that every byte of an object's latents and text is what was written, and that every
    /// latent is a finite number, for `inspect --verify`.
    ///
    /// # Errors
    /// As [`Dataset::read_latents`] and [`Dataset::records`]; [`Error::Malformed`] if the text file
    /// has another footer than this program writes for its rows.
    pub fn verify_object(&self, object: usize) -> Result<()> {
        let entry = &self.manifest.objects[object];
        match &self.remote {
            None => drop(self.latents_file(object)?),
            Some(remote) => self.check_remote(remote, object)?,
        }
        for run in coalesce(0..entry.num_blocks(), BLOCKS_A_REQUEST) {
            let first = run.start;
            let blocks = self.start(ObjectFile::Latents, object, run)?.wait()?;
            for (block, bytes) in (first..).zip(&blocks) {
                self.check_numbers(object, block, bytes)?;
            }
        }
        let records = self.object_records(object)?;
        self.check_around_text(object, &records)
    }

    /// Checks that all latents of a block are finite.
    fn check_numbers(&self, object: usize, block: u32, bytes: &Bytes) -> Result<()> {
        let row_bytes = self
            .manifest
            .row_bytes(self.manifest.objects[object].bucket) as usize;
        let mut latents = vec![f16::ZERO; row_bytes / size_of::<f16>()];
        for (row, bytes) in (block * BLOCK_ROWS..).zip(bytes.chunks_exact(row_bytes)) {
            if !decode_row(bytes, &mut latents) {
                self.check_finite(object, row, &latents)?;
            }
        }
        Ok(())
    }

    /// Checks the bytes of a text file that no checksum covers: those before the first block, and
    /// the footer. The same rows always encode to the same bytes, so there is only one right
    /// footer.
    fn check_around_text(&self, object: usize, records: &[Record]) -> Result<()> {
        let entry = &self.manifest.objects[object];
        let expected = encode(records).map_err(|error| self.other_text(object, &error))?;
        let first = self.blocks.block(object, 0);
        let last = self.blocks.block(object, entry.num_blocks() - 1);
        let end = last.text_offset + last.text_bytes();
        for range in [0..first.text_offset, end..entry.text_bytes] {
            let found = self.text_bytes(object, range.clone())?;
            let place = range.start as usize..range.end as usize;
            if expected.get(place) != Some(&found[..]) {
                let Range { start, end } = range;
                let reason = format!(
                    "its bytes {start} to {end} are not those that this program writes around \
                     these rows: they are damaged, or another version wrote them; the rows \
                     themselves match their checksums"
                );
                return Err(self.other_text(object, &reason));
            }
        }
        Ok(())
    }

    fn other_text(&self, object: usize, reason: &dyn std::fmt::Display) -> Error {
        Error::Malformed {
            path: self.root.join(&self.manifest.objects[object].text),
            kind: "text file",
            reason: reason.to_string(),
        }
    }

    /// Reads bytes of an object's text file, unverified.
    fn text_bytes(&self, object: usize, range: Range<u64>) -> Result<Bytes> {
        let name = &self.manifest.objects[object].text;
        if let Some(remote) = &self.remote {
            return runtime().block_on(remote.read_range(name, range, Ok));
        }
        let path = self.root.join(name);
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let file = File::open(&path).map_err(Error::io(&path))?;
        file.read_exact_at(&mut bytes, range.start)
            .map_err(Error::io(&path))?;
        Ok(bytes.into())
    }

    /// Checks the lengths of an object's files and the header of its latents.
    fn check_remote(&self, remote: &Remote, object: usize) -> Result<()> {
        let entry = &self.manifest.objects[object];
        let latents = self.root.join(&entry.latents);
        let text = self.root.join(&entry.text);
        let header =
            runtime().block_on(remote.read_range(&entry.latents, 0..LATENTS_OFFSET, Ok))?;
        let shape = self.latent_shape(entry.bucket);
        check_header(&latents, &header, entry.rows, shape)?;
        let latents_len = runtime().block_on(remote.len(&entry.latents))?;
        check_len(&latents, latents_len, self.manifest.latents_bytes(entry))?;
        let text_len = runtime().block_on(remote.len(&entry.text))?;
        check_len(&text, text_len, entry.text_bytes)
    }
}
