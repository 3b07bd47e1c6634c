//! Reusable memory that receives messages. The system would zero newly allocated memory for each
//! message.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor};

/// Tensors that are currently unused.
#[derive(Debug, Default)]
pub(crate) struct SpareMemory(Mutex<Vec<Tensor>>);

impl SpareMemory {
    /// Returns at least `len` elements with arbitrary values, to be released after use.
    pub(crate) fn take(&self, len: i64, kind: Kind, device: Device) -> Tensor {
        let mut spare = self.lock();
        let fits = |kept: &Tensor| {
            kept.kind() == kind && kept.device() == device && kept.numel() as i64 >= len
        };
        if let Some(at) = spare.iter().position(fits) {
            return spare.swap_remove(at);
        }
        // A tensor that is too small now would be too small again.
        spare.retain(|kept| kept.kind() != kind);
        Tensor::empty([len], (kind, device))
    }

    /// Keeps `memory` for a later message.
    pub(crate) fn release(&self, memory: Tensor) {
        self.lock().push(memory);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Tensor>> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
