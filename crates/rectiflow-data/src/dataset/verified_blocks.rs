//! Which blocks have been verified: one bit per block, so that a block on a disk is read whole only
//! once.

use std::sync::atomic::{AtomicU64, Ordering};

/// One bit per block of each object, set once the checksum of its latents matched.
#[derive(Debug)]
pub(crate) struct VerifiedBlocks(Vec<Vec<AtomicU64>>);

impl VerifiedBlocks {
    /// An empty set for objects with these numbers of blocks.
    pub(crate) fn new(num_blocks: impl Iterator<Item = u32>) -> Self {
        let mut objects = Vec::new();
        for num_blocks in num_blocks {
            let mut words = Vec::new();
            words.resize_with(num_blocks.div_ceil(64) as usize, AtomicU64::default);
            objects.push(words);
        }
        Self(objects)
    }

    pub(crate) fn contains(&self, object: usize, block: u32) -> bool {
        self.0[object][block as usize / 64].load(Ordering::Relaxed) & bit(block) != 0
    }

    pub(crate) fn insert(&self, object: usize, block: u32) {
        self.0[object][block as usize / 64].fetch_or(bit(block), Ordering::Relaxed);
    }
}

fn bit(block: u32) -> u64 {
    1 << (block % 64)
}
