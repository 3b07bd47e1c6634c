//! `rectiflow bench`: the numbers that the README quotes, measured anew on the machine at hand.

pub(crate) mod bench_loader;
pub(crate) mod bench_ranks;
pub(crate) mod bench_sample;
pub(crate) mod bench_step;

use clap::Subcommand;

use crate::answer::Answer;

/// Measure how fast this machine does one thing, and how much memory it takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Loader(bench_loader::Args),
    Ranks(bench_ranks::Args),
    Sample(bench_sample::Args),
    Step(bench_step::Args),
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    match &args.what {
        What::Loader(args) => bench_loader::run(args),
        What::Ranks(args) => bench_ranks::run(args),
        What::Sample(args) => bench_sample::run(args),
        What::Step(args) => bench_step::run(args),
    }
}
