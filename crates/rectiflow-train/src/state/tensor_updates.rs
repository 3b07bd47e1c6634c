//! Updates of single tensors during the backward pass (`train.update_in_backward`).
//!
//! The backward pass hands each gradient over when it is complete, on the thread that made it: by
//! then everything that needs the tensor's old values has run. The tensor is updated, and its
//! gradient freed before the next one exists.

use std::sync::{Arc, Mutex, MutexGuard};

use tch::{Kind, Tensor, no_grad};

use crate::state::{
    TrainState,
    masters::Masters,
    one_pass::square_norm,
    optim::{Optimizer, UpdateRange},
    tensor_norms::NormMean,
};

/// The updates of one step, from several threads' point of view: one after the other.
#[derive(Debug, Clone)]
pub(crate) struct TensorUpdates(Arc<Mutex<Updates>>);

#[derive(Debug)]
struct Updates {
    /// Handles of the state's own memory.
    optimizer: Optimizer,
    masters: Masters,
    /// For each tensor, its elements and rate.
    ranges: Vec<UpdateRange>,
    norms: Vec<NormMean>,
    clip_ratio: f64,
    /// For each tensor, the square of its gradient's norm before scaling, once it is updated.
    square_norms: Vec<Option<f64>>,
    num_scaled: u64,
    /// The first tensor whose gradient was not finite. No tensor is updated after it.
    broken: Option<usize>,
}

/// What the updates of a step have done.
#[derive(Debug)]
pub(crate) struct Done {
    /// For each tensor, the square of its gradient's norm before scaling.
    pub(crate) square_norms: Vec<f64>,
    /// Number of tensors whose gradient was scaled.
    pub(crate) num_scaled: u64,
    /// The running means, this step's norms included.
    pub(crate) norms: Vec<NormMean>,
    /// The tensor whose gradient was not finite, if any: the step is lost, and so are the values of
    /// the tensors that were updated before it.
    pub(crate) broken: Option<usize>,
}

impl TensorUpdates {
    /// Returns the updates of a state's tensors; `ranges` has one for each.
    pub(crate) fn new(state: &TrainState, ranges: Vec<UpdateRange>, clip_ratio: f64) -> Self {
        Self(Arc::new(Mutex::new(Updates {
            optimizer: state.optimizer.shallow_clone(),
            masters: state.parameters.masters.shallow_clone(),
            square_norms: vec![None; ranges.len()],
            norms: state.tensor_norms.clone(),
            ranges,
            clip_ratio,
            num_scaled: 0,
            broken: None,
        })))
    }

    /// Updates a tensor with its gradient, of any shape and dtype.
    pub(crate) fn take(&self, tensor: usize, gradient: &Tensor) {
        no_grad(|| self.lock().update(tensor, gradient));
    }

