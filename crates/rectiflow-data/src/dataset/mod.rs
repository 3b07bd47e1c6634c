//! A packed data set in a folder or at a URL, opened for reading: rows by (split, bucket, number),
//! blocks verified.
//!
//! Opening reads the manifest and the block table and nothing else, whatever the number of buckets.
//! `index` numbers the live rows, `latents` reads their latents, `records` their text. A data set
//! at a URL keeps its blocks in memory up to a limit, so a small one reads as fast as a local one.
//! What is not here: the order of rows (`order`) and reading ahead (`feed`).

pub mod batch_latents;
pub(crate) mod block_memory;
pub(crate) mod fetch;
pub(crate) mod index;
pub(crate) mod latents;
pub(crate) mod records;
pub(crate) mod rows;
pub(crate) mod verified_blocks;
pub(crate) mod verify;

use std::{
    collections::HashMap,
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use crate::{
    cache::{DatasetCache, DiskCache},
    dataset::{
        block_memory::BlockMemory,
        fetch::Ticket,
        index::{ObjectRow, RowIndex},
        verified_blocks::VerifiedBlocks,
    },
    error::{Error, Result},
    format::{
        block_table::{BLOCK_ROWS, BlockTable},
        bucket::Bucket,
        manifest::{LATENTS_OFFSET, MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest, Split},
    },
    remote::{
        Location, Remote,
        block_checksum::BlockChecksum,
        buffers::Buffers,
        network::Network,
        request::{ObjectFile, Request},
        runtime,
    },
};

/// Bytes of a remote data set's blocks that are kept in memory, 2 GiB, unless the loader reads
/// ahead instead.
pub const MEMORY_BYTES: u64 = 2 << 30;

/// A bucket with its rows of one split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketShape {
    /// Index of the bucket in the manifest.
    pub bucket: u32,
    /// Width of its images.
    pub width_px: u32,
    /// Height of its images.
    pub height_px: u32,
    /// Live rows of the bucket in the split, at least 1.
    pub num_rows: u64,
}

/// An opened data set. Threads share it by reference.
#[derive(Debug)]
pub struct Dataset {
    /// The folder, or the URL.
    root: PathBuf,
    /// The store of a data set at a URL.
    remote: Option<Remote>,
    /// Blocks of a remote data set in memory.
    memory: BlockMemory,
    /// Blocks of a remote data set on a disk.
    cache: Option<DatasetCache>,
    manifest: Manifest,
    identity: String,
    blocks: BlockTable,
    index: RowIndex,
    verified: VerifiedBlocks,
    /// Memory for rows that are read only to verify their block.
    scratch: Buffers<u8>,
    /// Open latents files of objects on a disk.
    files: Mutex<HashMap<usize, Arc<File>>>,
}

