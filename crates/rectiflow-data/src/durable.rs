//! Files that appear whole or not at all: written under a temporary name, flushed to the disk, renamed, and the folder
//! flushed too, so that neither kill -9 nor a power cut leaves half a file under a final name.
//!
//! Not the crate `atomic-write-file` (looked at in version 0.3.1): its temporary names are random, `.NAME.XXXXXX`, where
//! `docs/format.md` promises `.writing-NAME`. What a killed preparation leaves would not be known for ours, and each
//! attempt would leave another file of up to 512 MiB. Its unnamed files (`O_TMPFILE`) leave nothing, but network file
//! systems do not have them and fall back to those names.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use crate::error::{Error, Result};

/// Prefix of temporary names. A leftover of a killed run may be deleted by anyone who holds the folder's lock.
pub(crate) const TEMPORARY_PREFIX: &str = ".writing-";

/// A file being written. Without [`DurableFile::commit`] nothing of it remains.
#[derive(Debug)]
pub(crate) struct DurableFile {
    path: PathBuf,
    temporary: PathBuf,
    file: Option<BufWriter<File>>,
}

impl DurableFile {
    /// Begins the file that will be called `path`; its folder must exist.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let name = path.file_name().expect("a path of ours ends in a file name").to_string_lossy();
        let temporary = path.with_file_name(format!("{TEMPORARY_PREFIX}{name}"));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&temporary);
        let file = Some(BufWriter::with_capacity(1 << 18, file.map_err(Error::io(path))?));
        Ok(Self { path: path.to_owned(), temporary, file })
    }

    /// The open file, all written bytes flushed to the operating system.
    pub(crate) fn flushed(&mut self) -> Result<&File> {
        let file = self.file.as_mut().expect("only commit takes the file");
        file.flush().map_err(Error::io(&self.path))?;
        Ok(file.get_ref())
    }

    /// An error about this file, by the name that the caller knows.
    pub(crate) fn error(&self) -> impl FnOnce(io::Error) -> Error {
        Error::io(&self.path)
    }

    /// Gives the file its final name.
    pub(crate) fn commit(mut self) -> Result<()> {
        self.flushed()?.sync_all().map_err(Error::io(&self.path))?;
        self.file = None;
        fs::rename(&self.temporary, &self.path).map_err(Error::io(&self.path))?;
        sync_folder(folder_of(&self.path))
    }
}

impl Write for DurableFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.as_mut().expect("only commit takes the file").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_mut().expect("only commit takes the file").flush()
    }
}

impl Drop for DurableFile {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // Nothing can be done about a temporary file that will not go; the next run deletes it.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes a whole file at once.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = DurableFile::create(path)?;
    file.write_all(bytes).map_err(file.error())?;
    file.commit()
}

/// The folder that a file is in: the current one for a name alone.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        let mut file = DurableFile::create(&path).unwrap();
        file.write_all(b"half").unwrap();
        drop(file);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        write(&path, b"whole").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_name_alone_is_in_the_current_folder() {
        assert_eq!(folder_of(Path::new("a.png")), Path::new("."));
        assert_eq!(folder_of(Path::new("b/a.png")), Path::new("b"));
    }
}
