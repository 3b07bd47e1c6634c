//! The parts of a loader: its order, its data sets, and the bytes that they need.
//!
//! All of it is fixed when the loader is constructed; the reading thread shares it and changes
//! nothing.

use std::{ops::Range, sync::Arc};

use crate::{
    dataset::{BucketShape, Dataset, MEMORY_BYTES},
    error::{Error, Result},
    format::{block_table::BLOCK_ROWS, manifest::Split},
    load::{
        batch::{Batcher, Members, Source},
        next_use::NextUses,
    },
    order::{
        BucketRows, DataShape, Order, OrderSettings, RankOf,
        epoch::StepPlan,
        lanes::open_windows,
        pass::RUN_BLOCKS,
        stream::{Mode, Slot, Stream},
        window::RowRef,
    },
    text::token,
};

/// Everything that the steps of one rank are read from.
#[derive(Debug)]
pub(crate) struct LoaderSetup {
    pub(crate) order: Arc<Order>,
    pub(crate) batcher: Batcher,
    pub(crate) rank: RankOf,
    /// The slots of this rank.
    pub(crate) slots: Vec<u32>,
    /// Limit in bytes of what `window` and `owned` mode hold at once.
    pub(crate) read_ahead_bytes: u64,
    /// When this machine needs each block, if a cache uses it.
    pub(crate) uses: Option<Arc<NextUses>>,
}

impl LoaderSetup {
    /// The setup of `rank`, for the training samples of `sources`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the settings, the amounts or the number of ranks cannot work, or the
    /// data sets were encoded by different VAEs.
    pub(crate) fn new(sources: Vec<Source>, settings: OrderSettings, rank: RankOf) -> Result<Self> {
        check_sources(&sources)?;
        // The order.
        let mode = if settings.mode == Mode::Auto {
            choose_mode(&sources)
        } else {
            settings.mode
        };
        let shapes: Vec<DataShape> = sources.iter().map(|source| shape(source, mode)).collect();
        let order = Arc::new(Order::new(&shapes, OrderSettings { mode, ..settings })?);
        // This rank's part of it, and the bytes that it needs.
        let slots = order.slots_of(rank)?;
        let lanes = lanes_of(&order, rank.ranks, rank.rank..rank.rank + 1);
        let read_ahead_bytes = if mode.has_windows() {
            needed_bytes(&order, &sources, lanes.len()).1
        } else {
            0
        };
        let uses = next_uses(&order, &sources, lanes);
        let batcher = Batcher::new(sources, Split::Train, order.settings().seed);
        Ok(Self {
            order,
            batcher,
            rank,
            slots,
            read_ahead_bytes,
            uses,
        })
    }

    /// The same setup on a machine that runs `ranks`.
    pub(crate) fn on_machine_with(self, ranks: Range<usize>) -> Self {
        let lanes = lanes_of(&self.order, self.rank.ranks, ranks);
        let uses = next_uses(&self.order, self.batcher.sources(), lanes);
        Self { uses, ..self }
    }

    /// The smallest read-ahead limit in bytes: 0 in `local` mode.
    pub(crate) fn least_read_ahead_bytes(&self) -> u64 {
        if !self.order.settings().mode.has_windows() {
            return 0;
        }
        needed_bytes(&self.order, self.batcher.sources(), self.lanes().len()).0
    }

    /// Lanes that this rank runs.
    pub(crate) fn lanes(&self) -> Vec<usize> {
        let RankOf { rank, ranks } = self.rank;
        lanes_of(&self.order, ranks, rank..rank + 1)
    }

    /// Checks that `owned` mode has the disk space that it needs.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the bytes that are enough.
    pub(crate) fn check_cache(&self) -> Result<()> {
        let sources = self.batcher.sources();
        let mut caches = Vec::new();
        for source in sources {
            if source.dataset.is_remote() {
                caches.push(source.dataset.cache());
            }
        }
        if self.order.settings().mode != Mode::Owned || caches.is_empty() {
            return Ok(());
        }
        let lanes = self.lanes();
        let least = lanes.len() as u64 * largest_window(&self.order, sources);
        let all = self.remote_bytes(&lanes);
        let caches: Option<Vec<_>> = caches.into_iter().collect();
        let Some(caches) = caches else {
            return Err(cache_error(format!(
                "mode \"owned\" keeps blocks on a local disk: set a cache folder and at least \
                 {least} bytes, better {all}, which hold everything that this rank reads; or use \
                 mode \"window\""
            )));
        };
        check_limit(caches[0].cache.limit_bytes(), least, all)
    }

    /// Bytes at URLs that some lanes read: their shares, and everything that is not shared.
    fn remote_bytes(&self, lanes: &[usize]) -> u64 {
        let mut num_bytes = 0.0;
        for stream in self.order.streams() {
            let is_mine = stream
                .lane
                .is_none_or(|lane| lanes.contains(&(lane as usize)));
            let dataset = self.dataset(stream.data);
            if is_mine && dataset.is_remote() {
                let buckets = dataset.buckets(Split::Train);
                let rows: u64 = buckets.iter().map(|bucket| bucket.num_rows).sum();
                let all = dataset.num_bytes(Split::Train) as f64;
                num_bytes += all * stream.rows as f64 / rows as f64;
            }
        }
        num_bytes as u64
    }

    /// The stream of a slot.
    pub(crate) fn stream(&self, slot: &Slot) -> &Stream {
        &self.order.streams()[slot.stream as usize]
    }

    /// A data set of the run.
    pub(crate) fn dataset(&self, data: u32) -> &Arc<Dataset> {
        &self.batcher.source(data).dataset
    }

