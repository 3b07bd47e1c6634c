//! Training steps without numbers: which operations they call, and how many bytes they hold.
//!
//! Tensors on [`DEVICE`] have a shape, a dtype and a memory layout, and no numbers: libtorch's
//! device "meta". A model of them takes the paths of every device that is no CPU, so its calls are
//! those that a GPU's step makes, at SDXL's true size, on a machine without a GPU and in seconds.
//! libtorch's C++ lacks some kernels of this device; `counting.cpp` has them, and makes the results
//! and the copies to other memory layouts that CUDA's kernels make.
//!
//! A call counts if autograd passes it on: an operation that is made of others counts as those, and
//! what a kernel calls itself does not count. PyTorch's `TorchDispatchMode` sees the same calls.

use std::{
    collections::BTreeMap,
    ffi::{CStr, c_char},
    sync::{Mutex, MutexGuard, Once, PoisonError},
};

use serde::{Deserialize, Serialize};
use tch::Device;

use crate::torch::{
    allocator::pack_tensors,
    ffi::{checked, free_text},
};

/// The device of tensors without numbers. tch has no name for it; it calls the devices that it does
/// not know so.
pub const DEVICE: Device = Device::Mps;

/// What a part of a step calls.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calls {
    /// Number of calls of each operation that autograd passes on.
    pub operations: BTreeMap<String, u64>,
    /// Number and bytes of copies to another memory layout, by the operation that makes them.
    pub layout_copies: BTreeMap<String, [u64; 2]>,
    /// Number of all calls, those inside of other operations too.
    pub dispatched: u64,
    /// Times that the processor waits for a number of the device.
    pub waits: u64,
}

impl Calls {
    /// Returns the number of calls of all operations.
    pub fn total(&self) -> u64 {
        self.operations.values().sum()
    }

    /// Returns number and bytes of all copies to another memory layout.
    pub fn all_layout_copies(&self) -> [u64; 2] {
        let mut sum = [0, 0];
        for [count, bytes] in self.layout_copies.values() {
            sum[0] += count;
            sum[1] += bytes;
        }
        sum
    }
}

/// The calls and bytes of one step with one micro-batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// Before the first node of the backward pass.
    pub forward: Calls,
    /// From the first to the last node, recomputations included.
    pub backward: Calls,
    /// After the last node.
    pub update: Calls,
    /// Number of nodes of the backward pass.
    pub nodes: u64,
    /// Bytes of all tensors at the end.
    pub live_bytes: u64,
    /// The largest number of bytes of all tensors at a time.
    pub peak_bytes: u64,
}

impl Counted {
    /// Returns the number of calls of the whole step.
    pub fn total(&self) -> u64 {
        self.parts().map(|(_, calls)| calls.total()).iter().sum()
    }

    /// Returns the parts of the step with their names.
    pub fn parts(&self) -> [(&'static str, &Calls); 3] {
        [
            ("forward", &self.forward),
            ("backward", &self.backward),
            ("update", &self.update),
        ]
    }
}

/// The right to count, which one thread has at a time.
#[derive(Debug)]
pub struct Counter(#[allow(dead_code, reason = "held")] MutexGuard<'static, ()>);

impl Counter {
    /// Waits until no other thread counts, and makes [`DEVICE`] usable.
    ///
    /// # Panics
    /// If libtorch does not accept the kernels, which the tests would show.
    pub fn new() -> Self {
        static INSTALLED: Once = Once::new();
        static ONE: Mutex<()> = Mutex::new(());
        let held = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        INSTALLED.call_once(|| {
            pack_tensors();
            // SAFETY: called once.
            checked(unsafe { rectiflow_counting_install() }).expect("libtorch takes the kernels");
        });
        Self(held)
    }

    /// Begins to count.
    pub fn begin(&self) {
        // SAFETY: the kernels are installed, and no other thread counts.
        unsafe { rectiflow_counting_begin() }
    }

    /// Returns what was called since [`Self::begin`].
    ///
    /// # Panics
    /// If the two sides of the border disagree, which the tests would show.
    pub fn end(&self) -> Counted {
        // SAFETY: as above; the text is C++'s, ends with zero, and is freed here.
        let json = unsafe {
            let text = rectiflow_counting_end();
            let json = CStr::from_ptr(text).to_string_lossy().into_owned();
            free_text(text);
            json
        };
        serde_json::from_str(&json).expect("the count is JSON of these fields")
    }
}

impl Default for Counter {
    fn default() -> Self {
        Self::new()
    }
}

unsafe extern "C" {
    fn rectiflow_counting_install() -> *mut c_char;
    fn rectiflow_counting_begin();
    fn rectiflow_counting_end() -> *mut c_char;
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;

    fn numbers(shape: &[i64]) -> Tensor {
        Tensor::zeros(shape, (Kind::Float, DEVICE))
    }

    #[test]
    fn calls_bytes_and_waits_are_counted() {
        let counter = Counter::new();
        let (x, weight) = (
            numbers(&[64, 32]),
            numbers(&[16, 32]).set_requires_grad(true),
        );
        assert_eq!(x.device(), DEVICE);
        counter.begin();
        let loss = x.linear(&weight, None::<&Tensor>).sum(Kind::Float);
        loss.backward();
        let found = loss.double_value(&[]);
        let counted = counter.end();
        assert!(found > 0.0);
        // `linear` is a composite: a transposed weight and a product.
        let forward: Vec<(&str, u64)> = counted
            .forward
            .operations
            .iter()
            .map(|(name, count)| (name.as_str(), *count))
            .collect();
        assert!(forward.starts_with(&[("aten::mm", 1)]), "{forward:?}");
        assert!(forward.contains(&("aten::t", 1)), "{forward:?}");
        assert!(!counted.forward.operations.contains_key("aten::linear"));
        assert_eq!(counted.backward.operations["aten::mm"], 1);
        assert_eq!(counted.update.waits, 1);
        assert!(counted.nodes >= 4, "{counted:?}");
        // The factors, the product and the loss; the product is gone when the gradient comes.
        assert_eq!(counted.peak_bytes, 4 * (64 * 32 + 16 * 32 + 64 * 16 + 1));
    }

    #[test]
    fn copies_to_another_layout_have_the_name_of_their_operation() {
        let counter = Counter::new();
        let (x, weight) = (numbers(&[2, 8, 16, 16]), numbers(&[64, 8, 3, 3]));
        let (scale, bias) = (numbers(&[8]), numbers(&[64]));
        // Channels last in memory.
        let last = numbers(&[2, 16, 16, 8]).permute([0, 3, 1, 2]);
        counter.begin();
        let plain = x.group_norm(4, Some(&scale), Some(&scale), 1e-5, true);
        let normed = last.group_norm(4, Some(&scale), Some(&scale), 1e-5, true);
        let convolved = last.conv2d(&weight, Some(&bias), [1, 1], [1, 1], [1, 1], 1);
        let counted = counter.end();
        assert!(plain.is_contiguous() && normed.is_contiguous());
        assert_eq!(convolved.stride()[1], 1, "channels last");
        // Read and written, in fp32: the normed pixels, copied before the norm, and the weight.
        let (pixels, weights) = (2 * 8 * 16 * 16, 64 * 8 * 3 * 3);
        let copies = &counted.forward.layout_copies;
        assert_eq!(copies["aten::clone"], [1, 8 * pixels], "{copies:?}");
        assert_eq!(copies["aten::convolution"], [1, 8 * weights], "{copies:?}");
        assert_eq!(copies.len(), 2, "{copies:?}");
    }
}
