//! Uploads at a limited rate: a token bucket over the bytes of request bodies.
//!
//! A part of 16 MiB that is handed to the network at once leaves at the line's speed, whatever
//! pause follows. Bodies are therefore cut into slices of at most a tenth of a second, each of
//! which waits until the limit has room for it. No stretch of time has more than the limit and one
//! slice. All uploads of a bucket share the limit. Bytes of headers and of TLS are not counted.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody,
        HttpResponse, HttpResponseBody, HttpService,
    },
};
use tokio::time::{Sleep, sleep};

/// The longest slice.
const MOST_SLICE_BYTES: usize = 256 << 10;
/// The shortest slice.
const LEAST_SLICE_BYTES: usize = 1 << 10;
/// A slice without a limit, after which progress is counted.
const FREE_SLICE_BYTES: usize = 1 << 20;

/// When bytes may be sent. Pure: the clock is an argument.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TokenBucket {
    bytes_per_sec: f64,
    /// The time up to which the limit is used.
    used_until: Duration,
}

impl TokenBucket {
    pub(crate) fn new(bytes_per_sec: f64) -> Self {
        Self {
            bytes_per_sec,
            used_until: Duration::ZERO,
        }
    }

    /// Returns how long `bytes` have to wait at the time `now`, and counts them as sent.
    pub(crate) fn take(&mut self, bytes: u64, now: Duration) -> Duration {
        let secs = bytes as f64 / self.bytes_per_sec;
        self.used_until = self.used_until.max(now) + Duration::from_secs_f64(secs);
        self.used_until - now
    }
}

/// The limit that the uploads of a bucket share, and the bytes they have sent.
#[derive(Debug, Clone)]
pub(crate) struct Pace {
    limit: Option<Arc<Mutex<TokenBucket>>>,
    slice_bytes: usize,
    began: Instant,
    sent: Arc<AtomicU64>,
}

impl Pace {
    /// Returns a limit in bytes a second; `None` is no limit.
    pub(crate) fn new(bytes_per_sec: Option<f64>) -> Self {
        let slice_bytes = bytes_per_sec.map_or(FREE_SLICE_BYTES, |rate| {
            ((rate / 10.0) as usize).clamp(LEAST_SLICE_BYTES, MOST_SLICE_BYTES)
        });
        let limit = bytes_per_sec.map(|rate| Arc::new(Mutex::new(TokenBucket::new(rate))));
        Self {
            limit,
            slice_bytes,
            began: Instant::now(),
            sent: Arc::default(),
        }
    }

    /// Returns the longest slice in bytes.
    pub(crate) fn slice_bytes(&self) -> usize {
        self.slice_bytes
    }

    /// Returns how long a slice has to wait; zero without a limit.
    pub(crate) fn wait(&self, bytes: usize) -> Duration {
        let Some(limit) = &self.limit else {
            return Duration::ZERO;
        };
        let mut limit = limit.lock().unwrap_or_else(PoisonError::into_inner);
        limit.take(bytes as u64, self.began.elapsed())
    }

    /// Counts bytes as sent.
    pub(crate) fn count(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Returns the bytes sent so far, those of failed attempts included.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

/// Makes clients that send at a pace.
#[derive(Debug, Clone)]
pub(crate) struct Paced {
    pub(crate) pace: Pace,
    pub(crate) connect_timeout: Duration,
    /// Time for a whole request.
    pub(crate) timeout: Duration,
    /// Whether addresses without TLS are refused.
    pub(crate) https_only: bool,
}

impl HttpConnector for Paced {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = reqwest::Client::builder()
            .connect_timeout(self.connect_timeout)
            .timeout(self.timeout)
            .https_only(self.https_only)
            .build();
        let client = client.map_err(|error| object_store::Error::Generic {
            store: "HTTP",
            source: Box::new(error),
        })?;
        Ok(HttpClient::new(PacedClient {
            client,
            pace: self.pace.clone(),
        }))
    }
}

#[derive(Debug)]
struct PacedClient {
    client: reqwest::Client,
    pace: Pace,
}

#[async_trait]
impl HttpService for PacedClient {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let url = parts.uri.to_string().parse();
        let url = url.map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
        let mut request = reqwest::Request::new(parts.method, url);
        *request.headers_mut() = parts.headers;
        *request.body_mut() = Some(if body.content_length() == 0 {
            Bytes::new().into()
        } else {
            reqwest::Body::wrap(PacedBody::new(body, self.pace.clone()))
        });
        let answer = self.client.execute(request).await.map_err(failed)?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        let body = reqwest::Body::from(answer).map_err(failed);
        let mut response = HttpResponse::new(HttpResponseBody::new(body));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        Ok(response)
    }
}

