//! All trained parameters as one flat fp32 vector.
//!
//! The vector is cut into buckets of whole tensors, and every bucket into a piece for each rank
//! (`partition`). A rank holds everything that the model computes with: a buffer for each bucket in
//! the dtype of its tensors, which the model's tensors view. The fp32 masters of its own pieces are
//! in the same memory (`masters`), with a remainder beside it in bf16. After the masters change,
//! several ranks must exchange their pieces (`exchange`).
//!
//! Parameters form groups, one for each component. Within a group, those that stay in fp32 in a
//! bf16 model come first, so that a bucket has one dtype, then the others, both sorted by name. The
//! order does not depend on the dtype that a run computes in, so a run can resume from a checkpoint
//! in another dtype.

use std::ops::Range;

use rectiflow_data::order::RankOf;
use rectiflow_sdxl::{weights::Parameters, write::write_to};
use tch::{Device, Kind, Tensor};

use crate::state::{
    gradients::GradientSum,
    halves::round_into,
    layout::{Group, Slice, intersect, narrow},
    masters::Masters,
    partition::{Bucket, Partition, Piece},
    precision::Precision,
};

/// The flat vector of trained parameters and the tensors that view it.
#[derive(Debug)]
pub struct FlatParameters {
    /// Masters of the elements that this rank owns, `[k]` fp32, in the memory of `weights`.
    pub masters: Masters,
    /// One entry for each tensor, in order and without gaps.
    pub slices: Vec<Slice>,
    /// One entry for each component, in order and without gaps.
    pub groups: Vec<Group>,
    /// The elements that each rank owns.
    pub partition: Partition,
    /// This rank among those of the partition.
    pub share: RankOf,
    /// Values that the model computes with, one tensor `[R c]` for each bucket: the bucket, padded
    /// so that its R pieces are equally long.
    weights: Vec<Tensor>,
    /// The sum of a step's gradients.
    pub(crate) gradients: GradientSum,
}

/// Elements at which a bucket is closed: 25 MiB of fp32, PyTorch's default.
const BUCKET: i64 = 25 << 18;
/// Least number of buckets, approximately, of a small model, so that most of its gradients are
/// already sent when the last one is complete.
pub const FEWEST_BUCKETS: i64 = 16;

impl FlatParameters {
    /// Moves the parameters of `components` (name, parameters) into one vector and enables their
    /// gradients, on a rank that owns all of them.
    ///
    /// The models keep their tensors; only the underlying memory changes, and in bf16 the dtype of
    /// most of them.
    pub fn adopt(components: &[(&str, &Parameters)], precision: Precision) -> Self {
        Self::adopt_share(components, precision, RankOf::ONLY)
    }

    /// Like [`Self::adopt`], on one of several ranks that share the masters.
    pub fn adopt_share(
        components: &[(&str, &Parameters)],
        precision: Precision,
        share: RankOf,
    ) -> Self {
        Self::adopt_multiples(components, precision, share, 1)
    }

    /// Like [`Self::adopt_share`], with pieces of several ranks that are multiples of `multiple`
    /// elements.
    pub fn adopt_multiples(
        components: &[(&str, &Parameters)],
        precision: Precision,
        share: RankOf,
        multiple: i64,
    ) -> Self {
        // Lay the parameters out.
        let Layout {
            slices,
            groups,
            mut leaves,
        } = Layout::of(components, precision);
        let lengths = bucket_lengths(&slices, &groups);
        let partition = Partition::in_multiples(lengths, share.ranks, multiple);
        let device = leaves.first().map_or(Device::Cpu, Tensor::device);

        // Move the tensors, bucket by bucket.
        let mut weights = Vec::new();
        let mut masters = Masters::empty(device);
        let mut first = 0;
        for (bucket, piece) in partition.buckets().iter().zip(partition.pieces(share)) {
            let end = slices.partition_point(|slice| slice.range.start < bucket.range.end);
            let kind = slices.get(first).map_or(Kind::Float, |slice| slice.kind);
            let memory = Tensor::zeros([bucket.piece * share.ranks as i64], (kind, device));
            masters.push(part_in(&memory, bucket, &piece));
            for (slice, leaf) in slices[first..end].iter().zip(&mut leaves[first..end]) {
                let values = leaf.detach().flatten(0, -1);
                move_into(leaf, slice, bucket, &memory);
                if let Some((at, owned)) = owned(&piece, &values, slice.range.start) {
                    masters.write(at, &owned);
                }
            }
            first = end;
            weights.push(memory);
        }

        let gradients = GradientSum::new(&leaves, &slices, &partition);
        Self {
            masters,
            slices,
            groups,
            partition,
            share,
            weights,
            gradients,
        }
    }

