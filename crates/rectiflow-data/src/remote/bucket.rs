//! A place that a program writes copies to, for callers that are not `async`: a prefix in an object
//! store, or a folder.
//!
//! An object appears whole or not at all: large ones are sent in parts (multipart), files of a
//! folder are renamed. Uploads share a limit on their rate (`pace`). What a caller knows the hash
//! of is compared with it on the way, before the object appears.
//!
//! Not here: which objects there are, in which order, and when a failed one is tried again beyond
//! the retries of a request.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
    thread,
    time::Duration,
};

use bytes::Bytes;
use object_store::{
    BackoffConfig, MultipartUpload, ObjectStore, ObjectStoreExt, ObjectStoreScheme, PutPayload,
    RetryConfig,
};
use tokio::{
    runtime::{Builder, Runtime},
    task::JoinSet,
};
use url::Url;

use crate::{
    durable::{self, DurableFile, TEMPORARY_PREFIX},
    error::{Error, Result},
    remote::{
        Location, Remote,
        network::Network,
        on_disk,
        pace::{Pace, Paced},
        runtime,
        store::{allows_http, open_paced, options},
        upload::PartFile,
    },
};

/// Least bytes of a part; S3 takes 5 MiB to 5 GiB.
const PART_BYTES: u64 = 16 << 20;
/// Parts of an object at most; S3 takes 10,000.
const MOST_PARTS: u64 = 9_000;
/// Concurrent parts without a limit on the rate, and with one.
const PARTS_AT_ONCE: [usize; 2] = [8, 3];
/// Time for a request whose bytes do not wait for a limit.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(300);
/// Bytes of a request for a part of an object.
const RANGE_BYTES: u64 = 16 << 20;
/// Concurrent requests of a download.
const RANGES_AT_ONCE: usize = 8;
/// A few attempts: the caller tries again later.
const RETRY: RetryConfig = RetryConfig {
    max_retries: 3,
    retry_timeout: Duration::from_secs(60),
    backoff: BackoffConfig {
        init_backoff: Duration::from_millis(200),
        max_backoff: Duration::from_secs(10),
        base: 2.0,
    },
};

/// An object of a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Below the bucket's address, with `/` between its parts.
    pub name: String,
    /// Length.
    pub bytes: u64,
}

/// A prefix in an object store, or a folder. Cheap to clone; clones share the limit on the rate.
#[derive(Debug, Clone)]
pub struct Bucket {
    place: Place,
    pace: Pace,
    url: Arc<str>,
    parts_at_once: usize,
}

#[derive(Debug, Clone)]
enum Place {
    Folder(PathBuf),
    Store {
        /// Reads, with the retries of this crate.
        remote: Remote,
        /// Writes, at a pace.
        store: Arc<dyn ObjectStore>,
    },
}

impl Bucket {
    /// Checks that a text is the address of a bucket. Asks for no credentials.
    ///
    /// # Errors
    /// [`Error::Invalid`] for anything but `s3://`, `gs://`, `az://` and `file://`.
    pub fn check_address(url: &str) -> Result<()> {
        let Ok(parsed) = Url::parse(url) else {
            return Err(not_a_bucket(url, ""));
        };
        if parsed.scheme() == "file" {
            return match parsed.to_file_path() {
                Ok(_) => Ok(()),
                Err(()) => Err(not_a_bucket(url, "; a folder is file:///absolute/path")),
            };
        }
        match ObjectStoreScheme::parse(&parsed) {
            Ok((
                ObjectStoreScheme::AmazonS3
                | ObjectStoreScheme::GoogleCloudStorage
                | ObjectStoreScheme::MicrosoftAzure,
                _,
            )) => Ok(()),
            Ok((ObjectStoreScheme::Http, _)) => Err(not_a_bucket(
                url,
                ": a server that speaks plain HTTP neither lists its objects nor takes them in \
                 parts",
            )),
            _ => Err(not_a_bucket(url, "")),
        }
    }

