//! Reading in `window` and `owned` mode: coming windows, fetched ahead within a limit in bytes, delivered in order.
//!
//! A scout walks the order ahead of the consumer and finds the windows that this rank needs, in the order in which it
//! needs them. As long as there is room each is admitted: all requests for its text and latents start at once and
//! complete in any order. A window's text is decoded, its prompts drawn and its samples arranged when its first
//! micro-batch is due, or before, once its text is there; its bytes are given back with its last micro-batch. Bytes are
//! reserved before they are requested, so the limit is a hard one; that it allows all windows that are ever open at
//! once is checked when the loader is made ([`needed_bytes`]), so that waiting cannot last for ever.
//!
//! A window is whole blocks, but in the later passes of `owned` mode: then it is single rows, whose latents are read when
//! it is arranged, each micro-batch's by itself (`rows`).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{Arc, atomic::AtomicBool},
};

use bytes::Bytes;
use half::f16;
use rayon::prelude::*;

use crate::{
    dataset::{
        Dataset,
        fetch::Ticket,
        index::ObjectRow,
        rows::{start_latents, start_records},
    },
    error::{Error, Result},
    format::{block_table::BLOCK_ROWS, manifest::Split, record::Record},
    load::{
        batch::{Batcher, Members, MicroBatch, Source, Step},
        next_use::NextUses,
    },
    order::{
        Order,
        epoch::Steps,
        lanes::open_windows,
        pass::RUN_BLOCKS,
        stream::{Mode, Slot, Stream},
        window::{RowRef, Windows},
    },
    remote::request::{ObjectFile, Request, coalesce},
};

/// Steps that the scout is ahead at most: beyond, it would fetch small data sets epochs before they are needed.
const STEPS_AHEAD: u64 = 256;

/// Stream, first micro-batch, length.
type WindowKey = (u32, u64, u32);

fn key(slot: &Slot) -> WindowKey {
    (slot.stream, slot.window_first, slot.window_len)
}

/// What the steps of one rank are read from.
#[derive(Debug)]
pub(crate) struct LoaderSetup {
    pub(crate) order: Arc<Order>,
    pub(crate) batcher: Batcher,
    /// The slots of this rank.
    pub(crate) slots: Vec<u32>,
    /// Bytes that `window` and `owned` mode may hold.
    pub(crate) read_ahead_bytes: u64,
    /// What this machine needs when, if there is a cache that asks.
    pub(crate) uses: Option<Arc<NextUses>>,
}

impl LoaderSetup {
    pub(crate) fn count(&self, stream: &Stream, row_refs: &[RowRef]) -> Result<Vec<u8>> {
        self.batcher.count(stream.data, stream.bucket, row_refs)
    }

    pub(crate) fn members(&self, slot: &Slot, row_refs: Vec<RowRef>) -> Members {
        let stream = self.order.streams()[slot.stream as usize];
        let (data, bucket) = (stream.data, stream.bucket);
        Members { slot: slot.slot, first_sample: slot.first_sample, data, bucket, row_refs }
    }
}

/// Reads the steps of one rank.
#[derive(Debug)]
pub(crate) struct Feed<'a> {
    setup: &'a LoaderSetup,
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
    next_wanted: Option<(Wanted, u64)>,
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
    /// Of each block.
    bytes: Arriving<Vec<Bytes>>,
}

#[derive(Debug)]
enum Arriving<T> {
    UnderWay(Ticket<T>),
    Here(T),
}

/// What a window needs from its data set.
#[derive(Debug)]
enum Wanted {
    Blocks(Vec<Request>),
    Rows(Vec<ObjectRow>),
}

/// A window of which requests have started.
#[derive(Debug)]
struct Window {
    held_bytes: u64,
    /// The step that needs it first.
    step: u64,
    content: Content,
    arranged: Option<Arranged>,
    /// Why it could not be arranged, to be said when it is due.
    failure: Option<Error>,
    /// Micro-batches still to be delivered.
    left: u32,
}

#[derive(Debug)]
enum Content {
    Blocks {
        text: Vec<Blocks>,
        latents: Vec<Blocks>,
    },
    Rows {
        text: Vec<Arriving<Vec<(ObjectRow, Record)>>>,
        /// Of each micro-batch that is still to be delivered, once the window is arranged.
        latents: VecDeque<Arriving<Vec<f16>>>,
    },
}

#[derive(Debug)]
struct Arranged {
    /// In the order of the window's micro-batches.
    row_refs: Vec<RowRef>,
    records: HashMap<u32, Record>,
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

