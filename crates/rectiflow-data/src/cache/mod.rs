//! Blocks from object storage on a local disk, up to a number of bytes: cached blocks need no
//! network.
//!
//! The folder holds one file per block, `<data set>/latents/<object>-<block>` and `.../text/...`.
//! Nothing in it is trusted: the checksum of a block is verified on each read, so that files that a
//! killed process or a bad disk leaves behind are detected, deleted and fetched again, and files
//! need no flush. Space is reserved before a block is requested, in a counter that all processes of
//! the folder share, and the limit is never exceeded; `evict` chooses the blocks that make room.
//! One process fetches a block while the others wait (`flight`). When the disk is full, the bytes
//! in use become the new limit; when it fails, blocks are fetched over the network as without a
//! cache.
//!
//! A living process holds locks on open files, which end with the process, however it ends. Only
//! files with the names above are ever deleted, and only in a folder that bears the mark of a
//! cache.

pub(crate) mod evict;
pub(crate) mod flight;
pub(crate) mod folder;

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;

use crate::{
    cache::{
        evict::{NextUse, Plans, Room},
        folder::{
            BlockId, IDENTITY_DIGITS, LATENTS, MARK, OPEN, PLAN_PREFIX, TEXT, USAGE, lock_shared,
            sweep,
        },
    },
    error::{Error, Result},
    lock_file::open_lockable,
    remote::request::{ObjectFile, Request},
};

/// Hex digits of a plan's hash in the name of its mark.
const PLAN_DIGITS: usize = 16;

/// An open cache folder. Several processes can have it open, and several data sets can share it.
#[derive(Debug)]
pub struct DiskCache {
    root: PathBuf,
    /// The configured limit, or less once the disk was full.
    limit_bytes: AtomicU64,
    /// The counter's file; the mutex excludes other threads, the file's lock other processes.
    usage: Mutex<File>,
    /// Holds a shared lock while the cache is open: a process that gets an exclusive one can sweep.
    _open: File,
    has_failed: AtomicBool,
    room: Mutex<Room>,
    /// The plans of this process: when it needs each block.
    pub(crate) plans: Plans,
}

impl DiskCache {
    /// Opens or creates the cache in `folder`, for at most `limit_bytes` of blocks. The first
    /// process to open it deletes half-written files of killed processes.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the folder is not empty and not a cache; [`Error::Io`].
    pub fn open(folder: &Path, limit_bytes: u64) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        check_is_cache(folder)?;
        let mark = folder.join(MARK);
        let mark_file = open_lockable(&mark).map_err(Error::io(&mark))?;
        let usage = folder.join(USAGE);
        let usage_file = open_lockable(&usage).map_err(Error::io(&usage))?;
        match mark_file.try_lock() {
            Ok(()) => {
                let used = sweep(folder).map_err(Error::io(folder))?;
                usage_file
                    .write_all_at(&used.to_le_bytes(), 0)
                    .map_err(Error::io(usage))?;
            }
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(source)) => return Err(Error::Io { path: mark, source }),
        }
        // After a sweep both locks are on the same open file: this downgrades the exclusive one.
        mark_file.lock_shared().map_err(Error::io(&mark))?;
        Ok(Self {
            root: folder.to_owned(),
            limit_bytes: AtomicU64::new(limit_bytes),
            usage: Mutex::new(usage_file),
            _open: mark_file,
            has_failed: AtomicBool::new(false),
            room: Mutex::new(Room::new(folder)),
            plans: Plans::default(),
        })
    }

    /// Bytes of blocks in the folder, blocks on their way included.
    pub fn used_bytes(&self) -> u64 {
        self.with_usage(|used| Ok(*used)).unwrap_or(0)
    }

    /// Limit in bytes of the blocks: the configured one, or less if the disk was full.
    pub fn limit_bytes(&self) -> u64 {
        self.limit_bytes.load(Ordering::Relaxed)
    }

    /// The part of the cache for one data set.
    pub(crate) fn of(self: &Arc<Self>, identity: &str) -> DatasetCache {
        let name: Arc<str> = identity[..IDENTITY_DIGITS].into();
        let folder = self.root.join(&*name);
        let open = fs::create_dir_all(&folder).and_then(|()| lock_shared(&folder.join(OPEN)));
        let open = open.map_err(|error| self.fail(&error)).ok().map(Arc::new);
        DatasetCache {
            cache: self.clone(),
            name,
            folder,
            _open: open,
        }
    }

    /// Changes the counter while no other process can. Returns `None` if the disk failed.
    pub(crate) fn with_usage<T>(
        &self,
        change: impl FnOnce(&mut u64) -> io::Result<T>,
    ) -> Option<T> {
        let usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = usage.lock().and_then(|()| {
            let changed = change_counter(&usage, change);
            // Unlock also after a failure: other processes wait.
            usage.unlock().and(changed)
        });
        drop(usage);
        changed.map_err(|error| self.fail(&error)).ok()
    }

    /// Makes room for `len` bytes that the step `due` needs, if enough blocks are needed later.
    /// Called with the counter `used` locked.
    pub(crate) fn make_room(&self, used: &mut u64, len: u64, due: u64) -> io::Result<()> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        room.make(used, len, self.limit_bytes(), due, &self.plans)
    }

    /// Whether the disk has failed, so that no more blocks are kept.
    pub(crate) fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Relaxed)
    }

    /// Handles an error of the disk. A full disk lowers the limit to the bytes in use; after any
    /// other failure nothing more is written. Reading continues from the cached blocks and over the
    /// network.
    pub(crate) fn fail(&self, error: &io::Error) {
        let folder = self.root.display();
        let is_full = matches!(
            error.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        );
        if is_full {
            let used = self.used_bytes();
            if self.limit_bytes.fetch_min(used, Ordering::Relaxed) > used {
                tracing::warn!(
                    %error,
                    %folder,
                    used,
                    "the disk of the cache is full; its limit is lowered"
                );
            }
        } else if !self.has_failed.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                %error,
                %folder,
                "the disk cache cannot be written; continuing without adding to it"
            );
        }
    }
}

