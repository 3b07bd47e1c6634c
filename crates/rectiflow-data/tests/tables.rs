//! Tables of image boards: which row is about which picture, what becomes of its columns, and what
//! a filter removes. The tables are written by the libraries that read them.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod small_preparation;

use std::{collections::BTreeMap, fs, io::Cursor, path::Path, sync::Arc};

use image::{ImageFormat, Rgb, RgbImage};
use parquet::{
    data_type::{ByteArray, ByteArrayType, Int64Type},
    file::{properties::WriterProperties, writer::SerializedFileWriter},
    schema::parser::parse_message_type,
};
use rectiflow_data::{
    Dataset, Error, PrepSettings, PrepSummary, Record, RgbBatch, Split,
    classes::{Place, TagSettings},
    prepare,
    reject::Reason,
};
use rusqlite::Connection;
use serde_json::{Value, json};
use small_preparation::{codec, settings, zeros};
use tempfile::TempDir;

const HASH_1: &str = "0123456789abcdef0123456789abcdef";
const HASH_2: &str = "fedcba9876543210fedcba9876543210";

fn filtered(filter: &str) -> PrepSettings {
    PrepSettings {
        filter: filter.to_owned(),
        ..settings()
    }
}

fn named(tables: &[&str]) -> PrepSettings {
    PrepSettings {
        tables: tables.iter().map(|&table| table.to_owned()).collect(),
        ..settings()
    }
}

/// A folder with pictures and tables.
struct Folder {
    source: TempDir,
    out: TempDir,
}

