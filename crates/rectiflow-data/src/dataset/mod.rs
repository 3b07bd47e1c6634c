//! A packed data set in a folder or at a URL, opened for reading: rows by (split, bucket, number), blocks verified.
//!
//! Rows are numbered among the live ones: objects in the manifest's order, deleted rows left out. Opening reads the
//! manifest and the block table and nothing else, whatever the number of buckets. On a disk the first read of a block
//! reads all of it and checks its checksum; later reads take only the rows that are asked for. From a URL blocks are
//! always read and checked whole, and kept in memory up to a limit, which makes a small remote data set as good as a
//! local one. What is not here: the order in which rows are wanted (`order`), and reading ahead (`feed`).

pub(crate) mod block_memory;
pub(crate) mod fetch;
pub(crate) mod rows;

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use half::f16;

use crate::{
    cache::{DatasetCache, DiskCache},
    dataset::{block_memory::BlockMemory, fetch::Ticket},
    error::{Error, Result},
    format::{
        block_table::{BLOCK_ROWS, BlockTable},
        manifest::{LATENTS_OFFSET, MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest, Object, Split},
        record::Record,
        shard::{check_header, check_latents},
        text_shard::decode_block,
    },
    remote::{
        Location, Network, Remote,
        request::{ObjectFile, Request, coalesce},
        runtime,
    },
};

/// Open files are kept up to this number: opening one is cheap on a local disk and a round trip on a shared one.
const MAX_OPEN_FILES: usize = 256;
/// A remote data set's blocks are kept in memory up to this many bytes, 2 GiB, unless the loader reads ahead instead.
pub const MEMORY_BYTES: u64 = 2 << 30;
/// Most consecutive blocks in one request of random access: 32 MiB at 1024 x 1024.
const BLOCKS_A_REQUEST: u32 = 8;

/// A bucket with its rows of one split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketShape {
    /// Index of the bucket in the manifest.
    pub bucket: u32,
    /// Width of its images.
    pub width_px: u32,
    /// Height of its images.
    pub height_px: u32,
    /// Live rows of the split, at least 1.
    pub num_rows: u64,
}

/// An opened data set. Shared between threads by reference.
#[derive(Debug)]
pub struct Dataset {
    /// The folder, or the URL.
    root: PathBuf,
    /// Where the bytes come from if not from the folder.
    remote: Option<Remote>,
    /// Blocks of a remote data set, in memory.
    memory: BlockMemory,
    /// And on a disk.
    cache: Option<DatasetCache>,
    manifest: Manifest,
    identity: String,
    blocks: BlockTable,
    rows: BTreeMap<(Split, u32), Vec<Span>>,
    /// One bit per block and object: its checksum has been found right.
    verified: Vec<Vec<AtomicU64>>,
    files: Mutex<HashMap<usize, Arc<File>>>,
}

/// The live rows of one object within its (split, bucket).
#[derive(Debug)]
struct Span {
    object: usize,
    /// Number of the object's first live row.
    first: u64,
    /// Live rows of the object.
    num_rows: u64,
    /// Physical row of each live row, where rows are deleted.
    live: Option<Vec<u32>>,
}

impl Span {
    fn physical(&self, row: u64) -> u32 {
        let index = (row - self.first) as usize;
        self.live.as_ref().map_or(index as u32, |live| live[index])
    }
}

