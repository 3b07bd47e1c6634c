//! The border to C++: how calls fail, and tensors over memory that Rust owns.
//!
//! Every C function of this workspace returns null or a text with the reason of its failure
//! (`guarded.h`); [`outcome`] converts it to a `Result`. This file is the lowest of its folder: it
//! uses no other file of the crate.

use std::{
    ffi::{CStr, c_char, c_void},
    ptr,
    sync::Arc,
};

use tch::{Kind, TchError, Tensor};
use torch_sys::C_tensor;

/// The result of a calculation whose inputs were checked.
pub(crate) type Torch<T = Tensor> = Result<T, TchError>;

/// Converts the result of a C++ function of this crate, and frees its text.
pub(crate) fn checked(text: *mut c_char) -> Result<(), TchError> {
    // SAFETY: every function of this crate's C++ files returns such a text, and the caller passes
    // it on at once.
    unsafe { outcome(text) }
}

/// Converts the result of a C++ function that fails as described in `guarded.h`.
///
/// # Errors
/// [`TchError::Torch`] with the text.
///
/// # Safety
/// `text` is null or the result of such a function, and is not used again.
pub unsafe fn outcome(text: *mut c_char) -> Result<(), TchError> {
    if text.is_null() {
        return Ok(());
    }
    // SAFETY: the text is C++'s and ends with zero; its own function frees it.
    let reason = unsafe {
        let reason = CStr::from_ptr(text).to_string_lossy().into_owned();
        rectiflow_free_text(text);
        reason
    };
    Err(TchError::Torch(reason))
}

/// Returns a tensor over `bytes`, which `owner` keeps in place while any view of them exists. It
/// must not be written.
///
/// # Errors
/// libtorch's error, e.g. for an impossible shape.
///
/// # Panics
/// If there are fewer bytes than the shape needs.
pub(crate) fn tensor_over<T: Send + Sync>(
    bytes: &[u8],
    shape: &[i64],
    kind: Kind,
    owner: Arc<T>,
) -> Result<Tensor, TchError> {
    let needed = shape.iter().product::<i64>() * kind.elt_size_in_bytes() as i64;
    assert!(
        needed <= bytes.len() as i64,
        "a file's entry has as many bytes as its shape needs: the reader has checked it"
    );
    let mut out = ptr::null_mut();
    let owner = Arc::into_raw(owner).cast_mut().cast::<c_void>();
    // SAFETY: the bytes belong to `owner` and stay in place until `release` drops it, which
    // libtorch calls after the last use.
    let text = unsafe {
        rectiflow_tensor_over(
            bytes.as_ptr().cast_mut().cast(),
            shape.as_ptr(),
            shape.len(),
            scalar_type(kind),
            release::<T>,
            owner,
            &raw mut out,
        )
    };
    checked(text)?;
    // SAFETY: a new tensor with no other owner.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Returns libtorch's number of a dtype that files are used in place with.
fn scalar_type(kind: Kind) -> i8 {
    match kind {
        Kind::Uint8 => 0,
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::BFloat16 => 15,
        other => unreachable!("weights are floating-point numbers or bytes, not {other:?}"),
    }
}

/// Frees a text that a C++ function of this crate returned.
///
/// # Safety
/// `text` is the result of such a function, and is not used again.
pub(crate) unsafe fn free_text(text: *mut c_char) {
    // SAFETY: required of the caller.
    unsafe { rectiflow_free_text(text) }
}

extern "C" fn release<T>(owner: *mut c_void) {
    // SAFETY: created by `Arc::into_raw` in `tensor_over`, and libtorch releases it once.
    drop(unsafe { Arc::from_raw(owner.cast::<T>().cast_const()) });
}

unsafe extern "C" {
    fn rectiflow_free_text(text: *mut c_char);
    fn rectiflow_tensor_over(
        data: *mut c_void,
        sizes: *const i64,
        num_sizes: usize,
        kind: i8,
        release: extern "C" fn(*mut c_void),
        owner: *mut c_void,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_lives_as_long_as_any_view() {
        let bytes: Vec<u8> = (1..=6)
            .flat_map(|value| (value as f32).to_le_bytes())
            .collect();
        let owner = Arc::new(bytes);
        let tensor = tensor_over(&owner, &[2, 3], Kind::Float, owner.clone()).unwrap();
        let row = tensor.get(1);
        drop(tensor);
        assert_eq!(Arc::strong_count(&owner), 2);
        assert!(row.equal(&Tensor::from_slice(&[4f32, 5.0, 6.0])));
        drop(row);
        assert_eq!(Arc::strong_count(&owner), 1);
    }

    #[test]
    fn libtorchs_refusal_is_an_error() {
        let owner = Arc::new(vec![0u8; 16]);
        let message = tensor_over(&owner, &[-1, 4], Kind::Float, owner.clone())
            .unwrap_err()
            .to_string();
        assert!(message.contains("negative"), "{message}");
    }
}
