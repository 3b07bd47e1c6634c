//! The gradient clip: a step's gradient that is longer than the limit is scaled down to it, as by
//! PyTorch's `clip_grad_norm_`.

use crate::state::gradient_vector::GradientVector;

impl GradientVector {
    /// Scales the vector, whose norm is `norm`, down to the norm `limit` if it is longer.
    pub(crate) fn clip(&mut self, norm: f64, limit: f64) {
        if norm > limit {
            self.scale(limit / norm);
        }
    }
}
