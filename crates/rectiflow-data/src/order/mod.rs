//! The order: which samples make up each micro-batch of each step.
//!
//! A pure function of the data sets, the seed, the micro-batch size b, the micro-batches per step
//! A, the lanes L and the mode; **not of the number of ranks**, which only decides which rank runs
//! which slot. Nothing here reads a file.
//!
//! - A bucket of n samples is an endless stream of passes, each a fresh permutation, cut into
//!   micro-batches of q = min(b, n) samples: a bucket of n < b samples yields one ragged
//!   micro-batch per pass. With r repeats, epoch e has floor((e+1) r n / q) - floor(e r n / q) of
//!   its micro-batches. So nothing is dropped, no pass repeats a sample, and after e epochs a
//!   sample has been seen e r times, plus or minus one (below two if e r is not whole).
//! - The shuffled micro-batches of an epoch follow those of the epoch before; step k is slots k A
//!   to (k+1) A of that endless sequence ([`epoch`]).
//! - In `window` mode a micro-batch belongs to a window, and a whole window to one lane (`lanes`).
//! - In `owned` mode each lane has an equal share of a bucket for the whole run, which is a stream
//!   of its own; the remainder of the equal shares, and buckets too small to be shared, are streams
//!   of `window` mode (`share`).
//! - The samples of a micro-batch are chosen one window at a time, by the length of their prompts
//!   ([`window`]); the number of micro-batches never depends on text.
//! - Slot s belongs to lane s mod L, and rank l mod R runs lane l, for any R <= L.

pub mod amplification;
pub mod epoch;
pub(crate) mod lanes;
pub mod pass;
pub(crate) mod share;
pub(crate) mod stream;
pub mod window;

use num_integer::lcm;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    format::block_table::BLOCK_ROWS,
    order::{pass::Layout, stream::MILLION},
};

pub use stream::{Mode, Slot, Stream};

/// The settings of an order: everything that it depends on apart from the data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OrderSettings {
    /// The seed of every random number of the order.
    pub seed: u64,
    /// Samples per micro-batch (b).
    pub micro_batch: usize,
    /// Micro-batches per step over all ranks (A).
    pub micro_batches: usize,
    /// Lanes (L), a divisor of A. None means the largest divisor that is at most 64.
    pub lanes: Option<usize>,
    /// How samples are spread over an epoch.
    pub mode: Mode,
    /// Samples (S) among which micro-batches are grouped by chunk count; rounded down to whole
    /// micro-batches (in `window` and `owned` mode also to whole blocks, but at least the smallest
    /// number that is both), and at most the bucket.
    pub window_samples: u64,
}

/// A data set's part of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Amount {
    /// Passes over it per epoch; a fraction is allowed; exact to a millionth.
    Repeats(f64),
    /// Its fraction of an epoch's samples. Either all data sets have a share or none; shares sum to
    /// 1, and an epoch then has as many samples as the data sets together.
    Share(f64),
}

/// Number of training samples of one bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketRows {
    /// Index of the bucket in its manifest.
    pub bucket: u32,
    /// Number of rows.
    pub rows: u64,
    /// For `window` and `owned` mode, the end of each run of blocks, in rows, ascending; the last
    /// is `rows`.
    pub run_ends: Vec<u32>,
}

/// Everything that the order depends on of one data set.
#[derive(Debug, Clone, PartialEq)]
pub struct DataShape {
    /// Hash of its manifest.
    pub identity: String,
    /// What prompts and their length depend on: prompt settings and the tokenizer's fingerprint.
    pub text: String,
    /// Its part of an epoch.
    pub amount: Amount,
    /// Its buckets, in a fixed order.
    pub buckets: Vec<BucketRows>,
}

impl DataShape {
    fn num_samples(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.rows).sum()
    }
}

/// One of the processes that share a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankOf {
    /// Counted from 0.
    pub rank: usize,
    /// Number of ranks.
    pub ranks: usize,
}

impl RankOf {
    /// The only process of a run.
    pub const ONLY: Self = Self { rank: 0, ranks: 1 };
}