    /// Opens the place at a URL without a request. Uploads take at most `mbit` megabits a second.
    ///
    /// # Errors
    /// [`Error::Invalid`] for anything but `s3://`, `gs://`, `az://` and `file://`.
    pub fn open(url: &str, mbit: Option<f64>) -> Result<Self> {
        let pace = Pace::new(mbit.map(|mbit| mbit * 1e6 / 8.0));
        let parts_at_once = PARTS_AT_ONCE[usize::from(mbit.is_some())];
        Self::check_address(url)?;
        let network = Network {
            attempts: 5,
            ..Network::default()
        };
        let place = match Location::parse(Path::new(url), &network)? {
            Location::Folder(folder) => Place::Folder(folder),
            Location::Remote(remote) => {
                let (scheme, parsed) = &*remote.parsed;
                let timeout = part_timeout(mbit, parts_at_once);
                let paced = Paced {
                    pace: pace.clone(),
                    connect_timeout: network.connect_timeout,
                    timeout,
                    https_only: !allows_http(),
                };
                let store = open_paced(scheme, parsed, options(parsed, &network), RETRY, paced);
                let store = store.map_err(|error| remote.failed("", &error))?;
                let store = store.ok_or_else(|| not_a_bucket(url, ""))?;
                Place::Store { remote, store }
            }
        };
        Ok(Self {
            place,
            pace,
            url: url.trim_end_matches('/').into(),
            parts_at_once,
        })
    }

    /// Returns its address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Returns the bytes sent so far, those of failed attempts included.
    pub fn sent_bytes(&self) -> u64 {
        self.pace.sent()
    }

