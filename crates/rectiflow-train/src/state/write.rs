//! The one way to write a tensor in place through a shared reference.

use tch::{Tensor, no_grad};

/// Overwrites the values of `target` with those of `source`, converted to its dtype and moved to
/// its device. All handles to the same storage see the change; autograd does not record it.
///
/// # Panics
/// If `source` cannot be broadcast to the shape of `target`.
pub(crate) fn write_to(target: &Tensor, source: &Tensor) {
    no_grad(|| target.shallow_clone().copy_(source));
}
