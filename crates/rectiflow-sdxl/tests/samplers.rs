//! The samplers against ComfyUI's numbers (scripts/golden/samplers.py) and on Gaussian data, whose
//! denoiser is exact.
//!
//! For Gaussian data the exact results are known: the end of the deterministic path, and the mean
//! and standard deviation that every stochastic sampler must reproduce. So the order of each method
//! is measured.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and print what it measured"
)]

use std::collections::BTreeMap;

use rectiflow_sdxl::{
    brownian::BrownianPath,
    denoise::{denoised_by, noised_start, signal},
    error::Result,
    flow::Parameterization,
    guidance::rescaled,
    sampler::{Course, Sampler},
    schedule::{NoiseLevels, Schedule},
    stochastic::{self, Stochastic},
    unipc,
};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

const BOTH: [Parameterization; 2] = [Parameterization::Flow, Parameterization::Eps];
/// The deterministic samplers.
const STEADY: [Sampler; 5] = [
    Sampler::Euler,
    Sampler::Ddim,
    Sampler::Heun,
    Sampler::DpmPp2m,
    Sampler::UniPc,
];
const STOCHASTIC: [Sampler; 2] = [Sampler::EulerAncestral, Sampler::DpmPp2mSde];

#[derive(Deserialize)]
struct Golden {
    samplers: Vec<Case>,
    eps_form_on_flow: BTreeMap<Sampler, f64>,
    rescale_cfg: Vec<RescaleCase>,
    brownian: Vec<BrownianCase>,
}

#[derive(Deserialize)]
struct RescaleCase {
    sigma: f64,
    cfg: f64,
    share: f64,
    x: Vec<f64>,
    cond: Vec<f64>,
    uncond: Vec<f64>,
    denoised: Vec<f64>,
}

#[derive(Deserialize)]
struct Case {
    sampler: Sampler,
    parameterization: Parameterization,
    sigmas: Vec<f64>,
    x: Vec<f64>,
    noises: Vec<Vec<f64>>,
    end: Vec<f64>,
}

#[derive(Deserialize)]
struct BrownianCase {
    seed: String,
    shape: Vec<i64>,
    sigmas: Vec<f64>,
    noises: Vec<Vec<f32>>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/samplers.json")).unwrap()
}

fn largest(difference: &Tensor) -> f64 {
    difference.abs().max().double_value(&[])
}

/// The closed form of scripts/golden/samplers.py: nonlinear, and not the denoiser of any data.
fn golden_denoise(x: &Tensor, sigma: f64) -> Result<Tensor> {
    Ok((x * (1.3 / (sigma * sigma + 0.3))).tanh() * 0.8 + x * (0.1 / (1.0 + sigma)))
}

/// Runs a sampler over `sigmas`; stochastic samplers use `noises` in order.
fn run(
    sampler: Sampler,
    parameterization: Parameterization,
    x: &Tensor,
    sigmas: &[f64],
    denoise: &mut dyn FnMut(&Tensor, f64) -> Result<Tensor>,
    noises: &[Tensor],
) -> Tensor {
    let levels = NoiseLevels::new(parameterization, 3.0).unwrap();
    let mut queue = noises.iter();
    let mut noise = |_: f64, _: f64| queue.next().expect("enough noise").shallow_clone();
    let mut stochastic = Stochastic {
        parameterization,
        eta: 1.0,
        noise: &mut noise,
    };
    let (x, watch) = (
        x.shallow_clone(),
        &mut |_: rectiflow_sdxl::sample::Progress<'_>| (),
    );
    match sampler {
        Sampler::EulerAncestral => {
            stochastic::euler_ancestral(denoise, x, sigmas, &mut stochastic, watch)
        }
        Sampler::DpmPp2mSde => stochastic::dpmpp_2m_sde(
            denoise,
            x,
            &levels.below_the_top(sigmas),
            &mut stochastic,
            watch,
        ),
        _ => sampler.run(
            denoise,
            x,
            Course {
                sigmas,
                parameterization,
                levels: &levels,
                seed: 0,
            },
            watch,
        ),
    }
    .unwrap()
}

