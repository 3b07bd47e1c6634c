//! Attention: the one place that knows a kernel.
//!
//! All models call `attend`, which is libtorch's `scaled_dot_product_attention`: flash attention where the device has
//! it; on a processor a kernel of our own where there is no mask (`kernels`). Keys are masked out by minus infinity before the softmax, so a masked token has a weight of
//! exactly 0 and what it holds does not matter.

use std::cell::Cell;

use tch::{Kind, Tensor, no_grad};

use crate::{
    nets::layers::Linear,
    torch::{ffi::Torch, kernels},
    weights::Scope,
};

/// Which keys a query may look at.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mask<'a> {
    /// All.
    Everything,
    /// Its own position and those before.
    Causal,
    /// Those where `[b, n]` bool is true; at least one in each row.
    Keys(&'a Tensor),
}

thread_local! {
    /// The largest logit since this thread began to watch; `None` where it does not.
    static LARGEST: Cell<Option<f64>> = const { Cell::new(None) };
}

/// Runs `work` and gives the largest attention logit `q k / sqrt(d)` of all its attention on this thread, NaN if one of
/// them is NaN, minus infinity if there was none. Text encoders (causal attention) are not looked at. Costs one more
/// product of queries and keys; passes that are not watched pay nothing.
pub fn largest_logit<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let before = LARGEST.replace(Some(f64::NEG_INFINITY));
    let done = work();
    (done, LARGEST.replace(before).expect("nobody else on this thread ends the watch"))
}

/// Scores that are in memory at a time while logits are looked at: 64 MiB of fp32.
const WATCHED_SCORES: i64 = 1 << 24;

/// The largest logit of `[b, n, d]` queries over those of `[b, m, d]` keys that the mask lets them see; fp32.
fn largest_of(query: &Tensor, key: &Tensor, num_heads: i64, mask: Mask<'_>) -> std::result::Result<f64, tch::TchError> {
    let split = |x: &Tensor, row: i64| {
        let (_, n, d) = x.size3()?;
        x.f_select(0, row)?.f_view([n, num_heads, d / num_heads])?.f_transpose(0, 1)?.f_to_kind(Kind::Float)
    };
    let (b, n, d) = query.size3()?;
    let chunk = (WATCHED_SCORES / (num_heads * key.size3()?.1)).clamp(1, n);
    let scale = ((d / num_heads) as f64).powf(-0.5);
    let mut largest = f64::NEG_INFINITY;
    for row in 0..b {
        let (q, k) = (split(query, row)?, split(key, row)?.f_transpose(1, 2)?); // [heads, n, d], [heads, d, m]
        for start in (0..n).step_by(chunk as usize) {
            let mut scores = q.f_narrow(1, start, chunk.min(n - start))?.f_matmul(&k)?;
            if let Mask::Keys(keys) = mask {
                scores = scores.f_masked_fill(&keys.f_select(0, row)?.f_logical_not()?, f64::NEG_INFINITY)?;
            }
            let found = scores.f_max()?.f_double_value(&[])? * scale;
            largest = if found.is_nan() || largest.is_nan() { f64::NAN } else { largest.max(found) };
        }
    }
    Ok(largest)
}

/// Multi-head attention of `[b, n, d]` queries over `[b, m, d]` keys and values, to `[b, n, d]`.
pub(crate) fn attend(query: &Tensor, key: &Tensor, value: &Tensor, num_heads: i64, mask: Mask<'_>) -> Torch {
    if let (Some(seen), Mask::Everything | Mask::Keys(_)) = (LARGEST.get(), mask) {
        let found = no_grad(|| largest_of(query, key, num_heads, mask))?;
        LARGEST.set(Some(if found.is_nan() || seen.is_nan() { f64::NAN } else { seen.max(found) }));
    }
    if let Mask::Everything = mask
        && let Some(mixed) = kernels::attention(query, key, value, num_heads)
    {
        return mixed;
    }
    let split = |x: &Tensor| {
        let (b, n, d) = x.size3()?;
        x.f_reshape([b, n, num_heads, d / num_heads])?.f_transpose(1, 2) // [b, heads, n, d / heads]
    };
    let keys = match mask {
        Mask::Keys(keys) => Some(keys.f_unsqueeze(1)?.f_unsqueeze(1)?), // [b, 1, 1, m]
        Mask::Everything | Mask::Causal => None,
    };
    let causal = matches!(mask, Mask::Causal);
    let (q, k, v) = (split(query)?, split(key)?, split(value)?);
    let mixed = Tensor::f_scaled_dot_product_attention(&q, &k, &v, keys, 0.0, causal, None, false)?;
    mixed.f_transpose(1, 2)?.f_reshape(query.size())
}

/// diffusers' `Attention`: projections around [`attend`].
#[derive(Debug)]
pub(crate) struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    num_heads: i64,
}

impl Attention {
    /// `context_dim`: width of what is looked at, the same as `dim` for self-attention. `bias`: of the three inner
    /// projections; the outer one always has one.
    pub(crate) fn new(scope: &mut Scope<'_>, [dim, context_dim]: [i64; 2], num_heads: i64, bias: bool) -> Self {
        let mut inner = |name: &str, inputs: i64| {
            if bias {
                Linear::new(&mut scope.sub(name), inputs, dim)
            } else {
                Linear::without_bias(&mut scope.sub(name), inputs, dim)
            }
        };
        let (to_q, to_k, to_v) = (inner("to_q", dim), inner("to_k", context_dim), inner("to_v", context_dim));
        Self { to_q, to_k, to_v, to_out: Linear::new(&mut scope.sub("to_out.0"), dim, dim), num_heads }
    }

