//! The answers of a run that takes days: nothing that is on disk is asked for again.
//!
//! ```text
//! OUT.parquet             the table of earlier runs, or of this one when it is complete
//! OUT.parquet.work/
//!   lock                  locked (flock) while a run writes
//!   run.txt               the settings that decide the answers, a line each
//!   part-000001.parquet   finished parts of this run
//!   journal-000002.jsonl  rows of the next part, a line each, flushed to the disk in batches
//! ```
//!
//! A row is in the journal before the next request of its place is made, so kill -9 loses what is
//! in flight. A full journal becomes a part, and is deleted after the part is on disk. At the end
//! the table of earlier runs, the parts and the journal become one table under a temporary name,
//! which is renamed; then the folder goes. Of rows with the same picture, kind and mode the last
//! one counts, so a death between any two of these steps only repeats rows.

pub mod answers;
mod journal;
pub mod known;
mod merge;
mod run_lines;
