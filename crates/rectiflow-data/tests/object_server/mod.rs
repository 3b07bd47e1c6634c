//! An object store for tests and measurements: files of a folder over HTTP/1.1, as S3 serves them,
//! with faults.
//!
//! Written on plain sockets, because an HTTP library does not let a handler cause the faults that
//! matter: a connection closed in the middle of a body, a body that stalls, a wrong length. It
//! counts every request and every body byte that it sends. It supports S3's GET with a range, HEAD,
//! list, PUT and multipart upload, path style, and checks no signature. A body without a fault goes
//! from the page cache to the socket without a copy.

#![allow(dead_code, reason = "each user needs its own part")]

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::{BufRead, BufReader, Read, Seek, SeekFrom, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

/// A fault of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// This status and a short text instead of the object.
    Status(u16),
    /// The connection is closed without an answer.
    Hangup,
    /// The body and the connection end after this many bytes.
    Cut(usize),
    /// After this many bytes the server sends nothing more and waits for the client to disconnect.
    Stall(usize),
    /// The server sends nothing at all and waits for the client to disconnect.
    Silence,
    /// One byte of the body is wrong.
    Flip(usize),
    /// The object has the ETag of another version, but the same bytes.
    OtherTag,
    /// The answer is delayed.
    Slow(Duration),
    /// The whole object instead of the range, as servers without ranges answer.
    NoRanges,
}

/// A request as received.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// Counted from 0 over all connections.
    pub(crate) number: u64,
    /// GET, HEAD, PUT, POST or DELETE.
    pub(crate) method: String,
    /// Path of the file below the folder.
    pub(crate) name: String,
    /// The query string, after the question mark.
    pub(crate) query: String,
    /// The requested bytes. None for the whole file.
    pub(crate) range: Option<Range<u64>>,
    /// Number of earlier requests for this file and range.
    pub(crate) repeat: u64,
}

/// Counts of the server's work so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Served {
    pub(crate) requests: u64,
    /// Bytes of the bodies sent.
    pub(crate) bytes: u64,
    /// File and range of each request, in order of arrival.
    pub(crate) names: Vec<Asked>,
}

/// A file and the requested range, if there is one.
pub(crate) type Asked = (String, Option<Range<u64>>);

type Faults = dyn Fn(&Request) -> Option<Fault> + Send + Sync;

struct State {
    root: PathBuf,
    faults: Box<Faults>,
    served: Mutex<Served>,
    /// Number of requests for each file and range.
    asked: Mutex<HashMap<Asked, u64>>,
    /// Parts of multipart uploads, by file and number.
    parts: Mutex<BTreeMap<(String, u32), Vec<u8>>>,
    stopping: AtomicBool,
}

/// A running server. It stops when dropped.
pub(crate) struct ObjectServer {
    address: SocketAddr,
    state: Arc<State>,
    thread: Option<thread::JoinHandle<()>>,
}

impl ObjectServer {
    /// Serves the files below `root` on a free port of the loopback interface.
    pub(crate) fn start(
        root: &Path,
        faults: impl Fn(&Request) -> Option<Fault> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("the loopback has a free port");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address");
        let state = Arc::new(State {
            root: root.to_owned(),
            faults: Box::new(faults),
            served: Mutex::default(),
            asked: Mutex::default(),
            parts: Mutex::default(),
            stopping: AtomicBool::new(false),
        });
        let accepting = state.clone();
        let thread = thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if accepting.stopping.load(Ordering::SeqCst) {
                    return;
                }
                let state = accepting.clone();
                thread::spawn(move || drop(serve(&state, stream)));
            }
        });
        Self {
            address,
            state,
            thread: Some(thread),
        }
    }

    /// `http://127.0.0.1:PORT`.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn served(&self) -> Served {
        lock(&self.state.served).clone()
    }

    /// Resets the counts to zero.
    pub(crate) fn reset(&self) {
        *lock(&self.state.served) = Served::default();
        lock(&self.state.asked).clear();
    }
}

