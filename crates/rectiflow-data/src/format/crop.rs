//! The resize and the crop that fit an image into its bucket: pure integer geometry, the same on
//! every machine.
//!
//! The image is resized until it just covers the bucket; the excess is cropped at a random place.
//! What is not here: pixels (`picture::resize`).

use crate::{
    format::{bucket::Bucket, record::SampleId},
    rng::{Purpose, Rng},
};

/// How an image is fitted into its bucket. The crop is a rectangle of the bucket's size inside the
/// resized image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Width after the resize.
    pub resized_width_px: u32,
    /// Height after the resize.
    pub resized_height_px: u32,
    /// Columns cut off at the left.
    pub crop_left_px: u32,
    /// Rows cut off at the top.
    pub crop_top_px: u32,
}

/// The placement that just covers the bucket, with a crop position that depends only on (seed, id).
///
/// # Panics
/// If a side is 0.
pub fn place(bucket: Bucket, width_px: u32, height_px: u32, seed: u64, id: SampleId) -> Placement {
    assert!(width_px > 0 && height_px > 0, "a real image");
    let [w, h, bw, bh] = [width_px, height_px, bucket.width_px, bucket.height_px].map(u64::from);
    // If the image is wider than the bucket, the height fits exactly; otherwise the width does.
    let (rw, rh) = if w * bh > h * bw {
        (divide_to_nearest(w * bh, h).max(bw), bh)
    } else {
        (bw, divide_to_nearest(h * bw, w).max(bh))
    };
    let mut rng = Rng::keyed(seed, Purpose::Crop, &[id.0]);
    let crop_left_px = rng.below(rw - bw + 1) as u32;
    let crop_top_px = rng.below(rh - bh + 1) as u32;
    Placement {
        resized_width_px: rw as u32,
        resized_height_px: rh as u32,
        crop_left_px,
        crop_top_px,
    }
}

fn divide_to_nearest(numerator: u64, denominator: u64) -> u64 {
    (numerator + denominator / 2) / denominator
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::bucket::{Geometry, ResizeSpace};

    /// The buckets of SDXL.
    fn buckets() -> Vec<Bucket> {
        let geometry = Geometry {
            area_px: 1024 * 1024,
            step_px: 64,
            bucket_min_px: 512,
            bucket_max_px: 2048,
            resize: ResizeSpace::Gamma,
            background: [255; 3],
            seed: 0,
        };
        geometry.buckets()
    }

    proptest! {
        #[test]
        fn resized_image_just_covers_its_bucket(
            w in 1u32..20_000,
            h in 1u32..20_000,
            id: u64,
            pick in 0usize..33,
        ) {
            let bucket = buckets()[pick];
            let placed = place(bucket, w, h, 7, SampleId(id));
            prop_assert_eq!(placed, place(bucket, w, h, 7, SampleId(id)));
            let excess = (
                placed.resized_width_px - bucket.width_px,
                placed.resized_height_px - bucket.height_px,
            );
            prop_assert!(excess.0 == 0 || excess.1 == 0, "one side fits exactly: {:?}", placed);
            prop_assert!(placed.crop_left_px <= excess.0 && placed.crop_top_px <= excess.1);
            let scale = |resized: u32, original: u32| f64::from(resized) / f64::from(original);
            let (x, y) = (scale(placed.resized_width_px, w), scale(placed.resized_height_px, h));
            prop_assert!(
                (x - y).abs() <= 0.5 / f64::from(w.min(h)) + 1e-9,
                "the shape is kept: {} against {}",
                x,
                y
            );
        }
    }

    #[test]
    fn crops_are_uniform_over_ids() {
        let bucket = Bucket {
            width_px: 64,
            height_px: 64,
        };
        let mut counts = [0u32; 65];
        for id in 0..65_000 {
            counts[place(bucket, 128, 64, 1, SampleId(id)).crop_left_px as usize] += 1;
        }
        // Six standard deviations of a binomial with n = 65,000 and p = 1/65.
        assert!(counts.iter().all(|&n| n.abs_diff(1000) < 190), "{counts:?}");
    }
}
