//! Reading requested blocks from a local file, a disk cache or a store.
//!
//! Starting a request and waiting for it are separate ([`Ticket`]), so that many requests run at
//! once, complete in any order, and are taken in the order in which their bytes are needed.
//! Dropping a ticket cancels its request. The caller decides what to request next and how much to
//! hold (`feed`).

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{
    sync::Semaphore,
    task::JoinHandle,
    time::{sleep, timeout},
};

use crate::{
    cache::{DatasetCache, flight::Boarding},
    error::{Error, Result},
    format::block_table::BLOCK_ROWS,
    remote::{
        Remote, on_disk,
        request::{Request, coalesce},
        runtime,
    },
};

/// Concurrent reads of local files.
const LOCAL_READERS: usize = 8;
/// How often a waiting thread checks its stop flag.
const STOP_INTERVAL: Duration = Duration::from_millis(50);
/// How often a reader checks whether another process has fetched the blocks that it waits for.
const OTHERS_INTERVAL: Duration = Duration::from_millis(10);

/// Starts reading the blocks of a request, as [`read`] does.
pub(crate) fn start(
    request: Request,
    remote: Option<&Remote>,
    cache: Option<&DatasetCache>,
) -> Ticket {
    let (remote, cache) = (remote.cloned(), cache.cloned());
    Ticket::start(async move { read(request, remote.as_ref(), cache.as_ref()).await })
}

/// Reads the blocks of a request: from the local file if `remote` is `None`, otherwise from
/// `cache`, and from `remote` those that `cache` does not have.
pub(crate) async fn read(
    request: Request,
    remote: Option<&Remote>,
    cache: Option<&DatasetCache>,
) -> Result<Vec<Bytes>> {
    match (remote, cache) {
        (None, _) => in_turn(move || read_local(&request)).await,
        (Some(remote), None) => fetch(&request, remote).await,
        (Some(remote), Some(cache)) => fetch_missing(request, remote, cache).await,
    }
}

/// Starts reading the blocks of a request as [`start`] does, in rows of `row_bytes`. Calls `take`
/// with the number in the object and the bytes of each, and again if a request is repeated. The
/// rows are verified once the ticket says that reading has succeeded.
pub(crate) fn start_rows(
    request: Request,
    row_bytes: usize,
    remote: Option<&Remote>,
    cache: Option<&DatasetCache>,
    take: impl Fn(u32, &[u8]) + Send + Sync + 'static,
) -> Ticket<()> {
    let (remote, cache) = (remote.cloned(), cache.cloned());
    let first_row = request.first * BLOCK_ROWS;
    Ticket::start(async move {
        match (remote, cache) {
            (None, _) => in_turn(move || read_local_rows(&request, row_bytes, take)).await,
            (Some(remote), None) => {
                let begin = || {
                    let mut verifier = request.verifier();
                    let mut rows = first_row..;
                    let take = &take;
                    move |bytes: &[u8]| {
                        verifier.update(bytes)?;
                        take(rows.next().expect("rows are endless"), bytes);
                        Ok(())
                    }
                };
                let range = request.range();
                remote
                    .read_parts(&request.name, range, row_bytes, begin)
                    .await
            }
            (Some(remote), Some(cache)) => {
                let blocks = fetch_missing(request, &remote, &cache).await?;
                let rows = blocks
                    .iter()
                    .flat_map(|block| block.chunks_exact(row_bytes));
                for (row, bytes) in (first_row..).zip(rows) {
                    take(row, bytes);
                }
                Ok(())
            }
        }
    })
}

/// Reads the blocks of a request from a disk, one row after the other into the same memory.
fn read_local_rows(request: &Request, row_bytes: usize, take: impl Fn(u32, &[u8])) -> Result<()> {
    let file = File::open(&request.path).map_err(Error::io(&request.path))?;
    let mut verifier = request.verifier();
    let mut bytes = vec![0; row_bytes];
    let offsets = request.range().step_by(row_bytes);
    for (row, offset) in (request.first * BLOCK_ROWS..).zip(offsets) {
        file.read_exact_at(&mut bytes, offset)
            .map_err(Error::io(&request.path))?;
        verifier.update(&bytes)?;
        take(row, &bytes);
    }
    Ok(())
}

fn read_local(request: &Request) -> Result<Vec<Bytes>> {
    let file = File::open(&request.path).map_err(Error::io(&request.path))?;
    let range = request.range();
    let mut bytes = vec![0; (range.end - range.start) as usize];
    file.read_exact_at(&mut bytes, range.start)
        .map_err(Error::io(&request.path))?;
    request.verify(bytes.into())
}

/// Reads one row of the block of a request from an open file into `out`, and verifies the whole
/// block. `row` counts from the first of the block, `scratch` has room for a row.
///
/// # Errors
/// [`Error::Io`]; [`Error::Damaged`] if the block's checksum differs.
pub(crate) fn read_verified_row(
    file: &File,
    request: &Request,
    row: u32,
    scratch: &mut [u8],
    out: &mut [u8],
) -> Result<()> {
    let mut verifier = request.verifier();
    let offsets = request.range().step_by(out.len());
    for (at, offset) in (0..).zip(offsets) {
        let bytes = if at == row { &mut *out } else { &mut *scratch };
        file.read_exact_at(bytes, offset)
            .map_err(Error::io(&request.path))?;
        verifier.update(bytes)?;
    }
    Ok(())
}

async fn fetch(request: &Request, remote: &Remote) -> Result<Vec<Bytes>> {
    remote
        .read_range(&request.name, request.range(), |bytes| {
            request.verify(bytes)
        })
        .await
}