/// The order of a run. It takes a few bytes per bucket and negligible time to build.
#[derive(Debug, Clone)]
pub struct Order {
    settings: OrderSettings,
    lanes: usize,
    streams: Vec<Stream>,
    /// Where each stream's rows lie; empty in `local` mode.
    layouts: Vec<Layout>,
    hash: String,
}

impl Order {
    /// The order of `data` under `settings`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a size is 0, the lanes do not divide the micro-batches, amounts
    /// contradict each other, a data set has no samples, or a count exceeds 32 bits.
    pub fn new(data: &[DataShape], settings: OrderSettings) -> Result<Self> {
        check_sizes(&settings)?;
        let lanes = resolve_lanes(settings.micro_batches, settings.lanes)?;
        let Streams { streams, layouts } = Streams::of(data, &settings, lanes)?;
        let hash = hash(data, &settings, lanes, &streams);
        let order = Self {
            settings,
            lanes,
            streams,
            layouts,
            hash,
        };
        // Epochs differ by at most one micro-batch per stream.
        if order.epoch_start(1) + order.streams.len() as u64 > u64::from(u32::MAX) {
            let reason = "an epoch has more than 4,294,967,295 micro-batches; lower the repeats \
                          or raise the micro-batch";
            return Err(invalid("data", reason));
        }
        Ok(order)
    }

    /// Hex BLAKE3 of everything that the order depends on. Two runs with the same hash train on the
    /// same samples.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The settings that it was built with.
    pub fn settings(&self) -> &OrderSettings {
        &self.settings
    }

    /// Lanes that slots are dealt to.
    pub fn lanes(&self) -> usize {
        self.lanes
    }

    /// All buckets of all data sets.
    pub fn streams(&self) -> &[Stream] {
        &self.streams
    }

    /// The runs that a stream's rows lie in.
    ///
    /// # Panics
    /// In `local` mode, which has no runs.
    pub(crate) fn layout(&self, stream: u32) -> &Layout {
        &self.layouts[stream as usize]
    }

    /// Micro-batches of all epochs before `epoch`.
    pub fn epoch_start(&self, epoch: u64) -> u64 {
        self.streams
            .iter()
            .map(|stream| stream.before_epoch(epoch))
            .sum()
    }

    /// Micro-batches of each stream in `epoch`, in the order of [`Order::streams`].
    pub(crate) fn epoch_counts(&self, epoch: u64) -> impl Iterator<Item = u64> + '_ {
        self.streams
            .iter()
            .map(move |stream| stream.in_epoch(epoch))
    }

    /// The epoch that holds a micro-batch, counted from the start of the run.
    pub fn epoch_of(&self, micro_batch: u64) -> u64 {
        let mut past = 1;
        while self.epoch_start(past) <= micro_batch {
            past *= 2;
        }
        // Bisect for the last epoch that starts at or before it. An epoch can be empty if repeats
        // are below 1.
        let mut first = past / 2;
        while past - first > 1 {
            let middle = first + (past - first) / 2;
            if self.epoch_start(middle) <= micro_batch {
                first = middle;
            } else {
                past = middle;
            }
        }
        first
    }

    /// The slots of a step that a rank runs, in ascending order.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are more ranks than lanes, with a number of lanes that works.
    pub fn slots_of(&self, rank: RankOf) -> Result<Vec<u32>> {
        self.check_ranks(rank)?;
        let is_mine = |slot: &u32| (*slot as usize % self.lanes) % rank.ranks == rank.rank;
        Ok((0..self.settings.micro_batches as u32)
            .filter(is_mine)
            .collect())
    }

    /// The fraction of the ranks' time spent waiting for those that run one more lane; 0 if R
    /// divides L.
    pub fn idle_share(&self, ranks: usize) -> f64 {
        let busiest = self.lanes.div_ceil(ranks);
        1.0 - self.lanes as f64 / (busiest * ranks) as f64
    }

    fn check_ranks(&self, rank: RankOf) -> Result<()> {
        let RankOf { rank, ranks } = rank;
        if rank >= ranks {
            let reason =
                format!("expected a rank below {ranks}, the number of ranks, found {rank}");
            return Err(invalid("rank", &reason));
        }
        if ranks <= self.lanes {
            return Ok(());
        }
        let micro_batches = self.settings.micro_batches;
        let enough = (ranks..=micro_batches).find(|lanes| micro_batches.is_multiple_of(*lanes));
        let advice = match enough {
            None => format!(
                "no number of lanes works: a step has {micro_batches} micro-batches; raise \
                 them to {ranks} or more"
            ),
            Some(lanes) => {
                format!("set lanes = {lanes} (a new order: a run that has begun cannot change it)")
            }
        };
        let lanes = self.lanes;
        let reason = format!("{ranks} ranks cannot share {lanes} lanes; {advice}");
        Err(invalid("lanes", &reason))
    }
}

