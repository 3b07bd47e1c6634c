//! The errors of this crate, by meaning.

use std::{
    fmt::Display,
    io,
    path::{Path, PathBuf},
};

use rectiflow_data::error::advice;

/// An error of this crate. Each message says what failed and where, what was expected and found,
/// and what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The recipe is invalid; every problem is listed.
    #[error("{}: {}", path.display(), in_the_recipe(problems))]
    Recipe {
        /// The file of the recipe.
        path: PathBuf,
        /// One line per problem: key, expected, found.
        problems: Vec<String>,
    },
    /// An operation on a file or folder failed.
    #[error("{}: {source}{}", path.display(), advice(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// An error of the data crate: the data set, its storage or the order of samples.
    #[error(transparent)]
    Data(#[from] rectiflow_data::Error),
    /// An error of the model crate: weights, configurations or sampling.
    #[error(transparent)]
    Model(#[from] rectiflow_sdxl::error::Error),
    /// A checkpoint is damaged, missing or does not match the run.
    #[error("{}: {reason}", path.display())]
    Checkpoint {
        /// The checkpoint or a file in it.
        path: PathBuf,
        /// Expected, found, and what to do.
        reason: String,
    },
    /// Another process holds the lock of the run folder.
    #[error("{}: another `rectiflow train` is using this run folder; wait for it or choose another \
             run.dir", path.display())]
    Locked {
        /// The run folder.
        path: PathBuf,
    },
    /// The recipe differs from that of the resumed run in keys that must not change.
    #[error("{}: the recipe has changed in keys that a run must keep\n{}\nChange them back, or \
             start a new run from this one: another run.dir and --branch-from {}",
            run_dir.display(), indented(changes), checkpoint.display())]
    Changed {
        /// The run folder.
        run_dir: PathBuf,
        /// The checkpoint that the run would resume from.
        checkpoint: PathBuf,
        /// One line per key: old and new value.
        changes: Vec<String>,
    },
    /// The learning rate would jump, since the run was made longer.
    #[error("{}: train.samples {} -> {} lets the learning rate jump from {before:.1e} to \
             {after:.1e}, which can undo what it has learnt. Continue with --accept-rate-jump, or \
             start a new run from this one, with its own warm-up: another run.dir and \
             --branch-from {}",
            run_dir.display(), samples[0], samples[1], checkpoint.display())]
    RateJump {
        /// The run folder.
        run_dir: PathBuf,
        /// The checkpoint that the run would resume from.
        checkpoint: PathBuf,
        /// `train.samples` of the checkpoint and of the recipe.
        samples: [u64; 2],
        /// Rate of the last update.
        before: f64,
        /// Rate of the next update.
        after: f64,
    },
    /// No branch can start from this checkpoint, or not in this run folder.
    #[error("--branch-from {}: {reason}", checkpoint.display())]
    Branch {
        /// The checkpoint to branch from.
        checkpoint: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The guard has stopped the run, in this process or an earlier one.
    #[error("{}: the guard has stopped this run: {reason}\nLook at the events in metrics.jsonl \
             and the evidence in blackbox/; then continue with --acknowledge-stop, or start a new \
             run from an earlier checkpoint with --branch-from",
            run_dir.display())]
    Stopped {
        /// The run folder.
        run_dir: PathBuf,
        /// The observation that the guard acted on.
        reason: String,
    },
    /// The loss or the gradient norm is not finite; the update was not applied.
    #[error(
        "step {step}: the {what} is {value}; the update was not applied. The last checkpoint is \
         untouched; lower lr.peak, raise lr.warmup_samples, or let the guard skip such steps \
         (guard.enabled = true)"
    )]
    NotFinite {
        /// The step, from 0.
        step: u64,
        /// "loss" or "gradient norm".
        what: &'static str,
        /// Its value: NaN or an infinity.
        value: f64,
    },
    /// A gradient was not finite during updates in the backward pass, without a guard.
    #[error(
        "step {step}: the gradient of {tensor} is not finite, and other tensors of this step are \
         already updated (train.update_in_backward): this state is lost, and no checkpoint of it is \
         written. The same command resumes from the last checkpoint; lower lr.peak, raise \
         lr.warmup_samples, or let the guard go back by itself (guard.enabled = true)"
    )]
    HalfUpdated {
        /// The step, from 0.
        step: u64,
        /// Name of the tensor.
        tensor: String,
    },
    /// The estimated memory of the run exceeds the limit.
    #[error(
        "this run needs about {:.1} GiB and may use {:.1} GiB ({needs}); what would help: {help}. \
         Nothing has been loaded or written",
        *needed as f64 / f64::from(1 << 30),
        *limit as f64 / f64::from(1 << 30)
    )]
    Memory {
        /// The terms of the estimate, in words.
        needs: String,
        /// Bytes needed on the device.
        needed: u64,
        /// Bytes that the device has or the recipe allows.
        limit: u64,
        /// Settings that reduce it.
        help: String,
    },
    /// The ranks of a run cannot work together as they were started.
    #[error("{reason}")]
    Launch {
        /// What is wrong, and what to do.
        reason: String,
    },
    /// A rank was asked to stop before all ranks had started.
    #[error(
        "asked to stop before all ranks had started: nothing has been read or written; run the \
         same command to resume"
    )]
    Interrupted,
    /// A collective failed, or another rank failed while this one was waiting for it.
    #[error("rank {rank} of {ranks}: {collective} of {bytes} bytes: {reason}")]
    Collective {
        /// Name of the collective, such as "all-reduce" or "all-gather".
        collective: &'static str,
        /// This rank.
        rank: usize,
        /// Ranks of the run.
        ranks: usize,
        /// Bytes that this rank contributed.
        bytes: u64,
        /// Which rank failed, and in which operation.
        reason: String,
    },
    /// Another rank failed in an operation that all ranks wait for.
    #[error("rank {rank}: {message}")]
    OtherRank {
        /// The rank that failed.
        rank: usize,
        /// Its own message.
        message: String,
    },
    /// An operation of libtorch failed.
    #[error("{doing}: {reason}")]
    Torch {
        /// The operation, in words.
        doing: String,
        /// The first line of libtorch's message.
        reason: String,
    },
}

