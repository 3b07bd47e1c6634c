//! Tests whether the guard's numbers show that captions belong to the wrong pictures.
//!
//! ```text
//! cargo run --release --example shuffled_captions -- RECIPE FIRST LAST [KEY=VALUE...]
//! ```
//!
//! Trains twice by the same recipe, on the same samples with the same noise: once unchanged, and
//! once with the captions of every micro-batch rotated by one picture in the steps FIRST to LAST
//! (from 1). For every number that the guard sees, or could see, prints the mean difference in
//! these steps, absolute and in units of the number's deviation from step to step in the clean run.
//! That deviation is all a guard has: it does not know the clean run.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program, not a library"
)]

mod throwaway;

use std::{collections::BTreeMap, ops::RangeInclusive, path::PathBuf, process::ExitCode};

use clap::Parser;
use rectiflow_data::batch::{MicroBatch, Step};
use rectiflow_train::{
    Result,
    metrics::{Event, TestMetrics},
    run::Options,
    state::TrainState,
};

/// Tests whether the guard's numbers show that captions belong to the wrong pictures.
#[derive(Debug, Parser)]
struct Arguments {
    /// The recipe of both runs, a TOML file.
    recipe: PathBuf,
    /// First step with the wrong captions, from 1.
    first: u64,
    /// Last step with the wrong captions.
    last: u64,
    /// Values that replace the recipe's.
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

/// The numbers of a run by name and step, and its last test.
#[derive(Default)]
struct Numbers {
    by_name: BTreeMap<String, BTreeMap<u64, f64>>,
    test: Option<TestMetrics>,
}

fn main() -> ExitCode {
    rectiflow_sdxl::waiting::sleep_soon();
    match compare(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn compare(arguments: &Arguments) -> Result<()> {
    let steps = arguments.first..=arguments.last;
    let clean = train(arguments, "clean", &mut |_| {})?;
    let shuffled = train(arguments, "shuffled", &mut |step| {
        if steps.contains(&(step.step + 1)) {
            step.micro_batches.iter_mut().for_each(rotate_captions);
        }
    })?;
    print(&clean, &shuffled, &steps);
    Ok(())
}

/// Each picture gets the caption of the one before it.
fn rotate_captions(batch: &mut MicroBatch) {
    let ids = batch.clip_l.len() / batch.ids.len();
    batch.clip_l.rotate_right(ids);
    batch.clip_g.rotate_right(ids);
    batch.chunks.rotate_right(1);
    batch.prompts.rotate_right(1);
}

/// The numbers of a run whose steps `disturb` changes.
fn train(arguments: &Arguments, name: &str, disturb: &mut dyn FnMut(&mut Step)) -> Result<Numbers> {
    let mut overrides = arguments.overrides.clone();
    overrides.push("guard.vitals_every_updates=1".to_owned());
    let mut numbers = Numbers::default();
    let mut before_step = |step: &mut Step, _: &mut TrainState| disturb(step);
    let options = Options {
        before_step: Some(&mut before_step),
        ..Options::default()
    };
    let mut observe = |event: &Event| numbers.take(event);
    throwaway::run(
        &arguments.recipe,
        &overrides,
        name,
        |_| {},
        options,
        &mut observe,
    )?;
    Ok(numbers)
}

impl Numbers {
    fn take(&mut self, event: &Event) {
        match event {
            Event::Step(step) => {
                self.add(step.step, "loss", step.loss);
                self.add(step.step, "gradient norm", step.gradient_norm);
            }
            Event::Vitals(vitals) => {
                for module in &vitals.modules {
                    let name = &module.module;
                    let (moment, update) = (module.moment_ratio, module.update_ratio);
                    self.add(vitals.step, &format!("moment ratio of {name}"), moment);
                    self.add(vitals.step, &format!("update ratio of {name}"), update);
                }
                for bin in vitals.training.bins.iter().filter(|bin| bin.count > 0) {
                    let name = format!("loss at times {:.1} to {:.1}", bin.from, bin.to);
                    self.add(vitals.step, &name, bin.loss);
                }
            }
            Event::Test(test) => self.test = Some(test.clone()),
            _ => {}
        }
    }

    fn add(&mut self, step: u64, name: &str, value: f64) {
        self.by_name
            .entry(name.to_owned())
            .or_default()
            .insert(step, value);
    }
}

fn print(clean: &Numbers, shuffled: &Numbers, steps: &RangeInclusive<u64>) {
    println!(
        "number, clean mean, mean difference, deviation from step to step, \
         difference in deviations"
    );
    for (name, values) in &clean.by_name {
        let Some(others) = shuffled.by_name.get(name) else {
            continue;
        };
        // The steps that both runs have a value for.
        let mut own = Vec::new();
        let mut differences = Vec::new();
        for (step, value) in values.range(steps.clone()) {
            if let Some(other) = others.get(step) {
                own.push(*value);
                differences.push(other - value);
            }
        }
        let (mean, difference) = (mean_of(&own), mean_of(&differences));
        let deviation = deviation(&own, mean);
        let in_deviations = difference / deviation;
        println!("{name}, {mean:.4}, {difference:+.5}, {deviation:.4}, {in_deviations:+.2}");
    }
    if let (Some(clean), Some(shuffled)) = (&clean.test, &shuffled.test) {
        let difference = shuffled.loss - clean.loss;
        println!("test loss at the end, {:.4}, {difference:+.5}", clean.loss);
    }
}

fn mean_of(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The standard deviation of `values` around their mean.
fn deviation(values: &[f64], mean: f64) -> f64 {
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / values.len() as f64).sqrt()
}
