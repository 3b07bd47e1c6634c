//! The command's side of the terminal: shared arguments, answers, logs, progress, signals,
//! formatted numbers.

pub(crate) mod answer;
pub(crate) mod base;
pub(crate) mod cache_folder;
pub(crate) mod captions;
pub(crate) mod dtype;
pub(crate) mod log;
pub(crate) mod numbers;
pub(crate) mod progress;
pub(crate) mod signals;
