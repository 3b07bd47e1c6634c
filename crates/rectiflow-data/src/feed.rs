//! `window` mode's reading: the blocks of coming windows, fetched ahead within a limit in bytes, delivered in order.
//!
//! A scout walks the order ahead of the consumer and finds the windows that this rank needs, in the order in which it
//! needs them. As long as there is room each is admitted: all requests for its text and latents start at once and
//! complete in any order. A window's text is decoded, its prompts drawn and its samples arranged when its first
//! micro-batch is due, or before, once its text is there; its bytes are given back with its last micro-batch. Bytes are
//! reserved before they are requested, so the limit is a hard one; that it allows all windows that are ever open at
//! once is checked when the loader is made ([`needed_bytes`]), so that waiting cannot last for ever.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    ops::Range,
    sync::{Arc, atomic::AtomicBool},
};

use bytes::Bytes;
use half::f16;
use rayon::prelude::*;

use crate::{
    batch::{Batcher, Members, MicroBatch, Source, Step},
    dataset::{Dataset, Split},
    epoch::{Slot, Steps},
    error::{Error, Result},
    fetch::{Part, Ticket, coalesce},
    lanes::open_windows,
    manifest::BLOCK_ROWS,
    order::Order,
    pass::RUN_BLOCKS,
    record::Record,
    window::{Place, Windows},
};

/// Steps that the scout is ahead at most: beyond, it would fetch small data sets epochs before they are needed.
const STEPS_AHEAD: u64 = 256;

/// Stream, first micro-batch, length.
type WindowKey = (u32, u64, u32);

fn key(slot: &Slot) -> WindowKey {
    (slot.stream, slot.window_first, slot.window_len)
}

/// Reads the steps of one rank.
#[derive(Debug)]
pub(crate) struct Feed<'a> {
    order: Arc<Order>,
    batcher: &'a Batcher,
    /// The slots of this rank.
    slots: &'a [u32],
    limit_bytes: u64,
    /// Set when nobody wants the steps any more.
    stop: &'a AtomicBool,
    steps: Steps,
    scout: Steps,
    /// The step that the scout looks at next.
    scout_step: u64,
    windows: Windows,
    /// Found by the scout and not admitted yet, with the step that needs it.
    waiting: VecDeque<(u64, Slot)>,
    /// What the first of them needs, once it has been worked out.
    next_wanted: Option<(Vec<Wanted>, u64)>,
    admitted: HashMap<WindowKey, Window>,
    /// Keys of windows whose text has not been looked at, in order of need.
    unread: VecDeque<Slot>,
    held_bytes: u64,
}

/// Blocks of one request.
#[derive(Debug)]
struct Blocks {
    object: usize,
    first: u32,
    bytes: Arriving,
}

#[derive(Debug)]
enum Arriving {
    UnderWay(Ticket),
    /// Of each block.
    Here(Vec<Bytes>),
}

/// Blocks of an object to be requested together.
type Wanted = (Part, usize, Range<u32>);

/// A window of which requests have started.
#[derive(Debug)]
struct Window {
    held_bytes: u64,
    text: Vec<Blocks>,
    latents: Vec<Blocks>,
    arranged: Option<Arranged>,
    /// Why it could not be arranged, to be said when it is due.
    failure: Option<Error>,
    /// Micro-batches still to be delivered.
    left: u32,
}

#[derive(Debug)]
struct Arranged {
    /// In the order of the window's micro-batches.
    places: Vec<Place>,
    records: HashMap<u32, Record>,
}

impl<'a> Feed<'a> {
    /// The steps from `from` on of the rank that runs `slots`, with at most `limit_bytes` held.
    pub(crate) fn new(
        order: &Arc<Order>,
        batcher: &'a Batcher,
        slots: &'a [u32],
        limit_bytes: u64,
        from: u64,
        stop: &'a AtomicBool,
    ) -> Self {
        Self {
            batcher,
            slots,
            limit_bytes,
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
            order: order.clone(),
        }
    }

