//! Memory of request bodies, used again: a fresh 16 MB costs the kernel as much time as copying into it.
//!
//! A body goes back to the pool when the last of its blocks is dropped. The pool keeps a few; the rest is freed.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// Smaller bodies are not worth keeping.
const LEAST_BYTES: usize = 1 << 20;

/// Buffers that wait for a body. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Buffers {
    idle: Arc<Mutex<Vec<Vec<u8>>>>,
    most: usize,
}

impl Buffers {
    /// A pool that keeps at most so many.
    pub(crate) fn new(most: usize) -> Self {
        Self { idle: Arc::default(), most }
    }

    /// An empty buffer with room for `len` bytes.
    pub(crate) fn take(&self, len: usize) -> Vec<u8> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // Not one that is much too large: the rest of it would be held for nothing.
        let fits = |buffer: &Vec<u8>| (len..=len.saturating_mul(2)).contains(&buffer.capacity());
        match idle.iter().rposition(fits) {
            Some(at) => idle.swap_remove(at),
            None => Vec::with_capacity(len),
        }
    }

    /// A buffer's bytes, which come back when the last part of them is dropped.
    pub(crate) fn lend(&self, bytes: Vec<u8>) -> Bytes {
        if bytes.capacity() < LEAST_BYTES {
            bytes.into()
        } else {
            Bytes::from_owner(Lent { bytes, pool: self.clone() })
        }
    }
}

struct Lent {
    bytes: Vec<u8>,
    pool: Buffers,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        let mut idle = self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < self.pool.most {
            idle.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_with_the_last_part_of_it() {
        let pool = Buffers::new(1);
        let idle = || pool.idle.lock().unwrap().len();
        let body = |len: usize| {
            let mut buffer = pool.take(len);
            assert!(buffer.is_empty() && buffer.capacity() >= len);
            buffer.resize(len, 7);
            pool.lend(buffer)
        };
        let mut whole = body(LEAST_BYTES);
        let part = whole.split_to(9);
        drop(whole);
        assert_eq!((idle(), &part[..]), (0, &[7; 9][..]));
        drop(part);
        assert_eq!(idle(), 1);
        // Used again where it fits; no more is kept than is allowed, and nothing small.
        let both = [body(LEAST_BYTES - 9), body(3 * LEAST_BYTES)];
        assert_eq!(idle(), 0);
        drop(both);
        drop(body(10));
        assert_eq!(idle(), 1);
    }
}
