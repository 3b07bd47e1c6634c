//! Blocks from object storage on a local disk, up to a number of bytes: from the second epoch on they need no network.
//!
//! A folder holds one file a block, `<data set>/latents/<object>-<block>` and `.../text/...`. Nothing in it is trusted:
//! a block is held against its checksum whenever it is read, so that whatever a killed process or a bad disk leaves is
//! found, deleted and fetched again, and files need no flush. Space is reserved before a file is written, in a counter
//! that all processes of the folder share; the limit is never passed. What is in stays in: an epoch uses each block
//! once, in another order each time, so that making room for the newest would throw out what comes sooner. When the
//! space is used up, or the disk fails, the other blocks come over the network as before.
//!
//! Only files of the names above are ever deleted, and only in a folder that bears the mark of a cache.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    Error, Result,
    durable::TEMPORARY_PREFIX,
    fetch::{Part, Request},
};

/// In the folder, says that it is a cache and may be swept.
const MARK: &str = "rectiflow-cache";
/// Bytes in use, one little-endian 64-bit number; locked while it is changed.
const USAGE: &str = "usage";
/// Hex digits of a data set's identity in its folder's name.
const IDENTITY_DIGITS: usize = 32;

/// A cache folder, opened. Several processes may have it open, and several data sets may share it.
#[derive(Debug)]
pub struct DiskCache {
    root: PathBuf,
    limit_bytes: u64,
    /// The counter's file; the mutex keeps out threads, the file's lock other processes.
    usage: Mutex<File>,
    /// Locked, shared, as long as the cache is open: who gets it alone may sweep.
    _open: File,
    has_failed: AtomicBool,
    next_temporary: AtomicU64,
}

impl DiskCache {
    /// Opens or makes the cache in `folder`, for at most `limit_bytes` of blocks. The first process to open it sweeps
    /// what a killed one left half written.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is something else in the folder; [`Error::Io`].
    pub fn open(folder: &Path, limit_bytes: u64) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let mark = folder.join(MARK);
        let is_empty = fs::read_dir(folder).map_err(Error::io(folder))?.next().is_none();
        if !is_empty && !mark.exists() {
            let reason = "it is not empty and not a cache of ours: choose another folder".to_owned();
            return Err(Error::Invalid { what: folder.display().to_string(), reason });
        }
        let open = |path: &Path| {
            let file = File::options().create(true).truncate(false).read(true).write(true).open(path);
            file.map_err(Error::io(path))
        };
        let (mark_file, usage) = (open(&mark)?, open(&folder.join(USAGE))?);
        match mark_file.try_lock() {
            Ok(()) => {
                let used = sweep(folder)?;
                usage.write_all_at(&used.to_le_bytes(), 0).map_err(Error::io(folder.join(USAGE)))?;
                // Both locks are of one open file: this turns the one into the other.
                mark_file.lock_shared().map_err(Error::io(&mark))?;
            }
            Err(TryLockError::WouldBlock) => mark_file.lock_shared().map_err(Error::io(&mark))?,
            Err(TryLockError::Error(source)) => return Err(Error::Io { path: mark, source }),
        }
        Ok(Self {
            root: folder.to_owned(),
            limit_bytes,
            usage: Mutex::new(usage),
            _open: mark_file,
            has_failed: AtomicBool::new(false),
            next_temporary: AtomicU64::new(0),
        })
    }

    /// Bytes of blocks in the folder, those being written included.
    pub fn used_bytes(&self) -> u64 {
        self.change_usage(Some).unwrap_or(0)
    }

    /// The part of the cache for one data set.
    pub(crate) fn of(self: &Arc<Self>, identity: &str) -> DatasetCache {
        let folder = self.root.join(&identity[..IDENTITY_DIGITS]);
        DatasetCache { cache: self.clone(), folder }
    }

    /// Replaces the counter by what `change` makes of it; none leaves it alone. Gives the new value.
    fn change_usage(&self, change: impl FnOnce(u64) -> Option<u64>) -> Option<u64> {
        let usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        let change = |usage: &File| -> io::Result<Option<u64>> {
            let mut bytes = [0; 8];
            usage.read_exact_at(&mut bytes, 0)?;
            let new = change(u64::from_le_bytes(bytes));
            new.map_or(Ok(()), |new| usage.write_all_at(&new.to_le_bytes(), 0))?;
            Ok(new)
        };
        let changed = usage.lock().and_then(|()| {
            let changed = change(&usage);
            // Also where it failed: others wait.
            usage.unlock().and(changed)
        });
        changed.unwrap_or_else(|error| {
            self.fail(&error);
            None
        })
    }

    fn reserve(&self, bytes: u64) -> bool {
        self.change_usage(|used| used.checked_add(bytes).filter(|&new| new <= self.limit_bytes)).is_some()
    }

    fn give_back(&self, bytes: u64) {
        self.change_usage(|used| Some(used.saturating_sub(bytes)));
    }

    /// Nothing more is written: reading goes on, from what is there and over the network.
    fn fail(&self, error: &io::Error) {
        if !self.has_failed.swap(true, Ordering::Relaxed) {
            let folder = self.root.display();
            tracing::warn!(%error, %folder, "the disk cache cannot be written; going on without adding to it");
        }
    }
}

