//! Whole blocks by request: one range of an object for consecutive blocks, each verified by its checksum on arrival.
//!
//! A request is started and waited for apart ([`Ticket`]), so that many are under way at once, complete in any order,
//! and are taken in the order in which their bytes are needed. Dropping a ticket cancels its request. What is wanted
//! next, and how much may be held, is decided by whoever asks (`feed`).

use std::{fs::File, ops::Range, os::unix::fs::FileExt, path::PathBuf};

use bytes::Bytes;
use tokio::task::JoinHandle;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    Error, Result,
    remote::{Remote, runtime},
};

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
    /// Name in the data set.
    pub(crate) name: String,
    /// Path or URL, for messages.
    pub(crate) path: PathBuf,
    pub(crate) start: u64,
    /// Length and XXH3-64 of each block.
    pub(crate) blocks: Vec<(u64, u64)>,
}

impl Request {
    pub(crate) fn range(&self) -> Range<u64> {
        self.start..self.start + self.blocks.iter().map(|(len, _)| len).sum::<u64>()
    }

    /// The bytes, if every block is what was written.
    ///
    /// # Errors
    /// [`Error::Damaged`] naming the first block that is not.
    pub(crate) fn verify(&self, bytes: Bytes) -> Result<Bytes> {
        let mut at = 0;
        for &(len, expected) in &self.blocks {
            let found = xxh3_64(&bytes[at..at + len as usize]);
            if found != expected {
                let start = self.start + at as u64;
                return Err(Error::Damaged { path: self.path.clone(), range: start..start + len, expected, found });
            }
            at += len as usize;
        }
        Ok(bytes)
    }

    /// The bytes of each block in turn.
    pub(crate) fn split(&self, mut bytes: Bytes) -> Vec<Bytes> {
        self.blocks.iter().map(|&(len, _)| bytes.split_to(len as usize)).collect()
    }

    /// Reads it from an open file.
    ///
    /// # Errors
    /// [`Error::Io`], and as [`Request::verify`].
    pub(crate) fn read(&self, file: &File) -> Result<Bytes> {
        let range = self.range();
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut bytes, range.start).map_err(Error::io(&self.path))?;
        self.verify(bytes.into())
    }

    /// Starts reading it from `remote`, or from the local file where there is none.
    pub(crate) fn start(self, remote: Option<&Remote>) -> Ticket {
        let Some(remote) = remote.cloned() else {
            let read = move || File::open(&self.path).map_err(Error::io(&self.path)).and_then(|file| self.read(&file));
            return Ticket(Some(runtime().spawn_blocking(read)));
        };
        let read = async move { remote.read_range(&self.name, self.range(), |bytes| self.verify(bytes)).await };
        Ticket(Some(runtime().spawn(read)))
    }
}

/// A request under way. Dropping it cancels the request.
#[derive(Debug)]
pub(crate) struct Ticket(Option<JoinHandle<Result<Bytes>>>);

impl Ticket {
    /// Waits for the bytes: at most as long as the network settings allow a request to take.
    ///
    /// # Errors
    /// What reading met, after its retries.
    ///
    /// # Panics
    /// If the reading task did.
    pub(crate) fn wait(&mut self) -> Result<Bytes> {
        let task = self.0.take().expect("a ticket is waited for once");
        runtime().block_on(task).expect("a task that is waited for is not cancelled, and reading does not panic")
    }
}

impl Ticket {
    /// Whether waiting would not wait.
    pub(crate) fn is_finished(&self) -> bool {
        self.0.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Ticket {
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
        let request = Request { name: "n".into(), path: "p/n".into(), start: 100, blocks };
        assert_eq!(request.range(), 100..113);
        assert_eq!(request.split(request.verify(bytes).unwrap()), ["first", ", second"]);
        let error = request.verify(Bytes::from_static(b"first, sEcond")).unwrap_err();
        assert!(matches!(error, Error::Damaged { range, .. } if range == (105..113)));
    }
}
