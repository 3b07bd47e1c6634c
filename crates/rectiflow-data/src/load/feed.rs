//! Reading in `window` and `owned` mode: windows fetched ahead within a limit in bytes, delivered
//! in order.
//!
//! A scout walks the order ahead of the consumer and finds the windows that this rank needs, in the
//! order in which it needs them. While there is room and the window is needed soon (`horizon`),
//! each is admitted: all requests for its text start at once and complete in any order. Its text is
//! decoded, its prompts are drawn and its samples arranged when its first micro-batch is due, or
//! earlier if its text has arrived. Then all requests for its latents start, whose rows go straight
//! to their micro-batches (`scatter`). Its bytes are released micro-batch by micro-batch. Bytes are
//! reserved before they are requested, so the limit is a hard one. The constructor checks that the
//! limit covers all windows that can be open at once (`setup`), so waiting always ends.

use std::{
    collections::{HashMap, VecDeque},
    sync::atomic::AtomicBool,
    time::Instant,
};

use rayon::prelude::*;

use crate::{
    dataset::{batch_latents::BatchLatents, index::ObjectRow},
    error::Result,
    format::{manifest::Split, record::Record},
    load::{
        batch::{Members, MicroBatch, Step},
        horizon::Horizon,
        incoming_window::{Arranged, IncomingWindow, Wanted},
        setup::LoaderSetup,
    },
    order::{
        epoch::Steps,
        stream::{Mode, Slot},
        window::{RowRef, Windows},
    },
};

/// The scout is at most this many steps ahead.
const STEPS_AHEAD: u64 = 256;

/// Stream, first micro-batch, length.
type WindowKey = (u32, u64, u32);

fn key(slot: &Slot) -> WindowKey {
    (slot.stream, slot.window_first, slot.window_len)
}

/// A micro-batch of which everything has arrived.
struct Due {
    window: WindowKey,
    /// Its number in the window.
    number: usize,
    members: Members,
    /// Its latents, if they were read row by row.
    rows: Option<BatchLatents>,
}

/// Reads the steps of one rank.
#[derive(Debug)]
pub(crate) struct Feed<'a> {
    setup: &'a LoaderSetup,
    /// Set when the steps are no longer wanted.
    stop: &'a AtomicBool,
    steps: Steps,
    scout: Steps,
    /// The next step for the scout.
    scout_step: u64,
    windows: Windows,
    /// Found by the scout and not admitted yet, with the step that needs it.
    waiting: VecDeque<(u64, Slot)>,
    /// What the first of them needs, once computed.
    next_wanted: Option<(Wanted, u64)>,
    admitted: HashMap<WindowKey, IncomingWindow>,
    /// Windows whose text has not been read, in the order in which they are needed.
    unread: VecDeque<Slot>,
    held_bytes: u64,
    horizon: Horizon,
}

impl<'a> Feed<'a> {
    /// The steps from `from` on.
    pub(crate) fn new(setup: &'a LoaderSetup, from: u64, stop: &'a AtomicBool) -> Self {
        let order = &setup.order;
        Self {
            setup,
            stop,
            steps: Steps::new(order.clone()),
            scout: Steps::new(order.clone()),
            scout_step: from,
            windows: Windows::new(order.clone()),
            waiting: VecDeque::new(),
            next_wanted: None,
            admitted: HashMap::new(),
            unread: VecDeque::new(),
            held_bytes: 0,
            horizon: Horizon::new(setup),
        }
    }

    /// Reads one step. Steps must be read one after the other.
    ///
    /// # Errors
    /// The error of a read; after `stop` is set, an error that the caller discards.
    pub(crate) fn step(&mut self, step: u64) -> Result<Step> {
        self.horizon.begin_step(Instant::now());
        let plan = self.steps.plan(step);
        self.admit_needed(step)?;
        let slots: Vec<Slot> = self.setup.slots_of(&plan).collect();
        // All latents are requested before the first are waited for.
        for slot in &slots {
            self.arrange(slot)?;
        }
        let mut due = Vec::with_capacity(slots.len());
        for slot in &slots {
            due.push(self.arrive(slot)?);
        }
        let micro_batches = due
            .into_par_iter()
            .map(|due| self.assemble(due))
            .collect::<Result<_>>()?;
        for slot in &slots {
            self.release(slot);
        }
        // Only now: reading ahead must not slow down this step, above all the first one.
        self.look_ahead(step);
        self.arrange_next();
        Ok(Step {
            step,
            epoch: plan.epoch,
            num_samples: plan.num_samples,
            micro_batches,
        })
    }

