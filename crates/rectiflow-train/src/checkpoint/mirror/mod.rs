//! A copy of a run in object storage (`checkpoint.mirror`), made while training continues.
//!
//! ```text
//! RUN                                   MIRROR, the same names
//!   checkpoints/step-NNNNNNNN/...         BLAKE3SUMS is written last and removed first
//!   base/...                              what a branch froze
//!   metrics*.jsonl, previews/, blackbox/, STOPPED
//! ```
//!
//! **Whole or not there.** A checkpoint of the mirror is one whose `BLAKE3SUMS` is there. Each file
//! is hashed as it is sent and compared with that list; the list follows when the store has all
//! files in their lengths. A kill at any moment leaves objects without a list, which no reader
//! takes for a checkpoint and which a later pass removes.
//!
//! **Rotation** follows the rule of the run folder. Nothing is removed before a newer checkpoint is
//! whole in the mirror, so that its newest whole one always stays.
//!
//! **One thread** of rank 0 does all of it (`worker`), in passes (`pass`) over what the folder has:
//! nothing is queued, so that a mirror that was away for hours is brought up to date by one pass,
//! the newest checkpoint first. A failed pass is a warning and is repeated. Training neither waits
//! for the thread nor learns of its errors.
//!
//! At the start `probe` writes and removes an object, and `restore` takes from the mirror what is
//! newer there than in the folder.
//!
//! Not here: the store, its retries and the limit on the rate (`rectiflow_data::Bucket`).

mod index;
mod pass;
pub(crate) mod probe;
pub(crate) mod restore;
pub(crate) mod sides;
pub(crate) mod worker;