    /// Overwrites the masters that this rank owns of a tensor with its numbers `[m]` fp32.
    pub(crate) fn write(&self, slice: &Slice, numbers: &Tensor) {
        for piece in self.partition.pieces(self.share) {
            if let Some((at, owned)) = owned(&piece, numbers, slice.range.start) {
                self.masters.write(at, &owned);
            }
        }
    }

    /// Returns, for each bucket, this rank's piece of the model's weights `[c]`, and the tensor `[R
    /// c]` that receives the pieces of all ranks.
    pub(crate) fn exchanged(&self) -> impl Iterator<Item = (Tensor, &Tensor)> {
        let buckets = self.partition.buckets().iter().zip(&self.weights);
        buckets.map(|(bucket, weights)| {
            let start = self.share.rank as i64 * bucket.piece;
            // A copy, since the gather overwrites the original with the same numbers.
            (
                narrow(weights, &(start..start + bucket.piece)).copy(),
                weights,
            )
        })
    }

    /// Returns the part of `range` that this rank owns, as a range within its own elements.
    pub(crate) fn own_part(&self, range: &Range<i64>) -> Range<i64> {
        self.partition.own_part(self.share, range)
    }

    /// Returns the number of trained parameters.
    pub fn num_parameters(&self) -> i64 {
        self.partition.len()
    }
}

/// Copies into `own`, the elements of a rank, those of `found` `[m]` that are in `piece`. The
/// first element of `found` is element `start` of the flat vector.
pub(crate) fn copy_piece(own: &Tensor, piece: &Piece, found: &Tensor, start: i64) {
    if let Some((at, owned)) = owned(piece, found, start) {
        let place = at..at + owned.numel() as i64;
        write_to(&narrow(own, &place), &owned);
    }
}

/// Returns a view of the elements of `found` `[m]` that are in `piece`, and the place of the first
/// among those that the rank owns. The first element of `found` is element `start` of the flat
/// vector.
fn owned(piece: &Piece, found: &Tensor, start: i64) -> Option<(i64, Tensor)> {
    let common = intersect(&(start..start + found.numel() as i64), &piece.range);
    if common.is_empty() {
        return None;
    }
    let at = piece.own.start + common.start - piece.range.start;
    let inside = common.start - start..common.end - start;
    Some((at, narrow(found, &inside)))
}

/// Returns a view of a rank's piece in a bucket's `memory`, without padding.
fn part_in(memory: &Tensor, bucket: &Bucket, piece: &Piece) -> Tensor {
    let start = piece.range.start - bucket.range.start;
    narrow(
        memory,
        &(start..start + piece.range.end - piece.range.start),
    )
}

/// Turns `leaf` into a view of its slice of a bucket's `memory`, with the same values and with
/// gradients enabled.
fn move_into(leaf: &mut Tensor, slice: &Slice, bucket: &Bucket, memory: &Tensor) {
    let start = bucket.range.start;
    let inside = slice.range.start - start..slice.range.end - start;
    let view = narrow(memory, &inside).view(slice.shape.as_slice());
    round_into(&view, leaf);
    leaf.set_data(&view);
    let _ = leaf.set_requires_grad(true);
}

/// All parameters in order, and the tensors that hold them.
#[derive(Debug, Default)]
struct Layout {
    slices: Vec<Slice>,
    groups: Vec<Group>,
    leaves: Vec<Tensor>,
}

impl Layout {
    fn of(components: &[(&str, &Parameters)], precision: Precision) -> Self {
        let mut layout = Self::default();
        for (component, parameters) in components {
            let start = layout.end();
            for stays in [true, false] {
                for (name, tensor) in parameters.iter() {
                    if Precision::keeps_fp32(name) == stays {
                        let name_in_model = format!("{component}.{name}");
                        layout.push(name_in_model, tensor, precision.kind_of(name));
                    }
                }
            }
            layout.groups.push(Group {
                component: (*component).to_owned(),
                range: start..layout.end(),
            });
        }
        layout
    }

    fn push(&mut self, name: String, tensor: &Tensor, kind: Kind) {
        let start = self.end();
        self.slices.push(Slice {
            name,
            shape: tensor.size(),
            range: start..start + tensor.numel() as i64,
            kind,
        });
        self.leaves.push(tensor.shallow_clone());
    }

    /// Returns the number of elements.
    fn end(&self) -> i64 {
        self.slices.last().map_or(0, |slice| slice.range.end)
    }
}