    /// Returns all objects, by name.
    ///
    /// # Errors
    /// [`Error::Remote`], [`Error::Io`].
    pub fn list(&self) -> Result<Vec<Stored>> {
        let mut found = Vec::new();
        match &self.place {
            Place::Folder(folder) => files_below(folder, "", &mut found)?,
            Place::Store { remote, .. } => {
                for object in runtime().block_on(remote.list())? {
                    found.push(Stored {
                        name: object.name,
                        bytes: object.bytes,
                    });
                }
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Returns a whole object of at most `limit` bytes; `None` if there is none of this name.
    ///
    /// # Errors
    /// [`Error::Remote`], [`Error::Io`].
    pub fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        match &self.place {
            Place::Folder(folder) => read_file(&folder.join(name), limit),
            Place::Store { remote, .. } => match runtime().block_on(remote.read_all(name, limit)) {
                Ok(bytes) => Ok(Some(bytes.to_vec())),
                Err(error) if error.is_missing_object() => Ok(None),
                Err(error) => Err(error),
            },
        }
    }

    /// Writes a small object.
    ///
    /// # Errors
    /// [`Error::Remote`], [`Error::Io`].
    pub fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        match &self.place {
            Place::Folder(folder) => {
                let path = folder.join(name);
                create_folder_of(&path)?;
                durable::write(&path, bytes)?;
                self.pace.count(bytes.len());
                Ok(())
            }
            Place::Store { remote, store } => {
                let key = remote.key(name);
                let payload = PutPayload::from(bytes.to_vec());
                let put = uploads().block_on(store.put(&key, payload));
                put.map(drop).map_err(|error| remote.failed(name, &error))
            }
        }
    }

    /// Writes the file at `path` to the object `name`. With `blake3`, hexadecimal, a file that has
    /// another hash is refused, and the object does not appear.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another hash; [`Error::Remote`], [`Error::Io`].
    pub fn put_file(&self, name: &str, path: &Path, blake3: Option<&str>) -> Result<()> {
        match &self.place {
            Place::Folder(folder) => self.copy_file(&folder.join(name), path, blake3),
            Place::Store { remote, store } => {
                let sending = self.send_file(remote, store, name, path, blake3);
                uploads().block_on(sending)
            }
        }
    }

    /// Removes an object, if there is one.
    ///
    /// # Errors
    /// [`Error::Remote`], [`Error::Io`].
    pub fn remove(&self, name: &str) -> Result<()> {
        match &self.place {
            Place::Folder(folder) => {
                let path = folder.join(name);
                match fs::remove_file(&path) {
                    Err(error) if error.kind() != ErrorKind::NotFound => {
                        Err(Error::io(&path)(error))
                    }
                    _ => Ok(()),
                }
            }
            Place::Store { remote, store } => {
                let removed = uploads().block_on(store.delete(&remote.key(name)));
                match removed {
                    Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                    Err(error) => Err(remote.failed(name, &error)),
                }
            }
        }
    }

    /// Reads an object to a new file at `path`, and flushes that to the disk.
    ///
    /// # Errors
    /// [`Error::Remote`], [`Error::Io`].
    pub fn fetch(&self, name: &str, path: &Path) -> Result<()> {
        create_folder_of(path)?;
        match &self.place {
            Place::Folder(folder) => {
                let from = folder.join(name);
                fs::copy(&from, path).map_err(Error::io(path))?;
                let file = File::open(path).map_err(Error::io(path))?;
                file.sync_all().map_err(Error::io(path))
            }
            Place::Store { remote, .. } => runtime().block_on(fetch_file(remote, name, path)),
        }
    }

    /// Copies a file to a folder at the pace.
    fn copy_file(&self, place: &Path, path: &Path, blake3: Option<&str>) -> Result<()> {
        create_folder_of(place)?;
        let mut file = File::open(path).map_err(Error::io(path))?;
        let mut copy = DurableFile::create(place)?;
        let mut hasher = blake3::Hasher::new();
        let mut slice = vec![0; self.pace.slice_bytes()];
        loop {
            let len = file.read(&mut slice).map_err(Error::io(path))?;
            if len == 0 {
                break;
            }
            thread::sleep(self.pace.wait(len));
            if blake3.is_some() {
                hasher.update(&slice[..len]);
            }
            copy.write_all(&slice[..len]).map_err(copy.error())?;
            self.pace.count(len);
        }
        check_hash(path, blake3, &hasher)?;
        copy.commit()
    }

    async fn send_file(
        &self,
        remote: &Remote,
        store: &Arc<dyn ObjectStore>,
        name: &str,
        path: &Path,
        blake3: Option<&str>,
    ) -> Result<()> {
        let file = PartFile::open(path.to_owned())?;
        let key = remote.key(name);
        let failed = |error: object_store::Error| remote.failed(name, &error);
        let part_bytes = part_bytes(file.len);
        let mut hasher = blake3::Hasher::new();
        if file.len <= part_bytes {
            let bytes = file.read_part(0, part_bytes).await?;
            hasher.update(&bytes);
            check_hash(path, blake3, &hasher)?;
            let put = store.put(&key, PutPayload::from_bytes(bytes)).await;
            return put.map(drop).map_err(failed);
        }
        let mut upload = store.put_multipart(&key).await.map_err(failed)?;
        let parts = Parts {
            file: &file,
            part_bytes,
            at_once: self.parts_at_once,
        };
        let mut sent = parts.send(&mut *upload, &mut hasher, &failed).await;
        if sent.is_ok() {
            sent = check_hash(path, blake3, &hasher);
        }
        if let Err(error) = sent {
            // Parts of an unfinished upload cost money until they are deleted.
            let _ = upload.abort().await;
            return Err(error);
        }
        upload.complete().await.map(drop).map_err(failed)
    }
}

fn not_a_bucket(url: &str, more: &str) -> Error {
    Error::Invalid {
        what: url.to_owned(),
        reason: format!("expected s3://, gs://, az:// or file://{more}"),
    }
}

/// A file that is sent in parts.
struct Parts<'a> {
    file: &'a PartFile,
    part_bytes: u64,
    at_once: usize,
}

impl Parts<'_> {
    async fn send(
        &self,
        upload: &mut dyn MultipartUpload,
        hasher: &mut blake3::Hasher,
        failed: &impl Fn(object_store::Error) -> Error,
    ) -> Result<()> {
        let mut sending = JoinSet::new();
        for start in (0..self.file.len).step_by(self.part_bytes as usize) {
            let bytes = self.file.read_part(start, self.part_bytes).await?;
            // Parts that are being sent have tasks of their own, which continue meanwhile.
            hasher.update(&bytes);
            while sending.len() >= self.at_once {
                joined(sending.join_next().await).map_err(failed)?;
            }
            sending.spawn(upload.put_part(PutPayload::from_bytes(bytes)));
        }
        while !sending.is_empty() {
            joined(sending.join_next().await).map_err(failed)?;
        }
        Ok(())
    }
}

