//! The checkpoint that is being copied, which rotation leaves in place: a copy that takes longer
//! than the time between two checkpoints would otherwise never be finished.

use std::sync::atomic::{AtomicU64, Ordering};

/// No step.
const NONE: u64 = u64::MAX;

/// Holds at most one checkpoint.
#[derive(Debug)]
pub(crate) struct Pin(AtomicU64);

impl Default for Pin {
    fn default() -> Self {
        Self(AtomicU64::new(NONE))
    }
}

impl Pin {
    /// Holds the checkpoint of a step, and no other.
    pub(crate) fn hold(&self, step: u64) {
        self.0.store(step, Ordering::SeqCst);
    }

    /// Holds none.
    pub(crate) fn release(&self) {
        self.0.store(NONE, Ordering::SeqCst);
    }

    /// Whether the checkpoint of a step is held.
    pub(crate) fn holds(&self, step: u64) -> bool {
        self.0.load(Ordering::SeqCst) == step
    }
}