#[test]
fn every_sampler_ends_where_comfyui_does() {
    let golden = golden();
    assert_eq!(golden.samplers.len(), 12);
    for case in golden.samplers {
        let tensor = |values: &[f64]| Tensor::from_slice(values).view([2, 1, 2, 2]);
        let noises: Vec<_> = case.noises.iter().map(|noise| tensor(noise)).collect();
        let end = run(
            case.sampler,
            case.parameterization,
            &tensor(&case.x),
            &case.sigmas,
            &mut golden_denoise,
            &noises,
        );
        let difference = largest(&(end - tensor(&case.end)));
        // The first level of a flow model is rounded to fp32 in dpmpp_2m_sde; nothing else is
        // rounded.
        let tolerance = if case.sampler == Sampler::DpmPp2mSde {
            1e-6
        } else {
            1e-10
        };
        assert!(
            difference < tolerance,
            "{} {}: {difference:e}",
            case.parameterization,
            case.sampler
        );
    }
}

#[test]
fn rescaled_guidance_is_comfyuis() {
    for case in golden().rescale_cfg {
        let tensor = |values: &[f64]| Tensor::from_slice(values).view([2, 4, 3, 2]);
        let (cond, uncond) = (tensor(&case.cond), tensor(&case.uncond));
        let guided = &uncond + (&cond - &uncond) * case.cfg;
        let ours = rescaled(&tensor(&case.x), case.sigma, &cond, &guided, case.share);
        assert!(
            largest(&(&ours - tensor(&case.denoised))) < 1e-10,
            "sigma {}",
            case.sigma
        );
        assert!(
            largest(&(ours - guided)) > 0.1,
            "rescaling must change the result"
        );
    }
}

#[test]
fn brownian_noise_is_torchsdes() {
    for case in golden().brownian {
        let last = case.sigmas.len() - 1;
        let path = BrownianPath::new(
            case.seed.parse().unwrap(),
            &case.shape,
            [case.sigmas[last], case.sigmas[0]],
        );
        for (pair, theirs) in case.sigmas.windows(2).zip(&case.noises) {
            let ours = path.noise(pair[0], pair[1]).flatten(0, -1);
            let difference = largest(&(ours - Tensor::from_slice(theirs)));
            // Both are sums of a dozen fp32 numbers.
            assert!(
                difference < 2e-6,
                "seed {} from {} to {}: {difference:e}",
                case.seed,
                pair[0],
                pair[1]
            );
        }
    }
}

/// Mean and standard deviation of the Gaussian data.
const MEAN: f64 = 0.7;
const DEVIATION: f64 = 0.4;

/// Returns the standard deviation of latents at a level.
fn spread(parameterization: Parameterization, sigma: f64) -> f64 {
    (signal(parameterization, sigma) * DEVIATION).hypot(sigma)
}

/// Returns the exact denoiser of the data.
fn gaussian(parameterization: Parameterization) -> impl FnMut(&Tensor, f64) -> Result<Tensor> {
    move |x, sigma| {
        let signal = signal(parameterization, sigma);
        let share = signal * (DEVIATION / spread(parameterization, sigma)).powi(2);
        Ok((x - MEAN * signal) * share + MEAN)
    }
}

/// Returns the exact solution at the level `to` of the path through `x` at the level `from`.
fn exact(parameterization: Parameterization, x: &Tensor, from: f64, to: f64) -> Tensor {
    let scale = spread(parameterization, to) / spread(parameterization, from);
    (x - MEAN * signal(parameterization, from)) * scale + MEAN * signal(parameterization, to)
}

fn noise() -> Tensor {
    Tensor::from_slice(&[-1.7, -0.6, 0.1, 0.9, 2.2]).view([5, 1, 1, 1])
}

/// Returns levels between two inner ones, equally spaced in the logarithm, so that the error shows
/// the order.
fn smooth(parameterization: Parameterization, steps: usize) -> Vec<f64> {
    let (from, to): (f64, f64) = if parameterization == Parameterization::Flow {
        (0.95, 0.05)
    } else {
        (10.0, 0.1)
    };
    (0..=steps)
        .map(|i| from * (to / from).powf(i as f64 / steps as f64))
        .collect()
}

/// Returns the error of a sampler over [`smooth`] levels.
fn error(sampler: Sampler, parameterization: Parameterization, steps: usize) -> f64 {
    let sigmas = smooth(parameterization, steps);
    let x =
        noise() * spread(parameterization, sigmas[0]) + MEAN * signal(parameterization, sigmas[0]);
    let mut end = run(
        sampler,
        parameterization,
        &x,
        &sigmas,
        &mut gaussian(parameterization),
        &[],
    );
    if sampler == Sampler::UniPc && parameterization == Parameterization::Flow {
        end *= 1.0 - unipc::LAST_SIGMA; // undoes the scaling for a final sigma of 0
    }
    largest(&(end - exact(parameterization, &x, sigmas[0], sigmas[steps])))
}

