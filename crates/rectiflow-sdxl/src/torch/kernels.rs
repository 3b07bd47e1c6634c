//! The kernels that replace libtorch's on a CPU: linear layers, convolutions in bf16, attention
//! without a mask, and chains of elementwise operations. On other devices the same layers are those
//! of `few_calls`.
//!
//! Measured in docs/log.md (2026-11-25): libtorch 2.13 passes fp32 matrix products to MKL, which
//! reaches half of oneDNN's speed on an AMD processor. Its attention does the same, and reaches a
//! tenth in bf16. `attention.cpp` and `products.cpp` run both on oneDNN. Where bf16 instructions
//! are slower than fp32 ones, `products.cpp` multiplies numbers in bf16 as fp32; `choices` has the
//! table. All sum in fp32 as libtorch does. Small products stay with libtorch, because there the
//! call costs more than the calculation. `fused.cpp` calculates the gated GELU, and the group norm
//! with its SiLU, in one pass each. Their backward passes recompute the intermediate results, which
//! saves time and, for these two, a third of the memory.

use std::{
    ffi::{c_char, c_int},
    ptr,
};

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::torch::{
    choices::Choices,
    few_calls,
    ffi::{Torch, checked},
};

/// Smallest number of multiplications for which oneDNN is used.
const MANY: i64 = 1 << 20;

/// Returns x w^T + b for `[*, in]` and `[out, in]`.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Torch {
    if x.kind() != weight.kind() {
        return one_product(x, weight, bias);
    }
    if x.device() != Device::Cpu {
        return few_calls::linear(x, weight, bias);
    }
    let multiplications = x.numel() as i64 * weight.size()[0];
    if multiplications < MANY {
        return one_product(x, weight, bias);
    }
    // SAFETY: the function queries libtorch's operators.
    let has_onednn = unsafe { rectiflow_has_linear() } != 0;
    let by_onednn = has_onednn && Choices::here().onednn_linear;
    let in_fp32 = match x.kind() {
        Kind::Float => by_onednn,
        Kind::BFloat16 => Choices::here().widens_bf16,
        _ => false,
    };
    if !in_fp32 {
        return one_product(x, weight, bias);
    }
    let mut out = ptr::null_mut();
    // SAFETY: the pointers are live tensors for the whole call, and C++ creates its own references.
    checked(unsafe {
        rectiflow_linear(
            x.as_ptr(),
            weight.as_ptr(),
            bias.map_or(ptr::null(), Tensor::as_ptr),
            c_int::from(by_onednn),
            &raw mut out,
        )
    })?;
    // SAFETY: without an error `out` is a tensor that this function owns.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Returns the convolution of `[b, in, h, w]` with `[out, in, k, k]` and a bias `[out]`; the same
