//! `rectiflow train`: a run from its recipe, with a live line on a terminal and plain lines in a
//! log.

use std::{
    env,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use anyhow::Context;
use rectiflow_train::{
    Error,
    launch::Launch,
    recipe::{Checked, Recipe},
    run::{Options, Outcome, train},
};
use serde_json::json;
use signal_hook::consts::SIGTERM;

use crate::{
    local_ranks,
    terminal::{
        answer::{Answer, Misuse},
        base::BaseArg,
        numbers::grouped,
        signals::StopSignal,
    },
    train_line::Live,
};

/// Train a model from a recipe. An interrupted run resumes.
///
/// The recipe, a TOML file, holds everything about the run. Ctrl-C finishes the step, saves a
/// checkpoint and exits with 130; SIGTERM does the same and exits with 143. Another Ctrl-C stops at
/// once. The same command resumes. A run that the guard has stopped exits with 3, and keeps
/// doing so until the stop is acknowledged.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The recipe, a TOML file.
    recipe: PathBuf,
    /// Override a key of the recipe, e.g. --set train.samples=2000. Repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
    /// Start a new run from this checkpoint. Weights and the sample count carry over; everything
    /// else comes from the recipe.
    #[arg(long, value_name = "CHECKPOINT")]
    branch_from: Option<PathBuf>,
    #[command(flatten)]
    base: BaseArg,
    /// Continue a run that the guard has stopped.
    #[arg(long)]
    acknowledge_stop: bool,
    /// Resume a run that was made longer although its learning rate jumps to more than 1.5 times
    /// what it was.
    #[arg(long)]
    accept_rate_jump: bool,
    /// Start N ranks on this machine. For several machines use a launcher such as torchrun with
    /// `--no-python`.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    ranks: Option<u16>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let checked = Recipe::load(&args.recipe, &args.overrides)?;
    let stop = StopSignal::listen().context("listening for Ctrl-C")?;
    let is_local_rank = env::var_os(local_ranks::STARTED).is_some();
    let launch = Launch::from_environment(|name| env::var(name).ok())?;
    match args.ranks.map(usize::from).filter(|_| !is_local_rank) {
        Some(ranks) if launch.is_some() => {
            let reason = format!(
                "--ranks {ranks}: a launcher has set RANK and WORLD_SIZE already; leave one of both out"
            );
            return Err(Misuse(reason).into());
        }
        Some(ranks) if ranks > 1 => return local_ranks::run(ranks, &checked, &stop),
        _ => {}
    }
    if is_local_rank {
        stop.listen_for_end_of_input();
    }
    train_as(args, &checked, &stop, launch)
}

/// Trains as the only process, or as one of several.
fn train_as(
    args: &Args,
    checked: &Checked,
    stop: &StopSignal,
    launch: Option<Launch>,
) -> anyhow::Result<Answer> {
    let is_first = launch.as_ref().is_none_or(|launch| launch.rank.rank == 0);
    let mut live = is_first.then(|| Live::new(checked));
    let options = Options {
        branch_from: args.branch_from.clone(),
        base: args.base.path().map(Path::to_owned),
        acknowledge_stop: args.acknowledge_stop,
        accept_rate_jump: args.accept_rate_jump,
        launch,
        ..Options::default()
    };
    let outcome = train(checked, options, stop.flag(), &mut |event| {
        let Some(live) = &mut live else { return };
        live.show(event);
        if stop.flag().load(Ordering::Relaxed) {
            live.say_stopping();
        }
    });
    if let Some(live) = &mut live {
        live.finish();
    }
    let (answer, is_finished) = match outcome {
        Err(Error::Interrupted) => (interrupted(checked), false),
        outcome => answer(checked, &outcome?),
    };
    let answer = if is_first {
        answer
    } else {
        Answer::of_rank_0(0)
    };
    // A signal that arrives after the last step stops nothing. If another rank received the signal,
    // this rank has stopped because of it.
    Ok(if is_finished {
        answer
    } else {
        answer.stopped_by(stop.signal().unwrap_or(SIGTERM))
    })
}

/// The answer of a run that was asked to stop before its ranks had met.
fn interrupted(checked: &Checked) -> Answer {
    let run_dir = &checked.recipe.run.dir;
    let text = format!(
        "{}: stopped before all ranks had started; run the same command to resume",
        run_dir.display()
    );
    let json = json!({
        "run": run_dir,
        "finished": false,
        "step": null,
        "samples": null,
        "checkpoint": null,
    });
    Answer::done(text, json)
}

/// The answer, and whether the run is finished.
fn answer(checked: &Checked, outcome: &Outcome) -> (Answer, bool) {
    let run_dir = &checked.recipe.run.dir;
    let position = &outcome.position;
    let samples = grouped(position.samples);
    let mut text = if outcome.finished {
        format!("{}: finished after {samples} samples", run_dir.display())
    } else {
        format!(
            "{}: stopped after {samples} samples; run the same command to resume",
            run_dir.display()
        )
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
