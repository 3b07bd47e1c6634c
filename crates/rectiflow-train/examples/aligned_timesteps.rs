//! Compares two choices of timesteps for an eps model that starts to learn flow.
//!
//! ```text
//! cargo run --release --example aligned_timesteps -- RECIPE [KEY=VALUE...]
//! ```
//!
//! Trains twice by the same recipe, on the same samples with the same noise. "native" are
//! rectiflow's own timesteps and inputs, `1000 sigma`; "aligned" are the timesteps of SDXL's
//! schedule with the same signal-to-noise ratio. Prints the test loss of both at every test, in
//! total and by noise level; the targets are equal, so that the losses compare.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program, not a library"
)]

mod throwaway;

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use rectiflow_train::{
    Result,
    metrics::{Event, TestMetrics},
    recipe::Checked,
    run::Options,
};

/// Compares two choices of timesteps for an eps model that starts to learn flow.
#[derive(Debug, Parser)]
struct Arguments {
    /// The recipe of both runs, a TOML file.
    recipe: PathBuf,
    /// Values that replace the recipe's.
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

#[derive(Debug, Clone, Copy)]
enum Timesteps {
    Native,
    Aligned,
}

fn main() -> ExitCode {
    rectiflow_sdxl::waiting::sleep_soon();
    let arguments = Arguments::parse();
    println!("timesteps, step, test loss, by noise level from low to high");
    for (name, timesteps) in [
        ("native", Timesteps::Native),
        ("aligned", Timesteps::Aligned),
    ] {
        match tests(&arguments, name, timesteps) {
            Ok(tests) => {
                for test in &tests {
                    println!("{name}, {}, {}", test.step, losses(test));
                }
            }
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

/// The tests of a run.
fn tests(arguments: &Arguments, name: &str, timesteps: Timesteps) -> Result<Vec<TestMetrics>> {
    let alter = |checked: &mut Checked| {
        if matches!(timesteps, Timesteps::Aligned) {
            checked.objective = checked.objective.clone().aligned();
        }
    };
    let mut tests = Vec::new();
    let mut observe = |event: &Event| {
        if let Event::Test(test) = event {
            tests.push(test.clone());
        }
    };
    let (recipe, overrides) = (&arguments.recipe, &arguments.overrides);
    throwaway::run(
        recipe,
        overrides,
        name,
        alter,
        Options::default(),
        &mut observe,
    )?;
    Ok(tests)
}

/// The total loss and those of the noise levels, with commas between.
fn losses(test: &TestMetrics) -> String {
    let mut numbers = vec![format!("{:.4}", test.loss)];
    numbers.extend(test.bins.iter().map(|bin| format!("{:.3}", bin.loss)));
    numbers.join(", ")
}
