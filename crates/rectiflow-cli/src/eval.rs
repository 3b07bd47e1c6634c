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
    base::BaseArg,
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
    #[command(flatten)]
    base: BaseArg,
    /// Override a key of the recipe, e.g. --set test.training_samples=256. Repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let checked = Recipe::load(&args.recipe, &args.overrides)?;
    let evaluation = evaluate(&checked, &args.checkpoint, args.base.path())?;
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
    let columns = columns(evaluation);
    let Some(first) = columns.first() else {
        return "nothing to measure".to_owned();
    };
    let mut rows = vec![row("noise level", &columns, |column| {
        column.name.to_owned()
    })];
    for (index, bin) in first.losses.bins.iter().enumerate() {
        let range = format!("{} to {}", short(bin.from, 3), short(bin.to, 3));
        rows.push(row(&range, &columns, |column| column.bin(index)));
    }
    rows.push(row("all", &columns, |column| short(column.losses.loss, 6)));
    let test = grouped(evaluation.num_test as u64);
    let training = grouped(evaluation.num_training as u64);
    format!(
        "{}\n\n{test} test samples, {training} training samples; ± is one standard error",
        table(&rows)
    )
}

/// A measured table under its heading.
struct Column<'a> {
    name: &'static str,
    losses: &'a TableLoss,
}

impl Column<'_> {
    /// The loss of one range of noise levels.
    fn bin(&self, index: usize) -> String {
        let bin = &self.losses.bins[index];
        if bin.count == 0 {
            return "0 samples".to_owned();
        }
        format!("{} ± {}", short(bin.loss, 4), short(bin.standard_error, 2))
    }
}

/// The tables that were measured.
fn columns(evaluation: &Evaluation) -> Vec<Column<'_>> {
    let mut columns = Vec::new();
    push(&mut columns, "test", evaluation.trained.test.as_ref());
    push(
        &mut columns,
        "training",
        evaluation.trained.training.as_ref(),
    );
    if let Some(ema) = &evaluation.ema {
        push(&mut columns, "test, averaged weights", ema.test.as_ref());
        push(
            &mut columns,
            "training, averaged weights",
            ema.training.as_ref(),
        );
    }
    columns
}

fn push<'a>(columns: &mut Vec<Column<'a>>, name: &'static str, losses: Option<&'a TableLoss>) {
    if let Some(losses) = losses {
        columns.push(Column { name, losses });
    }
}

/// A row of the table: its name, and the cell of each column.
fn row(name: &str, columns: &[Column<'_>], cell: impl Fn(&Column<'_>) -> String) -> Vec<String> {
    let mut row = vec![name.to_owned()];
    row.extend(columns.iter().map(cell));
    row
}
