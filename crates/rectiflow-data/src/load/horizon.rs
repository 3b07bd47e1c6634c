//! How far ahead windows are read: no earlier than reading them takes, and none that the trainer
//! takes a minute to reach.
//!
//! A window of n samples is read from n samples before it begins: a source that is as fast as the
//! trainer has read it by then. The small windows of rare buckets are consumed faster than a
//! request is answered, so windows that begin very soon are read too. Whatever is read earlier than
//! that only takes memory.

use std::time::{Duration, Instant};

use crate::load::setup::LoaderSetup;

/// Windows that begin within this many samples of their lane are read: more from a store, which
/// takes two round trips to answer, than from a disk.
const NEAR_STORE_SAMPLES: usize = 512;
const NEAR_DISK_SAMPLES: usize = 64;
/// Windows that begin later than this are not read yet. Longer than the retries of a store that
/// stalls once.
const LONGEST: Duration = Duration::from_secs(60);

/// Decides which windows are near enough to be read.
#[derive(Debug)]
pub(crate) struct Horizon {
    /// Samples of a micro-batch.
    size: usize,
    /// Micro-batches that a lane delivers in a step.
    lane_batches: usize,
    /// When the last step began.
    last_step: Option<Instant>,
    /// Time from one step to the next. None until two have begun.
    pace: Option<Duration>,
}

impl Horizon {
    pub(crate) fn new(setup: &LoaderSetup) -> Self {
        let lane_batches = setup.slots.len() / setup.lanes().len().max(1);
        Self::of(setup.order.settings().micro_batch, lane_batches.max(1))
    }

    /// The horizon of lanes that each deliver `lane_batches` micro-batches of `size` samples a
    /// step.
    fn of(size: usize, lane_batches: usize) -> Self {
        Self {
            size,
            lane_batches,
            last_step: None,
            pace: None,
        }
    }

    /// Notes that a step begins at `now`.
    pub(crate) fn begin_step(&mut self, now: Instant) {
        if let Some(last) = self.last_step {
            let interval = now - last;
            // A pause, such as for a checkpoint, must not count as the trainer's pace.
            self.pace = Some(self.pace.map_or(interval, |pace| interval.min(2 * pace)));
        }
        self.last_step = Some(now);
    }

    /// Whether to read a window of `window_len` micro-batches that is needed `steps` steps from
    /// now.
    pub(crate) fn covers(&self, steps: u64, window_len: u32, is_remote: bool) -> bool {
        let near_samples = if is_remote {
            NEAR_STORE_SAMPLES
        } else {
            NEAR_DISK_SAMPLES
        };
        let near_batches = near_samples.div_ceil(self.size).max(window_len as usize);
        let near_steps = near_batches.div_ceil(self.lane_batches) as u64;
        let pace = self.pace.unwrap_or_default();
        steps <= near_steps && pace.as_secs_f64() * steps as f64 <= LONGEST.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_read_as_early_as_it_is_long_and_a_short_one_when_it_is_near() {
        let horizon = Horizon::of(16, 2);
        assert!(horizon.covers(50, 100, true) && !horizon.covers(51, 100, true));
        assert!(horizon.covers(50, 100, false) && !horizon.covers(51, 100, false));
        assert!(horizon.covers(16, 1, true) && !horizon.covers(17, 1, true));
        assert!(horizon.covers(2, 1, false) && !horizon.covers(3, 1, false));
    }

    #[test]
    fn what_a_slow_trainer_reaches_late_is_not_read_and_a_pause_is_no_pace() {
        let mut horizon = Horizon::of(16, 1);
        let mut now = Instant::now();
        for secs in [0, 1, 1, 1] {
            now += Duration::from_secs(secs);
            horizon.begin_step(now);
        }
        assert!(horizon.covers(60, 100, true) && !horizon.covers(61, 100, true));
        now += Duration::from_secs(600);
        horizon.begin_step(now);
        assert!(horizon.covers(30, 100, true) && !horizon.covers(31, 100, true));
        now += Duration::from_secs(1);
        horizon.begin_step(now);
        assert!(horizon.covers(60, 100, true));
    }
}
