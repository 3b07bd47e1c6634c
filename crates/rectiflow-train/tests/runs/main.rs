//! Whole runs of the tiny SDXL in this process: what the guard prevents, what a checkpoint
//! restores, where a branch begins, what a mirror has, and what the test loss does not depend on.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod branches;
mod caches;
mod checkpoints;
#[allow(dead_code, reason = "examples/guard_curves.rs uses more of it")]
mod clean_runs;
mod evaluations;
mod false_alarms;
mod fixture;
mod guarding;
mod in_backward;
mod mirrors;
#[path = "../../../rectiflow-data/tests/object_server/mod.rs"]
mod object_server;
mod precision;
mod ranks;
mod trackers;
