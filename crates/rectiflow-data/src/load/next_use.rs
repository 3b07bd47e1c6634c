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
    format::{block_table::BLOCK_ROWS, manifest::Split},
    order::{
        Order,
        lanes::beginnings,
        stream::{Mode, Piece},
        window::Windows,
    },
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
        let mut data = Vec::with_capacity(datasets.len());
        for dataset in datasets {
            data.push(Data::new(dataset, &plan, &mut num_blocks));
        }
        let uses = Arc::new(Self {
            order: order.clone(),
            lanes,
            data,
            now: AtomicU64::new(0),
            tables: Mutex::new(Tables {
                windows: Windows::new(order.clone()),
                epochs: Vec::new(),
            }),
        });
        for data in &uses.data {
            if let Some(cache) = data.dataset.cache() {
                cache.plan_with(&uses);
            }
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
        let mut claims = self.data.iter().flat_map(|data| &data.claim);
        claims.any(|claim| claim.mark == mark)
    }

    /// Considers the steps whose windows have not been requested, in this epoch and the next. In
    /// `window` mode returns 0 in place of any later step.
    fn next(&self, folder: &str, object: usize, block: u32, step: u64) -> Option<u64> {
        let after = step.max(self.now.load(Ordering::Relaxed).saturating_sub(1));
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let mut soonest: Option<u64> = None;
        for data in &self.data {
            if data.has(folder)
                && let Some(first) = data.first_block.get(object)
                && let Some(next) = tables.next(self, first + block, after)
            {
                soonest = Some(soonest.map_or(next, |soonest| soonest.min(next)));
            }
        }
        if self.order.settings().mode == Mode::Window {
            soonest.and(Some(0))
        } else {
            soonest
        }
    }
}

impl Data {
    /// A data set, whose blocks are numbered from `num_blocks`, which this increases.
    fn new(dataset: Arc<Dataset>, plan: &str, num_blocks: &mut u32) -> Self {
        let mut first_block = Vec::new();
        for object in &dataset.manifest().objects {
            first_block.push(*num_blocks);
            *num_blocks += object.num_blocks();
        }
        let claim = dataset.cache().and_then(|cache| cache.claim(plan));
        Self {
            dataset,
            first_block,
            claim,
        }
    }

    fn has(&self, folder: &str) -> bool {
        self.dataset
            .cache()
            .is_some_and(|cache| cache.name() == folder)
    }

    /// Number of the block with a row of a bucket, among the blocks of all data sets.
    fn block_of(&self, bucket: u32, row: u32) -> u32 {
        let (object, row) = self
            .dataset
            .locate(Split::Train, bucket, row.into())
            .expect("the order was built from the rows of these data sets");
        self.first_block[object] + row / BLOCK_ROWS
    }
}

impl Tables {
    fn next(&mut self, uses: &NextUses, block: u32, after: u64) -> Option<u64> {
        let known = self
            .epochs
            .iter()
            .find(|epoch| (epoch.start..epoch.end).contains(&after));
        let first = match known {
            Some(epoch) => epoch.epoch,
            None => {
                let micro_batches = uses.order.settings().micro_batches as u64;
                uses.order.epoch_of((after + 1) * micro_batches - 1)
            }
        };
        (first..first + 2).find_map(|epoch| self.epoch(uses, epoch).next(block, after))
    }

    fn epoch(&mut self, uses: &NextUses, number: u64) -> &Epoch {
        let known = self.epochs.iter().position(|epoch| epoch.epoch == number);
        if let Some(at) = known {
            return &self.epochs[at];
        }
        self.epochs
            .retain(|epoch| epoch.epoch + EPOCHS_KEPT as u64 > number);
        if self.epochs.len() == EPOCHS_KEPT {
            self.epochs.remove(0);
        }
        let epoch = Epoch::new(uses, &mut self.windows, number);
        self.epochs.push(epoch);
        &self.epochs[self.epochs.len() - 1]
    }
}

impl Epoch {
    fn new(uses: &NextUses, windows: &mut Windows, epoch: u64) -> Self {
        let order = &uses.order;
        let micro_batches = order.settings().micro_batches as u64;
        let start = order.epoch_start(epoch) / micro_batches;
        let end = order.epoch_start(epoch + 1) / micro_batches;
        let mut found = Vec::new();
        for (micro_batch, lane, piece) in beginnings(order, epoch) {
            if uses.lanes.contains(&lane) {
                let step = (micro_batch / micro_batches - start) as u32;
                for block in blocks_of(uses, windows, &piece) {
                    found.push((block, step));
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

    /// The first step after `after`, in this epoch, that needs a block.
    fn next(&self, block: u32, after: u64) -> Option<u64> {
        let from = (after + 1).saturating_sub(self.start);
        let at = self
            .uses
            .partition_point(|&(of, step)| (of, u64::from(step)) < (block, from));
        let &(of, step) = self.uses.get(at)?;
        (of == block).then(|| self.start + u64::from(step))
    }
}

/// Numbers of the blocks with the rows of a window, among the blocks of all data sets.
fn blocks_of(uses: &NextUses, windows: &mut Windows, piece: &Piece) -> Vec<u32> {
    let stream = &uses.order.streams()[piece.stream as usize];
    let data = &uses.data[stream.data as usize];
    let mut blocks = Vec::new();
    for row_ref in windows.row_refs_of(piece) {
        let block = data.block_of(stream.bucket, row_ref.row);
        // In a window of blocks consecutive rows share a block: this keeps the list short.
        if blocks.last() != Some(&block) {
            blocks.push(block);
        }
    }
    blocks
}
