//! Activation checkpointing: blocks that can drop their intermediate results and recompute them.
//!
//! A recomputed block keeps its inputs for the backward pass, which runs the block a second time.
//! Gradients are bit-identical in both modes. This needs care: an input that a block uses twice
//! receives two gradients, and floating-point sums depend on their order. So in both modes a
//! block's own uses of an input are summed first.

use std::sync::Arc;

use tch::Tensor;

use crate::{
    torch::{autograd::checkpoint, ffi::Torch},
    weights::Scope,
};

/// A block, the tensors that it owns, and whether its intermediate results are recomputed in the
/// backward pass.
#[derive(Debug)]
pub(crate) struct Recompute<B> {
    inner: Arc<Inner<B>>,
    /// The prefix of its tensors' names, e.g. `down_blocks.0.resnets.1`.
    pub(crate) name: String,
    /// Whether forward passes that record a graph keep only the block's inputs.
    pub(crate) is_on: bool,
}

#[derive(Debug)]
struct Inner<B> {
    block: B,
    parameters: Vec<Tensor>,
}

// SAFETY: a block's forward pass only reads its tensors, and libtorch allows reads from any number
// of threads; parameters are updated only while no pass runs, as for all tensors of a model.
unsafe impl<B: Send> Sync for Inner<B> {}

impl<B: Send + 'static> Recompute<B> {
    /// Builds a block from the tensors at `scope`.
    pub(crate) fn new(mut scope: Scope<'_>, build: impl FnOnce(&mut Scope<'_>) -> B) -> Self {
        let block = build(&mut scope);
        let name = scope.name().to_owned();
        Self {
            inner: Arc::new(Inner {
                block,
                parameters: scope.taken(),
            }),
            name,
            is_on: false,
        }
    }

    /// Returns `run(block, inputs)`, recomputed or not. `run` must do the same in every call.
    pub(crate) fn forward(
        &self,
        inputs: &[&Tensor],
        run: impl Fn(&B, &[Tensor]) -> Torch + Send + Sync + 'static,
    ) -> Torch {
        if self.is_on {
            let inner = self.inner.clone();
            return checkpoint(inputs, &self.inner.parameters, move |inputs| {
                run(&inner.block, inputs)
            });
        }
        let inputs = inputs
            .iter()
            .map(|input| input.f_alias())
            .collect::<Torch<Vec<_>>>()?;
        run(&self.inner.block, &inputs)
    }
}
