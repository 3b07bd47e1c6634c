//! Attention: the only file that chooses an attention kernel.
//!
//! All models call `attend`, which is libtorch's `scaled_dot_product_attention` (flash attention if
//! the device supports it), or on a CPU and without a mask this crate's own kernel (`kernels`).
//! Keys are masked out by minus infinity before the softmax, so that a masked token has a weight of
//! exactly 0 and its values do not matter.

use std::sync::{Arc, Mutex, PoisonError};

use tch::{Kind, Tensor, no_grad};

use crate::{
    nets::layers::Linear,
    torch::{ffi::Torch, kernels},
    weights::Scope,
};

/// The keys that a query attends to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mask<'a> {
    /// All keys.
    Everything,
    /// Its own position and the positions before it.
    Causal,
    /// The keys where `[b, n]` bool is true; at least one in each row.
    Keys(&'a Tensor),
}

/// Measures the largest attention logit `q k / sqrt(d)` of the forward passes that it is passed to.
///
/// A pass with a meter computes one more product of queries and keys; a pass without one has no
/// cost. Clones share the result: a block whose closure outlives the pass keeps a clone.
#[derive(Debug, Clone)]
pub struct LogitMeter(Arc<Mutex<f64>>);

impl Default for LogitMeter {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(f64::NEG_INFINITY)))
    }
}

impl LogitMeter {
    /// Returns the largest logit so far: NaN if any logit is NaN, minus infinity before the first.
    pub fn largest(&self) -> f64 {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Measures attention of `[b, n, d]` queries over `[b, m, d]` keys. Causal attention, used only
    /// by the text encoders, is not measured.
    fn measure(&self, query: &Tensor, key: &Tensor, num_heads: i64, mask: Mask<'_>) -> Torch<()> {
        if matches!(mask, Mask::Causal) {
            return Ok(());
        }
        let found = no_grad(|| largest_of(query, key, num_heads, mask))?;
        let mut largest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *largest = larger(*largest, found);
        Ok(())
    }
}

/// Returns the larger of two numbers, or NaN if either is NaN.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() {
        f64::NAN
    } else {
        a.max(b)
    }
}

/// Number of scores in memory at a time while logits are measured: 64 MiB of fp32.
const MEASURED_SCORES: i64 = 1 << 24;

/// Returns the largest fp32 logit of `[b, n, d]` queries over the `[b, m, d]` keys that the mask
/// allows.
fn largest_of(query: &Tensor, key: &Tensor, num_heads: i64, mask: Mask<'_>) -> Torch<f64> {
    let (b, n, d) = query.size3()?;
    let chunk = (MEASURED_SCORES / (num_heads * key.size3()?.1)).clamp(1, n);
    let scale = ((d / num_heads) as f64).powf(-0.5);
    let mut largest = f64::NEG_INFINITY;
    for row in 0..b {
        let q = heads_of(query, row, num_heads)?; // [heads, n, d / heads]
        let k = heads_of(key, row, num_heads)?.f_transpose(1, 2)?; // [heads, d / heads, m]
        let hidden = match mask {
            Mask::Keys(keys) => Some(keys.f_select(0, row)?.f_logical_not()?), // [m]
            Mask::Everything | Mask::Causal => None,
        };
        for start in (0..n).step_by(chunk as usize) {
            let q = q.f_narrow(1, start, chunk.min(n - start))?;
            let score = largest_score(&q, &k, hidden.as_ref())?;
            largest = larger(largest, score * scale);
        }
    }
    Ok(largest)
}

/// Returns the largest product of a query in `[heads, n, d]` with a key in `[heads, d, m]`, without
/// the keys where `hidden`, `[m]`, is true.
fn largest_score(q: &Tensor, k: &Tensor, hidden: Option<&Tensor>) -> Torch<f64> {
    let mut scores = q.f_matmul(k)?;
    if let Some(hidden) = hidden {
        scores = scores.f_masked_fill(hidden, f64::NEG_INFINITY)?;
    }
    scores.f_max()?.f_double_value(&[])
}

/// Returns one row of `[b, n, d]` as `[heads, n, d / heads]`, fp32.
fn heads_of(x: &Tensor, row: i64, num_heads: i64) -> Torch {
    let (_, n, d) = x.size3()?;
    x.f_select(0, row)?
        .f_view([n, num_heads, d / num_heads])?
        .f_transpose(0, 1)?
        .f_to_kind(Kind::Float)
}

