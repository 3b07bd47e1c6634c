//! Sources of each kind through a whole preparation: pictures with their texts, what is wrong by
//! name, and a run after the source has changed.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod small_preparation;
mod written;

use std::{collections::BTreeMap, fs, path::Path};

use rectiflow_data::{
    Dataset, Error, PrepSettings, PrepSummary, RgbBatch, Source, Split, caption::Reading,
    choice::SourceKind, prepare,
};
use serde_json::Value;
use small_preparation::{codec, settings as small_settings, zeros};
use tempfile::TempDir;
use written::{Member, Row, large_picture, write_index, write_mds, write_parquet, write_tar};

fn settings(source: SourceKind) -> PrepSettings {
    PrepSettings {
        source,
        area_px: 32 * 32,
        bucket_max_px: 64,
        ..small_settings()
    }
}

fn prepared(place: &Path, out: &Path, kind: SourceKind) -> Result<PrepSummary, Error> {
    let mut encode = |batch: &RgbBatch| Ok(zeros(batch));
    prepare(
        place,
        out,
        &settings(kind),
        &codec(),
        &mut encode,
        &mut |_| {},
    )
}

/// A data set: captions and tags of each row by its address, and what was said of the rest.
struct Prepared {
    summary: PrepSummary,
    texts: BTreeMap<String, String>,
    /// Path, reason and detail.
    rejected: Vec<(String, String, String)>,
}

impl Prepared {
    fn of(place: &Path, out: &Path, kind: SourceKind) -> Self {
        let summary = prepared(place, out, kind).unwrap();
        let dataset = Dataset::open(out).unwrap();
        let mut texts = BTreeMap::new();
        for shape in dataset.buckets(Split::Train) {
            for record in dataset.records(Split::Train, shape.bucket).unwrap() {
                let text = [record.captions, record.tags].concat().join("|");
                texts.insert(record.source, text);
            }
        }
        let mut rejected = Vec::new();
        for line in fs::read_to_string(out.join("rejected.jsonl"))
            .unwrap()
            .lines()
        {
            let line: Value = serde_json::from_str(line).unwrap();
            let text = |key: &str| line[key].as_str().unwrap().to_owned();
            rejected.push((text("path"), text("reason"), text("detail")));
        }
        Self {
            summary,
            texts,
            rejected,
        }
    }

    /// Asserts that these and no other remarks were made: path, reason and a part of the detail.
    fn assert_rejected(&self, expected: &[(&str, &str, &str)]) {
        assert_eq!(self.rejected.len(), expected.len(), "{:#?}", self.rejected);
        for (found, expected) in self.rejected.iter().zip(expected) {
            assert_eq!(
                (found.0.as_str(), found.1.as_str()),
                (expected.0, expected.1)
            );
            assert!(found.2.contains(expected.2), "{}: {}", found.0, found.2);
        }
    }
}

fn texts(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let owned = pairs
        .iter()
        .map(|(address, text)| ((*address).to_owned(), (*text).to_owned()));
    owned.collect()
}

fn image(id: u64) -> Vec<u8> {
    large_picture(id, 32)
}

fn member(name: &str, bytes: impl Into<Vec<u8>>) -> Member {
    (name.to_owned(), bytes.into())
}

fn folders() -> (TempDir, TempDir) {
    (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap())
}