impl Dataset {
    /// Opens the data set in a folder or at a URL: `s3://bucket/prefix`, `gs://`, `az://`, `http(s)://` or `file://`.
    /// Credentials, region and endpoint are those of the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
    /// GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME and so on).
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Remote`]; [`Error::Malformed`] if the manifest or the block table break a rule of the
    /// format; [`Error::Invalid`] for a URL that cannot be one.
    pub fn open(root: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(root, &Network::default())
    }

    /// Opens a data set with other limits on the network than the usual ones.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn open_with(root: impl AsRef<Path>, network: &Network) -> Result<Self> {
        let (root, remote) = match Location::parse(root.as_ref(), network)? {
            Location::Folder(folder) => (folder, None),
            Location::Remote(remote) => {
                (PathBuf::from(root.as_ref().to_string_lossy().trim_end_matches('/')), Some(remote))
            }
        };
        let (manifest, blocks) = match &remote {
            None => {
                let manifest = Manifest::read(&root)?;
                let blocks = BlockTable::read(&root, &manifest.blocks, manifest.num_blocks())?;
                (manifest, blocks)
            }
            Some(remote) => read_description(&root, remote)?,
        };
        let mut rows = BTreeMap::<_, Vec<Span>>::new();
        for (object, entry) in manifest.objects.iter().enumerate() {
            let spans = rows.entry((entry.split, entry.bucket)).or_default();
            let first = spans.last().map_or(0, |last| last.first + last.num_rows);
            let live = live_rows(entry);
            let num_rows = live.as_ref().map_or(u64::from(entry.rows), |live| live.len() as u64);
            if num_rows > 0 {
                spans.push(Span { object, first, num_rows, live });
            }
        }
        rows.retain(|_, spans| !spans.is_empty());
        let words = |object: &Object| (0..object.num_blocks().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let verified = manifest.objects.iter().map(words).collect();
        let (identity, files, memory) = (manifest.identity(), Mutex::default(), BlockMemory::new(MEMORY_BYTES));
        Ok(Self { root, remote, memory, cache: None, manifest, identity, blocks, rows, verified, files })
    }

    /// The folder or URL that it was opened at.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether its bytes come over a network.
    pub fn is_remote(&self) -> bool {
        self.remote.is_some()
    }

    /// Bytes of latents and text of one side of the split, deleted rows included.
    pub fn num_bytes(&self, split: Split) -> u64 {
        let of_split = self.manifest.objects.iter().filter(|object| object.split == split);
        of_split.map(|object| self.manifest.latents_bytes(object) + object.text_bytes).sum()
    }

    /// The data set's description.
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
        let of_split = self.rows.iter().filter(|((s, _), _)| *s == split);
        let shape = |(&(_, bucket), spans): (&(Split, u32), &Vec<Span>)| {
            let size = self.manifest.buckets[bucket as usize];
            let num_rows = spans.iter().map(|span| span.num_rows).sum();
            BucketShape { bucket, width_px: size.width_px, height_px: size.height_px, num_rows }
        };
        of_split.map(shape).collect()
    }

    /// The records of a bucket's live rows, in row order. Empty if the bucket has none.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`] where text does not match its checksum, [`Error::Malformed`].
    pub fn records(&self, split: Split, bucket: u32) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        for span in self.rows.get(&(split, bucket)).into_iter().flatten() {
            let all = self.object_records(span.object)?;
            match &span.live {
                None => records.extend(all),
                Some(live) => {
                    let mut all: Vec<Option<Record>> = all.into_iter().map(Some).collect();
                    records.extend(live.iter().filter_map(|&row| all[row as usize].take()));
                }
            }
        }
        Ok(records)
    }

    /// Channels, height and width of a bucket's latents.
    ///
    /// # Panics
    /// If there is no such bucket.
    pub fn latent_shape(&self, bucket: u32) -> [usize; 3] {
        self.manifest.latent_shape(bucket)
    }

    /// Reads the latents of `rows` (numbers of live rows) into `out`, [rows, C, h, w], unscaled.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`] where a block does not match its checksum; [`Error::Malformed`] where a file is
    /// not what the manifest says or a latent is not finite (the sample is named); [`Error::Invalid`] if a row or the
    /// bucket does not exist.
    ///
    /// # Panics
    /// If `out` has not the length that `rows` need.
    pub fn read_latents(&self, split: Split, bucket: u32, rows: &[u64], out: &mut [f16]) -> Result<()> {
        let spans = self.rows.get(&(split, bucket)).map_or(&[][..], Vec::as_slice);
        if spans.is_empty() && !rows.is_empty() {
            return Err(self.no_such(split, bucket, rows[0]));
        }
        let row_len = if rows.is_empty() { 1 } else { self.latent_shape(bucket).iter().product() };
        assert_eq!(out.len(), rows.len() * row_len, "room for {} rows of {row_len} numbers", rows.len());
        let rows = rows.iter().map(|&row| self.locate(split, bucket, row)).collect::<Result<Vec<_>>>()?;
        if self.remote.is_some() {
            return self.read_remote(&rows, out, row_len);
        }
        for (&(object, row), out) in rows.iter().zip(out.chunks_exact_mut(row_len)) {
            self.read_row(object, row, out)?;
        }
        Ok(())
    }

    /// The object of a live row, and its number there with the deleted ones.
    pub(crate) fn locate(&self, split: Split, bucket: u32, row: u64) -> Result<(usize, u32)> {
        let spans = self.rows.get(&(split, bucket)).map_or(&[][..], Vec::as_slice);
        let after = spans.partition_point(|span| span.first <= row);
        let span = after.checked_sub(1).map(|i| &spans[i]).filter(|span| row - span.first < span.num_rows);
        let span = span.ok_or_else(|| self.no_such(split, bucket, row))?;
        Ok((span.object, span.physical(row)))
    }

    /// Ends of the runs of up to `longest` consecutive blocks of an object, counted in live rows of the bucket; runs
    /// without a live row are left out.
    pub(crate) fn run_ends(&self, split: Split, bucket: u32, longest: u32) -> Vec<u32> {
        let mut ends = Vec::new();
        for span in self.rows.get(&(split, bucket)).into_iter().flatten() {
            let rows = self.manifest.objects[span.object].rows;
            for end in (1..=rows.div_ceil(longest * BLOCK_ROWS)).map(|run| (run * longest * BLOCK_ROWS).min(rows)) {
                let live = span.live.as_ref().map_or(end as usize, |live| live.partition_point(|&row| row < end));
                let end = u32::try_from(span.first).expect("the order refuses buckets of 2^32 rows") + live as u32;
                if ends.last().map_or(end > 0, |&last| end > last) {
                    ends.push(end);
                }
            }
        }
        ends
    }

    /// Keeps blocks that come over the network on a disk. A data set in a folder needs none and ignores it.
    #[must_use]
    pub fn with_cache(mut self, cache: &Arc<DiskCache>) -> Self {
        self.cache = self.remote.is_some().then(|| cache.of(&self.identity));
        self
    }

    /// The cache for its blocks.
    pub(crate) fn cache(&self) -> Option<&DatasetCache> {
        self.cache.as_ref()
    }

    /// The store that its blocks come from, if they are not in a folder.
    pub(crate) fn remote(&self) -> Option<&Remote> {
        self.remote.as_ref()
    }

    /// Starts reading consecutive blocks of an object.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the block table points outside the object's text.
    pub(crate) fn start(&self, file: ObjectFile, object: usize, blocks: Range<u32>) -> Result<Ticket> {
        Ok(self.start_request(self.request(file, object, blocks)?))
    }

    /// Starts reading the blocks of a request.
    pub(crate) fn start_request(&self, request: Request) -> Ticket {
        fetch::start(request, self.remote.as_ref(), self.cache.as_ref())
    }

    /// Bytes of the largest block of a bucket: its latents and its text.
    pub(crate) fn largest_block(&self, split: Split, bucket: u32) -> u64 {
        let spans = self.rows.get(&(split, bucket)).into_iter().flatten();
        let blocks = spans.flat_map(|span| {
            let blocks = 0..self.manifest.objects[span.object].num_blocks();
            blocks.map(|block| self.blocks.block(span.object, block).text_bytes())
        });
        blocks.max().unwrap_or(0) + u64::from(BLOCK_ROWS) * self.manifest.row_bytes(bucket)
    }

    /// A row's part of the bytes of its block, latents and text.
    pub(crate) fn share_of_block(&self, object: usize, block: u32) -> u64 {
        let text = self.blocks.block(object, block).text_bytes().div_ceil(self.block_rows(object, block).into());
        text + self.manifest.row_bytes(self.manifest.objects[object].bucket)
    }

    /// Rows of a bucket.
    pub(crate) fn num_rows(&self, split: Split, bucket: u32) -> f64 {
        let spans = self.rows.get(&(split, bucket)).into_iter().flatten();
        spans.map(|span| span.num_rows as f64).sum()
    }

    /// Rows of a bucket, deleted ones included.
    pub(crate) fn rows_stored(&self, split: Split, bucket: u32) -> f64 {
        let spans = self.rows.get(&(split, bucket)).into_iter().flatten();
        spans.map(|span| f64::from(self.manifest.objects[span.object].rows)).sum()
    }

    /// Rows of a block, deleted ones included.
    pub(crate) fn block_rows(&self, object: usize, block: u32) -> u32 {
        BLOCK_ROWS.min(self.manifest.objects[object].rows - block * BLOCK_ROWS)
    }

    /// The request for consecutive blocks of one of an object's files.
    pub(crate) fn request(&self, file: ObjectFile, object: usize, blocks: Range<u32>) -> Result<Request> {
        let entry = &self.manifest.objects[object];
        let table = |block| self.blocks.block(object, block);
        let (name, start) = match file {
            ObjectFile::Latents => {
                let row_bytes = self.manifest.row_bytes(entry.bucket);
                (&entry.latents, LATENTS_OFFSET + u64::from(blocks.start * BLOCK_ROWS) * row_bytes)
            }
            ObjectFile::Text => (&entry.text, table(blocks.start).text_offset),
        };
        let path = self.root.join(name);
        let (first, mut checks, mut end) = (blocks.start, Vec::with_capacity(blocks.len()), start);
        for block in blocks {
            let table = table(block);
            let row_bytes = self.manifest.row_bytes(entry.bucket);
            let (len, xxh3) = match file {
                ObjectFile::Latents => (u64::from(self.block_rows(object, block)) * row_bytes, table.latents_xxh3),
                ObjectFile::Text => (table.text_bytes(), table.text_xxh3),
            };
            let next = end.checked_add(len).filter(|&next| file == ObjectFile::Latents || next <= entry.text_bytes);
            let Some(next) = next.filter(|_| file == ObjectFile::Latents || table.text_offset == end) else {
                let (at, all) = (table.text_offset, entry.text_bytes);
                let reason = format!("a block of {len} bytes at {at} is not in its place, or beyond its {all} bytes");
                return Err(Error::Malformed { path, kind: "text file", reason });
            };
            end = next;
            checks.push((len, xxh3));
        }
        Ok(Request { file, object, first, name: name.clone(), path, start, step: 0, blocks: checks })
    }

    /// The records of the blocks of one text request, deleted rows included.
    pub(crate) fn decode_text(&self, object: usize, first_block: u32, blocks: &[Bytes]) -> Result<Vec<Record>> {
        let entry = &self.manifest.objects[object];
        let mut records = Vec::new();
        for (block, bytes) in (first_block..).zip(blocks) {
            let (columns, num_rows) = (self.blocks.block(object, block).columns, self.block_rows(object, block));
            let decoded = decode_block(bytes, &columns, num_rows as usize).map_err(|reason| Error::Malformed {
                path: self.root.join(&entry.text),
                kind: "text file",
                reason,
            });
            records.extend(decoded?);
        }
        Ok(records)
    }

    /// Copies one row out of its block's bytes.
    pub(crate) fn copy_row(&self, object: usize, row: u32, block: &[u8], out: &mut [f16]) -> Result<()> {
        let row_bytes = out.len() * 2;
        let start = (row % BLOCK_ROWS) as usize * row_bytes;
        self.decode_row(object, row, &block[start..start + row_bytes], out)
    }

    /// The same, to the end of `out`: memory is written once.
    pub(crate) fn append_row(&self, object: usize, row: u32, block: &[u8], out: &mut Vec<f16>) -> Result<()> {
        let row_bytes = self.manifest.row_bytes(self.manifest.objects[object].bucket) as usize;
        let (start, first) = ((row % BLOCK_ROWS) as usize * row_bytes, out.len());
        let pairs = block[start..start + row_bytes].chunks_exact(2);
        out.extend(pairs.map(|pair| f16::from_le_bytes([pair[0], pair[1]])));
        if all_finite(&out[first..]) { Ok(()) } else { Err(self.not_finite(object, row)) }
    }

    fn decode_row(&self, object: usize, row: u32, bytes: &[u8], out: &mut [f16]) -> Result<()> {
        for (out, pair) in out.iter_mut().zip(bytes.chunks_exact(2)) {
            *out = f16::from_le_bytes([pair[0], pair[1]]);
        }
        if all_finite(out) { Ok(()) } else { Err(self.not_finite(object, row)) }
    }

    /// Rows of a remote data set: the blocks that are not held yet are requested together.
    fn read_remote(&self, rows: &[(usize, u32)], out: &mut [f16], row_len: usize) -> Result<()> {
        let mut blocks: Vec<(usize, u32)> = rows.iter().map(|&(object, row)| (object, row / BLOCK_ROWS)).collect();
        blocks.sort_unstable();
        blocks.dedup();
        let mut found = HashMap::new();
        while found.len() < blocks.len() {
            let claim = self.memory.claim(&blocks, &mut found);
            let mut missing = BTreeMap::<usize, Vec<u32>>::new();
            claim.keys.iter().for_each(|&(object, block)| missing.entry(object).or_default().push(block));
            let mut tickets = Vec::new();
            for (object, blocks) in missing {
                for run in coalesce(blocks, BLOCKS_A_REQUEST) {
                    tickets.push((object, run.start, self.start(ObjectFile::Latents, object, run)?));
                }
            }
            for (object, first, mut ticket) in tickets {
                for (block, bytes) in (first..).zip(ticket.wait()?) {
                    self.memory.insert((object, block), bytes.clone());
                    found.insert((object, block), bytes);
                }
            }
        }
        for (&(object, row), out) in rows.iter().zip(out.chunks_exact_mut(row_len)) {
            self.copy_row(object, row, &found[&(object, row / BLOCK_ROWS)], out)?;
        }
        Ok(())
    }

    /// The records of all rows of an object, deleted ones included.
    pub(crate) fn object_records(&self, object: usize) -> Result<Vec<Record>> {
        let entry = &self.manifest.objects[object];
        if self.remote.is_none() {
            // The length in the manifest is a claim; the file's own is not.
            let path = self.root.join(&entry.text);
            let found = std::fs::metadata(&path).map_err(Error::io(&path))?.len();
            check_len(&path, found, entry.text_bytes)?;
        }
        let blocks = self.start(ObjectFile::Text, object, 0..entry.num_blocks())?.wait()?;
        self.decode_text(object, 0, &blocks)
    }

    /// Checks that every byte of an object's latents and text is what was written: for `inspect --verify`.
    ///
    /// # Errors
    /// As [`Dataset::read_latents`] and [`Dataset::records`].
    pub fn verify_object(&self, object: usize) -> Result<()> {
        let entry = &self.manifest.objects[object];
        match &self.remote {
            None => drop(self.latents_file(object)?),
            Some(remote) => self.check_remote(remote, object)?,
        }
        for run in coalesce(0..entry.num_blocks(), BLOCKS_A_REQUEST) {
            self.start(ObjectFile::Latents, object, run)?.wait()?;
        }
        self.object_records(object).map(drop)
    }

    /// Lengths of an object's files and the header of its latents.
    fn check_remote(&self, remote: &Remote, object: usize) -> Result<()> {
        let entry = &self.manifest.objects[object];
        let (latents, text) = (self.root.join(&entry.latents), self.root.join(&entry.text));
        let header = runtime().block_on(remote.read_range(&entry.latents, 0..LATENTS_OFFSET, Ok))?;
        check_header(&latents, &header, entry.rows, self.latent_shape(entry.bucket))?;
        let latents_len = runtime().block_on(remote.len(&entry.latents))?;
        check_len(&latents, latents_len, self.manifest.latents_bytes(entry))?;
        check_len(&text, runtime().block_on(remote.len(&entry.text))?, entry.text_bytes)
    }

    /// Reads one row, numbered with the deleted ones, if its block is on a disk. The first read of a block reads and
    /// verifies all of it.
    pub(crate) fn read_row_on_disk(&self, object: usize, row: u32, out: &mut [f16]) -> Result<bool> {
        if self.remote.is_none() {
            return self.read_row(object, row, out).map(|()| true);
        }
        let Some(cache) = &self.cache else { return Ok(false) };
        let block = row / BLOCK_ROWS;
        let request = self.request(ObjectFile::Latents, object, block..block + 1)?;
        let (word, bit) = (&self.verified[object][block as usize / 64], 1u64 << (block % 64));
        if word.load(Ordering::Relaxed) & bit == 0 {
            let Some(bytes) = cache.get(&request, 0) else { return Ok(false) };
            word.fetch_or(bit, Ordering::Relaxed);
            return self.copy_row(object, row, &bytes, out).map(|()| true);
        }
        let mut bytes = vec![0; out.len() * 2];
        let start = u64::from(row % BLOCK_ROWS) * bytes.len() as u64;
        Ok(cache.get_part(&request, start, &mut bytes) && self.decode_row(object, row, &bytes, out).map(|()| true)?)
    }

    /// Reads one row of an object on a disk, numbered with the deleted ones.
    pub(crate) fn read_row(&self, object: usize, row: u32, out: &mut [f16]) -> Result<()> {
        let file = self.latents_file(object)?;
        let (block, row_bytes) = (row / BLOCK_ROWS, out.len() * 2);
        let (word, bit) = (&self.verified[object][block as usize / 64], 1u64 << (block % 64));
        if word.load(Ordering::Relaxed) & bit == 0 {
            let bytes = fetch::read_from(&file, &self.request(ObjectFile::Latents, object, block..block + 1)?)?;
            word.fetch_or(bit, Ordering::Relaxed);
            return self.copy_row(object, row, &bytes[0], out);
        }
        let mut bytes = vec![0; row_bytes];
        let offset = LATENTS_OFFSET + u64::from(row) * row_bytes as u64;
        file.read_exact_at(&mut bytes, offset).map_err(Error::io(self.latents_path(object)))?;
        self.decode_row(object, row, &bytes, out)
    }

    fn latents_path(&self, object: usize) -> PathBuf {
        self.root.join(&self.manifest.objects[object].latents)
    }

    /// The object's latents file, its header checked when it is opened.
    fn latents_file(&self, object: usize) -> Result<Arc<File>> {
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

    fn not_finite(&self, object: usize, row: u32) -> Error {
        let records = self.object_records(object).unwrap_or_default();
        let sample = records.get(row as usize).map_or_else(
            || "whose text cannot be read either".to_owned(),
            |record| format!("sample {} ({})", record.id, record.source),
        );
        let reason = format!("row {row}, {sample}, is not finite: delete that image and prepare again");
        Error::Malformed { path: self.latents_path(object), kind: "latents file", reason }
    }

    fn no_such(&self, split: Split, bucket: u32, row: u64) -> Error {
        let spans = self.rows.get(&(split, bucket)).into_iter().flatten();
        let num_rows: u64 = spans.map(|span| span.num_rows).sum();
        let what = format!("row {row} of bucket {bucket} ({split:?})");
        Error::Invalid { what, reason: format!("{} has {num_rows} such rows", self.root.display()) }
    }
}