    /// `x`: `[b, n, dim]`, looking at `context`: `[b, m, context_dim]`.
    pub(crate) fn forward(&self, x: &Tensor, context: &Tensor, mask: Mask<'_>) -> Torch {
        let (q, k, v) = (self.to_q.forward(x)?, self.to_k.forward(context)?, self.to_v.forward(context)?);
        self.to_out.forward(&attend(&q, &k, &v, self.num_heads, mask)?)
    }

    /// Self-attention in which the rows of the batch from `first` on look at nothing but themselves: each of their
    /// tokens keeps its own value (perturbed-attention guidance, arXiv 2403.17377). `x`: `[b, n, dim]`, `first <= b`.
    pub(crate) fn forward_perturbed(&self, x: &Tensor, first: i64) -> Torch {
        let rest = x.size()[0] - first;
        let looking = x.f_narrow(0, 0, first)?;
        let (q, k, v) = (self.to_q.forward(&looking)?, self.to_k.forward(&looking)?, self.to_v.forward(x)?);
        let mixed = attend(&q, &k, &v.f_narrow(0, 0, first)?, self.num_heads, Mask::Everything)?;
        self.to_out.forward(&Tensor::f_cat(&[mixed, v.f_narrow(0, first, rest)?], 0)?)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn random(seed: i64, shape: &[i64]) -> Tensor {
        let n: i64 = shape.iter().product();
        (Tensor::arange(n, (Kind::Float, Device::Cpu)) * 12.9898 + seed as f64).sin().reshape(shape)
    }

    /// softmax(q k^T / sqrt(d)) v, spelt out.
    fn slow(q: &Tensor, k: &Tensor, v: &Tensor, heads: i64, mask: Option<&Tensor>) -> Tensor {
        let (b, n, d) = q.size3().unwrap();
        let split = |x: &Tensor| x.reshape([b, -1, heads, d / heads]).transpose(1, 2);
        let mut scores = split(q).matmul(&split(k).transpose(2, 3)) / ((d / heads) as f64).sqrt();
        if let Some(mask) = mask {
            scores = scores.masked_fill(&mask.logical_not(), f64::NEG_INFINITY);
        }
        scores.softmax(-1, Kind::Float).matmul(&split(v)).transpose(1, 2).reshape([b, n, d])
    }

    #[test]
    fn agrees_with_the_definition() {
        let (q, k, v) = (random(1, &[2, 5, 8]), random(2, &[2, 7, 8]), random(3, &[2, 7, 8]));
        let keys = Tensor::from_slice(&[true, true, false, true, false, false, false]).repeat([2, 1]);
        let wide = keys.reshape([2, 1, 1, 7]);
        for (mask, slow_mask) in [(Mask::Everything, None), (Mask::Keys(&keys), Some(&wide))] {
            let difference = attend(&q, &k, &v, 2, mask).unwrap() - slow(&q, &k, &v, 2, slow_mask);
            assert!(difference.abs().max().double_value(&[]) < 1e-6, "{mask:?}");
        }
        let causal = Tensor::ones([7, 7], (Kind::Bool, Device::Cpu)).tril(0);
        let difference = attend(&k, &k, &v, 4, Mask::Causal).unwrap() - slow(&k, &k, &v, 4, Some(&causal));
        assert!(difference.abs().max().double_value(&[]) < 1e-6);
    }

    #[test]
    fn the_largest_logit_is_that_of_the_definition() {
        let (q, k) = (random(1, &[2, 5, 8]), random(2, &[2, 7, 8]));
        let keys = Tensor::from_slice(&[true, true, false, true, false, false, false]).repeat([2, 1]);
        let split = |x: &Tensor| x.reshape([2, -1, 2, 4]).transpose(1, 2);
        let scores = split(&q).matmul(&split(&k).transpose(2, 3)) / 2.0; // [2, 2, 5, 7]
        let seen = scores.index_select(3, &Tensor::from_slice(&[0i64, 1, 3]));
        for (mask, scores) in [(Mask::Everything, &scores), (Mask::Keys(&keys), &seen)] {
            let (mixed, largest) = largest_logit(|| attend(&q, &k, &k, 2, mask).unwrap());
            assert!((largest - scores.max().double_value(&[])).abs() < 1e-6, "{mask:?}: {largest}");
            assert_eq!(mixed, attend(&q, &k, &k, 2, mask).unwrap(), "looking changes nothing");
        }
        let (_, largest) = largest_logit(|| attend(&k, &k, &k, 2, Mask::Causal).unwrap());
        assert_eq!(largest, f64::NEG_INFINITY, "text encoders are not looked at");
        let (_, largest) = largest_logit(|| attend(&(q * f64::NAN), &k, &k, 2, Mask::Everything).unwrap());
        assert!(largest.is_nan());
    }

    #[test]
    fn what_masked_keys_hold_does_not_matter() {
        let (q, k, v) = (random(1, &[1, 5, 8]), random(2, &[1, 7, 8]), random(3, &[1, 7, 8]));
        let keys = Tensor::from_slice(&[true, true, true, true, false, false, false]).reshape([1, 7]);
        let masked = attend(&q, &k, &v, 2, Mask::Keys(&keys)).unwrap();
        let shorter = attend(&q, &k.narrow(1, 0, 4), &v.narrow(1, 0, 4), 2, Mask::Everything).unwrap();
        assert!((masked - shorter).abs().max().double_value(&[]) < 1e-6);
    }
}
