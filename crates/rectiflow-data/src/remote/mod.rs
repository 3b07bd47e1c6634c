//! Objects at a URL: ranges of bytes over the network, with deadlines, bounded retries and errors
//! that name the object.
//!
//! `s3://bucket/prefix` (any endpoint: AWS_ENDPOINT_URL), `gs://`, `az://` and `http(s)://` through
//! `object_store`, with credentials from the usual environment variables and, for S3, profiles
//! (`aws_profile`). Its own timeout (30 s for a whole body) and its own retries are switched off:
//! what matters on a slow line is whether bytes still arrive. Server errors, throttling, timeouts,
//! stalls, cut bodies and wrong bytes are retried (`retry`); "not found" and "not allowed" are not.
//!
//! Only this folder, `dataset::fetch` and `dataset::rows` contain `async` code; their tasks run on
//! one small runtime of this process. The caller knows what the bytes mean and passes a function
//! that checks them.

pub(crate) mod aws_profile;
pub(crate) mod block_checksum;
pub(crate) mod bucket;
pub(crate) mod buffers;
pub(crate) mod folder;
pub(crate) mod listing;
pub(crate) mod network;
pub(crate) mod pace;
pub(crate) mod post;
pub(crate) mod request;
mod retry;
pub(crate) mod store;
pub(crate) mod upload;

use std::{
    error::Error as StdError,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
    time::Duration,
};

use bytes::Bytes;
use futures_util::StreamExt;
use object_store::{
    GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt, ObjectStoreScheme,
    client::HttpError, path::Path as Key,
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::Semaphore,
    time::timeout,
};
use url::Url;

use crate::{
    error::{Error, Result, chain},
    remote::{
        buffers::{Buffers, Lent},
        network::Network,
        store::{NO_RETRY, install_tls, open_store, options},
    },
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

/// The bytes that a request asks for, for requests and messages.
struct Target<'a> {
    name: &'a str,
    /// None for the whole object.
    range: Option<Range<u64>>,
}

impl<'a> Target<'a> {
    fn whole(name: &'a str) -> Self {
        Self { name, range: None }
    }
}

impl Remote {
    fn open(text: &str, url: &Url, network: &Network) -> std::result::Result<Self, String> {
        install_tls();
        let known = "expected s3://, gs://, az://, http://, https:// or file://";
        let (scheme, prefix) =
            ObjectStoreScheme::parse(url).map_err(|error| format!("{error}; {known}"))?;
        let store = open_store(&scheme, url, options(url, network), NO_RETRY)
            .map_err(|error| chain(&error))?
            .ok_or_else(|| known.to_owned())?;
        Ok(Self {
            store,
            parsed: Arc::new((scheme, url.clone())),
            prefix,
            url: text.trim_end_matches('/').into(),
            network: Arc::new(network.clone()),
            permits: Arc::new(Semaphore::new(network.concurrency)),
            buffers: Buffers::default(),
        })
    }

    /// Converts an error of a client.
    pub(crate) fn failed(&self, name: &str, error: &object_store::Error) -> Error {
        let target = Target::whole(name);
        match self.classify(&target, error) {
            Failure::Lasting(error) | Failure::Passing(Reason::Check(error)) => error,
            Failure::Passing(Reason::Words(reason)) => self.error(&target, 1, reason),
        }
    }

    /// Reads the whole object `name`, which must not be longer than `limit` bytes.
    pub(crate) async fn read_all(&self, name: &str, limit: u64) -> Result<Bytes> {
        self.read(&Target::whole(name), limit, Ok).await
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
        let range = Some(range);
        self.read(&Target { name, range }, limit, check).await
    }

    /// Reads the bytes `range` of the object `name` in parts of `part_len` bytes and passes each to
    /// what `begin` returns, as soon as it is there. If a part is refused or the body is cut, all
    /// are requested again, and `begin` is called again.
    pub(crate) async fn read_parts<T>(
        &self,
        name: &str,
        range: Range<u64>,
        part_len: usize,
        begin: impl Fn() -> T,
    ) -> Result<()>
    where
        T: FnMut(&[u8]) -> Result<()>,
    {
        let range = Some(range);
        let target = Target { name, range };
        self.retried(&target, || self.attempt_parts(&target, part_len, begin()))
            .await
    }