/// Checks that a folder is empty or bears the mark of a cache.
fn check_is_cache(folder: &Path) -> Result<()> {
    let mut entries = fs::read_dir(folder).map_err(Error::io(folder))?;
    if entries.next().is_none() || folder.join(MARK).exists() {
        return Ok(());
    }
    Err(Error::Invalid {
        what: folder.display().to_string(),
        reason: "it is not empty and not a rectiflow cache: choose another folder".to_owned(),
    })
}

/// Changes the counter in the file `usage`, which the caller has locked.
fn change_counter<T>(
    usage: &File,
    change: impl FnOnce(&mut u64) -> io::Result<T>,
) -> io::Result<T> {
    let mut bytes = [0; 8];
    usage.read_exact_at(&mut bytes, 0)?;
    let before = u64::from_le_bytes(bytes);
    let mut used = before;
    let changed = change(&mut used);
    if used != before {
        usage.write_all_at(&used.to_le_bytes(), 0)?;
    }
    changed
}

/// Tells other processes, as long as it lives, that this process has a plan.
#[derive(Debug)]
pub(crate) struct Claim {
    /// Name of the locked file.
    pub(crate) mark: String,
    _locked: File,
}

/// The part of a cache for one data set.
#[derive(Debug, Clone)]
pub(crate) struct DatasetCache {
    pub(crate) cache: Arc<DiskCache>,
    name: Arc<str>,
    folder: PathBuf,
    /// Keeps other processes from evicting the whole data set.
    _open: Option<Arc<File>>,
}

impl DatasetCache {
    /// Name of the data set's folder.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Adds a plan of this process.
    pub(crate) fn plan_with(&self, plan: &Arc<impl NextUse + 'static>) {
        let plan = Arc::downgrade(plan);
        self.cache.plans.add(plan);
    }

    /// Tells other processes about `plan`, so that they do not evict blocks that only it needs.
    pub(crate) fn claim(&self, plan: &str) -> Option<Claim> {
        let hash = blake3::hash(plan.as_bytes()).to_hex();
        let mark = format!("{PLAN_PREFIX}{}", &hash[..PLAN_DIGITS]);
        let locked = lock_shared(&self.folder.join(&mark))
            .map_err(|error| self.cache.fail(&error))
            .ok()?;
        Some(Claim {
            mark,
            _locked: locked,
        })
    }

