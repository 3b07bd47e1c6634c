//! Scheduler configurations as diffusers saves them, and the noise schedule with zero terminal SNR,
//! against diffusers (scripts/golden/scheduler_configs.py) and ComfyUI's numbers.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;

use rectiflow_sdxl::{
    config::SchedulerConfig,
    discrete,
    flow::{Objective, ObjectiveSettings, Parameterization},
    schedule::{NoiseLevels, Schedule},
};
use serde::Deserialize;
use tch::Tensor;

#[derive(Deserialize)]
struct Golden {
    files: Vec<SavedFile>,
    zero_terminal_snr: ZeroTerminalSnr,
}

#[derive(Deserialize)]
struct SavedFile {
    class: String,
    predicts: Option<Parameterization>,
    text: String,
}

#[derive(Deserialize)]
struct ZeroTerminalSnr {
    alphas_cumprod: Vec<f64>,
    sigmas: Vec<f64>,
    steps: Vec<usize>,
    shape: Vec<i64>,
    x0: Vec<f32>,
    noise: Vec<f32>,
    noised: Vec<f32>,
    velocity: Vec<f32>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/scheduler_configs.json")).unwrap()
}

#[test]
fn every_file_that_diffusers_saves_is_read_or_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scheduler_config.json");
    let files = golden().files;
    assert!(files.len() > 40);
    assert!(files.iter().any(|file| file.text.contains("-Infinity")));
    for SavedFile {
        class,
        predicts,
        text,
    } in files
    {
        fs::write(&path, &text).unwrap();
        let read = SchedulerConfig::read(&path);
        let Some(predicts) = predicts else {
            let error = read.unwrap_err().to_string();
            assert!(
                error.contains(&class) && error.contains("EDM model"),
                "{error}"
            );
            continue;
        };
        let read = read.unwrap_or_else(|error| panic!("{class}, {predicts}: {error}"));
        assert_eq!(read.parameterization, Some(predicts), "{class}");
        let shift = (predicts == Parameterization::Flow).then_some(3.0);
        // DEIS and others have the keys of flow sigmas without using them for other models.
        assert_eq!(read.flow_shift, shift, "{class}, {predicts}");
    }
}

#[test]
fn zero_terminal_snr_equals_diffusers() {
    let golden = golden().zero_terminal_snr;
    let ours = discrete::zero_terminal_snr();
    let pairs = golden.alphas_cumprod.iter().zip(&golden.sigmas);
    for (step, (alpha_bar, sigma)) in pairs.enumerate().take(999) {
        // diffusers multiplies in fp32: hence 1e-4 where the square root is nearly 0.
        let tolerance = if step < 990 { 1e-4 } else { 1e-2 };
        assert!(
            (ours.alpha_bar(step) / alpha_bar - 1.0).abs() < tolerance,
            "{step}"
        );
        let own_sigma = f64::from(ours.sigmas()[step]);
        assert!(
            (own_sigma / sigma - 1.0).abs() < tolerance,
            "{step}: {own_sigma} {sigma}"
        );
    }
    assert_eq!(
        (ours.alpha_bar(999), golden.alphas_cumprod[999]),
        (0.0, 0.0)
    );
}

#[test]
fn training_on_zero_terminal_snr_equals_diffusers() {
    let golden = golden().zero_terminal_snr;
    let tensor = |values: &[f32]| Tensor::from_slice(values).reshape(&golden.shape);
    let times: Vec<f64> = golden
        .steps
        .iter()
        .map(|&step| (step as f64 + 0.5) / 1000.0)
        .collect();
    for min_snr_gamma in [None, Some(5.0)] {
        let settings = ObjectiveSettings {
            parameterization: Parameterization::VZtsnr,
            min_snr_gamma,
            ..Default::default()
        };
        let noised = Objective::new(settings).unwrap().noised(
            &tensor(&golden.x0),
            &tensor(&golden.noise),
            &times,
        );
        for (ours, theirs) in [
            (&noised.sample, &golden.noised),
            (&noised.target, &golden.velocity),
        ] {
            let difference = (ours - tensor(theirs)).abs().max().double_value(&[]);
            assert!(difference < 2e-4, "{difference}");
        }
        // At the last step the input is the noise and the target is the picture's opposite.
        let last = |tensor: &Tensor| tensor.get(4);
        assert!(last(&noised.sample).equal(&last(&tensor(&golden.noise))));
        assert!(last(&noised.target).equal(&-last(&tensor(&golden.x0))));
        assert!(noised.weights.isfinite().all().int64_value(&[]) == 1);
    }
}

/// ComfyUI's numbers for a checkpoint with `v_pred` and `ztsnr`, 4 steps of `simple`.
#[test]
fn sampling_with_zero_terminal_snr_begins_at_comfyuis_sigmas() {
    let levels = NoiseLevels::new(Parameterization::VZtsnr, 1.0).unwrap();
    let sigmas = Schedule::Simple.sigmas(4, &levels).unwrap();
    for (ours, theirs) in sigmas.iter().zip([4518.7637, 5.3987, 1.7681, 0.7271, 0.0]) {
        assert!((ours - theirs).abs() <= 5e-5 + 1e-7 * theirs, "{sigmas:?}");
    }
    for (name, schedule) in Schedule::ALL {
        let sigmas = schedule.sigmas(20, &levels).unwrap();
        assert!(sigmas.windows(2).all(|pair| pair[0] > pair[1]), "{name}");
    }
}

#[test]
fn a_recipe_for_v_is_refused_where_the_base_has_zero_terminal_snr() {
    for (_, own) in Parameterization::ALL {
        let settings = ObjectiveSettings {
            parameterization: own,
            ..Default::default()
        };
        let objective = Objective::new(settings).unwrap();
        for base in Parameterization::ALL
            .map(|(_, base)| Some(base))
            .into_iter()
            .chain([None])
        {
            let checked = objective.check_base(base);
            let is_mistake = own == Parameterization::V && base == Some(Parameterization::VZtsnr);
            assert_eq!(checked.is_err(), is_mistake, "{own} from {base:?}");
            if let Err(error) = checked {
                assert!(error.to_string().contains("choose v_ztsnr"), "{error}");
            }
        }
    }
}
