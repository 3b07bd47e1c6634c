//! `rectiflow train`: a run from its recipe, with a live line on a terminal and plain lines in a log.

use std::{path::PathBuf, sync::atomic::Ordering};

use anyhow::Context;
use rectiflow_train::{
    config::{Checked, Recipe},
    metrics::{Event, Start, StepMetrics},
    run::{Outcome, train},
};
use serde_json::json;

use crate::{
    answer::Answer,
    log,
    numbers::{duration, grouped, short},
    progress::Progress,
    signals::StopSignal,
};

/// Train a model as a recipe says; a run that was interrupted goes on where it was.
///
/// Everything about the run is in the recipe, a TOML file. Ctrl-C finishes the step, saves a checkpoint and exits with
/// 130 (a second Ctrl-C stops at once); the same command resumes.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The recipe, a TOML file.
    recipe: PathBuf,
    /// Override a key of the recipe, e.g. --set train.samples=2000; may be repeated.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let checked = Recipe::load(&args.recipe, &args.overrides)?;
    let stop = StopSignal::listen().context("listening for Ctrl-C")?;
    let mut live = Live::new(&checked);
    let outcome = train(&checked, stop.flag(), &mut |event| {
        live.show(event);
        if stop.flag().load(Ordering::Relaxed) {
            live.say_stopping();
        }
    });
    live.finish();
    let answer = answer(&checked, &outcome?);
    // A signal that comes when the work is done anyway stops nothing.
    match stop.signal() {
        Some(signal) if !answer.1 => Ok(answer.0.stopped_by(signal)),
        _ => Ok(answer.0),
    }
}

/// What to say, and whether the run is finished.
fn answer(checked: &Checked, outcome: &Outcome) -> (Answer, bool) {
    let run_dir = &checked.recipe.run.dir;
    let position = &outcome.position;
    let samples = grouped(position.samples);
    let mut text = if outcome.finished {
        format!("{}: finished after {samples} samples", run_dir.display())
    } else {
        format!("{}: stopped after {samples} samples; run the same command to go on", run_dir.display())
    };
    if let Some(checkpoint) = &outcome.checkpoint {
        text += &format!("\ncheckpoint: {}", checkpoint.display());
    }
    let json = json!({
        "run": run_dir,
        "finished": outcome.finished,
        "step": position.cursor,
        "samples": position.samples,
        "checkpoint": outcome.checkpoint,
    });
    (Answer::done(text, json), outcome.finished)
}

/// Share of the newest loss in the one that is shown.
const LOSS_SHARE: f64 = 0.05;

/// The line that shows where training stands.
struct Live {
    samples: u64,
    bar: Option<Progress>,
    loss: Option<f64>,
    said_stopping: bool,
}

impl Live {
    fn new(checked: &Checked) -> Self {
        Self { samples: checked.recipe.train.samples, bar: None, loss: None, said_stopping: false }
    }

    fn show(&mut self, event: &Event) {
        match event {
            Event::Start(start) => Self::show_start(start),
            Event::Step(step) => self.show_step(step),
            Event::Test(test) => {
                let bins: Vec<String> =
                    test.bins.iter().filter(|bin| bin.count > 0).map(|bin| short(bin.loss, 3)).collect();
                let at = grouped(test.samples);
                let loss = short(test.loss, 4);
                log::line(&format!("test loss {loss} at {at} samples (little noise to much: {})", bins.join(" ")));
            }
            Event::Checkpoint { name, secs, .. } => log::line(&format!("saved {name} in {}", duration(*secs))),
            Event::Preview { name, secs, .. } => log::line(&format!("drew previews/{name} in {}", duration(*secs))),
            Event::End { .. } => {}
        }
    }

    fn show_start(start: &Start) {
        let begins = if start.step == 0 { "training".to_owned() } else { format!("resuming at step {}", start.step) };
        log::line(&format!(
            "{begins}: {} parameters, {} pictures in {} buckets, {} held out, {} threads",
            grouped(start.num_parameters),
            grouped(start.num_train),
            start.buckets.len(),
            grouped(start.num_test),
            start.threads
        ));
        if start.num_test == 0 {
            tracing::warn!("the data has no test split, so no test loss is measured");
        }
    }

    fn show_step(&mut self, step: &StepMetrics) {
        if self.bar.is_none() {
            // What an earlier process did says nothing about this one's speed; nor does its own first step.
            self.bar = Some(Progress::new("train", "samples", step.samples, self.samples));
        }
        if step.loss.is_finite() {
            let loss = self.loss.unwrap_or(step.loss);
            self.loss = Some(loss + LOSS_SHARE * (step.loss - loss));
        }
        let note = format!(
            "step {}, loss {}, gradient {}, lr {}",
            step.step,
            short(self.loss.unwrap_or(f64::NAN), 4),
            short(step.gradient_norm, 3),
            short(step.lr, 3)
        );
        if let Some(bar) = &mut self.bar {
            bar.set(step.samples, &note);
        }
    }

    fn say_stopping(&mut self) {
        if !std::mem::replace(&mut self.said_stopping, true) {
            log::line(
                "stopping: saving a checkpoint (once more stops at once, and loses what came after the last one)",
            );
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }
}
