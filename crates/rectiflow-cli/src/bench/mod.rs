//! `rectiflow bench`: measures the numbers that the README quotes on this machine.

mod calls;
mod caption;
mod loader;
mod prep;
mod ranks;
pub(crate) mod sample;
mod step;

use clap::Subcommand;

use crate::terminal::answer::Answer;

/// Measure speed and memory on this machine.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Calls(calls::Args),
    Caption(caption::Args),
    Loader(loader::Args),
    Prep(prep::Args),
    Ranks(ranks::Args),
    Sample(sample::Args),
    Step(step::Args),
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    match &args.what {
        What::Calls(args) => calls::run(args),
        What::Caption(args) => caption::run(args),
        What::Loader(args) => loader::run(args),
        What::Prep(args) => prep::run(args),
        What::Ranks(args) => ranks::run(args),
        What::Sample(args) => sample::run(args),
        What::Step(args) => step::run(args),
    }
}
