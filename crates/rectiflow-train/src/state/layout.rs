//! Places of tensors in the flat vector of parameters, and ranges of such a vector. Pure.

use std::ops::Range;

use rectiflow_sdxl::vectors::part_of;
use tch::{Device, Kind, Tensor};

/// The place of one tensor in the flat vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// Component and diffusers name, e.g. `unet.conv_in.weight`.
    pub name: String,
    /// Shape of the tensor.
    pub shape: Vec<i64>,
    /// Its elements in the flat vector.
    pub range: Range<i64>,
    /// Dtype of the tensor in the model's computation.
    pub kind: Kind,
}

/// The place of one component in the flat vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The component's folder in diffusers' layout: `unet`, `text_encoder` or `text_encoder_2`.
    pub component: String,
    /// Its elements in the flat vector.
    pub range: Range<i64>,
}

/// Returns a view of a range of a vector.
pub(crate) fn narrow(vector: &Tensor, range: &Range<i64>) -> Tensor {
    let length = range.end - range.start;
    if vector.device() == Device::Cpu {
        return vector.narrow(0, range.start, length);
    }
    on_device(vector, range, &[length])
}

/// Returns a view of a range of a vector, in a tensor's shape.
pub(crate) fn shaped(vector: &Tensor, range: &Range<i64>, shape: &[i64]) -> Tensor {
    if vector.device() == Device::Cpu {
        return narrow(vector, range).view(shape);
    }
    on_device(vector, range, shape)
}

/// A view in one step instead of two calls of libtorch, because an update makes thousands and a GPU
/// waits for them.
fn on_device(vector: &Tensor, range: &Range<i64>, shape: &[i64]) -> Tensor {
    part_of(vector, range.start, shape).expect("the range is inside of the vector")
}

/// Returns the intersection of two ranges; an empty range inside `b` if they are disjoint.
pub(crate) fn intersect(a: &Range<i64>, b: &Range<i64>) -> Range<i64> {
    let start = a.start.clamp(b.start, b.end);
    start..a.end.clamp(start, b.end)
}

/// Splits a range into chunks. On a CPU they are small enough to stay in the cache through the
/// dozen passes of an update. On a GPU, which launches a kernel for each pass and has memory for
/// large temporaries, they are large.
pub(crate) fn chunks(
    range: &Range<i64>,
    device: Device,
) -> impl Iterator<Item = Range<i64>> + use<> {
    let size = if device == Device::Cpu {
        CHUNK
    } else {
        GPU_CHUNK
    };
    let end = range.end;
    range
        .clone()
        .step_by(size)
        .map(move |start| start..end.min(start + size as i64))
}

/// Elements of a chunk on a CPU: 256 KiB of fp32.
pub(crate) const CHUNK: usize = 1 << 16;
/// Elements of a chunk on a GPU: 64 MiB of fp32.
const GPU_CHUNK: usize = 1 << 24;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_meet_where_they_overlap() {
        assert_eq!(intersect(&(2..8), &(4..10)), 4..8);
        assert_eq!(intersect(&(2..8), &(3..5)), 3..5);
        assert_eq!(intersect(&(0..2), &(4..10)), 4..4);
        assert_eq!(intersect(&(20..30), &(4..10)), 10..10);
    }

    #[test]
    fn chunks_cover_a_range_in_few_pieces_on_a_gpu() {
        let range = 5..(3 << 24) + 6;
        for (device, count) in [(Device::Cpu, 3 << 8 | 1), (Device::Cuda(0), 4)] {
            let chunks: Vec<_> = chunks(&range, device).collect();
            assert_eq!(chunks.len(), count);
            assert_eq!(
                (chunks[0].start, chunks[count - 1].end),
                (range.start, range.end)
            );
            assert!(chunks.windows(2).all(|pair| pair[0].end == pair[1].start));
        }
    }
}