    /// Waits for the latents of an arranged slot's micro-batch.
    fn arrive(&mut self, slot: &Slot) -> Result<Due> {
        let members = self.members(slot);
        let dataset = self.setup.dataset(members.data);
        let stop = self.stop;
        let rows = self.window(slot).arrive(dataset, &members, stop)?;
        Ok(Due {
            window: key(slot),
            number: (slot.index - slot.window_first) as usize,
            members,
            rows,
        })
    }

    /// The admitted window of a slot.
    fn window(&mut self, slot: &Slot) -> &mut IncomingWindow {
        self.admitted
            .get_mut(&key(slot))
            .expect("the windows of a step are admitted")
    }

    /// Admits all windows that a step needs. The limit always has room for them.
    fn admit_needed(&mut self, step: u64) -> Result<()> {
        while self.scout_step <= step {
            self.scout();
        }
        while let Some(&(needed, _)) = self.waiting.front()
            && needed <= step
        {
            self.admit_next(u64::MAX)?;
        }
        Ok(())
    }

    /// Admits windows of later steps while there is room. The error of one of them is reported when
    /// it is due.
    fn look_ahead(&mut self, step: u64) {
        loop {
            while self.waiting.is_empty() && self.scout_step <= step + STEPS_AHEAD {
                self.scout();
            }
            let Some(&(needed, slot)) = self.waiting.front() else {
                return;
            };
            let data = self.setup.stream(&slot).data;
            let is_remote = self.setup.dataset(data).is_remote();
            let is_near = self
                .horizon
                .covers(needed - step, slot.window_len, is_remote);
            let room = self.setup.read_ahead_bytes.saturating_sub(self.held_bytes);
            if !is_near || !self.admit_next(room).unwrap_or(false) {
                return;
            }
        }
    }

    /// Admits the window that is needed next if it takes at most `room` bytes. Returns whether it
    /// did.
    fn admit_next(&mut self, room: u64) -> Result<bool> {
        let &(step, slot) = self
            .waiting
            .front()
            .expect("the caller has checked that a window waits");
        let (wanted, num_bytes) = match self.next_wanted.take() {
            Some(wanted) => wanted,
            None => self.wanted(&slot, step)?,
        };
        if num_bytes > room {
            self.next_wanted = Some((wanted, num_bytes));
            return Ok(false);
        }
        self.waiting.pop_front();
        self.admit(slot, step, wanted, num_bytes);
        Ok(true)
    }

    /// Adds the new windows of the scout's next step to the waiting ones.
    fn scout(&mut self) {
        let plan = self.scout.plan(self.scout_step);
        for slot in self.setup.slots_of(&plan) {
            if !self.is_known(&slot) {
                self.waiting.push_back((self.scout_step, slot));
            }
        }
        self.scout_step += 1;
    }

    fn is_known(&self, slot: &Slot) -> bool {
        let key_of_slot = key(slot);
        self.admitted.contains_key(&key_of_slot)
            || self
                .waiting
                .iter()
                .any(|(_, waiting)| key(waiting) == key_of_slot)
    }

    /// What a window needs from its data set, and its size in bytes.
    fn wanted(&mut self, slot: &Slot, step: u64) -> Result<(Wanted, u64)> {
        let stream = self.setup.stream(slot);
        let dataset = self.setup.dataset(stream.data);
        let row_refs = self.windows.row_refs(slot);
        let mut rows = Vec::with_capacity(row_refs.len());
        for RowRef { row, .. } in row_refs {
            rows.push(dataset.locate(Split::Train, stream.bucket, row.into())?);
        }
        if stream.mode == Mode::Owned && stream.owned_pass(slot.window_first) > 0 {
            return Ok(Wanted::rows(dataset, rows));
        }
        Wanted::blocks(dataset, &rows, step)
    }

