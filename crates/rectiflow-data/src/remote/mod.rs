//! Objects at a URL: ranges of bytes over the network, with deadlines, bounded retries and errors
//! that name the object.
//!
//! `s3://bucket/prefix` (any endpoint: AWS_ENDPOINT_URL), `gs://`, `az://` and `http(s)://` through
//! `object_store`, with credentials from the usual environment variables and, for S3, profiles
//! (`aws_profile`). Its own timeout (30 s for a whole body) and its own retries are switched off:
//! what matters on a slow line is whether bytes still arrive. Server errors, throttling, timeouts,
//! stalls, cut bodies and wrong bytes are retried after growing, jittered pauses; "not found" and
//! "not allowed" are not.
//!
//! Only this folder, `dataset::fetch` and `dataset::rows` contain `async` code; their tasks run on
//! one small runtime of this process. The caller knows what the bytes mean and passes a function
//! that checks them.

pub(crate) mod aws_profile;
pub(crate) mod buffers;
pub(crate) mod network;
pub(crate) mod request;
pub(crate) mod store;
pub(crate) mod upload;

use std::{
    error::Error as StdError,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures_util::StreamExt;
use object_store::{
    GetOptions, GetRange, ObjectStore, ObjectStoreExt, ObjectStoreScheme, client::HttpError,
    path::Path as Key,
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::Semaphore,
    time::{sleep, timeout},
};
use url::Url;

use crate::{
    error::{Error, Result},
    remote::{
        buffers::Buffers,
        network::Network,
        store::{NO_RETRY, install_tls, open_store, options},
    },
    rng::{Purpose, Rng},
};

/// The location of a data set.
#[derive(Debug, Clone)]
pub(crate) enum Location {
    /// A folder.
    Folder(PathBuf),
    /// A prefix at a URL.
    Remote(Remote),
}

impl Location {
    /// Parses a path or a URL: text with `://` in it is a URL, and `file://` is a folder.
    pub(crate) fn parse(place: &Path, network: &Network) -> Result<Self> {
        let Some(text) = place.to_str().filter(|text| text.contains("://")) else {
            return Ok(Self::Folder(place.to_owned()));
        };
        let wrong = |reason: String| Error::Invalid {
            what: text.to_owned(),
            reason,
        };
        let url = Url::parse(text).map_err(|error| wrong(format!("not a URL: {error}")))?;
        if url.scheme() == "file" {
            let folder = url
                .to_file_path()
                .map_err(|()| wrong("expected file:///absolute/path".to_owned()))?;
            return Ok(Self::Folder(folder));
        }
        Remote::open(text, &url, network)
            .map(Self::Remote)
            .map_err(wrong)
    }
}

/// A prefix in an object store. Cheap to clone; clones share connections and the limit on requests.
#[derive(Debug, Clone)]
pub(crate) struct Remote {
    store: Arc<dyn ObjectStore>,
    parsed: Arc<(ObjectStoreScheme, Url)>,
    prefix: Key,
    /// As the user wrote it, without a slash at the end.
    url: Arc<str>,
    network: Arc<Network>,
    permits: Arc<Semaphore>,
    buffers: Buffers<u8>,
}

/// Why an attempt failed, and whether another one can succeed.
enum Failure {
    /// Another attempt would fail as well.
    Lasting(Error),
    /// Another attempt can succeed.
    Passing(Reason),
}

enum Reason {
    Words(String),
    Check(Error),
}

impl Remote {
    fn open(text: &str, url: &Url, network: &Network) -> std::result::Result<Self, String> {
        install_tls();
        let known = "expected s3://, gs://, az://, http://, https:// or file://";
        let (scheme, prefix) =
            ObjectStoreScheme::parse(url).map_err(|error| format!("{error}; {known}"))?;
        let store = open_store(&scheme, url, options(url, network), NO_RETRY)
            .map_err(|error| chain(&error))?;
        let store = store.ok_or_else(|| known.to_owned())?;
        let (network, permits) = (
            Arc::new(network.clone()),
            Arc::new(Semaphore::new(network.concurrency)),
        );
        let parsed = Arc::new((scheme, url.clone()));
        let url = text.trim_end_matches('/').into();
        Ok(Self {
            store,
            parsed,
            prefix,
            url,
            network,
            permits,
            buffers: Buffers::default(),
        })
    }

    /// Converts an error of a client.
    pub(crate) fn failed(&self, name: &str, error: &object_store::Error) -> Error {
        match self.classify(name, None, error) {
            Failure::Lasting(error) | Failure::Passing(Reason::Check(error)) => error,
            Failure::Passing(Reason::Words(reason)) => self.error(name, None, 1, reason),
        }
    }

    /// Reads the whole object `name`, which must not be longer than `limit` bytes.
    pub(crate) async fn read_all(&self, name: &str, limit: u64) -> Result<Bytes> {
        self.read(name, None, limit, Ok).await
    }

    /// Reads the bytes `range` of the object `name` and returns what `check` returns for them.
    /// Bytes that `check` refuses are requested again.
    pub(crate) async fn read_range<T>(
        &self,
        name: &str,
        range: Range<u64>,
        check: impl Fn(Bytes) -> Result<T>,
    ) -> Result<T> {
        let limit = range.end - range.start;
        self.read(name, Some(range), limit, check).await
    }

    /// Length of the object `name`.
    pub(crate) async fn len(&self, name: &str) -> Result<u64> {
        let key = self.key(name);
        let head = || async {
            self.store
                .head(&key)
                .await
                .map_err(|error| self.classify(name, None, &error))
        };
        self.retried(name, None, head).await.map(|meta| meta.size)
    }

    /// The object's full URL, for messages.
    pub(crate) fn url_of(&self, name: &str) -> String {
        format!("{}/{name}", self.url)
    }

    /// Longest time for all attempts at a request.
    pub(crate) fn patience(&self) -> Duration {
        self.network.deadline
    }

    fn key(&self, name: &str) -> Key {
        name.split('/')
            .fold(self.prefix.clone(), |key, part| key.join(part))
    }

    async fn read<T>(
        &self,
        name: &str,
        range: Option<Range<u64>>,
        limit: u64,
        check: impl Fn(Bytes) -> Result<T>,
    ) -> Result<T> {
        let attempt = || async {
            let bytes = self.attempt(name, range.clone(), limit).await?;
            check(bytes).map_err(|error| Failure::Passing(Reason::Check(error)))
        };
        self.retried(name, range.clone(), attempt).await
    }

    /// Calls `attempt` until it succeeds, fails for good, or reaches the limit of attempts or the
    /// deadline.
    async fn retried<T, F>(
        &self,
        name: &str,
        range: Option<Range<u64>>,
        attempt: impl Fn() -> F,
    ) -> Result<T>
    where
        F: Future<Output = std::result::Result<T, Failure>>,
    {
        let _permit = self
            .permits
            .acquire()
            .await
            .expect("the semaphore is never closed");
        let Network {
            attempts, deadline, ..
        } = *self.network;
        let began = Instant::now();
        let mut last = Reason::Words("the store did not answer in time".to_owned());
        for number in 1..=attempts {
            match timeout(deadline.saturating_sub(began.elapsed()), attempt()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(Failure::Lasting(error))) => return Err(error),
                Ok(Err(Failure::Passing(reason))) => last = reason,
                Err(_) => return Err(self.gave_up(name, range, number, began.elapsed(), last)),
            }
            let pause = self.pause(number);
            if number == attempts || began.elapsed() + pause >= deadline {
                return Err(self.gave_up(name, range, number, began.elapsed(), last));
            }
            tracing::debug!(object = %self.url_of(name), ?range, number, reason = %last, "requesting again");
            sleep(pause).await;
        }
        unreachable!("the loop returns with its last attempt")
    }

    /// One request, read to its end.
    async fn attempt(
        &self,
        name: &str,
        range: Option<Range<u64>>,
        limit: u64,
    ) -> std::result::Result<Bytes, Failure> {
        let stall = self.network.stall_timeout;
        let stalled = |read: usize| {
            let secs = stall.as_secs_f64();
            Failure::Passing(Reason::Words(format!(
                "it stalled: no byte arrived for {secs} s after {read} bytes"
            )))
        };
        let options = GetOptions {
            range: range.clone().map(GetRange::Bounded),
            ..Default::default()
        };
        let key = self.key(name);
        let answer = timeout(stall, self.store.get_opts(&key, options))
            .await
            .map_err(|_| stalled(0))?;
        let answer = answer.map_err(|error| self.classify(name, range.clone(), &error))?;
        let expected = answer.range.end - answer.range.start;
        if range.is_none() && expected > limit {
            let reason = format!("it has {expected} bytes, expected at most {limit}");
            return Err(Failure::Lasting(self.error(name, None, 1, reason)));
        }
        let mut body = answer.into_stream();
        let mut bytes = self.buffers.take(expected.min(limit) as usize);
        while let Some(chunk) = timeout(stall, body.next())
            .await
            .map_err(|_| stalled(bytes.len()))?
        {
            bytes.extend_from_slice(
                &chunk.map_err(|error| self.classify(name, range.clone(), &error))?,
            );
            if bytes.len() as u64 > limit {
                break;
            }
        }
        let expected = range.map_or(expected, |range| range.end - range.start);
        if bytes.len() as u64 == expected {
            return Ok(bytes.into_bytes());
        }
        let reason = format!("the body has {} bytes, expected {expected}", bytes.len());
        Err(Failure::Passing(Reason::Words(reason)))
    }

    fn classify(
        &self,
        name: &str,
        range: Option<Range<u64>>,
        error: &object_store::Error,
    ) -> Failure {
        use object_store::Error as E;
        let reason = chain(error);
        let lasting = match error {
            E::NotFound { .. } => Some(MISSING),
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => Some(CREDENTIALS),
            E::Generic { .. } | E::JoinError { .. } => {
                match status(&reason).filter(|_| !has_transport(error)) {
                    Some(404 | 410) => Some(MISSING),
                    Some(401 | 403) => Some(CREDENTIALS),
                    // Timeout, too early, too many requests.
                    Some(408 | 425 | 429) => None,
                    Some(400..=499) => Some(
                        "the store refuses the request; are endpoint, region and credentials right?",
                    ),
                    _ => None,
                }
            }
            _ => Some("this store does not support the request"),
        };
        match lasting {
            Some(advice) => {
                let mut lasting = self.error(name, range, 1, format!("{advice} ({reason})"));
                if let Error::Remote { missing, .. } = &mut lasting {
                    *missing = advice == MISSING;
                }
                Failure::Lasting(lasting)
            }
            None => Failure::Passing(Reason::Words(reason)),
        }
    }

    fn gave_up(
        &self,
        name: &str,
        range: Option<Range<u64>>,
        attempts: u32,
        after: Duration,
        last: Reason,
    ) -> Error {
        match last {
            Reason::Check(error) => error,
            Reason::Words(reason) => {
                let secs = after.as_secs_f64();
                let reason = format!("gave up after {attempts} attempts in {secs:.1} s: {reason}");
                self.error(name, range, attempts, reason)
            }
        }
    }

    fn error(&self, name: &str, range: Option<Range<u64>>, attempts: u32, reason: String) -> Error {
        Error::Remote {
            object: self.url_of(name),
            range,
            attempts,
            missing: false,
            reason,
        }
    }

    fn pause(&self, attempt: u32) -> Duration {
        let Network {
            pause,
            longest_pause,
            ..
        } = *self.network;
        let full = pause
            .saturating_mul(1 << (attempt - 1).min(16))
            .min(longest_pause);
        // A run does not depend on the pauses: they keep many readers from retrying at the same
        // moment.
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let jitter = Rng::keyed(
            now.as_nanos() as u64,
            Purpose::Jitter,
            &[u64::from(attempt)],
        )
        .f64();
        full.mul_f64(1.0 - jitter / 2.0)
    }
}