#[test]
fn a_webdataset_has_texts_of_every_kind() {
    let (place, out) = folders();
    let long = "n".repeat(150);
    let members = vec![
        member("a.jpg", image(1)),
        member("c.png.txt", "a crow"),
        member("sub.1/b.JSON", r#"{"caption": "a bear", "tags": ["bear"]}"#),
        member("sub.1/b.png", image(2)),
        member("a.txt", "an ape"),
        member("a.tags", "ape, tree"),
        member("c.png", image(3)),
        member(&format!("{long}.webp"), image(4)),
        member(&format!("{long}.txt"), "a newt"),
        member("d.cls", "7"),
        member("README", "nothing"),
    ];
    write_tar(&place.path().join("x/one.tar"), members);
    for kind in [SourceKind::Auto, SourceKind::WebDataset, SourceKind::Tar] {
        let found = Prepared::of(place.path(), out.path(), kind);
        let expected = [
            ("x/one.tar/a.jpg", "an ape|ape|tree"),
            ("x/one.tar/c.png", "a crow"),
            (&format!("x/one.tar/{long}.webp"), "a newt"),
            ("x/one.tar/sub.1/b.png", "a bear|bear"),
        ];
        assert_eq!(found.texts, texts(&expected), "{kind:?}");
        found.assert_rejected(&[]);
    }
    // A file on its own: the address begins with its name.
    let out = tempfile::tempdir().unwrap();
    let found = Prepared::of(
        &place.path().join("x/one.tar"),
        out.path(),
        SourceKind::Auto,
    );
    assert!(
        found.texts.contains_key("one.tar/a.jpg"),
        "{:?}",
        found.texts
    );
}

#[test]
fn what_is_ambiguous_in_a_tar_is_named_and_nothing_else_is_lost() {
    let (place, out) = folders();
    let members = vec![
        member("a_0.5.png", image(1)),
        member("a_0.7.png", image(2)),
        member("a_0.5.txt", "first"),
        member("a_0.7.txt", "second"),
        member("b.png", image(3)),
        member("b.png", image(4)),
        member("b.txt", "twice"),
        member("c.txt", "no picture"),
        member("d.png", image(5)),
        member("d.0.txt", "of another"),
        member("e.png", image(6)),
        member("e.txt", "plain"),
        member("e.seg.png", image(7)),
        member("f.png", b"no picture".to_vec()),
        member("metadata.jsonl", r#"{"file_name": "d.png", "text": "x"}"#),
    ];
    write_tar(&place.path().join("t.tar"), members);
    let found = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!(found.texts, texts(&[("t.tar/e.png", "plain")]));
    found.assert_rejected(&[
        (
            "t.tar/a_0.5.png",
            "ambiguous_key",
            "\"a_0\", which ends at the first dot",
        ),
        (
            "t.tar/a_0.5.txt",
            "ambiguous_key",
            "2 pictures (a_0.5.png, a_0.7.png)",
        ),
        ("t.tar/a_0.7.png", "ambiguous_key", ""),
        ("t.tar/a_0.7.txt", "ambiguous_key", ""),
        (
            "t.tar/b.png",
            "ambiguous_key",
            "called \"b.png\" more than once",
        ),
        ("t.tar/b.png", "ambiguous_key", ""),
        ("t.tar/b.txt", "ambiguous_key", ""),
        ("t.tar/c.txt", "no_picture", "text and no picture"),
        (
            "t.tar/d.0.txt",
            "ambiguous_key",
            "by the rest of its name it does not",
        ),
        ("t.tar/d.png", "no_caption", "the tar has no member d.txt"),
        (
            "t.tar/e.seg.png",
            "ambiguous_key",
            "has the picture \"e.png\"",
        ),
        ("t.tar/f.png", "not_an_image", ""),
        ("t.tar/metadata.jsonl", "unread_kind", "a table in a tar"),
    ]);
}

/// Six members: three pictures with texts.
fn three() -> Vec<Member> {
    let mut members = Vec::new();
    for (id, name) in (11..).zip(["a", "b", "c"]) {
        members.push(member(&format!("{name}.png"), image(id)));
        members.push(member(&format!("{name}.txt"), format!("picture {name}")));
    }
    members
}

#[test]
fn truncated_and_damaged_tars_keep_the_members_before() {
    let (place, out) = folders();
    let path = place.path().join("t.tar");
    write_tar(&path, three());
    let whole = fs::read(&path).unwrap();
    let offset_of = |name: &str| {
        let found = whole
            .windows(name.len())
            .position(|part| part == name.as_bytes());
        found.unwrap()
    };
    let c = offset_of("c.png");
    let two = texts(&[("t.tar/a.png", "picture a"), ("t.tar/b.png", "picture b")]);

    // In the middle of a picture, in a header, between members, in the empty blocks.
    let kept = |len: usize| {
        fs::write(&path, &whole[..len]).unwrap();
        Prepared::of(place.path(), out.path(), SourceKind::Auto)
    };
    let found = kept(c + 600);
    assert_eq!(found.texts, two);
    found.assert_rejected(&[("t.tar/c.png", "truncated", "the tar ends after 88 of its")]);
    for len in [c + 100, c] {
        let found = kept(len);
        assert_eq!(found.texts, two);
        found.assert_rejected(&[("t.tar", "truncated", "members may be missing")]);
    }
    assert_eq!(kept(whole.len() - 512).rejected.len(), 0);

    // A damaged header.
    let mut damaged = whole.clone();
    damaged[c + 130] ^= 0x55;
    fs::write(&path, &damaged).unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!(found.texts, two);
    found.assert_rejected(&[("t.tar", "bad_shard", "the 4 members before are read")]);

    // Two tars one behind the other.
    let more = vec![member("d.png", image(14)), member("d.txt", "picture d")];
    write_tar(&path, more);
    fs::write(&path, [whole, fs::read(&path).unwrap()].concat()).unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!(found.texts.len(), 4);
    found.assert_rejected(&[]);
}

#[test]
fn an_index_is_used_and_compared_with_its_tar() {
    let (place, out) = folders();
    let path = place.path().join("t.tar");
    let expected = texts(&[
        ("t.tar/a.png", "picture a"),
        ("t.tar/b.png", "picture b"),
        ("t.tar/c.png", "picture c"),
    ]);
    write_tar(&path, three());
    write_index(&path, "size");
    let index = fs::read_to_string(path.with_extension("json")).unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!(found.texts, expected);
    found.assert_rejected(&[]);

    // An index of another tar: the tar's headers are read.
    let other = index.replace("\"filesize\":", "\"filesize\":1");
    fs::write(path.with_extension("json"), other).unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!(found.texts, expected);
    found.assert_rejected(&[("t.json", "bad_index", "it is about a tar of 1")]);

    // An entry that is elsewhere, in none of the three places that are compared when listed.
    let mut index: Value = serde_json::from_str(&index).unwrap();
    let place_of_a = index["files"]["a.png"].clone();
    index["files"]["b.png"] = place_of_a;
    fs::write(path.with_extension("json"), index.to_string()).unwrap();
    fs::remove_dir_all(out.path()).unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Tar);
    assert!(found.texts.len() >= 2, "{:?}", found.texts);
    for (address, text) in &found.texts {
        assert_eq!(expected.get(address), Some(text), "{address}");
    }
    assert_eq!(found.rejected.len(), 1, "{:?}", found.rejected);
    assert_eq!(found.rejected[0].1, "bad_index");

    // Texts that only the index has.
    let (place, out) = folders();
    let path = place.path().join("t.tar");
    write_tar(&path, vec![member("a.png", image(1))]);
    let len = fs::metadata(&path).unwrap().len();
    let entry = format!(
        r#"[{{"path": "a.png", "offset": 512, "length": {}, "width": 32, "captions": ["a fox"]}}]"#,
        image(1).len()
    );
    let index = format!(r#"{{"filesize": {len}, "files": {entry}}}"#);
    fs::write(path.with_extension("json"), index).unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!(found.texts, texts(&[("t.tar/a.png", "a fox")]));
}

#[test]
fn a_hash_in_an_index_is_compared_with_the_picture() {
    let (place, out) = folders();
    let path = place.path().join("t.tar");
    write_tar(&path, three());
    write_index(&path, "size");
    let index = fs::read_to_string(path.with_extension("json")).unwrap();
    let mut index: Value = serde_json::from_str(&index).unwrap();
    let hash = |bytes: Vec<u8>| {
        let digest = <sha2::Sha256 as sha2::Digest>::digest(bytes);
        digest
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    for (name, bytes) in three() {
        if name.ends_with(".png") {
            index["files"][&name]["sha256"] = hash(bytes).into();
        }
    }
    fs::write(path.with_extension("json"), index.to_string()).unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!((found.texts.len(), found.rejected.len()), (3, 0));

    // Another hash: the picture is refused, the others stay.
    index["files"]["b.png"]["sha256"] = hash(vec![1]).into();
    fs::write(path.with_extension("json"), index.to_string()).unwrap();
    fs::remove_dir_all(out.path()).unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!(found.texts.len(), 2);
    found.assert_rejected(&[("t.tar/b.png", "bad_index", "another SHA-256")]);
}

fn rows(ids: std::ops::Range<u64>) -> impl Iterator<Item = Row> {
    ids.map(|id| Row::new(image(id), &format!("row {id}")))
}

#[test]
fn parquet_rows_are_read_and_rows_without_bytes_are_named() {
    let (place, out) = folders();
    let bad = [
        Row {
            bytes: None,
            path: Some("pictures/7.png".to_owned()),
            text: Some("gone".to_owned()),
        },
        Row {
            text: None,
            ..Row::new(image(99), "")
        },
    ];
    let path = place.path().join("data/train-0.parquet");
    write_parquet(&path, rows(0..50).chain(bad), 20);
    fs::write(place.path().join("README.md"), "a card").unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!(found.texts.len(), 50);
    for id in [0, 19, 20, 49] {
        let text = &found.texts[&format!("data/train-0.parquet#{id}")];
        assert_eq!(*text, format!("row {id}"));
    }
    found.assert_rejected(&[
        (
            "data/train-0.parquet#50",
            "no_picture",
            "only the path \"pictures/7.png\"",
        ),
        (
            "data/train-0.parquet#51",
            "no_caption",
            "no column of its row",
        ),
    ]);

    // A file that ends in the middle, and one without pictures, beside a good one.
    let bytes = fs::read(&path).unwrap();
    fs::write(
        place.path().join("data/cut.parquet"),
        &bytes[..bytes.len() / 2],
    )
    .unwrap();
    let plain = b"message m { optional binary text (UTF8); }";
    fs::write(
        place.path().join("data/zz.parquet"),
        without_pictures(plain),
    )
    .unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!((found.texts.len(), found.summary.written_rows), (50, 0));
    found.assert_rejected(&[
        ("data/cut.parquet", "bad_shard", ""),
        ("data/train-0.parquet#50", "no_picture", ""),
        ("data/train-0.parquet#51", "no_caption", ""),
        (
            "data/zz.parquet",
            "bad_shard",
            "no column of pictures; its columns: text",
        ),
    ]);
}

/// A Parquet file with a schema and no rows.
fn without_pictures(schema: &[u8]) -> Vec<u8> {
    let schema = std::str::from_utf8(schema).unwrap();
    let schema = parquet::schema::parser::parse_message_type(schema).unwrap();
    let writer = parquet::file::writer::SerializedFileWriter::new(
        Vec::new(),
        schema.into(),
        std::sync::Arc::default(),
    );
    writer.unwrap().into_inner().unwrap()
}

#[test]
fn mds_samples_are_read_and_bad_shards_are_named() {
    let (place, out) = folders();
    write_mds(place.path(), rows(0..30), 10);
    let found = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!(found.texts.len(), 30);
    assert_eq!(found.texts["shard.00002.mds#9"], "row 29");
    found.assert_rejected(&[]);

    // One shard is cut, one is gone.
    let path = place.path().join("shard.00001.mds");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    fs::remove_file(place.path().join("shard.00000.mds")).unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Mds);
    assert_eq!(found.texts.len(), 19);
    found.assert_rejected(&[
        (
            "shard.00000.mds",
            "bad_shard",
            "names it with 10 samples, and it is not there",
        ),
        (
            "shard.00001.mds",
            "truncated",
            "1 of its 10 samples are not there",
        ),
    ]);

    // Compressed shards are refused by name.
    let index = fs::read_to_string(place.path().join("index.json")).unwrap();
    let index = index.replace("\"compression\":null", "\"compression\":\"zstd\"");
    fs::write(place.path().join("index.json"), index).unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Mds);
    let (path, reason, detail) = &found.rejected[0];
    assert_eq!(
        (path.as_str(), reason.as_str()),
        ("shard.00000.mds", "bad_shard")
    );
    assert!(detail.contains("compressed (zstd)"), "{detail}");
}

#[test]
fn only_what_changed_is_encoded_after_a_source_has_changed() {
    let (place, out) = folders();
    let path = place.path().join("t.tar");
    write_tar(&path, three());
    let first = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!(first.summary.written_rows, 3);
    let again = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!((again.summary.written_rows, again.texts.len()), (0, 3));

    // Another picture, another text, one member more and one less, in another order.
    let mut members = three();
    members[0].1 = image(77);
    members[3].1 = b"other words".to_vec();
    members.truncate(4);
    members.push(member("d.txt", "picture d"));
    members.push(member("d.png", image(78)));
    members.reverse();
    write_tar(&path, members);
    let changed = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!(
        (changed.summary.written_rows, changed.summary.rewritten_rows),
        (2, 1)
    );
    let expected = [
        ("t.tar/a.png", "picture a"),
        ("t.tar/b.png", "other words"),
        ("t.tar/d.png", "picture d"),
    ];
    assert_eq!(changed.texts, texts(&expected));
}

#[test]
fn what_is_ambiguous_is_refused_with_the_names_to_choose_from() {
    let (place, out) = folders();
    write_tar(&place.path().join("t.tar"), three());
    fs::write(place.path().join("a.png"), image(1)).unwrap();
    fs::write(place.path().join("a.txt"), "loose").unwrap();
    let error = prepared(place.path(), out.path(), SourceKind::Auto)
        .unwrap_err()
        .to_string();
    for part in [
        "prep.source",
        "\"folder\" (1, such as a.png)",
        "\"tar\" (1, such as t.tar)",
    ] {
        assert!(error.contains(part), "{error}");
    }
    let found = Prepared::of(place.path(), out.path(), SourceKind::WebDataset);
    assert_eq!(found.texts.len(), 3);
    let out = tempfile::tempdir().unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Folder);
    assert_eq!(found.texts, texts(&[("a.png", "loose")]));
    found.assert_rejected(&[("t.tar", "archive", "")]);

    // Compressed tars.
    let (place, out) = folders();
    fs::write(place.path().join("t.tar.gz"), "x").unwrap();
    let error = prepared(place.path(), out.path(), SourceKind::Auto)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("t.tar.gz is a compressed tar") && error.contains("gunzip"),
        "{error}"
    );
    write_tar(&place.path().join("u.tar"), three());
    let found = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!(found.texts.len(), 3);
    found.assert_rejected(&[("t.tar.gz", "archive", "compressed tar")]);
}

