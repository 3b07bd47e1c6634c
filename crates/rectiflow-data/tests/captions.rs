//! What a preparation reads as captions, tags and metadata, by kind: each test has several inputs
//! of a kind, of the tools that write them.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod small_preparation;

use std::{
    collections::BTreeMap, fs, io::Cursor, os::unix::fs::symlink, path::Path, process::Command,
    sync::Arc,
};

use image::{ImageFormat, Rgb, RgbImage};
use parquet::{
    basic::{Compression, ZstdLevel},
    data_type::{ByteArray, ByteArrayType},
    file::{properties::WriterProperties, writer::SerializedFileWriter},
    schema::parser::parse_message_type,
};
use rectiflow_data::{
    Dataset, PrepSettings, PrepSummary, Record, RgbBatch, Split, caption::TxtFiles, prepare,
    reject::Reason, tag_list::TagSeparator,
};
use serde_json::Value;
use small_preparation::{codec, settings, zeros};
use tempfile::TempDir;

/// A folder of files and the data set that a preparation makes of it.
struct Prepared {
    folder: TempDir,
    out: TempDir,
    summary: PrepSummary,
}

impl Prepared {
    /// Prepares `files`. Each image is as large as its place among the files is late.
    fn of(files: &[(&str, &[u8])], settings: &PrepSettings) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            write(folder.path(), name, bytes);
        }
        Self::in_folder(folder, settings)
    }

    fn in_folder(folder: TempDir, settings: &PrepSettings) -> Self {
        let out = tempfile::tempdir().unwrap();
        let mut encode = |batch: &RgbBatch| Ok(zeros(batch));
        let summary = prepare(
            folder.path(),
            out.path(),
            settings,
            &codec(),
            &mut encode,
            &mut |_| {},
        );
        Self {
            summary: summary.unwrap(),
            folder,
            out,
        }
    }

    fn records(&self) -> BTreeMap<String, Record> {
        let dataset = Dataset::open(self.out.path()).unwrap();
        let mut records = BTreeMap::new();
        for shape in dataset.buckets(Split::Train) {
            for record in dataset.records(Split::Train, shape.bucket).unwrap() {
                records.insert(record.source.clone(), record);
            }
        }
        records
    }

    /// The captions and tags of the only image.
    fn only(&self) -> (Vec<String>, Vec<String>) {
        let records: Vec<Record> = self.records().into_values().collect();
        let [record] = &records[..] else {
            panic!(
                "expected one image, found {}: {}",
                records.len(),
                self.list("rejected")
            );
        };
        (record.captions.clone(), record.tags.clone())
    }

    fn list(&self, name: &str) -> String {
        fs::read_to_string(self.out.path().join(format!("{name}.jsonl"))).unwrap()
    }

    /// Path, reason and detail of each remark of a list.
    fn remarks(&self, name: &str) -> Vec<(String, String, String)> {
        let mut remarks = Vec::new();
        for line in self.list(name).lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            let text = |key: &str| line[key].as_str().unwrap().to_owned();
            remarks.push((text("path"), text("reason"), text("detail")));
        }
        remarks
    }

    fn has_no_remark(&self) -> bool {
        self.list("rejected").is_empty() && self.list("notes").is_empty()
    }
}

/// Writes a file; the bytes `IMAGE` stand for an image, each other than the last.
fn write(folder: &Path, name: &str, bytes: &[u8]) {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    if bytes == IMAGE {
        fs::write(path, image(name, ImageFormat::Png)).unwrap();
    } else {
        fs::write(path, bytes).unwrap();
    }
}

const IMAGE: &[u8] = b"an image";

