//! Threads that work side by side on one step.
//!
//! On a processor, the operations of one micro-batch are often too short to be split over cores: two threads inside a
//! 2.6 M UNet spend 41% of their time waiting for each other (docs/log.md, 2026-11-23). Whole micro-batches side by side
//! do not wait. So a step's micro-batches are dealt to workers, and each worker's operations use the cores that are
//! left to it. What is calculated does not depend on which worker did it: results come back in the order of the items.
//!
//! On a GPU there is one worker: the device itself is the parallel machine.

use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};
use rectiflow_sdxl::model::Model;
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

    /// As [`Self::map`], where the work changes the items: views of disjoint parts of tensors, say.
    pub(crate) fn map_mut<T: Send, R: Send>(
        &self,
        items: &mut [T],
        work: impl Fn(&mut T) -> R + Send + Sync,
    ) -> Vec<R> {
        if self.width() == 1 {
            return items.iter_mut().map(work).collect();
        }
        self.pool.install(|| items.par_iter_mut().with_max_len(1).map(work).collect())
    }

    /// As [`Self::map`], where the workers share tensors. The work must not write these.
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

/// How many workers are of use for `tasks` tasks on `device`.
pub(crate) fn count(device: Device, tasks: usize) -> usize {
    if device == Device::Cpu { tasks.clamp(1, threads()) } else { 1 }
}

/// libtorch's threads.
pub(crate) fn threads() -> usize {
    tch::get_num_threads().max(1) as usize
}

/// Values whose only parts that are not `Sync` are tensors.
///
/// # Safety
/// Apart from tensors, nothing of the value can be written through a shared reference without a lock.
pub(crate) unsafe trait OnlyTensors {}

// SAFETY: a model is tensors and the settings of its networks.
unsafe impl OnlyTensors for Model {}

/// What the workers of [`Workers::map_tensors`] share.
struct Shared<'a, S>(&'a S);

impl<S> Shared<'_, S> {
    fn get(&self) -> &S {
        self.0
    }
}

// SAFETY: `tch` calls no tensor `Sync`, since every handle may write. libtorch's reference counts are
// atomic, and its operations may read one tensor from many threads. What this crate does in
// `map_tensors` reads the tensors that are shared: sampling, and forward and backward passes, whose
// gradients go behind the locks of `gradients`. Whatever writes them runs on the thread that called
// `map_tensors`, after it has returned.
unsafe impl<S: OnlyTensors> Sync for Shared<'_, S> {}

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
