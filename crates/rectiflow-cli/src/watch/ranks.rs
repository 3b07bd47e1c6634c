//! The seconds of a step by rank, from the ends of the ranks' event files.

use rectiflow_train::metrics::{Event, StepMetrics};
use serde::Serialize;

use crate::watch::{source::Source, view::Brief};

/// A rank's seconds a step: they add up to the step's.
#[derive(Debug, Serialize)]
pub(crate) struct RankSecs {
    rank: usize,
    /// Mean seconds of each part, in the order of `PARTS`.
    secs: [Brief; 4],
    /// Whether the other ranks wait for it, by rank 0.
    is_slowest: bool,
}

/// What a rank does in a step.
pub(crate) const PARTS: [&str; 4] = ["waiting for data", "passes", "communication", "update"];

/// Bytes that are read of each rank's file.
const END_BYTES: u64 = 64 << 10;
/// Steps that are averaged.
const STEPS: usize = 50;
/// The most ranks that are shown.
const MOST_RANKS: usize = 512;

/// Returns the seconds of each rank that has written any; none for a run in one process.
pub(crate) fn of(source: &Source, ranks: usize) -> Vec<RankSecs> {
    let mut found = Vec::new();
    if ranks < 2 {
        return found;
    }
    let mut slowest = None;
    for rank in 0..ranks.min(MOST_RANKS) {
        let steps = last_steps(source, rank);
        if rank == 0 {
            let shares = steps.last().and_then(|step| step.ranks.as_ref());
            slowest = shares
                .and_then(|shares| shares.slowest)
                .map(|slowest| slowest.rank);
        }
        if !steps.is_empty() {
            found.push(RankSecs {
                rank,
                secs: means(&steps),
                is_slowest: slowest == Some(rank),
            });
        }
    }
    found
}

fn last_steps(source: &Source, rank: usize) -> Vec<StepMetrics> {
    let mut steps = Vec::new();
    for event in source.last_events(rank, END_BYTES) {
        if let Event::Step(step) = event {
            steps.push(step);
        }
    }
    steps.drain(..steps.len().saturating_sub(STEPS));
    steps
}

fn means(steps: &[StepMetrics]) -> [Brief; 4] {
    let mut sums = [0.0; 4];
    for step in steps {
        sums[0] += step.data_secs;
        if let Some(ranks) = &step.ranks {
            sums[1] += ranks.passes_secs;
            sums[2] += ranks.communication_secs;
            sums[3] += ranks.update_secs;
        }
    }
    sums.map(|sum| {
        let mean = sum / steps.len().max(1) as f64;
        Brief(if mean.is_finite() { mean.max(0.0) } else { 0.0 })
    })
}