    /// The block at `index` of a request.
    pub(crate) fn block(&self, request: &Request, index: usize) -> BlockId {
        BlockId {
            folder: self.name.clone(),
            object: request.object,
            number: request.first + index as u32,
        }
    }

    /// The file of the block at `index` of a request.
    pub(crate) fn path(&self, request: &Request, index: usize) -> PathBuf {
        let folder = match request.file {
            ObjectFile::Latents => LATENTS,
            ObjectFile::Text => TEXT,
        };
        let block = request.first + index as u32;
        self.folder
            .join(folder)
            .join(format!("{}-{block}", request.object))
    }

    /// The block at `index` of a request, if it is in the cache and matches its checksum.
    pub(crate) fn get(&self, request: &Request, index: usize) -> Option<Bytes> {
        let path = self.path(request, index);
        let bytes = fs::read(&path).ok()?;
        if request.blocks[index].matches(&bytes) {
            return Some(bytes.into());
        }
        let path_shown = path.display();
        tracing::warn!(path = %path_shown, "a cached block is damaged; fetching it again");
        // Of several processes that find it, only one deletes it.
        self.cache.with_usage(|used| {
            if fs::remove_file(&path).is_ok() {
                *used = used.saturating_sub(bytes.len() as u64);
            }
            Ok(())
        });
        None
    }

    /// Reads bytes from `start` on of the first block of a request, which has been verified before,
    /// into `out`. Returns whether the block is still in the cache.
    pub(crate) fn get_part(&self, request: &Request, start: u64, out: &mut [u8]) -> bool {
        let file = File::open(self.path(request, 0));
        file.is_ok_and(|file| file.read_exact_at(out, start).is_ok())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::thread;

    use super::*;
    use crate::{
        cache::flight::{Boarding, Flight},
        durable::TEMPORARY_PREFIX,
        remote::block_checksum::BlockChecksum,
    };

    pub(crate) const IDENTITY: &str =
        "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    pub(crate) fn request(first: u32, blocks: &[Bytes]) -> Request {
        let checks = blocks
            .iter()
            .map(|bytes| BlockChecksum::of(bytes))
            .collect();
        let (name, path) = (
            "latents/a.safetensors".to_owned(),
            "s3://b/latents/a.safetensors".into(),
        );
        Request {
            file: ObjectFile::Latents,
            object: 7,
            first,
            name,
            path,
            start: 512,
            step: 0,
            blocks: checks,
        }
    }

    pub(crate) fn blocks(count: usize) -> Vec<Bytes> {
        (0..count)
            .map(|block| Bytes::from(vec![block as u8; 100]))
            .collect()
    }

    pub(crate) fn open(folder: &Path, limit: u64) -> Arc<DiskCache> {
        Arc::new(DiskCache::open(folder, limit).unwrap())
    }

    /// The flight of a block that is not in the cache.
    pub(crate) fn flight(cache: &DatasetCache, request: &Request, index: usize) -> Flight {
        match cache.board(request, index) {
            Boarding::Ours(flight) => flight,
            other => panic!("{other:?}"),
        }
    }

    /// Keeps the blocks of a request as far as there is room.
    pub(crate) fn keep(cache: &DatasetCache, request: &Request, blocks: &[Bytes]) {
        for (index, bytes) in blocks.iter().enumerate() {
            if let Boarding::Ours(flight) = cache.board(request, index) {
                flight.keep(bytes);
            }
        }
    }

    pub(crate) fn found(cache: &DatasetCache, request: &Request) -> Vec<bool> {
        (0..request.blocks.len())
            .map(|index| cache.get(request, index).is_some())
            .collect()
    }

    pub(crate) fn file_bytes(folder: &Path) -> u64 {
        let files = fs::read_dir(folder.join(&IDENTITY[..32]).join("latents")).unwrap();
        files
            .map(|file| file.unwrap().metadata().unwrap().len())
            .sum()
    }

    /// Adds `bytes` to the counter without a file.
    pub(crate) fn count_more(cache: &DiskCache, bytes: u64) {
        let counted = cache.with_usage(|used| {
            *used += bytes;
            Ok(())
        });
        counted.unwrap();
    }

