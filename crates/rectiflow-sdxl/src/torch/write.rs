//! Writing a tensor in place through a shared reference, said once and by name.
//!
//! A [`Tensor`] is a handle: clones of it, and the views that a model has of its parameters, are the same numbers. tch's
//! in-place functions ask for `&mut self` of one handle, which says nothing about the others. Code that changes numbers
//! which other handles share calls [`write_to`], so that a search for its name finds every such place.

use tch::{TchError, Tensor, no_grad};

/// Overwrites the values of `target` with those of `source`, converted to its dtype and moved to its device. Every handle
/// on the same storage sees them; autograd records nothing.
///
/// # Panics
/// If `source` cannot be broadcast to the shape of `target`, or the memory that a conversion needs is not there.
pub fn write_to(target: &Tensor, source: &Tensor) {
    f_write_to(target, source).expect("the source has the target's shape");
}

/// As [`write_to`], where running out of memory must be reported.
///
/// # Errors
/// libtorch's.
pub fn f_write_to(target: &Tensor, source: &Tensor) -> Result<(), TchError> {
    no_grad(|| target.shallow_clone().f_copy_(source))
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn every_view_sees_what_was_written_and_autograd_does_not() {
        let weight = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let row = weight.detach().get(1);
        write_to(&weight, &Tensor::from_slice(&[1f64, 2.0, 3.0]));
        assert!(row.equal(&Tensor::from_slice(&[1f32, 2.0, 3.0])), "broadcast and converted");
        assert!(weight.is_leaf() && weight.requires_grad());
        write_to(&row, &Tensor::from_slice(&[4f32, 5.0, 6.0]));
        assert!(weight.detach().get(1).equal(&row) && !weight.detach().get(0).equal(&row));
        assert!(f_write_to(&row, &Tensor::from_slice(&[1f32, 2.0])).is_err());
    }
}
