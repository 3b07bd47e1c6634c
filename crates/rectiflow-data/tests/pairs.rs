//! No picture with another one's text: names that are built to collide, at the interface of a
//! source. The pixels of a picture are its number, and so is its caption.
//!
//! PAIRS sets the number of rows of each source: 10,000 here, 1,000,000 in `make pairs`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(
    clippy::print_stderr,
    reason = "a failing test says which rows are wrong"
)]

mod written;

use std::{fs, io::Write, path::Path};

use rectiflow_data::{Source, caption::Reading, choice::SourceKind};
use written::{Member, Row, id_of, picture, write_index, write_mds, write_parquet, write_tar};

/// Rows of a tar, a Parquet file or an MDS shard.
const ROWS_A_SHARD: u64 = 5_000;

fn num_rows() -> u64 {
    let pairs = std::env::var("PAIRS").unwrap_or_else(|_| "10000".to_owned());
    pairs.replace('_', "").parse().unwrap()
}

/// What a row has, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Has {
    Both,
    /// A picture without text: the text of no other is its.
    PictureOnly,
    /// A text without picture.
    TextOnly,
    /// By WebDataset's convention one sample with another picture.
    Joined,
}

/// What row `id` has.
fn has(id: u64) -> Has {
    match id % 20 {
        7 => Has::PictureOnly,
        13 => Has::TextOnly,
        3 | 4 => Has::Joined,
        _ => Has::Both,
    }
}

/// The path of row `id` without its ending: one other row at least has nearly the same.
fn stem(id: u64) -> String {
    let other = id / 20;
    match id % 20 {
        // Equal stems in several folders, and folders with dots.
        0 => format!("a/{other}"),
        1 => format!("b.5/{other}"),
        2 => format!("b/5/{other}"),
        // One sample with two pictures by the convention, two samples by their names.
        3 => format!("dots/{other}_0.5"),
        4 => format!("dots/{other}_0.7"),
        // The only one with its key, though it has a dot.
        5 => format!("dot/{other}_0.25"),
        6 => format!("dot/{other}"),
        // Gaps: neighbours of the same folder have no text, or no picture.
        7 => format!("gap/{other}"),
        8 => format!("gap/{other}a"),
        13 => format!("gap/{other}b"),
        // Letters of another case, one name the start of another.
        9 => format!("case/X{other}"),
        10 => format!("case/x{other}"),
        11 => format!("start/{other}"),
        12 => format!("start/{other}0_"),
        14 => format!("long/{}/{other}", "n".repeat(120)),
        15 => format!("long/{}/{other}_", "n".repeat(120)),
        16 => format!("accent/\u{e9}{other}"),
        17 => format!("accent/e\u{301}{other}"),
        other_kind => format!("{other_kind}/{other}"),
    }
}

fn caption(id: u64) -> String {
    format!("picture {id}")
}

/// The files of row `id`.
fn files(id: u64) -> Vec<Member> {
    let (has, stem) = (has(id), stem(id));
    let mut files = Vec::new();
    if has != Has::TextOnly {
        files.push((format!("{stem}.png"), picture(id)));
    }
    if has != Has::PictureOnly {
        files.push((format!("{stem}.txt"), caption(id).into_bytes()));
    }
    files
}

/// Members in another order for each shard: as they are, backwards, pictures first, scattered.
fn ordered(shard: u64, mut members: Vec<Member>) -> Vec<Member> {
    match shard % 4 {
        0 => {}
        1 => members.reverse(),
        2 => members.sort_by_key(|(name, _)| name.ends_with(".txt")),
        _ => members.sort_by_key(|(name, _)| blake3::hash(name.as_bytes()).to_string()),
    }
    members
}

/// The first rows of the shards.
fn shards() -> impl Iterator<Item = (u64, std::ops::Range<u64>)> {
    let all = num_rows();
    let starts = (0..all).step_by(ROWS_A_SHARD as usize);
    (0..).zip(starts.map(move |start| start..(start + ROWS_A_SHARD).min(all)))
}

