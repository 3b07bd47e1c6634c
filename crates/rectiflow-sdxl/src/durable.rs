//! Files and folders that appear whole or not at all: written without a name or under a temporary one, flushed to the disk,
//! renamed, and the folder flushed too, so that neither kill -9 nor a power cut leaves half of one under a final name.
//! Files are the crate `atomic-write-file`'s; folders are here.
//!
//! The trainer's checkpoints are written with these too.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

use atomic_write_file::{AtomicWriteFile, OpenOptions, unix::OpenOptionsExt};

use crate::error::{Error, Result};

/// Creates `path` from what `write` writes. A reader never sees a part, and a crash leaves the old file.
///
/// # Errors
/// [`Error::Io`], or what `write` returns; the old file stays then, and nothing else.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut BufWriter<AtomicWriteFile>) -> Result<()>) -> Result<()> {
    // A new file, with a new file's owner and rights, also where it takes the place of another.
    let file = OpenOptions::new().preserve_mode(false).preserve_owner(false).open(path).map_err(Error::io(path))?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    write(&mut file)?;
    let file = file.into_inner().map_err(|error| Error::io(path)(error.into_error()))?;
    file.commit().map_err(Error::io(path))
}

/// [`write_atomically`] of bytes that are in memory.
///
/// # Errors
/// [`Error::Io`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically(path, |file| file.write_all(bytes).map_err(Error::io(path)))
}

/// Renames a finished folder and makes its new name, and those of the files in it, survive a power cut.
///
/// # Errors
/// [`Error::Io`].
pub fn rename_folder(from: &Path, to: &Path) -> Result<()> {
    sync_folder(from)?;
    fs::rename(from, to).map_err(Error::io(to))?;
    sync_folder_of(to)
}

/// A new name in a folder is safe only when the folder is on disk.
fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))
}

fn sync_folder_of(path: &Path) -> Result<()> {
    sync_folder(path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))
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
            Err(Error::Invalid { what: "x".into(), reason: "y".into() })
        });
        assert!(fails.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
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
