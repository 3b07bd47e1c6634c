//! A window being read: first its text, then its arranged samples, then their latents.
//!
//! A window consists of whole blocks, except in the later passes of `owned` mode: there it consists
//! of single rows, whose latents are requested per micro-batch (`dataset::rows`).

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
        batch_latents::BatchLatents,
        fetch::Ticket,
        index::ObjectRow,
        rows::{start_latents, start_records},
    },
    error::{Error, Result},
    format::{block_table::BLOCK_ROWS, manifest::Split, record::Record},
    load::{batch::Members, scatter::Scatter},
    order::{pass::RUN_BLOCKS, window::RowRef},
    remote::{
        buffers::Buffers,
        request::{ObjectFile, Request, coalesce},
    },
};

/// What a window needs from its data set.
#[derive(Debug)]
pub(crate) enum Wanted {
    Blocks(Vec<Request>),
    Rows(Vec<ObjectRow>),
}

impl Wanted {
    /// The blocks that hold `rows`, and their size in bytes. `step` is the first step that needs
    /// them. Text comes first: it is needed before the latents.
    pub(crate) fn blocks(dataset: &Dataset, rows: &[ObjectRow], step: u64) -> Result<(Self, u64)> {
        let mut blocks = BTreeMap::<usize, BTreeSet<u32>>::new();
        for &(object, row) in rows {
            blocks.entry(object).or_default().insert(row / BLOCK_ROWS);
        }
        let mut requests = Vec::new();
        let mut num_bytes = 0;
        for file in [ObjectFile::Text, ObjectFile::Latents] {
            for (&object, blocks) in &blocks {
                for run in coalesce(blocks.iter().copied(), RUN_BLOCKS) {
                    let request = Request {
                        step,
                        ..dataset.request(file, object, run)?
                    };
                    num_bytes += request.range().end - request.range().start;
                    requests.push(request);
                }
            }
        }
        Ok((Self::Blocks(requests), num_bytes))
    }

    /// Single rows, and their share of the bytes of their blocks.
    pub(crate) fn rows(dataset: &Dataset, rows: Vec<ObjectRow>) -> (Self, u64) {
        let mut num_bytes = 0;
        for &(object, row) in &rows {
            num_bytes += dataset.share_of_block(object, row / BLOCK_ROWS);
        }
        (Self::Rows(rows), num_bytes)
    }
}

/// A window whose requests have started.
#[derive(Debug)]
pub(crate) struct IncomingWindow {
    held_bytes: u64,
    /// The first step that needs it.
    step: u64,
    content: Content,
    pub(crate) arranged: Option<Arranged>,
    /// Why it could not be arranged, reported when it is due.
    pub(crate) failure: Option<Error>,
    /// Micro-batches that are still to be delivered.
    pub(crate) left: u32,
}

#[derive(Debug)]
enum Content {
    Blocks {
        text: Vec<TextBlocks>,
        /// Requests for latents, which start once the window is arranged.
        wanted: Vec<Request>,
        latents: Vec<LatentBlocks>,
        /// Where the latents go, once the window is arranged.
        scatter: Option<Arc<Scatter>>,
    },
    Rows {
        text: Vec<Arriving<Vec<(ObjectRow, Record)>>>,
        /// One for each micro-batch that is still to be delivered, once the window is arranged.
        latents: VecDeque<Arriving<BatchLatents>>,
    },
}

impl Content {
    fn of_blocks(dataset: &Dataset, requests: Vec<Request>) -> Self {
        let mut text = Vec::new();
        let mut wanted = Vec::new();
        for request in requests {
            match request.file {
                ObjectFile::Text => text.push(TextBlocks::start(dataset, request)),
                ObjectFile::Latents => wanted.push(request),
            }
        }
        Self::Blocks {
            text,
            wanted,
            latents: Vec::new(),
            scatter: None,
        }
    }