const MISSING: &str =
    "the store has no such object; is the address right, and is the upload complete?";
const CREDENTIALS: &str = "the store denies access; are the credentials right and not expired?";

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Words(reason) => f.write_str(reason),
            Self::Check(error) => error.fmt(f),
        }
    }
}

/// The runtime of all network tasks of this process. It is never dropped, so that no thread blocks
/// on its shutdown.
pub(crate) fn runtime() -> &'static Runtime {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
        let mut builder = Builder::new_multi_thread();
        let runtime = builder
            .worker_threads(2)
            .thread_name("rectiflow-network")
            .enable_all()
            .build();
        runtime.expect("the process can start threads")
    });
    &RUNTIME
}

/// Runs work that waits for a disk on a thread that is allowed to block.
pub(crate) async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    runtime()
        .spawn_blocking(work)
        .await
        .expect("the task is not cancelled and does not panic")
}

/// An error and its causes as one line, without repetitions.
fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        source = cause.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether the request or its body failed on the way, as opposed to an answer from the store.
fn has_transport(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(cause) = next {
        if cause.is::<HttpError>() {
            return true;
        }
        next = cause.source();
    }
    false
}

/// The HTTP status in a message of `object_store`, which has no other access to it.
fn status(message: &str) -> Option<u16> {
    let (_, rest) = message.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Location> {
        Location::parse(Path::new(text), &Network::default())
    }

    #[test]
    fn urls_and_paths_are_told_apart() {
        for path in ["data/set", "/data/s3:/x", "."] {
            assert!(
                matches!(parse(path), Ok(Location::Folder(folder)) if folder == Path::new(path)),
                "{path}"
            );
        }
        assert!(
            matches!(parse("file:///data/set"), Ok(Location::Folder(folder)) if folder == Path::new("/data/set"))
        );
        for url in [
            "s3://bucket/some/prefix",
            "http://127.0.0.1:1/some/prefix/",
            "https://host/some/prefix",
        ] {
            let Ok(Location::Remote(remote)) = parse(url) else {
                panic!("{url}")
            };
            assert_eq!(
                remote.key("text/a.parquet").as_ref(),
                "some/prefix/text/a.parquet"
            );
            assert_eq!(
                remote.url_of("text/a.parquet"),
                format!("{}/text/a.parquet", url.trim_end_matches('/'))
            );
        }
        for wrong in [
            "ftp://host/x",
            "s3://",
            "://",
            "memory:///x",
            "file://host/x",
        ] {
            assert!(
                matches!(parse(wrong), Err(Error::Invalid { .. })),
                "{wrong}"
            );
        }
    }

    #[test]
    fn pauses_grow_and_vary_within_bounds() {
        let network = Network {
            pause: Duration::from_millis(100),
            ..Network::default()
        };
        let Ok(Location::Remote(remote)) =
            Location::parse(Path::new("http://127.0.0.1:1/x"), &network)
        else {
            panic!()
        };
        for (attempt, full) in [(1, 100), (2, 200), (4, 800), (40, 10_000)] {
            let pause = remote.pause(attempt);
            assert!(
                pause * 2 >= Duration::from_millis(full) && pause <= Duration::from_millis(full),
                "{pause:?}"
            );
        }
    }

    #[test]
    fn statuses_are_found_in_messages() {
        assert_eq!(
            status("Server returned non-2xx status code: 503 Service Unavailable: busy"),
            Some(503)
        );
        assert_eq!(status("connection reset"), None);
        assert_eq!(status("status code: 4"), None);
    }
}