/// Returns the multi-head attention of `[b, n, d]` queries over `[b, m, d]` keys and values,
/// `[b, n, d]`.
pub(crate) fn attend(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    num_heads: i64,
    mask: Mask<'_>,
) -> Torch {
    if let Mask::Everything = mask
        && let Some(mixed) = kernels::attention(query, key, value, num_heads)
    {
        return mixed;
    }
    let keys = match mask {
        Mask::Keys(keys) => Some(keys.f_unsqueeze(1)?.f_unsqueeze(1)?), // [b, 1, 1, m]
        Mask::Everything | Mask::Causal => None,
    };
    let causal = matches!(mask, Mask::Causal);
    let q = split(query, num_heads)?;
    let k = split(key, num_heads)?;
    let v = split(value, num_heads)?;
    let mixed = Tensor::f_scaled_dot_product_attention(&q, &k, &v, keys, 0.0, causal, None, false)?;
    mixed.f_transpose(1, 2)?.f_reshape(query.size())
}

/// Splits `[b, n, d]` into heads, `[b, heads, n, d / heads]`.
fn split(x: &Tensor, num_heads: i64) -> Torch {
    let (b, n, d) = x.size3()?;
    x.f_reshape([b, n, num_heads, d / num_heads])?
        .f_transpose(1, 2)
}

/// diffusers' `Attention`: linear projections around [`attend`].
#[derive(Debug)]
pub(crate) struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    num_heads: i64,
}

impl Attention {
    /// `context_dim` is the width of the context, equal to `dim` for self-attention. `bias` applies
    /// to the three inner projections; the outer one always has a bias.
    pub(crate) fn new(
        scope: &mut Scope<'_>,
        [dim, context_dim]: [i64; 2],
        num_heads: i64,
        bias: bool,
    ) -> Self {
        let mut inner = |name: &str, inputs: i64| {
            if bias {
                Linear::new(&mut scope.sub(name), inputs, dim)
            } else {
                Linear::without_bias(&mut scope.sub(name), inputs, dim)
            }
        };
        Self {
            to_q: inner("to_q", dim),
            to_k: inner("to_k", context_dim),
            to_v: inner("to_v", context_dim),
            to_out: Linear::new(&mut scope.sub("to_out.0"), dim, dim),
            num_heads,
        }
    }

