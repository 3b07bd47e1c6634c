//! Blocks that were asked for, from a local file, a disk cache or a store.
//!
//! A request is started and waited for apart ([`Ticket`]), so that many are under way at once, complete in any order,
//! and are taken in the order in which their bytes are needed. Dropping a ticket cancels its request. What is wanted
//! next, and how much may be held, is decided by whoever asks (`feed`).

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
    remote::{
        Remote, on_disk,
        request::{Request, coalesce},
        runtime,
    },
};

/// Reads of local files at one time.
const LOCAL_READERS: usize = 8;
/// How often somebody who waits looks whether waiting is still worth it.
const STOP_INTERVAL: Duration = Duration::from_millis(50);
/// How often a reader looks whether another process has fetched what it waits for.
const OTHERS_INTERVAL: Duration = Duration::from_millis(10);

/// Starts reading the blocks of a request: from the local file or, where there is a `remote`, from there, as far as
/// `cache` does not have them.
pub(crate) fn start(request: Request, remote: Option<&Remote>, cache: Option<&DatasetCache>) -> Ticket {
    let (remote, cache) = (remote.cloned(), cache.cloned());
    Ticket::start(async move { read(request, remote.as_ref(), cache.as_ref()).await })
}

/// Reads the blocks of a request: from the local file or, where there is a `remote`, from there, as far as `cache` does
/// not have them.
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

fn read_local(request: &Request) -> Result<Vec<Bytes>> {
    let file = File::open(&request.path).map_err(Error::io(&request.path))?;
    read_from(&file, request)
}

/// Reads the blocks of a request from an open file.
///
/// # Errors
/// [`Error::Io`], and as [`Request::verify`].
pub(crate) fn read_from(file: &File, request: &Request) -> Result<Vec<Bytes>> {
    let range = request.range();
    let mut bytes = vec![0; (range.end - range.start) as usize];
    file.read_exact_at(&mut bytes, range.start).map_err(Error::io(&request.path))?;
    request.verify(bytes.into())
}

async fn fetch(request: &Request, remote: &Remote) -> Result<Vec<Bytes>> {
    remote.read_range(&request.name, request.range(), |bytes| request.verify(bytes)).await
}

/// The blocks of a request from `cache` or, where they are not there, from `remote`, and then kept in `cache`. Waits for
/// what another process fetches, as long as that may take with its retries.
async fn fetch_missing(request: Request, remote: &Remote, cache: &DatasetCache) -> Result<Vec<Bytes>> {
    let request = Arc::new(request);
    let began = Instant::now();
    let mut blocks: Vec<Option<Bytes>> = vec![None; request.blocks.len()];
    loop {
        let missing: Vec<u32> = (0..).zip(&blocks).filter(|(_, block)| block.is_none()).map(|(at, _)| at).collect();
        if missing.is_empty() {
            break;
        }
        if began.elapsed() > remote.patience() {
            fetch_runs(&request, remote, missing, &mut blocks).await?;
            break;
        }
        let num_missing = missing.len();
        let mut flights = Vec::new();
        let mut num_theirs = 0;
        for (at, boarding) in board(&request, cache, missing).await {
            match boarding {
                Boarding::Here(bytes) => blocks[at as usize] = Some(bytes),
                Boarding::Ours(flight) => flights.push((at, flight)),
                Boarding::Theirs => num_theirs += 1,
            }
        }
        // Nothing is waited for while others may wait for a flight of ours.
        fetch_runs(&request, remote, flights.iter().map(|(at, _)| *at).collect(), &mut blocks).await?;
        let kept: Vec<_> = flights.into_iter().map(|(at, flight)| (flight, blocks[at as usize].clone())).collect();
        on_disk(move || kept.into_iter().for_each(|(flight, bytes)| flight.keep(&bytes.unwrap_or_default()))).await;
        if num_theirs == num_missing {
            sleep(OTHERS_INTERVAL).await;
        }
    }
    Ok(blocks.into_iter().map(|block| block.expect("what was missing has been fetched")).collect())
}

/// Where each of the blocks `at` comes from.
async fn board(request: &Arc<Request>, cache: &DatasetCache, at: Vec<u32>) -> Vec<(u32, Boarding)> {
    let (request, cache) = (request.clone(), cache.clone());
    in_turn(move || at.into_iter().map(|at| (at, cache.board(&request, at as usize))).collect()).await
}

/// Fetches the blocks `at`, neighbours together.
async fn fetch_runs(request: &Request, remote: &Remote, at: Vec<u32>, blocks: &mut [Option<Bytes>]) -> Result<()> {
    for run in coalesce(at, u32::MAX) {
        let fetched = fetch(&request.part_of(run.clone()), remote).await?;
        for (block, bytes) in blocks[run.start as usize..].iter_mut().zip(fetched) {
            *block = Some(bytes);
        }
    }
    Ok(())
}

/// Reads from a disk, a few at a time, in the order in which they were asked for: what is needed first comes first.
pub(crate) async fn in_turn<T: Send + 'static>(read: impl FnOnce() -> T + Send + 'static) -> T {
    static READERS: Semaphore = Semaphore::const_new(LOCAL_READERS);
    let _permit = READERS.acquire().await.expect("the semaphore is never closed");
    on_disk(read).await
}

/// Something on its way, by default the blocks of a request. Dropping it cancels the request.
#[derive(Debug)]
pub(crate) struct Ticket<T = Vec<Bytes>>(Option<JoinHandle<Result<T>>>);

impl<T: Send + 'static> Ticket<T> {
    /// Starts reading.
    pub(crate) fn start(reading: impl Future<Output = Result<T>> + Send + 'static) -> Self {
        Self(Some(runtime().spawn(reading)))
    }

    /// Waits for it: at most as long as the network settings allow a request to take.
    ///
    /// # Errors
    /// What reading met, after its retries.
    ///
    /// # Panics
    /// If the reading task did, or if it was waited for before.
    pub(crate) fn wait(&mut self) -> Result<T> {
        static NEVER: AtomicBool = AtomicBool::new(false);
        self.wait_unless(&NEVER).expect("it is never told to stop")
    }

    /// The same, but not for long after `stop` has been set: then there is none.
    pub(crate) fn wait_unless(&mut self, stop: &AtomicBool) -> Option<Result<T>> {
        let mut task = self.0.take().expect("a ticket is waited for once");
        loop {
            if let Ok(ended) = runtime().block_on(async { timeout(STOP_INTERVAL, &mut task).await }) {
                return Some(ended.expect("a task that is waited for is not cancelled, and reading does not panic"));
            }
            if stop.load(Ordering::Relaxed) {
                task.abort();
                return None;
            }
        }
    }

    /// Whether waiting would not wait.
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
