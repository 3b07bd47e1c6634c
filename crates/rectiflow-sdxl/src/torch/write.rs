//! In-place writes of a tensor through a shared reference, defined once.
//!
//! A [`Tensor`] is a handle: its clones, and a model's views of its parameters, share its numbers.
//! tch's in-place functions take `&mut self` of one handle, which says nothing about the others.
//! Code that changes numbers shared with other handles calls [`write_to`], so that a search for its
//! name finds all such places.

use std::ffi::c_char;

use tch::{Device, TchError, Tensor, no_grad};
use torch_sys::C_tensor;

use crate::torch::ffi::checked;

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
    let bytes = target.numel() * target.kind().elt_size_in_bytes();
    let is_plain = |x: &Tensor| x.device() == Device::Cpu && x.is_contiguous();
    let is_same = target.kind() == source.kind() && target.size() == source.size();
    let (to, from) = (target.data_ptr().addr(), source.data_ptr().addr());
    let is_apart = to.abs_diff(from) >= bytes;
    if bytes >= LARGE && is_plain(target) && is_plain(source) && is_same && is_apart {
        // SAFETY: both are live tensors of this dtype and size, in memory that does not overlap.
        return checked(unsafe { rectiflow_copy(source.as_ptr(), target.as_ptr()) });
    }
    no_grad(|| target.shallow_clone().f_copy_(source))
}

/// Returns `x` on a device. The caller does not wait for what a GPU has to do before: libtorch's
/// plain `to` waits for all of it. The numbers are copied out of `x` before this returns.
///
/// # Panics
/// If the device lacks memory.
pub fn upload(x: &Tensor, device: Device) -> Tensor {
    f_upload(x, device).expect("the device has memory for a batch")
}

/// As [`upload`], for callers that must report a lack of memory.
///
/// # Errors
/// libtorch's error.
pub fn f_upload(x: &Tensor, device: Device) -> Result<Tensor, TchError> {
    if x.device() == device {
        return Ok(x.shallow_clone());
    }
    // To memory of the CPU an unfinished copy would be read too early.
    let may_return_early = x.device() == Device::Cpu;
    x.f_to_device_(device, x.kind(), may_return_early, false)
}

/// Bytes from which several threads copy.
const LARGE: usize = 1 << 20;

unsafe extern "C" {
    fn rectiflow_copy(from: *const C_tensor, to: *const C_tensor) -> *mut c_char;
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn large_tensors_are_copied_whole() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let source = Tensor::arange(1_200_001, (Kind::Float, Device::Cpu)).to_kind(kind);
            let target = Tensor::zeros([1_200_003], (kind, Device::Cpu));
            write_to(&target.narrow(0, 1, 1_200_001), &source);
            assert!(target.narrow(0, 1, 1_200_001).equal(&source));
            assert_eq!(
                target.double_value(&[0]) + target.double_value(&[1_200_002]),
                0.0
            );
        }
    }

    #[test]
    fn an_upload_to_a_device_without_numbers_keeps_shape_and_dtype() {
        let counter = crate::torch::counting::Counter::new();
        let x = Tensor::from_slice(&[1i64, 2, 3]);
        assert_eq!(upload(&x, Device::Cpu).data_ptr(), x.data_ptr());
        let there = upload(&x, crate::torch::counting::DEVICE);
        drop(counter);
        assert_eq!((there.size(), there.kind()), (vec![3], Kind::Int64));
        assert_eq!(there.device(), crate::torch::counting::DEVICE);
    }

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