impl Dataset {
    /// Opens the data set in a folder or at a URL: `s3://bucket/prefix`, `gs://`, `az://`,
    /// `http(s)://` or `file://`. Credentials, region and endpoint come from the environment
    /// (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS,
    /// AZURE_STORAGE_ACCOUNT_NAME and so on).
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Remote`]; [`Error::Malformed`] if the manifest or the block table
    /// breaks a rule of the format; [`Error::Invalid`] for an impossible URL.
    pub fn open(root: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(root, &Network::default())
    }

    /// Opens a data set with the network limits of `network`.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn open_with(root: impl AsRef<Path>, network: &Network) -> Result<Self> {
        let root = root.as_ref();
        match Location::parse(root, network)? {
            Location::Folder(folder) => {
                let manifest = Manifest::read(&folder)?;
                let blocks = BlockTable::read(&folder, &manifest.blocks, manifest.num_blocks())?;
                Ok(Self::new(folder, None, manifest, blocks))
            }
            Location::Remote(remote) => {
                let url = PathBuf::from(root.to_string_lossy().trim_end_matches('/'));
                let (manifest, blocks) = read_description(&url, &remote)?;
                Ok(Self::new(url, Some(remote), manifest, blocks))
            }
        }
    }

    fn new(root: PathBuf, remote: Option<Remote>, manifest: Manifest, blocks: BlockTable) -> Self {
        Self {
            index: RowIndex::new(&manifest.objects),
            verified: VerifiedBlocks::new(manifest.num_blocks()),
            identity: manifest.identity(),
            memory: BlockMemory::new(MEMORY_BYTES),
            scratch: Buffers::default(),
            files: Mutex::default(),
            cache: None,
            root,
            remote,
            manifest,
            blocks,
        }
    }

    /// The folder or URL of the data set.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether the data set is at a URL.
    pub fn is_remote(&self) -> bool {
        self.remote.is_some()
    }

    /// Bytes of the latents and text of a split, deleted rows included.
    pub fn num_bytes(&self, split: Split) -> u64 {
        let mut num_bytes = 0;
        for object in &self.manifest.objects {
            if object.split == split {
                num_bytes += self.manifest.latents_bytes(object) + object.text_bytes;
            }
        }
        num_bytes
    }

    /// The manifest: codec, geometry, buckets and objects.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The block table.
    pub fn blocks(&self) -> &BlockTable {
        &self.blocks
    }

    /// Hex BLAKE3 of the manifest: two data sets with the same identity hold the same bytes.
    pub fn identity(&self) -> String {
        self.identity.clone()
    }

    /// The buckets that have rows of `split`, in the manifest's order.
    pub fn buckets(&self, split: Split) -> Vec<BucketShape> {
        let mut shapes = Vec::new();
        for (bucket, num_rows) in self.index.buckets(split) {
            let Bucket {
                width_px,
                height_px,
            } = self.manifest.buckets[bucket as usize];
            shapes.push(BucketShape {
                bucket,
                width_px,
                height_px,
                num_rows,
            });
        }
        shapes
    }

    /// The index of live rows.
    pub(crate) fn index(&self) -> &RowIndex {
        &self.index
    }

    /// The object of a live row, and its row in the object.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such row.
    pub(crate) fn locate(&self, split: Split, bucket: u32, row: u64) -> Result<ObjectRow> {
        self.index.locate(split, bucket, row).ok_or_else(|| {
            let num_rows = self.index.num_rows(split, bucket);
            let what = format!("row {row} of bucket {bucket} ({split:?})");
            Error::Invalid {
                what,
                reason: format!("{} has {num_rows} such rows", self.root.display()),
            }
        })
    }

    /// Channels, height and width of a bucket's latents.
    ///
    /// # Panics
    /// If there is no such bucket.
    pub fn latent_shape(&self, bucket: u32) -> [usize; 3] {
        self.manifest.latent_shape(bucket)
    }

    /// Keeps blocks of a data set at a URL in a cache on a disk. A data set in a folder ignores it.
    #[must_use]
    pub fn with_cache(mut self, cache: &Arc<DiskCache>) -> Self {
        self.cache = self.remote.is_some().then(|| cache.of(&self.identity));
        self
    }

    /// The disk cache for its blocks.
    pub(crate) fn cache(&self) -> Option<&DatasetCache> {
        self.cache.as_ref()
    }

    /// The store of a data set at a URL.
    pub(crate) fn remote(&self) -> Option<&Remote> {
        self.remote.as_ref()
    }

    /// Starts reading consecutive blocks of an object.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the block table points outside the object's text.
    pub(crate) fn start(
        &self,
        file: ObjectFile,
        object: usize,
        blocks: Range<u32>,
    ) -> Result<Ticket> {
        Ok(self.start_request(self.request(file, object, blocks)?))
    }

    /// Starts reading the blocks of a request.
    pub(crate) fn start_request(&self, request: Request) -> Ticket {
        fetch::start(request, self.remote.as_ref(), self.cache.as_ref())
    }

    /// Starts reading the latents of a request row by row. Calls `take` with each row of the object
    /// and its bytes, and again if a request is repeated. The rows are verified once the ticket
    /// says that reading has succeeded.
    pub(crate) fn start_latent_rows(
        &self,
        request: Request,
        take: impl Fn(u32, &[u8]) + Send + Sync + 'static,
    ) -> Ticket<()> {
        let bucket = self.manifest.objects[request.object].bucket;
        let row_bytes = self.manifest.row_bytes(bucket) as usize;
        let (remote, cache) = (self.remote.as_ref(), self.cache.as_ref());
        fetch::start_rows(request, row_bytes, remote, cache, take)
    }

    /// One row's share of the bytes of its block, latents and text.
    pub(crate) fn share_of_block(&self, object: usize, block: u32) -> u64 {
        let text = self
            .blocks
            .block(object, block)
            .text_bytes()
            .div_ceil(self.block_rows(object, block).into());
        text + self
            .manifest
            .row_bytes(self.manifest.objects[object].bucket)
    }

    /// Rows of a block, deleted ones included.
    pub(crate) fn block_rows(&self, object: usize, block: u32) -> u32 {
        BLOCK_ROWS.min(self.manifest.objects[object].rows - block * BLOCK_ROWS)
    }

    /// The request for consecutive blocks of one of an object's files.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the block table points outside the object's text.
    pub(crate) fn request(
        &self,
        file: ObjectFile,
        object: usize,
        blocks: Range<u32>,
    ) -> Result<Request> {
        let entry = &self.manifest.objects[object];
        let (name, start) = match file {
            ObjectFile::Latents => {
                let first_row = u64::from(blocks.start * BLOCK_ROWS);
                let row_bytes = self.manifest.row_bytes(entry.bucket);
                (&entry.latents, LATENTS_OFFSET + first_row * row_bytes)
            }
            ObjectFile::Text => {
                let first = self.blocks.block(object, blocks.start);
                (&entry.text, first.text_offset)
            }
        };
        Ok(Request {
            file,
            object,
            first: blocks.start,
            name: name.clone(),
            path: self.root.join(name),
            start,
            step: 0,
            blocks: self.checked_blocks(file, object, blocks, start)?,
        })
    }

    /// Lengths and checksums of consecutive blocks, the first of which begins at `start`.
    fn checked_blocks(
        &self,
        file: ObjectFile,
        object: usize,
        blocks: Range<u32>,
        start: u64,
    ) -> Result<Vec<BlockChecksum>> {
        let mut checked = Vec::with_capacity(blocks.len());
        let mut end = start;
        for block in blocks {
            let checksum = self.block_checksum(file, object, block);
            if file == ObjectFile::Text {
                self.check_text_block(object, block, end)?;
            }
            end += checksum.len;
            checked.push(checksum);
        }
        Ok(checked)
    }

    /// Checks that a block of text begins at `start` and ends inside the file. The block table says
    /// where text lies, and the block table is untrusted.
    fn check_text_block(&self, object: usize, block: u32, start: u64) -> Result<()> {
        let table = self.blocks.block(object, block);
        let entry = &self.manifest.objects[object];
        let len = table.text_bytes();
        let offset = table.text_offset;
        let all = entry.text_bytes;
        let is_inside = start.checked_add(len).is_some_and(|end| end <= all);
        if offset == start && is_inside {
            return Ok(());
        }
        Err(Error::Malformed {
            path: self.root.join(&entry.text),
            kind: "text file",
            reason: format!(
                "a block of {len} bytes at {offset} is out of place or extends past the file's \
                 {all} bytes"
            ),
        })
    }

    /// Checksum of a block of one of an object's files.
    fn block_checksum(&self, file: ObjectFile, object: usize, block: u32) -> BlockChecksum {
        let table = self.blocks.block(object, block);
        match file {
            ObjectFile::Latents => {
                let bucket = self.manifest.objects[object].bucket;
                let rows = u64::from(self.block_rows(object, block));
                BlockChecksum {
                    len: rows * self.manifest.row_bytes(bucket),
                    xxh3: table.latents_xxh3,
                }
            }
            ObjectFile::Text => BlockChecksum {
                len: table.text_bytes(),
                xxh3: table.text_xxh3,
            },
        }
    }

    /// Bytes of the largest block of a bucket: its latents and its text.
    pub(crate) fn largest_block(&self, split: Split, bucket: u32) -> u64 {
        let mut longest_text = 0;
        for span in self.index.spans(split, bucket) {
            for block in 0..self.manifest.objects[span.object].num_blocks() {
                longest_text = longest_text.max(self.blocks.block(span.object, block).text_bytes());
            }
        }
        longest_text + u64::from(BLOCK_ROWS) * self.manifest.row_bytes(bucket)
    }
}

/// Reads the manifest and the block table that it names.
fn read_description(root: &Path, remote: &Remote) -> Result<(Manifest, BlockTable)> {
    let bytes = runtime().block_on(remote.read_all(MANIFEST_FILE, MAX_MANIFEST_BYTES))?;
    let manifest = Manifest::parse(&root.join(MANIFEST_FILE), &bytes)?;
    let bytes =
        runtime().block_on(remote.read_all(&manifest.blocks.file, manifest.blocks.bytes))?;
    let path = root.join(&manifest.blocks.file);
    let blocks = BlockTable::parse(&path, bytes.into(), &manifest.blocks, manifest.num_blocks())?;
    Ok((manifest, blocks))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{fs, io, os::unix::fs::FileExt};

    use half::f16;

    use super::*;
    use crate::format::{
        bucket::{Geometry, ResizeSpace},
        manifest::{Codec, Object, commit},
        record::{Record, SampleId},
        shard::ObjectWriter,
    };

    const SHAPE: [usize; 3] = [4, 2, 3];
    const ROW_BYTES: usize = 4 * 2 * 3 * 2;

    fn record(id: u64) -> Record {
        Record {
            id: SampleId(u64::MAX - id),
            caption_sources: Vec::new(),
            captions: (0..id % 3)
                .map(|i| format!("caption {i} of «{id}»"))
                .collect(),
            tags: if id.is_multiple_of(2) {
                vec![String::new(), "1girl".to_owned()]
            } else {
                Vec::new()
            },
            important_tags: vec!["solo".to_owned()],
            quality: Vec::new(),
            verbatim: id.is_multiple_of(5),
            original_width_px: u32::MAX,
            original_height_px: id as u32,
            crop_left_px: 1,
            crop_top_px: 2,
            target_width_px: 24,
            target_height_px: 16,
            source: format!("a/{id}.png"),
        }
    }

    fn latents(id: u64) -> Vec<f16> {
        (0..24)
            .map(|i| f16::from_f32(id as f32 + i as f32 / 32.0))
            .collect()
    }

    /// A data set of one bucket: train objects of 70 and 5 rows, a test object of 33.
    pub(crate) fn write(root: &Path) -> Manifest {
        let codec = Codec {
            vae: "test".to_owned(),
            hash: "00".repeat(32),
            scaling_factor: 0.13025,
            down_factor: 8,
            channels: 4,
            dtype: "F16".to_owned(),
        };
        let (resize, background) = (ResizeSpace::Gamma, [255; 3]);
        let geometry = Geometry {
            area_px: 24 * 16,
            step_px: 8,
            bucket_min_px: 16,
            bucket_max_px: 24,
            resize,
            background,
            seed: 0,
        };
        let mut manifest = Manifest::new(codec, geometry);
        manifest.buckets.push(Bucket {
            width_px: 24,
            height_px: 16,
        });
        let mut blocks = Vec::new();
        for (name, split, ids) in [
            ("a", Split::Train, 0..70),
            ("b", Split::Train, 70..75),
            ("c", Split::Test, 75..108),
        ] {
            let (latents_name, text) = (
                format!("latents/{name}.safetensors"),
                format!("text/{name}.parquet"),
            );
            let mut writer = ObjectWriter::create(root, &latents_name, &text, SHAPE).unwrap();
            ids.for_each(|id| writer.push(&latents(id), record(id)).unwrap());
            let done = writer.finish().unwrap();
            let (bucket, rows, text_bytes, deleted) = (0, done.rows, done.text_bytes, None);
            manifest.objects.push(Object {
                bucket,
                split,
                rows,
                latents: latents_name,
                text,
                text_bytes,
                deleted,
            });
            blocks.push(done.blocks);
        }
        commit(root, &mut manifest, &blocks).unwrap();
        manifest
    }

    fn read_ids(data: &Dataset, split: Split, rows: &[u64]) -> Vec<u64> {
        let mut out = vec![f16::ZERO; rows.len() * 24];
        data.read_latents(split, 0, rows, &mut out).unwrap();
        out.chunks(24).map(|row| row[0].to_f32() as u64).collect()
    }

    /// Changes bytes of a file in place.
    fn patch(path: &Path, at: u64, bytes: &[u8]) {
        File::options()
            .write(true)
            .open(path)
            .unwrap()
            .write_all_at(bytes, at)
            .unwrap();
    }

    #[test]
    fn rows_come_back_as_they_were_written() {
        let root = tempfile::tempdir().unwrap();
        write(root.path());
        let data = Dataset::open(root.path()).unwrap();
        let shape = |num_rows| {
            vec![BucketShape {
                bucket: 0,
                width_px: 24,
                height_px: 16,
                num_rows,
            }]
        };
        assert_eq!(data.buckets(Split::Train), shape(75));
        assert_eq!(data.buckets(Split::Test), shape(33));
        assert_eq!(data.latent_shape(0), SHAPE);
        assert_eq!(
            data.records(Split::Train, 0).unwrap(),
            (0..75).map(record).collect::<Vec<_>>()
        );
        assert_eq!(
            data.records(Split::Test, 0).unwrap(),
            (75..108).map(record).collect::<Vec<_>>()
        );
        assert_eq!(
            read_ids(&data, Split::Train, &[74, 0, 69, 70, 31, 32, 0]),
            [74, 0, 69, 70, 31, 32, 0]
        );
        assert_eq!(read_ids(&data, Split::Test, &[32, 0]), [107, 75]);
        let mut out = vec![f16::ZERO; 24];
        data.read_latents(Split::Test, 0, &[5], &mut out).unwrap();
        assert_eq!(out, latents(80));
        assert!(data.records(Split::Test, 9).unwrap().is_empty());
    }

    #[test]
    fn standard_readers_open_both_files() {
        use parquet::{
            file::reader::{FileReader, SerializedFileReader},
            record::RowAccessor,
        };
        let root = tempfile::tempdir().unwrap();
        write(root.path());
        let bytes = fs::read(root.path().join("latents/a.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensor = tensors.tensor("latents").unwrap();
        assert_eq!(
            (tensor.dtype(), tensor.shape()),
            (safetensors::Dtype::F16, &[70, 4, 2, 3][..])
        );
        assert_eq!(
            tensor.data()[69 * ROW_BYTES..][..2],
            latents(69)[0].to_le_bytes()
        );
        let text = File::open(root.path().join("text/a.parquet")).unwrap();
        let reader = SerializedFileReader::new(text).unwrap();
        assert_eq!(
            (
                reader.num_row_groups(),
                reader.metadata().file_metadata().num_rows()
            ),
            (3, 70)
        );
        let row = reader.get_row_iter(None).unwrap().nth(5).unwrap().unwrap();
        assert_eq!(row.get_list(1).unwrap().elements().len(), 2);
        assert_eq!(
            (
                row.get_ulong(0).unwrap(),
                row.get_string(12).unwrap().as_str()
            ),
            (u64::MAX - 5, "a/5.png")
        );
    }

    #[test]
    fn deleted_rows_are_passed_over() {
        let root = tempfile::tempdir().unwrap();
        let mut manifest = write(root.path());
        for row in [0, 31, 69] {
            manifest.objects[0].delete(row);
        }
        (0..5).for_each(|row| manifest.objects[1].delete(row));
        fs::write(root.path().join(MANIFEST_FILE), manifest.to_json()).unwrap();
        let data = Dataset::open(root.path()).unwrap();
        assert_eq!(data.buckets(Split::Train)[0].num_rows, 67);
        let ids: Vec<u64> = (0..70).filter(|id| ![0, 31, 69].contains(id)).collect();
        assert_eq!(
            read_ids(&data, Split::Train, &(0..67).collect::<Vec<_>>()),
            ids
        );
        let records = data.records(Split::Train, 0).unwrap();
        assert_eq!(records, ids.into_iter().map(record).collect::<Vec<_>>());
    }

    #[test]
    fn missing_row_and_missing_bucket_are_refused() {
        let root = tempfile::tempdir().unwrap();
        write(root.path());
        let data = Dataset::open(root.path()).unwrap();
        let mut out = vec![f16::ZERO; 24];
        for (bucket, row) in [(0, 75), (0, u64::MAX), (7, 0)] {
            let error = data
                .read_latents(Split::Train, bucket, &[row], &mut out)
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(&format!("row {row} of bucket {bucket}")),
                "{error}"
            );
        }
    }

    #[test]
    fn damage_is_found_at_the_first_touch_of_its_block() {
        let root = tempfile::tempdir().unwrap();
        write(root.path());
        let latents = root.path().join("latents/a.safetensors");
        patch(&latents, LATENTS_OFFSET + 40 * ROW_BYTES as u64, &[0x55]);
        let data = Dataset::open(root.path()).unwrap();
        let mut out = vec![f16::ZERO; 24];
        data.read_latents(Split::Train, 0, &[31], &mut out).unwrap();
        let error = data
            .read_latents(Split::Train, 0, &[33], &mut out)
            .unwrap_err();
        let range = LATENTS_OFFSET + 32 * ROW_BYTES as u64..LATENTS_OFFSET + 64 * ROW_BYTES as u64;
        assert!(
            matches!(&error, Error::Damaged { range: r, .. } if *r == range),
            "{error}"
        );
        patch(&root.path().join("text/c.parquet"), 60, &[0]);
        let error = data.records(Split::Test, 0).unwrap_err();
        assert!(
            matches!(&error, Error::Damaged { path, .. } if path.ends_with("text/c.parquet")),
            "{error}"
        );
        assert!(
            data.verify_object(0).is_err()
                && data.verify_object(1).is_ok()
                && data.verify_object(2).is_err()
        );
    }

    #[test]
    fn every_byte_around_the_rows_of_text_is_verified() {
        let root = tempfile::tempdir().unwrap();
        write(root.path());
        let data = Dataset::open(root.path()).unwrap();
        let path = root.path().join("text/b.parquet");
        let good = fs::read(&path).unwrap();
        let block = data.blocks.block(1, 0);
        let footer = block.text_offset + block.text_bytes();
        assert!(good.len() as u64 - footer > 100);
        data.verify_object(1).unwrap();
        for at in (0..block.text_offset).chain(footer..good.len() as u64) {
            let byte = good[at as usize];
            patch(&path, at, &[byte ^ 1 << (at % 8)]);
            let error = data.verify_object(1).unwrap_err().to_string();
            assert!(
                error.contains("text/b.parquet") && error.contains("around these rows"),
                "{at}: {error}"
            );
            patch(&path, at, &[byte]);
        }
        data.verify_object(1).unwrap();
    }

    #[test]
    fn latents_that_are_not_finite_are_found_although_their_checksum_is_right() {
        for (row, wrong) in [(0, f16::NAN), (69, f16::INFINITY), (40, f16::NEG_INFINITY)] {
            let root = tempfile::tempdir().unwrap();
            let mut manifest = write(root.path());
            let data = Dataset::open(root.path()).unwrap();
            let path = root.path().join("latents/a.safetensors");
            let at = LATENTS_OFFSET + (row * ROW_BYTES) as u64;
            patch(&path, at, &wrong.to_le_bytes());
            // The checksums of a program that did not look at its numbers.
            let bytes = fs::read(&path).unwrap();
            let mut blocks = Vec::new();
            for (object, entry) in manifest.objects.iter().enumerate() {
                let block = |block| data.blocks.block(object, block);
                blocks.push((0..entry.num_blocks()).map(block).collect::<Vec<_>>());
            }
            let rows = &bytes[LATENTS_OFFSET as usize..];
            for (block, rows) in blocks[0].iter_mut().zip(rows.chunks(32 * ROW_BYTES)) {
                block.latents_xxh3 = xxhash_rust::xxh3::xxh3_64(rows);
            }
            commit(root.path(), &mut manifest, &blocks).unwrap();
            let data = Dataset::open(root.path()).unwrap();
            let error = data.verify_object(0).unwrap_err().to_string();
            let name = format!("a/{row}.png");
            assert!(
                error.contains(&name) && error.contains("not finite"),
                "{error}"
            );
            data.verify_object(1).unwrap();
        }
    }

    #[test]
    fn latents_that_are_not_finite_are_refused_by_name() {
        let root = tempfile::tempdir().unwrap();
        write(root.path());
        let data = Dataset::open(root.path()).unwrap();
        let mut out = vec![f16::ZERO; 24];
        // The block is verified first, so that the second read checks the values and not the
        // checksum.
        data.read_latents(Split::Train, 0, &[3], &mut out).unwrap();
        let path = root.path().join("latents/a.safetensors");
        patch(
            &path,
            LATENTS_OFFSET + 4 * ROW_BYTES as u64,
            &f16::NAN.to_le_bytes(),
        );
        let error = data
            .read_latents(Split::Train, 0, &[4], &mut out)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("a/4.png") && error.contains("not finite"),
            "{error}"
        );
    }

    #[test]
    fn files_that_differ_from_the_manifest_are_refused() {
        type Damage = fn(Vec<u8>) -> Vec<u8>;
        let cases: [(&str, Damage, &str); 7] = [
            (
                "latents/a.safetensors",
                |b| b[..b.len() - 1].to_vec(),
                "need 3872",
            ),
            (
                "latents/a.safetensors",
                |b| [b, vec![0]].concat(),
                "need 3872",
            ),
            (
                "latents/a.safetensors",
                |b| [&[0xff; 8], &b[8..]].concat(),
                "not 504 bytes long",
            ),
            (
                "latents/a.safetensors",
                |b| [&b[..8], &[b'{'; 504], &b[512..]].concat(),
                "its header",
            ),
            (
                "latents/a.safetensors",
                |b| replace(b, b"[70,4,2,3]", b"[70,4,3,2]"),
                "expected F16",
            ),
            (
                "latents/a.safetensors",
                |b| replace(b, b"\"F16\"", b"\"I16\""),
                "expected F16",
            ),
            (
                "latents/a.safetensors",
                |b| replace(b, b"[0,3360]", b"[8,3360]"),
                "expected F16",
            ),
        ];
        for (name, damage, expected) in cases {
            let root = tempfile::tempdir().unwrap();
            write(root.path());
            let path = root.path().join(name);
            fs::write(&path, damage(fs::read(&path).unwrap())).unwrap();
            let data = Dataset::open(root.path()).unwrap();
            let error = data
                .read_latents(Split::Train, 0, &[0], &mut [f16::ZERO; 24])
                .unwrap_err();
            assert!(
                matches!(error, Error::Malformed { .. }) && error.to_string().contains(expected),
                "{error}"
            );
        }
        let root = tempfile::tempdir().unwrap();
        write(root.path());
        fs::remove_file(root.path().join("latents/a.safetensors")).unwrap();
        let data = Dataset::open(root.path()).unwrap();
        let error = data
            .read_latents(Split::Train, 0, &[0], &mut [f16::ZERO; 24])
            .unwrap_err();
        assert!(
            matches!(&error, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound),
            "{error}"
        );
    }

    fn replace(mut bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
        let at = bytes
            .windows(from.len())
            .position(|window| window == from)
            .expect("the header holds it");
        bytes[at..at + from.len()].copy_from_slice(to);
        bytes
    }

    #[test]
    fn truncated_text_is_refused() {
        let root = tempfile::tempdir().unwrap();
        write(root.path());
        let path = root.path().join("text/a.parquet");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let error = Dataset::open(root.path())
            .unwrap()
            .records(Split::Train, 0)
            .unwrap_err();
        assert!(
            matches!(
                error,
                Error::Malformed {
                    kind: "file of the data set",
                    ..
                }
            ),
            "{error}"
        );
    }
}
