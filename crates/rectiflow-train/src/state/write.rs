//! Writing a tensor in place through a shared reference, said once and by name.

use tch::{Tensor, no_grad};

/// Overwrites the values of `target` with those of `source`, converted to its dtype and moved to its
/// device. Every handle on the same storage sees them; autograd records nothing.
///
/// # Panics
/// If `source` cannot be broadcast to the shape of `target`.
pub(crate) fn write_to(target: &Tensor, source: &Tensor) {
    no_grad(|| target.shallow_clone().copy_(source));
}
