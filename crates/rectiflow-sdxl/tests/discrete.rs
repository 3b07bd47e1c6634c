//! The eps and v objectives against diffusers' `DDPMScheduler` (scripts/golden/discrete.py).

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use rectiflow_sdxl::{
    discrete,
    flow::{Objective, ObjectiveSettings, Parameterization},
};
use serde::Deserialize;
use tch::Tensor;

#[derive(Deserialize)]
struct Golden {
    alphas_cumprod: Vec<f64>,
    steps: Vec<usize>,
    shape: Vec<i64>,
    x0: Vec<f32>,
    noise: Vec<f32>,
    noised: Vec<f32>,
    velocity: Vec<f32>,
    min_snr_5_eps: Vec<f32>,
    min_snr_5_v: Vec<f32>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/discrete.json")).unwrap()
}

fn assert_close(what: &str, ours: &Tensor, theirs: &[f32]) {
    let ours: Vec<f32> = ours.flatten(0, -1).try_into().unwrap();
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert!(
            (ours - theirs).abs() <= 2e-6 + 1e-5 * theirs.abs(),
            "{what}: {ours} and {theirs}"
        );
    }
}

#[test]
fn alpha_bars_equal_diffusers() {
    // diffusers multiplies a thousand numbers in fp32, this crate in fp64: hence 1e-5.
    for (step, theirs) in golden().alphas_cumprod.iter().enumerate() {
        assert!(
            (discrete::sdxl().alpha_bar(step) / theirs - 1.0).abs() < 1e-5,
            "step {step}"
        );
    }
}

#[test]
fn noising_targets_and_weights_equal_diffusers() {
    let golden = golden();
    let tensor = |values: &[f32]| Tensor::from_slice(values).reshape(&golden.shape);
    let (x0, noise) = (tensor(&golden.x0), tensor(&golden.noise));
    let times: Vec<f64> = golden
        .steps
        .iter()
        .map(|&step| (step as f64 + 0.5) / 1000.0)
        .collect();
    for parameterization in [Parameterization::Eps, Parameterization::V] {
        let settings = |min_snr_gamma| ObjectiveSettings {
            parameterization,
            min_snr_gamma,
            ..Default::default()
        };
        let noised = Objective::new(settings(Some(5.0)))
            .unwrap()
            .noised(&x0, &noise, &times);
        assert_close("x", &noised.sample, &golden.noised);
        assert_eq!(
            Vec::<f32>::try_from(&noised.timestep).unwrap(),
            [0.0, 1.0, 499.0, 998.0, 999.0]
        );
        let (target, weights) = match parameterization {
            Parameterization::Eps => (&golden.noise, &golden.min_snr_5_eps),
            _ => (&golden.velocity, &golden.min_snr_5_v),
        };
        assert_close("target", &noised.target, target);
        assert_close("weights", &noised.weights, weights);
        let plain = Objective::new(settings(None))
            .unwrap()
            .noised(&x0, &noise, &times);
        assert_close("weights without min-SNR", &plain.weights, &[1.0; 5]);
    }
}
