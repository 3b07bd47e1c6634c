//! What the command says and hears: answers, logs, progress, signals, numbers as people read them.

pub(crate) mod answer;
pub(crate) mod dtype;
pub(crate) mod log;
pub(crate) mod numbers;
pub(crate) mod progress;
pub(crate) mod signals;
