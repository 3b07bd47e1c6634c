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
    let remote = remote_at(url)?;
    let local = Dataset::open(root)?;
    if known_at(url)?.is_some_and(|known| known.identity() == local.identity()) {
        return Ok(Published {
            num_kept: 2 * local.manifest().objects.len() as u64 + 2,
            ..Published::default()
        });
    }
    let mut published = send_objects(&local, &remote, root, progress)?;
    // Readers see the new data set with its manifest, which is last.
    for name in [&local.manifest().blocks.file, MANIFEST_FILE] {
        send(&remote, root, name)?;
        published.num_files += 1;
        let path = root.join(name);
        published.num_bytes += std::fs::metadata(&path).map_err(Error::io(&path))?.len();
    }
    Ok(published)
}

/// Sends the missing files of all objects.
fn send_objects(
    local: &Dataset,
    remote: &Remote,
    root: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Published> {
    let files = files_of(local);
    let total = files.iter().map(|file| file.bytes).sum();
    let mut published = Published::default();
    let mut done = 0;
    for file in files {
        if is_uploaded(local, remote, &file)? {
            published.num_kept += 1;
        } else {
            check_is_here(root, &file.name)?;
            send(remote, root, &file.name)?;
            published.num_files += 1;
            published.num_bytes += file.bytes;
        }
        done += file.bytes;
        progress(done, total);
    }
    Ok(published)
}

/// Fails if a file that is not at the URL is not here either: its latents were sent once, and are
/// gone.
fn check_is_here(root: &Path, name: &str) -> Result<()> {
    let path = root.join(name);
    if path.exists() {
        return Ok(());
    }
    Err(Error::Invalid {
        what: path.display().to_string(),
        reason: "it was sent to the URL and is no longer there: delete the folder's manifest.json \
                 and prep/objects, and prepare again, which encodes all pictures"
            .to_owned(),
    })
}

pub(crate) fn remote_at(url: &str) -> Result<Remote> {
    match Location::parse(Path::new(url), &Network::default())? {
        Location::Remote(remote) => Ok(remote),
        Location::Folder(_) => Err(Error::Invalid {
            what: url.to_owned(),
            reason: "expected a URL, found a folder".to_owned(),
        }),
    }
}

/// The data set at `url`. None if there is none, or a broken one, which is replaced.
fn known_at(url: &str) -> Result<Option<Dataset>> {
    match Dataset::open(url) {
        Ok(known) => Ok(Some(known)),
        Err(error) if error.is_missing_object() => Ok(None),
        Err(Error::Malformed { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A file of an object.
struct LocalFile {
    kind: ObjectFile,
    /// Index of the object in the manifest.
    object: usize,
    name: String,
    bytes: u64,
}

/// The files of all objects, in the order of the manifest.
fn files_of(local: &Dataset) -> Vec<LocalFile> {
    let mut files = Vec::new();
    for (index, object) in local.manifest().objects.iter().enumerate() {
        files.push(LocalFile {
            kind: ObjectFile::Latents,
            object: index,
            name: object.latents.clone(),
            bytes: local.manifest().latents_bytes(object),
        });
        files.push(LocalFile {
            kind: ObjectFile::Text,
            object: index,
            name: object.text.clone(),
            bytes: object.text_bytes,
        });
    }
    files
}

/// Whether the store has a file of the right length whose first and last blocks match.
fn is_uploaded(local: &Dataset, remote: &Remote, file: &LocalFile) -> Result<bool> {
    let LocalFile { kind, object, .. } = *file;
    let last = local.manifest().objects[object].num_blocks() - 1;
    let first_block = local.request(kind, object, 0..1)?;
    let last_block = local.request(kind, object, last..last + 1)?;
    match runtime().block_on(remote.len(&first_block.name)) {
        Ok(found) if found == file.bytes => {}
        Ok(_) => return Ok(false),
        Err(error) if error.is_missing_object() => return Ok(false),
        Err(error) => return Err(error),
    }
    for request in [first_block, last_block] {
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
