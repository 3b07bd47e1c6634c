//! Threads that work side by side on one step.
//!
//! On a processor, the operations of one micro-batch are often too short to be split over cores: two threads inside a
//! 2.6 M UNet spend 41% of their time waiting for each other (docs/log.md, 2026-11-23). Whole micro-batches side by side
//! do not wait. So a step's micro-batches are dealt to workers, and each worker's operations use the cores that are
//! left to it. What is calculated does not depend on which worker did it: results come back in the order of the items.
//!
//! On a GPU there is one worker: the device itself is the parallel machine.

use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};
use tch::Device;

/// A pool of threads that call libtorch.
#[derive(Debug)]
pub(crate) struct Workers {
    pool: ThreadPool,
}

impl Workers {
    /// As many workers as are of use for `tasks` tasks on `device`, sharing libtorch's threads.
    pub(crate) fn new(device: Device, tasks: usize) -> Self {
        let workers = count(device, tasks);
        let inner = (threads() / workers) as i32;
        let pool = ThreadPoolBuilder::new()
            .num_threads(workers)
            .thread_name(|index| format!("rectiflow-worker-{index}"))
            .start_handler(move |_| tch::set_num_threads(inner))
            .build()
            .expect("the system can start a few more threads");
        Self { pool }
    }

    /// How many items are worked on at a time.
    pub(crate) fn width(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// `work` on each item, results in the items' order.
    pub(crate) fn map<T: Sync, R: Send>(&self, items: &[T], work: impl Fn(&T) -> R + Send + Sync) -> Vec<R> {
        if self.width() == 1 {
            // On the caller's thread: one of the pool's own would have its own heap, which keeps what was freed in it.
            return items.iter().map(work).collect();
        }
        self.pool.install(|| items.par_iter().with_max_len(1).map(work).collect())
    }
}

/// How many workers are of use for `tasks` tasks on `device`.
pub(crate) fn count(device: Device, tasks: usize) -> usize {
    if device == Device::Cpu { tasks.clamp(1, threads()) } else { 1 }
}

/// libtorch's threads.
pub(crate) fn threads() -> usize {
    tch::get_num_threads().max(1) as usize
}

/// References to tensors, or to what is made of them, that several threads use. `tch` calls no tensor `Sync`, since any
/// of them can be written through a shared reference.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shared<T>(T);

impl<T: Copy> Shared<T> {
    /// # Safety
    /// As long as it is in use by more than one thread, no thread may write an element that another one reads or writes,
    /// or change a tensor's storage, shape or `requires_grad`. libtorch's reference counts are atomic and its operations
    /// may read one tensor from many threads.
    pub(crate) unsafe fn new(references: T) -> Self {
        Self(references)
    }

    /// What is shared.
    pub(crate) fn get(&self) -> T {
        self.0
    }
}

// SAFETY: whoever made it promised that concurrent use is reading, or writing of disjoint elements.
unsafe impl<T> Sync for Shared<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_items() {
        let workers = Workers::new(Device::Cpu, 3);
        let items: Vec<u64> = (0..100).collect();
        assert_eq!(workers.map(&items, |item| item * item), items.iter().map(|item| item * item).collect::<Vec<_>>());
    }

    #[test]
    fn there_are_no_more_workers_than_tasks() {
        assert_eq!(Workers::new(Device::Cpu, 1).width(), 1);
        assert_eq!(Workers::new(Device::Cpu, 0).width(), 1);
        assert!(Workers::new(Device::Cpu, 1000).width() <= tch::get_num_threads().max(1) as usize);
    }
}
