//! A table of annotations, Parquet or JSON lines, read row by row.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
};

use crate::{
    error::{Error, Result},
    format::{
        annotation::{Annotation, malformed},
        annotation_rows,
    },
    text_file,
};

/// Longest line of JSON lines.
const MAX_LINE_BYTES: u64 = 4 << 20;

/// Reads a table, Parquet or JSON lines, row by row in its order. Returns the number of rows.
///
/// # Errors
/// [`Error::Malformed`] for what is no table, with the first rule that it breaks; [`Error::Io`];
/// those of `each`.
pub fn read(path: &Path, each: &mut dyn FnMut(Annotation) -> Result<()>) -> Result<u64> {
    let mut file = text_file::open(path)?;
    let mut start = [0; 4];
    let num_read = read_start(&mut file, &mut start).map_err(Error::io(path))?;
    if num_read == 4 && &start == b"PAR1" {
        return annotation_rows::read(path, each);
    }
    read_lines(path, each)
}

fn read_start(file: &mut File, start: &mut [u8; 4]) -> std::io::Result<usize> {
    let mut num_read = 0;
    while num_read < start.len() {
        match file.read(&mut start[num_read..])? {
            0 => break,
            more => num_read += more,
        }
    }
    Ok(num_read)
}

fn read_lines(path: &Path, each: &mut dyn FnMut(Annotation) -> Result<()>) -> Result<u64> {
    let mut reader = BufReader::with_capacity(1 << 18, text_file::open(path)?);
    let mut line = Vec::new();
    let mut num_rows = 0;
    for number in 1_u64.. {
        line.clear();
        let mut limited = (&mut reader).take(MAX_LINE_BYTES);
        let read = limited.read_until(b'\n', &mut line);
        if read.map_err(Error::io(path))? == 0 {
            break;
        }
        let text = line.trim_ascii();
        if text.is_empty() {
            continue;
        }
        let row = Annotation::from_line(text).map_err(|reason| malformed(path, number, &reason))?;
        num_rows += 1;
        each(row)?;
    }
    Ok(num_rows)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::format::annotation::tests::row;

    #[test]
    fn lines_that_break_a_rule_are_refused_by_number() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let good = row().to_line();
        for (bad, reason) in [
            ("{", "EOF"),
            ("[1]", "invalid"),
            (&good.replace("0007", "007"), "sixteen hexadecimal digits"),
            (&good.replace("0007", "+007"), "sixteen hexadecimal digits"),
            (&good.replace("caption", "joke"), "unknown variant"),
            (&good.replace("\"ok\"", "\"fine\""), "unknown variant"),
            (&good.replace("\"seed\"", "\"sead\""), "unknown field"),
            (
                &good.replace("\"seed\":0", "\"tags\":[\"a\"],\"tag_classes\":[]"),
                "1 tags with 0",
            ),
            (
                &good.replace("\"seed\":0", "\"rank\":1.5"),
                "rank 1.5: expected 0 to 1",
            ),
            (
                &good.replace("\"seed\":0", "\"attempt\":-1"),
                "invalid value",
            ),
        ] {
            fs::write(&path, format!("{good}\n\n{bad}\n{good}\n")).unwrap();
            let mut rows = Vec::new();
            let error = read(&path, &mut |row| {
                rows.push(row);
                Ok(())
            });
            let error = error.unwrap_err().to_string();
            assert!(error.contains("row 3: "), "{bad}: {error}");
            assert!(error.contains(reason), "{bad}: {error}");
            assert_eq!(rows, [row()]);
        }
        fs::write(&path, "").unwrap();
        assert_eq!(read(&path, &mut |_| Ok(())).unwrap(), 0);
    }
}
