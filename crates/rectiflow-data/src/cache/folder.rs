//! The folder of a cache on the disk: its names, the locks that say who is alive, and what the first process sweeps.
//!
//! Liveness is a lock on an open file, so that it ends with the process, however that ends.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::durable::TEMPORARY_PREFIX;

/// In the folder, says that it is a cache and may be swept.
pub(crate) const MARK: &str = "rectiflow-cache";
/// Bytes in use, one little-endian 64-bit number; locked while it is changed.
pub(crate) const USAGE: &str = "usage";
/// In a data set's folder: locked, shared, by all who have it open.
pub(crate) const OPEN: &str = "open";
/// Of files in a data set's folder that are locked, shared, by all who follow one plan.
pub(crate) const PLAN_PREFIX: &str = "plan-";
/// Folders of blocks in a data set's folder.
pub(crate) const LATENTS: &str = "latents";
pub(crate) const TEXT: &str = "text";
/// Hex digits of a data set's identity in its folder's name.
pub(crate) const IDENTITY_DIGITS: usize = 32;

/// A block of a data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockId {
    /// Name of the data set's folder.
    pub(crate) folder: Arc<str>,
    pub(crate) object: usize,
    pub(crate) number: u32,
}

/// Opens a file to be locked, and makes it if need be.
pub(crate) fn open_lockable(path: &Path) -> io::Result<File> {
    File::options().create(true).truncate(false).read(true).write(true).open(path)
}

/// Whether an open file still has the name that it was opened by.
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(open), Ok(named)) = (file.metadata(), fs::metadata(path)) else { return false };
    (open.dev(), open.ino()) == (named.dev(), named.ino())
}

/// Locks a mark, shared. Who finds one that nobody holds may delete it.
pub(crate) fn lock_shared(path: &Path) -> io::Result<File> {
    loop {
        let file = open_lockable(path)?;
        file.lock_shared()?;
        if is_at(&file, path) {
            return Ok(file);
        }
    }
}

/// The file, if it is there and no living process holds it.
pub(crate) fn try_alone(path: &Path) -> Option<File> {
    let file = File::options().read(true).write(true).open(path).ok()?;
    file.try_lock().is_ok().then_some(file)
}

/// Whether a half-written file is nobody's any more; then it is deleted.
pub(crate) fn is_left_over(path: &Path) -> bool {
    try_alone(path).is_some_and(|_held| fs::remove_file(path).is_ok())
}

pub(crate) fn is_identity(name: &str) -> bool {
    name.len() == IDENTITY_DIGITS && name.chars().all(|c| c.is_ascii_hexdigit())
}

/// Object and number of a block, from its file's name.
pub(crate) fn parse_block(name: &str) -> Option<(usize, u32)> {
    let (object, number) = name.split_once('-')?;
    Some((object.parse().ok()?, number.parse().ok()?))
}

/// Paths and names in a folder; none where there is no such folder.
pub(crate) fn names(folder: &Path) -> io::Result<Vec<(PathBuf, String)>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        entries => entries?,
    };
    entries.map(|entry| entry.map(|entry| (entry.path(), entry.file_name().to_string_lossy().into_owned()))).collect()
}

/// Deletes what is half written and counts the bytes of the rest. Looks only at names that a cache makes.
pub(crate) fn sweep(root: &Path) -> io::Result<u64> {
    let mut used = 0;
    for (dataset, _) in names(root)?.into_iter().filter(|(_, name)| is_identity(name)) {
        for folder in [LATENTS, TEXT] {
            for (path, name) in names(&dataset.join(folder))? {
                if name.starts_with(TEMPORARY_PREFIX) {
                    fs::remove_file(&path)?;
                } else {
                    used += fs::metadata(&path)?.len();
                }
            }
        }
    }
    Ok(used)
}
