//! Vectors in CPU memory as slices, and loops over them on several threads.
//!
//! No result depends on the number of threads: pieces have a fixed size.

use std::thread;

use tch::{Device, Kind, Tensor};

use crate::state::workers;

/// Elements in a piece, the unit of work of a thread.
pub(crate) const PIECE: usize = 1 << 16;

/// Returns whether a tensor is a contiguous vector of `kind` in CPU memory.
pub(crate) fn is_plain(vector: &Tensor, kind: Kind) -> bool {
    vector.device() == Device::Cpu
        && vector.kind() == kind
        && vector.dim() == 1
        && vector.is_contiguous()
}

/// Returns the elements of a vector as a slice.
///
/// # Safety
/// The vector is plain, its elements have the size of `T`, and it outlives the returned slice.
/// Meanwhile nothing else accesses it, or all accesses are reads.
#[allow(
    clippy::mut_from_ref,
    reason = "a tensor is a reference to its elements, and any handle may write them"
)]
pub(crate) unsafe fn numbers<'a, T>(vector: &Tensor) -> &'a mut [T] {
    assert_eq!(vector.kind().elt_size_in_bytes(), size_of::<T>());
    let length = vector.numel();
    if length == 0 {
        return &mut [];
    }
    // SAFETY: required of the caller; the pointer is that of the tensor's first element.
    unsafe { std::slice::from_raw_parts_mut(vector.data_ptr().cast(), length) }
}

/// Calls `work` on each piece, with as many threads as libtorch has on this thread.
pub(crate) fn side_by_side<T: Send>(mut pieces: Vec<T>, work: impl Fn(T) + Sync) {
    let threads = workers::threads().min(pieces.len());
    if threads < 2 {
        return pieces.into_iter().for_each(work);
    }
    let share = pieces.len().div_ceil(threads);
    thread::scope(|scope| {
        while pieces.len() > share {
            let own = pieces.split_off(pieces.len() - share);
            scope.spawn(|| own.into_iter().for_each(&work));
        }
        pieces.into_iter().for_each(&work);
    });
}
