//! `rectiflow bench`: the numbers that the README quotes, measured anew on the machine at hand.

use clap::Subcommand;

use crate::{answer::Answer, bench_loader};

/// Measure how fast this machine does one thing.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Loader(bench_loader::Args),
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    match &args.what {
        What::Loader(args) => bench_loader::run(args),
    }
}
