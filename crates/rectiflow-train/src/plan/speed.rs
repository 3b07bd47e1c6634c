//! The share of its peak that a GPU reaches, by the one published run, and what recomputation adds
//! to a sample's arithmetic. Pure.
//!
//! Two shares are told apart, by the field's names. MFU counts what training requires; HFU also
//! counts what is computed a second time. A GPU that recomputes has the same HFU at a lower MFU:
//! this file assumes it, and everything that compares checkpointing follows from it.

use crate::plan::setup::Question;

/// The published run that is the reference for speed: (GPUs, samples per second and GPU), on H100
/// SXM (bigASP v2.5, an SDXL to flow matching; 4 machines of 8, latents of about a megapixel,
/// every block checkpointed).
const PUBLISHED: [(usize, f64); 3] = [(1, 11.0), (8, 9.6), (32, 9.4)];
/// Arithmetic of one of its samples, assumed to be 1024 x 1024 pixels with 77 tokens: 3 x 6.761e12
/// in the UNet, 0.11e12 in the encoders; 6.430e12 in the blocks that are recomputed.
const PUBLISHED_SAMPLE: SampleFlops = SampleFlops {
    required: 20.39e12,
    recomputed: 6.430e12,
};
/// What PyTorch 2.1 and newer recompute of a sample: all of a block but its last product
/// (`crates/rectiflow-sdxl/tests/flops.rs`). The publication names no version.
const PUBLISHED_RECOMPUTED_EARLY: f64 = 5.212e12;
/// Peak of its GPUs, in FLOP/s.
const PUBLISHED_PEAK_FLOPS: f64 = 989.4e12;

/// The arithmetic of training on one sample, in FLOP.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct SampleFlops {
    /// What training requires: forward and backward pass.
    pub(crate) required: f64,
    /// What checkpointing computes a second time.
    pub(crate) recomputed: f64,
}

impl SampleFlops {
    /// Returns all that a GPU computes.
    pub(crate) fn spent(self) -> f64 {
        self.required + self.recomputed
    }

    /// Returns the share of the backward pass in the time of a micro-batch, recomputation included.
    pub(crate) fn backward_share(self) -> f64 {
        (2.0 / 3.0 * self.required + self.recomputed) / self.spent()
    }
}

/// The published run at one of its sizes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Published {
    /// Number of GPUs.
    at: usize,
    /// Samples per second of one of them.
    rate: f64,
}

impl Published {
    /// Returns the smallest of its sizes that is not below `gpus`, or else the largest.
    pub(crate) fn at_least(gpus: usize) -> Self {
        let &(at, rate) = PUBLISHED
            .iter()
            .find(|(at, _)| *at >= gpus)
            .unwrap_or(&PUBLISHED[PUBLISHED.len() - 1]);
        Self { at, rate }
    }

    /// Returns the share of the peak that its GPUs spent, recomputation included.
    pub(crate) fn hfu(self) -> f64 {
        self.rate * PUBLISHED_SAMPLE.spent() / PUBLISHED_PEAK_FLOPS
    }

    /// Returns the source of a speed with this share, in words.
    pub(crate) fn source(self, question: &Question) -> String {
        let Self { at, rate } = self;
        let percent = 100.0 * self.hfu();
        let elsewhere = if question.hardware.name == "h100-sxm" {
            String::new()
        } else {
            format!("; not measured on {}", question.hardware.label)
        };
        let early = SampleFlops {
            recomputed: PUBLISHED_RECOMPUTED_EARLY,
            ..PUBLISHED_SAMPLE
        };
        let longer = 100.0 * (PUBLISHED_SAMPLE.spent() / early.spent() - 1.0);
        format!(
            "{percent:.1}% of the peak is spent, recomputation included, as by the published run \
             with {rate} samples/s on each of {at} H100 and every block recomputed (11 on one, 9.6 \
             on eight, 9.4 on 32; its network and loader included){elsewhere}: --mfu sets another \
             share. If that run's PyTorch ended each recomputation early, as 2.1 and newer do, the \
             share was smaller and everything takes {longer:.1}% longer"
        )
    }
}

/// Returns the source of a speed that `--mfu` sets, in words.
pub(crate) fn asked_source(mfu: f64) -> String {
    let percent = 100.0 * mfu;
    format!(
        "a single GPU spends {percent:.1}% of its peak (--mfu), recomputation included; the cost \
         of the links is simulated"
    )
}

#[cfg(test)]
mod tests {
    use rectiflow_sdxl::{
        bundle::sdxl_configs,
        config::UNetConfig,
        cost::{Load, parts},
        flops::{FORWARD_AND_BACKWARD, unet},
        model::Component,
    };

    use super::*;

    #[track_caller]
    fn near(found: f64, expected: f64) {
        assert!(
            (found / expected - 1.0).abs() < 1e-3,
            "found {found}, expected {expected}"
        );
    }

    #[test]
    fn the_published_samples_arithmetic_is_that_of_sdxls_blocks() {
        let json = sdxl_configs()
            .remove(&Component::UNet)
            .expect("there is one for every component");
        let config = UNetConfig::from_json(json, "SDXL").expect("it is valid");
        let load = Load {
            batch: 1,
            height: 128,
            width: 128,
            tokens: 77,
            bytes: 2,
            fused: false,
        };
        let blocks: u64 = parts(&config, load).iter().map(|part| part.flops).sum();
        near(PUBLISHED_SAMPLE.recomputed, blocks as f64);
        let of_unet = FORWARD_AND_BACKWARD * unet(&config, [128, 128], 77).total();
        near(PUBLISHED_SAMPLE.required, of_unet as f64 + 0.11e12);
    }

    #[test]
    fn shares_are_those_of_the_published_rates() {
        let hfu = |gpus| Published::at_least(gpus).hfu();
        near(hfu(1), 11.0 * 26.82e12 / 989.4e12);
        near(hfu(2), 9.6 * 26.82e12 / 989.4e12);
        near(hfu(9), 9.4 * 26.82e12 / 989.4e12);
        near(hfu(1000), hfu(32));
    }

    #[test]
    fn a_recomputed_pass_is_one_of_four() {
        let sample = |recomputed| SampleFlops {
            required: 3.0,
            recomputed,
        };
        near(sample(0.0).backward_share(), 2.0 / 3.0);
        near(sample(1.0).backward_share(), 3.0 / 4.0);
        near(sample(0.5).spent(), 3.5);
    }
}