    /// Reads one step; steps are asked for one after the other.
    ///
    /// # Errors
    /// What reading met, or an error that nobody sees where it was told to stop.
    pub(crate) fn step(&mut self, step: u64) -> Result<Step> {
        let whole = self.steps.plan(step);
        self.admit_needed(step)?;
        let slots: Vec<Slot> = self.setup.slots.iter().map(|&slot| whole.slots[slot as usize]).collect();
        let mut ready = Vec::with_capacity(slots.len());
        for slot in &slots {
            self.arrange(slot)?;
            let members = self.members(slot);
            let window = self.admitted.get_mut(&key(slot)).expect("what a step needs is admitted");
            let rows = window.arrive(self.setup.batcher.source(members.data), &members, self.stop)?;
            ready.push((slot, members, rows));
        }
        let assemble = |(slot, members, rows): (&Slot, Members, _)| self.assemble(slot, &members, rows);
        let micro_batches = ready.into_par_iter().map(assemble).collect::<Result<_>>()?;
        slots.iter().for_each(|slot| self.release(slot));
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
            let room = self.setup.read_ahead_bytes.saturating_sub(self.held_bytes);
            if self.waiting.is_empty() || !self.admit_next(room).unwrap_or(false) {
                return;
            }
        }
    }

    /// Admits the window that is needed next, if it takes no more than `room` bytes.
    fn admit_next(&mut self, room: u64) -> Result<bool> {
        let &(step, slot) = self.waiting.front().expect("the caller has looked");
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

    /// Looks at one step more.
    fn scout(&mut self) {
        let plan = self.scout.plan(self.scout_step);
        for slot in self.setup.slots.iter().map(|&slot| plan.slots[slot as usize]) {
            let is_known = self.admitted.contains_key(&key(&slot))
                || self.waiting.iter().any(|(_, waiting)| key(waiting) == key(&slot));
            if !is_known {
                self.waiting.push_back((self.scout_step, slot));
            }
        }
        self.scout_step += 1;
    }

    /// What a window needs from its data set, and how many bytes that is.
    fn wanted(&mut self, slot: &Slot, step: u64) -> Result<(Wanted, u64)> {
        let stream = self.setup.order.streams()[slot.stream as usize];
        let dataset = &self.setup.batcher.source(stream.data).dataset;
        let located = self.windows.row_refs(slot).into_iter();
        let located = located.map(|row_ref| dataset.locate(Split::Train, stream.bucket, row_ref.row.into()));
        let rows: Vec<ObjectRow> = located.collect::<Result<_>>()?;
        if stream.mode == Mode::Owned && stream.owned_pass(slot.window_first) > 0 {
            let num_bytes = rows.iter().map(|&(object, row)| dataset.share_of_block(object, row / BLOCK_ROWS)).sum();
            return Ok((Wanted::Rows(rows), num_bytes));
        }
        let mut blocks = BTreeMap::<usize, BTreeSet<u32>>::new();
        for (object, row) in rows {
            blocks.entry(object).or_default().insert(row / BLOCK_ROWS);
        }
        let (mut wanted, mut num_bytes) = (Vec::new(), 0);
        for file in [ObjectFile::Text, ObjectFile::Latents] {
            for (&object, blocks) in &blocks {
                for run in coalesce(blocks.iter().copied(), RUN_BLOCKS) {
                    let request = Request { step, ..dataset.request(file, object, run)? };
                    num_bytes += request.range().end - request.range().start;
                    wanted.push(request);
                }
            }
        }
        Ok((Wanted::Blocks(wanted), num_bytes))
    }

    fn admit(&mut self, slot: Slot, step: u64, wanted: Wanted, held_bytes: u64) {
        let stream = self.setup.order.streams()[slot.stream as usize];
        let dataset = &self.setup.batcher.source(stream.data).dataset;
        self.held_bytes += held_bytes;
        // What was admitted before is as good as read, and its next use a later one.
        self.setup.uses.iter().for_each(|uses| uses.advance(step));
        // The scout met it at the first of its micro-batches that is still to come: after a seek not the first of all.
        let left = slot.window_len - (slot.index - slot.window_first) as u32;
        let content = match wanted {
            Wanted::Blocks(requests) => {
                let start = |request: Request| {
                    let (object, first) = (request.object, request.first);
                    Blocks { object, first, bytes: Arriving::UnderWay(dataset.start_request(request)) }
                };
                let (text, latents): (Vec<_>, Vec<_>) = requests.into_iter().partition(|r| r.file == ObjectFile::Text);
                // Text first: it is needed before the latents.
                let text = text.into_iter().map(start).collect();
                Content::Blocks { text, latents: latents.into_iter().map(start).collect() }
            }
            Wanted::Rows(rows) => {
                let text = start_records(dataset, rows, step).into_iter().map(Arriving::UnderWay).collect();
                Content::Rows { text, latents: VecDeque::new() }
            }
        };
        let window = Window { held_bytes, step, content, arranged: None, failure: None, left };
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
        if self.admitted[&key(&slot)].has_text()
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
        let stream = self.setup.order.streams()[slot.stream as usize];
        let dataset = &self.setup.batcher.source(stream.data).dataset;
        let row_refs = self.windows.row_refs(slot);
        let mut records = window.read_records(dataset, self.stop)?;
        let mut by_row = HashMap::with_capacity(row_refs.len());
        for row in row_refs.iter().map(|row_ref| row_ref.row) {
            let located = dataset.locate(Split::Train, stream.bucket, row.into())?;
            // A row may be there twice, of two passes.
            by_row.extend(records.remove(&located).map(|record| (row, record)));
        }
        let count =
            |_: &_, row_refs: &[RowRef]| Ok(self.setup.batcher.count_of(stream.data, row_refs, |row| &by_row[&row]));
        let row_refs = self.windows.arranged(slot, count)?;
        window.arranged = Some(Arranged { row_refs, records: by_row });
        window.start_rows(dataset, stream.bucket, slot.size as usize)
    }

    /// The samples of a slot of an arranged window.
    fn members(&self, slot: &Slot) -> Members {
        let stream = self.setup.order.streams()[slot.stream as usize];
        let arranged = self.admitted[&key(slot)].arranged.as_ref().expect("the slot's window is arranged");
        let size = slot.size as usize;
        let within = (slot.index - slot.window_first) as usize * size;
        let row_refs = arranged.row_refs[within..within + size].to_vec();
        let (data, bucket) = (stream.data, stream.bucket);
        Members { slot: slot.slot, first_sample: slot.first_sample, data, bucket, row_refs }
    }

    /// A micro-batch, from its rows if they have been read apart.
    fn assemble(&self, slot: &Slot, members: &Members, rows: Option<Vec<f16>>) -> Result<MicroBatch> {
        let window = &self.admitted[&key(slot)];
        let dataset = &self.setup.batcher.source(members.data).dataset;
        let latents = match (rows, &window.content) {
            (Some(rows), _) => rows,
            (None, Content::Blocks { latents, .. }) => copy_rows(dataset, latents, members)?,
            (None, Content::Rows { .. }) => unreachable!("its rows have arrived"),
        };
        let records = &window.arranged.as_ref().expect("the slot's window is arranged").records;
        let records: Vec<&Record> = members.row_refs.iter().map(|row_ref| &records[&row_ref.row]).collect();
        Ok(self.setup.batcher.finish(members, &records, latents))
    }

    fn release(&mut self, slot: &Slot) {
        let window = self.admitted.get_mut(&key(slot)).expect("a delivered micro-batch has a window");
        window.left -= 1;
        if window.left == 0 {
            self.held_bytes -= window.held_bytes;
            self.admitted.remove(&key(slot));
        }
    }
}

