//! Can the guard's numbers see that captions have been given to the wrong pictures?
//!
//! ```text
//! cargo run --release --example shuffled_captions -- RECIPE FIRST LAST [KEY=VALUE...]
//! ```
//!
//! Trains twice from the same recipe, on the same samples with the same noise: once as it is, and once with the captions of
//! every micro-batch moved on by one picture in the steps FIRST to LAST (from 1). Prints how every number that the guard
//! sees, or could see, differs in that stretch: the mean difference of pairs of steps, and that in units of what the number
//! varies by from step to step in the clean run, which is all that somebody has who does not know the clean run.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program, not a library")]

mod throwaway;

use std::{collections::BTreeMap, env, path::Path, process::ExitCode};

use rectiflow_data::batch::{MicroBatch, Step};
use rectiflow_train::{
    Result,
    metrics::{Event, TestMetrics},
    run::Options,
    state::TrainState,
};

/// What a run showed: by name, one number a step; and its last test.
struct Shown {
    numbers: BTreeMap<String, BTreeMap<u64, f64>>,
    test: Option<TestMetrics>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [recipe, first, last, overrides @ ..] = &arguments[..] else { return usage() };
    let (Ok(first), Ok(last)) = (first.parse::<u64>(), last.parse::<u64>()) else { return usage() };
    let run = |name: &str, disturb: &mut dyn FnMut(&mut Step)| show(Path::new(recipe), overrides, name, disturb);
    let shuffle = &mut |step: &mut Step| {
        if (first..=last).contains(&(step.step + 1)) {
            step.micro_batches.iter_mut().for_each(move_captions_on);
        }
    };
    match run("clean", &mut |_| {}).and_then(|clean| Ok((clean, run("shuffled", shuffle)?))) {
        Ok((clean, shuffled)) => {
            print(&clean, &shuffled, first..=last);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: shuffled_captions RECIPE FIRST LAST [KEY=VALUE...]");
    ExitCode::from(2)
}

/// Each picture gets the caption of the one before it.
fn move_captions_on(batch: &mut MicroBatch) {
    let ids = batch.clip_l.len() / batch.ids.len();
    batch.clip_l.rotate_right(ids);
    batch.clip_g.rotate_right(ids);
    batch.chunks.rotate_right(1);
    batch.prompts.rotate_right(1);
}

fn show(recipe: &Path, overrides: &[String], name: &str, disturb: &mut dyn FnMut(&mut Step)) -> Result<Shown> {
    let overrides = [overrides, &["guard.vitals_every_updates=1".to_owned()]].concat();
    let mut shown = Shown { numbers: BTreeMap::new(), test: None };
    let mut before_step = |step: &mut Step, _: &mut TrainState| disturb(step);
    let options = Options { before_step: Some(&mut before_step), ..Options::default() };
    throwaway::run(recipe, &overrides, name, |_| {}, options, &mut |event| shown.take(event))?;
    Ok(shown)
}

impl Shown {
    fn take(&mut self, event: &Event) {
        match event {
            Event::Step(step) => {
                self.add(step.step, "loss".to_owned(), step.loss);
                self.add(step.step, "gradient norm".to_owned(), step.gradient_norm);
            }
            Event::Vitals(vitals) => {
                for module in &vitals.modules {
                    self.add(vitals.step, format!("moment ratio of {}", module.module), module.moment_ratio);
                    self.add(vitals.step, format!("update ratio of {}", module.module), module.update_ratio);
                }
                for bin in vitals.training.bins.iter().filter(|bin| bin.count > 0) {
                    self.add(vitals.step, format!("loss at times {:.1} to {:.1}", bin.from, bin.to), bin.loss);
                }
            }
            Event::Test(test) => self.test = Some(test.clone()),
            _ => {}
        }
    }

    fn add(&mut self, step: u64, name: String, value: f64) {
        self.numbers.entry(name).or_default().insert(step, value);
    }
}

fn print(clean: &Shown, shuffled: &Shown, stretch: std::ops::RangeInclusive<u64>) {
    println!("number, clean mean, mean difference, deviation from step to step, difference in deviations");
    for (name, values) in &clean.numbers {
        let Some(others) = shuffled.numbers.get(name) else { continue };
        let pairs: Vec<(f64, f64)> =
            values.range(stretch.clone()).filter_map(|(step, value)| Some((*value, *others.get(step)?))).collect();
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / pairs.len() as f64;
        let own = mean(&mut pairs.iter().map(|(value, _)| *value));
        let difference = mean(&mut pairs.iter().map(|(value, other)| other - value));
        let deviation = mean(&mut pairs.iter().map(|(value, _)| (value - own).powi(2))).sqrt();
        println!("{name}, {own:.4}, {difference:+.5}, {deviation:.4}, {:+.2}", difference / deviation);
    }
    if let (Some(clean), Some(shuffled)) = (&clean.test, &shuffled.test) {
        println!("test loss at the end, {:.4}, {:+.5}", clean.loss, shuffled.loss - clean.loss);
    }
}