/// Streams, and the layout of each in `window` and `owned` mode.
#[derive(Default)]
struct Streams {
    streams: Vec<Stream>,
    layouts: Vec<Layout>,
}

impl Streams {
    /// The streams of `data`, in the order of its buckets.
    fn of(data: &[DataShape], settings: &OrderSettings, lanes: usize) -> Result<Self> {
        let repeats = resolve_repeats(data)?;
        let mut streams = Self::default();
        for ((index, shape), repeats_millionths) in (0..).zip(data).zip(repeats) {
            for bucket in &shape.buckets {
                if bucket.rows > 0 {
                    let whole = stream(index, bucket, repeats_millionths, settings)?;
                    streams.add(whole, bucket, settings, lanes);
                }
            }
        }
        Ok(streams)
    }

    /// Adds the bucket `whole`, in `owned` mode as its shares and their remainder.
    fn add(&mut self, whole: Stream, bucket: &BucketRows, settings: &OrderSettings, lanes: usize) {
        if !settings.mode.has_windows() {
            self.streams.push(whole);
            return;
        }
        let end = bucket.run_ends.last().copied().map(u64::from);
        assert_eq!(end, Some(bucket.rows), "runs hold all rows");
        let layout = Layout::new(&bucket.run_ends);
        if settings.mode == Mode::Owned {
            let (shares, of_shares) = share::deal(settings.seed, &whole, &layout, lanes);
            self.streams.extend(shares);
            self.layouts.extend(of_shares);
        } else {
            self.streams.push(whole);
            self.layouts.push(layout);
        }
    }
}

fn invalid(what: &str, reason: &str) -> Error {
    Error::Invalid {
        what: what.to_owned(),
        reason: reason.to_owned(),
    }
}

fn check_sizes(settings: &OrderSettings) -> Result<()> {
    if settings.mode == Mode::Auto {
        let reason = "expected \"local\", \"window\" or \"owned\": only the loader can choose";
        return Err(invalid("mode", reason));
    }
    let sizes = [
        ("micro_batch", settings.micro_batch as u64),
        ("micro_batches", settings.micro_batches as u64),
        ("window_samples", settings.window_samples),
    ];
    for (what, size) in sizes {
        if size == 0 || size > u64::from(u32::MAX) {
            let reason = format!("expected 1 to 4,294,967,295, found {size}");
            return Err(invalid(what, &reason));
        }
    }
    Ok(())
}

fn resolve_lanes(micro_batches: usize, lanes: Option<usize>) -> Result<usize> {
    let divides = |lanes: &usize| *lanes > 0 && micro_batches.is_multiple_of(*lanes);
    match lanes {
        None => Ok((1..=64).rev().find(divides).expect("1 divides everything")),
        Some(lanes) if divides(&lanes) => Ok(lanes),
        Some(lanes) => {
            let reason =
                format!("expected a divisor of micro_batches = {micro_batches}, found {lanes}");
            Err(invalid("lanes", &reason))
        }
    }
}