#[test]
fn each_method_has_its_order() {
    for parameterization in BOTH {
        for sampler in STEADY {
            let errors = [32, 64, 128, 256].map(|steps| error(sampler, parameterization, steps));
            let orders: Vec<f64> = errors
                .windows(2)
                .map(|pair| (pair[0] / pair[1]).log2())
                .collect();
            println!("{parameterization} {sampler}: errors {errors:?}, orders {orders:.2?}");
            let expected = match sampler {
                Sampler::Euler | Sampler::Ddim => 0.9..1.1,
                _ => 1.85..2.15,
            };
            let order = orders.last().unwrap();
            assert!(
                expected.contains(order),
                "{parameterization} {sampler}: {orders:?} from {errors:?}"
            );
        }
    }
}

/// Returns the exact mean and standard deviation of a stochastic sampler's results from pure noise.
/// On Gaussian data every operation is linear, so each noise is followed separately: row 0 has
/// none, row 1 the initial noise, each further row the noise of one step.
fn drawn(
    sampler: Sampler,
    model: Parameterization,
    form: Parameterization,
    sigmas: &[f64],
) -> (f64, f64) {
    let rows = sigmas.len() as i64 + 1;
    let unit = |row: i64| {
        Tensor::eye(rows, (Kind::Double, Device::Cpu))
            .narrow(1, row, 1)
            .view([rows, 1, 1, 1])
    };
    let noises: Vec<Tensor> = (2..rows).map(unit).collect();
    let start = unit(1) * spread(model, sigmas[0]) + MEAN * signal(model, sigmas[0]);
    let end = run(sampler, form, &start, sigmas, &mut gaussian(model), &noises);
    let mean = end.double_value(&[0, 0, 0, 0]);
    let deviation = (end.narrow(0, 1, rows - 1) - mean)
        .square()
        .sum(Kind::Double)
        .double_value(&[])
        .sqrt();
    (mean, deviation)
}

#[test]
fn stochastic_samplers_draw_the_data_with_their_order() {
    for parameterization in BOTH {
        for sampler in STOCHASTIC {
            let errors = [50, 100, 200, 400].map(|steps| {
                let sigmas = smooth(parameterization, steps);
                let (mean, deviation) = drawn(sampler, parameterization, parameterization, &sigmas);
                let signal = signal(parameterization, sigmas[steps]);
                (mean - MEAN * signal).abs()
                    + (deviation - spread(parameterization, sigmas[steps])).abs()
            });
            let orders: Vec<f64> = errors
                .windows(2)
                .map(|pair| (pair[0] / pair[1]).log2())
                .collect();
            println!("{parameterization} {sampler}: errors {errors:?}, orders {orders:.2?}");
            let expected = if sampler == Sampler::EulerAncestral {
                0.8..1.2
            } else {
                1.6..2.4
            };
            assert!(
                expected.contains(&orders[2]),
                "{parameterization} {sampler}: {orders:?} from {errors:?}"
            );
        }
    }
}

/// Why stochastic samplers fail on flow models in tools with the eps form only: more steps do not
/// help.
#[test]
fn the_eps_form_of_a_stochastic_sampler_never_gets_to_a_flow_models_data() {
    let uniform =
        |steps: usize| -> Vec<f64> { (0..=steps).map(|i| 1.0 - i as f64 / steps as f64).collect() };
    for (sampler, theirs) in golden().eps_form_on_flow {
        let with = |form, steps| drawn(sampler, Parameterization::Flow, form, &uniform(steps));
        let (_, deviation) = with(Parameterization::Eps, 64);
        assert!(
            (deviation - theirs).abs() < 1e-9,
            "{sampler}: {deviation}, k-diffusion {theirs}"
        );
        let (mean, deviation) = with(Parameterization::Eps, 400);
        assert!(
            mean - MEAN > 0.4 && deviation - DEVIATION > 0.1,
            "{sampler}: {mean} and {deviation}"
        );
        let (mean, deviation) = with(Parameterization::Flow, 400);
        assert!(
            (mean - MEAN).abs() < 1e-3 && (deviation - DEVIATION).abs() < 0.01,
            "{sampler}: {mean}, {deviation}"
        );
    }
}

