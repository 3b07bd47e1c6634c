//! The server: its settings, what it was asked, and how it answers.

use std::{
    collections::HashMap,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use futures_util::future::{Either, select};
use tokio::{net::TcpListener, runtime::Builder, sync::oneshot};
use xxhash_rust::xxh3::xxh3_64;

use crate::loopback::connection::serve;

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
    num_asked: AtomicU64,
    in_flight: AtomicU64,
    most_in_flight: AtomicU64,
    num_bytes: AtomicU64,
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
    fn pictures(&self) -> MutexGuard<'_, HashMap<u64, Count>> {
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

/// A running server. It stops when dropped.
#[derive(Debug)]
pub struct Loopback {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Loopback {
    /// Starts a server on a free port of the loopback interface, on a thread of its own. `before`
    /// runs on that thread first.
    ///
    /// # Panics
    /// If the system has no port or no thread.
    pub fn start(manner: Manner, before: impl FnOnce() + Send + 'static) -> Self {
        let shared = Arc::new(Shared {
            manner,
            num_asked: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            most_in_flight: AtomicU64::new(0),
            num_bytes: AtomicU64::new(0),
            pictures: Mutex::default(),
        });
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        listener
            .set_nonblocking(true)
            .expect("a socket can be made non-blocking");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address");
        let (stop, stopped) = oneshot::channel();
        let serving = shared.clone();
        let thread = thread::spawn(move || {
            before();
            let runtime = Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("the process can start threads");
            runtime.block_on(accept(listener, serving, stopped));
        });
        Self {
            address,
            shared,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// `http://127.0.0.1:PORT/v1`.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Requests so far.
    pub fn num_asked(&self) -> u64 {
        self.shared.num_asked.load(Ordering::Relaxed)
    }

    /// Bytes of the bodies of requests so far.
    pub fn num_bytes(&self) -> u64 {
        self.shared.num_bytes.load(Ordering::Relaxed)
    }

    /// Most requests that were under way at once.
    pub fn most_in_flight(&self) -> u64 {
        self.shared.most_in_flight.load(Ordering::Relaxed)
    }

    /// Requests by picture.
    pub fn pictures(&self) -> HashMap<u64, Count> {
        self.shared.pictures().clone()
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the server has been printed.
            let _ = thread.join();
        }
    }
}

async fn accept(
    listener: std::net::TcpListener,
    shared: Arc<Shared>,
    mut stopped: oneshot::Receiver<()>,
) {
    let listener = TcpListener::from_std(listener).expect("the socket is non-blocking");
    loop {
        let accepted = match select(pin!(listener.accept()), &mut stopped).await {
            Either::Left((accepted, _)) => accepted,
            Either::Right(_) => return,
        };
        if let Ok((stream, _)) = accepted {
            let shared = shared.clone();
            // A connection that ends in the middle is the client's affair.
            tokio::spawn(async move { drop(serve(stream, &shared).await) });
        }
    }
}
