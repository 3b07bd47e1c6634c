//! Layers on a GPU in few calls of libtorch.
//!
//! A GPU waits for a processor that calls too slowly. libtorch composes a linear layer of four
//! calls and its backward pass of nine, of which one and three start a kernel. `few_calls.cpp` has
//! backward passes of its own for linear layers, attention without a mask and the gated GELU, from
//! libtorch's kernels and without the calls between them. `rectiflow bench calls` counts;
//! docs/gpu.md has the numbers. Convolutions run with channels last in memory, the layout of tensor
//! cores.
//!
//! The results are those of libtorch's own layers. The tests compare them on a CPU.

use std::{ffi::c_char, ptr};

use tch::Tensor;
use torch_sys::C_tensor;

use crate::torch::ffi::{Torch, checked};

/// Returns x w^T + b for `[*, in]` and `[out, in]` of one dtype.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Torch {
    let bias = bias.map_or(ptr::null(), Tensor::as_ptr);
    // SAFETY: the pointers are live tensors for the whole call, and C++ creates its own references.
    one(|out| unsafe { rectiflow_few_linear(x.as_ptr(), weight.as_ptr(), bias, out) })
}

/// Returns the attention of every query over every key, `[b, n, heads d]` and `[b, m, heads d]` to
/// `[b, n, heads d]`; `None` where libtorch would choose a kernel that is not used here.
pub(crate) fn attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    num_heads: i64,
) -> Torch<Option<Tensor>> {
    let mut out = ptr::null_mut();
    let (q, k, v) = (query.as_ptr(), key.as_ptr(), value.as_ptr());
    // SAFETY: as in `linear`.
    checked(unsafe { rectiflow_few_attention(q, k, v, num_heads, &raw mut out) })?;
    // SAFETY: without an error `out` is null or a tensor that this function owns.
    Ok((!out.is_null()).then(|| unsafe { Tensor::from_ptr(out) }))
}

/// Returns `value * gelu(gate)` for `[*, 2 d]`, values first.
pub(crate) fn gated_gelu(both: &Tensor) -> Torch {
    // SAFETY: as in `linear`.
    one(|out| unsafe { rectiflow_few_gated_gelu(both.as_ptr(), out) })
}

/// Returns the convolution of `[b, in, h, w]` with `[out, in, k, k]` and a bias `[out]`, with
/// channels last in memory; the same stride and padding for both sides.
pub(crate) fn convolution(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    [stride, padding]: [i64; 2],
) -> Torch {
    let (x, weight, bias) = (x.as_ptr(), weight.as_ptr(), bias.as_ptr());
    // SAFETY: as in `linear`.
    one(|out| unsafe { rectiflow_last_convolution(x, weight, bias, stride, padding, out) })
}

/// Returns the tensor that a C++ function makes.
fn one(make: impl FnOnce(*mut *mut C_tensor) -> *mut c_char) -> Torch {
    let mut out = ptr::null_mut();
    checked(make(&raw mut out))?;
    // SAFETY: without an error `out` is a tensor that this function owns.
    Ok(unsafe { Tensor::from_ptr(out) })
}

