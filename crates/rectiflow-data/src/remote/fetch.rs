//! Whole blocks by request: one range of an object for consecutive blocks, each verified by its checksum on arrival.
//!
//! A request is started and waited for apart ([`Ticket`]), so that many are under way at once, complete in any order,
//! and are taken in the order in which their bytes are needed. Dropping a ticket cancels its request. What is wanted
//! next, and how much may be held, is decided by whoever asks (`feed`).

use std::{
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::PathBuf,
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
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    cache::{DatasetCache, flight::Boarding},
    error::{Error, Result},
    remote::{Remote, runtime},
};

/// Reads of local files at one time.
const LOCAL_READERS: usize = 8;
/// How often somebody who waits looks whether waiting is still worth it.
const STOP_INTERVAL: Duration = Duration::from_millis(50);
/// How often a reader looks whether another process has fetched what it waits for.
const OTHERS_INTERVAL: Duration = Duration::from_millis(10);

/// Which of an object's two files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Part {
    /// The safetensors file.
    Latents,
    /// The Parquet file.
    Text,
}

/// Consecutive blocks of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) part: Part,
    /// Index of the object in the manifest.
    pub(crate) object: usize,
    /// Number of the first block in it.
    pub(crate) first: u32,
    /// Name in the data set.
    pub(crate) name: String,
    /// Path or URL, for messages.
    pub(crate) path: PathBuf,
    pub(crate) start: u64,
    /// The step that needs it: a cache keeps what is needed again soon after. 0 where that is not known.
    pub(crate) step: u64,
    /// Length and XXH3-64 of each block.
    pub(crate) blocks: Vec<(u64, u64)>,
}

impl Request {
    pub(crate) fn range(&self) -> Range<u64> {
        self.start..self.start + self.blocks.iter().map(|(len, _)| len).sum::<u64>()
    }

    /// The bytes of each block, if every one is what was written.
    ///
    /// # Errors
    /// [`Error::Damaged`] naming the first block that is not.
    pub(crate) fn verify(&self, mut bytes: Bytes) -> Result<Vec<Bytes>> {
        let mut start = self.start;
        let verify = |&(len, expected): &(u64, u64)| {
            let block = bytes.split_to(len as usize);
            let (found, range) = (xxh3_64(&block), start..start + len);
            start += len;
            if found == expected {
                return Ok(block);
            }
            Err(Error::Damaged { path: self.path.clone(), range, expected, found })
        };
        self.blocks.iter().map(verify).collect()
    }

