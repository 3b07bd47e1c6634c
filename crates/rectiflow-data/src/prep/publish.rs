//! Uploads a packed data set to an object store: only missing files, the manifest last.
//!
//! Until the new manifest is written, readers see the whole old data set: a file that a manifest
//! names keeps its content, unless an upload of another data set replaces it. An interrupted upload
//! resumes: a file counts as uploaded if its length and the checksums of its first and last blocks
//! match. Nothing is deleted at the URL, because a run that reads the old data set may still need
//! it.

use std::path::Path;

use crate::{
    dataset::Dataset,
    error::{Error, Result},
    format::manifest::MANIFEST_FILE,
    remote::{Location, Remote, network::Network, request::ObjectFile, runtime, upload::send},
};

/// Summary of an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Published {
    /// Files sent.
    pub num_files: u64,
    /// Bytes of the files sent.
    pub num_bytes: u64,
    /// Files that were uploaded already.
    pub num_kept: u64,
}

/// Updates the data set at `url` to that in the folder `root`. `progress` is called with the bytes
/// that are sent or uploaded already, and the bytes of all files.
///
/// # Errors
/// [`Error::Invalid`] if `url` is not a URL or cannot be written; [`Error::Remote`] if the store
/// fails; also the errors of [`Dataset::open`] for the folder.
pub fn publish(root: &Path, url: &str, progress: &mut dyn FnMut(u64, u64)) -> Result<Published> {
    let Location::Remote(remote) = Location::parse(Path::new(url), &Network::default())? else {
        return Err(Error::Invalid {
            what: url.to_owned(),
            reason: "expected a URL, found a folder".to_owned(),
        });
    };
    let local = Dataset::open(root)?;
    let known = match Dataset::open(url) {
        Ok(known) => Some(known),
        Err(error) if error.is_missing_object() => None,
        // Not a data set, or a broken one: it is replaced.
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
        files.push((
            ObjectFile::Latents,
            index,
            object.latents.clone(),
            local.manifest().latents_bytes(object),
        ));
        files.push((
            ObjectFile::Text,
            index,
            object.text.clone(),
            object.text_bytes,
        ));
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
        published.num_bytes += std::fs::metadata(root.join(name))
            .map_err(Error::io(root.join(name)))?
            .len();
    }
    Ok(published)
}

/// Whether the store has a file of the right length whose first and last blocks match.
fn is_there(
    local: &Dataset,
    remote: &Remote,
    file: ObjectFile,
    object: usize,
    bytes: u64,
) -> Result<bool> {
    let last = local.manifest().objects[object].num_blocks() - 1;
    let (first, last) = (
        local.request(file, object, 0..1)?,
        local.request(file, object, last..last + 1)?,
    );
    match runtime().block_on(remote.len(&first.name)) {
        Ok(found) if found == bytes => {}
        Ok(_) => return Ok(false),
        Err(error) if error.is_missing_object() => return Ok(false),
        Err(error) => return Err(error),
    }
    for request in [first, last] {
        // Wrong bytes are an answer here, not a reason to request them again.
        let found = remote.read_range(&request.name, request.range(), |bytes| {
            Ok(request.verify(bytes))
        });
        if runtime().block_on(found)?.is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}
