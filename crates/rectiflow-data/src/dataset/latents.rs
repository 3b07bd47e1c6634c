//! Latents of rows: from a file on a disk, from the disk cache, or over the network into memory.
//!
//! On a disk the first read of a block reads all of it and verifies its checksum; later reads take
//! only the requested rows. From a URL blocks are always read and verified whole, and kept in
//! memory up to a limit.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{Arc, PoisonError},
};

use bytes::Bytes;
use half::f16;
use zerocopy::IntoBytes;

use crate::{
    cache::DatasetCache,
    dataset::{
        Dataset,
        fetch::read_verified_row,
        index::{BlockKey, ObjectRow, blocks_of},
    },
    error::{Error, Result},
    format::{
        block_table::BLOCK_ROWS,
        manifest::{LATENTS_OFFSET, Split},
        shard::check_latents,
    },
    remote::request::{ObjectFile, Request, coalesce},
};

/// Files kept open: opening one is cheap on a local disk and a round trip on a shared one.
const MAX_OPEN_FILES: usize = 256;
/// Largest number of consecutive blocks in one random-access request: 32 MiB at 1024 x 1024.
pub(crate) const BLOCKS_A_REQUEST: u32 = 8;

impl Dataset {
    /// Reads the latents of `rows` (numbers of live rows) into `out`, `[rows, C, h, w]`, unscaled.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Remote`]; [`Error::Damaged`] if a block does not match its
    /// checksum; [`Error::Malformed`] if a file contradicts the manifest or a latent is not finite
    /// (the error names the sample); [`Error::Invalid`] if a row or the bucket does not exist.
    ///
    /// # Panics
    /// If the length of `out` does not fit `rows`.
    pub fn read_latents(
        &self,
        split: Split,
        bucket: u32,
        rows: &[u64],
        out: &mut [f16],
    ) -> Result<()> {
        let mut located = Vec::with_capacity(rows.len());
        for &row in rows {
            located.push(self.locate(split, bucket, row)?);
        }
        let row_len = if rows.is_empty() {
            1
        } else {
            self.latent_shape(bucket).iter().product()
        };
        assert_eq!(
            out.len(),
            rows.len() * row_len,
            "room for {} rows of {row_len} numbers",
            rows.len()
        );
        if self.remote.is_some() {
            return self.read_remote(&located, out, row_len);
        }
        for (&(object, row), out) in located.iter().zip(out.chunks_exact_mut(row_len)) {
            self.read_row(object, row, out)?;
        }
        Ok(())
    }

    /// Reads rows of a remote data set. Blocks that are not in memory are requested together.
    fn read_remote(&self, rows: &[ObjectRow], out: &mut [f16], row_len: usize) -> Result<()> {
        let blocks = blocks_of(rows.iter().copied());
        let mut found = HashMap::new();
        while found.len() < blocks.len() {
            let claim = self.memory.claim(&blocks, &mut found);
            self.fetch_into_memory(&claim.keys, &mut found)?;
        }
        for (&(object, row), out) in rows.iter().zip(out.chunks_exact_mut(row_len)) {
            self.copy_row(object, row, &found[&(object, row / BLOCK_ROWS)], out)?;
        }
        Ok(())
    }

    /// Fetches the latents of blocks, and adds them to the memory and to `found`.
    fn fetch_into_memory(
        &self,
        blocks: &[BlockKey],
        found: &mut HashMap<BlockKey, Bytes>,
    ) -> Result<()> {
        let mut by_object = BTreeMap::<usize, Vec<u32>>::new();
        for &(object, block) in blocks {
            by_object.entry(object).or_default().push(block);
        }
        // All requests start before the first is waited for.
        let mut tickets = Vec::new();
        for (object, blocks) in by_object {
            for run in coalesce(blocks, BLOCKS_A_REQUEST) {
                let first = run.start;
                tickets.push((object, first, self.start(ObjectFile::Latents, object, run)?));
            }
        }
        for (object, first, mut ticket) in tickets {
            for (block, bytes) in (first..).zip(ticket.wait()?) {
                self.memory.insert((object, block), bytes.clone());
                found.insert((object, block), bytes);
            }
        }
        Ok(())
    }

    /// Reads row `row` of an object if its block is on a disk, and returns whether it is. The first
    /// read of a block reads and verifies all of it.
    pub(crate) fn read_row_on_disk(
        &self,
        object: usize,
        row: u32,
        out: &mut [f16],
    ) -> Result<bool> {
        if self.remote.is_none() {
            self.read_row(object, row, out)?;
            return Ok(true);
        }
        let Some(cache) = &self.cache else {
            return Ok(false);
        };
        let block = row / BLOCK_ROWS;
        let request = self.request(ObjectFile::Latents, object, block..block + 1)?;
        if self.verified.contains(object, block) {
            return self.read_cached_row(cache, &request, row, out);
        }
        let Some(bytes) = cache.get(&request, 0) else {
            return Ok(false);
        };
        self.verified.insert(object, block);
        self.copy_row(object, row, &bytes, out)?;
        Ok(true)
    }

