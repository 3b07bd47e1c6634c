//! Blocks whose intermediate results may be dropped and recomputed: activation checkpointing.
//!
//! A block that is recomputed keeps its inputs for the backward pass, which runs the block a second time. Gradients
//! are the same bit for bit either way, which takes some care: an input that a block uses twice gets two gradients, and
//! floating-point sums depend on their order. So in both ways a block's own uses of an input are summed up first.

use std::sync::Arc;

use tch::Tensor;

use crate::{
    torch::{autograd::checkpoint, ffi::Torch},
    weights::Scope,
};

/// A block, the tensors it owns, and whether its intermediate results are recomputed in the backward pass.
#[derive(Debug)]
pub(crate) struct Recompute<B> {
    inner: Arc<Inner<B>>,
    /// The place of its tensors, e.g. `down_blocks.0.resnets.1`.
    pub(crate) name: String,
    /// Whether the next forward pass that records a graph keeps its inputs only.
    pub(crate) is_on: bool,
}

#[derive(Debug)]
struct Inner<B> {
    block: B,
    parameters: Vec<Tensor>,
}

// SAFETY: a block's forward pass reads its tensors and writes none of them, and libtorch reads a tensor from any number of
// threads; an update writes parameters only when no pass is running, as for all tensors of a model.
unsafe impl<B: Send> Sync for Inner<B> {}

impl<B: Send + 'static> Recompute<B> {
    /// Builds a block of the tensors at `scope`.
    pub(crate) fn new(mut scope: Scope<'_>, build: impl FnOnce(&mut Scope<'_>) -> B) -> Self {
        let block = build(&mut scope);
        let name = scope.name().to_owned();
        Self { inner: Arc::new(Inner { block, parameters: scope.taken() }), name, is_on: false }
    }

    /// `run(block, inputs)`, recomputed or not. `run` must do the same on every call.
    pub(crate) fn forward(
        &self,
        inputs: &[&Tensor],
        run: impl Fn(&B, &[Tensor]) -> Torch + Send + Sync + 'static,
    ) -> Torch {
        if self.is_on {
            let inner = self.inner.clone();
            return checkpoint(inputs, &self.inner.parameters, move |inputs| run(&inner.block, inputs));
        }
        let inputs = inputs.iter().map(|input| input.f_alias()).collect::<Torch<Vec<_>>>()?;
        run(&self.inner.block, &inputs)
    }
}
