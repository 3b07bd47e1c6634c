//! A file without a name, which is gone when the process ends: for what is too much for the memory.
//!
//! A write that fails, on a full disk, fails for good: later ones would be at wrong places.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
};

/// A file that is written from its start.
#[derive(Debug)]
pub(crate) struct NamelessFile {
    file: BufWriter<File>,
    len: u64,
    /// The first write that failed.
    failure: Option<(io::ErrorKind, Option<i32>)>,
}

impl NamelessFile {
    /// An empty file in `folder`, which is created.
    pub(crate) fn create(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        Ok(Self::over(tempfile::tempfile_in(folder)?))
    }

    fn over(file: File) -> Self {
        Self {
            file: BufWriter::with_capacity(1 << 18, file),
            len: 0,
            failure: None,
        }
    }

    /// Appends bytes. Returns the place of the first.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> io::Result<u64> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        if let Err(error) = self.file.write_all(bytes) {
            self.failure = Some((error.kind(), error.raw_os_error()));
            return Err(error);
        }
        let start = self.len;
        self.len += bytes.len() as u64;
        Ok(start)
    }

    /// The error of the first write that failed.
    pub(crate) fn failure(&self) -> Option<io::Error> {
        self.failure.map(|(kind, code)| match code {
            Some(code) => io::Error::from_raw_os_error(code),
            None => io::Error::from(kind),
        })
    }

    /// The file with everything that was pushed.
    ///
    /// # Errors
    /// Also that of a write that failed before.
    pub(crate) fn finish(self) -> io::Result<File> {
        match self.failure() {
            Some(error) => Err(error),
            None => self
                .file
                .into_inner()
                .map_err(io::IntoInnerError::into_error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_is_pushed_is_at_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let below = folder.path().join("below");
        let mut file = NamelessFile::create(&below).unwrap();
        assert_eq!(file.push(b"first").unwrap(), 0);
        assert_eq!(file.push(b"second").unwrap(), 5);
        let file = file.finish().unwrap();
        let mut bytes = [0; 6];
        file.read_exact_at(&mut bytes, 5).unwrap();
        assert_eq!(&bytes, b"second");
        assert_eq!(fs::read_dir(below).unwrap().count(), 0);
    }

    #[test]
    fn a_full_disk_is_not_forgotten() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut file = NamelessFile::over(full);
        let long = vec![0; 1 << 20];
        for _ in 0..2 {
            let error = file.push(&long).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        }
        assert_eq!(
            file.push(b"x").unwrap_err().kind(),
            io::ErrorKind::StorageFull
        );
        assert_eq!(
            file.finish().unwrap_err().kind(),
            io::ErrorKind::StorageFull
        );
    }
}