#[test]
fn kohyas_folders_and_latents_are_named() {
    let (place, out) = folders();
    let folder = place.path().join("10_fox");
    fs::create_dir(&folder).unwrap();
    for (id, name) in [(1, "a"), (2, "b")] {
        fs::write(folder.join(format!("{name}.png")), image(id)).unwrap();
        fs::write(folder.join(format!("{name}_0032x0032_sdxl.npz")), "PK").unwrap();
    }
    // Full paths, as the scripts write them with --full_path.
    let full = |name: &str| folder.join(name).display().to_string();
    let meta = serde_json::json!({
        full("a.png"): {"caption": "a fox", "train_resolution": [32, 32]},
        full("b.png"): {"tags": "fox, snow"},
    });
    fs::write(place.path().join("meta_cap.json"), meta.to_string()).unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    assert_eq!(
        found.texts,
        texts(&[("10_fox/a.png", "a fox"), ("10_fox/b.png", "fox|snow")])
    );
    found.assert_rejected(&[
        (
            "10_fox/a_0032x0032_sdxl.npz",
            "unread_kind",
            "does not say with which VAE",
        ),
        ("10_fox/b_0032x0032_sdxl.npz", "unread_kind", ""),
    ]);
    let notes = fs::read_to_string(out.path().join("notes.jsonl")).unwrap();
    assert!(
        notes.contains("folder_repeats") && notes.contains("of 2 pictures"),
        "{notes}"
    );
}

