//! Tables of metadata: each row an object about one image, whatever the format of the table.
//!
//! Rows of JSON lines stay where they are. Rows of other formats are written to a file as JSON, so
//! that all rows are read in one way, and no text is kept in memory.

use std::{
    cell::Cell,
    fmt,
    fs::File,
    io::{BufRead, BufReader, Cursor, Read},
    os::unix::fs::FileExt,
    path::Path,
};

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value, json};

use crate::{
    reject::{Fault, Reason},
    source::{
        names::TableKind,
        parquet_rows,
        rows::{Contents, Row, Rows, Span, image_of, unreadable, without_images},
    },
    text::{
        caption::MAX_SOURCE_BYTES,
        encoding::{decoded, is_utf16, without_mark},
        keys,
        separated::{Rationed, delimiter},
    },
    text_file,
};

/// Largest size of a UTF-16 table in bytes: it is decoded in memory.
const MAX_UTF16_BYTES: u64 = 1 << 30;
/// Largest size of a JSON document in bytes: an entry of it is parsed in memory.
const MAX_DOCUMENT_BYTES: u64 = 1 << 30;

/// Reads the table at `path` on this machine, and what it has into `contents`.
///
/// # Errors
/// Why it, or the rest of it, cannot be read.
pub(crate) fn read(
    kind: TableKind,
    path: &Path,
    rows: &mut Rows<'_>,
    contents: &mut Contents,
) -> Result<(), Fault> {
    let file = text_file::open_regular(path).map_err(unreadable)?;
    match kind {
        TableKind::JsonLines if is_list(&file).map_err(unreadable)? => {
            json_document(file, rows, contents)
        }
        TableKind::JsonLines => json_lines(file, rows, contents),
        TableKind::Csv => csv_rows(file, rows),
        TableKind::Parquet => parquet_rows::read(file, rows),
        TableKind::Json => json_document(file, rows, contents),
    }
}

/// Whether a file begins as a JSON list does: some name one as if it had JSON lines.
fn is_list(file: &File) -> std::io::Result<bool> {
    let mut start = [0; 64];
    let num_read = file.read_at(&mut start, 0)?;
    Ok(without_mark(&start[..num_read])
        .trim_ascii_start()
        .starts_with(b"["))
}

/// The text of a file that is UTF-16. None, and the file as before, if it is not.
fn utf16_text(file: &mut File) -> Result<Option<String>, Fault> {
    let mut start = Vec::new();
    file.take(2).read_to_end(&mut start).map_err(unreadable)?;
    let mut bytes = start;
    if is_utf16(&bytes) {
        file.take(MAX_UTF16_BYTES)
            .read_to_end(&mut bytes)
            .map_err(unreadable)?;
        let text = decoded(&bytes).map_err(|detail| Fault::new(Reason::BadCaption, detail))?;
        return Ok(Some(text.into_owned()));
    }
    std::io::Seek::rewind(file).map_err(unreadable)?;
    Ok(None)
}

/// Reads a JSON object a line. Blank lines are no rows.
fn json_lines(mut file: File, rows: &mut Rows<'_>, contents: &mut Contents) -> Result<(), Fault> {
    if let Some(text) = utf16_text(&mut file)? {
        for (number, line) in (1..).zip(text.lines()) {
            if !line.trim().is_empty() {
                let object = serde_json::from_str(line).unwrap_or_default();
                rows.push(number, &object)?;
            }
        }
        return Ok(());
    }
    contents.own_file = Some(file.try_clone().map_err(unreadable)?);
    let mut reader = BufReader::new(file);
    let mut offset = 0;
    for number in 1.. {
        // A line without an end would fill the memory.
        let mut bytes = Vec::new();
        let mut line = (&mut reader).take(MAX_SOURCE_BYTES + 1);
        let len = line.read_until(b'\n', &mut bytes).map_err(unreadable)? as u64;
        if len == 0 {
            break;
        }
        if len > MAX_SOURCE_BYTES {
            let detail = format!(
                "line {number} is longer than {MAX_SOURCE_BYTES} bytes: the rest is ignored"
            );
            return Err(Fault::new(Reason::BadCaption, detail));
        }
        let line = without_mark(&bytes);
        if !line.trim_ascii().is_empty() {
            let object = serde_json::from_slice::<Map<String, Value>>(line);
            let image = object.map_err(|error| error.to_string());
            (rows.take)(Row {
                number,
                span: Span {
                    offset,
                    len: len as u32,
                },
                image: image.and_then(|object| image_of(&object)),
            });
        }
        offset += len;
    }
    Ok(())
}

