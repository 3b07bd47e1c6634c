//! The update of long vectors on a GPU: few calls of libtorch, each over a list of tensors, and few
//! waits for the device.
//!
//! On a CPU an update is a loop of one pass over memory (`state/one_pass` of the trainer). On a GPU
//! libtorch's own fused AdamW does the same, on masters in fp32: those in halves are completed in
//! groups of 256 MiB, and rounded again. Norms are read once for all vectors together.

use std::{ffi::c_char, ptr};

use tch::{TchError, Tensor};
use torch_sys::C_tensor;

use crate::torch::ffi::{Torch, checked};

/// Consecutive elements of all vectors that belong to parameters.
#[derive(Debug)]
pub struct Part {
    /// Masters `[n]` fp32, or the nearest bf16 numbers of masters in halves.
    pub master: Tensor,
    /// The remainders `[n]` int16 of masters in halves.
    pub remainder: Option<Tensor>,
    /// Mean of gradients, `[n]` fp32.
    pub mean: Option<Tensor>,
    /// Mean of squared gradients, `[n]` fp32.
    pub mean_square: Option<Tensor>,
    /// `[n]` fp32.
    pub gradient: Option<Tensor>,
    /// Averaged masters, `[n]` fp32.
    pub average: Option<Tensor>,
    /// Learning rate.
    pub rate: f64,
}

/// The scalars of an AdamW update.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct AdamW {
    /// Decay of the mean.
    pub beta1: f64,
    /// Decay of the mean square.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Index of the update, from 1.
    pub update: f64,
}

impl AdamW {
    /// Updates moments and masters. All parts have the rate of the first.
    ///
    /// # Errors
    /// libtorch's error (out of memory).
    pub fn update(&self, parts: &[Part]) -> Result<(), TchError> {
        if parts.is_empty() {
            return Ok(());
        }
        let raw = raw(parts);
        // SAFETY: the pointers are live tensors for the whole call.
        checked(unsafe { rectiflow_adamw(raw.as_ptr(), raw.len(), self) })
    }

    /// Updates the moments. Returns for each part the sum of `g^2 / max(v, eps^2)`, with the
    /// corrected second moment.
    ///
    /// # Errors
    /// libtorch's error (out of memory).
    pub fn advance(&self, parts: &[Part]) -> Result<Vec<f64>, TchError> {
        let mut excess = vec![0.0; parts.len()];
        if !parts.is_empty() {
            let raw = raw(parts);
            // SAFETY: as in `update`, and `excess` has a number for each part.
            checked(unsafe {
                rectiflow_advance(raw.as_ptr(), raw.len(), self, excess.as_mut_ptr())
            })?;
        }
        Ok(excess)
    }

    /// Applies weight decay and the step to the masters, each part at its own rate.
    ///
    /// # Errors
    /// libtorch's error (out of memory).
    pub fn apply(&self, parts: &[Part]) -> Result<(), TchError> {
        let raw = raw(parts);
        // SAFETY: as in `update`.
        checked(unsafe { rectiflow_apply(raw.as_ptr(), raw.len(), self) })
    }
}

/// Sets each average to `(1 - weight) * average + weight * master`.
///
/// # Errors
/// libtorch's error (out of memory).
pub fn lerp_averages(parts: &[Part], weight: f64) -> Result<(), TchError> {
    let raw = raw(parts);
    // SAFETY: the pointers are live tensors for the whole call.
    checked(unsafe { rectiflow_lerp(raw.as_ptr(), raw.len(), weight) })
}

/// Returns the sum of the squares of all vectors, added in fp64.
///
/// # Errors
/// libtorch's error.
pub fn square_norm(vectors: &[&Tensor]) -> Result<f64, TchError> {
    let mut sum = 0.0;
    if !vectors.is_empty() {
        let raw: Vec<*const C_tensor> = vectors.iter().map(|vector| vector.as_ptr()).collect();
        // SAFETY: as in `lerp_averages`.
        checked(unsafe { rectiflow_square_norm(raw.as_ptr(), raw.len(), &raw mut sum) })?;
    }
    Ok(sum)
}

