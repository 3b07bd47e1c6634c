//! Aspect buckets: pure integer geometry, the same on every machine.
//!
//! Buckets follow NovelAI's rule: every multiple of the step is tried as a width, with the tallest
//! height that stays within the target area and the side limits; then the same with the sides
//! swapped; then the square of that area. An image goes to the bucket whose ratio of width to
//! height is nearest to its own (`crop` fits it in).

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The longest side of a bucket that the format allows.
const MAX_SIDE_PX: u32 = 65_536;

/// One aspect bucket. Its index in the manifest is its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// Width of its images.
    pub width_px: u32,
    /// Height of its images.
    pub height_px: u32,
}

/// The space in which pixel values are averaged when an image is resized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ResizeSpace {
    /// sRGB's encoded values, as for the pictures that SDXL was trained on: the default, so that a
    /// fine-tune does not also teach another rendering of fine detail. Lanczos also rings less
    /// visibly here.
    #[default]
    Gamma,
    /// Light intensities, as a lens averages them: fine bright detail keeps its brightness.
    Linear,
}

/// All settings that decide which pixels are encoded. A data set has one geometry; latents of
/// different geometries do not mix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Geometry {
    /// Largest area of a bucket, in pixels.
    pub area_px: u64,
    /// Sides of buckets are multiples of this.
    pub step_px: u32,
    /// Shortest side of a bucket.
    pub bucket_min_px: u32,
    /// Longest side of a bucket.
    pub bucket_max_px: u32,
    /// Space of the resize.
    pub resize: ResizeSpace,
    /// Colour behind transparent pixels, sRGB.
    pub background: [u8; 3],
    /// Seed of the crops and of the order in which rows are written.
    pub seed: u64,
}

impl Bucket {
    fn from_sides((width, height): (u64, u64)) -> Self {
        Self {
            width_px: width as u32,
            height_px: height as u32,
        }
    }

    /// Checks that the sides are multiples of the VAE's `factor` within the limits of the format.
    pub(crate) fn check(&self, factor: u32) -> Result<(), String> {
        let (w, h) = (self.width_px, self.height_px);
        if [w, h]
            .iter()
            .all(|px| (1..=MAX_SIDE_PX).contains(px) && px.is_multiple_of(factor))
        {
            return Ok(());
        }
        Err(format!(
            "bucket {w}x{h} px: sides must be multiples of {factor} from {factor} to {MAX_SIDE_PX}"
        ))
    }
}

impl Geometry {
    /// All buckets, in order of width, then height. Empty if no multiple of the step fits the
    /// limits.
    pub fn buckets(&self) -> Vec<Bucket> {
        let step = u64::from(self.step_px.max(1));
        let min = u64::from(self.bucket_min_px);
        let max = u64::from(self.bucket_max_px);
        let mut sides = BTreeSet::new();
        let mut width = min.div_ceil(step) * step;
        while width > 0 && width <= max && width * min <= self.area_px {
            let height = (self.area_px / width).min(max) / step * step;
            if height >= min && height > 0 {
                sides.extend([(width, height), (height, width)]);
            }
            width += step;
        }
        let square = self.area_px.isqrt() / step * step;
        if square > 0 && (min..=max).contains(&square) {
            sides.insert((square, square));
        }
        sides.into_iter().map(Bucket::from_sides).collect()
    }
}

/// The index of the bucket whose ratio of width to height is nearest to the image's; the first one
/// if several are equally near.
///
/// # Panics
/// If there are no buckets, or a side is 0.
pub fn nearest(buckets: &[Bucket], width_px: u32, height_px: u32) -> usize {
    assert!(
        !buckets.is_empty() && width_px > 0 && height_px > 0,
        "a real image and at least one bucket"
    );
    let own = ratio(width_px, height_px);
    let error = |b: &Bucket| (ratio(b.width_px, b.height_px) - own).abs();
    (0..buckets.len())
        .min_by(|&a, &b| error(&buckets[a]).total_cmp(&error(&buckets[b])))
        .expect("there is at least one bucket")
}