#[test]
fn files_that_kohyas_scripts_wrote_are_read() {
    // Recorded: merge_captions_to_metadata.py, merge_dd_tags_to_metadata.py and
    // clean_captions_and_tags.py of sd-scripts (48d368f, 2026-02-16) for pictures in /data/train.
    let whole = include_str!("golden/kohya/meta_clean.json");
    let stems = include_str!("golden/kohya/meta_stem.json");
    let (place, out) = folders();
    let part = place.path().join("2_part");
    fs::create_dir(&part).unwrap();
    fs::write(part.join("fox.png"), image(1)).unwrap();
    fs::write(part.join("crow.v2.png"), image(2)).unwrap();
    fs::write(place.path().join("forest.jpg"), image(3)).unwrap();
    let root = format!("{}/", place.path().display());
    let meta = whole.replace("/data/train/", &root);
    fs::write(place.path().join("meta_cap.json"), meta).unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    let crow = "a crow \u{2014} black \"feathers\"";
    let expected = texts(&[
        (
            "2_part/crow.v2.png",
            &format!("{crow}|bird|no humans|blue sky"),
        ),
        (
            "2_part/fox.png",
            "a red fox, seen from the side|fox|solo|snow",
        ),
        ("forest.jpg", "trees|tree|forest"),
    ]);
    assert_eq!(found.texts, expected);
    found.assert_rejected(&[]);

    // Without --full_path the names have no endings, and the file stands in the folder.
    fs::remove_file(place.path().join("meta_cap.json")).unwrap();
    fs::write(part.join("meta_cap.json"), stems).unwrap();
    let found = Prepared::of(place.path(), out.path(), SourceKind::Auto);
    let expected = texts(&[
        ("2_part/crow.v2.png", crow),
        ("2_part/fox.png", "a red fox, seen from the side"),
    ]);
    assert_eq!(found.texts, expected);
    found.assert_rejected(&[("forest.jpg", "no_caption", "")]);
}