impl Drop for ObjectServer {
    fn drop(&mut self) {
        self.state.stopping.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers the requests of one connection, until either side closes it.
fn serve(state: &State, stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut out = stream;
    while let Some((mut request, body)) = read_request(&mut reader)? {
        {
            let mut served = lock(&state.served);
            request.number = served.requests;
            let key = (request.name.clone(), request.range.clone());
            let mut asked = lock(&state.asked);
            let times = asked.entry(key.clone()).or_default();
            request.repeat = *times;
            *times += 1;
            served.requests += 1;
            served.names.push(key);
        }
        let fault = (state.faults)(&request);
        if !answer(state, &request, body, fault, &mut out)? {
            break;
        }
    }
    Ok(())
}

fn read_request(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<(Request, Vec<u8>)>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (method, target) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let name = plain(path.trim_start_matches('/'));
    let mut request = Request {
        number: 0,
        method: method.to_owned(),
        name,
        query: query.to_owned(),
        range: None,
        repeat: 0,
    };
    let (mut length, mut expects) = (0, false);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let Some((key, value)) = header.trim_end().split_once(':') else {
            break;
        };
        match (key.to_ascii_lowercase().as_str(), value.trim()) {
            ("content-length", value) => length = value.parse().unwrap_or(0),
            ("expect", _) => expects = true,
            ("range", value) => {
                let bounds = value
                    .strip_prefix("bytes=")
                    .and_then(|range| range.split_once('-'));
                request.range = bounds.and_then(parse_range);
            }
            _ => {}
        }
    }
    if expects {
        reader
            .get_mut()
            .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(Some((request, body)))
}

/// A path without the `%41` of a URL.
fn plain(path: &str) -> String {
    let mut bytes = Vec::new();
    let mut parts = path.split('%');
    bytes.extend_from_slice(parts.next().unwrap_or_default().as_bytes());
    for part in parts {
        let (digits, rest) = part.split_at(2);
        bytes.push(u8::from_str_radix(digits, 16).expect("two digits follow"));
        bytes.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(bytes).expect("a path is UTF-8")
}

/// The range of a `from-to` pair, `to` included. Without `to` the range is open-ended.
fn parse_range((from, to): (&str, &str)) -> Option<Range<u64>> {
    let end = if to.is_empty() {
        u64::MAX
    } else {
        to.parse::<u64>().ok()? + 1
    };
    Some(from.parse().ok()?..end)
}

/// Answers one request. Returns whether the connection stays open.
fn answer(
    state: &State,
    request: &Request,
    body: Vec<u8>,
    fault: Option<Fault>,
    out: &mut TcpStream,
) -> std::io::Result<bool> {
    match fault {
        Some(Fault::Hangup) => return Ok(false),
        Some(Fault::Silence) => return wait_for_end(out),
        Some(Fault::Status(status)) => {
            return words(out, status, "<Error><Code>Injected</Code></Error>");
        }
        Some(Fault::Slow(delay)) => thread::sleep(delay),
        _ => {}
    }
    if matches!(request.method.as_str(), "PUT" | "POST" | "DELETE") {
        return store(state, request, body, out);
    }
    if request.query.contains("list-type=2") {
        return words(out, 200, &list(state, request));
    }
    let file = fs::File::open(state.root.join(&request.name))
        .and_then(|file| Ok((file.metadata()?, file)));
    let Some((size, mut file)) = file
        .ok()
        .filter(|(of, _)| of.is_file())
        .map(|(of, file)| (of.len(), file))
    else {
        return words(out, 404, "<Error><Code>NoSuchKey</Code></Error>");
    };
    let range = request
        .range
        .clone()
        .filter(|_| fault != Some(Fault::NoRanges));
    let (status, range) = match range {
        Some(range) if range.start >= size => return words(out, 416, ""),
        Some(range) => (206, range.start..range.end.min(size)),
        None => (200, 0..size),
    };
    let length = range.end - range.start;
    let tag = if fault == Some(Fault::OtherTag) {
        "other"
    } else {
        "tag"
    };
    let mut head = format!(
        "HTTP/1.1 {status} OK\r\nContent-Length: {length}\r\n\
         ETag: \"{tag}-{size}\"\r\nAccept-Ranges: bytes\r\n\
         Last-Modified: Tue, 24 Nov 2026 06:00:00 GMT\r\n"
    );
    if status == 206 {
        head += &format!(
            "Content-Range: bytes {}-{}/{size}\r\n",
            range.start,
            range.end - 1
        );
    }
    out.write_all(format!("{head}\r\n").as_bytes())?;
    if request.method == "HEAD" {
        return Ok(true);
    }
    file.seek(SeekFrom::Start(range.start))?;
    let sent = send_body(&mut file.take(length), length, fault.as_ref(), out)?;
    lock(&state.served).bytes += sent;
    match fault {
        Some(Fault::Stall(_)) => wait_for_end(out),
        Some(Fault::Cut(_)) => Ok(false),
        _ => Ok(true),
    }
}

/// Sends a body of `length` bytes, or the part that the fault leaves. Returns the bytes sent.
fn send_body(
    file: &mut std::io::Take<fs::File>,
    length: u64,
    fault: Option<&Fault>,
    out: &mut TcpStream,
) -> std::io::Result<u64> {
    match fault {
        Some(Fault::Cut(at) | Fault::Stall(at)) => file.set_limit(length.min(*at as u64)),
        Some(Fault::Flip(at)) => {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            let at = at % bytes.len().max(1);
            bytes[at] ^= 0x10;
            out.write_all(&bytes)?;
            return Ok(length);
        }
        _ => {}
    }
    std::io::copy(file, out)
}

/// Sends nothing until the client closes the connection.
fn wait_for_end(out: &mut TcpStream) -> std::io::Result<bool> {
    let mut byte = [0];
    while out.read(&mut byte)? > 0 {}
    Ok(false)
}

fn words(out: &mut TcpStream, status: u16, body: &str) -> std::io::Result<bool> {
    let head = format!(
        "HTTP/1.1 {status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {}",
        body.len()
    );
    out.write_all(format!("{head}\r\n\r\n{body}").as_bytes())?;
    Ok(true)
}

/// The objects of a bucket below a prefix, in one page.
fn list(state: &State, request: &Request) -> String {
    let mut pairs = request.query.split('&');
    let prefix = pairs
        .find_map(|pair| pair.strip_prefix("prefix="))
        .unwrap_or_default();
    let prefix = plain(prefix);
    let mut objects = Vec::new();
    below(&state.root.join(&request.name), "", &mut objects);
    objects.retain(|(name, _)| name.starts_with(&prefix));
    objects.sort();
    let mut answer = "<ListBucketResult><IsTruncated>false</IsTruncated>".to_owned();
    for (name, size) in objects {
        let name = name.replace('&', "&amp;").replace('<', "&lt;");
        answer += &format!(
            "<Contents><Key>{name}</Key><Size>{size}</Size><ETag>\"tag-{size}\"</ETag>\
             <LastModified>2026-11-24T06:00:00.000Z</LastModified></Contents>"
        );
    }
    answer + "</ListBucketResult>"
}

/// The files below a folder, with their lengths.
fn below(folder: &Path, prefix: &str, objects: &mut Vec<(String, u64)>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        match entry.metadata() {
            Ok(of) if of.is_dir() => below(&entry.path(), &format!("{name}/"), objects),
            Ok(of) => objects.push((name, of.len())),
            Err(_) => {}
        }
    }
}

/// Handles PUT of an object or a part, and the other requests of a multipart upload.
fn store(
    state: &State,
    request: &Request,
    body: Vec<u8>,
    out: &mut TcpStream,
) -> std::io::Result<bool> {
    let name = &request.name;
    let part = request
        .query
        .split('&')
        .find_map(|pair| pair.strip_prefix("partNumber=")?.parse::<u32>().ok());
    match (request.method.as_str(), part) {
        ("PUT", Some(number)) => drop(lock(&state.parts).insert((name.clone(), number), body)),
        ("PUT", None) => write(state, name, &body)?,
        ("POST", _) if request.query.starts_with("uploads") => {
            let upload = "<InitiateMultipartUploadResult><UploadId>1</UploadId>\
                          </InitiateMultipartUploadResult>";
            return words(out, 200, upload);
        }
        ("POST", _) => {
            let parts = std::mem::take(&mut *lock(&state.parts));
            let (whole, others): (Vec<_>, Vec<_>) =
                parts.into_iter().partition(|((of, _), _)| of == name);
            lock(&state.parts).extend(others);
            let whole: Vec<Vec<u8>> = whole.into_iter().map(|(_, part)| part).collect();
            write(state, name, &whole.concat())?;
            let done = "<CompleteMultipartUploadResult><ETag>\"whole\"</ETag>\
                        </CompleteMultipartUploadResult>";
            return words(out, 200, done);
        }
        _ if request.query.contains("uploadId=") => {
            lock(&state.parts).retain(|(of, _), _| of != name);
        }
        // A store removes what is not there, too.
        _ => drop(fs::remove_file(state.root.join(name))),
    }
    out.write_all(b"HTTP/1.1 200 OK\r\nETag: \"new\"\r\nContent-Length: 0\r\n\r\n")?;
    Ok(true)
}

fn write(state: &State, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let path = state.root.join(name);
    fs::create_dir_all(path.parent().expect("an object has a folder"))?;
    fs::write(path, bytes)
}

/// Runs a test again in a child process with the environment that a user would set for S3, because
/// the environment belongs to a process. The child finds the folder that the store serves as
/// `bucket` in the variable [`CHILD`].
pub(crate) fn with_s3(
    test: &str,
    bucket: &Path,
    faults: impl Fn(&Request) -> Option<Fault> + Send + Sync + 'static,
) {
    let server = ObjectServer::start(bucket.parent().expect("a bucket is in a folder"), faults);
    let child = std::process::Command::new(std::env::current_exe().expect("the test has a file"))
        .args(["--exact", test])
        .envs([
            ("AWS_ENDPOINT_URL", server.url().as_str()),
            ("AWS_REGION", "auto"),
        ])
        .envs([
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
        ])
        .env(CHILD, bucket)
        .output()
        .expect("the test starts");
    assert!(
        child.status.success(),
        "{}",
        String::from_utf8_lossy(&child.stdout)
    );
    assert!(server.served().requests > 0);
}

/// The variable with the folder that the store serves.
pub(crate) const CHILD: &str = "RECTIFLOW_TEST_S3_BUCKET";
