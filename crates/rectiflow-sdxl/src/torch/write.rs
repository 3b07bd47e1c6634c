//! In-place writes of a tensor through a shared reference, defined once.
//!
//! A [`Tensor`] is a handle: its clones, and a model's views of its parameters, share its numbers.
//! tch's in-place functions take `&mut self` of one handle, which says nothing about the others.
//! Code that changes numbers shared with other handles calls [`write_to`], so that a search for its
//! name finds all such places.

use tch::{TchError, Tensor, no_grad};

/// Overwrites the values of `target` with those of `source`, converted to its dtype and moved to
/// its device. Every handle on the same storage changes; autograd records nothing.
///
/// # Panics
/// If `source` cannot be broadcast to the shape of `target`, or memory for the conversion is
/// lacking.
pub fn write_to(target: &Tensor, source: &Tensor) {
    f_write_to(target, source).expect("the source has the target's shape");
}

/// As [`write_to`], for callers that must report a lack of memory.
///
/// # Errors
/// libtorch's error.
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
        assert!(
            row.equal(&Tensor::from_slice(&[1f32, 2.0, 3.0])),
            "broadcast and converted"
        );
        assert!(weight.is_leaf() && weight.requires_grad());
        write_to(&row, &Tensor::from_slice(&[4f32, 5.0, 6.0]));
        assert!(weight.detach().get(1).equal(&row) && !weight.detach().get(0).equal(&row));
        assert!(f_write_to(&row, &Tensor::from_slice(&[1f32, 2.0])).is_err());
    }
}