/// Passes per epoch of each data set, in millionths: whole numbers, so that counts are exact in
/// every epoch.
fn resolve_repeats(data: &[DataShape]) -> Result<Vec<u64>> {
    if data.is_empty() {
        let reason = "expected at least one data set, found none";
        return Err(invalid("data", reason));
    }
    if let Some(empty) = data.iter().position(|shape| shape.num_samples() == 0) {
        let reason = "the data set has no training samples; prepare it again";
        return Err(invalid(&format!("data[{empty}]"), reason));
    }
    check_shares(data)?;
    let all: f64 = data.iter().map(|shape| shape.num_samples() as f64).sum();
    let mut repeats = Vec::with_capacity(data.len());
    for (index, shape) in data.iter().enumerate() {
        repeats.push(match shape.amount {
            Amount::Repeats(repeats) => {
                millionths(&format!("data[{index}].repeats"), repeats, repeats)?
            }
            Amount::Share(share) => {
                let repeats = share * all / shape.num_samples() as f64;
                millionths(&format!("data[{index}].share"), share, repeats)?
            }
        });
    }
    Ok(repeats)
}

/// Checks that either no data set has a share, or all have one and the shares sum to 1.
fn check_shares(data: &[DataShape]) -> Result<()> {
    let mut num_shares = 0;
    let mut sum = 0.0f64;
    for shape in data {
        if let Amount::Share(share) = shape.amount {
            num_shares += 1;
            sum += share;
        }
    }
    if num_shares > 0 && (num_shares != data.len() || (sum - 1.0).abs() >= 1e-6) {
        let reason = format!(
            "expected a share for each of the {} data sets or for none, summing to 1; found \
             {num_shares} that sum to {sum}",
            data.len()
        );
        return Err(invalid("data.share", &reason));
    }
    Ok(())
}

fn millionths(what: &str, value: f64, repeats: f64) -> Result<u64> {
    let rounded = (repeats * MILLION as f64).round();
    if value > 0.0 && (1.0..1e15).contains(&rounded) {
        return Ok(rounded as u64);
    }
    let reason =
        format!("{value} means {repeats} passes per epoch; expected a millionth to a billion");
    Err(invalid(what, &reason))
}

fn stream(
    data: u32,
    bucket: &BucketRows,
    repeats_millionths: u64,
    settings: &OrderSettings,
) -> Result<Stream> {
    let &BucketRows { bucket, rows, .. } = bucket;
    if rows > u64::from(u32::MAX) {
        let reason = format!("expected at most 4,294,967,295 samples in a bucket, found {rows}");
        return Err(invalid(&format!("data[{data}], bucket {bucket}"), &reason));
    }
    // A share becomes a stream of its own, derived from this one.
    let mode = if settings.mode == Mode::Owned {
        Mode::Window
    } else {
        settings.mode
    };
    Ok(Stream {
        data,
        bucket,
        rows,
        size: rows.min(settings.micro_batch as u64) as u32,
        window: window_len(rows, mode, settings),
        repeats_millionths,
        mode,
        lane: None,
    })
}

/// Micro-batches of a window of a bucket with `rows` samples.
fn window_len(rows: u64, mode: Mode, settings: &OrderSettings) -> u64 {
    let size = rows.min(settings.micro_batch as u64);
    match mode {
        Mode::Window if size == settings.micro_batch as u64 => {
            let step = lcm(u64::from(BLOCK_ROWS), size);
            (settings.window_samples / step).max(1) * step / size
        }
        Mode::Window => 1,
        _ => (settings.window_samples.min(rows) / size).max(1),
    }
}

/// Hash of everything that decides a sample's place, as JSON with its fields in a fixed order.
fn hash(data: &[DataShape], settings: &OrderSettings, lanes: usize, streams: &[Stream]) -> String {
    #[derive(Serialize)]
    struct Ingredients<'a> {
        version: u32,
        settings: &'a OrderSettings,
        lanes: usize,
        data: Vec<(&'a str, &'a str)>,
        streams: &'a [Stream],
    }
    // An explicit number of lanes and the same default number result in the same order.
    let settings = &OrderSettings {
        lanes: Some(lanes),
        ..settings.clone()
    };
    let data = data
        .iter()
        .map(|shape| (shape.identity.as_str(), shape.text.as_str()))
        .collect();
    let ingredients = Ingredients {
        version: 1,
        settings,
        lanes,
        data,
        streams,
    };
    let json = serde_json::to_vec(&ingredients).expect("numbers and strings have a JSON form");
    blake3::hash(&json).to_hex().to_string()
}
