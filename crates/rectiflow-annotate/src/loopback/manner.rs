//! How the server behaves, and what it was asked.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use xxhash_rust::xxh3::xxh3_64;

/// A fault of one answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Misdeed {
    /// This status, with `Retry-After` in seconds if it is not 0.
    Status(u16, u32),
    /// The connection is closed without an answer.
    Hangup,
    /// The body ends after this many bytes, and the connection with it.
    CutBody(usize),
    /// Nothing is sent until the client leaves.
    Stall,
    /// The body is no JSON.
    NoJson,
    /// Another model answers.
    OtherModel,
    /// The answer takes this much longer.
    Slow(Duration),
    /// The answer has this text and ends for this reason.
    Says(String, &'static str),
}

/// A request as received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// Counted from 0.
    pub number: u64,
    /// Hash of the picture in it, or None without a picture or with `looks` off.
    pub picture: Option<u64>,
    /// Earlier requests with this picture.
    pub repeat: u64,
}

type Misdeeds = dyn Fn(&Asked) -> Option<Misdeed> + Send + Sync;

/// How a server behaves.
pub struct Manner {
    /// The model that it lists, and that answers.
    pub model: String,
    /// Time until an answer.
    pub delay: Duration,
    /// The key that it wants.
    pub key: Option<String>,
    /// Look at the picture: answers differ by it and requests are counted by it. Without, the
    /// server does as little as it can.
    pub looks: bool,
    /// What goes wrong.
    pub misdeeds: Box<Misdeeds>,
}

impl std::fmt::Debug for Manner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Manner")
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            model: "loopback".to_owned(),
            delay: Duration::ZERO,
            key: None,
            looks: true,
            misdeeds: Box::new(|_| None),
        }
    }
}

/// What the connections of a server share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) manner: Manner,
    pub(crate) num_asked: AtomicU64,
    in_flight: AtomicU64,
    pub(crate) most_in_flight: AtomicU64,
    pub(crate) num_bytes: AtomicU64,
    pictures: Mutex<HashMap<u64, Count>>,
}

/// Requests about a picture.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Requests that arrived.
    pub asked: u64,
    /// Answers without a fault that were sent to the end.
    pub answered: u64,
}

impl Shared {
    /// A server that was asked nothing.
    pub(crate) fn new(manner: Manner) -> Self {
        Self {
            manner,
            num_asked: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            most_in_flight: AtomicU64::new(0),
            num_bytes: AtomicU64::new(0),
            pictures: Mutex::default(),
        }
    }

    pub(crate) fn pictures(&self) -> MutexGuard<'_, HashMap<u64, Count>> {
        self.pictures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request with this body.
    pub(crate) fn ask(&self, body: &[u8]) -> Asked {
        self.num_bytes
            .fetch_add(body.len() as u64, Ordering::Relaxed);
        let now = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        self.most_in_flight.fetch_max(now, Ordering::Relaxed);
        let picture = match self.manner.looks {
            true => picture_in(body).map(xxh3_64),
            false => None,
        };
        let mut repeat = 0;
        if let Some(picture) = picture {
            let mut pictures = self.pictures();
            let count = pictures.entry(picture).or_default();
            repeat = count.asked;
            count.asked += 1;
        }
        Asked {
            number: self.num_asked.fetch_add(1, Ordering::Relaxed),
            picture,
            repeat,
        }
    }

    /// Counts the end of a request.
    pub(crate) fn end(&self, asked: &Asked, is_answered: bool) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        if let (true, Some(picture)) = (is_answered, asked.picture) {
            self.pictures().entry(picture).or_default().answered += 1;
        }
    }
}

/// The base64 of the picture in a body.
fn picture_in(body: &[u8]) -> Option<&[u8]> {
    const MARK: &[u8] = b"data:image/jpeg;base64,";
    let at = body.windows(MARK.len()).position(|window| window == MARK)? + MARK.len();
    let end = body[at..].iter().position(|&byte| byte == b'"')?;
    Some(&body[at..at + end])
}
