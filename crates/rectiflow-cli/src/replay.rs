//! `rectiflow replay`: repeats the steps before an act of the guard and finds the first bad one.

use std::path::PathBuf;

use rectiflow_train::replay::{Replayed, replay};
use serde_json::json;

use crate::terminal::{
    answer::Answer,
    base::BaseArg,
    log,
    numbers::{short, table},
};

/// Repeat the steps that led to an act of the guard, and report the first bad one.
///
/// The black box names the checkpoint before the act, which must still exist. The run folder is not
/// changed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A file of the run's blackbox/ folder.
    black_box: PathBuf,
    #[command(flatten)]
    base: BaseArg,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let mut steps = Vec::new();
    replay(&args.black_box, args.base.path(), &mut |step| {
        log::line(&format!(
            "step {}: loss {}",
            step.step + 1,
            short(step.loss, 4)
        ));
        steps.push(step.clone());
    })?;
    let first_wrong = steps.iter().find(|step| step.wrong.is_some());
    let json = json!({
        "first_wrong": first_wrong.map(|step| step.step + 1),
        "steps": steps.iter().map(as_json).collect::<Vec<_>>(),
    });
    Ok(Answer::done(describe(&steps), json))
}

/// Steps count from 1, as in the log.
fn as_json(step: &Replayed) -> serde_json::Value {
    json!({
        "step": step.step + 1,
        "loss": step.loss.to_string(),
        "gradient_norm": step.gradient_norm.to_string(),
        "as_seen": step.is_as_seen(),
        "wrong": step.wrong,
        "worst": step.worst,
    })
}

fn describe(steps: &[Replayed]) -> String {
    let mut rows = vec![
        ["step", "loss", "gradient", "as seen", "worst sample"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for step in steps {
        let seen = match step.is_as_seen() {
            None => "not in the box",
            Some(true) => "yes",
            Some(false) => "no",
        };
        let worst = &step.worst;
        let worst = format!(
            "{} at {}: {}",
            worst.id,
            short(worst.time, 3),
            short(worst.loss, 4)
        );
        let numbers = [
            (step.step + 1).to_string(),
            short(step.loss, 4),
            short(step.gradient_norm, 3),
        ];
        rows.push([&numbers[..], &[seen.to_owned(), worst]].concat());
    }
    let verdict = match steps.iter().find(|step| step.wrong.is_some()) {
        None => "no step went wrong this time".to_owned(),
        Some(step) => format!(
            "first wrong in step {}: {}\nits worst sample is {} of data set {}, \"{}\", at \
             noise level {}",
            step.step + 1,
            step.wrong.as_deref().unwrap_or_default(),
            step.worst.id,
            step.worst.data,
            step.worst.prompt,
            short(step.worst.time, 4)
        ),
    };
    format!("{}\n\n{verdict}", table(&rows))
}
