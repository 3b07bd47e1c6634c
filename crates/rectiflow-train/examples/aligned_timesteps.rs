//! Which timesteps should an eps model be given when it begins to learn flow: `1000 sigma`, or those at which it knows that much
//! noise?
//!
//! ```text
//! cargo run --release --example aligned_timesteps -- RECIPE [KEY=VALUE...]
//! ```
//!
//! Trains twice from the same recipe, on the same samples with the same noise: with the timesteps and inputs that rectiflow
//! uses, and with those of SDXL's schedule that have the same signal-to-noise ratio. Prints the test loss of both, which is
//! of the same targets and can be compared, in all and by noise level, at every test.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program, not a library")]

mod throwaway;

use std::{env, path::Path, process::ExitCode};

use rectiflow_train::{
    Result,
    metrics::{Event, TestMetrics},
    recipe::Checked,
    run::Options,
};

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let Some((recipe, overrides)) = arguments.split_first() else {
        eprintln!("usage: aligned_timesteps RECIPE [KEY=VALUE...]");
        return ExitCode::from(2);
    };
    println!("timesteps, step, test loss, by noise level from little to much");
    for name in ["native", "aligned"] {
        match tests(Path::new(recipe), overrides, name) {
            Ok(tests) => tests.iter().for_each(|test| println!("{name}, {}, {}", test.step, losses(test))),
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

/// The tests of a run.
fn tests(recipe: &Path, overrides: &[String], name: &str) -> Result<Vec<TestMetrics>> {
    let alter = |checked: &mut Checked| {
        if name == "aligned" {
            checked.objective = checked.objective.clone().aligned();
        }
    };
    let mut tests = Vec::new();
    throwaway::run(recipe, overrides, name, alter, Options::default(), &mut |event| {
        if let Event::Test(test) = event {
            tests.push(test.clone());
        }
    })?;
    Ok(tests)
}

fn losses(test: &TestMetrics) -> String {
    let bins = test.bins.iter().map(|bin| format!("{:.3}", bin.loss));
    [format!("{:.4}", test.loss)].into_iter().chain(bins).collect::<Vec<_>>().join(", ")
}
