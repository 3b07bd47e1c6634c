//! Files and folders that appear whole or not at all: written under a temporary name, flushed to the disk, renamed, and
//! the folder flushed too, so that neither kill -9 nor a power cut leaves half of one under a final name.
//!
//! The trainer's checkpoints are written with these too. `rectiflow-data` has its own: it shares no crate with this one.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

use crate::error::{Error, Result};

/// Creates `path` from what `write` writes: into a file beside it first, so that a reader never sees a part and a crash
/// leaves the old file.
///
/// # Errors
/// [`Error::Io`], or whatever `write` returns; the temporary file is removed then.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".tmp-{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let result = write_and_sync(&temporary, write)
        .and_then(|()| fs::rename(&temporary, path).map_err(Error::io(path)))
        .and_then(|()| sync_folder_of(path));
    if result.is_err() {
        // The first failure is the one to report; a temporary file that stays is only untidy.
        let _ = fs::remove_file(&temporary);
    }
    result
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

fn write_and_sync(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(Error::io(path))?);
    write(&mut file)?;
    file.flush().map_err(Error::io(path))?;
    file.get_ref().sync_all().map_err(Error::io(path))
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
