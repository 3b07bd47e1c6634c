//! Tables to one table: of rows with the same picture, kind and mode the last one stays.

use std::{
    collections::HashMap,
    io::Write,
    path::{Path, PathBuf},
};

use rectiflow_data::{
    annotation::Annotation, annotation_rows::AnnotationWriter, annotation_table,
    durable::DurableFile,
};

use crate::{error::Result, table::known::key_of};

/// The rows to merge, in order.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) files: &'a [PathBuf],
    pub(crate) rows: &'a [Annotation],
}

impl Parts<'_> {
    /// Calls `each` with every row and its number.
    fn read(&self, each: &mut dyn FnMut(u64, Annotation) -> std::io::Result<()>) -> Result<()> {
        let mut number = 0;
        for path in self.files {
            annotation_table::read(path, &mut |row| {
                number += 1;
                each(number, row).map_err(rectiflow_data::Error::io(path))
            })?;
        }
        for row in self.rows {
            number += 1;
            each(number, row.clone()).map_err(rectiflow_data::Error::io("journal"))?;
        }
        Ok(())
    }

    /// Writes the rows that stay to `out`, as JSON lines to `lines` too. Returns their number.
    pub(crate) fn write(
        &self,
        out: &Path,
        lines: Option<&Path>,
        about: &[(&str, &str)],
    ) -> Result<u64> {
        let mut last = HashMap::new();
        self.read(&mut |number, row| {
            last.insert(key_of(&row), number);
            Ok(())
        })?;
        let mut table = AnnotationWriter::new(DurableFile::create(out)?, about)
            .map_err(rectiflow_data::Error::io(out))?;
        let mut lines = lines.map(DurableFile::create).transpose()?;
        self.read(&mut |number, row| {
            if last.get(&key_of(&row)) != Some(&number) {
                return Ok(());
            }
            if let Some(lines) = &mut lines {
                writeln!(lines, "{}", row.to_line())?;
            }
            table.push(row)
        })?;
        let file = table.finish().map_err(rectiflow_data::Error::io(out))?;
        if let Some(lines) = lines {
            lines.commit()?;
        }
        file.commit()?;
        Ok(last.len() as u64)
    }
}
