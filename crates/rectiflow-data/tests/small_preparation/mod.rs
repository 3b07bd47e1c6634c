//! The VAE, the settings and an encoder of preparations of small pictures, for tests.

#![allow(dead_code, reason = "each user needs its own part")]

use half::f16;
use rectiflow_data::{Codec, PrepSettings, RgbBatch};

/// A VAE with SDXL's shapes.
pub(crate) fn codec() -> Codec {
    Codec {
        vae: "small".to_owned(),
        hash: "11".repeat(32),
        scaling_factor: 0.13025,
        down_factor: 8,
        channels: 4,
        dtype: "F16".to_owned(),
    }
}

/// Buckets of 64 x 64 pixels' area; nothing is held out.
pub(crate) fn settings() -> PrepSettings {
    PrepSettings {
        area_px: 64 * 64,
        step_px: 16,
        bucket_min_px: 32,
        bucket_max_px: 128,
        min_side_px: 16,
        test_fraction: 0.0,
        ..PrepSettings::default()
    }
}

/// Latents of zeros.
pub(crate) fn zeros(batch: &RgbBatch) -> Vec<f16> {
    let num_squares = batch.width_px / 8 * (batch.height_px / 8);
    vec![f16::ZERO; batch.num_images * 4 * num_squares as usize]
}