    /// Attends from `x`, `[b, n, dim]`, to `context`, `[b, m, context_dim]`.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        context: &Tensor,
        mask: Mask<'_>,
        meter: Option<&LogitMeter>,
    ) -> Torch {
        let q = self.to_q.forward(x)?;
        let k = self.to_k.forward(context)?;
        let v = self.to_v.forward(context)?;
        self.to_out.forward(&self.attend(&q, &k, &v, mask, meter)?)
    }

    /// Self-attention of `x`, `[b, n, dim]`, that is switched off for the batch rows from `first`
    /// on, `first <= b`: each of their tokens keeps its own value (perturbed-attention guidance,
    /// arXiv 2403.17377).
    pub(crate) fn forward_perturbed(
        &self,
        x: &Tensor,
        first: i64,
        meter: Option<&LogitMeter>,
    ) -> Torch {
        let rest = x.size()[0] - first;
        let looking = x.f_narrow(0, 0, first)?;
        let q = self.to_q.forward(&looking)?;
        let k = self.to_k.forward(&looking)?;
        let v = self.to_v.forward(x)?;
        let mixed = self.attend(&q, &k, &v.f_narrow(0, 0, first)?, Mask::Everything, meter)?;
        self.to_out
            .forward(&Tensor::f_cat(&[mixed, v.f_narrow(0, first, rest)?], 0)?)
    }

    fn attend(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        mask: Mask<'_>,
        meter: Option<&LogitMeter>,
    ) -> Torch {
        if let Some(meter) = meter {
            meter.measure(q, k, self.num_heads, mask)?;
        }
        attend(q, k, v, self.num_heads, mask)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::weights::Weights;

    fn random(seed: i64, shape: &[i64]) -> Tensor {
        let n: i64 = shape.iter().product();
        (Tensor::arange(n, (Kind::Float, Device::Cpu)) * 12.9898 + seed as f64)
            .sin()
            .reshape(shape)
    }

    /// softmax(q k^T / sqrt(d)) v, by the definition.
    fn slow(q: &Tensor, k: &Tensor, v: &Tensor, heads: i64, mask: Option<&Tensor>) -> Tensor {
        let (b, n, d) = q.size3().unwrap();
        let split = |x: &Tensor| x.reshape([b, -1, heads, d / heads]).transpose(1, 2);
        let mut scores = split(q).matmul(&split(k).transpose(2, 3)) / ((d / heads) as f64).sqrt();
        if let Some(mask) = mask {
            scores = scores.masked_fill(&mask.logical_not(), f64::NEG_INFINITY);
        }
        scores
            .softmax(-1, Kind::Float)
            .matmul(&split(v))
            .transpose(1, 2)
            .reshape([b, n, d])
    }

    #[test]
    fn agrees_with_the_definition() {
        let (q, k, v) = (
            random(1, &[2, 5, 8]),
            random(2, &[2, 7, 8]),
            random(3, &[2, 7, 8]),
        );
        let keys =
            Tensor::from_slice(&[true, true, false, true, false, false, false]).repeat([2, 1]);
        let wide = keys.reshape([2, 1, 1, 7]);
        for (mask, slow_mask) in [(Mask::Everything, None), (Mask::Keys(&keys), Some(&wide))] {
            let difference = attend(&q, &k, &v, 2, mask).unwrap() - slow(&q, &k, &v, 2, slow_mask);
            assert!(difference.abs().max().double_value(&[]) < 1e-6, "{mask:?}");
        }
        let causal = Tensor::ones([7, 7], (Kind::Bool, Device::Cpu)).tril(0);
        let difference =
            attend(&k, &k, &v, 4, Mask::Causal).unwrap() - slow(&k, &k, &v, 4, Some(&causal));
        assert!(difference.abs().max().double_value(&[]) < 1e-6);
    }

    #[test]
    fn the_largest_logit_is_that_of_the_definition() {
        let (q, k) = (random(1, &[2, 5, 8]), random(2, &[2, 7, 8]));
        let keys =
            Tensor::from_slice(&[true, true, false, true, false, false, false]).repeat([2, 1]);
        let split = |x: &Tensor| x.reshape([2, -1, 2, 4]).transpose(1, 2);
        let scores = split(&q).matmul(&split(&k).transpose(2, 3)) / 2.0; // [2, 2, 5, 7]
        let seen = scores.index_select(3, &Tensor::from_slice(&[0i64, 1, 3]));
        for (mask, scores) in [(Mask::Everything, &scores), (Mask::Keys(&keys), &seen)] {
            let largest = measured(&q, &k, mask);
            assert!(
                (largest - scores.max().double_value(&[])).abs() < 1e-6,
                "{mask:?}: {largest}"
            );
        }
        assert_eq!(
            measured(&k, &k, Mask::Causal),
            f64::NEG_INFINITY,
            "text encoders are not measured"
        );
        assert!(measured(&(q * f64::NAN), &k, Mask::Everything).is_nan());
    }

    fn measured(query: &Tensor, key: &Tensor, mask: Mask<'_>) -> f64 {
        let meter = LogitMeter::default();
        meter.measure(query, key, 2, mask).unwrap();
        meter.largest()
    }

    #[test]
    fn measuring_changes_nothing_and_keeps_the_largest() {
        let mut weights = Weights::random(1, Kind::Float, Device::Cpu);
        let attention = Attention::new(&mut weights.root(), [8, 8], 2, true);
        let (x, y) = (random(1, &[2, 5, 8]), random(2, &[2, 5, 8]) * 3.0);
        let meter = LogitMeter::default();
        let largest = [&x, &y, &x].map(|x| {
            let plain = attention.forward(x, x, Mask::Everything, None).unwrap();
            assert_eq!(
                attention
                    .forward(x, x, Mask::Everything, Some(&meter.clone()))
                    .unwrap(),
                plain
            );
            meter.largest()
        });
        assert!(
            largest[0] < largest[1] && largest[1] == largest[2],
            "{largest:?}"
        );
    }

    #[test]
    fn what_masked_keys_hold_does_not_matter() {
        let (q, k, v) = (
            random(1, &[1, 5, 8]),
            random(2, &[1, 7, 8]),
            random(3, &[1, 7, 8]),
        );
        let keys =
            Tensor::from_slice(&[true, true, true, true, false, false, false]).reshape([1, 7]);
        let masked = attend(&q, &k, &v, 2, Mask::Keys(&keys)).unwrap();
        let shorter = attend(
            &q,
            &k.narrow(1, 0, 4),
            &v.narrow(1, 0, 4),
            2,
            Mask::Everything,
        )
        .unwrap();
        assert!((masked - shorter).abs().max().double_value(&[]) < 1e-6);
    }
}
