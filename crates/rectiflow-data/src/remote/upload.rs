//! Uploads files of a folder to an object store.
//!
//! Files longer than a part are sent in parts (multipart), which appear together or not at all.
//! Unlike reads, uploads use the retries of `object_store`, since the bytes are not verified here,
//! and limit the time of each request.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use object_store::{
    ObjectStore, ObjectStoreExt, PutPayload, RetryConfig, WriteMultipart, path::Path as Key,
};

use crate::{
    error::{Error, Result},
    remote::{
        Remote, on_disk, runtime,
        store::{open_store, options},
    },
};

/// Bytes of a part; S3 takes 5 MiB to 5 GiB, and at most 10,000 parts.
const PART_BYTES: u64 = 16 << 20;
/// Concurrent parts.
const PARTS_AT_ONCE: usize = 8;
/// Time for a part of 16 MiB at half a megabit per second.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(300);

/// Sends the file `name` of the folder `root` to the object of that name.
///
/// # Errors
/// [`Error::Io`], and [`Error::Remote`] if the store fails.
pub(crate) fn send(remote: &Remote, root: &Path, name: &str) -> Result<()> {
    runtime().block_on(send_file(remote, root, name))
}

async fn send_file(remote: &Remote, root: &Path, name: &str) -> Result<()> {
    let file = PartFile::open(root.join(name))?;
    let failed = |error: object_store::Error| remote.failed(name, &error);
    let (store, key) = client(remote, name).map_err(failed)?;
    if file.len <= PART_BYTES {
        let payload = PutPayload::from_bytes(file.read(0).await?);
        return store.put(&key, payload).await.map(drop).map_err(failed);
    }
    let upload = store.put_multipart(&key).await.map_err(failed)?;
    let mut parts = WriteMultipart::new_with_chunk_size(upload, PART_BYTES as usize);
    for start in (0..file.len).step_by(PART_BYTES as usize) {
        let room = parts.wait_for_capacity(PARTS_AT_ONCE).await.map_err(failed);
        match room.and(file.read(start).await) {
            Ok(bytes) => parts.put(bytes),
            Err(error) => {
                // Parts of an unfinished upload cost money until they are deleted.
                let _ = parts.abort().await;
                return Err(error);
            }
        }
    }
    parts.finish().await.map(drop).map_err(failed)
}

/// A file that is read in parts.
pub(super) struct PartFile {
    path: PathBuf,
    file: Arc<File>,
    pub(super) len: u64,
}

impl PartFile {
    pub(super) fn open(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).map_err(Error::io(&path))?;
        let len = file.metadata().map_err(Error::io(&path))?.len();
        let file = Arc::new(file);
        Ok(Self { path, file, len })
    }

    /// The part of [`PART_BYTES`] that begins at `start`.
    async fn read(&self, start: u64) -> Result<Bytes> {
        self.read_part(start, PART_BYTES).await
    }

    /// The bytes from `start` on, at most `part_bytes`.
    pub(super) async fn read_part(&self, start: u64, part_bytes: u64) -> Result<Bytes> {
        let file = self.file.clone();
        let mut bytes = vec![0; part_bytes.min(self.len - start) as usize];
        let read = move || file.read_exact_at(&mut bytes, start).map(|()| bytes);
        let bytes = on_disk(read).await.map_err(Error::io(&self.path))?;
        Ok(bytes.into())
    }
}

/// A client for writing the object `name`, and its key.
fn client(remote: &Remote, name: &str) -> object_store::Result<(Arc<dyn ObjectStore>, Key)> {
    let (scheme, url) = &*remote.parsed;
    let options = options(url, &remote.network).with_timeout(UPLOAD_TIMEOUT);
    let store = open_store(scheme, url, options, RetryConfig::default())?;
    Ok((
        store.expect("a remote location has a store"),
        remote.key(name),
    ))
}
