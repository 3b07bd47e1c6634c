//! Posts of image boards in tables of any format: columns, and rows from the first to the last.
//!
//! A table is read twice, keys first and texts later, so each reader takes the columns that are
//! needed, and returns rows in the same order each time.

mod csv_posts;
pub(crate) mod fields;
mod json_posts;
mod parquet_posts;
pub(crate) mod rows;
pub(crate) mod size;
mod sqlite_posts;
pub mod values;

use std::{io, path::Path};

use crate::{
    filter::columns::Columns,
    posts::{rows::Rows, sqlite_posts::SQLITE_MAGIC},
    text_file,
};

/// The first bytes of a Parquet file.
const PARQUET_MAGIC: &[u8] = b"PAR1";

/// The format of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Parquet,
    Sqlite,
    JsonLines,
    Csv,
}

impl Format {
    /// The format of a file, by its first bytes. None if it is none of these.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn of(path: &Path) -> io::Result<Option<Self>> {
        let file = text_file::open_regular(path)?;
        let start = text_file::start(&file)?;
        let first = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&start);
        Ok(if start.starts_with(PARQUET_MAGIC) {
            Some(Self::Parquet)
        } else if start.starts_with(SQLITE_MAGIC) {
            Some(Self::Sqlite)
        } else if first.trim_ascii_start().starts_with(b"{") {
            Some(Self::JsonLines)
        } else if csv_posts::begins_so(&start) {
            Some(Self::Csv)
        } else {
            None
        })
    }

    /// The columns of a table. Of JSON lines only those of the first lines; of CSV
    /// the kinds of the first rows.
    ///
    /// # Errors
    /// Why it cannot be read.
    pub(crate) fn columns(self, path: &Path) -> Result<Columns, String> {
        match self {
            Self::Parquet => parquet_posts::columns(path),
            Self::Sqlite => sqlite_posts::columns(path),
            Self::JsonLines => json_posts::columns(path),
            Self::Csv => csv_posts::columns(path),
        }
    }

    /// Reads the columns `wanted`, in small letters, of every row. JSON lines have all columns.
    ///
    /// # Errors
    /// Why it, or the rest of it, cannot be read.
    pub(crate) fn read(
        self,
        path: &Path,
        wanted: &[String],
        rows: &mut dyn Rows,
    ) -> Result<(), String> {
        match self {
            Self::Parquet => parquet_posts::read(path, wanted, rows),
            Self::Sqlite => sqlite_posts::read(path, wanted, rows),
            Self::JsonLines => json_posts::read(path, rows),
            Self::Csv => csv_posts::read(path, wanted, rows),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_format_is_told_by_its_first_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        for (bytes, format) in [
            (&b"PAR1..."[..], Some(Format::Parquet)),
            (b"SQLite format 3\0...", Some(Format::Sqlite)),
            (b"\xef\xbb\xbf \n{\"id\": 1}", Some(Format::JsonLines)),
            (b"[1]", None),
            (b"id,md5\n", Some(Format::Csv)),
            (b"name,text\n", None),
            (b"", None),
        ] {
            fs::write(&path, bytes).unwrap();
            assert_eq!(Format::of(&path).unwrap(), format, "{bytes:?}");
        }
        assert!(Format::of(folder.path()).is_err());
        assert!(Format::of(&folder.path().join("gone")).is_err());
    }
}
