//! Reused large buffers: a fresh 16 MB costs the kernel as much time as copying into it.
//!
//! A buffer returns to its pool when the last part of its content is dropped. The pool holds, lent
//! and idle together, at most as much as was ever lent at one time: a limit on lent buffers limits
//! the pool too.

use std::{
    collections::VecDeque,
    fmt,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

/// Smaller buffers, in bytes, do not return to the pool.
const LEAST_BYTES: usize = 1 << 20;

/// A pool of buffers. Clones share it.
pub(crate) struct Buffers<T>(Arc<Mutex<Pool<T>>>);

struct Pool<T> {
    /// The one that has been idle longest first.
    idle: VecDeque<Vec<T>>,
    /// Capacity of the idle buffers.
    idle_len: usize,
    /// Capacity of the lent buffers.
    lent_len: usize,
    /// The largest value of `lent_len` so far.
    most_lent_len: usize,
}

impl<T: Clone + Default> Buffers<T> {
    /// A buffer of exactly `len` values, whose content is left over or the default: for callers
    /// that write all of it.
    pub(crate) fn take_filled(&self, len: usize) -> Lent<T> {
        let mut buffer = self.lend(len);
        buffer.resize(len, T::default());
        buffer
    }
}

impl<T> Buffers<T> {
    fn lock(&self) -> MutexGuard<'_, Pool<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty buffer with room for `len` values.
    pub(crate) fn take(&self, len: usize) -> Lent<T> {
        let mut buffer = self.lend(len);
        buffer.clear();
        buffer
    }

    /// A buffer with room for `len` values that holds what its last user left.
    fn lend(&self, len: usize) -> Lent<T> {
        let mut pool = self.lock();
        // A buffer that is much too large would waste the rest of its memory.
        let fits = |buffer: &Vec<T>| (len..=len.saturating_mul(2)).contains(&buffer.capacity());
        let found = pool
            .idle
            .iter()
            .rposition(fits)
            .and_then(|at| pool.idle.remove(at));
        pool.idle_len -= found.as_ref().map_or(0, Vec::capacity);
        let values = found.unwrap_or_else(|| Vec::with_capacity(len));
        pool.lent_len += values.capacity();
        pool.most_lent_len = pool.most_lent_len.max(pool.lent_len);
        pool.drop_surplus();
        let lent_len = values.capacity();
        Lent {
            values,
            lent_len,
            pool: self.clone(),
        }
    }

    fn take_back(&self, values: Vec<T>, lent_len: usize) {
        let mut pool = self.lock();
        pool.lent_len -= lent_len;
        // A buffer that was moved out has no capacity left.
        if values.capacity() > 0 {
            pool.idle_len += values.capacity();
            pool.idle.push_back(values);
            pool.drop_surplus();
        }
    }
}

impl<T> Pool<T> {
    /// Frees idle buffers until the pool holds at most `most_lent_len`.
    fn drop_surplus(&mut self) {
        while self.lent_len + self.idle_len > self.most_lent_len
            && let Some(oldest) = self.idle.pop_front()
        {
            self.idle_len -= oldest.capacity();
        }
    }
}

impl<T> Default for Buffers<T> {
    fn default() -> Self {
        let pool = Pool {
            idle: VecDeque::new(),
            idle_len: 0,
            lent_len: 0,
            most_lent_len: 0,
        };
        Self(Arc::new(Mutex::new(pool)))
    }
}

impl<T> Clone for Buffers<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> fmt::Debug for Buffers<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pool = self.lock();
        f.debug_struct("Buffers")
            .field("idle", &pool.idle.len())
            .field("lent_len", &pool.lent_len)
            .finish()
    }
}

/// A lent buffer, which returns to the pool when it is dropped.
pub(crate) struct Lent<T> {
    values: Vec<T>,
    /// Its capacity when it was lent.
    lent_len: usize,
    pool: Buffers<T>,
}

impl<T: Clone> Clone for Lent<T> {
    fn clone(&self) -> Self {
        let mut copy = self.pool.take(self.values.len());
        copy.extend_from_slice(&self.values);
        copy
    }
}

impl Lent<u8> {
    /// The buffer as bytes; their slices share it.
    pub(crate) fn into_bytes(mut self) -> Bytes {
        if self.capacity() < LEAST_BYTES {
            std::mem::take(&mut self.values).into()
        } else {
            Bytes::from_owner(self)
        }
    }
}

impl<T> Deref for Lent<T> {
    type Target = Vec<T>;

    fn deref(&self) -> &Vec<T> {
        &self.values
    }
}

impl<T> DerefMut for Lent<T> {
    fn deref_mut(&mut self) -> &mut Vec<T> {
        &mut self.values
    }
}

impl AsRef<[u8]> for Lent<u8> {
    fn as_ref(&self) -> &[u8] {
        &self.values
    }
}

impl<T> Drop for Lent<T> {
    fn drop(&mut self) {
        self.pool
            .take_back(std::mem::take(&mut self.values), self.lent_len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(pool: &Buffers<u8>, len: usize) -> Bytes {
        let mut buffer = pool.take(len);
        assert!(buffer.is_empty() && buffer.capacity() >= len);
        buffer.resize(len, 7);
        buffer.into_bytes()
    }

    fn idle(pool: &Buffers<u8>) -> Vec<usize> {
        pool.lock()
            .idle
            .iter()
            .map(|buffer| buffer.capacity() / LEAST_BYTES)
            .collect()
    }

    #[test]
    fn a_buffer_comes_back_with_the_last_part_of_it() {
        let pool = Buffers::default();
        let mut whole = body(&pool, LEAST_BYTES);
        let part = whole.split_to(9);
        drop(whole);
        assert_eq!((idle(&pool), &part[..]), (vec![], &[7; 9][..]));
        drop(part);
        assert_eq!(idle(&pool), [1]);
        // A buffer that is nearly as large is reused.
        let near = body(&pool, LEAST_BYTES / 4 * 3);
        assert!(idle(&pool).is_empty());
        drop(near);
    }

    #[test]
    fn a_filled_buffer_has_its_length_and_an_empty_one_none() {
        let pool = Buffers::<u8>::default();
        drop(body(&pool, LEAST_BYTES));
        let left = pool.take_filled(LEAST_BYTES - 1);
        assert_eq!(left[..], vec![7; LEAST_BYTES - 1]);
        drop(left);
        assert_eq!(pool.take_filled(LEAST_BYTES)[LEAST_BYTES - 2..], [7, 0]);
        assert!(pool.take(LEAST_BYTES).is_empty());
    }

    #[test]
    fn no_more_is_held_than_was_lent_at_one_time() {
        let pool = Buffers::default();
        drop([body(&pool, LEAST_BYTES), body(&pool, 3 * LEAST_BYTES)]);
        assert_eq!(idle(&pool), [1, 3]);
        let large = body(&pool, 4 * LEAST_BYTES);
        assert!(idle(&pool).is_empty());
        drop(large);
        assert_eq!(idle(&pool), [4]);
        // The large buffer does not fit, and both together are more than was ever lent.
        let small = body(&pool, LEAST_BYTES);
        assert!(idle(&pool).is_empty());
        drop((small, body(&pool, 10)));
        assert_eq!(idle(&pool), [1]);
        assert_eq!(pool.lock().lent_len, 0);
    }
}
