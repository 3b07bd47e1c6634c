//! `rectiflow eval`: the test loss of any checkpoint, over the same fixed samples that its run
//! measures.

use std::path::PathBuf;

use rectiflow_train::{
    eval::{Evaluation, evaluate},
    metrics::TableLoss,
    recipe::Recipe,
};

use crate::terminal::{
    answer::Answer,
    numbers::{grouped, short, table},
};

/// Measure the test loss of a checkpoint by noise level, on fixed samples with fixed noise.
///
/// The samples and noise depend on the recipe's data sets and seed only, so the losses of two
/// checkpoints, or of two runs with the same data and seed, are comparable. The batch size does not
/// change them. Averaged weights are measured too.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The recipe, a TOML file: data sets, seed, objective and [test].
    recipe: PathBuf,
    /// A training checkpoint or a diffusers folder.
    #[arg(long)]
    checkpoint: PathBuf,
    /// Override a key of the recipe, e.g. --set test.training_samples=256. Repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let checked = Recipe::load(&args.recipe, &args.overrides)?;
    let evaluation = evaluate(&checked, &args.checkpoint)?;
    if evaluation.num_test == 0 {
        tracing::warn!("the data has no test split, so there is no test loss");
    }
    Ok(Answer::done(
        describe(&evaluation),
        serde_json::to_value(&evaluation)?,
    ))
}

/// A column for each table, a row for each range of noise levels.
fn describe(evaluation: &Evaluation) -> String {
    let ema = evaluation.ema.as_ref();
    let columns: Vec<(&str, &TableLoss)> = [
        ("test", evaluation.trained.test.as_ref()),
        ("training", evaluation.trained.training.as_ref()),
        (
            "test, averaged weights",
            ema.and_then(|losses| losses.test.as_ref()),
        ),
        (
            "training, averaged weights",
            ema.and_then(|losses| losses.training.as_ref()),
        ),
    ]
    .into_iter()
    .filter_map(|(name, losses)| Some((name, losses?)))
    .collect();
    let Some((_, first)) = columns.first() else {
        return "nothing to measure".to_owned();
    };
    let mut rows = vec![vec!["noise level".to_owned()]];
    rows[0].extend(columns.iter().map(|(name, _)| (*name).to_owned()));
    for (index, bin) in first.bins.iter().enumerate() {
        let cell = |losses: &TableLoss| {
            let bin = &losses.bins[index];
            if bin.count == 0 {
                return "0 samples".to_owned();
            }
            format!("{} ± {}", short(bin.loss, 4), short(bin.standard_error, 2))
        };
        let mut row = vec![format!("{} to {}", short(bin.from, 3), short(bin.to, 3))];
        row.extend(columns.iter().map(|(_, losses)| cell(losses)));
        rows.push(row);
    }
    let mut all = vec!["all".to_owned()];
    all.extend(columns.iter().map(|(_, losses)| short(losses.loss, 6)));
    rows.push(all);
    let (test, training) = (
        grouped(evaluation.num_test as u64),
        grouped(evaluation.num_training as u64),
    );
    format!(
        "{}\n\n{test} test samples, {training} training samples; ± is one standard error",
        table(&rows)
    )
}