    /// Updates the tensors that had no gradient, whose gradient is zero, and returns what was done.
    pub(crate) fn finish(self) -> Done {
        let mut updates = self.lock();
        for tensor in 0..updates.ranges.len() {
            if updates.square_norms[tensor].is_none() && updates.broken.is_none() {
                let range = &updates.ranges[tensor].range;
                let length = range.end - range.start;
                let device = updates.masters.device();
                let zeros = Tensor::zeros([length], (Kind::Float, device));
                no_grad(|| updates.update(tensor, &zeros));
            }
        }
        let squares = updates.square_norms.iter();
        Done {
            square_norms: squares.map(|square| square.unwrap_or(f64::NAN)).collect(),
            num_scaled: updates.num_scaled,
            norms: std::mem::take(&mut updates.norms),
            broken: updates.broken,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Updates> {
        self.0
            .lock()
            .expect("no thread panicked while it updated a tensor")
    }
}

impl Updates {
    fn update(&mut self, tensor: usize, gradient: &Tensor) {
        if self.broken.is_some() {
            return;
        }
        let mut gradient = gradient.flatten(0, -1).to_kind(Kind::Float).contiguous();
        let square = square_norm(&gradient);
        self.square_norms[tensor] = Some(square);
        if !square.is_finite() {
            self.broken = Some(tensor);
            return;
        }
        let norm = square.sqrt();
        let limit = self.norms[tensor].limit(self.clip_ratio);
        if norm > limit {
            gradient *= limit / norm;
            self.num_scaled += 1;
        }
        self.norms[tensor].learn(norm.min(limit));
        let range = &self.ranges[tensor];
        self.optimizer
            .update_tensor(&self.masters, range, &gradient);
    }
}

#[cfg(test)]
mod tests {
    use rectiflow_sdxl::{init::Init, weights::Weights};
    use tch::Device;

    use super::*;
    use crate::{
        lr::LrRatios,
        state::{
            Position, flat::FlatParameters, layout::narrow, optim::OptimizerConfig,
            precision::Precision,
        },
    };

    /// A state of two tensors of 100 and 50 elements.
    fn state() -> TrainState {
        let mut weights = Weights::random(1, Kind::Float, Device::Cpu);
        for (name, length) in [("a", 100), ("b", 50)] {
            let _ = weights.take(name, &[length], Init::Normal { std: 1.0 });
        }
        let unet = weights.finish().expect("random weights fit");
        let parameters = FlatParameters::adopt(&[("unet", &unet)], Precision::Fp32);
        TrainState {
            position: Position::default(),
            optimizer: Optimizer::of(OptimizerConfig::default(), &parameters),
            moments_from: vec![0],
            average: None,
            tensor_norms: vec![NormMean::default(); 2],
            passed_over: Vec::new(),
            parameters,
        }
    }

    fn gradient(tensor: usize, factor: f64) -> Tensor {
        let length = [100, 50][tensor];
        (Tensor::arange(length, (Kind::Float, Device::Cpu)) * 0.3).sin() * factor
    }

    /// Updates both tensors, with gradients `factors` times as large.
    fn update(state: &mut TrainState, clip_ratio: f64, factors: [f64; 2]) -> Done {
        let ranges = state.tensor_ranges(1e-3, &LrRatios::default());
        let updates = TensorUpdates::new(state, ranges, clip_ratio);
        for (tensor, factor) in factors.into_iter().enumerate() {
            updates.take(tensor, &gradient(tensor, factor));
        }
        let done = updates.finish();
        state.tensor_norms.clone_from(&done.norms);
        state.position.update += 1;
        done
    }

    #[test]
    fn a_tensor_above_its_usual_norm_is_scaled_and_the_others_are_not() {
        let [mut scaled, mut by_hand] = [state(), state()];
        for state in [&mut scaled, &mut by_hand] {
            for _ in 0..20 {
                assert_eq!(update(state, 3.0, [1.0, 1.0]).num_scaled, 0);
            }
        }
        // A gradient as large as the limit, and one above it.
        assert_eq!(update(&mut by_hand, 1e9, [3.0, 2.0]).num_scaled, 0);
        let done = update(&mut scaled, 3.0, [100.0, 2.0]);
        assert_eq!(done.num_scaled, 1);
        let whole = gradient(0, 100.0).norm().double_value(&[]);
        assert!(
            (done.square_norms[0].sqrt() / whole - 1.0).abs() < 1e-5,
            "before scaling"
        );
        let [found, wanted] = [&scaled, &by_hand].map(|state| state.parameters.masters.to_tensor());
        let error = |range| {
            let difference = narrow(&found, range) - narrow(&wanted, range);
            difference.abs().max().double_value(&[])
        };
        assert!(error(&(0..100)) < 1e-7, "{}", error(&(0..100)));
        assert_eq!(error(&(100..150)), 0.0);
    }

    #[test]
    fn nothing_is_updated_after_a_gradient_that_is_not_finite() {
        let mut state = state();
        let before = state.parameters.masters.to_tensor();
        let done = update(&mut state, 3.0, [f64::NAN, 1.0]);
        assert_eq!(done.broken, Some(0));
        assert!(state.parameters.masters.to_tensor().equal(&before));
        let done = update(&mut state, 3.0, [1.0, f64::INFINITY]);
        assert_eq!(done.broken, Some(1));
        let after = state.parameters.masters.to_tensor();
        let is_same = |range| narrow(&after, range).equal(&narrow(&before, range));
        assert!(!is_same(&(0..100)) && is_same(&(100..150)));
    }

    #[test]
    fn a_tensor_without_a_gradient_is_updated_with_zeros() {
        let state = state();
        let before = state.parameters.masters.to_tensor();
        let ranges = state.tensor_ranges(1e-3, &LrRatios::default());
        let updates = TensorUpdates::new(&state, ranges, 3.0);
        updates.take(0, &gradient(0, 1.0));
        let done = updates.finish();
        assert_eq!((done.square_norms[1], done.broken), (0.0, None));
        // Weight decay.
        let after = state.parameters.masters.to_tensor();
        let wanted = narrow(&before, &(100..150)) * (1.0 - 1e-3 * 0.1);
        assert!(narrow(&after, &(100..150)).allclose(&wanted, 1e-6, 0.0, false));
    }
}