    /// This rank's slots of a step.
    pub(crate) fn slots_of<'a>(&'a self, plan: &'a StepPlan) -> impl Iterator<Item = Slot> + 'a {
        self.slots.iter().map(|&slot| plan.slots[slot as usize])
    }

    pub(crate) fn count(&self, stream: &Stream, row_refs: &[RowRef]) -> Result<Vec<u8>> {
        self.batcher.count(stream.data, stream.bucket, row_refs)
    }

    pub(crate) fn members(&self, slot: &Slot, row_refs: Vec<RowRef>) -> Members {
        let stream = self.stream(slot);
        Members {
            slot: slot.slot,
            first_sample: slot.first_sample,
            data: stream.data,
            bucket: stream.bucket,
            row_refs,
        }
    }
}

/// Checks that a cache of at most `limit` bytes has room for `least`, and warns if it has less than
/// `all`.
fn check_limit(limit: u64, least: u64, all: u64) -> Result<()> {
    if limit < least.min(all) {
        return Err(cache_error(format!(
            "expected room for at least one window per lane, {least} bytes, found a limit of \
             {limit}; allow more (this rank reads {all} bytes in total), lower window_samples, or \
             use mode \"window\""
        )));
    }
    if limit < all {
        tracing::warn!(
            limit,
            all,
            "the cache is smaller than the shares of this rank's lanes: blocks are fetched \
             repeatedly; mode \"window\" fetches each once per epoch"
        );
    }
    Ok(())
}

fn cache_error(reason: String) -> Error {
    Error::Invalid {
        what: "cache".to_owned(),
        reason,
    }
}

fn check_sources(sources: &[Source]) -> Result<()> {
    for (index, source) in sources.iter().enumerate() {
        source.prompt.check()?;
        let codec = &source.dataset.manifest().codec;
        let first = &sources[0].dataset.manifest().codec;
        if codec != first {
            let reason = format!(
                "encoded by {codec:?}, but data[0] by {first:?}; prepare both with the same VAE"
            );
            return Err(Error::Invalid {
                what: format!("data[{index}]"),
                reason,
            });
        }
    }
    Ok(())
}

/// `window` if the data sets at a URL are together larger than [`MEMORY_BYTES`], otherwise `local`.
fn choose_mode(sources: &[Source]) -> Mode {
    let remote = sources.iter().filter(|source| source.dataset.is_remote());
    let num_bytes: u64 = remote
        .map(|source| source.dataset.num_bytes(Split::Train))
        .sum();
    if num_bytes > MEMORY_BYTES {
        Mode::Window
    } else {
        Mode::Local
    }
}

/// Lanes that `ranks`, some of `num_ranks` ranks, run.
fn lanes_of(order: &Order, num_ranks: usize, ranks: Range<usize>) -> Vec<usize> {
    (0..order.lanes())
        .filter(|lane| ranks.contains(&(lane % num_ranks)))
        .collect()
}

/// The next uses for a full cache to evict by. None without a cache, and in `local` mode.
fn next_uses(order: &Arc<Order>, sources: &[Source], lanes: Vec<usize>) -> Option<Arc<NextUses>> {
    let datasets: Vec<Arc<Dataset>> = sources
        .iter()
        .map(|source| source.dataset.clone())
        .collect();
    let has_cache = datasets.iter().any(|dataset| dataset.cache().is_some());
    if has_cache && order.settings().mode.has_windows() {
        Some(NextUses::new(order, datasets, lanes))
    } else {
        None
    }
}

fn shape(source: &Source, mode: Mode) -> DataShape {
    let mut buckets = Vec::new();
    for BucketShape {
        bucket, num_rows, ..
    } in source.dataset.buckets(Split::Train)
    {
        let run_ends = if mode.has_windows() && num_rows <= u64::from(u32::MAX) {
            let index = source.dataset.index();
            index.run_ends(Split::Train, bucket, RUN_BLOCKS)
        } else {
            Vec::new()
        };
        buckets.push(BucketRows {
            bucket,
            rows: num_rows,
            run_ends,
        });
    }
    let prompt = serde_json::to_string(&source.prompt).expect("prompt settings are plain data");
    DataShape {
        identity: source.dataset.identity(),
        text: format!("{} {prompt}", token::fingerprint()),
        amount: source.amount,
        buckets,
    }
}

/// Bytes of the largest window, as whole blocks.
fn largest_window(order: &Order, sources: &[Source]) -> u64 {
    let streams = order.streams().iter();
    streams
        .map(|stream| largest_window_of(stream, &sources[stream.data as usize].dataset))
        .max()
        .unwrap_or(0)
}

fn largest_window_of(stream: &Stream, dataset: &Dataset) -> u64 {
    // The last window of a pass is up to a micro-batch longer, and a window can begin and end in
    // the middle of a block.
    let samples = ((stream.window + 1) * u64::from(stream.size)).min(stream.rows);
    // Blocks still contain their deleted rows.
    let index = dataset.index();
    let num_stored = index.num_stored(Split::Train, stream.bucket);
    let stored = num_stored as f64 / index.num_rows(Split::Train, stream.bucket) as f64;
    let rows = (samples as f64 * stored).ceil() as u64;
    (rows.div_ceil(BLOCK_ROWS.into()) + 3) * dataset.largest_block(Split::Train, stream.bucket)
}

/// Bytes that the windows of `num_lanes` lanes take when all that can be open are open; and the
/// same with one more window per lane to read ahead. The first is the least that a loader must
/// hold, the second the default.
fn needed_bytes(order: &Order, sources: &[Source], num_lanes: usize) -> (u64, u64) {
    let window = largest_window(order, sources);
    let open = (num_lanes * open_windows(order.lanes())) as u64;
    (open * window, (open + num_lanes as u64) * window)
}
