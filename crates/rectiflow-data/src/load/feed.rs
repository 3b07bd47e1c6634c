//! Reading in `window` and `owned` mode: windows fetched ahead within a limit in bytes, delivered
//! in order.
//!
//! A scout walks the order ahead of the consumer and finds the windows that this rank needs, in the
//! order in which it needs them. While there is room, each is admitted: all requests for its text
//! and latents start at once and complete in any order. A window's text is decoded, its prompts are
//! drawn and its samples arranged when its first micro-batch is due, or earlier if its text has
//! arrived; its bytes are released with its last micro-batch. Bytes are reserved before they are
//! requested, so the limit is a hard one. The constructor checks that the limit covers all windows
//! that can be open at once (`setup`), so waiting always ends.

use std::{
    collections::{HashMap, VecDeque},
    sync::atomic::AtomicBool,
};

use half::f16;
use rayon::prelude::*;

use crate::{
    dataset::index::ObjectRow,
    error::Result,
    format::{manifest::Split, record::Record},
    load::{
        batch::{Members, MicroBatch, Step},
        incoming_window::{Arranged, IncomingWindow, Wanted},
        setup::LoaderSetup,
    },
    order::{
        epoch::Steps,
        stream::{Mode, Slot},
        window::{RowRef, Windows},
    },
};

/// The scout is at most this many steps ahead. Further ahead, it would fetch small data sets epochs
/// before they are needed.
const STEPS_AHEAD: u64 = 256;

/// Stream, first micro-batch, length.
type WindowKey = (u32, u64, u32);

