//! Files and folders that appear completely or not at all.
//!
//! They are written without a name or under a temporary one and flushed to disk. Then they are
//! renamed and their folder is flushed too, so that neither kill -9 nor a power failure leaves a
//! partial one under its final name. Files use the crate `atomic-write-file`; folders are handled
//! here. The trainer writes its checkpoints with these functions too.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

use atomic_write_file::{AtomicWriteFile, OpenOptions, unix::OpenOptionsExt};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use crate::error::{Error, Result};

/// Creates `path` with the bytes that `write` writes. Readers never see a partial file, and a crash
/// leaves the old one.
///
/// # Errors
/// [`Error::Io`], or the error of `write`; the old file is then unchanged, and no temporary file
/// remains.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<AtomicWriteFile>) -> Result<()>,
) -> Result<()> {
    let parent = parent_of(path);
    if !parent.is_dir() {
        // The system's message would be about a temporary file.
        return Err(Error::Missing {
            path: path.to_owned(),
            what: format!("the folder {}", parent.display()),
            hint: "create it, or choose another place".into(),
        });
    }
    // The new file has a new file's owner and permissions, even if it replaces another.
    let file = OpenOptions::new()
        .preserve_mode(false)
        .preserve_owner(false)
        .open(path)
        .map_err(Error::io(path))?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    write(&mut file)?;
    let file = file
        .into_inner()
        .map_err(|error| Error::io(path)(error.into_error()))?;
    file.commit().map_err(Error::io(path))
}

/// Creates the folder that `path` is in, and those above it.
///
/// # Errors
/// [`Error::Io`] with the folder.
pub fn create_parent(path: &Path) -> Result<()> {
    let parent = parent_of(path);
    fs::create_dir_all(parent).map_err(Error::io(parent))
}

/// Returns the folder that `path` is in.
fn parent_of(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Creates `path` from bytes in memory, as [`write_atomically`].
///
/// # Errors
/// [`Error::Io`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically(path, |file| file.write_all(bytes).map_err(Error::io(path)))
}

/// Renames a complete folder, so that its new name and the names of its files survive a power
/// failure.
///
/// # Errors
/// [`Error::Io`].
pub fn rename_folder(from: &Path, to: &Path) -> Result<()> {
    sync_folder(from)?;
    fs::rename(from, to).map_err(Error::io(to))?;
    sync_folder_of(to)
}

/// Exchanges the names of a complete folder and an older one, so that there is a folder of either
/// name at every moment. Returns false, with nothing changed, where the file system cannot do that.
///
/// # Errors
/// [`Error::Io`].
pub fn exchange_folders(from: &Path, to: &Path) -> Result<bool> {
    sync_folder(from)?;
    if renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_EXCHANGE).is_err() {
        // Whatever else is wrong is said by the renames that take its place.
        return Ok(false);
    }
    sync_folder_of(to)?;
    Ok(true)
}

/// Flushes a folder to disk: a new name in it is durable only then.
fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(Error::io(folder))
}

fn sync_folder_of(path: &Path) -> Result<()> {
    sync_folder(parent_of(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kept");
        write_bytes(&path, b"old").unwrap();
        let fails = write_atomically(&path, |file| {
            file.write_all(b"new").unwrap();
            Err(Error::Invalid {
                what: "x".into(),
                reason: "y".into(),
            })
        });
        assert!(fails.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn folders_exchange_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let (new, old) = (folder.path().join("new"), folder.path().join("old"));
        for path in [&new, &old] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("a"), path.to_str().unwrap()).unwrap();
        }
        // Every file system of Linux that a test folder is likely to be on can do it.
        assert!(exchange_folders(&new, &old).unwrap());
        let text = |path: &Path| fs::read_to_string(path.join("a")).unwrap();
        assert_eq!(text(&old), new.to_str().unwrap());
        assert_eq!(text(&new), old.to_str().unwrap());
        assert!(!exchange_folders(&new, &folder.path().join("none")).unwrap());
        assert_eq!(
            text(&new),
            old.to_str().unwrap(),
            "nothing changes without the other"
        );
    }

    #[test]
    fn a_folder_gets_its_name_with_all_that_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir(&from).unwrap();
        write_bytes(&from.join("a"), b"1").unwrap();
        rename_folder(&from, &to).unwrap();
        assert_eq!(fs::read(to.join("a")).unwrap(), b"1");
        assert!(!from.exists() && rename_folder(&from, &to).is_err());
    }
}
