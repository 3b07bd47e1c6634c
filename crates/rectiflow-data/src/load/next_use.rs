//! When this machine needs each block next: a full cache evicts by it.
//!
//! The order is known, so the block whose next use is farthest away is evicted first (Belady's
//! rule), and a block that is needed later than all cached ones is not kept at all. This pays off
//! in `owned` mode, where a block is used many times per epoch, one row at a time. In `window` mode
//! each block is used once per epoch, and no eviction rule finds more blocks than the cache held
//! when the epoch began. There a block that is needed soon counts as needed now and stays: the disk
//! is not rewritten over and over, and its savings spread over the epoch.
//!
//! A use is the step in which the first micro-batch of a window with rows of that block is due, in
//! any lane that runs on this machine. Uses are kept in one table per epoch, computed on the first
//! lookup: 8 bytes for each block of each window, and only when space is short. Does no I/O.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use crate::{
    cache::{Claim, evict::NextUse},
    dataset::Dataset,
    format::{
        block_table::BLOCK_ROWS,
        manifest::{Object, Split},
    },
    order::{Order, lanes::beginnings, stream::Mode, window::Windows},
};

/// Tables kept: of the current epoch, of the next one, and of one more for a lookup that lags
/// behind or runs ahead.
const EPOCHS_KEPT: usize = 3;

/// The uses of blocks in some lanes of an order.
#[derive(Debug)]
pub(crate) struct NextUses {
    order: Arc<Order>,
    lanes: Vec<usize>,
    data: Vec<Data>,
    /// The step whose windows are being requested.
    now: AtomicU64,
    tables: Mutex<Tables>,
}

#[derive(Debug)]
struct Data {
    dataset: Arc<Dataset>,
    /// Number of each object's first block among the blocks of all data sets.
    first_block: Vec<u32>,
    /// Tells other processes, as long as it lives, that a plan uses this data set.
    claim: Option<Claim>,
}

#[derive(Debug)]
struct Tables {
    windows: Windows,
    epochs: Vec<Epoch>,
}

#[derive(Debug)]
struct Epoch {
    epoch: u64,
    /// The steps in which this epoch and the next one begin. If two epochs share a step, the
    /// earlier one has no use after it.
    start: u64,
    end: u64,
    /// Block, and step relative to `start`; sorted.
    uses: Vec<(u32, u32)>,
}

impl NextUses {
    /// The uses by `lanes` of the blocks of `datasets`, the data sets of `order`.
    pub(crate) fn new(
        order: &Arc<Order>,
        datasets: Vec<Arc<Dataset>>,
        lanes: Vec<usize>,
    ) -> Arc<Self> {
        let plan = format!("{} {lanes:?}", order.hash());
        let mut num_blocks = 0;
        let data = datasets.into_iter().map(|dataset| {
            let first = |object: &Object| {
                num_blocks += object.num_blocks();
                num_blocks - object.num_blocks()
            };
            let first_block = dataset.manifest().objects.iter().map(first).collect();
            let claim = dataset.cache().and_then(|cache| cache.claim(&plan));
            Data {
                dataset,
                first_block,
                claim,
            }
        });
        let data: Vec<Data> = data.collect();
        let tables = Mutex::new(Tables {
            windows: Windows::new(order.clone()),
            epochs: Vec::new(),
        });
        let uses = Arc::new(Self {
            order: order.clone(),
            lanes,
            data,
            now: AtomicU64::new(0),
            tables,
        });
        for data in &uses.data {
            data.dataset
                .cache()
                .into_iter()
                .for_each(|cache| cache.plan_with(&uses));
        }
        uses
    }

    /// Records that the windows of all steps before `step` have been requested.
    pub(crate) fn advance(&self, step: u64) {
        self.now.store(step, Ordering::Relaxed);
    }
}

impl NextUse for NextUses {
    fn knows(&self, folder: &str) -> bool {
        self.data.iter().any(|data| data.has(folder))
    }

