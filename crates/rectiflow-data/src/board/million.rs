//! A million posts in Parquet, each with a picture: a measurement of time and memory, run by hand.
//!
//! `cargo nextest run --release -p rectiflow-data --run-ignored only --no-capture million`

use std::{fs, fs::File, io::Write, path::Path, sync::Arc};

use parquet::{
    basic::Compression,
    data_type::{ByteArray, ByteArrayType, Int64Type},
    file::{properties::WriterProperties, writer::SerializedFileWriter},
    schema::parser::parse_message_type,
};

use crate::{
    board::{Board, TableFile, classes::TagSettings},
    rng::{Purpose, Rng},
    text::caption::Reading,
};

const NUM_ROWS: i64 = 1_000_000;
const ROWS_OF_GROUP: i64 = 100_000;
/// Largest memory of the process, 1 GB.
const MOST_KIB: u64 = 1_000_000_000 / 1024;
const TEXTS: [&str; 7] = [
    "md5",
    "rating",
    "tag_string_general",
    "tag_string_character",
    "tag_string_copyright",
    "tag_string_artist",
    "tag_string_meta",
];

/// A text of a post: as many words as the tags of a post of Danbooru have on average.
fn text(name: &str, id: i64, rng: &mut Rng) -> String {
    let num_words = match name {
        "md5" => return format!("{:032x}", u128::from(rng.below(1 << 60)) << 64 | id as u128),
        "rating" => return ["g", "s", "q", "e"][rng.below(4) as usize].to_owned(),
        "tag_string_general" => 30,
        _ => 2,
    };
    let mut words = Vec::new();
    for _ in 0..num_words {
        words.push(format!("{name}_tag_{}", rng.below(20_000)));
    }
    words.join(" ").replace("tag_string_", "")
}

fn write(path: &Path) {
    let mut schema = "message m { required int64 id; required int64 score; ".to_owned();
    for name in TEXTS {
        schema += &format!("required binary {name} (UTF8); ");
    }
    let schema = Arc::new(parse_message_type(&(schema + "}")).unwrap());
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY);
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties.build())).unwrap();
    let mut rng = Rng::keyed(7, Purpose::Prompt, &[]);
    for start in (0..NUM_ROWS).step_by(ROWS_OF_GROUP as usize) {
        let ids: Vec<i64> = (start..start + ROWS_OF_GROUP).collect();
        let mut group = writer.next_row_group().unwrap();
        for _ in ["id", "score"] {
            let mut column = group.next_column().unwrap().unwrap();
            let typed = column.typed::<Int64Type>();
            typed.write_batch(&ids, None, None).unwrap();
            column.close().unwrap();
        }
        for name in TEXTS {
            let mut values = Vec::new();
            for &id in &ids {
                values.push(ByteArray::from(text(name, id, &mut rng).as_str()));
            }
            let mut column = group.next_column().unwrap().unwrap();
            let typed = column.typed::<ByteArrayType>();
            typed.write_batch(&values, None, None).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.close().unwrap();
}

/// The largest memory that the process had, in KiB.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let digits = line.unwrap().split_whitespace().nth(1).unwrap();
    digits.parse().unwrap()
}

#[test]
#[ignore = "a minute, and 1 GB of disk: a measurement"]
fn a_million_posts_find_their_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("posts.parquet");
    write(&path);
    let start = std::time::Instant::now();
    let before_kib = peak_kib();
    let file = TableFile {
        path,
        shown: "posts.parquet".to_owned(),
        folder: String::new(),
        scope: String::new(),
        is_named: true,
    };
    let mut board = Board::open(vec![file], &TagSettings::default(), &mut Vec::new()).unwrap();
    let listed_secs = start.elapsed().as_secs_f64();
    let names: Vec<String> = (0..NUM_ROWS).map(|id| format!("{id}.jpg")).collect();
    let work = folder.path().join("work");
    board
        .join(names.iter().map(String::as_str), &[], &work)
        .unwrap();
    let joined_secs = start.elapsed().as_secs_f64();
    let mut num_tags = 0;
    for name in &names {
        let post = board.post(name).unwrap().unwrap();
        num_tags += board.text(&post, &Reading::default()).tags.len();
    }
    let secs = start.elapsed().as_secs_f64();
    let peak_kib = peak_kib();
    let report = format!(
        "{NUM_ROWS} rows: keys {listed_secs:.1} s, texts kept after {joined_secs:.1} s, {num_tags} \
         tags read after {secs:.1} s; peak memory {peak_kib} KiB, {before_kib} before"
    );
    writeln!(std::io::stderr(), "{report}").unwrap();
    assert_eq!(board.count().tables[0].with_picture, NUM_ROWS as u64);
    assert_eq!(num_tags, 30 * NUM_ROWS as usize);
    assert!(peak_kib <= MOST_KIB, "{report}");
}