/// Returns the error at sigma 0, from pure noise, under a schedule.
fn whole_error(
    sampler: Sampler,
    parameterization: Parameterization,
    schedule: Schedule,
    steps: usize,
) -> f64 {
    let levels = NoiseLevels::new(parameterization, 6.0).unwrap();
    let sigmas = sampler.sigmas(schedule, steps, &levels).unwrap();
    let x = noised_start(parameterization, &noise(), sigmas[0], levels.sigma_max());
    let end = run(
        sampler,
        parameterization,
        &x,
        &sigmas,
        &mut gaussian(parameterization),
        &[],
    );
    largest(&(end - exact(parameterization, &x, sigmas[0], 0.0)))
}

#[test]
fn steady_samplers_come_to_the_data_from_pure_noise() {
    for parameterization in BOTH {
        for sampler in STEADY {
            for (name, schedule) in Schedule::ALL {
                let error = |steps| whole_error(sampler, parameterization, schedule, steps);
                let (coarse, fine) = (error(10), error(200));
                assert!(
                    fine < 0.04 && fine < coarse,
                    "{parameterization} {sampler} {name}: {coarse} then {fine}"
                );
            }
        }
    }
}

/// Why `normal` and `ddim_uniform` degrade DPM++ 2M even on a perfect flow model: their last step
/// above 0 is many times longer, in ln sigma, than the one before, and the last two predictions are
/// extrapolated over that length.
#[test]
fn dpmpp_2m_overshoots_where_a_schedule_ends_in_one_long_step() {
    let compared = |schedule| {
        let error = |sampler| whole_error(sampler, Parameterization::Flow, schedule, 28);
        error(Sampler::DpmPp2m) / error(Sampler::Euler)
    };
    for schedule in [
        Schedule::Simple,
        Schedule::SgmUniform,
        Schedule::Beta,
        Schedule::Karras,
    ] {
        assert!(
            compared(schedule) < 0.75,
            "{schedule}: {}",
            compared(schedule)
        );
    }
    for schedule in [Schedule::Normal, Schedule::DdimUniform] {
        assert!(
            compared(schedule) > 1.2,
            "{schedule}: {}",
            compared(schedule)
        );
    }
}

/// Returns the gain of a flow model's errors: the standard deviation of the result if each
/// predicted velocity has an independent error of standard deviation 1. On Gaussian data errors
/// propagate linearly: row `i` follows the error of prediction `i`.
fn error_gain(sampler: Sampler, schedule: Schedule, steps: usize) -> f64 {
    let flow = Parameterization::Flow;
    let levels = NoiseLevels::new(flow, 6.0).unwrap();
    let sigmas = sampler.sigmas(schedule, steps, &levels).unwrap();
    let rows = 2 * sigmas.len() as i64; // at most two predictions per step
    let errors = Tensor::eye(rows, (Kind::Double, Device::Cpu));
    let (mut exact, mut answer) = (gaussian(flow), 0);
    let mut denoise = |x: &Tensor, sigma: f64| {
        let off = errors.narrow(1, answer, 1).view([rows, 1, 1, 1]);
        answer += 1;
        Ok(exact(x, sigma)? - off * sigma)
    };
    let start = Tensor::full([rows, 1, 1, 1], 0.3, (Kind::Double, Device::Cpu));
    let end = run(sampler, flow, &start, &sigmas, &mut denoise, &[]);
    let without = run(sampler, flow, &start, &sigmas, &mut gaussian(flow), &[]);
    (end - without)
        .square()
        .sum(Kind::Double)
        .double_value(&[])
        .sqrt()
}

/// The second reason: the same long step amplifies a model's errors, since it extrapolates from two
/// wrong predictions.
#[test]
fn a_models_errors_are_multiplied_where_a_schedule_ends_in_one_long_step() {
    let to_euler = |sampler, schedule| {
        error_gain(sampler, schedule, 28) / error_gain(Sampler::Euler, schedule, 28)
    };
    for sampler in [Sampler::Heun, Sampler::DpmPp2m, Sampler::UniPc] {
        assert!(
            to_euler(sampler, Schedule::Simple) < 1.45,
            "{sampler}: {}",
            to_euler(sampler, Schedule::Simple)
        );
    }
    for schedule in [Schedule::Normal, Schedule::DdimUniform] {
        let gain = to_euler(Sampler::DpmPp2m, schedule);
        assert!(gain > 2.0, "{schedule}: {gain}");
        assert!(
            to_euler(Sampler::Heun, schedule) < 1.0,
            "{schedule}: Heun's method evaluates both ends of each step"
        );
    }
}