/// What a listing must have of a row.
struct Expected {
    address: String,
    is_listed: bool,
    has_text: bool,
}

/// As [`check_pairs`]; what is no sample must be named.
fn check(place: &Path, kind: SourceKind, expected: impl Fn(u64) -> Expected) {
    let source = check_pairs(place, kind, &expected);
    let num_named = (0..num_rows())
        .filter(|&id| !expected(id).is_listed)
        .count();
    assert!(
        source.remarks().len() >= num_named,
        "{}",
        source.remarks().len()
    );
}

/// Opens every sample of a source and compares its pixels with its address and its text.
fn check_pairs(place: &Path, kind: SourceKind, expected: impl Fn(u64) -> Expected) -> Source {
    let out = tempfile::tempdir().unwrap();
    let source = Source::list(place, out.path(), kind, Reading::default()).unwrap();
    let (mut num_wrong, mut num_right) = (0, 0);
    for sample in source.samples() {
        let id = id_of(&source.open(sample).unwrap());
        let expected = expected(id);
        let text = source.text(sample).text;
        let texts = text.map_or_else(Vec::new, |text| text.captions);
        let right = match expected.has_text {
            true => vec![caption(id)],
            false => Vec::new(),
        };
        let is_right = expected.is_listed && sample.address() == expected.address && texts == right;
        if !is_right && num_wrong < 5 {
            eprintln!(
                "row {id}, {:?}: {} has {texts:?}",
                has(id),
                sample.address()
            );
        }
        num_wrong += u64::from(!is_right);
        num_right += u64::from(is_right);
    }
    let num_expected = (0..num_rows()).filter(|&id| expected(id).is_listed).count() as u64;
    eprintln!("{kind:?}: {num_wrong} wrong pairs, {num_right} right of {num_expected}");
    assert_eq!((num_wrong, num_right), (0, num_expected));
    source
}

/// Of a tar, row `id`: joined ones are refused.
fn in_tar(id: u64) -> Expected {
    let shard = id / ROWS_A_SHARD;
    Expected {
        address: format!("{shard:05}.tar/{}.png", stem(id)),
        is_listed: matches!(has(id), Has::Both | Has::PictureOnly),
        has_text: has(id) == Has::Both,
    }
}

