//! The two sides of a mirror: the folder of a run, and its copy.

use std::path::PathBuf;

use rectiflow_data::Bucket;

use crate::checkpoint::Checkpoints;

/// Longest list of hashes, and longest reason of a stop, that is read from a mirror: 16 MiB.
pub(crate) const MOST_TEXT_BYTES: u64 = 16 << 20;
/// Parts that a branch froze, without which its checkpoints cannot be read.
pub(crate) const BASE: &str = "base/";

/// The folder of a run and its copy.
#[derive(Debug, Clone)]
pub(crate) struct Sides {
    pub(crate) run_dir: PathBuf,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) bucket: Bucket,
    pub(crate) others: Others,
}

/// What is copied besides checkpoints.
#[derive(Debug, Clone)]
pub(crate) struct Others {
    /// File with the reason why the guard stopped the run.
    pub(crate) stopped: &'static str,
    /// The same, after the stop was acknowledged.
    pub(crate) acknowledged: &'static str,
    /// What the names of event files begin with.
    pub(crate) events: &'static str,
    /// Folders of small files that do not change once they are written.
    pub(crate) folders: &'static [&'static str],
}

impl Others {
    /// Whether a file of the run folder holds events, by its name.
    pub(crate) fn is_events(&self, name: &str) -> bool {
        name.starts_with(self.events) && name.ends_with(".jsonl")
    }
}
