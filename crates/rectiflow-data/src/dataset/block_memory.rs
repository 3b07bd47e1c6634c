//! Blocks kept in memory, up to a limit in bytes: for random access to a data set at a URL.
//!
//! The oldest blocks are evicted first. Below the limit nothing is evicted, so a small remote data
//! set is fetched once per run. For a data set above the limit this cache has little effect;
//! `window` mode is made for that case. One thread at a time fetches a block: other threads that
//! need it wait for that thread, whose requests have a deadline.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

use crate::dataset::index::BlockKey;

#[derive(Debug)]
pub(crate) struct BlockMemory {
    limit_bytes: u64,
    blocks: Mutex<Blocks>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Blocks {
    by_key: HashMap<BlockKey, Bytes>,
    oldest_first: VecDeque<BlockKey>,
    num_bytes: u64,
    on_their_way: HashSet<BlockKey>,
}

impl Blocks {
    /// Adds the blocks of `wanted` to `found`.
    fn find(&self, wanted: &[BlockKey], found: &mut HashMap<BlockKey, Bytes>) {
        for key in wanted {
            if !found.contains_key(key)
                && let Some(bytes) = self.by_key.get(key)
            {
                found.insert(*key, bytes.clone());
            }
        }
    }

    fn evict_oldest(&mut self) {
        let oldest = self
            .oldest_first
            .pop_front()
            .expect("the counted bytes belong to blocks");
        let gone = self
            .by_key
            .remove(&oldest)
            .expect("both lists hold the same keys");
        self.num_bytes -= gone.len() as u64;
    }
}

/// Blocks that only the holder fetches. Dropping it releases them.
#[derive(Debug)]
pub(crate) struct FetchClaim<'a> {
    memory: &'a BlockMemory,
    pub(crate) keys: Vec<BlockKey>,
}

impl BlockMemory {
    pub(crate) fn new(limit_bytes: u64) -> Self {
        Self {
            limit_bytes,
            blocks: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the cached blocks of `wanted` to `found` and claims those that no thread is fetching.
    /// If all missing blocks are claimed by other threads, waits until one of them is fetched or
    /// released.
    pub(crate) fn claim(
        &self,
        wanted: &[BlockKey],
        found: &mut HashMap<BlockKey, Bytes>,
    ) -> FetchClaim<'_> {
        let mut blocks = self.lock();
        loop {
            blocks.find(wanted, found);
            let mut keys = Vec::new();
            for key in wanted {
                if !found.contains_key(key) && !blocks.on_their_way.contains(key) {
                    keys.push(*key);
                }
            }
            if !keys.is_empty() || wanted.iter().all(|key| found.contains_key(key)) {
                blocks.on_their_way.extend(&keys);
                return FetchClaim { memory: self, keys };
            }
            blocks = self
                .changed
                .wait(blocks)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn insert(&self, key: BlockKey, bytes: Bytes) {
        let mut blocks = self.lock();
        if bytes.len() as u64 > self.limit_bytes || blocks.by_key.contains_key(&key) {
            return;
        }
        blocks.num_bytes += bytes.len() as u64;
        blocks.by_key.insert(key, bytes);
        blocks.oldest_first.push_back(key);
        while blocks.num_bytes > self.limit_bytes {
            blocks.evict_oldest();
        }
    }
}

impl Drop for FetchClaim<'_> {
    fn drop(&mut self) {
        let mut blocks = self.memory.lock();
        blocks.on_their_way.retain(|key| !self.keys.contains(key));
        self.memory.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn has(memory: &BlockMemory, key: BlockKey) -> bool {
        let mut found = HashMap::new();
        drop(memory.claim(&[key], &mut found));
        !found.is_empty()
    }

    fn bytes(len: usize) -> Bytes {
        Bytes::from(vec![0; len])
    }

    #[test]
    fn oldest_blocks_go_when_there_is_no_room() {
        let memory = BlockMemory::new(10);
        (0..3).for_each(|block| memory.insert((0, block), bytes(4)));
        assert_eq!(
            [0, 1, 2].map(|block| has(&memory, (0, block))),
            [false, true, true]
        );
        memory.insert((0, 9), bytes(11));
        assert!(!has(&memory, (0, 9)) && has(&memory, (0, 1)));
        memory.insert((1, 1), bytes(10));
        assert_eq!(
            [(0, 1), (0, 2), (1, 1)].map(|key| has(&memory, key)),
            [false, false, true]
        );
    }

    #[test]
    fn a_block_is_fetched_by_one_thread_and_given_up_with_it() {
        let memory = BlockMemory::new(100);
        let claim = memory.claim(&[(0, 1), (0, 2)], &mut HashMap::new());
        assert_eq!(claim.keys, [(0, 1), (0, 2)]);
        thread::scope(|scope| {
            let other = scope.spawn(|| {
                let mut found = HashMap::new();
                let claim = memory.claim(&[(0, 1), (0, 2)], &mut found);
                (found.into_keys().collect::<Vec<_>>(), claim.keys.clone())
            });
            memory.insert((0, 1), bytes(3));
            // The first thread fails with the second block: the other thread takes it over.
            drop(claim);
            assert_eq!(other.join().unwrap(), (vec![(0, 1)], vec![(0, 2)]));
        });
    }
}