unsafe extern "C" {
    fn rectiflow_few_linear(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn rectiflow_few_attention(
        query: *const C_tensor,
        key: *const C_tensor,
        value: *const C_tensor,
        num_heads: i64,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn rectiflow_few_gated_gelu(both: *const C_tensor, out: *mut *mut C_tensor) -> *mut c_char;
    fn rectiflow_last_convolution(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        stride: i64,
        padding: i64,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::torch::kernels::tests::random;

    /// Returns the result and the gradients of all inputs, for a loss that is not symmetric.
    fn passes(inputs: &[&Tensor], run: impl Fn() -> Tensor) -> Vec<Tensor> {
        let y = run();
        let weights = random(9, &y.size(), y.kind()).detach();
        let loss = (&y * weights).sum(Kind::Double);
        let mut all = Tensor::run_backward(&[loss], inputs, false, false);
        all.push(y);
        all
    }

    /// Checks shapes, dtypes, and that relative differences are at most `limit`.
    fn assert_close(ours: &[Tensor], theirs: &[Tensor], limit: f64, what: &str) {
        for (which, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
            assert_eq!(ours.size(), theirs.size(), "{what}, number {which}");
            assert_eq!(ours.kind(), theirs.kind(), "{what}, number {which}");
            let wide = |x: &Tensor| x.detach().to_kind(Kind::Double);
            let difference = (wide(ours) - wide(theirs)).norm() / wide(theirs).norm();
            let found = difference.double_value(&[]);
            assert!(found <= limit, "{what}, number {which}: {found}");
        }
    }

    const PRECISIONS: [(Kind, f64); 2] = [(Kind::Float, 2e-6), (Kind::BFloat16, 1e-2)];

    #[test]
    fn linear_layers_are_libtorchs() {
        for (kind, limit) in PRECISIONS {
            for shape in [vec![2, 9, 12], vec![5, 12], vec![12]] {
                let (x, weight) = (random(1, &shape, kind), random(2, &[7, 12], kind));
                let bias = random(3, &[7], kind);
                for bias in [None, Some(&bias)] {
                    let mut inputs = vec![&x, &weight];
                    inputs.extend(bias);
                    let ours = passes(&inputs, || linear(&x, &weight, bias).unwrap());
                    let theirs = passes(&inputs, || x.linear(&weight, bias));
                    assert_close(&ours, &theirs, limit, &format!("{kind:?} {shape:?}"));
                }
            }
            // As a picture's pixels enter a transformer: channels lie furthest apart.
            let pixels = random(1, &[2, 12, 9], kind);
            let (tokens, weight) = (pixels.transpose(1, 2), random(2, &[7, 12], kind));
            let ours = passes(&[&pixels, &weight], || {
                linear(&tokens, &weight, None).unwrap()
            });
            let theirs = passes(&[&pixels, &weight], || {
                tokens.linear(&weight, None::<&Tensor>)
            });
            assert_close(&ours, &theirs, limit, "tokens of pixels");
        }
    }

    #[test]
    fn attention_is_libtorchs() {
        for (kind, limit) in PRECISIONS {
            let (q, k) = (random(1, &[2, 33, 48], kind), random(2, &[2, 21, 48], kind));
            let v = random(3, &[2, 21, 48], kind);
            let inputs = [&q, &k, &v];
            let ours = passes(&inputs, || attention(&q, &k, &v, 3).unwrap().unwrap());
            let theirs = passes(&inputs, || {
                let split = |x: &Tensor| x.reshape([2, -1, 3, 16]).transpose(1, 2);
                let mixed = Tensor::scaled_dot_product_attention(
                    &split(&q),
                    &split(&k),
                    &split(&v),
                    None::<&Tensor>,
                    0.0,
                    false,
                    None,
                    false,
                );
                mixed.transpose(1, 2).reshape([2, 33, 48])
            });
            assert_close(&ours, &theirs, limit, &format!("{kind:?}"));
        }
    }

    #[test]
    fn the_gated_gelu_is_libtorchs() {
        for (kind, limit) in PRECISIONS {
            let both = random(1, &[2, 9, 24], kind);
            let ours = passes(&[&both], || gated_gelu(&both).unwrap());
            let theirs = passes(&[&both], || {
                let halves = both.chunk(2, -1);
                &halves[0] * halves[1].gelu("none")
            });
            assert_close(&ours, &theirs, limit, &format!("{kind:?}"));
        }
    }

    #[test]
    fn convolutions_are_libtorchs_with_channels_last() {
        for (kernel, stride, padding) in [(3, 1, 1), (3, 2, 1), (1, 1, 0)] {
            let x = random(1, &[2, 6, 12, 8], Kind::Float);
            let weight = random(2, &[10, 6, kernel, kernel], Kind::Float);
            let bias = random(3, &[10], Kind::Float);
            let inputs = [&x, &weight, &bias];
            let ours = passes(&inputs, || {
                convolution(&x, &weight, &bias, [stride, padding]).unwrap()
            });
            let theirs = passes(&inputs, || {
                let (strides, paddings) = ([stride, stride], [padding, padding]);
                x.conv2d(&weight, Some(&bias), strides, paddings, [1, 1], 1)
            });
            assert_close(&ours, &theirs, 2e-6, &format!("{kernel} {stride}"));
            let size = ours[3].size();
            let last = [size[1] * size[2] * size[3], 1, size[1] * size[3], size[1]];
            assert_eq!(ours[3].stride(), last, "channels last");
        }
    }

    #[test]
    fn a_second_use_of_an_input_adds_its_gradient() {
        let (x, weight) = (
            random(1, &[4, 6], Kind::Float),
            random(2, &[6, 6], Kind::Float),
        );
        let twice =
            |layer: &dyn Fn(&Tensor) -> Tensor| passes(&[&x, &weight], || layer(&layer(&x)) + &x);
        let ours = twice(&|x| linear(x, &weight, None).unwrap());
        let theirs = twice(&|x| x.linear(&weight, None::<&Tensor>));
        assert_close(&ours, &theirs, 2e-6, "twice");
    }
}
