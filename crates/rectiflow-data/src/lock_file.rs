//! Files that a process locks for as long as it lives: the lock ends with the process, however it
//! ends, and the file stays.

use std::{
    fs::{File, TryLockError},
    io,
    path::Path,
};

use crate::error::{Error, Result};

/// Opens a file for locking, and creates it if it does not exist.
pub(crate) fn open_lockable(path: &Path) -> io::Result<File> {
    File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
}

/// The file at `path`, created if it is missing and locked against all others. None if another
/// process holds it.
///
/// # Errors
/// [`Error::Io`].
pub fn lock_alone(path: &Path) -> Result<Option<File>> {
    locked(path, File::try_lock)
}

/// As [`lock_alone`], and others can lock it in this way too.
pub(crate) fn lock_together(path: &Path) -> Result<Option<File>> {
    locked(path, File::try_lock_shared)
}

fn locked(
    path: &Path,
    lock: fn(&File) -> std::result::Result<(), TryLockError>,
) -> Result<Option<File>> {
    let file = open_lockable(path).map_err(Error::io(path))?;
    match lock(&file) {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(source)) => Err(Error::io(path)(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_for_one_or_for_all_who_share_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let first = lock_together(&path).unwrap();
        assert!(first.is_some() && lock_together(&path).unwrap().is_some());
        assert!(lock_alone(&path).unwrap().is_none());
        drop(first);
        let alone = lock_alone(&path).unwrap();
        assert!(alone.is_some() && lock_together(&path).unwrap().is_none());
        let error = lock_alone(&folder.path().join("no/lock")).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }
}