    fn admit(&mut self, slot: Slot, step: u64, wanted: Wanted, held_bytes: u64) {
        let dataset = self.setup.dataset(self.setup.stream(&slot).data);
        self.held_bytes += held_bytes;
        // Earlier windows count as read: the next use of their blocks is a later one.
        if let Some(uses) = &self.setup.uses {
            uses.advance(step);
        }
        // The scout found the window at its first micro-batch that is still to be delivered. After
        // a seek that is not the window's first.
        let left = slot.window_len - (slot.index - slot.window_first) as u32;
        let window = IncomingWindow::start(dataset, wanted, step, held_bytes, left);
        self.admitted.insert(key(&slot), window);
        self.unread.push_back(slot);
    }

    /// Arranges the next window whose text has arrived, so that a step has less to do when it is
    /// due.
    fn arrange_next(&mut self) {
        while let Some(&slot) = self.unread.front() {
            if self.is_settled(&slot) {
                self.unread.pop_front();
                continue;
            }
            if self.admitted[&key(&slot)].has_text()
                && let Err(error) = self.arrange(&slot)
            {
                self.window(&slot).failure = Some(error);
            }
            return;
        }
    }

    /// Whether a slot's window is arranged, has failed, or has been released.
    fn is_settled(&self, slot: &Slot) -> bool {
        let window = self.admitted.get(&key(slot));
        window.is_none_or(|window| window.arranged.is_some() || window.failure.is_some())
    }

    /// Waits for a window's text, draws its prompts and groups its samples by prompt length.
    fn arrange(&mut self, slot: &Slot) -> Result<()> {
        let setup = self.setup;
        let stop = self.stop;
        let stream = setup.stream(slot);
        let dataset = setup.dataset(stream.data);
        // Text.
        let window = self.window(slot);
        if window.arranged.is_some() {
            return Ok(());
        }
        if let Some(error) = window.failure.take() {
            return Err(error);
        }
        let records = window.read_records(dataset, stop)?;
        let records = self.by_row(slot, records)?;
        // The order of the samples.
        let count = |_: &_, row_refs: &[RowRef]| {
            let batcher = &setup.batcher;
            Ok(batcher.count_of(stream.data, row_refs, |row| &records[&row]))
        };
        let row_refs = self.windows.arranged(slot, count)?;
        // Latents.
        let window = self.window(slot);
        window.arranged = Some(Arranged { row_refs, records });
        window.start_latents(
            dataset,
            stream.bucket,
            slot.size as usize,
            setup.batcher.buffers(),
        )
    }

    /// The records of a window's samples by row of the bucket, taken from `records`.
    fn by_row(
        &mut self,
        slot: &Slot,
        mut records: HashMap<ObjectRow, Record>,
    ) -> Result<HashMap<u32, Record>> {
        let stream = self.setup.stream(slot);
        let dataset = self.setup.dataset(stream.data);
        let row_refs = self.windows.row_refs(slot);
        let mut by_row = HashMap::with_capacity(row_refs.len());
        for RowRef { row, .. } in row_refs {
            let located = dataset.locate(Split::Train, stream.bucket, row.into())?;
            // A window can hold a row twice, from two passes.
            if let Some(record) = records.remove(&located) {
                by_row.insert(row, record);
            }
        }
        Ok(by_row)
    }

    /// The samples of a slot of an arranged window.
    fn members(&self, slot: &Slot) -> Members {
        let arranged = self.admitted[&key(slot)]
            .arranged
            .as_ref()
            .expect("the slot's window is arranged");
        let size = slot.size as usize;
        let within = (slot.index - slot.window_first) as usize * size;
        let row_refs = arranged.row_refs[within..within + size].to_vec();
        self.setup.members(slot, row_refs)
    }

    /// A micro-batch of which everything has arrived.
    fn assemble(&self, due: Due) -> Result<MicroBatch> {
        let Due {
            window,
            number,
            members,
            rows,
        } = due;
        let window = &self.admitted[&window];
        let latents = window.latents(number, rows)?;
        let arranged = window
            .arranged
            .as_ref()
            .expect("the slot's window is arranged");
        let mut records = Vec::with_capacity(members.row_refs.len());
        for row_ref in &members.row_refs {
            records.push(&arranged.records[&row_ref.row]);
        }
        Ok(self.setup.batcher.finish(&members, &records, latents))
    }

    fn release(&mut self, slot: &Slot) {
        let window = self.window(slot);
        let released = window.release();
        let is_empty = window.left == 0;
        self.held_bytes -= released;
        if is_empty {
            self.admitted.remove(&key(slot));
        }
    }
}