/// Whether no number is infinite or NaN. Without a branch for each, so that many are looked at together.
fn all_finite(numbers: &[f16]) -> bool {
    let magnitude = |number: &f16| number.to_bits() & 0x7fff;
    numbers.iter().map(magnitude).fold(0, u16::max) < f16::INFINITY.to_bits()
}

/// Physical numbers of an object's live rows, if any row is deleted.
fn live_rows(object: &Object) -> Option<Vec<u32>> {
    let bits = object.deleted_bits()?;
    Some((0..object.rows).filter(|row| bits[*row as usize / 8] >> (row % 8) & 1 == 0).collect())
}

fn check_len(path: &Path, found: u64, expected: u64) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let reason = format!("it has {found} bytes, the manifest says {expected}");
    Err(Error::Malformed { path: path.into(), kind: "file of the data set", reason })
}

/// The manifest and the block table that it names.
fn read_description(root: &Path, remote: &Remote) -> Result<(Manifest, BlockTable)> {
    let bytes = runtime().block_on(remote.read_all(MANIFEST_FILE, MAX_MANIFEST_BYTES))?;
    let manifest = Manifest::parse(&root.join(MANIFEST_FILE), &bytes)?;
    let bytes = runtime().block_on(remote.read_all(&manifest.blocks.file, manifest.blocks.bytes))?;
    let path = root.join(&manifest.blocks.file);
    let blocks = BlockTable::parse(&path, bytes.into(), &manifest.blocks, manifest.num_blocks())?;
    Ok((manifest, blocks))
}