/// Converts an error; its kind decides whether the client tries again.
fn failed(error: reqwest::Error) -> HttpError {
    let kind = if error.is_timeout() {
        HttpErrorKind::Timeout
    } else if error.is_connect() {
        HttpErrorKind::Connect
    } else if error.is_decode() {
        HttpErrorKind::Decode
    } else {
        HttpErrorKind::Interrupted
    };
    HttpError::new(kind, error.without_url())
}

/// A request's body, slice by slice.
struct PacedBody {
    body: HttpRequestBody,
    /// What is left of the chunk that was taken last.
    chunk: Bytes,
    /// The next slice, and until when it waits.
    next: Option<(Bytes, Pin<Box<Sleep>>)>,
    left: u64,
    pace: Pace,
}

impl PacedBody {
    fn new(body: HttpRequestBody, pace: Pace) -> Self {
        Self {
            left: body.content_length() as u64,
            body,
            chunk: Bytes::new(),
            next: None,
            pace,
        }
    }

    fn sent(&mut self, slice: Bytes) -> Frame<Bytes> {
        self.left -= slice.len() as u64;
        self.pace.count(slice.len());
        Frame::data(slice)
    }
}

impl fmt::Debug for PacedBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PacedBody {{ left: {} }}", self.left)
    }
}

impl Body for PacedBody {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        let this = self.get_mut();
        loop {
            if let Some((slice, mut wait)) = this.next.take() {
                if wait.as_mut().poll(context).is_pending() {
                    this.next = Some((slice, wait));
                    return Poll::Pending;
                }
                return Poll::Ready(Some(Ok(this.sent(slice))));
            }
            while this.chunk.is_empty() {
                match ready!(Pin::new(&mut this.body).poll_frame(context)) {
                    None => return Poll::Ready(None),
                    Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                    Some(Ok(frame)) => this.chunk = frame.into_data().unwrap_or_default(),
                }
            }
            let len = this.chunk.len().min(this.pace.slice_bytes());
            let slice = this.chunk.split_to(len);
            let wait = this.pace.wait(len);
            if wait.is_zero() {
                return Poll::Ready(Some(Ok(this.sent(slice))));
            }
            this.next = Some((slice, Box::pin(sleep(wait))));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_stretch_of_time_has_more_than_the_limit_and_a_slice() {
        let (rate, slice) = (1000.0, 100);
        let mut bucket = TokenBucket::new(rate);
        let mut sent: Vec<(f64, u64)> = Vec::new();
        // Requests of a sender that is idle, waits for the limit, and is idle again.
        let mut now = Duration::from_secs(5);
        for number in 0..200 {
            if number == 90 {
                now += Duration::from_secs(30);
            }
            now += bucket.take(slice, now);
            sent.push((now.as_secs_f64(), slice));
        }
        for (from, &(began, _)) in sent.iter().enumerate() {
            let mut bytes = 0;
            for &(at, len) in &sent[from..] {
                bytes += len;
                let most = rate * (at - began) + slice as f64 + 1e-3;
                assert!(bytes as f64 <= most, "{bytes} bytes in {} s", at - began);
            }
        }
        // 200 slices of 0.1 s and 30 s of idleness, from second 5 on.
        assert!((now.as_secs_f64() - 55.0).abs() < 1e-6, "{now:?}");
    }

    #[test]
    fn uploads_at_the_same_time_share_the_limit() {
        let mut bucket = TokenBucket::new(100.0);
        let now = Duration::from_secs(1);
        let waits = [50, 50, 100].map(|bytes| bucket.take(bytes, now).as_secs_f64());
        assert_eq!(waits, [0.5, 1.0, 2.0]);
    }

    #[test]
    fn slices_are_short_and_without_a_limit_nothing_waits() {
        assert_eq!(Pace::new(Some(1e9)).slice_bytes(), MOST_SLICE_BYTES);
        assert_eq!(Pace::new(Some(125_000.0)).slice_bytes(), 12_500);
        assert_eq!(Pace::new(Some(1.0)).slice_bytes(), LEAST_SLICE_BYTES);
        assert_eq!(Pace::new(None).wait(1 << 30), Duration::ZERO);
    }
}