    fn of_rows(dataset: &Arc<Dataset>, rows: Vec<ObjectRow>, step: u64) -> Self {
        let text = start_records(dataset, rows, step);
        Self::Rows {
            text: text.into_iter().map(Arriving::UnderWay).collect(),
            latents: VecDeque::new(),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Arranged {
    /// In the order of the window's micro-batches.
    pub(crate) row_refs: Vec<RowRef>,
    pub(crate) records: HashMap<u32, Record>,
}

/// Blocks of text of one request.
#[derive(Debug)]
struct TextBlocks {
    object: usize,
    first: u32,
    /// One for each block.
    bytes: Arriving<Vec<Bytes>>,
}

impl TextBlocks {
    fn start(dataset: &Dataset, request: Request) -> Self {
        Self {
            object: request.object,
            first: request.first,
            bytes: Arriving::UnderWay(dataset.start_request(request)),
        }
    }
}

/// Blocks of latents of one request, which go to a [`Scatter`].
#[derive(Debug)]
struct LatentBlocks {
    object: usize,
    first: u32,
    placed: Arriving<()>,
}

impl LatentBlocks {
    fn start(dataset: &Dataset, request: Request, scatter: &Arc<Scatter>) -> Self {
        let scatter = scatter.clone();
        let object = request.object;
        Self {
            object,
            first: request.first,
            placed: Arriving::UnderWay(dataset.start_latent_rows(request, move |row, bytes| {
                scatter.place((object, row), bytes);
            })),
        }
    }
}

#[derive(Debug)]
enum Arriving<T> {
    UnderWay(Ticket<T>),
    Here(T),
}

impl IncomingWindow {
    /// Starts reading what a window needs. `step` is the first step that needs it, `left` the
    /// number of its micro-batches that are still to be delivered.
    pub(crate) fn start(
        dataset: &Arc<Dataset>,
        wanted: Wanted,
        step: u64,
        held_bytes: u64,
        left: u32,
    ) -> Self {
        let content = match wanted {
            Wanted::Blocks(requests) => Content::of_blocks(dataset, requests),
            Wanted::Rows(rows) => Content::of_rows(dataset, rows, step),
        };
        Self {
            held_bytes,
            step,
            content,
            arranged: None,
            failure: None,
            left,
        }
    }

    /// Releases a delivered micro-batch. Returns the bytes that the window holds no longer.
    pub(crate) fn release(&mut self) -> u64 {
        let released = self.held_bytes / u64::from(self.left);
        self.held_bytes -= released;
        self.left -= 1;
        released
    }

    /// Waits for the latents that a micro-batch needs. Returns them if they were read row by row.
    pub(crate) fn arrive(
        &mut self,
        dataset: &Dataset,
        members: &Members,
        stop: &AtomicBool,
    ) -> Result<Option<BatchLatents>> {
        match &mut self.content {
            Content::Blocks { latents, .. } => {
                for row_ref in &members.row_refs {
                    let (object, row) =
                        dataset.locate(Split::Train, members.bucket, row_ref.row.into())?;
                    let at = position(latents, object, row / BLOCK_ROWS);
                    latents[at].placed.arrive(stop)?;
                }
                Ok(None)
            }
            Content::Rows { latents, .. } => {
                let next = latents
                    .pop_front()
                    .expect("each micro-batch to be delivered has its latents");
                next.into_arrived(stop).map(Some)
            }
        }
    }

    pub(crate) fn has_text(&self) -> bool {
        match &self.content {
            Content::Blocks { text, .. } => text.iter().all(|blocks| blocks.bytes.has_come()),
            Content::Rows { text, .. } => text.iter().all(Arriving::has_come),
        }
    }

    /// Waits for text and decodes it. Returns records by object and row; the bytes are dropped.
    pub(crate) fn read_records(
        &mut self,
        dataset: &Dataset,
        stop: &AtomicBool,
    ) -> Result<HashMap<ObjectRow, Record>> {
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

    /// Starts reading the latents of an arranged window, in micro-batches of `size`.
    pub(crate) fn start_latents(
        &mut self,
        dataset: &Arc<Dataset>,
        bucket: u32,
        size: usize,
        buffers: &Buffers<f16>,
    ) -> Result<()> {
        let arranged = self.arranged.as_ref().expect("the caller has arranged it");
        let row_len: usize = dataset.latent_shape(bucket).iter().product();
        let mut rows = Vec::with_capacity(arranged.row_refs.len());
        for row_ref in &arranged.row_refs {
            rows.push(dataset.locate(Split::Train, bucket, row_ref.row.into())?);
        }
        let num_delivered = rows.len() / size - self.left as usize;
        match &mut self.content {
            Content::Blocks {
                wanted,
                latents,
                scatter,
                ..
            } => {
                let places = Scatter::new(dataset, &rows, row_len, size, num_delivered, buffers);
                let places = Arc::new(places);
                for request in wanted.drain(..) {
                    latents.push(LatentBlocks::start(dataset, request, &places));
                }
                *scatter = Some(places);
            }
            Content::Rows { latents, .. } => {
                for rows in rows.chunks_exact(size).skip(num_delivered) {
                    let out = BatchLatents::unwritten(buffers, size * row_len);
                    let ticket = start_latents(dataset.clone(), rows.to_vec(), out, self.step);
                    latents.push_back(Arriving::UnderWay(ticket));
                }
            }
        }
        Ok(())
    }

    /// The latents of the window's micro-batch `number`, which has arrived: `rows` if they were
    /// read row by row.
    pub(crate) fn latents(
        &self,
        number: usize,
        rows: Option<BatchLatents>,
    ) -> Result<BatchLatents> {
        match (rows, &self.content) {
            (Some(rows), _) => Ok(rows),
            (
                None,
                Content::Blocks {
                    scatter: Some(scatter),
                    ..
                },
            ) => scatter.take(number),
            (None, _) => unreachable!("`arrive` has waited for the latents"),
        }
    }
}

/// Index of the request that holds a block. Requests are sorted by object and block.
fn position(latents: &[LatentBlocks], object: usize, block: u32) -> usize {
    latents.partition_point(|blocks| (blocks.object, blocks.first) <= (object, block)) - 1
}

impl<T: Send + 'static> Arriving<T> {
    /// Waits until it has arrived or `stop` is set.
    fn arrive(&mut self, stop: &AtomicBool) -> Result<()> {
        if let Self::UnderWay(ticket) = self {
            let Some(read) = ticket.wait_unless(stop) else {
                return Err(Error::Invalid {
                    what: "loader".to_owned(),
                    reason: "it was stopped".to_owned(),
                });
            };
            *self = Self::Here(read?);
        }
        Ok(())
    }

    fn into_arrived(mut self, stop: &AtomicBool) -> Result<T> {
        self.arrive(stop)?;
        match self {
            Self::Here(value) => Ok(value),
            Self::UnderWay(_) => unreachable!("`arrive` has returned"),
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
fn decode_records(
    dataset: &Dataset,
    text: &mut Vec<TextBlocks>,
    stop: &AtomicBool,
) -> Result<HashMap<ObjectRow, Record>> {
    for blocks in &mut *text {
        blocks.bytes.arrive(stop)?;
    }
    let decode = |blocks: &TextBlocks| match &blocks.bytes {
        Arriving::Here(bytes) => dataset.decode_text(blocks.object, blocks.first, bytes),
        Arriving::UnderWay(_) => unreachable!("`arrive` has returned"),
    };
    let decoded: Vec<Vec<Record>> = text.par_iter().map(decode).collect::<Result<_>>()?;
    let mut records = HashMap::new();
    for (blocks, decoded) in text.drain(..).zip(decoded) {
        for (row, record) in (blocks.first * BLOCK_ROWS..).zip(decoded) {
            records.insert((blocks.object, row), record);
        }
    }
    Ok(records)
}
