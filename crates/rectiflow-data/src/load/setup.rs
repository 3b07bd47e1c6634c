//! The parts of a loader: its order, its data sets, and the bytes that they need.
//!
//! All of it is fixed when the loader is constructed; the reading thread shares it and changes
//! nothing.

use std::{ops::Range, sync::Arc};

use crate::{
    dataset::{BucketShape, MEMORY_BYTES},
    error::{Error, Result},
    format::{block_table::BLOCK_ROWS, manifest::Split},
    load::{
        batch::{Batcher, Members, Source},
        next_use::NextUses,
    },
    order::{
        BucketRows, DataShape, Order, OrderSettings, RankOf,
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
        let mode = if settings.mode == Mode::Auto {
            choose_mode(&sources)
        } else {
            settings.mode
        };
        let shapes: Vec<DataShape> = sources.iter().map(|source| shape(source, mode)).collect();
        let order = Arc::new(Order::new(&shapes, OrderSettings { mode, ..settings })?);
        let slots = order.slots_of(rank)?;
        let lanes = lanes_of(&order, rank.ranks, rank.rank..rank.rank + 1);
        let has_windows = order.settings().mode.has_windows();
        let read_ahead_bytes = if has_windows {
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
    fn lanes(&self) -> Vec<usize> {
        let RankOf { rank, ranks } = self.rank;
        lanes_of(&self.order, ranks, rank..rank + 1)
    }

    /// Checks that `owned` mode has the disk space that it needs.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the bytes that are enough.
    pub(crate) fn check_cache(&self) -> Result<()> {
        let sources = self.batcher.sources();
        let remote: Vec<&Source> = sources
            .iter()
            .filter(|source| source.dataset.is_remote())
            .collect();
        if self.order.settings().mode != Mode::Owned || remote.is_empty() {
            return Ok(());
        }
        let lanes = self.lanes();
        let least = lanes.len() as u64 * largest_window(&self.order, sources);
        let all = self.remote_bytes(&lanes);
        let what = "cache".to_owned();
        let Some(cache) = remote
            .iter()
            .map(|source| source.dataset.cache())
            .collect::<Option<Vec<_>>>()
        else {
            let reason = format!(
                "mode \"owned\" keeps blocks on a local disk: set a cache folder and at least \
                 {least} bytes, better {all}, which hold everything that this rank reads; or use \
                 mode \"window\""
            );
            return Err(Error::Invalid { what, reason });
        };
        let limit = cache[0].cache.limit_bytes();
        if limit < least.min(all) {
            let reason = format!(
                "expected room for at least one window per lane, {least} bytes, found a limit of \
                 {limit}; allow more (this rank reads {all} bytes in total), lower \
                 window_samples, or use mode \"window\""
            );
            return Err(Error::Invalid { what, reason });
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

    /// Bytes at URLs that some lanes read: their shares, and everything that is not shared.
    fn remote_bytes(&self, lanes: &[usize]) -> u64 {
        let sources = self.batcher.sources();
        let is_read = |stream: &&Stream| {
            let is_mine = stream
                .lane
                .is_none_or(|lane| lanes.contains(&(lane as usize)));
            is_mine && sources[stream.data as usize].dataset.is_remote()
        };
        let bytes = |stream: &Stream| {
            let dataset = &sources[stream.data as usize].dataset;
            let rows: u64 = dataset
                .buckets(Split::Train)
                .iter()
                .map(|bucket| bucket.num_rows)
                .sum();
            dataset.num_bytes(Split::Train) as f64 * stream.rows as f64 / rows as f64
        };
        self.order
            .streams()
            .iter()
            .filter(is_read)
            .map(bytes)
            .sum::<f64>() as u64
    }

    pub(crate) fn count(&self, stream: &Stream, row_refs: &[RowRef]) -> Result<Vec<u8>> {
        self.batcher.count(stream.data, stream.bucket, row_refs)
    }

    pub(crate) fn members(&self, slot: &Slot, row_refs: Vec<RowRef>) -> Members {
        let stream = self.order.streams()[slot.stream as usize];
        let (data, bucket) = (stream.data, stream.bucket);
        Members {
            slot: slot.slot,
            first_sample: slot.first_sample,
            data,
            bucket,
            row_refs,
        }
    }
}

fn check_sources(sources: &[Source]) -> Result<()> {
    for (index, source) in sources.iter().enumerate() {
        source.prompt.check()?;
        let (codec, first) = (
            &source.dataset.manifest().codec,
            &sources[0].dataset.manifest().codec,
        );
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
    let has_cache = sources
        .iter()
        .any(|source| source.dataset.cache().is_some());
    let datasets = || {
        sources
            .iter()
            .map(|source| source.dataset.clone())
            .collect()
    };
    (has_cache && order.settings().mode.has_windows())
        .then(|| NextUses::new(order, datasets(), lanes))
}

fn shape(source: &Source, mode: Mode) -> DataShape {
    let buckets = source.dataset.buckets(Split::Train);
    let rows = buckets.iter().map(|shape| {
        let &BucketShape {
            bucket,
            num_rows: rows,
            ..
        } = shape;
        let windowed = mode.has_windows() && rows <= u64::from(u32::MAX);
        let run_ends = windowed.then(|| {
            source
                .dataset
                .index()
                .run_ends(Split::Train, bucket, RUN_BLOCKS)
        });
        BucketRows {
            bucket,
            rows,
            run_ends: run_ends.unwrap_or_default(),
        }
    });
    let prompt = serde_json::to_string(&source.prompt).expect("prompt settings are plain data");
    DataShape {
        identity: source.dataset.identity(),
        text: format!("{} {prompt}", token::fingerprint()),
        amount: source.amount,
        buckets: rows.collect(),
    }
}

/// Bytes of the largest window, as whole blocks.
fn largest_window(order: &Order, sources: &[Source]) -> u64 {
    let largest = |stream: &Stream| {
        let dataset = &sources[stream.data as usize].dataset;
        // The last window of a pass is up to a micro-batch longer, and a window can begin and end
        // in the middle of a block.
        let samples = ((stream.window + 1) * u64::from(stream.size)).min(stream.rows);
        // Blocks still contain their deleted rows.
        let index = dataset.index();
        let num_stored = index.num_stored(Split::Train, stream.bucket);
        let stored = num_stored as f64 / index.num_rows(Split::Train, stream.bucket) as f64;
        let rows = (samples as f64 * stored).ceil() as u64;
        (rows.div_ceil(BLOCK_ROWS.into()) + 3) * dataset.largest_block(Split::Train, stream.bucket)
    };
    order.streams().iter().map(largest).max().unwrap_or(0)
}

/// Bytes that the windows of `num_lanes` lanes take when all that can be open are open; and the
/// same with one more window per lane to read ahead. The first is the least that a loader must
/// hold, the second the default.
fn needed_bytes(order: &Order, sources: &[Source], num_lanes: usize) -> (u64, u64) {
    let window = largest_window(order, sources);
    let open = (num_lanes * open_windows(order.lanes())) as u64;
    (open * window, (open + num_lanes as u64) * window)
}
