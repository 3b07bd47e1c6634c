//! A packed data set from a folder to an object store: only what is not there yet, the manifest last.
//!
//! Until the new manifest is written readers see the old data set, whole: a file that a manifest names is never
//! changed under its name unless its rows are others, and then it is another data set's. An upload that was interrupted
//! goes on: a file is taken as uploaded if its length and the checksums of its first and last block are right. Nothing is
//! deleted at the URL: a run that reads the old data set may still need it.

use std::path::Path;

use crate::{
    dataset::Dataset,
    error::{Error, Result},
    format::manifest::MANIFEST_FILE,
    remote::{Location, Remote, network::Network, request::ObjectFile, runtime, upload::send},
};

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
    let Location::Remote(remote) = Location::parse(Path::new(url), &Network::default())? else {
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
        files.push((ObjectFile::Latents, index, object.latents.clone(), local.manifest().latents_bytes(object)));
        files.push((ObjectFile::Text, index, object.text.clone(), object.text_bytes));
    }
    let total = files.iter().map(|(_, _, _, bytes)| bytes).sum();
    let mut done = 0;
    for (file, object, name, bytes) in files {
        if is_there(&local, &remote, file, object, bytes)? {
            published.num_kept += 1;
        } else {
            send(&remote, root, &name)?;
            published.num_files += 1;
            published.num_bytes += bytes;
        }
        done += bytes;
        progress(done, total);
    }
    for name in [&local.manifest().blocks.file, MANIFEST_FILE] {
        send(&remote, root, name)?;
        published.num_files += 1;
        published.num_bytes += std::fs::metadata(root.join(name)).map_err(Error::io(root.join(name)))?.len();
    }
    Ok(published)
}

/// Whether the store has a file with the right length, and the right bytes at its ends.
fn is_there(local: &Dataset, remote: &Remote, file: ObjectFile, object: usize, bytes: u64) -> Result<bool> {
    let last = local.manifest().objects[object].num_blocks() - 1;
    let (first, last) = (local.request(file, object, 0..1)?, local.request(file, object, last..last + 1)?);
    match runtime().block_on(remote.len(&first.name)) {
        Ok(found) if found == bytes => {}
        Ok(_) => return Ok(false),
        Err(error) if error.is_missing_object() => return Ok(false),
        Err(error) => return Err(error),
    }
    for request in [first, last] {
        // Wrong bytes are an answer here, and no reason to ask again.
        let found = remote.read_range(&request.name, request.range(), |bytes| Ok(request.verify(bytes)));
        if runtime().block_on(found)?.is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}
