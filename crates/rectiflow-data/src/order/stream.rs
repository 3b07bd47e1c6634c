//! The terms of the order: streams of micro-batches, their windows, and a micro-batch's slot. Pure.
//!
//! This file holds the arithmetic of one stream: its micro-batches in each epoch, the micro-batches
//! of each window, and the positions and passes of their samples. The parent module turns buckets
//! into streams; `lanes` deals windows to lanes.

use std::{fmt, ops::Range};

use serde::{Deserialize, Serialize};

/// How samples are spread over an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Mode {
    /// Each pass permutes all samples of a bucket, and the micro-batches of an epoch are shuffled:
    /// for data sets on a local or shared disk.
    #[default]
    Local,
    /// Each pass permutes the blocks of a bucket; a few blocks form a window, which one lane reads
    /// and whose samples are shuffled: for data sets in object storage. Every byte is fetched once
    /// per epoch.
    Window,
    /// Each lane has an equal share of a bucket's blocks for the whole run, on a local disk: the
    /// first pass is as in `window` mode, each later pass permutes all samples of the share and
    /// needs no network.
    Owned,
    /// The loader chooses from the data: `window` if the data sets at a URL exceed
    /// [`crate::dataset::MEMORY_BYTES`], otherwise `local`.
    Auto,
}

impl Mode {
    fn is_local(&self) -> bool {
        *self == Self::Local
    }

    /// Whether lanes read windows of blocks, so that the order depends on where blocks begin and
    /// end.
    pub fn has_windows(&self) -> bool {
        matches!(self, Self::Window | Self::Owned)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("local"),
            Self::Window => f.write_str("window"),
            Self::Owned => f.write_str("owned"),
            Self::Auto => f.write_str("auto"),
        }
    }
}

impl From<Mode> for String {
    fn from(mode: Mode) -> Self {
        mode.to_string()
    }
}

impl TryFrom<String> for Mode {
    type Error = String;

    fn try_from(name: String) -> std::result::Result<Self, String> {
        match name.as_str() {
            "local" => Ok(Self::Local),
            "window" => Ok(Self::Window),
            "owned" => Ok(Self::Owned),
            "auto" => Ok(Self::Auto),
            _ => Err(format!(
                "expected mode \"auto\", \"local\", \"window\" or \"owned\", found \"{name}\""
            )),
        }
    }
}

/// Passes per epoch are counted in millionths, so that counts are whole numbers.
pub(crate) const MILLION: u128 = 1_000_000;

/// One bucket of one data set, or a lane's share of one: an endless stream of micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Stream {
    /// Index of the data set.
    pub data: u32,
    /// Index of the bucket in its manifest.
    pub bucket: u32,
    /// Samples in the bucket (n), or in the share.
    pub rows: u64,
    /// Samples in each of its micro-batches, min(b, n).
    pub size: u32,
    /// Micro-batches in each of its windows, except the last window of a pass in `window` mode.
    pub window: u64,
    /// Passes per epoch, in millionths.
    pub repeats_millionths: u64,
    /// How it is cut into windows: `owned` for a lane's share, `window` for the rest of that
    /// bucket.
    #[serde(skip_serializing_if = "Mode::is_local")]
    pub mode: Mode,
    /// The lane whose share it is, in `owned` mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lane: Option<u32>,
}

impl Stream {
    /// Micro-batches in all epochs before `epoch`.
    pub fn before_epoch(&self, epoch: u64) -> u64 {
        let samples_millionths =
            u128::from(epoch) * u128::from(self.repeats_millionths) * u128::from(self.rows);
        (samples_millionths / (u128::from(self.size) * MILLION)) as u64
    }

    /// The micro-batches of the window that holds micro-batch `index`. In `window` mode a pass of n
    /// samples is k windows of S samples and a last one of t samples, b <= t < S + b. The fewer
    /// than b samples that do not fill a micro-batch are delivered with the last window of the next
    /// pass, so they are never late by more than a pass.
    pub fn window_of(&self, index: u64) -> Range<u64> {
        if self.mode.is_local() {
            let first = index / self.window * self.window;
            return first..first + self.window;
        }
        if self.mode == Mode::Owned {
            let pass = self.owned_pass(index);
            let in_pass = self.in_pass();
            let first = index - index % in_pass % self.window;
            return first..(first + self.window).min((pass + 1) * in_pass);
        }
        let (pass, first) = self.pass_of(index);
        let last = first + self.whole_windows() * self.window;
        if index < last {
            let first = first + (index - first) / self.window * self.window;
            return first..first + self.window;
        }
        last..(pass + 1) * self.rows / u64::from(self.size)
    }