/// stride and padding for both sides.
pub(crate) fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    stride: i64,
    padding: i64,
) -> Torch {
    if x.device() != Device::Cpu {
        return few_calls::convolution(x, weight, bias, [stride, padding]);
    }
    let choices = Choices::here();
    let low = x.kind() == Kind::BFloat16 && weight.kind() == Kind::BFloat16;
    let widens = low && choices.widens_bf16;
    let is_pointwise = weight.size()[2..] == [1, 1] && stride == 1 && padding == 0;
    let in_fp32 = widens || (x.kind() == Kind::Float && weight.kind() == Kind::Float);
    let by_products = is_pointwise && in_fp32 && choices.pointwise_products;
    if !(widens || by_products) {
        let (strides, paddings) = ([stride, stride], [padding, padding]);
        return x.f_conv2d(weight, Some(bias), strides, paddings, [1, 1], 1);
    }
    let (x, weight, bias) = (x.as_ptr(), weight.as_ptr(), bias.as_ptr());
    let mut out = ptr::null_mut();
    if by_products {
        // SAFETY: the pointers are live tensors for the whole call, and C++ creates its own
        // references.
        checked(unsafe { rectiflow_pointwise_convolution(x, weight, bias, &raw mut out) })?;
    } else {
        // SAFETY: as above.
        checked(unsafe {
            rectiflow_wide_convolution(x, weight, bias, stride, padding, &raw mut out)
        })?;
    }
    // SAFETY: without an error `out` is a tensor that this function owns.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// libtorch's linear layer as one product of all rows.
///
/// For an `x` that is no view of a matrix, libtorch's own makes one product per item of the batch
/// if the weight needs no gradient, and a single one if it does. A trained model and its frozen
/// copy would then differ in the last bits.
fn one_product(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Torch {
    if x.dim() <= 2 || x.is_contiguous() {
        return x.f_linear(weight, bias);
    }
    let mut shape = x.size();
    let rows = x.f_reshape([-1, weight.size()[1]])?;
    *shape.last_mut().expect("three dimensions or more") = weight.size()[0];
    let mut product = rows
        .f_linear(weight, None::<&Tensor>)?
        .f_view(shape.as_slice())?;
    match bias {
        Some(bias) => product.f_add_(bias),
        None => Ok(product),
    }
}

/// Returns the attention of every query over every key, `[b, n, heads d]` and `[b, m, heads d]` to
/// `[b, n, heads d]`; `None` without a kernel for it.
pub(crate) fn attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    num_heads: i64,
) -> Option<Torch> {
    if query.device() != Device::Cpu {
        return few_calls::attention(query, key, value, num_heads).transpose();
    }
    let kind = query.kind();
    let size = query.size();
    let d = size[2] / num_heads;
    let fits = fits(query.device(), kind) && d % 2 == 0;
    let is_large = size[0] * num_heads * size[1] * key.size()[1] * d >= MANY;
    if !fits || !is_large {
        return None;
    }
    let widens = kind == Kind::BFloat16 && Choices::here().widens_bf16;
    let low = kind == Kind::BFloat16 && !widens;
    // SAFETY: the function tries the kernel on four numbers.
    if unsafe { rectiflow_has_attention(c_int::from(low)) } == 0 {
        return None;
    }
    let mut out = ptr::null_mut();
    // SAFETY: the pointers are live tensors for the whole call, and C++ creates its own references.
    let text = unsafe {
        rectiflow_attention(
            query.as_ptr(),
            key.as_ptr(),
            value.as_ptr(),
            num_heads,
            c_int::from(widens),
            &raw mut out,
        )
    };
    // SAFETY: without an error `out` is a tensor that this function owns.
    Some(checked(text).map(|()| unsafe { Tensor::from_ptr(out) }))
}

/// Returns `value * gelu(gate)` for `[*, 2 d]`, values first.
pub(crate) fn gated_gelu(both: &Tensor) -> Torch {
    if both.device() != Device::Cpu {
        return few_calls::gated_gelu(both);
    }
    if !has_fused(both) {
        let both = both.f_chunk(2, -1)?;
        return both[0].f_mul(&both[1].f_gelu("none")?);
    }
    let mut out = ptr::null_mut();
    // SAFETY: the pointer is a live tensor for the whole call, and C++ creates its own reference.
    checked(unsafe { rectiflow_gated_gelu(both.as_ptr(), &raw mut out) })?;
    // SAFETY: without an error `out` is a tensor that this function owns.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Returns the SiLU of a group norm of `[b, c, h, w]`, with `[c]` fp32 weight and bias; `None`
/// without a kernel for it.
pub(crate) fn norm_silu(
    x: &Tensor,
    [weight, bias]: [&Tensor; 2],
    num_groups: i64,
    eps: f64,
) -> Option<Torch> {
    if !has_fused(x) || weight.kind() != Kind::Float || bias.kind() != Kind::Float || x.dim() != 4 {
        return None;
    }
    let mut out = ptr::null_mut();
    let (x, weight, bias) = (x.as_ptr(), weight.as_ptr(), bias.as_ptr());
    // SAFETY: the pointers are live tensors for the whole call, and C++ creates its own references.
    let text = unsafe { rectiflow_norm_silu(x, weight, bias, num_groups, eps, &raw mut out) };
    // SAFETY: without an error `out` is a tensor that this function owns.
    Some(checked(text).map(|()| unsafe { Tensor::from_ptr(out) }))
}

/// Returns true if chains of operations on this tensor run as one.
fn has_fused(x: &Tensor) -> bool {
    // SAFETY: the function queries the processor's features.
    fits(x.device(), x.kind()) && unsafe { rectiflow_has_fused() } != 0
}

fn fits(device: Device, kind: Kind) -> bool {
    device == Device::Cpu && matches!(kind, Kind::Float | Kind::BFloat16)
}

/// Returns true if chains of operations run as one on this device, so that a training step keeps
/// less for its backward pass.
pub fn keeps_less(device: Device) -> bool {
    // SAFETY: the function queries the processor's features.
    device == Device::Cpu && unsafe { rectiflow_has_fused() } != 0
}

unsafe extern "C" {
    fn rectiflow_has_fused() -> c_int;
    fn rectiflow_gated_gelu(x: *const C_tensor, out: *mut *mut C_tensor) -> *mut c_char;
    fn rectiflow_norm_silu(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        num_groups: i64,
        eps: f64,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn rectiflow_has_linear() -> c_int;
    fn rectiflow_has_attention(low: c_int) -> c_int;
    fn rectiflow_attention(
        query: *const C_tensor,
        key: *const C_tensor,
        value: *const C_tensor,
        num_heads: i64,
        widens: c_int,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn rectiflow_linear(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        by_onednn: c_int,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn rectiflow_pointwise_convolution(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn rectiflow_wide_convolution(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        stride: i64,
        padding: i64,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Numbers from -2 to 2 that a seed decides, with a gradient.
    pub(in crate::torch) fn random(seed: i64, shape: &[i64], kind: Kind) -> Tensor {
        let n: i64 = shape.iter().product();
        let numbers = ((Tensor::arange(n, (Kind::Double, Device::Cpu)) * 12.9898 + seed as f64)
            .sin()
            * 437.5)
            .sin();
        (numbers * 2.0)
            .reshape(shape)
            .to_kind(kind)
            .set_requires_grad(true)
    }

    /// |a - b| / |b|
    fn error(a: &Tensor, b: &Tensor) -> f64 {
        assert_eq!(a.size(), b.size());
        let (a, b) = (
            a.detach().to_kind(Kind::Double),
            b.detach().to_kind(Kind::Double),
        );
        (&a - &b).norm().double_value(&[]) / b.norm().double_value(&[])
    }

    /// Returns the gradients of all inputs, then the result, for a loss that is not symmetric.
    fn passes(inputs: &[&Tensor], run: impl Fn() -> Tensor) -> Vec<Tensor> {
        let y = run();
        let weights = random(9, &y.size(), y.kind()).detach();
        let loss = (&y * weights).sum(Kind::Double);
        let mut all = Tensor::run_backward(&[loss], inputs, false, false);
        all.push(y);
        all
    }

    #[test]
    fn linear_agrees_with_fp64() {
        for (shape, outputs) in [(vec![2, 97, 130], 66), (vec![300, 64], 128)] {
            let x = random(1, &shape, Kind::Float);
            let (weight, bias) = (
                random(2, &[outputs, *shape.last().unwrap()], Kind::Float),
                random(3, &[outputs], Kind::Float),
            );
            // Without a bias the third gradient is absent, and nothing else changes.
            let without = passes(&[&x, &weight], || linear(&x, &weight, None).unwrap());
            let ours = passes(&[&x, &weight, &bias], || {
                linear(&x, &weight, Some(&bias)).unwrap()
            });
            let exact = passes(&[&x, &weight, &bias], || {
                let double = |t: &Tensor| t.to_kind(Kind::Double);
                double(&x).linear(&double(&weight), Some(double(&bias)))
            });
            assert!(without[0].equal(&ours[0]) && without[1].equal(&ours[1]));
            for (ours, exact) in ours.iter().zip(&exact) {
                assert!(
                    error(ours, exact) < 1e-6,
                    "{shape:?}: {}",
                    error(ours, exact)
                );
            }
        }
    }

    #[test]
    fn products_of_bf16_are_as_exact_as_libtorchs() {
        let (x, weight, bias) = (
            random(1, &[2, 97, 130], Kind::BFloat16),
            random(2, &[66, 130], Kind::BFloat16),
            random(3, &[66], Kind::BFloat16),
        );
        let ours = passes(&[&x, &weight, &bias], || {
            linear(&x, &weight, Some(&bias)).unwrap()
        });
        let theirs = passes(&[&x, &weight, &bias], || x.linear(&weight, Some(&bias)));
        let exact = passes(&[&x, &weight, &bias], || {
            let double = |t: &Tensor| t.to_kind(Kind::Double);
            double(&x).linear(&double(&weight), Some(double(&bias)))
        });
        assert_as_exact(&ours, &theirs, &exact, "linear");
        let without = passes(&[&x, &weight], || linear(&x, &weight, None).unwrap());
        assert!(without[0].equal(&ours[0]) && without[1].equal(&ours[1]));
    }

    #[test]
    fn convolutions_are_as_exact_as_libtorchs() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for (kernel, stride, padding) in [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (3, 2, 0)]
            {
                let (x, weight, bias) = (
                    random(1, &[2, 6, 13, 9], kind),
                    random(2, &[10, 6, kernel, kernel], kind),
                    random(3, &[10], kind),
                );
                let conv = |x: &Tensor, w: &Tensor, b: &Tensor| {
                    x.conv2d(w, Some(b), [stride, stride], [padding, padding], [1, 1], 1)
                };
                let inputs = [&x, &weight, &bias];
                let ours = passes(&inputs, || {
                    conv2d(&x, &weight, &bias, stride, padding).unwrap()
                });
                let theirs = passes(&inputs, || conv(&x, &weight, &bias));
                let exact = passes(&inputs, || {
                    let double = |t: &Tensor| t.to_kind(Kind::Double);
                    conv(&double(&x), &double(&weight), &double(&bias))
                });
                let what = format!("{kind:?} {kernel} {stride} {padding}");
                assert_as_exact(&ours, &theirs, &exact, &what);
            }
        }
    }

    /// Checks dtypes, and that the errors are at most 1.5 times libtorch's, or those of fp32.
    fn assert_as_exact(ours: &[Tensor], theirs: &[Tensor], exact: &[Tensor], what: &str) {
        for (which, ours) in ours.iter().enumerate() {
            assert_eq!(ours.kind(), theirs[which].kind(), "{what}");
            let (found, expected) = (
                error(ours, &exact[which]),
                error(&theirs[which], &exact[which]),
            );
            assert!(
                found < (1.5 * expected).max(1e-6),
                "{what}, {which}: {found} against {expected}"
            );
        }
    }

    #[test]
    fn linear_does_not_ask_whether_its_weight_is_trained() {
        for (kind, batch, tokens) in [
            (Kind::Float, 1, 4),
            // libtorch's own differs here with MKL on an Intel Xeon, and not on an AMD EPYC.
            (Kind::Float, 2, 4),
            (Kind::Float, 8, 6),
            (Kind::Float, 2, 97),
            (Kind::BFloat16, 2, 4),
            (Kind::BFloat16, 8, 24),
        ] {
            // As a picture's pixels enter a transformer: channels lie furthest apart.
            let pixels = random(1, &[batch, 64, tokens], kind)
                .detach()
                .transpose(1, 2);
            let (trained, bias) = (random(2, &[64, 64], kind), random(3, &[64], kind));
            for bias in [None, Some(&bias)] {
                let frozen = bias.map(Tensor::detach);
                let ours = linear(&pixels, &trained, bias).unwrap();
                let of_frozen = linear(&pixels, &trained.detach(), frozen.as_ref()).unwrap();
                assert!(ours.equal(&of_frozen), "{kind:?} [{batch}, {tokens}]");
                // Training itself is libtorch's to the bit.
                assert!(
                    ours.equal(&pixels.linear(&trained, bias)),
                    "{kind:?} [{batch}, {tokens}]"
                );
            }
        }
    }

    #[test]
    fn attention_agrees_with_fp64_or_is_as_exact_as_libtorchs() {
        // Odd lengths need padding in bf16; 1500 queries need several blocks.
        for [b, heads, n, m, d] in [
            [2, 3, 65, 77, 64],
            [1, 2, 1500, 301, 32],
            [1, 1, 33, 2000, 40],
        ] {
            for (kind, limit) in [(Kind::Float, 1e-5_f64), (Kind::BFloat16, 1e-2)] {
                let (q, k, v) = (
                    random(1, &[b, n, heads * d], kind),
                    random(2, &[b, m, heads * d], kind),
                    random(3, &[b, m, heads * d], kind),
                );
                let Some(ours) = attention(&q, &k, &v, heads) else {
                    continue;
                };
                drop(ours);
                let ours = passes(&[&q, &k, &v], || {
                    attention(&q, &k, &v, heads).unwrap().unwrap()
                });
                let exact = passes(&[&q, &k, &v], || {
                    let split = |x: &Tensor| {
                        x.to_kind(Kind::Double)
                            .reshape([b, -1, heads, d])
                            .transpose(1, 2)
                    };
                    let scores = split(&q).matmul(&split(&k).transpose(2, 3)) / (d as f64).sqrt();
                    scores
                        .softmax(-1, Kind::Double)
                        .matmul(&split(&v))
                        .transpose(1, 2)
                        .reshape([b, n, heads * d])
                });
                let theirs = passes(&[&q, &k, &v], || {
                    let split = |x: &Tensor| x.reshape([b, -1, heads, d]).transpose(1, 2);
                    let (q, k, v) = (split(&q), split(&k), split(&v));
                    let mixed = Tensor::scaled_dot_product_attention(
                        &q,
                        &k,
                        &v,
                        None::<&Tensor>,
                        0.0,
                        false,
                        None,
                        false,
                    );
                    mixed.transpose(1, 2).reshape([b, n, heads * d])
                });
                for (which, (ours, exact)) in ours.iter().zip(&exact).enumerate() {
                    // Sums that nearly cancel lose more digits; the error of libtorch's kernel
                    // shows the dtype's share. This crate's kernel rounds at other places: its
                    // error is at most 1.5 times as large (2026-11-25: 1.31 times for 33 x 2000).
                    let (found, theirs) = (error(ours, exact), error(&theirs[which], exact));
                    let expected = limit.max(1.5 * theirs);
                    assert!(
                        found < expected,
                        "{kind:?} {n} x {m}, number {which}: {found}, libtorch's {theirs}"
                    );
                }
            }
        }
    }

    /// Compares the error of this crate's results with that of libtorch's, for a chain and the
    /// gradients of all its inputs.
    fn compare(name: &str, ours: &[Tensor], theirs: &[Tensor], exact: &[Tensor], limit: f64) {
        for (which, ((ours, theirs), exact)) in ours.iter().zip(theirs).zip(exact).enumerate() {
            let (found, theirs) = (error(ours, exact), error(theirs, exact));
            assert!(
                found < limit.max(theirs),
                "{name}, number {which}: {found}, libtorch's {theirs}"
            );
        }
    }

    #[test]
    fn chains_agree_with_fp64_or_are_as_exact_as_libtorchs() {
        let double = |x: &Tensor| x.to_kind(Kind::Double);
        for (kind, limit) in [(Kind::Float, 1e-6), (Kind::BFloat16, 4e-3)] {
            // Widths and sizes that are not multiples of a vector.
            for shape in [[3, 37, 2 * 41], [2, 64, 2 * 320]] {
                let x = random(1, &shape, kind);
                let chain = |x: Tensor| {
                    let both = x.chunk(2, -1);
                    &both[0] * both[1].gelu("none")
                };
                let ours = passes(&[&x], || gated_gelu(&x).unwrap());
                let (theirs, exact) = (
                    passes(&[&x], || chain(x.shallow_clone())),
                    passes(&[&x], || chain(double(&x))),
                );
                compare(
                    &format!("gated gelu {kind:?} {shape:?}"),
                    &ours,
                    &theirs,
                    &exact,
                    limit,
                );
            }
            for shape in [[2, 12, 7, 9], [1, 8, 32, 33]] {
                let x = random(1, &shape, kind);
                let (weight, bias) = (
                    random(2, &shape[1..2], Kind::Float),
                    random(3, &shape[1..2], Kind::Float),
                );
                let Some(first) = norm_silu(&x, [&weight, &bias], 4, 1e-5) else {
                    continue;
                };
                drop(first);
                let inputs = [&x, &weight, &bias];
                let ours = passes(&inputs, || {
                    norm_silu(&x, [&weight, &bias], 4, 1e-5).unwrap().unwrap()
                });
                let theirs = passes(&inputs, || {
                    x.group_norm(4, Some(&weight), Some(&bias), 1e-5, true)
                        .silu()
                });
                let exact = passes(&inputs, || {
                    double(&x)
                        .group_norm(4, Some(double(&weight)), Some(double(&bias)), 1e-5, true)
                        .silu()
                });
                compare(
                    &format!("norm {kind:?} {shape:?}"),
                    &ours,
                    &theirs,
                    &exact,
                    limit,
                );
            }
        }
    }

    #[test]
    fn nan_stays_nan() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let x = Tensor::from_slice(&[1f32, f32::NAN, 2.0, 3.0])
                .view([1, 4])
                .to_kind(kind);
            let y = gated_gelu(&x).unwrap().to_kind(Kind::Float);
            assert!(y.double_value(&[0, 0]).is_finite() && y.double_value(&[0, 1]).is_nan());
            let x = Tensor::from_slice(&[1f32, f32::NAN, 2.0, 3.0])
                .view([1, 4, 1, 1])
                .to_kind(kind);
            let ones = Tensor::ones([4], (Kind::Float, Device::Cpu));
            let Some(y) = norm_silu(&x, [&ones, &ones], 2, 1e-5) else {
                continue;
            };
            let y = y.unwrap().to_kind(Kind::Float);
            assert!(
                y.double_value(&[0, 0, 0, 0]).is_nan() && y.double_value(&[0, 2, 0, 0]).is_finite()
            );
        }
    }
}
