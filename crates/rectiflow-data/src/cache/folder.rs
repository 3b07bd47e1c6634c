//! The folder of a cache on the disk: its file names, the locks of living processes, and the sweep
//! by the first process.
//!
//! A living process holds a lock on an open file; the lock ends with the process, however it ends.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{durable::TEMPORARY_PREFIX, lock_file::open_lockable};

/// File that marks a folder as a cache, which can be swept.
pub(crate) const MARK: &str = "rectiflow-cache";
/// File with the bytes in use, one little-endian 64-bit number; locked while it changes.
pub(crate) const USAGE: &str = "usage";
/// File in a data set's folder; processes that have the data set open hold a shared lock on it.
pub(crate) const OPEN: &str = "open";
/// Prefix of files in a data set's folder; processes with the same plan hold a shared lock on one.
pub(crate) const PLAN_PREFIX: &str = "plan-";
/// Folder of latents blocks in a data set's folder.
pub(crate) const LATENTS: &str = "latents";
/// Folder of text blocks in a data set's folder.
pub(crate) const TEXT: &str = "text";
/// Hex digits of a data set's identity in the name of its folder.
pub(crate) const IDENTITY_DIGITS: usize = 32;

/// A block of a data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockId {
    /// Name of the data set's folder.
    pub(crate) folder: Arc<str>,
    pub(crate) object: usize,
    pub(crate) number: u32,
}

/// Whether an open file is still the one at `path`.
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(open), Ok(named)) = (file.metadata(), fs::metadata(path)) else {
        return false;
    };
    (open.dev(), open.ino()) == (named.dev(), named.ino())
}

/// Takes a shared lock on a mark. A mark without a lock can be deleted at any time, so this opens
/// it again until the locked file is the one at `path`.
pub(crate) fn lock_shared(path: &Path) -> io::Result<File> {
    loop {
        let file = open_lockable(path)?;
        file.lock_shared()?;
        if is_at(&file, path) {
            return Ok(file);
        }
    }
}

/// The file at `path`, locked, if it exists and no living process holds a lock on it.
pub(crate) fn try_alone(path: &Path) -> Option<File> {
    let file = File::options().read(true).write(true).open(path).ok()?;
    file.try_lock().is_ok().then_some(file)
}

/// Deletes a half-written file if no living process holds it, and returns whether it did.
pub(crate) fn is_left_over(path: &Path) -> bool {
    try_alone(path).is_some_and(|_held| fs::remove_file(path).is_ok())
}

pub(crate) fn is_identity(name: &str) -> bool {
    name.len() == IDENTITY_DIGITS && name.chars().all(|c| c.is_ascii_hexdigit())
}

/// Object and number of a block, parsed from the name of its file.
pub(crate) fn parse_block(name: &str) -> Option<(usize, u32)> {
    let (object, number) = name.split_once('-')?;
    Some((object.parse().ok()?, number.parse().ok()?))
}

/// Paths and names of the entries of a folder. Empty if there is no such folder.
pub(crate) fn names(folder: &Path) -> io::Result<Vec<(PathBuf, String)>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        names.push((entry.path(), name));
    }
    Ok(names)
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// Deletes half-written files and returns the bytes of the others. Reads only names that a cache
/// creates.
pub(crate) fn sweep(root: &Path) -> io::Result<u64> {
    let mut used = 0;
    for (dataset, name) in names(root)? {
        if is_identity(&name) {
            for folder in [LATENTS, TEXT] {
                used += sweep_blocks(&dataset.join(folder))?;
            }
        }
    }
    Ok(used)
}

fn sweep_blocks(folder: &Path) -> io::Result<u64> {
    let mut used = 0;
    for (path, name) in names(folder)? {
        if name.starts_with(TEMPORARY_PREFIX) {
            fs::remove_file(&path)?;
        } else {
            used += fs::metadata(&path)?.len();
        }
    }
    Ok(used)
}