/// The blocks of one data set.
#[derive(Debug, Clone)]
pub(crate) struct DatasetCache {
    cache: Arc<DiskCache>,
    folder: PathBuf,
}

impl DatasetCache {
    /// The blocks of a request that are here and right.
    pub(crate) fn get(&self, request: &Request) -> Vec<Option<Bytes>> {
        let blocks = (request.first..).zip(&request.blocks);
        blocks.map(|(block, &(len, xxh3))| self.get_block(&self.path(request, block), len, xxh3)).collect()
    }

    /// Keeps blocks that have been verified, as far as there is room.
    pub(crate) fn put(&self, request: &Request, first: u32, blocks: &[Bytes]) {
        for (block, bytes) in (first..).zip(blocks) {
            let len = bytes.len() as u64;
            if self.cache.has_failed.load(Ordering::Relaxed) || !self.cache.reserve(len) {
                return;
            }
            match self.put_block(&self.path(request, block), bytes) {
                Ok(true) => {}
                Ok(false) => self.cache.give_back(len),
                Err(error) => {
                    self.cache.give_back(len);
                    return self.cache.fail(&error);
                }
            }
        }
    }

    fn path(&self, request: &Request, block: u32) -> PathBuf {
        let part = match request.part {
            Part::Latents => "latents",
            Part::Text => "text",
        };
        self.folder.join(part).join(format!("{}-{block}", request.object))
    }

    fn get_block(&self, path: &Path, len: u64, xxh3: u64) -> Option<Bytes> {
        let bytes = fs::read(path).ok()?;
        if bytes.len() as u64 == len && xxh3_64(&bytes) == xxh3 {
            return Some(bytes.into());
        }
        let path_shown = path.display();
        tracing::warn!(path = %path_shown, "a cached block is damaged; fetching it again");
        // Of several that find it, one deletes it.
        if fs::remove_file(path).is_ok() {
            self.cache.give_back(bytes.len() as u64);
        }
        None
    }

    /// False where it was there already.
    fn put_block(&self, path: &Path, bytes: &[u8]) -> io::Result<bool> {
        if path.exists() {
            return Ok(false);
        }
        let folder = path.parent().expect("a block is in a folder");
        fs::create_dir_all(folder)?;
        let number = self.cache.next_temporary.fetch_add(1, Ordering::Relaxed);
        let temporary = folder.join(format!("{TEMPORARY_PREFIX}{}-{number}", process::id()));
        let written = File::create_new(&temporary).and_then(|mut file| file.write_all(bytes));
        // A link fails where another process was faster, and then that one has counted it.
        let linked = written.and_then(|()| match fs::hard_link(&temporary, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            linked => linked.map(|()| true),
        });
        let removed = fs::remove_file(&temporary);
        linked.and_then(|linked| removed.map(|()| linked))
    }
}