    /// Reads one step; steps are asked for one after the other.
    ///
    /// # Errors
    /// What reading met, or an error that nobody sees where it was told to stop.
    pub(crate) fn step(&mut self, step: u64) -> Result<Step> {
        let whole = self.steps.plan(step);
        self.admit_needed(step)?;
        let slots: Vec<Slot> = self.slots.iter().map(|&slot| whole.slots[slot as usize]).collect();
        let mut ready = Vec::with_capacity(slots.len());
        for slot in &slots {
            self.arrange(slot)?;
            let members = self.members(slot);
            let window = self.admitted.get_mut(&key(slot)).expect("what a step needs is admitted");
            window.arrive(self.batcher.source(members.data), &members, self.stop)?;
            ready.push(members);
        }
        let assemble = |(slot, members): (&Slot, &Members)| self.assemble(slot, members);
        let micro_batches = slots.par_iter().zip(&ready).map(assemble).collect::<Result<_>>()?;
        slots.iter().for_each(|slot| self.give_back(slot));
        // Not before: what is read ahead must not slow down what is waited for, above all the first step.
        self.look_ahead(step);
        self.arrange_next();
        let (epoch, num_samples) = (whole.epoch, whole.num_samples);
        Ok(Step { step, epoch, num_samples, micro_batches })
    }

    /// Admits all windows that a step needs: there is room for them, whatever else is held.
    fn admit_needed(&mut self, step: u64) -> Result<()> {
        while self.scout_step <= step {
            self.scout();
        }
        while self.waiting.front().is_some_and(|(needed, _)| *needed <= step) {
            self.admit_next(u64::MAX)?;
        }
        Ok(())
    }

    /// Admits windows of later steps as long as there is room. What is wrong with one of them is said when it is due.
    fn look_ahead(&mut self, step: u64) {
        loop {
            while self.waiting.is_empty() && self.scout_step <= step + STEPS_AHEAD {
                self.scout();
            }
            let room = self.limit_bytes.saturating_sub(self.held_bytes);
            if self.waiting.is_empty() || !self.admit_next(room).unwrap_or(false) {
                return;
            }
        }
    }

    /// Admits the window that is needed next, if it takes no more than `room` bytes.
    fn admit_next(&mut self, room: u64) -> Result<bool> {
        let &(_, slot) = self.waiting.front().expect("the caller has looked");
        let (wanted, num_bytes) = match self.next_wanted.take() {
            Some(wanted) => wanted,
            None => self.wanted(&slot)?,
        };
        if num_bytes > room {
            self.next_wanted = Some((wanted, num_bytes));
            return Ok(false);
        }
        self.waiting.pop_front();
        self.admit(slot, wanted, num_bytes);
        Ok(true)
    }

    /// Looks at one step more.
    fn scout(&mut self) {
        let plan = self.scout.plan(self.scout_step);
        for slot in self.slots.iter().map(|&slot| plan.slots[slot as usize]) {
            let is_known = self.admitted.contains_key(&key(&slot))
                || self.waiting.iter().any(|(_, waiting)| key(waiting) == key(&slot));
            if !is_known {
                self.waiting.push_back((self.scout_step, slot));
            }
        }
        self.scout_step += 1;
    }

    /// What a window needs from its data set, and how many bytes that is.
    fn wanted(&mut self, slot: &Slot) -> Result<(Vec<Wanted>, u64)> {
        let stream = self.order.streams()[slot.stream as usize];
        let dataset = &self.batcher.source(stream.data).dataset;
        let mut blocks = BTreeMap::<usize, BTreeSet<u32>>::new();
        for place in self.windows.places(slot) {
            let (object, row) = dataset.locate(Split::Train, stream.bucket, place.row.into())?;
            blocks.entry(object).or_default().insert(row / BLOCK_ROWS);
        }
        let (mut wanted, mut num_bytes) = (Vec::new(), 0);
        for part in [Part::Text, Part::Latents] {
            for (&object, blocks) in &blocks {
                for run in coalesce(blocks.iter().copied(), RUN_BLOCKS) {
                    let range = dataset.request(part, object, run.clone())?.range();
                    num_bytes += range.end - range.start;
                    wanted.push((part, object, run));
                }
            }
        }
        Ok((wanted, num_bytes))
    }