#[cfg(test)]
mod tests {
    use std::{fs, io};

    use super::*;
    use crate::format::{
        bucket::{Bucket, Geometry, ResizeSpace},
        manifest::{Codec, MANIFEST_FILE, commit},
        record::SampleId,
        shard::ObjectWriter,
    };

    const SHAPE: [usize; 3] = [4, 2, 3];
    const ROW_BYTES: usize = 4 * 2 * 3 * 2;

    fn record(id: u64) -> Record {
        Record {
            id: SampleId(u64::MAX - id),
            captions: (0..id % 3).map(|i| format!("caption {i} of «{id}»")).collect(),
            tags: if id.is_multiple_of(2) { vec![String::new(), "1girl".to_owned()] } else { Vec::new() },
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
        (0..24).map(|i| f16::from_f32(id as f32 + i as f32 / 32.0)).collect()
    }

    /// A data set of one bucket: train objects of 70 and 5 rows, a test object of 33.
    fn write(root: &Path) -> Manifest {
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
        manifest.buckets.push(Bucket { width_px: 24, height_px: 16 });
        let mut blocks = Vec::new();
        for (name, split, ids) in [("a", Split::Train, 0..70), ("b", Split::Train, 70..75), ("c", Split::Test, 75..108)]
        {
            let (latents_name, text) = (format!("latents/{name}.safetensors"), format!("text/{name}.parquet"));
            let mut writer = ObjectWriter::create(root, &latents_name, &text, SHAPE).unwrap();
            ids.for_each(|id| writer.push(&latents(id), record(id)).unwrap());
            let done = writer.finish().unwrap();
            let (bucket, rows, text_bytes, deleted) = (0, done.rows, done.text_bytes, None);
            manifest.objects.push(Object { bucket, split, rows, latents: latents_name, text, text_bytes, deleted });
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
        File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
    }

    #[test]
    fn rows_come_back_as_they_were_written() {
        let root = tempfile::tempdir().unwrap();
        write(root.path());
        let data = Dataset::open(root.path()).unwrap();
        let shape = |num_rows| vec![BucketShape { bucket: 0, width_px: 24, height_px: 16, num_rows }];
        assert_eq!(data.buckets(Split::Train), shape(75));
        assert_eq!(data.buckets(Split::Test), shape(33));
        assert_eq!(data.latent_shape(0), SHAPE);
        assert_eq!(data.records(Split::Train, 0).unwrap(), (0..75).map(record).collect::<Vec<_>>());
        assert_eq!(data.records(Split::Test, 0).unwrap(), (75..108).map(record).collect::<Vec<_>>());
        assert_eq!(read_ids(&data, Split::Train, &[74, 0, 69, 70, 31, 32, 0]), [74, 0, 69, 70, 31, 32, 0]);
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
        assert_eq!((tensor.dtype(), tensor.shape()), (safetensors::Dtype::F16, &[70, 4, 2, 3][..]));
        assert_eq!(tensor.data()[69 * ROW_BYTES..][..2], latents(69)[0].to_le_bytes());
        let text = File::open(root.path().join("text/a.parquet")).unwrap();
        let reader = SerializedFileReader::new(text).unwrap();
        assert_eq!((reader.num_row_groups(), reader.metadata().file_metadata().num_rows()), (3, 70));
        let row = reader.get_row_iter(None).unwrap().nth(5).unwrap().unwrap();
        assert_eq!(row.get_list(1).unwrap().elements().len(), 2);
        assert_eq!((row.get_ulong(0).unwrap(), row.get_string(12).unwrap().as_str()), (u64::MAX - 5, "a/5.png"));
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
        assert_eq!(read_ids(&data, Split::Train, &(0..67).collect::<Vec<_>>()), ids);
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
            let error = data.read_latents(Split::Train, bucket, &[row], &mut out).unwrap_err().to_string();
            assert!(error.contains(&format!("row {row} of bucket {bucket}")), "{error}");
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
        let error = data.read_latents(Split::Train, 0, &[33], &mut out).unwrap_err();
        let range = LATENTS_OFFSET + 32 * ROW_BYTES as u64..LATENTS_OFFSET + 64 * ROW_BYTES as u64;
        assert!(matches!(&error, Error::Damaged { range: r, .. } if *r == range), "{error}");
        patch(&root.path().join("text/c.parquet"), 60, &[0]);
        let error = data.records(Split::Test, 0).unwrap_err();
        assert!(matches!(&error, Error::Damaged { path, .. } if path.ends_with("text/c.parquet")), "{error}");
        assert!(data.verify_object(0).is_err() && data.verify_object(1).is_ok() && data.verify_object(2).is_err());
    }

    #[test]
    fn latents_that_are_not_finite_are_refused_by_name() {
        let root = tempfile::tempdir().unwrap();
        write(root.path());
        let data = Dataset::open(root.path()).unwrap();
        let mut out = vec![f16::ZERO; 24];
        // The block is found right first, so that this is the check of the values and not of the checksum.
        data.read_latents(Split::Train, 0, &[3], &mut out).unwrap();
        let path = root.path().join("latents/a.safetensors");
        patch(&path, LATENTS_OFFSET + 4 * ROW_BYTES as u64, &f16::NAN.to_le_bytes());
        let error = data.read_latents(Split::Train, 0, &[4], &mut out).unwrap_err().to_string();
        assert!(error.contains("a/4.png") && error.contains("not finite"), "{error}");
    }

    #[test]
    fn files_that_differ_from_the_manifest_are_refused() {
        type Damage = fn(Vec<u8>) -> Vec<u8>;
        let cases: [(&str, Damage, &str); 7] = [
            ("latents/a.safetensors", |b| b[..b.len() - 1].to_vec(), "need 3872"),
            ("latents/a.safetensors", |b| [b, vec![0]].concat(), "need 3872"),
            ("latents/a.safetensors", |b| [&[0xff; 8], &b[8..]].concat(), "not 504 bytes long"),
            ("latents/a.safetensors", |b| [&b[..8], &[b'{'; 504], &b[512..]].concat(), "its header"),
            ("latents/a.safetensors", |b| replace(b, b"[70,4,2,3]", b"[70,4,3,2]"), "expected F16"),
            ("latents/a.safetensors", |b| replace(b, b"\"F16\"", b"\"I16\""), "expected F16"),
            ("latents/a.safetensors", |b| replace(b, b"[0,3360]", b"[8,3360]"), "expected F16"),
        ];
        for (name, damage, expected) in cases {
            let root = tempfile::tempdir().unwrap();
            write(root.path());
            let path = root.path().join(name);
            fs::write(&path, damage(fs::read(&path).unwrap())).unwrap();
            let data = Dataset::open(root.path()).unwrap();
            let error = data.read_latents(Split::Train, 0, &[0], &mut [f16::ZERO; 24]).unwrap_err();
            assert!(matches!(error, Error::Malformed { .. }) && error.to_string().contains(expected), "{error}");
        }
        let root = tempfile::tempdir().unwrap();
        write(root.path());
        fs::remove_file(root.path().join("latents/a.safetensors")).unwrap();
        let data = Dataset::open(root.path()).unwrap();
        let error = data.read_latents(Split::Train, 0, &[0], &mut [f16::ZERO; 24]).unwrap_err();
        assert!(matches!(&error, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound), "{error}");
    }

    fn replace(mut bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
        let at = bytes.windows(from.len()).position(|window| window == from).expect("the header holds it");
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
        let error = Dataset::open(root.path()).unwrap().records(Split::Train, 0).unwrap_err();
        assert!(matches!(error, Error::Malformed { kind: "file of the data set", .. }), "{error}");
    }
}