/// One source of each kind of shard, as files.
fn one_of_each(place: &Path) -> Vec<(&'static str, &'static str)> {
    for folder in ["plain", "indexed"] {
        write_tar(&place.join(folder).join("t.tar"), three());
    }
    write_index(&place.join("indexed/t.tar"), "size");
    write_parquet(&place.join("rows/r.parquet"), rows(0..5), 3);
    write_mds(&place.join("mds"), rows(0..5), 5);
    vec![
        ("plain", "t.tar"),
        ("indexed", "t.tar"),
        ("indexed", "t.json"),
        ("rows", "r.parquet"),
        ("mds", "index.json"),
        ("mds", "shard.00000.mds"),
    ]
}

#[test]
fn mutated_shards_are_read_or_named() {
    let (place, out) = folders();
    let files = one_of_each(place.path());
    for case in checks::mutation::cases() {
        let mut random = case.random();
        let (folder, name) = *random.of(&files);
        let kind = match folder {
            "rows" => SourceKind::Parquet,
            "mds" => SourceKind::Mds,
            _ => SourceKind::Tar,
        };
        let path = place.path().join(folder).join(name);
        let good = fs::read(&path).unwrap();
        fs::write(&path, case.mutation.of(&good, &mut random)).unwrap();
        case.run(&format!("{folder}/{name}"), || {
            let folder = place.path().join(folder);
            let source = Source::list(&folder, out.path(), kind, Reading::default()).unwrap();
            let mut num_read = 0;
            for sample in source.samples() {
                num_read += usize::from(source.open(sample).is_ok());
                source.text(sample);
            }
            // Nothing is lost without a word.
            let is_whole = num_read >= 3 && source.samples().len() == num_read;
            assert!(is_whole || num_read < source.samples().len() || !source.remarks().is_empty());
        });
        fs::write(&path, good).unwrap();
    }
}