/// Returns the lengths of the buckets, which do not depend on ranks or dtype.
fn bucket_lengths(slices: &[Slice], groups: &[Group]) -> Vec<i64> {
    let total = groups.last().map_or(0, |group| group.range.end);
    let most = (total / FEWEST_BUCKETS).clamp(1, BUCKET);
    let mut lengths: Vec<i64> = Vec::new();
    for (index, slice) in slices.iter().enumerate() {
        let len = slice.range.end - slice.range.start;
        let begins_group = groups
            .iter()
            .any(|group| group.range.start == slice.range.start);
        let joins =
            index > 0 && !begins_group && keeps_fp32(&slices[index - 1]) == keeps_fp32(slice);
        match lengths.last_mut() {
            Some(length) if joins && *length < most => *length += len,
            _ => lengths.push(len),
        }
    }
    lengths
}

/// Returns whether a tensor stays in fp32 regardless of the precision.
fn keeps_fp32(slice: &Slice) -> bool {
    let name = slice.name.split_once('.');
    name.is_some_and(|(_, name)| Precision::keeps_fp32(name))
}

#[cfg(test)]
mod tests {
    use rectiflow_sdxl::{init::Init, weights::Weights};

    use super::*;

    /// Returns random parameters of a UNet and a text encoder, some of which stay in fp32.
    fn components() -> [Parameters; 2] {
        let shapes: [&[(&str, &[i64])]; 2] = [
            &[
                ("conv_in.weight", &[4, 3]),
                ("down.norm1.weight", &[5]),
                ("down.conv1.weight", &[40]),
                ("up.w", &[7, 3]),
            ],
            &[("a.layer_norm1.bias", &[3]), ("a.fc.weight", &[11])],
        ];
        shapes.map(|shapes| {
            let mut weights = Weights::random(1, Kind::Float, Device::Cpu);
            for (name, shape) in shapes {
                let _ = weights.take(name, shape, Init::Normal { std: 1.0 });
            }
            weights.finish().expect("random weights fit")
        })
    }

    fn adopt(components: &[Parameters; 2], precision: Precision, share: RankOf) -> FlatParameters {
        let [unet, text] = components;
        FlatParameters::adopt_share(&[("unet", unet), ("text_encoder", text)], precision, share)
    }

    #[test]
    fn buckets_are_whole_tensors_of_one_group_and_one_dtype() {
        let flat = adopt(&components(), Precision::Bf16, RankOf::ONLY);
        let names: Vec<&str> = flat.slices.iter().map(|slice| &slice.name[..]).collect();
        let expected = [
            "unet.down.norm1.weight",
            "unet.conv_in.weight",
            "unet.down.conv1.weight",
            "unet.up.w",
        ];
        assert_eq!(names[..4], expected);
        assert_eq!(
            names[4..],
            [
                "text_encoder.a.layer_norm1.bias",
                "text_encoder.a.fc.weight"
            ]
        );
        let lengths: Vec<i64> = flat
            .partition
            .buckets()
            .iter()
            .map(|bucket| bucket.range.end - bucket.range.start)
            .collect();
        // 92 elements in buckets of at least 5.
        assert_eq!(lengths, [5, 12, 40, 21, 3, 11]);
        let kinds: Vec<Kind> = flat.weights.iter().map(Tensor::kind).collect();
        let (low, high) = (Kind::BFloat16, Kind::Float);
        assert_eq!(kinds, [high, low, low, low, high, low]);
    }

    #[test]
    fn ranks_have_the_masters_of_their_pieces_and_the_same_model() {
        let names = |components: &[Parameters; 2]| -> Vec<Tensor> {
            components
                .iter()
                .flat_map(|part| part.iter().map(|(_, tensor)| tensor.detach().copy()))
                .collect()
        };
        for (precision, ranks) in [
            (Precision::Fp32, 1),
            (Precision::Fp32, 3),
            (Precision::Bf16, 1),
            (Precision::Bf16, 3),
        ] {
            let whole = adopt(&components(), Precision::Fp32, RankOf::ONLY).masters;
            for rank in 0..ranks {
                let components = components();
                let before = names(&components);
                let flat = adopt(&components, precision, RankOf { rank, ranks });
                for piece in flat.partition.pieces(flat.share) {
                    let masters = flat.masters.read(&piece.own);
                    assert!(masters.equal(&whole.read(&piece.range)));
                }
                for (before, after) in before.iter().zip(names(&components)) {
                    let wanted = after.zeros_like();
                    round_into(&wanted, before);
                    assert!(wanted.equal(&after));
                }
            }
        }
    }

    #[test]
    fn the_model_follows_the_masters() {
        for precision in [Precision::Fp32, Precision::Bf16] {
            let components = components();
            let flat = adopt(&components, precision, RankOf::ONLY);
            flat.masters.write(0, &(flat.masters.zeros() + 0.5));
            let tensors = components
                .iter()
                .flat_map(|part| part.iter().map(|(_, tensor)| tensor.detach()));
            assert!(
                tensors
                    .into_iter()
                    .all(|tensor| tensor.equal(&(tensor.ones_like() * 0.5)))
            );
        }
    }
}