    /// One request, whose parts are taken as they arrive.
    async fn attempt_parts(
        &self,
        target: &Target<'_>,
        part_len: usize,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> std::result::Result<(), Failure> {
        let stall = self.network.stall_timeout;
        let range = target.range.clone().unwrap_or_default();
        let expected = (range.end - range.start) as usize;
        let mut body = self.request(target).await?.into_stream();
        let mut part = self.buffers.take(part_len);
        let mut num_read = 0;
        while num_read <= expected {
            let Ok(chunk) = timeout(stall, body.next()).await else {
                return Err(stalled(stall, num_read));
            };
            let Some(chunk) = chunk else {
                break;
            };
            let mut chunk = chunk.map_err(|error| self.classify(target, &error))?;
            num_read += chunk.len();
            // A chunk can end one part and begin the next. Bytes beyond the range are no part.
            chunk.truncate(chunk.len() - num_read.saturating_sub(expected).min(chunk.len()));
            while !chunk.is_empty() {
                let missing = part_len - part.len();
                part.extend_from_slice(&chunk.split_to(missing.min(chunk.len())));
                if part.len() == part_len {
                    take(&part).map_err(|error| Failure::Passing(Reason::Check(error)))?;
                    part.clear();
                }
            }
        }
        if num_read == expected {
            return Ok(());
        }
        let reason = format!("the body has {num_read} bytes, expected {expected}");
        Err(Failure::Passing(Reason::Words(reason)))
    }

    /// Length of the object `name`.
    pub(crate) async fn len(&self, name: &str) -> Result<u64> {
        let key = self.key(name);
        let target = Target::whole(name);
        let head = || async {
            let head = self.store.head(&key).await;
            head.map_err(|error| self.classify(&target, &error))
        };
        Ok(self.retried(&target, head).await?.size)
    }

    /// The object's full URL, for messages.
    pub(crate) fn url_of(&self, name: &str) -> String {
        format!("{}/{name}", self.url)
    }

    /// Longest time for all attempts at a request.
    pub(crate) fn patience(&self) -> Duration {
        self.network.deadline
    }

    /// The key of an object. `Key::join` would write `[` and others as `%5B`: another object.
    fn key(&self, name: &str) -> Key {
        let prefix: &str = self.prefix.as_ref();
        let path = match prefix.is_empty() {
            true => name.to_owned(),
            false => format!("{prefix}/{name}"),
        };
        Key::parse(path).unwrap_or_else(|_| {
            let parts = name.split('/');
            parts.fold(self.prefix.clone(), |key, part| key.join(part))
        })
    }

    async fn read<T>(
        &self,
        target: &Target<'_>,
        limit: u64,
        check: impl Fn(Bytes) -> Result<T>,
    ) -> Result<T> {
        let attempt = || async {
            let bytes = self.attempt(target, limit).await?;
            check(bytes).map_err(|error| Failure::Passing(Reason::Check(error)))
        };
        self.retried(target, attempt).await
    }

    /// One request, read to its end.
    async fn attempt(
        &self,
        target: &Target<'_>,
        limit: u64,
    ) -> std::result::Result<Bytes, Failure> {
        let answer = self.request(target).await?;
        let announced = answer.range.end - answer.range.start;
        if target.range.is_none() && announced > limit {
            let reason = format!("it has {announced} bytes, expected at most {limit}");
            return Err(Failure::Lasting(self.error(target, 1, reason)));
        }
        let bytes = self.read_body(target, answer, limit).await?;
        let expected = match &target.range {
            Some(range) => range.end - range.start,
            None => announced,
        };
        if bytes.len() as u64 == expected {
            return Ok(bytes.into_bytes());
        }
        let reason = format!("the body has {} bytes, expected {expected}", bytes.len());
        Err(Failure::Passing(Reason::Words(reason)))
    }

    /// Sends a request. Returns the answer, its body still unread.
    async fn request(&self, target: &Target<'_>) -> std::result::Result<GetResult, Failure> {
        let stall = self.network.stall_timeout;
        let options = GetOptions {
            range: target.range.clone().map(GetRange::Bounded),
            ..Default::default()
        };
        let key = self.key(target.name);
        match timeout(stall, self.store.get_opts(&key, options)).await {
            Ok(answer) => answer.map_err(|error| self.classify(target, &error)),
            Err(_) => Err(stalled(stall, 0)),
        }
    }

    /// Reads a body to its end, or until it is longer than `limit` bytes.
    async fn read_body(
        &self,
        target: &Target<'_>,
        answer: GetResult,
        limit: u64,
    ) -> std::result::Result<Lent<u8>, Failure> {
        let stall = self.network.stall_timeout;
        let announced = answer.range.end - answer.range.start;
        let mut body = answer.into_stream();
        let mut bytes = self.buffers.take(announced.min(limit) as usize);
        while bytes.len() as u64 <= limit {
            let Ok(chunk) = timeout(stall, body.next()).await else {
                return Err(stalled(stall, bytes.len()));
            };
            let Some(chunk) = chunk else {
                break;
            };
            let chunk = chunk.map_err(|error| self.classify(target, &error))?;
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    fn classify(&self, target: &Target<'_>, error: &object_store::Error) -> Failure {
        let reason = chain(error);
        let Some(advice) = lasting_advice(error, &reason) else {
            return Failure::Passing(Reason::Words(reason));
        };
        Failure::Lasting(Error::Remote {
            object: self.url_of(target.name),
            range: target.range.clone(),
            attempts: 1,
            missing: advice == MISSING,
            reason: format!("{advice} ({reason})"),
        })
    }

    fn error(&self, target: &Target<'_>, attempts: u32, reason: String) -> Error {
        Error::Remote {
            object: self.url_of(target.name),
            range: target.range.clone(),
            attempts,
            missing: false,
            reason,
        }
    }
}

const MISSING: &str =
    "the store has no such object; is the address right, and is the upload complete?";
const CREDENTIALS: &str = "the store denies access; are the credentials right and not expired?";
const REFUSED: &str = "the store refuses the request; are endpoint, region and credentials right?";

/// Why another attempt would fail as well, as advice. None if it can succeed. `reason` is the
/// message of `error` and its causes.
fn lasting_advice(error: &object_store::Error, reason: &str) -> Option<&'static str> {
    use object_store::Error as E;
    match error {
        E::NotFound { .. } => Some(MISSING),
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => Some(CREDENTIALS),
        E::Generic { .. } | E::JoinError { .. } if has_transport(error) => None,
        E::Generic { .. } | E::JoinError { .. } => match status(reason)? {
            404 | 410 => Some(MISSING),
            401 | 403 => Some(CREDENTIALS),
            // Timeout, too early, too many requests.
            408 | 425 | 429 => None,
            400..=499 => Some(REFUSED),
            _ => None,
        },
        _ => Some("this store does not support the request"),
    }
}

fn stalled(stall: Duration, read: usize) -> Failure {
    let secs = stall.as_secs_f64();
    Failure::Passing(Reason::Words(format!(
        "it stalled: no byte arrived for {secs} s after {read} bytes"
    )))
}

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
        let Ok(Location::Folder(folder)) = parse("file:///data/set") else {
            panic!("file:///data/set")
        };
        assert_eq!(folder, Path::new("/data/set"));
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
    fn statuses_are_found_in_messages() {
        assert_eq!(
            status("Server returned non-2xx status code: 503 Service Unavailable: busy"),
            Some(503)
        );
        assert_eq!(status("connection reset"), None);
        assert_eq!(status("status code: 4"), None);
    }
}
