//! Seeded mutations of captions and tables: each is read, or named in a remark, and the text of
//! images that it is not about stays.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

use checks::mutation::cases;
use parquet::{
    data_type::{ByteArray, ByteArrayType},
    file::{properties::WriterProperties, writer::SerializedFileWriter},
    schema::parser::parse_message_type,
};

use crate::{
    source::{Source, choice::SourceKind},
    text::{
        caption::{Reading, Text, TxtFiles},
        tag_list::TagSeparator,
    },
};

/// Captions and tables of many kinds, each about one image.
fn sources() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let utf16: Vec<u8> = "\u{feff}a blue whale, 12 m"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    let lines = r#"{"file_name": "e.png", "text": "a red fox", "tags": ["fox", "red"], "score": 5}
{"file_name": "./sub//f.png", "prompt": "two \\(small\\) owls", "width": 512}
"#;
    let of_images = r#"{"g.png": {"caption": "a grey heron", "tags": "1bird, heron"}, "x.png": 1}"#;
    let table = "file_name;text;tags\nh.png;\"a house, with \"\"2\"\" doors\";house\n";
    let json = r#"{"caption": "a map of 1905", "exif": {"Orientation": "Rotated 90 CW"}, "n": 3}"#;
    vec![
        (
            "a.png",
            "a.txt",
            b"a cat, 3 years old\nsecond line".to_vec(),
        ),
        ("b.png", "b.caption", utf16),
        (
            "c.png",
            "c.tags",
            b"1girl, solo, (long hair:1.2), \xc3\xa9t\xc3\xa9".to_vec(),
        ),
        ("d.png", "d.json", json.as_bytes().to_vec()),
        ("e.png", "metadata.jsonl", lines.as_bytes().to_vec()),
        ("g.png", "meta_cap.json", of_images.as_bytes().to_vec()),
        ("h.png", "metadata.csv", table.as_bytes().to_vec()),
        ("i.png", "metadata.parquet", parquet()),
    ]
}

fn parquet() -> Vec<u8> {
    let schema = "message m { optional binary file_name (UTF8); optional binary text (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().build());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for values in [["i.png", "j.png"], ["an ice floe", "a jar"]] {
        let mut column = group.next_column().unwrap().unwrap();
        let typed = column.typed::<ByteArrayType>();
        typed
            .write_batch(&values.map(ByteArray::from), Some(&[1, 1]), None)
            .unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.into_inner().unwrap()
}

/// The text of each image.
fn read(folder: &Path, out: &Path) -> BTreeMap<String, Option<Text>> {
    let reading = Reading {
        quality_words: Vec::new(),
        txt_files: TxtFiles::Auto,
        caption_lines: false,
        tag_separator: TagSeparator::Comma,
        keep_escapes: false,
    };
    let source = Source::list(folder, out, SourceKind::Folder, reading).unwrap();
    let mut found = BTreeMap::new();
    for file in &source.samples {
        found.insert(file.path.clone(), source.text(file).text);
        source.missing_text(file);
    }
    found
}

#[test]
fn mutated_captions_and_tables_are_read_or_named() {
    let folder = tempfile::tempdir().unwrap();
    let out = tempfile::tempdir().unwrap();
    let sources = sources();
    fs::create_dir(folder.path().join("sub")).unwrap();
    for image in ["a", "b", "c", "d", "e", "sub/f", "g", "h", "i", "j"] {
        fs::write(folder.path().join(format!("{image}.png")), "").unwrap();
    }
    for (_, name, bytes) in &sources {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    let expected = read(folder.path(), out.path());
    assert!(expected.values().all(Option::is_some), "{expected:?}");
    for case in cases() {
        let mut random = case.random();
        let (image, name, good) = random.of(&sources);
        let bad = case.mutation.of(good, &mut random);
        fs::write(folder.path().join(name), &bad).unwrap();
        case.run(name, || {
            let found = read(folder.path(), out.path());
            if name.starts_with(&image[..2]) {
                // A file beside an image is about no other.
                for (other, text) in &expected {
                    assert!(other == image || found[other] == *text, "{other}");
                }
            }
        });
        fs::write(folder.path().join(name), good).unwrap();
    }
}