/// An image whose bytes follow from its name.
fn image(name: &str, format: ImageFormat) -> Vec<u8> {
    let hash = blake3::hash(name.as_bytes());
    let picture = RgbImage::from_fn(64, 64, |x, y| {
        Rgb([hash.as_bytes()[(x / 8 + y) as usize % 32], x as u8, y as u8])
    });
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

fn utf16(text: &str) -> Vec<u8> {
    let mut bytes = vec![0xff, 0xfe];
    bytes.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
    bytes
}

/// A Parquet file with text columns of one row.
fn parquet(columns: &[(&str, &str)], compression: Compression) -> Vec<u8> {
    let mut message = "message schema {".to_owned();
    for (name, _) in columns {
        message += &format!(" OPTIONAL BYTE_ARRAY {name} (STRING);");
    }
    let schema = parse_message_type(&format!("{message} }}")).unwrap();
    let properties = WriterProperties::builder().set_compression(compression);
    let properties = Arc::new(properties.build());
    let mut writer = SerializedFileWriter::new(Vec::new(), Arc::new(schema), properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for (_, value) in columns {
        let mut column = group.next_column().unwrap().unwrap();
        let values = [ByteArray::from(*value)];
        let typed = column.typed::<ByteArrayType>();
        typed.write_batch(&values, Some(&[1]), None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.into_inner().unwrap()
}

#[test]
fn keys_of_captions() {
    for (object, captions, tags) in [
        (
            r#"{"file_name": "a.png", "text": "a red fox"}"#,
            vec!["a red fox"],
            vec![],
        ),
        (
            r#"{"file_name": "a.png", "prompt": "a red fox"}"#,
            vec!["a red fox"],
            vec![],
        ),
        (
            r#"{"file_name": "a.png", "TEXT": "a red fox"}"#,
            vec!["a red fox"],
            vec![],
        ),
        (
            r#"{"image_path": "a.png", "caption": "a red fox"}"#,
            vec!["a red fox"],
            vec![],
        ),
        (
            r#"{"path": "a.png", "text": ["x", "y"]}"#,
            vec!["x", "y"],
            vec![],
        ),
        (
            r#"{"image": "a.png", "tag_string": "1girl long_hair"}"#,
            vec![],
            vec!["1girl", "long_hair"],
        ),
        (
            r#"{"filename": "a.png", "caption": "c", "tags_general": ["1girl"]}"#,
            vec!["c"],
            vec!["1girl"],
        ),
    ] {
        let files = [("a.png", IMAGE), ("metadata.jsonl", object.as_bytes())];
        let prepared = Prepared::of(&files, &settings());
        assert_eq!(
            prepared.only(),
            (strings(&captions), strings(&tags)),
            "{object}"
        );
        assert!(prepared.has_no_remark(), "{object}");
    }
}

#[test]
fn keys_that_are_not_read_are_named_once_with_their_count() {
    let files: [(&str, &[u8]); 6] = [
        ("a.png", IMAGE),
        ("b.png", IMAGE),
        ("c.png", IMAGE),
        (
            "a.json",
            br#"{"caption": "a", "artist": "x", "score": 3, "title": "t"}"#,
        ),
        ("b.json", br#"{"caption": "b", "artist": "y", "title": ""}"#),
        ("c.json", br#"{"caption": "c", "url": "u", "width": 3}"#),
    ];
    let prepared = Prepared::of(&files, &settings());
    let notes = prepared.remarks("notes");
    let named: Vec<(&str, bool)> = notes
        .iter()
        .map(|(path, _, detail)| (path.as_str(), detail.contains("\"artist\"")))
        .collect();
    assert_eq!(named, [("a.png", true), ("a.png", false)], "{notes:?}");
    assert!(
        notes[0].2.contains("2 pictures have it") && notes[1].2.contains("1 picture has it"),
        "{notes:?}"
    );
    assert_eq!(prepared.summary.notes[&Reason::UnreadKey], 2);

    // A source with nothing but such keys says which.
    let files: [(&str, &[u8]); 2] = [("a.png", IMAGE), ("a.json", br#"{"legend": "a fox"}"#)];
    let rejected = Prepared::of(&files, &settings()).remarks("rejected");
    assert!(rejected[0].2.contains("legend"), "{rejected:?}");
}

#[test]
fn spellings_of_a_path() {
    for named in [
        "sub/b.png",
        "./sub//b.png",
        "sub/../sub/b.png",
        "sub\\\\b.png",
        ".\\\\sub\\\\b.png",
        "SUB/b.PNG",
        "sub/b",
        "ROOT/sub/b.png",
        "ROOT//sub/./b.png",
        "file://ROOT/sub/b.png",
    ] {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "sub/b.png", IMAGE);
        let named = named.replace("ROOT", folder.path().to_str().unwrap());
        let line = format!(r#"{{"file_name": "{named}", "text": "a red fox"}}"#);
        write(folder.path(), "metadata.jsonl", line.as_bytes());
        let prepared = Prepared::in_folder(folder, &settings());
        assert_eq!(prepared.only().0, ["a red fox"], "{named}");
        assert!(prepared.has_no_remark(), "{named}");
    }
    for (named, reason) in [
        ("../b.png", "bad_caption"),
        ("/somewhere/b.png", "bad_caption"),
        ("C:\\\\set\\\\b.png", "orphan_caption"),
        ("b.png", "orphan_caption"),
        ("", "orphan_caption"),
    ] {
        let line = format!(r#"{{"file_name": "{named}", "text": "a red fox"}}"#);
        let files = [("sub/b.png", IMAGE), ("metadata.jsonl", line.as_bytes())];
        let rejected = Prepared::of(&files, &settings()).remarks("rejected");
        assert_eq!(rejected[0].0, "metadata.jsonl:1", "{named}");
        assert_eq!(rejected[0].1, reason, "{named}");
    }
}

#[test]
fn tables_of_metadata() {
    let row = [("file_name", "sub/a.png"), ("text", "a red fox")];
    let other = [
        ("image", "sub/a.png"),
        ("caption", "a red fox"),
        ("url", "u"),
    ];
    let zstd = Compression::ZSTD(ZstdLevel::default());
    let bare = parquet(&row, Compression::UNCOMPRESSED);
    let snappy = parquet(&row, Compression::SNAPPY);
    let zipped = parquet(&other, Compression::GZIP(Default::default()));
    let zstd = parquet(&other, zstd);
    let tables: &[(&str, &[u8])] = &[
        (
            "metadata.jsonl",
            br#"[{"file_name": "sub/a.png", "text": "a red fox"}]"#,
        ),
        ("metadata.csv", b"file_name,text\nsub/a.png,a red fox\n"),
        ("metadata.CSV", b"text;file_name\r\na red fox;sub/a.png\r\n"),
        ("metadata.tsv", b"file_name\ttext\nsub/a.png\ta red fox\n"),
        ("train.csv", b"image_path,prompt\nsub/a.png,\"a red fox\"\n"),
        ("sub/metadata.csv", b"file_name,text\na.png,a red fox\n"),
        ("metadata.parquet", &bare),
        ("metadata.parquet", &snappy),
        ("train-00000-of-00001.parquet", &zipped),
        ("data.parquet", &zstd),
        (
            "data.jsonl",
            br#"{"image_path": "sub/a.png", "caption": "a red fox"}"#,
        ),
        ("meta_cap.json", br#"{"sub/a": {"caption": "a red fox"}}"#),
        (
            "meta_lat.json",
            br#"{"sub/a.png": {"caption": "a red fox", "train_resolution": [64, 64]}}"#,
        ),
        ("sub/captions.json", br#"{"a.png": ["a red fox"]}"#),
        ("captions.JSON", br#"{"sub/a.png": "a red fox"}"#),
        (
            "data_info.json",
            br#"[{"path": "sub/a.png", "prompt": "a red fox", "ratio": 1.0}]"#,
        ),
    ];
    for &(name, bytes) in tables {
        let prepared = Prepared::of(&[("sub/a.png", IMAGE), (name, bytes)], &settings());
        assert_eq!(prepared.only().0, ["a red fox"], "{name}");
        assert!(
            prepared.has_no_remark(),
            "{name} {}",
            prepared.list("rejected")
        );
    }
}

#[test]
fn kinds_that_are_not_read() {
    let pictures = parquet(&[("url", "u"), ("caption", "c")], Compression::SNAPPY);
    let files: [(&str, &[u8]); 15] = [
        ("captions.csv", b"url,caption\nu,c\n"),
        ("00000.parquet", &pictures),
        ("broken.parquet", b"PAR1"),
        ("other.jsonl", br#"{"file_name": "x.png", "text": "t"}"#),
        (
            "coco.json",
            br#"{"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}"#,
        ),
        ("00000_stats.json", br#"{"count": 3, "successes": 3}"#),
        (
            "meta_cap.json",
            br#"{"x": {"tags": "y"}, "z": {"tags": "y"}}"#,
        ),
        ("a.yaml", b"caption: a red fox"),
        ("a.XMP", b"<x/>"),
        ("set.zip", b"PK\x03\x04"),
        ("00001.tar", b""),
        ("gone.json", br#"{"caption": "no picture"}"#),
        ("gone.caption", b"no picture"),
        ("list.json", b"[1, 2"),
        ("notes.md", b"# not a picture"),
    ];
    let mut with_image = vec![("a.png", IMAGE), ("a.txt", &b"a red fox"[..])];
    with_image.extend(files);
    let prepared = Prepared::of(&with_image, &settings());
    assert_eq!(prepared.only().0, ["a red fox"]);
    let expected = [
        ("00000.parquet", "unread_kind", "url, caption"),
        (
            "00000_stats.json",
            "unread_kind",
            "of a kind that is not read",
        ),
        ("00001.tar", "archive", "unpack it"),
        ("a.XMP", "unread_kind", "of a kind that is not read"),
        ("a.yaml", "unread_kind", "of a kind that is not read"),
        ("broken.parquet", "bad_caption", "not a Parquet file"),
        (
            "captions.csv",
            "unread_kind",
            "none of its columns names files",
        ),
        ("coco.json", "unread_kind", "of a kind that is not read"),
        ("gone.caption", "orphan_caption", "no image has this name"),
        ("gone.json", "orphan_caption", "no image has this name"),
        ("list.json", "orphan_caption", "no image has this name"),
        ("meta_cap.json", "unread_kind", "none of its 2 rows"),
        ("notes.md", "not_an_image", ""),
        ("other.jsonl", "unread_kind", "none of its 1 rows"),
        ("set.zip", "archive", "unpack it"),
    ];
    let rejected = prepared.remarks("rejected");
    assert_eq!(rejected.len(), expected.len(), "{rejected:#?}");
    for ((path, reason, detail), expected) in rejected.iter().zip(expected) {
        assert_eq!((path.as_str(), reason.as_str()), (expected.0, expected.1));
        assert!(detail.contains(expected.2), "{path}: {detail}");
    }
    // An image without text says what is beside it.
    let files: [(&str, &[u8]); 2] = [("a.png", IMAGE), ("a.yaml", b"caption: x")];
    let missing = Prepared::of(&files, &settings()).remarks("rejected");
    assert!(
        missing[0]
            .2
            .contains("a.yaml is of a kind that is not read"),
        "{missing:?}"
    );
}

#[test]
fn names_of_files_beside_an_image() {
    let caption = || (strings(&["a red fox"]), Vec::new());
    let tags = || (Vec::new(), strings(&["fox", "snow"]));
    for (image, file, bytes, expected) in [
        ("a.png", "a.txt", "a red fox", caption()),
        ("a.png", "a.caption", "a red fox", caption()),
        ("a.png", "a.caption.txt", "a red fox", caption()),
        ("a.png", "a.png.caption", "a red fox", caption()),
        ("a.jpg", "a.jpg.txt", "a red fox", caption()),
        (
            "a.jpg",
            "a.jpg.json",
            r#"{"caption": "a red fox"}"#,
            caption(),
        ),
        ("IMG_1.JPG", "IMG_1.TXT", "a red fox", caption()),
        (
            "IMG_1.JPG",
            "IMG_1.JSON",
            r#"{"caption": "a red fox"}"#,
            caption(),
        ),
        ("IMG_1.JPG", "img_1.Txt", "a red fox", caption()),
        ("a.b.png", "a.b.txt", "a red fox", caption()),
        ("a.png", "a.tags", "fox, snow", tags()),
        ("a.png", "a.TAGS", "fox\nsnow\n", tags()),
        ("a.png", "a.png.tags.txt", "fox, snow", tags()),
        (
            "a.jpg",
            "a.jpg.json",
            r#"{"tags": ["fox", "snow"]}"#,
            tags(),
        ),
    ] {
        for folder in ["", "sub/"] {
            let image = format!("{folder}{image}");
            let file = format!("{folder}{file}");
            let files = [(image.as_str(), IMAGE), (file.as_str(), bytes.as_bytes())];
            let prepared = Prepared::of(&files, &settings());
            assert_eq!(prepared.only(), expected, "{file}");
            assert!(prepared.has_no_remark(), "{file}");
        }
    }
}

#[test]
fn byte_order_marks() {
    let marked = |text: &str| format!("\u{feff}{text}").into_bytes();
    let line = r#"{"file_name": "a.png", "text": "a red fox"}"#;
    for (name, text) in [
        ("metadata.jsonl", line),
        ("metadata.csv", "file_name,text\na.png,a red fox\n"),
        ("meta.json", r#"{"a.png": {"caption": "a red fox"}}"#),
        ("a.json", r#"{"caption": "a red fox"}"#),
        ("a.txt", "a red fox"),
        ("a.caption", "a red fox\r\n"),
    ] {
        for bytes in [marked(text), utf16(text)] {
            let prepared = Prepared::of(&[("a.png", IMAGE), (name, &bytes)], &settings());
            assert_eq!(prepared.only().0, ["a red fox"], "{name}");
            assert!(prepared.has_no_remark(), "{name}");
        }
    }
}

#[test]
fn sources_that_go_together() {
    let sentence: &[u8] = b"A red fox sits in the snow.";
    let img2dataset = br#"{"caption": "fox, snow", "url": "u", "key": "0", "status": "success",
        "error_message": null, "width": 64, "height": 64, "original_width": 80,
        "original_height": 80, "exif": "{}", "sha256": "ff"}"#;
    let both = || {
        (
            strings(&["A red fox sits in the snow."]),
            strings(&["1fox", "snow"]),
        )
    };
    for (files, expected) in [
        (
            vec![("a.caption", sentence), ("a.txt", &b"1fox, snow"[..])],
            both(),
        ),
        (vec![("a.txt", sentence), ("a.tags", b"1fox, snow")], both()),
        (
            vec![
                ("a.json", br#"{"tags": ["1fox", "snow"]}"#),
                ("a.txt", sentence),
            ],
            both(),
        ),
        (
            vec![
                ("a.json", br#"{"caption": "A red fox sits in the snow."}"#),
                ("a.txt", b"1fox, snow"),
            ],
            both(),
        ),
        (
            vec![
                ("a.txt", b"1fox, snow"),
                (
                    "metadata.csv",
                    b"file_name,text\na.png,A red fox sits in the snow.\n",
                ),
            ],
            both(),
        ),
        // The same text twice, whatever it reads like.
        (
            vec![("a.json", &img2dataset[..]), ("a.txt", b"fox, snow\n")],
            (strings(&["fox, snow"]), vec![]),
        ),
        (
            vec![
                ("a.txt", b"fox, snow"),
                ("metadata.csv", b"file_name,text\na.png,\"fox, snow\"\n"),
            ],
            (strings(&["fox, snow"]), vec![]),
        ),
        (
            vec![("a.txt", sentence), ("a.png.txt", sentence)],
            (both().0, vec![]),
        ),
        // Alone, a text file is a caption.
        (
            vec![("a.txt", b"1fox, snow")],
            (strings(&["1fox, snow"]), vec![]),
        ),
    ] {
        let mut all = vec![("a.png", IMAGE)];
        all.extend(&files);
        let prepared = Prepared::of(&all, &settings());
        assert_eq!(prepared.only(), expected, "{:?}", files[0]);
        assert!(
            prepared.has_no_remark(),
            "{:?} {}",
            files[0],
            prepared.list("rejected")
        );
    }
    // Sources that disagree are still named.
    let files = [
        ("a.png", IMAGE),
        ("a.caption", sentence),
        ("a.txt", b"Another sentence."),
    ];
    let prepared = Prepared::of(&files, &settings());
    assert_eq!(prepared.only().0, ["A red fox sits in the snow."]);
    assert_eq!(prepared.remarks("rejected")[0].1, "second_caption");
}

#[test]
fn a_recipe_can_say_what_text_files_are() {
    let text: &[u8] = b"1fox, blue sky\nsnow";
    let files = [("a.png", IMAGE), ("a.txt", text)];
    let with = |txt_files, caption_lines, tag_separator| PrepSettings {
        txt_files,
        caption_lines,
        tag_separator,
        ..settings()
    };
    let (comma, space) = (TagSeparator::Comma, TagSeparator::Space);
    let whole = "1fox, blue sky\nsnow";
    for (settings, captions, tags) in [
        (with(TxtFiles::Auto, false, comma), vec![whole], vec![]),
        (
            with(TxtFiles::Caption, true, comma),
            vec!["1fox, blue sky", "snow"],
            vec![],
        ),
        (
            with(TxtFiles::Tags, false, comma),
            vec![],
            vec!["1fox", "blue sky", "snow"],
        ),
        (
            with(TxtFiles::Tags, false, space),
            vec![],
            vec!["1fox", "blue", "sky", "snow"],
        ),
    ] {
        let prepared = Prepared::of(&files, &settings);
        assert_eq!(prepared.only(), (strings(&captions), strings(&tags)));
        assert!(prepared.has_no_remark());
    }
}

#[test]
fn pipes_and_devices_are_not_waited_for() {
    for name in [
        "a.txt",
        "a.json",
        "a.caption",
        "a.tags",
        "metadata.jsonl",
        "metadata.csv",
        "x.json",
    ] {
        for is_pipe in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), "a.png", IMAGE);
            write(folder.path(), "b.png", IMAGE);
            write(folder.path(), "b.txt", b"b");
            let path = folder.path().join(name);
            if is_pipe {
                assert!(
                    Command::new("mkfifo")
                        .arg(&path)
                        .status()
                        .unwrap()
                        .success()
                );
            } else {
                symlink("/dev/zero", &path).unwrap();
            }
            let prepared = Prepared::in_folder(folder, &settings());
            let rejected = prepared.remarks("rejected");
            let of_file = rejected.iter().find(|(path, ..)| path == name).unwrap();
            assert!(
                of_file.2.contains("not a regular file"),
                "{name}: {of_file:?}"
            );
            assert_eq!(prepared.summary.train_rows, 1, "{name}");
        }
    }
}

#[test]
fn escaped_parentheses() {
    let escaped: [(&str, &str); 6] = [
        ("a.txt", r"saber \(fate\) in the snow"),
        ("a.caption", r"saber \(fate\) in the snow"),
        ("a.json", r#"{"caption": "saber \\(fate\\) in the snow"}"#),
        (
            "metadata.csv",
            "file_name,text\na.png,saber \\(fate\\) in the snow\n",
        ),
        ("a.tags", r"saber_\(fate\), solo"),
        (
            "a.json",
            r#"{"tags": "saber_\\(fate\\), solo", "important_tags": []}"#,
        ),
    ];
    for (name, text) in escaped {
        let files = [("a.png", IMAGE), (name, text.as_bytes())];
        let (captions, tags) = Prepared::of(&files, &settings()).only();
        if captions.is_empty() {
            assert_eq!(tags, ["saber_(fate)", "solo"], "{name}");
        } else {
            assert_eq!(captions, ["saber (fate) in the snow"], "{name}");
        }
        let keep = PrepSettings {
            unescape_parentheses: false,
            ..settings()
        };
        let (captions, tags) = Prepared::of(&files, &keep).only();
        let all = [captions, tags].concat().join(" ");
        assert!(all.contains(r"\(fate\)"), "{name}: {all}");
    }
}

#[test]
fn texts_that_encoders_read_otherwise_are_noted() {
    let long = "fox ".repeat(360);
    let many_tags = "long_hair, ".repeat(120);
    let long_json = format!(r#"{{"captions": ["short", "{long}"]}}"#);
    for (name, text, reason, part) in [
        (
            "a.txt",
            long.as_str(),
            "long_caption",
            "360 tokens, of which the last 135 are not read",
        ),
        ("a.json", &long_json, "long_caption", "360 tokens"),
        ("a.tags", &many_tags, "long_caption", "all tags together"),
        (
            "a.txt",
            "a fox BREAK a hare",
            "break_word",
            "taught as a word",
        ),
        (
            "a.caption",
            "a fox,\nBREAK\na hare",
            "break_word",
            "ComfyUI",
        ),
        (
            "a.json",
            r#"{"tags": "1girl solo long_hair"}"#,
            "unsplit_tags",
            "tag_separator",
        ),
    ] {
        let prepared = Prepared::of(&[("a.png", IMAGE), (name, text.as_bytes())], &settings());
        let notes = prepared.remarks("notes");
        assert_eq!(notes.len(), 1, "{name} {notes:?}");
        assert_eq!(
            (notes[0].0.as_str(), notes[0].1.as_str()),
            ("a.png", reason)
        );
        assert!(notes[0].2.contains(part), "{}", notes[0].2);
        assert_eq!(prepared.summary.train_rows, 1);
        assert_eq!(prepared.summary.examples.len(), 1);
    }
    for quiet in [
        "break dance",
        "BREAKING news",
        "fox ".repeat(225).as_str(),
        "BREAKs",
    ] {
        let files = [("a.png", IMAGE), ("a.txt", quiet.as_bytes())];
        assert!(Prepared::of(&files, &settings()).has_no_remark(), "{quiet}");
    }
}

/// A JPEG with an EXIF orientation, which 0 leaves out.
fn jpeg(orientation: u8) -> Vec<u8> {
    let bytes = image("jpeg", ImageFormat::Jpeg);
    if orientation == 0 {
        return bytes;
    }
    let mut exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
    exif.extend([orientation, 0, 0, 0, 0, 0, 0]);
    let len = (exif.len() as u16 + 2).to_be_bytes();
    [&bytes[..2], &[0xff, 0xe1], &len, &exif, &bytes[2..]].concat()
}

#[test]
fn orientations_that_were_lost_on_the_way() {
    let turned = r#""{\"Image Orientation\": \"Rotated 90 CW\", \"Image Make\": \"x\"}""#;
    let upright = r#""{\"Image Orientation\": \"Horizontal (normal)\"}""#;
    for (exif, own, is_lost) in [
        (turned, 0, true),
        (r#"{"Image Orientation": "Mirrored vertical"}"#, 0, true),
        (r#"{"Orientation": 8}"#, 1, true),
        (turned, 6, false),
        (upright, 0, false),
        ("null", 0, false),
    ] {
        let json = format!(r#"{{"caption": "a", "key": "0", "exif": {exif}}}"#);
        let picture = jpeg(own);
        let files = [("a.jpg", &picture[..]), ("a.json", json.as_bytes())];
        let prepared = Prepared::of(&files, &settings());
        let count = prepared.summary.notes.get(&Reason::LostOrientation);
        assert_eq!(count.copied(), is_lost.then_some(1), "{exif} {own}");
        assert_eq!(prepared.summary.train_rows, 1);
    }
}

#[test]
fn a_second_run_finds_the_same_and_encodes_nothing() {
    let files: [(&str, &[u8]); 6] = [
        ("a.png", IMAGE),
        ("a.txt", br"saber \(fate\)"),
        ("b.png", IMAGE),
        ("metadata.csv", b"file_name,text\nb.png,a red fox\n"),
        ("c.png", IMAGE),
        (
            "meta_cap.json",
            br#"{"c": {"caption": "c", "tags": "x, y"}}"#,
        ),
    ];
    let first = Prepared::of(&files, &settings());
    let lists = (first.list("rejected"), first.list("notes"));
    let mut encode = |_: &RgbBatch| panic!("nothing is new");
    let again = prepare(
        first.folder.path(),
        first.out.path(),
        &settings(),
        &codec(),
        &mut encode,
        &mut |_| {},
    )
    .unwrap();
    assert_eq!(
        (again.train_rows, again.written_rows, again.rewritten_rows),
        (3, 0, 0)
    );
    assert_eq!((first.list("rejected"), first.list("notes")), lists);
    assert!(!first.out.path().join("prep/rows.tmp").exists());
}

#[test]
fn a_data_set_that_was_prepared_before_gets_its_new_text_without_encoding() {
    let files = [("a.png", IMAGE), ("a.txt", &br"saber \(fate\)"[..])];
    let keep = PrepSettings {
        unescape_parentheses: false,
        ..settings()
    };
    let first = Prepared::of(&files, &keep);
    assert_eq!(first.only().0, [r"saber \(fate\)"]);
    let mut encode = |_: &RgbBatch| panic!("nothing is new");
    let again = prepare(
        first.folder.path(),
        first.out.path(),
        &settings(),
        &codec(),
        &mut encode,
        &mut |_| {},
    )
    .unwrap();
    assert_eq!((again.written_rows, again.rewritten_rows), (0, 1));
    assert_eq!(first.only().0, ["saber (fate)"]);
}

#[test]
fn a_table_that_breaks_off_keeps_the_rows_before() {
    let long = format!(
        "{{\"file_name\": \"b.png\", \"text\": \"{}\"}}",
        "x".repeat(2_000_000)
    );
    let good = r#"{"file_name": "a.png", "text": "a red fox"}"#;
    let lines = format!("{good}\n{long}\n");
    let map = r#"{"a.png": "a red fox", "b.png": "#;
    let csv = b"file_name,text\na.png,a red fox\nb.png,caf\xe9\n";
    let tables: [(&str, &[u8], &str); 3] = [
        ("metadata.jsonl", lines.as_bytes(), "metadata.jsonl"),
        ("meta_cap.json", map.as_bytes(), "meta_cap.json"),
        ("metadata.csv", csv, "metadata.csv:3"),
    ];
    for (name, bytes, named) in tables {
        let prepared = Prepared::of(&[("a.png", IMAGE), (name, bytes)], &settings());
        assert_eq!(prepared.only().0, ["a red fox"], "{name}");
        let rejected = prepared.remarks("rejected");
        assert_eq!(rejected.len(), 1, "{rejected:?}");
        assert_eq!(rejected[0].0, named);
    }
}
