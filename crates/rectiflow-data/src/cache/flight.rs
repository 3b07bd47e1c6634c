//! A block on its way into a cache: one process fetches it while the others wait.
//!
//! A process that needs a missing block creates the block's temporary file and locks it. A process
//! that finds the file locked waits until the block is there, or until the lock is free because its
//! holder failed or died, and then takes over. Space is reserved under the lock and before anything
//! is requested. The length of the temporary file equals the reserved space, so that the space of a
//! killed process can be recognised and released.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use bytes::Bytes;

use crate::{
    cache::{DatasetCache, folder::is_at},
    durable::TEMPORARY_PREFIX,
    lock_file::open_lockable,
    remote::request::Request,
};

/// The source of a block.
#[derive(Debug)]
pub(crate) enum Boarding {
    /// From the disk.
    Here(Bytes),
    /// From the network, fetched by this process.
    Ours(Flight),
    /// From the network, fetched by another process or thread.
    Theirs,
}

/// A block that only the holder fetches. Dropping it releases the block.
#[derive(Debug)]
pub(crate) struct Flight {
    cache: DatasetCache,
    path: PathBuf,
    len: u64,
    /// The locked temporary file and its path. None if the block will not be kept.
    temporary: Option<(File, PathBuf)>,
}

/// Attempts to take a block whose file appears and disappears.
const TRIES: usize = 4;

impl DatasetCache {
    /// The source of the block at `index` of a request.
    pub(crate) fn board(&self, request: &Request, index: usize) -> Boarding {
        let path = self.path(request, index);
        let mut flight = Flight {
            cache: self.clone(),
            path,
            len: request.blocks[index].len,
            temporary: None,
        };
        for _ in 0..TRIES {
            if let Some(bytes) = self.get(request, index) {
                return Boarding::Here(bytes);
            }
            if self.cache.has_failed() {
                break;
            }
            match self.take(&flight.path) {
                Ok(Taken::Theirs) => return Boarding::Theirs,
                Ok(Taken::Gone) => {}
                Ok(Taken::Ours(file, temporary)) => {
                    if self.reserve(request, index, &file) {
                        flight.temporary = Some((file, temporary));
                    } else {
                        // A file that cannot be deleted does no harm: the next flight uses it.
                        let _ = fs::remove_file(&temporary);
                    }
                    break;
                }
                Err(error) => self.cache.fail(&error),
            }
        }
        Boarding::Ours(flight)
    }

    /// Locks the temporary file of a block.
    fn take(&self, path: &Path) -> io::Result<Taken> {
        let folder = path.parent().expect("a block is in a folder");
        fs::create_dir_all(folder)?;
        let name = path
            .file_name()
            .expect("a block has a name")
            .to_string_lossy();
        let temporary = folder.join(format!("{TEMPORARY_PREFIX}{name}"));
        let file = open_lockable(&temporary)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(Taken::Theirs),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        if !is_at(&file, &temporary) {
            // Its flight has ended since it was opened.
            return Ok(Taken::Gone);
        }
        if path.exists() {
            fs::remove_file(&temporary)?;
            return Ok(Taken::Gone);
        }
        Ok(Taken::Ours(file, temporary))
    }

    /// Reserves space for a block in its temporary file. Returns whether there is room.
    fn reserve(&self, request: &Request, index: usize, file: &File) -> bool {
        let cache = &self.cache;
        let len = request.blocks[index].len;
        let block = self.block(request, index);
        let reserved = cache.with_usage(|used| {
            // Release the space that a killed process had reserved.
            *used = used.saturating_sub(file.metadata()?.len());
            file.set_len(0)?;
            if used.saturating_add(len) > cache.limit_bytes() {
                cache.make_room(used, len, cache.plans.due(&block, request.step))?;
            }
            let is_free = used.saturating_add(len) <= cache.limit_bytes();
            if is_free {
                file.set_len(len)?;
                *used += len;
            }
            Ok(is_free)
        });
        reserved == Some(true)
    }
}