    /// Reads it from an open file.
    ///
    /// # Errors
    /// [`Error::Io`], and as [`Request::verify`].
    pub(crate) fn read(&self, file: &File) -> Result<Vec<Bytes>> {
        let range = self.range();
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut bytes, range.start).map_err(Error::io(&self.path))?;
        self.verify(bytes.into())
    }

    /// Reads it from the local file.
    pub(crate) async fn read_local(self) -> Result<Vec<Bytes>> {
        in_turn(move || File::open(&self.path).map_err(Error::io(&self.path)).and_then(|file| self.read(&file))).await
    }

    /// Reads it from `remote`, as far as `cache` has not got it.
    pub(crate) async fn read_remote(self, remote: &Remote, cache: Option<DatasetCache>) -> Result<Vec<Bytes>> {
        match cache {
            None => self.fetch(remote).await,
            Some(cache) => self.fetch_missing(remote, cache).await,
        }
    }

    async fn fetch(&self, remote: &Remote) -> Result<Vec<Bytes>> {
        remote.read_range(&self.name, self.range(), |bytes| self.verify(bytes)).await
    }

    /// Its blocks from `cache` or, where they are not there, from `remote`, which then keeps them. What another process
    /// fetches is waited for, as long as that may take with its retries.
    async fn fetch_missing(self, remote: &Remote, cache: DatasetCache) -> Result<Vec<Bytes>> {
        let (this, began) = (Arc::new(self), Instant::now());
        let mut blocks: Vec<Option<Bytes>> = vec![None; this.blocks.len()];
        loop {
            let missing: Vec<u32> = (0..).zip(&blocks).filter(|(_, block)| block.is_none()).map(|(at, _)| at).collect();
            if missing.is_empty() {
                break;
            }
            if began.elapsed() > remote.patience() {
                this.fetch_runs(remote, missing, &mut blocks).await?;
                break;
            }
            let num_missing = missing.len();
            let (look, request) = (cache.clone(), this.clone());
            let boarded = in_turn(move || -> Vec<(u32, Boarding)> {
                missing.into_iter().map(|at| (at, look.board(&request, at as usize))).collect()
            });
            let mut flights = Vec::new();
            let mut num_theirs = 0;
            for (at, boarding) in boarded.await {
                match boarding {
                    Boarding::Here(bytes) => blocks[at as usize] = Some(bytes),
                    Boarding::Ours(flight) => flights.push((at, flight)),
                    Boarding::Theirs => num_theirs += 1,
                }
            }
            // Nothing is waited for while others may wait for a flight of ours.
            this.fetch_runs(remote, flights.iter().map(|(at, _)| *at).collect(), &mut blocks).await?;
            let kept: Vec<_> = flights.into_iter().map(|(at, flight)| (flight, blocks[at as usize].clone())).collect();
            on_disk(move || kept.into_iter().for_each(|(flight, bytes)| flight.keep(&bytes.unwrap_or_default()))).await;
            if num_theirs == num_missing {
                sleep(OTHERS_INTERVAL).await;
            }
        }
        Ok(blocks.into_iter().map(|block| block.expect("what was missing has been fetched")).collect())
    }

    /// Fetches the blocks `at`, neighbours together.
    async fn fetch_runs(&self, remote: &Remote, at: Vec<u32>, blocks: &mut [Option<Bytes>]) -> Result<()> {
        for run in coalesce(at, u32::MAX) {
            let fetched = self.part_of(run.clone()).fetch(remote).await?;
            for (block, bytes) in blocks[run.start as usize..].iter_mut().zip(fetched) {
                *block = Some(bytes);
            }
        }
        Ok(())
    }

    /// The request for some of its blocks.
    fn part_of(&self, blocks: Range<u32>) -> Self {
        let bytes = |blocks: &[(u64, u64)]| blocks.iter().map(|(len, _)| len).sum::<u64>();
        let range = blocks.start as usize..blocks.end as usize;
        Self {
            first: self.first + blocks.start,
            start: self.start + bytes(&self.blocks[..range.start]),
            blocks: self.blocks[range].to_vec(),
            ..self.clone()
        }
    }
}

/// Reads from a disk, a few at a time, in the order in which they were asked for: what is needed first comes first.
pub(crate) async fn in_turn<T: Send + 'static>(read: impl FnOnce() -> T + Send + 'static) -> T {
    static READERS: Semaphore = Semaphore::const_new(LOCAL_READERS);
    let _permit = READERS.acquire().await.expect("the semaphore is never closed");
    on_disk(read).await
}

/// Runs what waits for a disk where waiting is allowed.
pub(crate) async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    runtime().spawn_blocking(work).await.expect("nobody cancels it, and it does not panic")
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

/// Groups sorted block numbers of one object into runs of consecutive ones, each of at most `longest` blocks.
pub(crate) fn coalesce(blocks: impl IntoIterator<Item = u32>, longest: u32) -> Vec<Range<u32>> {
    let mut runs: Vec<Range<u32>> = Vec::new();
    for block in blocks {
        match runs.last_mut() {
            Some(run) if run.end == block && run.end - run.start < longest => run.end += 1,
            _ => runs.push(block..block + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_read_together() {
        assert_eq!(coalesce([0, 1, 2, 5, 6, 9], 8), [0..3, 5..7, 9..10]);
        assert_eq!(coalesce(0..5, 2), [0..2, 2..4, 4..5]);
        assert!(coalesce([], 2).is_empty());
    }

    #[test]
    fn blocks_are_told_apart_and_verified_one_by_one() {
        let bytes = Bytes::from_static(b"first, second");
        let blocks = vec![(5, xxh3_64(b"first")), (8, xxh3_64(b", second"))];
        let (part, object, first) = (Part::Text, 0, 5);
        let request =
            Request { part, object, first, name: "n".into(), path: "p/n".into(), start: 100, step: 0, blocks };
        assert_eq!(request.range(), 100..113);
        assert_eq!(request.verify(bytes.clone()).unwrap(), ["first", ", second"]);
        let second = request.part_of(1..2);
        assert_eq!((second.first, second.range()), (6, 105..113));
        assert_eq!(second.verify(bytes.slice(5..)).unwrap(), [", second"]);
        let error = request.verify(Bytes::from_static(b"first, sEcond")).unwrap_err();
        assert!(matches!(error, Error::Damaged { range, .. } if range == (105..113)));
    }
}
