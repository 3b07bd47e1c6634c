//! A packed data set from a folder to an object store: only what is not there yet, the manifest last.
//!
//! Until the new manifest is written readers see the old data set, whole: a file that a manifest names is never
//! changed under its name unless its rows are others, and then it is another data set's. An upload that was interrupted
//! goes on: a file is taken as uploaded if its length and the checksums of its first and last block are right. Files of
//! more than a part are sent in parts (multipart), which appear together or not at all. Nothing is deleted at the URL:
//! a run that reads the old data set may still need it.

use std::{fs::File, os::unix::fs::FileExt, path::Path, sync::Arc};

use bytes::Bytes;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, WriteMultipart, path::Path as Key};

use crate::{
    dataset::Dataset,
    error::{Error, Result},
    format::manifest::MANIFEST_FILE,
    remote::{
        Network, Place, Remote,
        fetch::{Part, on_disk},
        runtime,
    },
};

/// Bytes of a part; S3 takes 5 MiB to 5 GiB, and at most 10,000 parts.
const PART_BYTES: u64 = 16 << 20;
/// Parts under way at once.
const PARTS_AT_ONCE: usize = 8;

/// What publishing did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Published {
    /// Files that were sent.
    pub num_files: u64,
    /// Their bytes.
    pub num_bytes: u64,
    /// Files that were there already.
    pub num_kept: u64,
}

/// Brings the data set at `url` to the state of the one in the folder `root`. `progress` hears of bytes sent or found
/// there, and of all.
///
/// # Errors
/// [`Error::Invalid`] for a place that is no URL or cannot be written, as [`Dataset::open`] for the folder,
/// [`Error::Remote`] where the store fails.
pub fn publish(root: &Path, url: &str, progress: &mut dyn FnMut(u64, u64)) -> Result<Published> {
    let Place::Remote(remote) = Place::parse(Path::new(url), &Network::default())? else {
        return Err(Error::Invalid { what: url.to_owned(), reason: "expected a URL, found a folder".to_owned() });
    };
    let local = Dataset::open(root)?;
    let known = match Dataset::open(url) {
        Ok(known) => Some(known),
        Err(error) if error.is_missing_object() => None,
        // What is there is not a data set, or a broken one: it is replaced by one that is.
        Err(Error::Malformed { .. }) => None,
        Err(error) => return Err(error),
    };
    let mut published = Published::default();
    if known.is_some_and(|known| known.identity() == local.identity()) {
        published.num_kept = 2 * local.manifest().objects.len() as u64 + 2;
        return Ok(published);
    }
    let mut files = Vec::new();
    for (index, object) in local.manifest().objects.iter().enumerate() {
        files.push((Part::Latents, index, object.latents.clone(), local.manifest().latents_bytes(object)));
        files.push((Part::Text, index, object.text.clone(), object.text_bytes));
    }
    let total = files.iter().map(|(_, _, _, bytes)| bytes).sum();
    let mut done = 0;
    for (part, object, name, bytes) in files {
        if runtime().block_on(is_there(&local, &remote, part, object, bytes))? {
            published.num_kept += 1;
        } else {
            runtime().block_on(send(&remote, root, &name))?;
            published.num_files += 1;
            published.num_bytes += bytes;
        }
        done += bytes;
        progress(done, total);
    }
    for name in [&local.manifest().blocks.file, MANIFEST_FILE] {
        runtime().block_on(send(&remote, root, name))?;
        published.num_files += 1;
        published.num_bytes += std::fs::metadata(root.join(name)).map_err(Error::io(root.join(name)))?.len();
    }
    Ok(published)
}

/// Whether the store has a file with the right length, and the right bytes at its ends.
async fn is_there(local: &Dataset, remote: &Remote, part: Part, object: usize, bytes: u64) -> Result<bool> {
    let last = local.manifest().objects[object].num_blocks() - 1;
    let (first, last) = (local.request(part, object, 0..1)?, local.request(part, object, last..last + 1)?);
    match remote.len(&first.name).await {
        Ok(found) if found == bytes => {}
        Ok(_) => return Ok(false),
        Err(error) if error.is_missing_object() => return Ok(false),
        Err(error) => return Err(error),
    }
    for request in [first, last] {
        // Wrong bytes are an answer here, and no reason to ask again.
        let found = remote.read_range(&request.name, request.range(), |bytes| Ok(request.verify(bytes))).await?;
        if found.is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}

async fn send(remote: &Remote, root: &Path, name: &str) -> Result<()> {
    let path = root.join(name);
    let file = Arc::new(File::open(&path).map_err(Error::io(&path))?);
    let len = file.metadata().map_err(Error::io(&path))?.len();
    let read = async |start: u64| -> Result<Bytes> {
        let (file, path) = (file.clone(), path.clone());
        let read = move || {
            let mut bytes = vec![0; PART_BYTES.min(len - start) as usize];
            file.read_exact_at(&mut bytes, start).map_err(Error::io(path)).map(|()| Bytes::from(bytes))
        };
        on_disk(read).await
    };
    let failed = |error: object_store::Error| remote.failed(name, &error);
    let (store, key): (Arc<dyn ObjectStore>, Key) = remote.uploads(name).map_err(failed)?;
    if len <= PART_BYTES {
        return store.put(&key, PutPayload::from_bytes(read(0).await?)).await.map(drop).map_err(failed);
    }
    let mut parts =
        WriteMultipart::new_with_chunk_size(store.put_multipart(&key).await.map_err(failed)?, PART_BYTES as usize);
    for start in (0..len).step_by(PART_BYTES as usize) {
        let room = parts.wait_for_capacity(PARTS_AT_ONCE).await.map_err(failed);
        match room.and(read(start).await) {
            Ok(bytes) => parts.put(bytes),
            Err(error) => {
                // Parts of an upload that is not finished cost money until they are gone.
                let _ = parts.abort().await;
                return Err(error);
            }
        }
    }
    parts.finish().await.map(drop).map_err(failed)
}
