//! Rows of tables: each an object about one image. Rows that are not JSON lines are written to a
//! nameless file as JSON.

use std::{fmt, fs::File, os::unix::fs::FileExt, path::Path};

use serde_json::{Map, Value};

use crate::{
    nameless_file::NamelessFile,
    reject::{Fault, Reason},
    text::{caption::MAX_SOURCE_BYTES, keys},
};

/// The place of a row's JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

/// A row of a table.
#[derive(Debug)]
pub(crate) struct Row {
    /// The line, or the number of the row, from 1.
    pub(crate) number: u64,
    pub(crate) span: Span,
    /// The path of the image as it is written, or why there is none.
    pub(crate) image: std::result::Result<String, String>,
}

/// What a table has.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// The file with the JSON of its rows, if it is not the file of all tables.
    pub(crate) own_file: Option<File>,
    /// It is about one image: it has keys of text itself.
    pub(crate) is_of_one_image: bool,
}

/// The JSON of rows, in a file without a name.
#[derive(Debug)]
pub(crate) struct RowFile(NamelessFile);

impl RowFile {
    /// A file in `folder`, which is gone when the process ends.
    pub(crate) fn create(folder: &Path) -> std::io::Result<Self> {
        NamelessFile::create(folder).map(Self)
    }

    /// Appends a row. Returns its place.
    pub(crate) fn push(&mut self, row: &Map<String, Value>) -> std::io::Result<Span> {
        let bytes = serde_json::to_vec(row).expect("a map of JSON values is JSON");
        Ok(Span {
            offset: self.0.push(&bytes)?,
            len: bytes.len() as u32,
        })
    }

    /// The file with all rows.
    ///
    /// # Errors
    /// Also that of a row that could not be written: its table was not to blame.
    pub(crate) fn finish(self) -> std::io::Result<File> {
        self.0.finish()
    }
}

/// Reads the JSON of a row.
pub(crate) fn read_span(file: &File, span: Span) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; span.len as usize];
    file.read_exact_at(&mut bytes, span.offset)
        .map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// Takes the rows of a table.
pub(crate) struct Rows<'a> {
    pub(crate) file: &'a mut RowFile,
    pub(crate) take: &'a mut dyn FnMut(Row),
}

impl fmt::Debug for Rows<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rows").finish_non_exhaustive()
    }
}

impl Rows<'_> {
    /// Takes the object of a row, which names its image itself.
    pub(crate) fn push(&mut self, number: u64, object: &Map<String, Value>) -> Result<(), Fault> {
        self.push_about(number, object, image_of(object))
    }

    /// Takes the object of a row about `image`.
    pub(crate) fn push_about(
        &mut self,
        number: u64,
        object: &Map<String, Value>,
        image: Result<String, String>,
    ) -> Result<(), Fault> {
        let span = self.file.push(object).map_err(unreadable)?;
        let is_long = u64::from(span.len) > MAX_SOURCE_BYTES;
        (self.take)(Row {
            number,
            span,
            image: if is_long {
                Err(format!("it is longer than {MAX_SOURCE_BYTES} bytes"))
            } else {
                image
            },
        });
        Ok(())
    }
}

pub(crate) fn unreadable(error: std::io::Error) -> Fault {
    Fault::new(Reason::Unreadable, error.to_string())
}

/// The fault of a table without a column that names images.
pub(crate) fn without_images<'a>(columns: impl Iterator<Item = &'a str>) -> Fault {
    let columns: Vec<&str> = columns.take(20).collect();
    let detail = format!(
        "it is no table of captions: none of its columns names files ({}); its columns: {}",
        keys::FILE_KEYS.join(", "),
        columns.join(", ")
    );
    Fault::new(Reason::UnreadKind, detail)
}

/// The image that a row names.
pub(crate) fn image_of(object: &Map<String, Value>) -> Result<String, String> {
    let name = keys::file_name(object).map(str::to_owned);
    name.ok_or_else(|| "it names no image: it has no key file_name with text".to_owned())
}