impl Window {
    /// Waits for the latents that a micro-batch needs; gives them if they have been read apart.
    fn arrive(&mut self, source: &Source, members: &Members, stop: &AtomicBool) -> Result<Option<Vec<f16>>> {
        match &mut self.content {
            Content::Blocks { latents, .. } => {
                for row_ref in &members.row_refs {
                    let (object, row) = source.dataset.locate(Split::Train, members.bucket, row_ref.row.into())?;
                    let at = position(latents, object, row / BLOCK_ROWS);
                    latents[at].bytes.arrive(stop)?;
                }
                Ok(None)
            }
            Content::Rows { latents, .. } => {
                let next = latents.pop_front().expect("there are as many as micro-batches to be delivered");
                next.into_arrived(stop).map(Some)
            }
        }
    }

    fn has_text(&self) -> bool {
        match &self.content {
            Content::Blocks { text, .. } => text.iter().all(|blocks| blocks.bytes.has_come()),
            Content::Rows { text, .. } => text.iter().all(Arriving::has_come),
        }
    }

    /// Waits for text and decodes it: records by object and row. The bytes are dropped.
    fn read_records(&mut self, dataset: &Dataset, stop: &AtomicBool) -> Result<HashMap<ObjectRow, Record>> {
        match &mut self.content {
            Content::Blocks { text, .. } => decode_records(dataset, text, stop),
            Content::Rows { text, .. } => {
                let mut records = HashMap::new();
                for arriving in text.drain(..) {
                    records.extend(arriving.into_arrived(stop)?);
                }
                Ok(records)
            }
        }
    }

