//! What a rank sends, and how long it waits for it.

use std::{
    collections::BTreeMap,
    mem::take,
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

/// A kind of collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Collective {
    /// Every rank ends with the sum.
    AllReduce,
    /// Every rank ends with its part of the sum.
    ReduceScatter,
    /// Every rank ends with the concatenation of all parts.
    AllGather,
    /// Every rank ends with what one of them has.
    Broadcast,
    /// Every rank waits for all others.
    Barrier,
}

impl Collective {
    /// Returns the name used in messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all-reduce",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllGather => "all-gather",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
        }
    }
}

/// What this rank has sent, and how long it has waited.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Traffic {
    /// Bytes that each rank sends, by collective; see `docs/ranks.md` for the formulae.
    pub bytes: BTreeMap<Collective, u64>,
    /// Seconds in collectives, waiting for slower ranks included.
    pub secs: f64,
    /// Seconds in which messages were in transit while this rank computed.
    pub hidden_secs: f64,
}

/// Counts the traffic of a rank, from any thread.
#[derive(Debug, Default)]
pub(crate) struct Counter(Mutex<Traffic>);

impl Counter {
    /// Returns the traffic since the last call, and resets it.
    pub(crate) fn take(&self) -> Traffic {
        take(&mut *self.lock())
    }

    /// Returns the seconds in collectives since the last [`Self::take`].
    pub(crate) fn secs(&self) -> f64 {
        self.lock().secs
    }

    pub(crate) fn add_bytes(&self, collective: Collective, bytes: u64) {
        *self.lock().bytes.entry(collective).or_default() += bytes;
    }

    pub(crate) fn add_secs(&self, secs: f64) {
        self.lock().secs += secs;
    }

    pub(crate) fn add_hidden_secs(&self, secs: f64) {
        self.lock().hidden_secs += secs;
    }

    fn lock(&self) -> MutexGuard<'_, Traffic> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