/// Width divided by height.
fn ratio(width: u32, height: u32) -> f64 {
    f64::from(width) / f64::from(height)
}

/// How far the image's shape is from the bucket's: the larger of the two ratios divided by the
/// smaller, minus 1. At 0.25 a fifth of the image is cropped away. (NovelAI's own measure, the
/// difference of the ratios, is small for every portrait.)
pub fn aspect_error(bucket: Bucket, width_px: u32, height_px: u32) -> f64 {
    let own = f64::from(width_px) * f64::from(bucket.height_px);
    let other = f64::from(height_px) * f64::from(bucket.width_px);
    (own / other).max(other / own) - 1.0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn geometry(area_px: u64, step_px: u32, bucket_min_px: u32, bucket_max_px: u32) -> Geometry {
        let (resize, background, seed) = (ResizeSpace::Gamma, [255; 3], 0);
        Geometry {
            area_px,
            step_px,
            bucket_min_px,
            bucket_max_px,
            resize,
            background,
            seed,
        }
    }

    fn sides(geometry: &Geometry) -> Vec<(u32, u32)> {
        geometry
            .buckets()
            .iter()
            .map(|b| (b.width_px, b.height_px))
            .collect()
    }

    #[test]
    fn sdxl_has_the_33_buckets_of_novelai_and_kohya() {
        let buckets = sides(&geometry(1024 * 1024, 64, 512, 2048));
        assert_eq!(buckets.len(), 33);
        for expected in [
            (512, 2048),
            (704, 1472),
            (832, 1216),
            (1024, 1024),
            (1216, 832),
            (1344, 768),
            (2048, 512),
        ] {
            assert!(
                buckets.contains(&expected),
                "{expected:?} is missing in {buckets:?}"
            );
        }
        // kohya's rule, written independently: h = min(max, area / w / 64 * 64), also with the
        // sides swapped, and the square.
        let mut kohya: Vec<(u32, u32)> = (512..=2048)
            .step_by(64)
            .map(|w| (w, 2048.min((1 << 20) / w / 64 * 64)))
            .flat_map(|(w, h)| [(w, h), (h, w)])
            .chain([(1024, 1024)])
            .collect();
        kohya.sort_unstable();
        kohya.dedup();
        assert_eq!(buckets, kohya);
    }

    #[test]
    fn small_pictures_get_real_buckets() {
        let buckets = sides(&geometry(128 * 128, 32, 64, 256));
        let expected = [
            (64, 256),
            (96, 160),
            (128, 128),
            (160, 96),
            (192, 64),
            (224, 64),
            (256, 64),
        ];
        assert!(expected.iter().all(|b| buckets.contains(b)), "{buckets:?}");
    }

    #[test]
    fn impossible_limits_give_no_bucket() {
        assert_eq!(sides(&geometry(100 * 100, 64, 512, 2048)), []);
        assert_eq!(sides(&geometry(0, 64, 0, 0)), []);
    }

    #[test]
    fn panorama_is_far_from_every_bucket_both_ways() {
        let buckets = geometry(1024 * 1024, 64, 512, 2048).buckets();
        let error = |w, h| aspect_error(buckets[nearest(&buckets, w, h)], w, h);
        assert!((error(8000, 1000) - 1.0).abs() < 1e-12);
        assert!((error(1000, 8000) - 1.0).abs() < 1e-12);
        assert_eq!(error(3000, 3000), 0.0);
    }

    proptest! {
        #[test]
        fn buckets_stay_in_bounds(
            area in 1u64..5_000_000,
            step in 1u32..200,
            min in 1u32..600,
            span in 0u32..2000,
        ) {
            let geometry = geometry(area, step, min, min + span);
            let buckets = sides(&geometry);
            for &(w, h) in &buckets {
                prop_assert!(w % step == 0 && h % step == 0);
                prop_assert!(w >= min && h >= min && w <= min + span && h <= min + span);
                prop_assert!(u64::from(w) * u64::from(h) <= area);
                prop_assert!(buckets.contains(&(h, w)), "{}x{} has no mirror", w, h);
            }
        }
    }
}