    fn admit(&mut self, slot: Slot, wanted: Vec<Wanted>, held_bytes: u64) {
        let stream = self.order.streams()[slot.stream as usize];
        let dataset = &self.batcher.source(stream.data).dataset;
        self.held_bytes += held_bytes;
        // The scout met it at the first of its micro-batches that is still to come: after a seek not the first of all.
        let left = slot.window_len - (slot.index - slot.window_first) as u32;
        let mut window =
            Window { held_bytes, text: Vec::new(), latents: Vec::new(), arranged: None, failure: None, left };
        for (part, object, run) in wanted {
            let first = run.start;
            let ticket = dataset.start(part, object, run).expect("`wanted` has made the same request");
            let blocks = Blocks { object, first, bytes: Arriving::UnderWay(ticket) };
            match part {
                Part::Text => window.text.push(blocks),
                Part::Latents => window.latents.push(blocks),
            }
        }
        self.admitted.insert(key(&slot), window);
        self.unread.push_back(slot);
    }

    /// Arranges the next window whose text has come, so that a step need not do it all at once.
    fn arrange_next(&mut self) {
        let is_done = |slot: &Slot| {
            let window = self.admitted.get(&key(slot));
            window.is_none_or(|window| window.arranged.is_some() || window.failure.is_some())
        };
        while self.unread.front().is_some_and(is_done) {
            self.unread.pop_front();
        }
        let Some(&slot) = self.unread.front() else { return };
        if self.admitted[&key(&slot)].text.iter().all(Blocks::has_come)
            && let Err(error) = self.arrange(&slot)
        {
            let window = self.admitted.get_mut(&key(&slot)).expect("it was looked at above");
            window.failure = Some(error);
        }
    }

    /// Waits for a window's text, draws its prompts, and groups its samples by their length.
    fn arrange(&mut self, slot: &Slot) -> Result<()> {
        let window = self.admitted.get_mut(&key(slot)).expect("what is arranged is admitted");
        if window.arranged.is_some() {
            return Ok(());
        }
        if let Some(error) = window.failure.take() {
            return Err(error);
        }
        let stream = self.order.streams()[slot.stream as usize];
        let dataset = &self.batcher.source(stream.data).dataset;
        let places = self.windows.places(slot);
        let mut records = read_records(dataset, &mut window.text, self.stop)?;
        let mut by_row = HashMap::with_capacity(places.len());
        for row in places.iter().map(|place| place.row) {
            let located = dataset.locate(Split::Train, stream.bucket, row.into())?;
            // A row may be there twice, of two passes.
            by_row.extend(records.remove(&located).map(|record| (row, record)));
        }
        let count = |_: &_, places: &[Place]| Ok(self.batcher.count_of(stream.data, places, |row| &by_row[&row]));
        let places = self.windows.arranged(slot, count)?;
        window.arranged = Some(Arranged { places, records: by_row });
        Ok(())
    }

    /// The samples of a slot of an arranged window.
    fn members(&self, slot: &Slot) -> Members {
        let stream = self.order.streams()[slot.stream as usize];
        let arranged = self.admitted[&key(slot)].arranged.as_ref().expect("the slot's window is arranged");
        let size = slot.size as usize;
        let within = (slot.index - slot.window_first) as usize * size;
        let places = arranged.places[within..within + size].to_vec();
        let (data, bucket) = (stream.data, stream.bucket);
        Members { slot: slot.slot, first_sample: slot.first_sample, data, bucket, places }
    }

    fn assemble(&self, slot: &Slot, members: &Members) -> Result<MicroBatch> {
        let window = &self.admitted[&key(slot)];
        let dataset = &self.batcher.source(members.data).dataset;
        let row_len = dataset.latent_shape(members.bucket).iter().product::<usize>();
        let mut latents = vec![f16::ZERO; members.places.len() * row_len];
        for (place, out) in members.places.iter().zip(latents.chunks_exact_mut(row_len)) {
            let (object, row) = dataset.locate(Split::Train, members.bucket, place.row.into())?;
            dataset.copy_row(object, row, window.block(object, row / BLOCK_ROWS), out)?;
        }
        let records = &window.arranged.as_ref().expect("the slot's window is arranged").records;
        let records: Vec<&Record> = members.places.iter().map(|place| &records[&place.row]).collect();
        Ok(self.batcher.finish(members, &records, latents))
    }