/// Deletes what is half written and counts the bytes of the rest. Looks only at names that a cache makes.
fn sweep(root: &Path) -> Result<u64> {
    let mut used = 0;
    let names = |folder: &Path| -> Result<Vec<(PathBuf, String)>> {
        let entries = match fs::read_dir(folder) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(Vec::new());
            }
            entries => entries.map_err(Error::io(folder))?,
        };
        let name = |entry: fs::DirEntry| (entry.path(), entry.file_name().to_string_lossy().into_owned());
        entries.map(|entry| entry.map(name).map_err(Error::io(folder))).collect()
    };
    let is_identity = |name: &str| name.len() == IDENTITY_DIGITS && name.chars().all(|c| c.is_ascii_hexdigit());
    for (dataset, _) in names(root)?.into_iter().filter(|(_, name)| is_identity(name)) {
        for part in ["latents", "text"] {
            for (path, name) in names(&dataset.join(part))? {
                if name.starts_with(TEMPORARY_PREFIX) {
                    fs::remove_file(&path).map_err(Error::io(&path))?;
                } else {
                    used += fs::metadata(&path).map_err(Error::io(&path))?.len();
                }
            }
        }
    }
    Ok(used)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn request(first: u32, blocks: &[Bytes]) -> Request {
        let checks = blocks.iter().map(|bytes| (bytes.len() as u64, xxh3_64(bytes))).collect();
        let (name, path) = ("latents/a.safetensors".to_owned(), "s3://b/latents/a.safetensors".into());
        Request { part: Part::Latents, object: 7, first, name, path, start: 512, blocks: checks }
    }

    fn blocks(count: usize) -> Vec<Bytes> {
        (0..count).map(|block| Bytes::from(vec![block as u8; 100])).collect()
    }

    fn open(folder: &Path, limit: u64) -> Arc<DiskCache> {
        Arc::new(DiskCache::open(folder, limit).unwrap())
    }

    fn found(cache: &DatasetCache, request: &Request) -> Vec<bool> {
        cache.get(request).iter().map(Option::is_some).collect()
    }

    fn file_bytes(folder: &Path) -> u64 {
        let files = fs::read_dir(folder.join(&IDENTITY[..32]).join("latents")).unwrap();
        files.map(|file| file.unwrap().metadata().unwrap().len()).sum()
    }

    #[test]
    fn blocks_outlive_the_process_and_the_limit_is_never_passed() {
        let folder = tempfile::tempdir().unwrap();
        let (blocks, cache) = (blocks(4), open(folder.path(), 250));
        let request = request(3, &blocks);
        cache.of(IDENTITY).put(&request, 3, &blocks);
        assert_eq!(found(&cache.of(IDENTITY), &request), [true, true, false, false]);
        assert_eq!((cache.used_bytes(), file_bytes(folder.path())), (200, 200));
        // The same again takes no room, and another data set has its own blocks.
        cache.of(IDENTITY).put(&request, 3, &blocks[..2]);
        assert_eq!(cache.used_bytes(), 200);
        assert_eq!(found(&cache.of(&IDENTITY.replace('0', "f")), &request), [false; 4]);
        drop(cache);
        let cache = open(folder.path(), 1000);
        assert_eq!(cache.of(IDENTITY).get(&request)[..2], [Some(blocks[0].clone()), Some(blocks[1].clone())]);
        assert_eq!(cache.used_bytes(), 200);
    }

    #[test]
    fn what_a_killed_process_leaves_is_swept_or_found_out() {
        let folder = tempfile::tempdir().unwrap();
        let (blocks, cache) = (blocks(3), open(folder.path(), 1000));
        let request = request(0, &blocks);
        cache.of(IDENTITY).put(&request, 0, &blocks);
        // Killed: space reserved for nothing, a temporary file, a block cut off, a block with a wrong byte.
        assert!(cache.reserve(555));
        drop(cache);
        let latents = folder.path().join(&IDENTITY[..32]).join("latents");
        fs::write(latents.join(format!("{TEMPORARY_PREFIX}1-1")), [0; 50]).unwrap();
        fs::write(latents.join("7-0"), [0; 60]).unwrap();
        fs::write(latents.join("7-2"), [9; 100]).unwrap();
        let cache = open(folder.path(), 1000);
        assert_eq!(cache.used_bytes(), 260);
        assert_eq!(found(&cache.of(IDENTITY), &request), [false, true, false]);
        assert_eq!((cache.used_bytes(), file_bytes(folder.path())), (100, 100));
        cache.of(IDENTITY).put(&request, 0, &blocks);
        assert_eq!(found(&cache.of(IDENTITY), &request), [true; 3]);
        assert_eq!(cache.used_bytes(), 300);
    }

    #[test]
    fn two_processes_share_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let blocks = blocks(40);
        // Each open cache has its own locks, as each process has.
        let caches = [open(folder.path(), 1050), open(folder.path(), 1050)];
        std::thread::scope(|scope| {
            for (cache, at) in caches.iter().zip([0, 20]) {
                let part = &blocks[at..at + 20];
                scope.spawn(move || cache.of(IDENTITY).put(&request(at as u32, part), at as u32, part));
            }
        });
        assert_eq!((caches[0].used_bytes(), caches[1].used_bytes(), file_bytes(folder.path())), (1000, 1000, 1000));
    }

    #[test]
    fn a_disk_that_fails_is_gone_on_without() {
        let folder = tempfile::tempdir().unwrap();
        let (blocks, cache) = (blocks(2), open(folder.path(), 1000));
        let request = request(0, &blocks);
        cache.of(IDENTITY).put(&request, 0, &blocks[..1]);
        // A file where a folder must be: nothing can be written for the other data set.
        let other = IDENTITY.replace('0', "f");
        fs::write(folder.path().join(&other[..32]), []).unwrap();
        cache.of(&other).put(&request, 0, &blocks);
        assert_eq!((found(&cache.of(&other), &request), cache.used_bytes()), (vec![false; 2], 100));
        assert!(cache.has_failed.load(Ordering::Relaxed));
        assert_eq!(found(&cache.of(IDENTITY), &request), [true, false]);
    }

    #[test]
    fn a_folder_of_somebody_else_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("thesis.tex"), "x").unwrap();
        let error = DiskCache::open(folder.path(), 1000).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
