//! The rows that are in no part yet, a line each.
//!
//! Each row is written with one call when it is added, so the death of the process loses none.
//! They are flushed to the disk in batches: a power cut loses the last second.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rectiflow_data::{annotation::Annotation, error::Error};

use crate::error::Result;

/// Time between two flushes to the disk.
const FLUSH_EVERY: Duration = Duration::from_secs(1);

/// An open journal with its rows.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    pub(crate) rows: Vec<Annotation>,
    last_flush: Instant,
    is_dirty: bool,
}

impl Journal {
    /// Opens the journal `path`, or begins it. Lines that a death left half written are no rows.
    pub(crate) fn open(path: PathBuf) -> Result<Self> {
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            bytes => bytes.map_err(Error::io(&path))?,
        };
        let mut rows = Vec::new();
        for line in bytes.split(|&byte| byte == b'\n') {
            rows.extend(Annotation::from_line(line).ok());
        }
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(&path)
            .map_err(Error::io(&path))?;
        if bytes.last().is_some_and(|&byte| byte != b'\n') {
            file.write_all(b"\n").map_err(Error::io(&path))?;
        }
        Ok(Self {
            path,
            file,
            rows,
            last_flush: Instant::now(),
            is_dirty: false,
        })
    }

    /// Appends a row.
    pub(crate) fn push(&mut self, row: Annotation) -> Result<()> {
        let mut line = row.to_line();
        line.push('\n');
        let written = self.file.write_all(line.as_bytes());
        written.map_err(Error::io(&self.path))?;
        self.rows.push(row);
        self.is_dirty = true;
        if self.last_flush.elapsed() >= FLUSH_EVERY {
            self.flush()?;
        }
        Ok(())
    }

    /// Flushes the rows to the disk.
    pub(crate) fn flush(&mut self) -> Result<()> {
        if self.is_dirty {
            self.file.sync_data().map_err(Error::io(&self.path))?;
        }
        self.is_dirty = false;
        self.last_flush = Instant::now();
        Ok(())
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use rectiflow_data::{SampleId, annotation::Kind};

    use super::*;

    #[test]
    fn half_a_line_costs_its_row_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("j");
        let row = |id| Annotation::new(SampleId(id), "a\n.png", Kind::Caption, "m");
        let mut journal = Journal::open(path.clone()).unwrap();
        journal.push(row(1)).unwrap();
        journal.push(row(2)).unwrap();
        drop(journal);
        let whole = fs::read(&path).unwrap();
        for len in 0..=whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            let mut journal = Journal::open(path.clone()).unwrap();
            let num_whole = whole[..len].iter().filter(|&&byte| byte == b'\n').count();
            // The last line may lack its end alone.
            let found = journal.rows.len();
            assert!(
                found == num_whole || found == num_whole + 1,
                "{len}: {found}"
            );
            journal.push(row(3)).unwrap();
            let again = Journal::open(path.clone()).unwrap().rows;
            assert_eq!(again.len(), found + 1);
            assert_eq!(again.last(), Some(&row(3)));
        }
    }
}
