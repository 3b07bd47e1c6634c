//! Blocks kept in memory, up to a limit in bytes: for random access to a data set at a URL.
//!
//! The oldest go first. Below the limit nothing goes, so that a small remote data set is fetched once a run; above it
//! this is no cache worth the name, and `window` mode is what is wanted.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;

/// Object and block.
type Key = (usize, u32);

#[derive(Debug)]
pub(crate) struct Held {
    limit_bytes: u64,
    blocks: Mutex<Blocks>,
}

#[derive(Debug, Default)]
struct Blocks {
    by_key: HashMap<Key, Bytes>,
    oldest_first: VecDeque<Key>,
    num_bytes: u64,
}

impl Held {
    pub(crate) fn new(limit_bytes: u64) -> Self {
        Self { limit_bytes, blocks: Mutex::default() }
    }

    pub(crate) fn get(&self, key: Key) -> Option<Bytes> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner).by_key.get(&key).cloned()
    }

    pub(crate) fn insert(&self, key: Key, bytes: Bytes) {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes.len() as u64 > self.limit_bytes || blocks.by_key.contains_key(&key) {
            return;
        }
        blocks.num_bytes += bytes.len() as u64;
        blocks.by_key.insert(key, bytes);
        blocks.oldest_first.push_back(key);
        while blocks.num_bytes > self.limit_bytes {
            let oldest = blocks.oldest_first.pop_front().expect("bytes are those of blocks");
            let gone = blocks.by_key.remove(&oldest).expect("both lists hold the same keys");
            blocks.num_bytes -= gone.len() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_blocks_go_when_there_is_no_room() {
        let held = Held::new(10);
        let bytes = |len: usize| Bytes::from(vec![0; len]);
        (0..3).for_each(|block| held.insert((0, block), bytes(4)));
        assert_eq!([0, 1, 2].map(|block| held.get((0, block)).is_some()), [false, true, true]);
        held.insert((0, 9), bytes(11));
        assert_eq!((held.get((0, 9)), held.get((0, 1)).map(|b| b.len())), (None, Some(4)));
        held.insert((1, 1), bytes(10));
        assert_eq!([(0, 1), (0, 2), (1, 1)].map(|key| held.get(key).is_some()), [false, false, true]);
    }
}
