//! All trained parameters as one flat fp32 vector.
//!
//! The model's tensors become views into it, so that clipping, the optimiser and a checkpoint each work on one
//! contiguous slice, and a later split over ranks is a cut of that slice. Parameters lie in groups (one a component),
//! in the order of their names.
//!
//! In bf16 the vector holds the masters, and the model's tensors are views into a second vector of bf16 copies, which
//! whoever changes masters has to refresh. What stays in fp32 views the masters as before.

use std::ops::Range;

use rectiflow_sdxl::weights::Parameters;
use tch::{Kind, Tensor, no_grad};

use crate::{gradients::GradientSum, precision::Precision};

/// Where one tensor lies in the flat vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// Component and diffusers name, e.g. `unet.conv_in.weight`.
    pub name: String,
    /// Shape of the tensor.
    pub shape: Vec<i64>,
    /// Its elements in the flat vector.
    pub range: Range<i64>,
    /// The dtype that the model calculates with it in.
    pub kind: Kind,
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
    /// Compute copies of the values, bf16, `[n]`, where the model calculates in bf16. Elements of slices that stay in fp32
    /// are not used.
    copies: Option<Tensor>,
    /// The sum of a step's gradients.
    pub(crate) gradients: GradientSum,
}

impl FlatParameters {
    /// Moves the parameters of `components` (name, parameters) into one vector and turns their gradients on.
    ///
    /// The models keep their tensors; only the memory behind them changes, and in bf16 the dtype of most.
    pub fn adopt(components: &[(&str, &Parameters)], precision: Precision) -> Self {
        let mut slices = Vec::new();
        let mut groups = Vec::new();
        let mut leaves = Vec::new();
        let mut end = 0;
        for (component, parameters) in components {
            let group_start = end;
            for (name, tensor) in parameters.iter() {
                let start = end;
                end += tensor.numel() as i64;
                let (shape, kind) = (tensor.size(), precision.kind_of(name));
                slices.push(Slice { name: format!("{component}.{name}"), shape, range: start..end, kind });
                leaves.push(tensor.shallow_clone());
            }
            groups.push(Group { component: (*component).to_owned(), range: group_start..end });
        }
        let device = leaves.first().map_or(tch::Device::Cpu, Tensor::device);
        let values = Tensor::zeros([end], (Kind::Float, device));
        let copies = (precision == Precision::Bf16).then(|| Tensor::zeros([end], (Kind::BFloat16, device)));
        for (slice, leaf) in slices.iter().zip(&mut leaves) {
            let view = |vector| part(vector, &slice.range).view(slice.shape.as_slice());
            let mut master = view(&values);
            no_grad(|| master.copy_(leaf));
            match &copies {
                Some(copies) if slice.kind == Kind::BFloat16 => leaf.set_data(&view(copies)),
                _ => leaf.set_data(&master),
            }
            let _ = leaf.set_requires_grad(true);
        }
        let gradients = GradientSum::new(&leaves, &slices);
        let adopted = Self { values, slices, groups, copies, gradients };
        adopted.refresh();
        adopted
    }

    /// Brings the compute copies up to the values. Whoever has changed values calls it before the model is used again; in
    /// fp32 there is nothing to do.
    pub(crate) fn refresh(&self) {
        if let Some(copies) = &self.copies {
            no_grad(|| copies.shallow_clone().copy_(&self.values));
        }
    }

    /// Number of trained parameters.
    pub fn num_parameters(&self) -> i64 {
        self.values.numel() as i64
    }
}

/// A range of a vector, as a view.
pub(crate) fn part(vector: &Tensor, range: &Range<i64>) -> Tensor {
    vector.narrow(0, range.start, range.end - range.start)
}