/// Returns one problem in a line; several below their number, a line each.
fn in_the_recipe(problems: &[String]) -> String {
    match problems {
        [only] => only.clone(),
        several => format!(
            "{} problems in the recipe\n{}",
            several.len(),
            indented(several)
        ),
    }
}

/// Returns the lines of a message, each indented by two spaces.
fn indented(lines: &[String]) -> String {
    let mut text = String::new();
    for (index, line) in lines.iter().enumerate() {
        if index > 0 {
            text.push('\n');
        }
        text.push_str("  ");
        text.push_str(line);
    }
    text
}

/// The result type of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Returns an [`Error::Recipe`] with these problems, one line each.
    pub(crate) fn recipe(path: &Path, problems: Vec<String>) -> Self {
        Self::Recipe {
            path: path.to_owned(),
            problems,
        }
    }

    /// Returns an [`Error::Checkpoint`] for a checkpoint or a file in it.
    pub(crate) fn checkpoint(path: &Path, reason: impl Into<String>) -> Self {
        Self::Checkpoint {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    /// Whether the ranks no longer work together, so that none can try again.
    pub(crate) fn concerns_all_ranks(&self) -> bool {
        matches!(self, Self::Collective { .. } | Self::Launch { .. })
    }

    /// Returns a function for `map_err` that makes an [`Error::Io`] with `path`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// Returns a function for `map_err` that makes an [`Error::Torch`] with libtorch's message,
    /// without its C++ stack.
    pub(crate) fn torch(doing: impl Into<String>) -> impl FnOnce(tch::TchError) -> Self {
        let doing = doing.into();
        move |error| {
            let text = error.to_string();
            Self::Torch {
                doing,
                reason: text.lines().next().unwrap_or_default().to_owned(),
            }
        }
    }
}

/// The problems of a recipe's section, as (key, reason) pairs: all of them are reported together.
#[derive(Debug)]
pub(crate) struct Problems {
    section: String,
    found: Vec<(String, String)>,
}

impl Problems {
    /// Creates a list without problems for the keys of a section.
    pub(crate) fn of(section: impl Into<String>) -> Self {
        Self {
            section: section.into(),
            found: Vec::new(),
        }
    }

    pub(crate) fn into_pairs(self) -> Vec<(String, String)> {
        self.found
    }

    pub(crate) fn add(&mut self, key: &str, reason: impl Into<String>) {
        let key = format!("{}.{key}", self.section);
        self.found.push((key, reason.into()));
    }

    /// Adds a problem unless the value found for a key `fits`.
    pub(crate) fn expect(&mut self, key: &str, fits: bool, expected: &str, found: impl Display) {
        if !fits {
            self.add(key, format!("expected {expected}, found {found}"));
        }
    }

    pub(crate) fn expect_at_least_1(&mut self, key: &str, count: u64) {
        self.expect(key, count > 0, "at least 1", count);
    }

    /// Adds a problem unless a count is 1 to `most`.
    pub(crate) fn expect_count(&mut self, key: &str, count: u64, most: u64) {
        let fits = (1..=most).contains(&count);
        self.expect(key, fits, &format!("1 to {most}"), count);
    }

    pub(crate) fn expect_above_0(&mut self, key: &str, number: f64) {
        let fits = number > 0.0 && number.is_finite();
        self.expect(key, fits, "a number above 0", number);
    }

    pub(crate) fn expect_above_1(&mut self, key: &str, number: f64) {
        let fits = number > 1.0 && number.is_finite();
        self.expect(key, fits, "a number above 1", number);
    }

    pub(crate) fn expect_at_least_0(&mut self, key: &str, number: f64) {
        let fits = number >= 0.0 && number.is_finite();
        self.expect(key, fits, "a number of at least 0", number);
    }
}