    fn claims(&self, mark: &str) -> bool {
        self.data
            .iter()
            .filter_map(|data| data.claim.as_ref())
            .any(|claim| claim.mark == mark)
    }

    /// Considers the steps whose windows have not been requested, in this epoch and the next. In
    /// `window` mode returns 0 in place of any later step.
    fn next(&self, folder: &str, object: usize, block: u32, step: u64) -> Option<u64> {
        let after = step.max(self.now.load(Ordering::Relaxed).saturating_sub(1));
        let data = self.data.iter().filter(|data| data.has(folder));
        let blocks = data.filter_map(|data| Some(data.first_block.get(object)? + block));
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let next = blocks
            .filter_map(|block| tables.next(self, block, after))
            .min();
        if self.order.settings().mode == Mode::Window {
            next.map(|_| 0)
        } else {
            next
        }
    }
}

impl Data {
    fn has(&self, folder: &str) -> bool {
        self.dataset
            .cache()
            .is_some_and(|cache| cache.name() == folder)
    }
}

impl Tables {
    fn next(&mut self, uses: &NextUses, block: u32, after: u64) -> Option<u64> {
        let first = match self
            .epochs
            .iter()
            .find(|epoch| (epoch.start..epoch.end).contains(&after))
        {
            Some(epoch) => epoch.epoch,
            None => uses
                .order
                .epoch_of((after + 1) * uses.order.settings().micro_batches as u64 - 1),
        };
        (first..first + 2).find_map(|epoch| self.epoch(uses, epoch).next(block, after))
    }

    fn epoch(&mut self, uses: &NextUses, number: u64) -> &Epoch {
        let known = self
            .epochs
            .iter()
            .position(|epoch| epoch.epoch == number)
            .unwrap_or_else(|| {
                self.epochs
                    .retain(|epoch| epoch.epoch + EPOCHS_KEPT as u64 > number);
                if self.epochs.len() == EPOCHS_KEPT {
                    self.epochs.remove(0);
                }
                self.epochs
                    .push(Epoch::new(uses, &mut self.windows, number));
                self.epochs.len() - 1
            });
        &self.epochs[known]
    }
}

impl Epoch {
    fn new(uses: &NextUses, windows: &mut Windows, epoch: u64) -> Self {
        let micro_batches = uses.order.settings().micro_batches as u64;
        let (start, end) = (
            uses.order.epoch_start(epoch),
            uses.order.epoch_start(epoch + 1),
        );
        let (start, end) = (start / micro_batches, end / micro_batches);
        let mut found = Vec::new();
        for (micro_batch, _, piece) in
            beginnings(&uses.order, epoch).filter(|(_, lane, _)| uses.lanes.contains(lane))
        {
            let stream = uses.order.streams()[piece.stream as usize];
            let data = &uses.data[stream.data as usize];
            let before = found.len();
            for row_ref in windows.row_refs_of(&piece) {
                let located = data
                    .dataset
                    .locate(Split::Train, stream.bucket, row_ref.row.into());
                let (object, row) =
                    located.expect("the order was built from the rows of these data sets");
                let block = data.first_block[object] + row / BLOCK_ROWS;
                // In a window of blocks consecutive rows share a block: this keeps `found` short.
                if found.len() == before || found.last().is_some_and(|&(last, _)| last != block) {
                    found.push((block, (micro_batch / micro_batches - start) as u32));
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        Self {
            epoch,
            start,
            end,
            uses: found,
        }
    }

    fn next(&self, block: u32, after: u64) -> Option<u64> {
        let from = (after + 1).saturating_sub(self.start);
        let at = self
            .uses
            .partition_point(|&(of, step)| (of, u64::from(step)) < (block, from));
        let &(of, step) = self.uses.get(at)?;
        (of == block).then(|| self.start + u64::from(step))
    }
}
