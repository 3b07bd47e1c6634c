//! Pictures that the first pass has read and the second need not read again, up to a number of
//! bytes in memory.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Files of pictures, by their index in the source.
#[derive(Debug)]
pub(crate) struct KeptPictures {
    limit_bytes: u64,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    used_bytes: u64,
    files: HashMap<usize, Vec<u8>>,
    num_taken: u64,
}

impl KeptPictures {
    /// Room for `limit_bytes` of files.
    pub(crate) fn new(limit_bytes: u64) -> Self {
        Self {
            limit_bytes,
            inner: Mutex::default(),
        }
    }

    /// Keeps the file of a picture if there is room.
    pub(crate) fn offer(&self, file: usize, bytes: Vec<u8>) {
        let mut inner = self.lock();
        let used_bytes = inner.used_bytes + bytes.len() as u64;
        if used_bytes <= self.limit_bytes {
            inner.used_bytes = used_bytes;
            inner.files.insert(file, bytes);
        }
    }

    /// Takes the file of a picture out, if it was kept.
    pub(crate) fn take(&self, file: usize) -> Option<Vec<u8>> {
        let mut inner = self.lock();
        let bytes = inner.files.remove(&file)?;
        inner.used_bytes -= bytes.len() as u64;
        inner.num_taken += 1;
        Some(bytes)
    }

    /// Number of pictures that were taken out.
    pub(crate) fn num_taken(&self) -> u64 {
        self.lock().num_taken
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_kept_while_there_is_room_and_taken_once() {
        let kept = KeptPictures::new(10);
        kept.offer(1, vec![1; 6]);
        kept.offer(2, vec![2; 6]);
        kept.offer(3, vec![3; 4]);
        assert_eq!(kept.take(2), None);
        assert_eq!(kept.take(1), Some(vec![1; 6]));
        assert_eq!(kept.take(1), None);
        kept.offer(2, vec![2; 6]);
        assert_eq!(kept.take(2), Some(vec![2; 6]));
        assert_eq!(kept.take(3), Some(vec![3; 4]));
        assert_eq!(kept.num_taken(), 3);
    }
}