/// Reads values with a line of names above them.
fn csv_rows(mut file: File, rows: &mut Rows<'_>) -> Result<(), Fault> {
    let mut source: Box<dyn BufRead> = match utf16_text(&mut file)? {
        Some(text) => Box::new(Cursor::new(text.into_bytes())),
        None => Box::new(BufReader::new(file)),
    };
    let start = source.fill_buf().map_err(unreadable)?;
    let separator = delimiter(start);
    let left = Cell::new(MAX_SOURCE_BYTES);
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(separator)
        .flexible(true)
        .from_reader(Rationed {
            source,
            left: &left,
        });
    let bad = |error: csv::Error| Fault::new(Reason::BadCaption, error.to_string());
    let mut names = Vec::new();
    for name in reader.byte_headers().map_err(bad)? {
        let name = cell(without_mark(name));
        names.push(name.map_err(|detail| Fault::new(Reason::BadCaption, detail))?);
    }
    if !names.iter().any(|name| keys::is_file_key(name)) {
        return Err(without_images(names.iter().map(String::as_str)));
    }
    let mut record = csv::ByteRecord::new();
    loop {
        left.set(MAX_SOURCE_BYTES);
        if !reader.read_byte_record(&mut record).map_err(bad)? {
            break;
        }
        let line = record.position().map_or(0, csv::Position::line);
        let mut object = Map::new();
        let mut image = None;
        for (name, value) in names.iter().zip(&record) {
            match cell(value) {
                Ok(text) if text.is_empty() => {}
                Ok(text) => {
                    object.insert(name.clone(), cell_value(&text));
                }
                Err(detail) => image = Some(Err(detail)),
            }
        }
        let image = image.unwrap_or_else(|| image_of(&object));
        rows.push_about(line, &object, image)?;
    }
    Ok(())
}

/// The text of a cell.
fn cell(bytes: &[u8]) -> Result<String, String> {
    decoded(bytes).map(|text| text.trim().to_owned())
}

/// The value of a cell: a list if it is written as one in JSON, else its text.
fn cell_value(text: &str) -> Value {
    match serde_json::from_str::<Vec<String>>(text) {
        Ok(list) => list.into(),
        Err(_) => text.into(),
    }
}

/// Reads an object with an entry for each image, as kohya's scripts write it, or a list of objects.
fn json_document(
    mut file: File,
    rows: &mut Rows<'_>,
    contents: &mut Contents,
) -> Result<(), Fault> {
    let len = file.metadata().map_err(unreadable)?.len();
    if len > MAX_DOCUMENT_BYTES {
        let detail = format!(
            "{len} bytes; a JSON document of at most {MAX_DOCUMENT_BYTES} bytes is read: write it \
             as JSON lines"
        );
        return Err(Fault::new(Reason::UnreadKind, detail));
    }
    let entries = Entries { rows, contents };
    let bad = |error: serde_json::Error| Fault::new(Reason::BadCaption, error.to_string());
    if let Some(text) = utf16_text(&mut file)? {
        let mut json = serde_json::Deserializer::from_str(&text);
        entries.deserialize(&mut json).map_err(bad)
    } else {
        let mut reader = BufReader::new(file);
        let start = reader.fill_buf().map_err(unreadable)?;
        let mark_len = start.len() - without_mark(start).len();
        reader.consume(mark_len);
        let mut json = serde_json::Deserializer::from_reader(reader);
        entries.deserialize(&mut json).map_err(bad)
    }
}

/// Passes the entries of a document on one by one: it can be larger than the memory.
struct Entries<'a, 'b> {
    rows: &'a mut Rows<'b>,
    contents: &'a mut Contents,
}

impl<'de> DeserializeSeed<'de> for Entries<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or a list")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut number = 0;
        while let Some((name, value)) = map.next_entry::<String, Value>()? {
            number += 1;
            self.contents.is_of_one_image |= keys::is_text_key(&name);
            if let Some(object) = object_of(value) {
                let pushed = self.rows.push_about(number, &object, Ok(name));
                pushed.map_err(|fault| serde::de::Error::custom(fault.detail))?;
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut number = 0;
        while let Some(value) = list.next_element::<Value>()? {
            number += 1;
            if let Value::Object(object) = value
                && keys::file_name(&object).is_some()
            {
                let pushed = self.rows.push(number, &object);
                pushed.map_err(|fault| serde::de::Error::custom(fault.detail))?;
            }
        }
        Ok(())
    }
}