    /// Starts reading the latents of an arranged window that is read by rows, in micro-batches of `size`.
    fn start_rows(&mut self, dataset: &Arc<Dataset>, bucket: u32, size: usize) -> Result<()> {
        let Content::Rows { latents, .. } = &mut self.content else { return Ok(()) };
        let row_refs = &self.arranged.as_ref().expect("it is arranged").row_refs;
        let row_len = dataset.latent_shape(bucket).iter().product();
        for row_refs in row_refs[row_refs.len() - self.left as usize * size..].chunks_exact(size) {
            let located = row_refs.iter().map(|row_ref| dataset.locate(Split::Train, bucket, row_ref.row.into()));
            let rows = located.collect::<Result<_>>()?;
            latents.push_back(Arriving::UnderWay(start_latents(dataset.clone(), rows, row_len, self.step)));
        }
        Ok(())
    }
}

/// The latents of a micro-batch, out of blocks that have arrived.
fn copy_rows(dataset: &Dataset, latents: &[Blocks], members: &Members) -> Result<Vec<f16>> {
    let row_len = dataset.latent_shape(members.bucket).iter().product::<usize>();
    let mut out = Vec::with_capacity(members.row_refs.len() * row_len);
    for row_ref in &members.row_refs {
        let (object, row) = dataset.locate(Split::Train, members.bucket, row_ref.row.into())?;
        let blocks = &latents[position(latents, object, row / BLOCK_ROWS)];
        let Arriving::Here(bytes) = &blocks.bytes else { unreachable!("`arrive` has waited for it") };
        dataset.append_row(object, row, &bytes[(row / BLOCK_ROWS - blocks.first) as usize], &mut out)?;
    }
    Ok(out)
}

/// Index of the request with a block. Requests are sorted by object and block.
fn position(latents: &[Blocks], object: usize, block: u32) -> usize {
    latents.partition_point(|blocks| (blocks.object, blocks.first) <= (object, block)) - 1
}

impl<T: Send + 'static> Arriving<T> {
    /// Waits for it.
    fn arrive(&mut self, stop: &AtomicBool) -> Result<()> {
        if let Self::UnderWay(ticket) = self {
            let stopped = || Error::Invalid { what: "loader".to_owned(), reason: "it was told to stop".to_owned() };
            *self = Self::Here(ticket.wait_unless(stop).ok_or_else(stopped)??);
        }
        Ok(())
    }

    fn into_arrived(mut self, stop: &AtomicBool) -> Result<T> {
        self.arrive(stop)?;
        match self {
            Self::Here(value) => Ok(value),
            Self::UnderWay(_) => unreachable!("it has just arrived"),
        }
    }

    fn has_come(&self) -> bool {
        match self {
            Self::UnderWay(ticket) => ticket.is_finished(),
            Self::Here(_) => true,
        }
    }
}

/// Waits for blocks of text and decodes them. The bytes are dropped.
fn decode_records(dataset: &Dataset, text: &mut Vec<Blocks>, stop: &AtomicBool) -> Result<HashMap<ObjectRow, Record>> {
    text.iter_mut().try_for_each(|blocks| blocks.bytes.arrive(stop))?;
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

/// Bytes of the largest window, as whole blocks.
pub(crate) fn largest_window(order: &Order, sources: &[Source]) -> u64 {
    let largest = |stream: &Stream| {
        let dataset = &sources[stream.data as usize].dataset;
        // The last window of a pass is up to a micro-batch longer, and a window begins and ends in the middle of blocks.
        let samples = ((stream.window + 1) * u64::from(stream.size)).min(stream.rows);
        // Deleted rows are in their blocks all the same.
        let index = dataset.index();
        let num_stored = index.num_stored(Split::Train, stream.bucket);
        let stored = num_stored as f64 / index.num_rows(Split::Train, stream.bucket) as f64;
        let rows = (samples as f64 * stored).ceil() as u64;
        (rows.div_ceil(BLOCK_ROWS.into()) + 3) * dataset.largest_block(Split::Train, stream.bucket)
    };
    order.streams().iter().map(largest).max().unwrap_or(0)
}

/// Bytes that the windows of `num_lanes` lanes take at most while all that may be open are, and of one more a lane to
/// read ahead: what a loader must and what it had better be allowed to hold.
pub(crate) fn needed_bytes(order: &Order, sources: &[Source], num_lanes: usize) -> (u64, u64) {
    let window = largest_window(order, sources);
    let open = (num_lanes * open_windows(order.lanes())) as u64;
    (open * window, (open + num_lanes as u64) * window)
}