    #[test]
    fn blocks_outlive_the_process_and_the_limit_is_never_passed() {
        let folder = tempfile::tempdir().unwrap();
        let (blocks, cache) = (blocks(4), open(folder.path(), 250));
        let request = request(3, &blocks);
        keep(&cache.of(IDENTITY), &request, &blocks);
        assert_eq!(
            found(&cache.of(IDENTITY), &request),
            [true, true, false, false]
        );
        assert_eq!((cache.used_bytes(), file_bytes(folder.path())), (200, 200));
        // Keeping the same blocks again takes no room, and another data set has its own blocks.
        keep(&cache.of(IDENTITY), &request, &blocks);
        assert_eq!(cache.used_bytes(), 200);
        assert_eq!(
            found(&cache.of(&IDENTITY.replace('0', "f")), &request),
            [false; 4]
        );
        drop(cache);
        let cache = open(folder.path(), 1000);
        assert_eq!(
            [0, 1].map(|index| cache.of(IDENTITY).get(&request, index)),
            [0, 1].map(|at| Some(blocks[at].clone()))
        );
        assert_eq!(cache.used_bytes(), 200);
    }

    #[test]
    fn what_a_killed_process_leaves_is_swept_or_found_out() {
        let folder = tempfile::tempdir().unwrap();
        let (blocks, cache) = (blocks(3), open(folder.path(), 1000));
        let request = request(0, &blocks);
        keep(&cache.of(IDENTITY), &request, &blocks);
        // A killed process leaves reserved space, a temporary file, a truncated block and a block
        // with wrong bytes.
        count_more(&cache, 555);
        drop(cache);
        let latents = folder.path().join(&IDENTITY[..32]).join("latents");
        fs::write(latents.join(format!("{TEMPORARY_PREFIX}7-1")), [0; 50]).unwrap();
        fs::write(latents.join("7-0"), [0; 60]).unwrap();
        fs::write(latents.join("7-2"), [9; 100]).unwrap();
        let cache = open(folder.path(), 1000);
        assert_eq!(cache.used_bytes(), 260);
        assert_eq!(found(&cache.of(IDENTITY), &request), [false, true, false]);
        assert_eq!((cache.used_bytes(), file_bytes(folder.path())), (100, 100));
        keep(&cache.of(IDENTITY), &request, &blocks);
        assert_eq!(found(&cache.of(IDENTITY), &request), [true; 3]);
        assert_eq!(cache.used_bytes(), 300);
    }

    #[test]
    fn two_processes_share_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let blocks = blocks(40);
        // Each open cache has its own locks, like a process.
        let caches = [open(folder.path(), 1050), open(folder.path(), 1050)];
        thread::scope(|scope| {
            for (cache, at) in caches.iter().zip([0, 20]) {
                let part = &blocks[at..at + 20];
                scope.spawn(move || keep(&cache.of(IDENTITY), &request(at as u32, part), part));
            }
        });
        assert_eq!(
            (
                caches[0].used_bytes(),
                caches[1].used_bytes(),
                file_bytes(folder.path())
            ),
            (1000, 1000, 1000)
        );
    }

    #[test]
    fn a_disk_that_fails_is_gone_on_without() {
        let folder = tempfile::tempdir().unwrap();
        let (blocks, cache) = (blocks(2), open(folder.path(), 1000));
        let request = request(0, &blocks);
        keep(&cache.of(IDENTITY), &request, &blocks[..1]);
        // A file in place of a folder: nothing can be written for the other data set.
        let other = IDENTITY.replace('0', "f");
        fs::write(folder.path().join(&other[..32]), []).unwrap();
        keep(&cache.of(&other), &request, &blocks);
        assert_eq!(
            (found(&cache.of(&other), &request), cache.used_bytes()),
            (vec![false; 2], 100)
        );
        assert!(cache.has_failed());
        assert_eq!(found(&cache.of(IDENTITY), &request), [true, false]);
    }

    #[test]
    fn a_full_disk_lowers_the_limit_to_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let (blocks, cache) = (blocks(3), open(folder.path(), 1000));
        let request = request(0, &blocks);
        keep(&cache.of(IDENTITY), &request, &blocks[..2]);
        cache.fail(&io::Error::from(io::ErrorKind::StorageFull));
        assert!(!cache.has_failed());
        assert_eq!(cache.limit_bytes(), 200);
        keep(&cache.of(IDENTITY), &request, &blocks);
        assert_eq!(found(&cache.of(IDENTITY), &request), [true, true, false]);
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
