//! Everything that can stop a run, by meaning.

use std::{io, path::PathBuf};

/// A failure of this crate. Each message says what, where, what was expected and found, and what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The recipe cannot be run; every problem is listed.
    #[error("{}: {} problem{} in the recipe\n{}", path.display(), problems.len(), if problems.len() == 1 { "" } else { "s" },
            problems.iter().map(|p| format!("  {p}")).collect::<Vec<_>>().join("\n"))]
    Recipe {
        /// The recipe's file.
        path: PathBuf,
        /// One line a problem: key, expected, found.
        problems: Vec<String>,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The data set or the order failed.
    #[error(transparent)]
    Data(#[from] rectiflow_data::Error),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] rectiflow_sdxl::error::Error),
    /// A checkpoint is not what it should be.
    #[error("{}: {reason}", path.display())]
    Checkpoint {
        /// The checkpoint or a file in it.
        path: PathBuf,
        /// Expected, found, and what to do.
        reason: String,
    },
    /// Another process works in the run folder.
    #[error("{}: another `rectiflow train` is using this run folder; wait for it or choose another run.dir", path.display())]
    Locked {
        /// The run folder.
        path: PathBuf,
    },
    /// The recipe differs from the one that the run was begun with, in what must stay.
    #[error("{}: the recipe has changed in what a run must keep\n{}\nChange it back, or start a new run from where \
             this one is: another run.dir and --branch-from {}", run_dir.display(),
            changes.iter().map(|change| format!("  {change}")).collect::<Vec<_>>().join("\n"), checkpoint.display())]
    Changed {
        /// The run folder.
        run_dir: PathBuf,
        /// The checkpoint that the run would go on from.
        checkpoint: PathBuf,
        /// One line a key: old and new value.
        changes: Vec<String>,
    },
    /// A run cannot be branched from this checkpoint, or not into this folder.
    #[error("--branch-from {}: {reason}", checkpoint.display())]
    Branch {
        /// The checkpoint to branch from.
        checkpoint: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The guard has stopped the run, now or earlier.
    #[error("{}: the guard has stopped this run: {reason}\nLook at the events in metrics.jsonl and the evidence in \
             blackbox/; then go on with --acknowledge-stop, or from an earlier checkpoint with --branch-from",
            run_dir.display())]
    Stopped {
        /// The run folder.
        run_dir: PathBuf,
        /// What the guard saw.
        reason: String,
    },
    /// The loss is no number any more: the step was not applied.
    #[error(
        "step {step}: the {what} is {value}; the update was not made. The last checkpoint is untouched; \
         lower lr.peak, raise lr.warmup_samples, or let the guard pass over such steps (guard.enabled = true)"
    )]
    NotFinite {
        /// The step.
        step: u64,
        /// "loss" or "gradient norm".
        what: &'static str,
        /// NaN or an infinity.
        value: f64,
    },
    /// The run is going to need more memory than there is.
    #[error(
        "this run needs about {:.1} GiB and there are {:.1} GiB ({needs}); what would help: {help}. Nothing has been \
         loaded or written", *needed as f64 / f64::from(1 << 30), *limit as f64 / f64::from(1 << 30)
    )]
    Memory {
        /// What takes how much, in words.
        needs: String,
        /// Bytes that the device has to hold.
        needed: u64,
        /// Bytes that it has.
        limit: u64,
        /// Settings that would need less.
        help: String,
    },
    /// The ranks of a run cannot come together as they were started.
    #[error("{reason}")]
    Launch {
        /// What is wrong, and what to do.
        reason: String,
    },
    /// A collective failed, or another rank did while this one was waiting for it.
    #[error("rank {rank} of {ranks}: {collective} of {bytes} bytes: {reason}")]
    Collective {
        /// "all-reduce", "all-gather" and so on.
        collective: &'static str,
        /// This rank.
        rank: usize,
        /// How many there are.
        ranks: usize,
        /// What this rank put in.
        bytes: u64,
        /// Which rank failed, and in what.
        reason: String,
    },
    /// Another rank cannot do what all are waiting for.
    #[error("rank {rank}: {message}")]
    OtherRank {
        /// Which.
        rank: usize,
        /// Its own message.
        message: String,
    },
    /// libtorch refused an operation.
    #[error("{doing}: {reason}")]
    Torch {
        /// What was being done.
        doing: String,
        /// libtorch's first line.
        reason: String,
    },
}

/// What this crate's functions return.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Io`] about `path`, for `map_err`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// An [`Error::Torch`] for `map_err`: libtorch's message without its C++ stack.
    pub(crate) fn torch(doing: impl Into<String>) -> impl FnOnce(tch::TchError) -> Self {
        let doing = doing.into();
        move |error| {
            let text = error.to_string();
            Self::Torch { doing, reason: text.lines().next().unwrap_or_default().to_owned() }
        }
    }
}