/// Reads the blocks of a request from `cache`, and from `remote` those that are missing there,
/// which are then kept in `cache`. Waits for blocks that another process fetches, at most as long
/// as a fetch takes with its retries.
async fn fetch_missing(
    request: Request,
    remote: &Remote,
    cache: &DatasetCache,
) -> Result<Vec<Bytes>> {
    let request = Arc::new(request);
    let began = Instant::now();
    let mut blocks: Vec<Option<Bytes>> = vec![None; request.blocks.len()];
    loop {
        let missing = missing(&blocks);
        if missing.is_empty() {
            break;
        }
        if began.elapsed() > remote.patience() {
            fetch_runs(&request, remote, missing, &mut blocks).await?;
            break;
        }
        if !fetch_ours(&request, remote, cache, missing, &mut blocks).await? {
            sleep(OTHERS_INTERVAL).await;
        }
    }
    Ok(blocks
        .into_iter()
        .map(|block| block.expect("every missing block has been fetched"))
        .collect())
}

fn missing(blocks: &[Option<Bytes>]) -> Vec<u32> {
    let mut missing = Vec::new();
    for (at, block) in (0..).zip(blocks) {
        if block.is_none() {
            missing.push(at);
        }
    }
    missing
}

/// Reads those of the blocks `missing` that are in `cache` by now, and fetches and keeps those that
/// no other process fetches. Returns whether there was such a block.
async fn fetch_ours(
    request: &Arc<Request>,
    remote: &Remote,
    cache: &DatasetCache,
    missing: Vec<u32>,
    blocks: &mut [Option<Bytes>],
) -> Result<bool> {
    let mut has_read = false;
    let mut flights = Vec::new();
    for (at, boarding) in board(request, cache, missing).await {
        match boarding {
            Boarding::Here(bytes) => {
                blocks[at as usize] = Some(bytes);
                has_read = true;
            }
            Boarding::Ours(flight) => flights.push((at, flight)),
            Boarding::Theirs => {}
        }
    }
    has_read |= !flights.is_empty();
    // Finish our own flights before waiting: other processes may wait for them.
    let ours = flights.iter().map(|(at, _)| *at).collect();
    fetch_runs(request, remote, ours, blocks).await?;
    let mut kept = Vec::with_capacity(flights.len());
    for (at, flight) in flights {
        kept.push((flight, blocks[at as usize].clone().unwrap_or_default()));
    }
    on_disk(move || {
        for (flight, bytes) in kept {
            flight.keep(&bytes);
        }
    })
    .await;
    Ok(has_read)
}

/// The source of each of the blocks `at`.
async fn board(request: &Arc<Request>, cache: &DatasetCache, at: Vec<u32>) -> Vec<(u32, Boarding)> {
    let (request, cache) = (request.clone(), cache.clone());
    in_turn(move || {
        at.into_iter()
            .map(|at| (at, cache.board(&request, at as usize)))
            .collect()
    })
    .await
}

/// Fetches the blocks `at` into `blocks`, consecutive ones with one request.
async fn fetch_runs(
    request: &Request,
    remote: &Remote,
    at: Vec<u32>,
    blocks: &mut [Option<Bytes>],
) -> Result<()> {
    for run in coalesce(at, u32::MAX) {
        let fetched = fetch(&request.part_of(run.clone()), remote).await?;
        for (block, bytes) in blocks[run.start as usize..].iter_mut().zip(fetched) {
            *block = Some(bytes);
        }
    }
    Ok(())
}

/// Runs a read from a disk, [`LOCAL_READERS`] at a time, in the order of the calls: blocks that are
/// needed first arrive first.
pub(crate) async fn in_turn<T: Send + 'static>(read: impl FnOnce() -> T + Send + 'static) -> T {
    static READERS: Semaphore = Semaphore::const_new(LOCAL_READERS);
    let _permit = READERS
        .acquire()
        .await
        .expect("the semaphore is never closed");
    on_disk(read).await
}

/// A pending read, by default of the blocks of a request. Dropping it cancels the read.
#[derive(Debug)]
pub(crate) struct Ticket<T = Vec<Bytes>>(Option<JoinHandle<Result<T>>>);

impl<T: Send + 'static> Ticket<T> {
    /// Starts reading.
    pub(crate) fn start(reading: impl Future<Output = Result<T>> + Send + 'static) -> Self {
        Self(Some(runtime().spawn(reading)))
    }

    /// Waits for the result, at most as long as the network settings allow for a request.
    ///
    /// # Errors
    /// The errors of reading, after its retries.
    ///
    /// # Panics
    /// If the reading task panicked, or on a second call.
    pub(crate) fn wait(&mut self) -> Result<T> {
        static NEVER: AtomicBool = AtomicBool::new(false);
        self.wait_unless(&NEVER).expect("`NEVER` is never set")
    }

    /// As [`Ticket::wait`], but returns `None` soon after `stop` is set.
    pub(crate) fn wait_unless(&mut self, stop: &AtomicBool) -> Option<Result<T>> {
        let mut task = self.0.take().expect("a ticket is waited for only once");
        loop {
            if let Ok(ended) = runtime().block_on(async { timeout(STOP_INTERVAL, &mut task).await })
            {
                return Some(ended.expect("reading is not cancelled here and does not panic"));
            }
            if stop.load(Ordering::Relaxed) {
                task.abort();
                return None;
            }
        }
    }

    /// Whether [`Ticket::wait`] returns at once.
    pub(crate) fn is_finished(&self) -> bool {
        self.0.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}