#[test]
fn a_folder_pairs_by_names() {
    let folder = tempfile::tempdir().unwrap();
    // A file takes a block of the disk: of many rows most texts stand in tables, those of kohya's
    // scripts by turns with metadata.jsonl.
    let in_files = (num_rows() / 2).min(20_000);
    let mut table = Vec::new();
    let mut kohya = serde_json::Map::new();
    for id in 0..num_rows() {
        for (name, bytes) in files(id) {
            let path = folder.path().join(&name);
            if id < 20 {
                fs::create_dir_all(path.parent().unwrap()).unwrap();
            }
            if id < in_files || name.ends_with(".png") {
                fs::write(path, bytes).unwrap();
            } else {
                let text = String::from_utf8(bytes).unwrap();
                let name = format!("{}.png", stem(id));
                if id % 2 == 0 {
                    writeln!(table, r#"{{"file_name": {name:?}, "text": {text:?}}}"#).unwrap();
                } else {
                    let key = folder.path().join(name).display().to_string();
                    kohya.insert(key, serde_json::json!({ "caption": text }));
                }
            }
        }
    }
    let kohya = serde_json::to_vec(&kohya).unwrap();
    fs::write(folder.path().join("meta_cap.json"), kohya).unwrap();
    fs::write(folder.path().join("metadata.jsonl"), table).unwrap();
    check(folder.path(), SourceKind::Auto, |id| Expected {
        address: format!("{}.png", stem(id)),
        is_listed: has(id) != Has::TextOnly,
        has_text: has(id) != Has::PictureOnly,
    });
}

/// The hash of post `id`: 32 digits that share their beginnings with others'.
fn md5(id: u64) -> String {
    format!(
        "{:08x}{:024x}",
        id % 16,
        u128::from(id) * 0x9e37_79b9_7f4a_7c15
    )
}

/// The name of the picture of post `id`, whose number has those of others in it.
fn post_name(id: u64) -> String {
    let number = 1000 + id;
    match id % 4 {
        0 => format!("{:03}/{number}.png", id % 100),
        1 => format!("danbooru_{number}_{}.png", md5(id)),
        2 => format!("__title_{}__{}.png", number + 4, md5(id)),
        _ => format!("md5/{}.png", md5(id)),
    }
}

#[test]
fn a_table_of_an_image_board_pairs_by_numbers_and_hashes() {
    let folder = tempfile::tempdir().unwrap();
    let mut table = Vec::new();
    // The rows are in the other order.
    for id in (0..num_rows()).rev() {
        if has(id) != Has::TextOnly {
            let path = folder.path().join(post_name(id));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, picture(id)).unwrap();
        }
        if has(id) != Has::PictureOnly {
            let row = serde_json::json!({
                "id": 1000 + id,
                "md5": md5(id),
                "tag_string_general": format!("tag_{id} 1girl"),
                "rating": "g",
                "score": id % 9,
                "caption": caption(id),
            });
            writeln!(table, "{row}").unwrap();
        }
    }
    fs::write(folder.path().join("posts.jsonl"), table).unwrap();
    check_pairs(folder.path(), SourceKind::Auto, |id| Expected {
        address: post_name(id),
        is_listed: has(id) != Has::TextOnly,
        has_text: has(id) != Has::PictureOnly,
    });
}

#[test]
fn a_webdataset_pairs_by_keys_in_any_order() {
    let folder = tempfile::tempdir().unwrap();
    for (shard, rows) in shards() {
        let members = ordered(shard, rows.flat_map(files).collect());
        write_tar(&folder.path().join(format!("{shard:05}.tar")), members);
    }
    check(folder.path(), SourceKind::WebDataset, in_tar);
}

#[test]
fn tars_with_an_index_pair_by_keys() {
    let folder = tempfile::tempdir().unwrap();
    for (shard, rows) in shards() {
        let members = ordered(shard + 1, rows.flat_map(files).collect());
        let path = folder.path().join(format!("{shard:05}.tar"));
        write_tar(&path, members);
        write_index(&path, if shard % 2 == 0 { "size" } else { "length" });
    }
    check(folder.path(), SourceKind::Auto, in_tar);
}

/// The rows with a picture.
fn rows(ids: std::ops::Range<u64>) -> impl Iterator<Item = Row> {
    ids.map(|id| Row {
        bytes: Some(picture(id)),
        path: Some(format!("{}.png", stem(id % 7))),
        text: (has(id) != Has::PictureOnly).then(|| caption(id)),
    })
}

#[test]
fn parquet_pairs_by_rows() {
    let folder = tempfile::tempdir().unwrap();
    for (shard, ids) in shards() {
        let path = folder.path().join(format!("part-{shard:05}.parquet"));
        write_parquet(&path, rows(ids), 300 + shard as usize);
    }
    check(folder.path(), SourceKind::Auto, |id| Expected {
        address: format!(
            "part-{:05}.parquet#{}",
            id / ROWS_A_SHARD,
            id % ROWS_A_SHARD
        ),
        is_listed: true,
        has_text: has(id) != Has::PictureOnly,
    });
}

#[test]
fn mds_pairs_by_rows() {
    let folder = tempfile::tempdir().unwrap();
    write_mds(folder.path(), rows(0..num_rows()), ROWS_A_SHARD as usize);
    check(folder.path(), SourceKind::Auto, |id| Expected {
        address: format!("shard.{:05}.mds#{}", id / ROWS_A_SHARD, id % ROWS_A_SHARD),
        is_listed: true,
        has_text: has(id) != Has::PictureOnly,
    });
}