fn key(slot: &Slot) -> WindowKey {
    (slot.stream, slot.window_first, slot.window_len)
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
        }
    }

    /// Reads one step. Steps must be read one after the other.
    ///
    /// # Errors
    /// The error of a read; after `stop` is set, an error that the caller discards.
    pub(crate) fn step(&mut self, step: u64) -> Result<Step> {
        let whole = self.steps.plan(step);
        self.admit_needed(step)?;
        let slots: Vec<Slot> = self
            .setup
            .slots
            .iter()
            .map(|&slot| whole.slots[slot as usize])
            .collect();
        let mut ready = Vec::with_capacity(slots.len());
        for slot in &slots {
            self.arrange(slot)?;
            let members = self.members(slot);
            let window = self
                .admitted
                .get_mut(&key(slot))
                .expect("the windows of a step are admitted");
            let rows = window.arrive(
                &self.setup.batcher.source(members.data).dataset,
                &members,
                self.stop,
            )?;
            ready.push((slot, members, rows));
        }
        let assemble =
            |(slot, members, rows): (&Slot, Members, _)| self.assemble(slot, &members, rows);
        let micro_batches = ready.into_par_iter().map(assemble).collect::<Result<_>>()?;
        slots.iter().for_each(|slot| self.release(slot));
        // Only now: reading ahead must not slow down this step, above all the first one.
        self.look_ahead(step);
        self.arrange_next();
        let (epoch, num_samples) = (whole.epoch, whole.num_samples);
        Ok(Step {
            step,
            epoch,
            num_samples,
            micro_batches,
        })
    }

    /// Admits all windows that a step needs. The limit always has room for them.
    fn admit_needed(&mut self, step: u64) -> Result<()> {
        while self.scout_step <= step {
            self.scout();
        }
        while self
            .waiting
            .front()
            .is_some_and(|(needed, _)| *needed <= step)
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
            let room = self.setup.read_ahead_bytes.saturating_sub(self.held_bytes);
            if self.waiting.is_empty() || !self.admit_next(room).unwrap_or(false) {
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
        for slot in self
            .setup
            .slots
            .iter()
            .map(|&slot| plan.slots[slot as usize])
        {
            let is_known = self.admitted.contains_key(&key(&slot))
                || self
                    .waiting
                    .iter()
                    .any(|(_, waiting)| key(waiting) == key(&slot));
            if !is_known {
                self.waiting.push_back((self.scout_step, slot));
            }
        }
        self.scout_step += 1;
    }

    /// What a window needs from its data set, and its size in bytes.
    fn wanted(&mut self, slot: &Slot, step: u64) -> Result<(Wanted, u64)> {
        let stream = self.setup.order.streams()[slot.stream as usize];
        let dataset = &self.setup.batcher.source(stream.data).dataset;
        let row_refs = self.windows.row_refs(slot).into_iter();
        let located =
            row_refs.map(|row_ref| dataset.locate(Split::Train, stream.bucket, row_ref.row.into()));
        let rows: Vec<ObjectRow> = located.collect::<Result<_>>()?;
        if stream.mode == Mode::Owned && stream.owned_pass(slot.window_first) > 0 {
            return Ok(Wanted::rows(dataset, rows));
        }
        Wanted::blocks(dataset, &rows, step)
    }

    fn admit(&mut self, slot: Slot, step: u64, wanted: Wanted, held_bytes: u64) {
        let stream = self.setup.order.streams()[slot.stream as usize];
        let dataset = &self.setup.batcher.source(stream.data).dataset;
        self.held_bytes += held_bytes;
        // Earlier windows count as read: the next use of their blocks is a later one.
        self.setup.uses.iter().for_each(|uses| uses.advance(step));
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
        let is_done = |slot: &Slot| {
            let window = self.admitted.get(&key(slot));
            window.is_none_or(|window| window.arranged.is_some() || window.failure.is_some())
        };
        while self.unread.front().is_some_and(is_done) {
            self.unread.pop_front();
        }
        let Some(&slot) = self.unread.front() else {
            return;
        };
        if self.admitted[&key(&slot)].has_text()
            && let Err(error) = self.arrange(&slot)
        {
            let window = self
                .admitted
                .get_mut(&key(&slot))
                .expect("the loop above has found it");
            window.failure = Some(error);
        }
    }

    /// Waits for a window's text, draws its prompts and groups its samples by prompt length.
    fn arrange(&mut self, slot: &Slot) -> Result<()> {
        let window = self
            .admitted
            .get_mut(&key(slot))
            .expect("the caller has admitted the window");
        if window.arranged.is_some() {
            return Ok(());
        }
        if let Some(error) = window.failure.take() {
            return Err(error);
        }
        let stream = self.setup.order.streams()[slot.stream as usize];
        let dataset = &self.setup.batcher.source(stream.data).dataset;
        let row_refs = self.windows.row_refs(slot);
        let mut records = window.read_records(dataset, self.stop)?;
        let mut by_row = HashMap::with_capacity(row_refs.len());
        for row in row_refs.iter().map(|row_ref| row_ref.row) {
            let located = dataset.locate(Split::Train, stream.bucket, row.into())?;
            // A window can hold a row twice, from two passes.
            by_row.extend(records.remove(&located).map(|record| (row, record)));
        }
        let count = |_: &_, row_refs: &[RowRef]| {
            Ok(self
                .setup
                .batcher
                .count_of(stream.data, row_refs, |row| &by_row[&row]))
        };
        let row_refs = self.windows.arranged(slot, count)?;
        window.arranged = Some(Arranged {
            row_refs,
            records: by_row,
        });
        window.start_rows(dataset, stream.bucket, slot.size as usize)
    }

    /// The samples of a slot of an arranged window.
    fn members(&self, slot: &Slot) -> Members {
        let stream = self.setup.order.streams()[slot.stream as usize];
        let arranged = self.admitted[&key(slot)]
            .arranged
            .as_ref()
            .expect("the slot's window is arranged");
        let size = slot.size as usize;
        let within = (slot.index - slot.window_first) as usize * size;
        let row_refs = arranged.row_refs[within..within + size].to_vec();
        let (data, bucket) = (stream.data, stream.bucket);
        Members {
            slot: slot.slot,
            first_sample: slot.first_sample,
            data,
            bucket,
            row_refs,
        }
    }

    /// A micro-batch, from `rows` if its latents were read row by row.
    fn assemble(
        &self,
        slot: &Slot,
        members: &Members,
        rows: Option<Vec<f16>>,
    ) -> Result<MicroBatch> {
        let window = &self.admitted[&key(slot)];
        let dataset = &self.setup.batcher.source(members.data).dataset;
        let latents = window.latents(dataset, members, rows)?;
        let records = &window
            .arranged
            .as_ref()
            .expect("the slot's window is arranged")
            .records;
        let records: Vec<&Record> = members
            .row_refs
            .iter()
            .map(|row_ref| &records[&row_ref.row])
            .collect();
        Ok(self.setup.batcher.finish(members, &records, latents))
    }

    fn release(&mut self, slot: &Slot) {
        let window = self
            .admitted
            .get_mut(&key(slot))
            .expect("a delivered micro-batch has a window");
        window.left -= 1;
        if window.left == 0 {
            self.held_bytes -= window.held_bytes;
            self.admitted.remove(&key(slot));
        }
    }
}