impl Folder {
    /// A folder with a picture of each name.
    fn with(pictures: &[&str]) -> Self {
        let folder = Self {
            source: tempfile::tempdir().unwrap(),
            out: tempfile::tempdir().unwrap(),
        };
        for (number, name) in (0..).zip(pictures) {
            folder.write(name, &picture(number, 64, 64));
        }
        folder
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.source.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn try_prepare(&self, settings: &PrepSettings) -> Result<PrepSummary, Error> {
        let mut encode = |batch: &RgbBatch| Ok(zeros(batch));
        let (source, out) = (self.source.path(), self.out.path());
        prepare(source, out, settings, &codec(), &mut encode, &mut |_| {})
    }

    fn prepare(&self, settings: &PrepSettings) -> PrepSummary {
        self.try_prepare(settings).unwrap()
    }

    /// The message of a preparation that fails.
    fn failure(&self, settings: &PrepSettings) -> String {
        self.try_prepare(settings).unwrap_err().to_string()
    }

    /// The records by their pictures' names.
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

    fn rejected(&self) -> String {
        fs::read_to_string(self.out.path().join("rejected.jsonl")).unwrap()
    }
}

fn picture(number: u8, width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    RgbImage::from_pixel(width, height, Rgb([number, 7, 7]))
        .write_to(&mut bytes, ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

/// A post with the columns of Danbooru.
fn post(id: i64, rating: &str, score: i64, general: &str) -> Value {
    json!({
        "id": id,
        "md5": format!("{id:032x}"),
        "rating": rating,
        "score": score,
        "tag_string_general": general,
        "tag_string_artist": "some_artist",
        "is_deleted": false,
    })
}

fn lines(rows: &[Value]) -> Vec<u8> {
    let mut text = String::new();
    for row in rows {
        text += &format!("{row}\n");
    }
    text.into_bytes()
}

/// A Parquet file with two row groups of these posts. Null where a post has no such text.
fn parquet(rows: &[Value]) -> Vec<u8> {
    let texts = ["md5", "rating", "tag_string_general", "tag_string_artist"];
    let mut schema = "message m { required int64 id; required int64 score; ".to_owned();
    for name in texts {
        schema += &format!("optional binary {name} (UTF8); ");
    }
    let schema = Arc::new(parse_message_type(&(schema + "}")).unwrap());
    let properties = Arc::new(WriterProperties::builder().build());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, properties).unwrap();
    for rows in rows.chunks(rows.len().div_ceil(2).max(1)) {
        let mut group = writer.next_row_group().unwrap();
        for name in ["id", "score"] {
            let values: Vec<i64> = rows.iter().map(|row| row[name].as_i64().unwrap()).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column
                .typed::<Int64Type>()
                .write_batch(&values, None, None)
                .unwrap();
            column.close().unwrap();
        }
        for name in texts {
            let values = rows.iter().filter_map(|row| row[name].as_str());
            let values: Vec<ByteArray> = values.map(ByteArray::from).collect();
            let levels: Vec<i16> = rows
                .iter()
                .map(|row| i16::from(row[name].is_string()))
                .collect();
            let mut column = group.next_column().unwrap().unwrap();
            column
                .typed::<ByteArrayType>()
                .write_batch(&values, Some(&levels), None)
                .unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.into_inner().unwrap()
}

/// A CSV file with these posts, and a column whose values have commas and lines.
fn csv(rows: &[Value]) -> Vec<u8> {
    let mut text = "id,md5,description,rating,score,is_deleted,tag_string_general,\
                    tag_string_artist\n"
        .to_owned();
    for row in rows {
        let cell = |name: &str| row[name].to_string().replace('"', "");
        text += &format!("{},{},\"a, \"\"b\"\"\nc\",", cell("id"), cell("md5"));
        text += &format!("{},{},f,", cell("rating"), cell("score"));
        text += &format!(
            "{},{}\n",
            cell("tag_string_general"),
            cell("tag_string_artist")
        );
    }
    text.into_bytes()
}

/// An SQLite file with these posts, an index on their hashes, and a table of something else.
fn sqlite(path: &Path, rows: &[Value]) {
    let connection = Connection::open(path).unwrap();
    connection
        .execute_batch(
            "CREATE TABLE tags (id INTEGER, name TEXT);
             CREATE TABLE posts (id INTEGER, md5 TEXT, rating TEXT, score INTEGER,
                tag_string_general TEXT, tag_string_artist TEXT, is_deleted BOOLEAN);
             CREATE INDEX by_md5 ON posts (md5, id, score, rating);",
        )
        .unwrap();
    for row in rows {
        let text = |name: &str| row[name].as_str().map(str::to_owned);
        connection
            .execute(
                "INSERT INTO posts VALUES (?1, ?2, ?3, ?4, ?5, ?6, 0)",
                rusqlite::params![
                    row["id"].as_i64(),
                    text("md5"),
                    text("rating"),
                    row["score"].as_i64(),
                    text("tag_string_general"),
                    text("tag_string_artist"),
                ],
            )
            .unwrap();
    }
}

/// Posts whose hashes are in another order than their rows.
fn posts() -> Vec<Value> {
    let mut rows = vec![
        post(7, "g", 3, "1girl long_hair ^_^"),
        post(5, "s", 9, "comic &lt;3"),
        post(6, "q", 1, "solo"),
    ];
    rows[0]["md5"] = HASH_2.into();
    rows[1]["md5"] = HASH_1.into();
    rows
}

#[test]
fn tables_of_every_format_say_the_same() {
    let pictures = ["0007/7.png", "danbooru_5.png", "a.txt.png"];
    for name in [
        "posts.parquet",
        "posts.sqlite",
        "posts.db",
        "posts.jsonl",
        "posts.csv",
    ] {
        let folder = Folder::with(&pictures);
        folder.write("a.txt.txt", b"a fox");
        if name.ends_with("parquet") {
            folder.write(name, &parquet(&posts()));
        } else if name.ends_with("jsonl") {
            folder.write(name, &lines(&posts()));
        } else if name.ends_with("csv") {
            folder.write(name, &csv(&posts()));
        } else {
            sqlite(&folder.source.path().join(name), &posts());
        }
        let summary = folder.prepare(&filtered("not score > 10"));
        let records = folder.records();
        assert_eq!(records.len(), 3, "{name}: {}", folder.rejected());
        let record = &records["0007/7.png"];
        assert_eq!(record.tags, ["1girl", "long hair", "^_^"]);
        assert_eq!(record.important_tags, ["some artist", "safe"]);
        assert_eq!(record.quality, ["normal quality"]);
        let record = &records["danbooru_5.png"];
        assert_eq!(record.tags, ["comic", "<3"]);
        assert_eq!(record.important_tags, ["some artist", "sensitive"]);
        assert_eq!(record.quality, ["good quality"]);
        assert_eq!(records["a.txt.png"].captions, ["a fox"]);

        // Nothing is lost: what has no partner is counted and named.
        let boards = summary.boards.unwrap();
        let table = &boards.tables[0];
        assert_eq!((table.path.as_str(), table.rows), (name, 3));
        assert_eq!((table.with_picture, table.without_picture.count), (2, 1));
        let lost = &table.without_picture.examples;
        assert!(
            lost[0].starts_with(&format!("{name}:3 (id 6, md5 ")),
            "{lost:?}"
        );
        assert_eq!(boards.without_row.examples, ["a.txt.png"]);
        assert!(folder.rejected().is_empty());
    }
}

#[test]
fn pictures_are_found_by_hash_and_by_file_name() {
    let by_hash = format!("ab/{HASH_2}.png");
    let both = format!("danbooru_5_{HASH_1}.png");
    let wrong = format!("danbooru_6_{HASH_1}.png");
    let folder = Folder::with(&[&by_hash, &both, &wrong, "sub/x.png"]);
    folder.write("posts.jsonl", &lines(&posts()));
    let row = json!({"file_name": "x.png", "tag_string": "from_name", "rating": "e"});
    folder.write("sub/named.jsonl", &lines(&[row]));
    let summary = folder.prepare(&named(&["posts.jsonl", "sub/named.jsonl"]));
    let records = folder.records();
    assert_eq!(records[&by_hash].tags, ["1girl", "long hair", "^_^"]);
    assert_eq!(records[&both].tags, ["comic", "<3"]);
    assert_eq!(records["sub/x.png"].tags, ["from name"]);
    assert_eq!(records["sub/x.png"].important_tags, ["explicit"]);

    // The row of neither its id nor its hash.
    assert!(!records.contains_key(&wrong));
    let boards = summary.boards.unwrap();
    assert_eq!(boards.contradictory.examples, [wrong.as_str()]);
    assert!(
        folder
            .rejected()
            .contains("no row of posts.jsonl, sub/named.jsonl has its id")
    );
}

#[test]
fn the_first_of_equal_keys_wins_and_the_nearest_table() {
    let folder = Folder::with(&["1.png", "sub/1.png", "sub/2.png"]);
    let rows = [
        post(1, "g", 1, "first"),
        post(1, "g", 1, "second"),
        post(2, "g", 1, "two"),
    ];
    folder.write("posts.jsonl", &lines(&rows));
    folder.write("sub/posts.jsonl", &lines(&[post(1, "g", 1, "near")]));
    let summary = folder.prepare(&settings());
    let records = folder.records();
    assert_eq!(records["1.png"].tags, ["first"]);
    assert_eq!(records["sub/1.png"].tags, ["near"]);
    assert_eq!(records["sub/2.png"].tags, ["two"]);
    let tables = summary.boards.unwrap().tables;
    let table = tables.iter().find(|table| table.path == "posts.jsonl");
    let table = table.unwrap();
    assert_eq!(table.repeated.count, 1);
    let repeated = &table.repeated.examples[0];
    assert_eq!(repeated, "posts.jsonl:2 has the key of posts.jsonl:1");
    assert_eq!(
        (table.rows, table.with_picture, table.without_picture.count),
        (3, 2, 0)
    );
}

#[test]
fn e621_has_other_classes_and_ratings() {
    let folder = Folder::with(&["e621_9.png", "10.png"]);
    let row = json!({
        "id": 9, "rating": "s", "score": {"up": 5, "down": -1, "total": 4},
        "file": {"md5": HASH_1, "width": 64}, "is_deleted": false,
        "tags": {
            "general": ["solo", "red_fur"], "species": ["fox"], "invalid": ["x"],
            "artist": ["conditional_dnp", "a_b"], "lore": ["male_(lore)"], "copyright": [],
        },
    });
    folder.write(
        "posts.jsonl",
        &lines(&[
            row,
            json!({"id": 10, "rating": "e", "score": {"total": -2}}),
        ]),
    );
    let settings = PrepSettings {
        filter: "score > 0 and score.up >= 5 and tag:male_(lore)".to_owned(),
        ..settings()
    };
    let summary = folder.prepare(&settings);
    let record = &folder.records()["e621_9.png"];
    assert_eq!(record.tags, ["fox", "solo", "red fur"]);
    assert_eq!(record.important_tags, ["a b", "safe"]);
    assert!(summary.boards.unwrap().tables[0].s_is_safe);
    assert_eq!(summary.filter[0].removed.examples, ["10.png"]);
}

#[test]
fn classes_go_where_the_settings_say() {
    let folder = Folder::with(&["7.png", "5.png"]);
    folder.write("posts.jsonl", &lines(&posts()));
    let settings = PrepSettings {
        tags: TagSettings {
            general: Place::Caption,
            rating: Place::Nothing,
            score_words: BTreeMap::from([("liked".to_owned(), 50.0)]),
            keep_underscores: true,
            ..TagSettings::default()
        },
        ..settings()
    };
    folder.prepare(&settings);
    let records = folder.records();
    assert_eq!(records["7.png"].captions, ["1girl, long_hair, ^_^"]);
    assert_eq!(records["7.png"].important_tags, ["some_artist"]);
    assert!(records["7.png"].quality.is_empty());
    assert_eq!(records["5.png"].quality, ["liked"]);
}

#[test]
fn text_beside_a_picture_complements_its_row() {
    let folder = Folder::with(&["7.png", "5.png"]);
    folder.write("posts.jsonl", &lines(&posts()));
    folder.write("7.txt", b"A girl smiles.");
    folder.write("5.tags", b"other");
    folder.prepare(&settings());
    let records = folder.records();
    assert_eq!(records["7.png"].captions, ["A girl smiles."]);
    assert_eq!(records["7.png"].tags, ["1girl", "long hair", "^_^"]);
    assert_eq!(records["5.png"].tags, ["other"]);
    assert!(folder.rejected().contains("second_caption"));
}

#[test]
fn a_filter_removes_by_clause_and_can_be_taken_back() {
    let pictures: Vec<String> = (100..140).map(|id| format!("{id}.png")).collect();
    let names: Vec<&str> = pictures.iter().map(String::as_str).collect();
    let folder = Folder::with(&names);
    folder.write("small.png", &picture(200, 32, 32));
    folder.write("small.txt", b"a fox");
    let mut rows = Vec::new();
    for id in 100..140 {
        let rating = if id < 105 { "s" } else { "e" };
        let tags = if id == 100 { "comic solo" } else { "solo" };
        rows.push(post(id, rating, id - 100, tags));
    }
    folder.write("posts.parquet", &parquet(&rows));
    let settings =
        filtered("width*height >= 4096 and rating in [g, s] and not tag:comic and score >= 2");
    let summary = folder.prepare(&settings);
    let kept: Vec<String> = folder.records().into_keys().collect();
    assert_eq!(kept, ["102.png", "103.png", "104.png"]);
    let removed: Vec<(&str, u64)> = summary
        .filter
        .iter()
        .map(|clause| (clause.clause.as_str(), clause.removed.count))
        .collect();
    let expected = [
        ("width*height >= 4096", 1),
        ("rating in [g, s]", 35),
        ("not tag:comic", 1),
        ("score >= 2", 1),
    ];
    assert_eq!(removed, expected);
    assert_eq!(
        summary.filter[1].removed.examples,
        ["105.png", "106.png", "107.png"]
    );

    // All are counted, the first twenty of a clause are listed.
    assert_eq!(summary.rejected[&Reason::Filtered], 38);
    assert_eq!(folder.rejected().lines().count(), 23);

    // What the filter keeps again is not lost.
    let summary = folder.prepare(&filtered(""));
    assert_eq!(summary.train_rows, 41);
    assert_eq!(summary.written_rows, 38);
    assert!(!summary.rejected.contains_key(&Reason::Filtered));
    let summary = folder.prepare(&settings);
    assert_eq!((summary.train_rows, summary.written_rows), (3, 0));
}

#[test]
fn a_filter_needs_no_table() {
    let folder = Folder::with(&["a.png", "b.png"]);
    folder.write("a.tags", b"solo, long hair");
    folder.write("b.txt", b"a fox");
    let summary = folder.prepare(&filtered("tag:long_hair and num_tags = 2 and width >= 64"));
    assert_eq!(summary.train_rows, 1);
    assert_eq!(summary.filter[0].removed.count, 1);
    assert_eq!(summary.boards, None);
    let message = folder.failure(&filtered("score > 5"));
    let expected = "prep.filter: there is no column \"score\"; the columns are height, num_tags, \
                    width";
    assert_eq!(message, expected);
}

#[test]
fn filters_and_settings_that_cannot_work_are_named() {
    let folder = Folder::with(&["7.png"]);
    folder.write("posts.parquet", &parquet(&posts()));
    for (settings, parts) in [
        (
            filtered("scroe > 5"),
            ["no column \"scroe\"", "is score meant?"],
        ),
        (
            filtered("score >"),
            ["prep.filter: character 8", "found the end"],
        ),
        (
            filtered("score = high"),
            ["column score is a number", "there is no column \"high\""],
        ),
        (
            named(&["post.parquet"]),
            ["prep.tables, post.parquet", "does not exist"],
        ),
        (
            named(&["7.png"]),
            ["prep.tables, 7.png", "expected Parquet, SQLite, JSON lines"],
        ),
        (named(&["."]), ["prep.tables, .", "it is a folder"]),
    ] {
        let message = folder.failure(&settings);
        for part in parts {
            assert!(message.contains(part), "{message}");
        }
    }
}

#[test]
fn bad_tables_are_named_and_what_can_be_read_is() {
    let no_key = {
        let mut bytes = lines(&[json!({"rating": "g", "score": 1, "tag_string": "a"})]);
        bytes.extend(b"not json\n");
        bytes
    };
    let mut cut = parquet(&posts());
    let len = cut.len();
    cut.drain(len / 2..len / 2 + 40);
    let empty = parquet(&[]);
    for (name, bytes, part) in [
        (
            "a.jsonl",
            &no_key[..],
            "none of its 2 rows can be used: row 1: it has no id, md5",
        ),
        ("a.parquet", &empty[..], "it has no rows"),
        ("b.parquet", &cut[..], "not a Parquet file that can be read"),
        (
            "c.parquet",
            &b"PAR1"[..],
            "not a Parquet file that can be read",
        ),
        (
            "a.sqlite",
            &b"SQLite format 3\0 and no more"[..],
            "not an SQLite file that can be read",
        ),
        ("b.jsonl", &b""[..], "its first bytes are of none of them"),
    ] {
        let folder = Folder::with(&["7.png"]);
        folder.write("7.txt", b"a fox");
        folder.write(name, bytes);
        let message = folder.failure(&named(&[name]));
        assert!(
            message.contains(&format!("prep.tables, {name}")),
            "{message}"
        );
        assert!(message.contains(part), "{name}: {message}");

        // A table that nobody names ends no preparation.
        let summary = folder.prepare(&settings());
        assert_eq!(summary.train_rows, 1, "{name}");
        assert!(
            folder.rejected().contains(name),
            "{name}: {}",
            folder.rejected()
        );
    }
}

#[test]
fn damaged_sqlite_files_lose_no_picture() {
    let folder = Folder::with(&["7.png"]);
    folder.write("7.txt", b"a fox");
    let path = folder.source.path().join("posts.sqlite");
    let rows: Vec<Value> = (0..500)
        .map(|id| post(id, "g", id, &"tag ".repeat(30)))
        .collect();
    sqlite(&path, &rows);
    let mut bytes = fs::read(&path).unwrap();
    let half = bytes.len() / 2;
    bytes[half..].fill(0xa5);
    fs::write(&path, bytes).unwrap();
    let message = folder.failure(&named(&["posts.sqlite"]));
    assert!(message.contains("malformed"), "{message}");
    let summary = folder.prepare(&settings());
    assert_eq!(summary.train_rows, 1);
    assert!(folder.rejected().contains("malformed"));
}

#[test]
fn tables_of_other_shapes_are_named() {
    let folder = Folder::with(&["7.png"]);
    folder.write("7.txt", b"a fox");
    let path = folder.source.path().join("other.sqlite");
    let connection = Connection::open(&path).unwrap();
    connection
        .execute_batch("CREATE TABLE notes (body TEXT); CREATE TABLE a (id INTEGER, x TEXT);")
        .unwrap();
    folder.prepare(&settings());
    let rejected = folder.rejected();
    assert!(
        rejected.contains("none of its tables has posts"),
        "{rejected}"
    );
    assert!(rejected.contains("a (id, x); notes (body)"), "{rejected}");

    connection
        .execute_batch(
            "CREATE TABLE p (id INTEGER, tag_string TEXT); CREATE TABLE q AS SELECT * FROM p;",
        )
        .unwrap();
    let message = folder.failure(&named(&["other.sqlite"]));
    assert!(
        message.contains("several of its tables could have posts, p, q"),
        "{message}"
    );
}

#[test]
fn unusable_rows_are_counted_and_the_others_read() {
    let folder = Folder::with(&["7.png"]);
    let mut bytes = b"\xef\xbb\xbf".to_vec();
    bytes.extend(lines(&posts()));
    bytes.extend(b"\n{\"id\": \n{\"id\": -4}\n[7]\n");
    folder.write("posts.jsonl", &bytes);
    let summary = folder.prepare(&settings());
    let table = &summary.boards.unwrap().tables[0];
    assert_eq!((table.rows, table.with_picture), (6, 1));
    assert_eq!((table.without_picture.count, table.unusable.count), (2, 3));
    assert!(table.unusable.examples[0].starts_with("row 5: "));
    assert!(table.unusable.examples[1].contains("row 6: it has no id, md5 or file name"));
}