    /// Reads one row of the verified block of `request`, if the block is still in the cache.
    fn read_cached_row(
        &self,
        cache: &DatasetCache,
        request: &Request,
        row: u32,
        out: &mut [f16],
    ) -> Result<bool> {
        let start = u64::from(row % BLOCK_ROWS) * size_of_val(out) as u64;
        if !cache.get_part(request, start, out.as_mut_bytes()) {
            return Ok(false);
        }
        self.finish_row(request.object, row, out)?;
        Ok(true)
    }

    /// Reads row `row` of an object on a disk.
    pub(crate) fn read_row(&self, object: usize, row: u32, out: &mut [f16]) -> Result<()> {
        let file = self.latents_file(object)?;
        let block = row / BLOCK_ROWS;
        if !self.verified.contains(object, block) {
            let request = self.request(ObjectFile::Latents, object, block..block + 1)?;
            let mut scratch = self.scratch.take_filled(size_of_val(out));
            let bytes = out.as_mut_bytes();
            read_verified_row(&file, &request, row % BLOCK_ROWS, &mut scratch, bytes)?;
            self.verified.insert(object, block);
            return self.finish_row(object, row, out);
        }
        let offset = LATENTS_OFFSET + u64::from(row) * size_of_val(out) as u64;
        file.read_exact_at(out.as_mut_bytes(), offset)
            .map_err(Error::io(self.latents_path(object)))?;
        self.finish_row(object, row, out)
    }

    /// Decodes one row from its block's bytes.
    pub(crate) fn copy_row(
        &self,
        object: usize,
        row: u32,
        block: &[u8],
        out: &mut [f16],
    ) -> Result<()> {
        let start = (row % BLOCK_ROWS) as usize * size_of_val(out);
        let bytes = &block[start..start + size_of_val(out)];
        out.as_mut_bytes().copy_from_slice(bytes);
        self.finish_row(object, row, out)
    }

    /// Decodes a row in place, whose bytes are as in the file.
    fn finish_row(&self, object: usize, row: u32, out: &mut [f16]) -> Result<()> {
        from_little_endian(out);
        self.check_finite(object, row, out)
    }

    fn latents_path(&self, object: usize) -> PathBuf {
        self.root.join(&self.manifest.objects[object].latents)
    }

    /// The object's latents file. Opening it checks its header.
    pub(crate) fn latents_file(&self, object: usize) -> Result<Arc<File>> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = files.get(&object) {
            return Ok(file.clone());
        }
        let path = self.latents_path(object);
        let file = Arc::new(File::open(&path).map_err(Error::io(&path))?);
        let entry = &self.manifest.objects[object];
        check_latents(&path, &file, entry.rows, self.latent_shape(entry.bucket))?;
        if files.len() >= MAX_OPEN_FILES {
            files.clear();
        }
        files.insert(object, file.clone());
        Ok(file)
    }

    /// Checks the numbers of a row.
    ///
    /// # Errors
    /// [`Error::Malformed`] if one is not finite; the error names the sample.
    pub(crate) fn check_finite(&self, object: usize, row: u32, latents: &[f16]) -> Result<()> {
        if all_finite(latents) {
            return Ok(());
        }
        let records = self.object_records(object).unwrap_or_default();
        let sample = match records.get(row as usize) {
            Some(record) => format!("sample {} ({})", record.id, record.source),
            None => "whose text is not readable either".to_owned(),
        };
        let reason =
            format!("row {row}, {sample}, is not finite: delete that image and prepare again");
        Err(Error::Malformed {
            path: self.latents_path(object),
            kind: "latents file",
            reason,
        })
    }
}

/// Decodes a row. Returns whether all its numbers are finite.
pub(crate) fn decode_row(bytes: &[u8], out: &mut [f16]) -> bool {
    out.as_mut_bytes().copy_from_slice(bytes);
    from_little_endian(out);
    all_finite(out)
}

/// Converts numbers in place, whose bytes are as in the file. Nothing to do where numbers are
/// little-endian in memory too: the compiler drops the loop.
fn from_little_endian(numbers: &mut [f16]) {
    for number in numbers {
        *number = f16::from_bits(u16::from_le(number.to_bits()));
    }
}

/// Whether no number is infinite or NaN. Branchless, so that the compiler vectorises it.
fn all_finite(numbers: &[f16]) -> bool {
    let magnitude = |number: &f16| number.to_bits() & 0x7fff;
    numbers.iter().map(magnitude).fold(0, u16::max) < f16::INFINITY.to_bits()
}
