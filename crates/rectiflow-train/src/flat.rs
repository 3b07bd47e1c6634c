//! All trained parameters as one flat fp32 vector.
//!
//! The model's tensors become views into it, so that clipping, the optimiser and a checkpoint each work on one
//! contiguous slice, and a later split over ranks is a cut of that slice. Parameters lie in groups (one a component),
//! in the order of their names.

use std::ops::Range;

use rectiflow_sdxl::weights::Parameters;
use tch::{Kind, Tensor, no_grad};

use crate::{
    error::{Error, Result},
    workers::{Shared, Workers},
};

/// Where one tensor lies in the flat vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// Component and diffusers name, e.g. `unet.conv_in.weight`.
    pub name: String,
    /// Shape of the tensor.
    pub shape: Vec<i64>,
    /// Its elements in the flat vector.
    pub range: Range<i64>,
}

/// A component's share of the flat vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The component's folder in diffusers' layout: `unet`, `text_encoder` or `text_encoder_2`.
    pub component: String,
    /// Its elements in the flat vector.
    pub range: Range<i64>,
}

/// The flat vector of trained parameters and the tensors that view it.
#[derive(Debug)]
pub struct FlatParameters {
    /// Values, fp32, `[n]`.
    pub values: Tensor,
    /// One entry a tensor, in order, without holes.
    pub slices: Vec<Slice>,
    /// One entry a component, in order, without holes.
    pub groups: Vec<Group>,
    leaves: Vec<Tensor>,
}

impl FlatParameters {
    /// Moves the parameters of `components` (name, parameters) into one vector and turns their gradients on.
    ///
    /// The models keep their tensors; only the memory behind them changes.
    pub fn adopt(components: &[(&str, &Parameters)]) -> Self {
        let mut slices = Vec::new();
        let mut groups = Vec::new();
        let mut leaves = Vec::new();
        let mut end = 0;
        for (component, parameters) in components {
            let group_start = end;
            for (name, tensor) in parameters.iter() {
                let start = end;
                end += tensor.numel() as i64;
                slices.push(Slice { name: format!("{component}.{name}"), shape: tensor.size(), range: start..end });
                leaves.push(tensor.shallow_clone());
            }
            groups.push(Group { component: (*component).to_owned(), range: group_start..end });
        }
        let device = leaves.first().map_or(tch::Device::Cpu, Tensor::device);
        let values = Tensor::zeros([end], (Kind::Float, device));
        for (slice, leaf) in slices.iter().zip(&mut leaves) {
            let mut view = part(&values, &slice.range).view(slice.shape.as_slice());
            no_grad(|| view.copy_(leaf));
            leaf.set_data(&view);
            let _ = leaf.set_requires_grad(true);
        }
        Self { values, slices, groups, leaves }
    }

    /// Number of trained parameters.
    pub fn num_parameters(&self) -> i64 {
        self.values.numel() as i64
    }

    /// The gradient of `loss`, one tensor for each of `slices`; an undefined one where the loss does not depend on it.
    /// The tensors' own `.grad` is left alone, so that several losses can be worked on at the same time.
    pub(crate) fn gradients_of(&self, loss: &Tensor) -> Result<Vec<Tensor>> {
        Tensor::f_run_backward(&[loss], &self.leaves, false, false).map_err(Error::torch("the backward pass"))
    }

    /// Adds gradients of several losses, as [`Self::gradients_of`] gives them, to the vector `sum` `[n]`, in their
    /// order.
    pub(crate) fn accumulate(&self, sum: &Tensor, gradients: &[Vec<Tensor>], workers: &Workers) {
        let places: Vec<usize> = (0..self.slices.len()).collect();
        // SAFETY: each worker writes the elements of its own slices, and slices do not overlap.
        let shared = unsafe { Shared::new((self, sum, gradients)) };
        workers.map(&places, |&place| {
            let (flat, sum, gradients) = shared.get();
            let mut total = part(sum, &flat.slices[place].range);
            for gradient in gradients.iter().map(|all| &all[place]).filter(|gradient| gradient.defined()) {
                no_grad(|| total += gradient.flatten(0, -1));
            }
        });
    }
}

/// A range of a vector, as a view.
pub(crate) fn part(vector: &Tensor, range: &Range<i64>) -> Tensor {
    vector.narrow(0, range.start, range.end - range.start)
}