/// The object of an entry: a caption, a list of captions, or an object. None for another value.
fn object_of(value: Value) -> Option<Map<String, Value>> {
    let value = match value {
        Value::String(caption) => json!({ "caption": caption }),
        Value::Array(captions) if captions.iter().all(Value::is_string) => {
            json!({ "captions": captions })
        }
        value => value,
    };
    match value {
        Value::Object(object) => Some(object),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::source::rows::RowFile;

    /// The images and texts of the table `bytes`.
    fn table(kind: TableKind, bytes: &[u8]) -> Result<Vec<(String, String)>, Fault> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        fs::write(&path, bytes).unwrap();
        let mut file = RowFile::create(folder.path()).unwrap();
        let mut found = Vec::new();
        let mut take = |row: Row| found.push(row);
        let mut contents = Contents::default();
        let mut rows = Rows {
            file: &mut file,
            take: &mut take,
        };
        read(kind, &path, &mut rows, &mut contents)?;
        let file = contents.own_file.unwrap_or(file.finish().unwrap());
        let mut rows = Vec::new();
        for row in found {
            let mut json = vec![0; row.span.len as usize];
            file.read_exact_at(&mut json, row.span.offset).unwrap();
            let described = keys::read(&json, &crate::text::caption::Reading::default());
            let text = described.map_or_else(|error| error, |read| read.text.captions.join("|"));
            rows.push((row.image.unwrap_or_else(|error| error), text));
        }
        Ok(rows)
    }

    fn utf16(text: &str) -> Vec<u8> {
        let mut bytes = vec![0xff, 0xfe];
        bytes.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
        bytes
    }

    fn fox() -> Vec<(String, String)> {
        vec![("a.png".to_owned(), "a red fox".to_owned())]
    }

    #[test]
    fn tables_of_every_format_say_the_same() {
        let lines = "{\"file_name\": \"a.png\", \"text\": \"a red fox\"}\r\n\n";
        let csv = "file_name,text\na.png,a red fox\n";
        let map = r#"{"a.png": {"caption": "a red fox"}}"#;
        for (kind, bytes) in [
            (TableKind::JsonLines, lines.into()),
            (
                TableKind::JsonLines,
                format!("\u{feff}{lines}").into_bytes(),
            ),
            (TableKind::JsonLines, utf16(lines)),
            (TableKind::Csv, csv.into()),
            (TableKind::Csv, format!("\u{feff}{csv}").into_bytes()),
            (TableKind::Csv, utf16(csv)),
            (
                TableKind::Csv,
                b"text;File_Name\r\n\"a red fox\";a.png\r\n".to_vec(),
            ),
            (TableKind::Csv, b"image\tcaption\na.png\ta red fox".to_vec()),
            (
                TableKind::Csv,
                b"file_name,captions\na.png,\"[\"\"a red fox\"\"]\"\n".to_vec(),
            ),
            (TableKind::Json, map.into()),
            (TableKind::Json, format!("\u{feff}{map}").into_bytes()),
            (TableKind::Json, utf16(map)),
            (
                TableKind::Json,
                br#"{"a.png": "a red fox", "n": 3}"#.to_vec(),
            ),
            (TableKind::Json, br#"{"a.png": ["a red fox"]}"#.to_vec()),
            (
                TableKind::Json,
                br#"[{"path": "a.png", "prompt": "a red fox"}, 3, {}]"#.to_vec(),
            ),
        ] {
            let shown = String::from_utf8_lossy(&bytes).into_owned();
            assert_eq!(table(kind, &bytes).unwrap(), fox(), "{kind:?} {shown}");
        }
    }

    #[test]
    fn values_can_have_commas_quotes_and_lines() {
        let csv = b"file_name,text\na.png,\"a fox, \"\"red\"\"\nin snow\"\nb.png,\nc.png\n";
        let expected = [
            ("a.png", "a fox, \"red\"\nin snow"),
            ("b.png", ""),
            ("c.png", ""),
        ];
        let expected = expected.map(|(name, text)| (name.to_owned(), text.to_owned()));
        assert_eq!(table(TableKind::Csv, csv).unwrap(), expected);
    }

    #[test]
    fn what_is_no_table_says_so() {
        for (kind, bytes, reason, part) in [
            (
                TableKind::Csv,
                &b"url,caption\nu,c\n"[..],
                Reason::UnreadKind,
                "url, caption",
            ),
            (
                TableKind::Csv,
                b"",
                Reason::UnreadKind,
                "no table of captions",
            ),
            (TableKind::Json, b"{", Reason::BadCaption, "EOF"),
            (
                TableKind::Json,
                b"3",
                Reason::BadCaption,
                "an object or a list",
            ),
            (
                TableKind::Parquet,
                b"PAR1PAR1",
                Reason::BadCaption,
                "Parquet",
            ),
            (TableKind::Parquet, b"", Reason::BadCaption, "Parquet"),
        ] {
            let fault = table(kind, bytes).unwrap_err();
            assert_eq!(fault.reason, reason, "{kind:?}");
            assert!(fault.detail.contains(part), "{}", fault.detail);
        }
        let rows = table(TableKind::JsonLines, b"not json\n{\"text\": \"a\"}\n[]\n").unwrap();
        let parts = ["expected ident", "it names no image", "invalid type"];
        for ((image, _), part) in rows.iter().zip(parts) {
            assert!(image.contains(part), "{image}");
        }
        assert_eq!(rows.len(), 3);
    }
}
