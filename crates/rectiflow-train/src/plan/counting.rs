//! The calls, bytes and host time of a training step without numbers: what `rectiflow bench calls`
//! prints.
//!
//! The step is that of [`crate::synthetic`], on a device whose tensors have no numbers
//! ([`rectiflow_sdxl::counting`]). A machine without a GPU so counts what a GPU's step calls, at
//! the model's true size. How long the GPU takes for it remains unknown.

use rectiflow_sdxl::{
    config::UNetConfig,
    counting::{Counted, Counter},
    unet::UNet,
    weights::Weights,
};
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::{
    error::Result,
    plan::estimate::RecomputedBlocks,
    state::precision::Precision,
    step::synthetic::{Input, Settings, train_steps},
};

/// The step that is counted.
#[derive(Debug, Clone)]
pub struct Sizes {
    /// Samples of the one micro-batch.
    pub batch: i64,
    /// Height and width of the latents.
    pub latent: [i64; 2],
    /// Precision that the UNet computes in.
    pub precision: Precision,
    /// The blocks that are recomputed.
    pub recomputed: RecomputedBlocks,
    /// Number of steps that are timed after the counted one.
    pub timed: usize,
}

/// What was counted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StepCount {
    /// Calls and bytes of the second step.
    pub counted: Counted,
    /// Seconds of each timed step: what the processor does for a step, without starting a kernel.
    pub host_secs: Vec<f64>,
}

/// Counts a step of a UNet of these sizes.
///
/// # Errors
/// [`crate::Error::Model`] if the configuration is none of a UNet.
pub fn count_step(config: UNetConfig, sizes: &Sizes) -> Result<StepCount> {
    let counter = Counter::new();
    let mut unet = UNet::new(config, Weights::without_numbers(Kind::Float))?;
    sizes.recomputed.apply(&mut unet);
    let [height, width] = sizes.latent;
    let input = Input::random(&unet, [sizes.batch, height, width]);
    let settings = Settings {
        precision: sizes.precision,
        micro_batches: 1,
        steps: 2 + sizes.timed,
        lr: 1e-4,
        clip_norm: 1.0,
    };
    // The first step allocates what stays.
    let mut counted = None;
    let mut observe = |steps| match steps {
        1 => counter.begin(),
        2 => counted = Some(counter.end()),
        _ => {}
    };
    let measured = train_steps(&unet, &input, &settings, &mut observe)?;
    Ok(StepCount {
        counted: counted.expect("there are two steps at least"),
        host_secs: measured.secs[2..].to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use rectiflow_sdxl::{bundle::sdxl_configs, model::Component};

    use super::*;
    use crate::plan::estimate::{Passes, UpdateMode};

    /// SDXL, four samples of 1024x1024 in bf16.
    fn sdxl(recomputed: RecomputedBlocks) -> (UNetConfig, Sizes) {
        let json = sdxl_configs()
            .remove(&Component::UNet)
            .expect("there is one for every component");
        let sizes = Sizes {
            batch: 4,
            latent: [128, 128],
            precision: Precision::Bf16,
            recomputed,
            timed: 0,
        };
        (
            UNetConfig::from_json(json, "SDXL").expect("it is valid"),
            sizes,
        )
    }

    /// Half of diffusers' calls under autocast without recomputation, by
    /// scripts/peers/count_calls.py (2026-11-30).
    const HALF_OF_DIFFUSERS: u64 = 26_856 / 2;

    #[test]
    fn a_step_of_sdxl_makes_half_of_diffusers_calls_and_waits_twice() {
        for is_recomputed in [false, true] {
            let (config, sizes) = sdxl(RecomputedBlocks::All(is_recomputed));
            let found = count_step(config, &sizes).expect("the configuration is SDXL's");
            let counted = found.counted;
            // The norm and the loss.
            let waits: Vec<u64> = counted.parts().map(|(_, calls)| calls.waits).to_vec();
            assert_eq!(waits, [0, 0, 2]);
            if !is_recomputed {
                assert!(
                    counted.total() <= HALF_OF_DIFFUSERS,
                    "{} calls",
                    counted.total()
                );
            }
        }
    }

    #[test]
    fn the_estimate_of_memory_is_within_three_percent_of_the_tensors() {
        for is_recomputed in [false, true] {
            let recomputed = RecomputedBlocks::All(is_recomputed);
            let (config, sizes) = sdxl(recomputed.clone());
            let passes = Passes {
                batch: 4,
                latent: [128, 128],
                tokens: 77,
                precision: Precision::Bf16,
                width: 1,
                accumulates: false,
                fused: false,
                update: UpdateMode::default(),
            };
            let estimate = passes.estimate(&config, &recomputed);
            let estimated = estimate.device_bytes(rectiflow_sdxl::counting::DEVICE) as f64;
            let found = count_step(config, &sizes).expect("the configuration is SDXL's");
            let error = estimated / found.counted.peak_bytes as f64 - 1.0;
            assert!(error.abs() < 0.03, "recomputed {is_recomputed}: {error}");
        }
    }
}
