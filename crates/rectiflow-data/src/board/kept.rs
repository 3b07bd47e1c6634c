//! The rows that have a picture, in a file without a name: texts are read when their picture is,
//! and no text is kept in memory.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use crate::{nameless_file::NamelessFile, posts::fields::Row};

/// The place of a row's JSON. 16 bytes.
#[derive(Debug, Clone, Copy)]
struct Span {
    offset: u64,
    row: u32,
    len: u32,
}

/// Writes rows in the order of their numbers.
#[derive(Debug)]
pub(crate) struct Keeping {
    file: NamelessFile,
    spans: Vec<Span>,
}

/// Rows that can be read.
#[derive(Debug)]
pub(crate) struct Kept {
    file: File,
    spans: Vec<Span>,
}

impl Keeping {
    /// An empty file in `folder`, which is gone when the process ends.
    pub(crate) fn create(folder: &Path) -> io::Result<Self> {
        Ok(Self {
            file: NamelessFile::create(folder)?,
            spans: Vec::new(),
        })
    }

    /// Writes a row, whose number is above that of the last.
    pub(crate) fn push(&mut self, row: u32, values: &Row) -> io::Result<()> {
        let bytes = serde_json::to_vec(values).expect("a map of JSON values is JSON");
        let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let offset = self.file.push(&bytes)?;
        self.spans.push(Span { offset, row, len });
        Ok(())
    }

    /// The error of the first row that could not be written.
    pub(crate) fn failure(&self) -> Option<io::Error> {
        self.file.failure()
    }

    /// Ends the writing.
    pub(crate) fn finish(mut self) -> io::Result<Kept> {
        self.spans.shrink_to_fit();
        Ok(Kept {
            file: self.file.finish()?,
            spans: self.spans,
        })
    }
}

impl Kept {
    /// The values of a row. None if it was not kept.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn read(&self, row: u32) -> io::Result<Option<Row>> {
        let Ok(at) = self.spans.binary_search_by_key(&row, |span| span.row) else {
            return Ok(None);
        };
        let span = self.spans[at];
        let mut bytes = vec![0; span.len as usize];
        self.file.read_exact_at(&mut bytes, span.offset)?;
        let row = serde_json::from_slice(&bytes);
        row.map(Some).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    #[test]
    fn rows_come_back_by_their_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let mut keeping = Keeping::create(folder.path()).unwrap();
        for number in [3, 7, 4_000_000_000] {
            let row = json!({"id": number, "tag_string": "x".repeat(5)});
            keeping.push(number, row.as_object().unwrap()).unwrap();
        }
        let kept = keeping.finish().unwrap();
        assert_eq!(kept.read(7).unwrap().unwrap()["id"], 7);
        assert_eq!(
            kept.read(4_000_000_000).unwrap().unwrap()["id"],
            4_000_000_000_u32
        );
        assert!(kept.read(5).unwrap().is_none());
        let left = fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(left, 0, "the file has no name");
    }
}
