//! The weights that the model computes with, refreshed from the fp32 masters after an update: bf16
//! copies, or fp32 ones where several ranks share the masters.

use rectiflow_sdxl::write::write_to;
use tch::{Tensor, no_grad};

use crate::state::{
    flat::FlatParameters,
    layout::narrow,
    partition::{Bucket, Piece},
};

impl FlatParameters {
    /// Updates the model's weights from the masters, on a rank that owns all of them. Must be
    /// called after the masters change, before the model is used again.
    pub(crate) fn refresh(&self) {
        assert_eq!(
            self.share.ranks, 1,
            "several ranks exchange their masters instead"
        );
        if self.aliases_masters {
            return;
        }
        for (weights, piece) in self.weights.iter().zip(self.partition.pieces(self.share)) {
            write_to(weights, &narrow(&self.masters, &piece.own));
        }
    }

    /// Returns, for each bucket, this rank's piece of the model's new weights `[c]`, and the tensor
    /// `[R c]` that receives the pieces of all ranks.
    pub(crate) fn exchanged(&self) -> impl Iterator<Item = (Tensor, &Tensor)> {
        let pieces = self.partition.pieces(self.share);
        let buckets = self.partition.buckets().iter().zip(pieces);
        buckets
            .zip(&self.weights)
            .map(|((bucket, piece), weights)| (self.new_weights(bucket, &piece, weights), weights))
    }

    /// Returns this rank's piece of a bucket's masters in the dtype of `weights`, padded to `[c]`.
    fn new_weights(&self, bucket: &Bucket, piece: &Piece, weights: &Tensor) -> Tensor {
        let new = Tensor::empty([bucket.piece], (weights.kind(), weights.device()));
        let owned = piece.own.end - piece.own.start;
        write_to(
            &narrow(&new, &(0..owned)),
            &narrow(&self.masters, &piece.own),
        );
        let _ = no_grad(|| narrow(&new, &(owned..bucket.piece)).zero_());
        new
    }
}