type Joined<T> = Option<std::result::Result<T, tokio::task::JoinError>>;

/// Returns what a task of a set returned.
fn joined<T>(task: Joined<object_store::Result<T>>) -> object_store::Result<()> {
    match task {
        None => Ok(()),
        Some(Ok(done)) => done.map(drop),
        Some(Err(error)) => Err(object_store::Error::JoinError { source: error }),
    }
}

/// The runtime of uploads. Its thread encrypts what is sent; that of the loader's requests stays
/// free for them.
fn uploads() -> &'static Runtime {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
        let mut builder = Builder::new_multi_thread();
        let runtime = builder
            .worker_threads(1)
            .thread_name("rectiflow-upload")
            .enable_all()
            .build();
        runtime.expect("the process can start threads")
    });
    &RUNTIME
}

/// Returns the bytes of a part, of which a file of `len` bytes has not too many.
fn part_bytes(len: u64) -> u64 {
    len.div_ceil(MOST_PARTS).max(PART_BYTES)
}

/// Returns the time for a request with one part, of which several share the limit.
fn part_timeout(mbit: Option<f64>, at_once: usize) -> Duration {
    let Some(mbit) = mbit else {
        return REQUEST_TIMEOUT;
    };
    let secs = (PART_BYTES * at_once as u64) as f64 / (mbit * 1e6 / 8.0);
    REQUEST_TIMEOUT + Duration::from_secs_f64(2.0 * secs)
}

/// Compares a file with the hash that is known of it.
fn check_hash(path: &Path, expected: Option<&str>, hasher: &blake3::Hasher) -> Result<()> {
    let Some(expected) = expected else {
        return Ok(());
    };
    let found = hasher.finalize().to_hex();
    if found.as_str() == expected {
        return Ok(());
    }
    Err(Error::Invalid {
        what: path.display().to_string(),
        reason: format!("expected BLAKE3 {expected}, found {found}"),
    })
}

/// Reads an object in ranges, several at a time.
async fn fetch_file(remote: &Remote, name: &str, path: &Path) -> Result<()> {
    let len = remote.len(name).await?;
    let file = File::create(path).map_err(Error::io(path))?;
    let file = Arc::new(file);
    let mut fetching: JoinSet<Result<()>> = JoinSet::new();
    for start in (0..len).step_by(RANGE_BYTES as usize) {
        while fetching.len() >= RANGES_AT_ONCE {
            fetched(fetching.join_next().await)?;
        }
        let (remote, name, path) = (remote.clone(), name.to_owned(), path.to_owned());
        let (file, range) = (Arc::clone(&file), start..len.min(start + RANGE_BYTES));
        fetching.spawn(async move { fetch_range(&remote, &name, range, &file, &path).await });
    }
    while !fetching.is_empty() {
        fetched(fetching.join_next().await)?;
    }
    on_disk(move || file.sync_all())
        .await
        .map_err(Error::io(path))
}

async fn fetch_range(
    remote: &Remote,
    name: &str,
    range: Range<u64>,
    file: &Arc<File>,
    path: &Path,
) -> Result<()> {
    let start = range.start;
    let bytes: Bytes = remote.read_range(name, range, Ok).await?;
    let file = Arc::clone(file);
    let written = on_disk(move || file.write_all_at(&bytes, start)).await;
    written.map_err(Error::io(path))
}

fn fetched(task: Joined<Result<()>>) -> Result<()> {
    task.map_or(Ok(()), |task| {
        task.expect("a download is not cancelled and does not panic")
    })
}

fn create_folder_of(path: &Path) -> Result<()> {
    match path.parent() {
        Some(folder) => fs::create_dir_all(folder).map_err(Error::io(folder)),
        None => Ok(()),
    }
}