/// The tables of docs/samplers.md:
/// `cargo test --release -p rectiflow-sdxl --test samplers -- --ignored --nocapture`.
#[test]
#[ignore = "prints tables, and tests nothing"]
fn print_the_tables_of_the_documentation() {
    for (title, steps) in [
        ("10 steps", 10),
        ("28 steps", 28),
        ("gain of errors, 28 steps", 0),
    ] {
        let names = Schedule::ALL.map(|(name, _)| name).join(" | ");
        println!(
            "\n| {title} | {names} |\n|---{}|",
            "|---".repeat(Schedule::ALL.len())
        );
        for sampler in STEADY
            .into_iter()
            .filter(|&sampler| sampler != Sampler::Ddim)
        {
            let cell = |schedule| match steps {
                0 => format!("{:.2}", error_gain(sampler, schedule, 28)),
                steps => format!(
                    "{:.3}",
                    whole_error(sampler, Parameterization::Flow, schedule, steps)
                ),
            };
            let cells = Schedule::ALL
                .map(|(_, schedule)| cell(schedule))
                .join(" | ");
            println!("| `{sampler}` | {cells} |");
        }
    }
    let uniform =
        |steps: usize| -> Vec<f64> { (0..=steps).map(|i| 1.0 - i as f64 / steps as f64).collect() };
    for sampler in STOCHASTIC {
        for steps in [28, 64, 256] {
            for form in BOTH {
                let (mean, deviation) =
                    drawn(sampler, Parameterization::Flow, form, &uniform(steps));
                println!(
                    "{sampler}, {steps} steps, {form} form: mean {mean:.3}, \
                     deviation {deviation:.3}"
                );
            }
        }
    }
}

/// A perfect model of the Gaussian data, which predicts in the given parameterization.
fn gaussian_model(parameterization: Parameterization, input: &Tensor, timestep: &Tensor) -> Tensor {
    let time = timestep.double_value(&[0]);
    let (signal, noise) = match parameterization {
        Parameterization::Flow => (1.0 - time / 1000.0, time / 1000.0),
        _ => {
            let alpha_bar = parameterization.steps().alpha_bar(time as usize);
            (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt())
        }
    };
    let centred = input - signal * MEAN;
    let variance = (signal * DEVIATION).powi(2) + noise * noise;
    let x0 = &centred * (signal * DEVIATION * DEVIATION / variance) + MEAN;
    let eps = centred * (noise / variance);
    match parameterization {
        Parameterization::Flow => eps - x0,
        Parameterization::Eps => eps,
        Parameterization::V | Parameterization::VZtsnr => signal * eps - noise * x0,
    }
}

/// The conversion of each parameterization's prediction to the data.
#[test]
fn models_of_every_parameterization_draw_the_data() {
    for (_, parameterization) in Parameterization::ALL {
        let levels = NoiseLevels::new(parameterization, 1.0).unwrap();
        let error = |steps| {
            let sigmas = Schedule::Normal.sigmas(steps, &levels).unwrap();
            let start = noised_start(parameterization, &noise(), sigmas[0], levels.sigma_max());
            let mut denoise = |x: &Tensor, sigma: f64| {
                let mut model =
                    |input: &Tensor, t: &Tensor| Ok(gaussian_model(parameterization, input, t));
                denoised_by(parameterization, x, sigma, &mut model)
            };
            let end = run(
                Sampler::Euler,
                parameterization,
                &start,
                &sigmas,
                &mut denoise,
                &[],
            );
            largest(&(end - exact(parameterization, &start, sigmas[0], 0.0)))
        };
        // Each of the 1000 levels is a training timestep, so no timestep is rounded at 1000 steps.
        let (coarse, fine) = (error(100), error(1000));
        assert!(
            fine < 6e-3 && fine < coarse / 5.0,
            "{parameterization}: {coarse} then {fine}"
        );
    }
}
