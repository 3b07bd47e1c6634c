//! Memory that messages arrive in. Memory that is allocated for each would be zeroed by the system
//! each time.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor};

/// Tensors between two uses.
#[derive(Debug, Default)]
pub(crate) struct SpareMemory(Mutex<Vec<Tensor>>);

impl SpareMemory {
    /// At least `len` elements with arbitrary values, to be released.
    pub(crate) fn take(&self, len: i64, kind: Kind, device: Device) -> Tensor {
        let mut spare = self.lock();
        let fits = |kept: &Tensor| kept.kind() == kind && kept.device() == device && kept.numel() as i64 >= len;
        if let Some(at) = spare.iter().position(fits) {
            return spare.swap_remove(at);
        }
        // What is too small now will be again.
        spare.retain(|kept| kept.kind() != kind);
        Tensor::empty([len], (kind, device))
    }

    /// Keeps what was taken for the next message.
    pub(crate) fn release(&self, memory: Tensor) {
        self.lock().push(memory);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Tensor>> {
        // Nothing panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