/// Multiplies all vectors by `factor`.
///
/// # Errors
/// libtorch's error.
pub fn scale(vectors: &[&Tensor], factor: f64) -> Result<(), TchError> {
    let raw: Vec<*const C_tensor> = vectors.iter().map(|vector| vector.as_ptr()).collect();
    // SAFETY: as in `lerp_averages`.
    checked(unsafe { rectiflow_scale(raw.as_ptr(), raw.len(), factor) })
}

/// Returns a view of a contiguous vector's elements from `offset` on, in this shape. Autograd knows
/// nothing of it.
///
/// # Errors
/// libtorch's error, if the vector has fewer elements.
pub fn part_of(vector: &Tensor, offset: i64, shape: &[i64]) -> Torch {
    let mut out = ptr::null_mut();
    let sizes = shape.as_ptr();
    // SAFETY: the pointers are valid for the whole call; the view shares the vector's storage.
    checked(unsafe {
        rectiflow_part_of(vector.as_ptr(), offset, sizes, shape.len(), &raw mut out)
    })?;
    // SAFETY: without an error `out` is a tensor that this function owns.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// A part in C++'s form.
#[repr(C)]
struct RawPart {
    master: *const C_tensor,
    remainder: *const C_tensor,
    mean: *const C_tensor,
    mean_square: *const C_tensor,
    gradient: *const C_tensor,
    average: *const C_tensor,
    rate: f64,
}

fn raw(parts: &[Part]) -> Vec<RawPart> {
    let pointer = |tensor: &Option<Tensor>| tensor.as_ref().map_or(ptr::null(), Tensor::as_ptr);
    let raw = |part: &Part| RawPart {
        master: part.master.as_ptr(),
        remainder: pointer(&part.remainder),
        mean: pointer(&part.mean),
        mean_square: pointer(&part.mean_square),
        gradient: pointer(&part.gradient),
        average: pointer(&part.average),
        rate: part.rate,
    };
    parts.iter().map(raw).collect()
}

unsafe extern "C" {
    fn rectiflow_adamw(parts: *const RawPart, count: usize, of: *const AdamW) -> *mut c_char;
    fn rectiflow_advance(
        parts: *const RawPart,
        count: usize,
        of: *const AdamW,
        excess: *mut f64,
    ) -> *mut c_char;
    fn rectiflow_apply(parts: *const RawPart, count: usize, of: *const AdamW) -> *mut c_char;
    fn rectiflow_lerp(parts: *const RawPart, count: usize, weight: f64) -> *mut c_char;
    fn rectiflow_square_norm(
        vectors: *const *const C_tensor,
        count: usize,
        sum: *mut f64,
    ) -> *mut c_char;
    fn rectiflow_scale(vectors: *const *const C_tensor, count: usize, factor: f64) -> *mut c_char;
    fn rectiflow_part_of(
        vector: *const C_tensor,
        offset: i64,
        sizes: *const i64,
        num_sizes: usize,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn a_part_is_a_view_and_one_outside_is_an_error() {
        let vector = Tensor::zeros([10], (Kind::Float, Device::Cpu));
        let mut part = part_of(&vector.narrow(0, 1, 8), 2, &[2, 3]).unwrap();
        let _ = part.fill_(1.0);
        let found: Vec<f32> = Vec::try_from(&vector).unwrap();
        assert_eq!(found, [0., 0., 0., 1., 1., 1., 1., 1., 1., 0.]);
        assert_eq!(part.size(), [2, 3]);
        for (offset, shape) in [(5, vec![4]), (-1, vec![2]), (9, vec![0, 1])] {
            let error = part_of(&vector.narrow(0, 1, 8), offset, &shape);
            let text = error.unwrap_err().to_string();
            assert!(text.contains("of a vector of [8]"), "{text}");
        }
    }

    #[test]
    fn norms_of_several_vectors_are_added_in_fp64() {
        let ones = Tensor::ones([100_000], (Kind::Float, Device::Cpu));
        let small = &ones * 1e-3;
        let found = square_norm(&[&ones, &small]).unwrap();
        let of_small = f64::from(1e-3f32).powi(2) * 1e5;
        assert!((found - 1e5 - of_small).abs() < 1e-6, "{found}");
        assert_eq!(square_norm(&[]).unwrap(), 0.0);
        scale(&[&ones, &small], 0.5).unwrap();
        assert_eq!(ones.double_value(&[7]), 0.5);
    }
}