    fn give_back(&mut self, slot: &Slot) {
        let window = self.admitted.get_mut(&key(slot)).expect("a delivered micro-batch has a window");
        window.left -= 1;
        if window.left == 0 {
            self.held_bytes -= window.held_bytes;
            self.admitted.remove(&key(slot));
        }
    }
}

impl Window {
    /// Waits for the latents that a micro-batch needs.
    fn arrive(&mut self, source: &Source, members: &Members, stop: &AtomicBool) -> Result<()> {
        for place in &members.places {
            let (object, row) = source.dataset.locate(Split::Train, members.bucket, place.row.into())?;
            let at = self.position(object, row / BLOCK_ROWS);
            self.latents[at].arrive(stop)?;
        }
        Ok(())
    }

    /// The bytes of a block of latents that has arrived.
    fn block(&self, object: usize, block: u32) -> &Bytes {
        let blocks = &self.latents[self.position(object, block)];
        match &blocks.bytes {
            Arriving::Here(bytes) => &bytes[(block - blocks.first) as usize],
            Arriving::UnderWay(_) => unreachable!("`arrive` has waited for it"),
        }
    }

    /// Index of the request with a block. Requests are sorted by object and block.
    fn position(&self, object: usize, block: u32) -> usize {
        self.latents.partition_point(|blocks| (blocks.object, blocks.first) <= (object, block)) - 1
    }
}

impl Blocks {
    fn arrive(&mut self, stop: &AtomicBool) -> Result<()> {
        if let Arriving::UnderWay(ticket) = &mut self.bytes {
            let stopped = || Error::Invalid { what: "loader".to_owned(), reason: "it was told to stop".to_owned() };
            self.bytes = Arriving::Here(ticket.wait_unless(stop).ok_or_else(stopped)??);
        }
        Ok(())
    }

    fn has_come(&self) -> bool {
        match &self.bytes {
            Arriving::UnderWay(ticket) => ticket.is_finished(),
            Arriving::Here(_) => true,
        }
    }
}

/// Waits for text and decodes it: records by object and row. The bytes are dropped.
fn read_records(dataset: &Dataset, text: &mut Vec<Blocks>, stop: &AtomicBool) -> Result<HashMap<(usize, u32), Record>> {
    text.iter_mut().try_for_each(|blocks| blocks.arrive(stop))?;
    let decode = |blocks: &Blocks| match &blocks.bytes {
        Arriving::Here(bytes) => dataset.decode_text(blocks.object, blocks.first, bytes),
        Arriving::UnderWay(_) => unreachable!("it has just arrived"),
    };
    let decoded: Vec<Vec<Record>> = text.par_iter().map(decode).collect::<Result<_>>()?;
    let mut records = HashMap::new();
    for (blocks, decoded) in text.drain(..).zip(decoded) {
        records.extend((blocks.first * BLOCK_ROWS..).zip(decoded).map(|(row, record)| ((blocks.object, row), record)));
    }
    Ok(records)
}

/// Bytes that the windows of `num_lanes` lanes take at most while all that may be open are, and of one more a lane to
/// read ahead: what a loader must and what it had better be allowed to hold.
pub(crate) fn needed_bytes(order: &Order, sources: &[Source], num_lanes: usize) -> (u64, u64) {
    let largest = |stream: &crate::order::Stream| {
        let dataset = &sources[stream.data as usize].dataset;
        // The last window of a pass is up to a micro-batch longer, and a window begins and ends in the middle of blocks.
        let samples = ((stream.window + 1) * u64::from(stream.size)).min(stream.rows);
        // Deleted rows are in their blocks all the same.
        let rows =
            (samples as f64 * dataset.rows_stored(Split::Train, stream.bucket) / stream.rows as f64).ceil() as u64;
        (rows.div_ceil(BLOCK_ROWS.into()) + 3) * dataset.largest_block(Split::Train, stream.bucket)
    };
    let window = order.streams().iter().map(largest).max().unwrap_or(0);
    let open = (num_lanes * open_windows(order.lanes())) as u64;
    (open * window, (open + num_lanes as u64) * window)
}
