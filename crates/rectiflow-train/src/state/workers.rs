//! Threads that process the micro-batches of one step concurrently.
//!
//! On a CPU, the operations of one micro-batch are often too short to be split over cores: two
//! threads inside a UNet with 2.6 M parameters spend 41% of their time waiting for each other
//! (docs/log.md, 2026-11-23). Whole micro-batches run concurrently without waiting. A step's
//! micro-batches are therefore distributed over workers, and the operations of each worker use its
//! share of the cores. Results do not depend on which worker produced them, and are returned in the
//! order of the items.
//!
//! On a GPU there is one worker, because the device itself runs in parallel.

use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};
use rectiflow_sdxl::model::Model;
use tch::Device;

/// A pool of threads that call libtorch.
#[derive(Debug)]
pub(crate) struct Workers {
    pool: ThreadPool,
}

impl Workers {
    /// Returns a pool with as many workers as are useful for `tasks` tasks on `device`, which share
    /// libtorch's threads.
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

    /// Returns the number of workers.
    pub(crate) fn width(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Calls `work` on each item and returns the results in the order of the items.
    pub(crate) fn map<T: Sync, R: Send>(
        &self,
        items: &[T],
        work: impl Fn(&T) -> R + Send + Sync,
    ) -> Vec<R> {
        if self.width() == 1 {
            // On the caller's thread, because a thread of the pool has its own heap, which keeps
            // freed memory.
            return items.iter().map(work).collect();
        }
        self.pool
            .install(|| items.par_iter().with_max_len(1).map(work).collect())
    }

    /// Like [`Self::map`], for work that changes the items, such as views of disjoint parts of
    /// tensors.
    pub(crate) fn map_mut<T: Send, R: Send>(
        &self,
        items: &mut [T],
        work: impl Fn(&mut T) -> R + Send + Sync,
    ) -> Vec<R> {
        if self.width() == 1 {
            return items.iter_mut().map(work).collect();
        }
        self.pool
            .install(|| items.par_iter_mut().with_max_len(1).map(work).collect())
    }

    /// Like [`Self::map`], with tensors that the workers share. The work must not write them.
    pub(crate) fn map_tensors<S: OnlyTensors, T: Sync, R: Send>(
        &self,
        shared: &S,
        items: &[T],
        work: impl Fn(&S, &T) -> R + Send + Sync,
    ) -> Vec<R> {
        let shared = Shared(shared);
        self.map(items, |item| work(shared.get(), item))
    }
}

/// Returns the number of workers that are useful for `tasks` tasks on `device`.
pub(crate) fn count(device: Device, tasks: usize) -> usize {
    if device == Device::Cpu {
        tasks.clamp(1, threads())
    } else {
        1
    }
}

/// Returns the number of libtorch's threads.
pub(crate) fn threads() -> usize {
    tch::get_num_threads().max(1) as usize
}

/// Values whose only parts that are not `Sync` are tensors.
///
/// # Safety
/// Apart from its tensors, no part of the value can be written through a shared reference without a
/// lock.
pub(crate) unsafe trait OnlyTensors {}

// SAFETY: a model consists of tensors and the settings of its networks.
unsafe impl OnlyTensors for Model {}

/// The value that the workers of [`Workers::map_tensors`] share.
struct Shared<'a, S>(&'a S);

impl<S> Shared<'_, S> {
    fn get(&self) -> &S {
        self.0
    }
}

// SAFETY: `tch` tensors are not `Sync`, because every handle may write. libtorch's reference counts
// are atomic, and its operations may read one tensor from many threads. In `map_tensors`, this
// crate only reads the shared tensors: sampling, and forward and backward passes, whose gradients
// are added behind the locks of `gradients`. Writes happen on the thread that called `map_tensors`,
// after it has returned.
unsafe impl<S: OnlyTensors> Sync for Shared<'_, S> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_items() {
        let workers = Workers::new(Device::Cpu, 3);
        let items: Vec<u64> = (0..100).collect();
        assert_eq!(
            workers.map(&items, |item| item * item),
            items.iter().map(|item| item * item).collect::<Vec<_>>()
        );
    }

    #[test]
    fn there_are_no_more_workers_than_tasks() {
        assert_eq!(Workers::new(Device::Cpu, 1).width(), 1);
        assert_eq!(Workers::new(Device::Cpu, 0).width(), 1);
        assert!(Workers::new(Device::Cpu, 1000).width() <= tch::get_num_threads().max(1) as usize);
    }
}
