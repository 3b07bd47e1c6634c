//! The command `rectiflow`: a contents page. It parses, dispatches, and turns how a command ended
//! into an exit code.
//!
//! One subcommand a file: its arguments (`Args`) and `run`, which returns an [`Answer`]. Standard
//! output gets that answer and nothing else, once, at the end; progress and logs go to standard
//! error.

mod annotating;
mod bench;
mod caption;
mod dedupe;
mod eval;
mod export;
mod forward;
mod inspect;
mod local_ranks;
mod model_card;
mod picture_model;
mod picture_texts;
mod plan;
mod prep;
mod ranks_page;
mod replay;
mod report;
mod sample;
mod schedule;
mod score;
mod tag;
mod terminal;
mod tokens;
mod train;
mod train_line;
mod watch;

use std::io::{self, Write};

use clap::{Parser, Subcommand};

use terminal::{
    answer::{self, Answer},
    log,
};

/// Turns captioned images into a rectified-flow SDXL: prepare, train, sample, export.
///
/// Exit codes: 0 done, 1 failed, 2 wrong arguments or settings, 3 stopped by the guard, 130
/// interrupted, 143 terminated (both after saving).
#[derive(Debug, Parser)]
#[command(
    name = "rectiflow",
    version,
    max_term_width = 100,
    propagate_version = true,
    // Scripts append options to override earlier ones.
    args_override_self = true
)]
struct Cli {
    /// Print the answer as one JSON object, last on standard output; progress and logs stay on
    /// standard error.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Prep(prep::Args),
    Dedupe(dedupe::Args),
    Caption(caption::Args),
    Tag(tag::Args),
    Score(score::Args),
    Inspect(inspect::Args),
    Plan(plan::Args),
    Train(train::Args),
    Eval(eval::Args),
    Replay(replay::Args),
    Sample(sample::Args),
    Export(export::ExportArgs),
    Import(export::ImportArgs),
    Report(report::Args),
    Watch(watch::Args),
    Schedule(schedule::Args),
    Tokens(tokens::Args),
    Forward(forward::Args),
    Bench(bench::Args),
}

fn main() {
    let Cli { json, command } = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing can be done where the terminal is closed.
            let _ = error.print();
            leave(error.exit_code());
        }
    };
    if command.uses_models() {
        rectiflow_sdxl::waiting::sleep_soon();
    }
    log::start();
    // Building a model does this too, but here no other thread makes tensors yet.
    rectiflow_sdxl::allocator::pack_tensors();
    let code = match run(command) {
        Ok(answer) => answer.print(json),
        Err(error) => answer::fail(&error, json),
    };
    leave(i32::from(code));
}

/// Ends the process without the destructors of static objects. libtorch's unregister thousands of
/// operators, one by one, which takes a fifth of a second.
fn leave(code: i32) -> ! {
    // Nothing can be done where the terminal is closed.
    let _ = io::stdout().flush();
    signal_hook::low_level::exit(code)
}

impl Command {
    /// Whether the command calculates with a model, by several threads.
    fn uses_models(&self) -> bool {
        match self {
            Self::Prep(_)
            | Self::Inspect(_)
            | Self::Train(_)
            | Self::Eval(_)
            | Self::Replay(_)
            | Self::Sample(_)
            | Self::Forward(_)
            | Self::Bench(_) => true,
            Self::Dedupe(_)
            | Self::Caption(_)
            | Self::Tag(_)
            | Self::Score(_)
            | Self::Plan(_)
            | Self::Export(_)
            | Self::Import(_)
            | Self::Report(_)
            | Self::Watch(_)
            | Self::Schedule(_)
            | Self::Tokens(_) => false,
        }
    }
}

fn run(command: Command) -> anyhow::Result<Answer> {
    match command {
        Command::Prep(args) => prep::run(&args),
        Command::Dedupe(args) => dedupe::run(&args),
        Command::Caption(args) => caption::run(&args),
        Command::Tag(args) => tag::run(&args),
        Command::Score(args) => score::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Sample(args) => sample::run(&args),
        Command::Export(args) => export::export(&args),
        Command::Import(args) => export::import(&args),
        Command::Report(args) => report::run(&args),
        Command::Watch(args) => watch::run(&args),
        Command::Schedule(args) => schedule::run(&args),
        Command::Tokens(args) => Ok(tokens::run(&args)),
        Command::Forward(args) => forward::run(&args),
        Command::Bench(args) => bench::run(&args),
    }
}

#[cfg(test)]
mod tests {
    use clap::{ArgAction, Command, CommandFactory, error::ErrorKind};

    #[test]
    fn the_command_line_is_well_formed() {
        super::Cli::command().debug_assert();
    }

    /// The commands without subcommands of their own, each with its names.
    fn commands(parent: &[String], command: &Command, found: &mut Vec<(Vec<String>, Command)>) {
        let mut names = parent.to_vec();
        names.push(command.get_name().to_owned());
        if !command.has_subcommands() {
            found.push((names, command.clone()));
            return;
        }
        for inner in command.get_subcommands() {
            commands(&names, inner, found);
        }
    }

    /// What is wrong with a command line.
    fn problem(arguments: &[String]) -> Option<ErrorKind> {
        let parsed = super::Cli::command().try_get_matches_from(arguments);
        parsed.err().map(|error| error.kind())
    }

    #[test]
    fn the_last_of_a_repeated_option_wins_in_every_command() {
        const VALUES: [&str; 16] = [
            "4",
            "1000",
            "1",
            "cpu",
            "window",
            "64x64+0+0",
            "x",
            "64x64",
            "flow",
            "fp16",
            "single-file",
            "euler",
            "simple",
            "0.5",
            "0/1",
            "127.0.0.1",
        ];
        let mut found = Vec::new();
        commands(&[], &super::Cli::command(), &mut found);
        let mut num_options = 0;
        for (names, command) in found {
            for option in command.get_opts() {
                if !matches!(option.get_action(), ArgAction::Set) {
                    continue;
                }
                let flag = format!("--{}", option.get_long().expect("options have long names"));
                let with = |values: &[&str]| {
                    let mut arguments = names.clone();
                    for value in values {
                        arguments.extend([flag.clone(), (*value).to_owned()]);
                    }
                    problem(&arguments)
                };
                let fits = |value: &&str| {
                    let problem = with(&[*value]);
                    !matches!(
                        problem,
                        Some(ErrorKind::ValueValidation | ErrorKind::InvalidValue)
                    )
                };
                let possible = option.get_possible_values();
                let names_of = possible.iter().map(clap::builder::PossibleValue::get_name);
                let mut values = names_of.chain(VALUES);
                let value = values.find(|value| fits(value));
                let value = value.unwrap_or_else(|| panic!("{names:?} {flag}: no value fits"));
                assert_ne!(
                    with(&[value; 2]),
                    Some(ErrorKind::ArgumentConflict),
                    "{names:?} {flag}"
                );
                num_options += 1;
            }
        }
        assert!(num_options > 60, "{num_options}");
        let twice = ["rectiflow", "plan", "r", "--json", "--json"].map(str::to_owned);
        assert_eq!(problem(&twice), None);
    }
}
