//! Files that appear whole or not at all: written under a temporary name, flushed to the disk,
//! renamed, and the folder flushed too, so that neither kill -9 nor a power cut leaves half a file
//! under a final name.
//!
//! The crate `atomic-write-file` (version 0.3.1) does not fit: its temporary names are random,
//! `.NAME.XXXXXX`, while `docs/format.md` promises `.writing-NAME`. Leftovers of a killed
//! preparation could not be recognised, and each attempt would leave another file of up to 512 MiB.
//! Its unnamed files (`O_TMPFILE`) leave nothing behind, but on network file systems, which lack
//! them, it falls back to those names.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use crate::error::{Error, Result};

/// Prefix of temporary names. A process that holds the folder's lock can delete the leftovers of a
/// killed run.
pub(crate) const TEMPORARY_PREFIX: &str = ".writing-";

/// A file being written. Dropping it without [`DurableFile::commit`] deletes it.
#[derive(Debug)]
pub struct DurableFile {
    path: PathBuf,
    temporary: PathBuf,
    file: Option<BufWriter<File>>,
}

impl DurableFile {
    /// Creates the file that gets the name `path` on commit. Its folder must exist.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: &Path) -> Result<Self> {
        let name = path
            .file_name()
            .expect("the path of a file ends in its name")
            .to_string_lossy();
        let temporary = path.with_file_name(format!("{TEMPORARY_PREFIX}{name}"));
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary);
        let file = Some(BufWriter::with_capacity(
            1 << 18,
            file.map_err(Error::io(path))?,
        ));
        Ok(Self {
            path: path.to_owned(),
            temporary,
            file,
        })
    }

    /// The open file, with all written bytes passed to the operating system.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn flushed(&mut self) -> Result<&File> {
        let file = self.file.as_mut().expect("only commit takes the file");
        file.flush().map_err(Error::io(&self.path))?;
        Ok(file.get_ref())
    }

    /// Returns an [`Error::Io`] about this file under its final name, for `map_err`.
    pub fn error(&self) -> impl FnOnce(io::Error) -> Error {
        Error::io(&self.path)
    }

    /// Flushes the file to the disk and renames it to its final name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn commit(mut self) -> Result<()> {
        self.flushed()?.sync_all().map_err(Error::io(&self.path))?;
        self.file = None;
        fs::rename(&self.temporary, &self.path).map_err(Error::io(&self.path))?;
        sync_folder(folder_of(&self.path))
    }
}

impl Write for DurableFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file
            .as_mut()
            .expect("only commit takes the file")
            .write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file
            .as_mut()
            .expect("only commit takes the file")
            .flush()
    }
}

impl Drop for DurableFile {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // A temporary file that cannot be deleted does no harm: the next run deletes it.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes a whole file at once.
///
/// # Errors
/// [`Error::Io`].
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = DurableFile::create(path)?;
    file.write_all(bytes).map_err(file.error())?;
    file.commit()
}

/// Deletes a file, if it is there.
///
/// # Errors
/// [`Error::Io`].
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    }
}

/// The folder of a file; the current folder for a bare name.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(Error::io(folder))
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
