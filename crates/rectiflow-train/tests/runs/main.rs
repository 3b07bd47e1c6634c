//! Whole runs of the tiny SDXL in this process: what the guard prevents, what a checkpoint
//! restores, where a branch begins, and what the test loss does not depend on.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod branches;
mod caches;
mod checkpoints;
mod evaluations;
mod fixture;
mod guarding;
#[path = "../../../rectiflow-data/tests/object_server/mod.rs"]
mod object_server;
mod precision;
mod ranks;