/// The outcome of an attempt to take a block.
enum Taken {
    Ours(File, PathBuf),
    Theirs,
    /// The block or its temporary file has changed in the meantime: try again.
    Gone,
}

impl Flight {
    /// Keeps the verified bytes of the block in the cache.
    pub(crate) fn keep(mut self, bytes: &[u8]) {
        let Some((file, temporary)) = &self.temporary else {
            return;
        };
        let cache = self.cache.cache.clone();
        if let Err(error) = file.write_all_at(bytes, 0) {
            // Release the space first: a full disk lowers the limit to the bytes in use.
            drop(self);
            return cache.fail(&error);
        }
        // Under the counter's lock, so that a scan counts the file once.
        if cache
            .with_usage(|_| fs::rename(temporary, &self.path))
            .is_some()
        {
            self.temporary = None;
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let Some((_file, temporary)) = self.temporary.take() else {
            return;
        };
        self.cache.cache.with_usage(|used| {
            fs::remove_file(&temporary)?;
            *used = used.saturating_sub(self.len);
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::tests::{
        IDENTITY, blocks, count_more, file_bytes, flight, found, open, request,
    };

    #[test]
    fn one_fetches_while_others_wait_and_takes_over_from_one_that_gives_up() {
        let folder = tempfile::tempdir().unwrap();
        let blocks = blocks(2);
        let request = request(0, &blocks);
        // Each open cache has its own locks, like a process.
        let [first, second] = [(); 2].map(|()| open(folder.path(), 1000).of(IDENTITY));
        let ours = flight(&first, &request, 0);
        assert!(matches!(second.board(&request, 0), Boarding::Theirs));
        // Space is reserved before the request.
        assert_eq!(
            (second.cache.used_bytes(), file_bytes(folder.path())),
            (100, 100)
        );
        ours.keep(&blocks[0]);
        assert!(matches!(second.board(&request, 0), Boarding::Here(bytes) if bytes == blocks[0]));
        drop(flight(&first, &request, 1));
        assert_eq!(first.cache.used_bytes(), 100, "space is released");
        let taken_over = flight(&second, &request, 1);
        assert!(matches!(first.board(&request, 1), Boarding::Theirs));
        taken_over.keep(&blocks[1]);
        assert_eq!(
            (found(&first, &request), first.cache.used_bytes()),
            (vec![true; 2], 200)
        );
        assert_eq!(file_bytes(folder.path()), 200);
    }

    #[test]
    fn what_a_killed_process_had_reserved_is_given_back_to_who_takes_over() {
        let folder = tempfile::tempdir().unwrap();
        let blocks = blocks(1);
        let (request, cache) = (request(0, &blocks), open(folder.path(), 150));
        // Killed during a flight: its file is left, its space is counted, its lock is gone.
        let latents = folder.path().join(&IDENTITY[..32]).join("latents");
        fs::create_dir_all(&latents).unwrap();
        fs::write(latents.join(format!("{TEMPORARY_PREFIX}7-0")), [0; 100]).unwrap();
        count_more(&cache, 100);
        flight(&cache.of(IDENTITY), &request, 0).keep(&blocks[0]);
        assert_eq!(
            (found(&cache.of(IDENTITY), &request), cache.used_bytes()),
            (vec![true], 100)
        );
        assert_eq!(fs::read_dir(&latents).unwrap().count(), 1);
    }

    #[test]
    fn without_room_a_block_is_fetched_and_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let blocks = blocks(2);
        let (request, cache) = (request(0, &blocks), open(folder.path(), 150));
        let [one, other] = [0, 1].map(|index| flight(&cache.of(IDENTITY), &request, index));
        other.keep(&blocks[1]);
        one.keep(&blocks[0]);
        assert_eq!(
            (found(&cache.of(IDENTITY), &request), cache.used_bytes()),
            (vec![true, false], 100)
        );
        assert_eq!(file_bytes(folder.path()), 100);
    }
}