fn read_file(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(Error::io(path))?,
    };
    let mut bytes = Vec::new();
    let read = file.take(limit + 1).read_to_end(&mut bytes);
    read.map_err(Error::io(path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::Invalid {
            what: path.display().to_string(),
            reason: format!("expected at most {limit} bytes"),
        });
    }
    Ok(Some(bytes))
}

/// Appends the files below a folder that are complete.
fn files_below(folder: &Path, prefix: &str, found: &mut Vec<Stored>) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(Error::io(folder))?,
    };
    for entry in entries {
        let entry = entry.map_err(Error::io(folder))?;
        let file_name = entry.file_name().to_string_lossy().into_owned();
        let name = format!("{prefix}{file_name}");
        let facts = entry.metadata().map_err(Error::io(entry.path()))?;
        if facts.is_dir() {
            files_below(&entry.path(), &format!("{name}/"), found)?;
        } else if !file_name.starts_with(TEMPORARY_PREFIX) {
            let bytes = facts.len();
            found.push(Stored { name, bytes });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(folder: &Path, mbit: Option<f64>) -> Bucket {
        let url = format!("file://{}", folder.display());
        Bucket::open(&url, mbit).expect("a folder")
    }

    #[test]
    fn a_folder_is_written_listed_read_and_emptied() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let bucket = open(&dir.path().join("not/there/yet"), None);
        assert_eq!(bucket.list().expect("it is empty"), []);
        let file = dir.path().join("file");
        fs::write(&file, "content").expect("writes");
        let hash = blake3::hash(b"content").to_hex().to_string();
        let put = bucket.put_file("a/b/file", &file, Some(&hash));
        put.expect("the hash is right");
        bucket.put("a/small", b"x").expect("writes");
        let stored = |name: &str, bytes: u64| Stored {
            name: name.to_owned(),
            bytes,
        };
        let found = bucket.list().expect("lists");
        assert_eq!(found, [stored("a/b/file", 7), stored("a/small", 1)]);
        assert_eq!(bucket.sent_bytes(), 8);
        let read = bucket.read("a/b/file", 100).expect("reads");
        assert_eq!(read.as_deref(), Some(&b"content"[..]));
        assert!(bucket.read("a/b/file", 3).is_err(), "it is too long");
        assert_eq!(bucket.read("a/none", 3).expect("no error"), None);
        let copy = dir.path().join("c/copy");
        bucket.fetch("a/b/file", &copy).expect("fetches");
        assert_eq!(fs::read(copy).expect("reads"), b"content");
        for _ in 0..2 {
            bucket
                .remove("a/small")
                .expect("it is removed or not there");
        }
        assert_eq!(bucket.list().expect("lists").len(), 1);
    }

    #[test]
    fn a_file_with_another_hash_does_not_appear() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let bucket = open(&dir.path().join("bucket"), None);
        let file = dir.path().join("file");
        fs::write(&file, "content").expect("writes");
        let hash = blake3::hash(b"other").to_hex().to_string();
        let refused = bucket.put_file("file", &file, Some(&hash));
        assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
        assert_eq!(bucket.list().expect("lists"), []);
    }

    #[test]
    fn only_stores_that_list_and_take_parts_are_buckets() {
        for url in ["runs/a", "http://host/x", "https://host/x", "ftp://host/x"] {
            let refused = Bucket::open(url, None).expect_err(url).to_string();
            assert!(refused.contains("s3://"), "{refused}");
        }
        assert!(Bucket::open("s3://bucket/run", Some(100.0)).is_ok());
    }

    #[test]
    fn a_large_file_has_no_more_parts_than_a_store_takes() {
        assert_eq!(part_bytes(1 << 30), PART_BYTES);
        let large = 1 << 40;
        assert!(large / part_bytes(large) <= MOST_PARTS);
    }

    #[test]
    fn a_slow_limit_has_longer_deadlines() {
        assert_eq!(part_timeout(None, 8), REQUEST_TIMEOUT);
        assert!(part_timeout(Some(1.0), 2) > Duration::from_secs(800));
    }
}