    /// Where the samples of micro-batches of one window lie: passes, and positions in each pass.
    pub(crate) fn positions(&self, micro_batches: Range<u64>) -> Vec<(u64, Range<u64>)> {
        if self.mode.is_local() {
            return split_passes(self.samples_after(0, &micro_batches), self.rows, 0);
        }
        if self.mode == Mode::Owned {
            let pass = self.owned_pass(micro_batches.start);
            let first = pass * self.in_pass();
            return vec![(pass, self.samples_after(first, &micro_batches))];
        }
        let (pass, first) = self.pass_of(micro_batches.start);
        let last = first + self.whole_windows() * self.window;
        if micro_batches.start < last {
            return vec![(pass, self.samples_after(first, &micro_batches))];
        }
        // The last windows of all passes, one after the other, form an endless stream of their own.
        let size = u64::from(self.size);
        let skipped = self.whole_windows() * self.window * size;
        let tail = self.rows - skipped;
        let start = (pass * tail / size + micro_batches.start - last) * size;
        let len = (micro_batches.end - micro_batches.start) * size;
        split_passes(start..start + len, tail, skipped)
    }

    /// Positions of the samples of `micro_batches`, counted from micro-batch `first`.
    fn samples_after(&self, first: u64, micro_batches: &Range<u64>) -> Range<u64> {
        let size = u64::from(self.size);
        (micro_batches.start - first) * size..(micro_batches.end - first) * size
    }

    /// Micro-batches of a pass over a share; a share is a whole number of them.
    fn in_pass(&self) -> u64 {
        self.rows / u64::from(self.size)
    }

    /// The pass over a share that contains a micro-batch.
    pub(crate) fn owned_pass(&self, index: u64) -> u64 {
        index / self.in_pass()
    }

    /// The pass that delivers a micro-batch of `window` mode, and the number of that pass's first
    /// micro-batch.
    fn pass_of(&self, index: u64) -> (u64, u64) {
        let size = u64::from(self.size);
        let pass = ((index + 1) * size).div_ceil(self.rows) - 1;
        (pass, pass * self.rows / size)
    }

    /// Windows of a pass, without the last one.
    fn whole_windows(&self) -> u64 {
        let (size, samples) = (u64::from(self.size), self.window * u64::from(self.size));
        if self.rows >= samples + size {
            (self.rows - size) / samples
        } else {
            0
        }
    }

    /// Micro-batches in `epoch`.
    pub(crate) fn in_epoch(&self, epoch: u64) -> u64 {
        self.before_epoch(epoch + 1) - self.before_epoch(epoch)
    }
}

/// Splits positions of an endless stream of passes of `rows` samples into passes; adds `skipped` to
/// each position.
pub(crate) fn split_passes(
    positions: Range<u64>,
    rows: u64,
    skipped: u64,
) -> Vec<(u64, Range<u64>)> {
    let mut parts = Vec::new();
    let mut at = positions.start;
    while at < positions.end {
        let (pass, from) = (at / rows, at % rows);
        let until = rows.min(from + positions.end - at);
        parts.push((pass, from + skipped..until + skipped));
        at += until - from;
    }
    parts
}

/// Micro-batches of one stream that one lane runs together: a window or a part of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) stream: u32,
    /// Number of its first micro-batch in the stream.
    pub(crate) first: u64,
    /// Number of its micro-batches.
    pub(crate) len: u32,
}

/// A micro-batch's place in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Its number in the step.
    pub slot: u32,
    /// The epoch that it belongs to.
    pub epoch: u64,
    /// Index into [`Order::streams`](crate::order::Order::streams).
    pub stream: u32,
    /// Its number in the endless stream of its bucket.
    pub index: u64,
    /// Number of the first micro-batch of its window.
    pub window_first: u64,
    /// Micro-batches of its window.
    pub window_len: u32,
    /// Samples in it.
    pub size: u32,
    /// Index of its first sample among those of the step.
    pub first_sample: u64,
}
