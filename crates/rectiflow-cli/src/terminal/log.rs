//! Logs: to standard error, quiet by default, `RUST_LOG` respected, and never through the middle of
//! a progress bar.

use std::{
    io::{self, IsTerminal, Write},
    sync::LazyLock,
};

use indicatif::MultiProgress;
use tracing_subscriber::EnvFilter;

/// Our own crates (their names begin with `rectiflow`) from `info` on, others from `warn` on.
const DEFAULT: &str = "warn,rectiflow=info";

static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// All progress bars of the process. Output must suspend them while it is written.
pub(crate) fn bars() -> &'static MultiProgress {
    &BARS
}

/// Writes one line to standard error, above a bar where one is drawn.
pub(crate) fn line(text: &str) {
    // Nothing can be done where standard error is closed.
    bars().suspend(|| drop(writeln!(io::stderr().lock(), "{text}")));
}

/// "rank 2: " in every rank but rank 0, which reports for the run.
pub(crate) fn rank_prefix() -> String {
    match std::env::var("RANK") {
        Ok(rank) if rank != "0" => format!("rank {rank}: "),
        _ => String::new(),
    }
}

/// Starts logging. Ranks other than rank 0 log warnings only.
pub(crate) fn start() {
    let from_environment = std::env::var(EnvFilter::DEFAULT_ENV)
        .ok()
        .filter(|text| !text.is_empty());
    let (filter, refused) = match from_environment.as_deref().map(EnvFilter::try_new) {
        Some(Ok(filter)) => (filter, None),
        Some(Err(error)) => (EnvFilter::new(DEFAULT), Some(error)),
        None if rank_prefix().is_empty() => (EnvFilter::new(DEFAULT), None),
        None => (EnvFilter::new("warn"), None),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .without_time()
        .with_target(false)
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .with_writer(|| AroundBars)
        .init();
    if let Some(error) = refused {
        tracing::warn!("RUST_LOG is ignored: {error}");
    }
}

/// Standard error, with the bars out of the way while something is written.
struct AroundBars;

impl Write for AroundBars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bars().suspend(|| io::stderr().lock().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().lock().flush()
    }
}
