//! Sources at a URL: the same samples and texts as from a disk, through faults that heal, and an
//! error where a listing would be incomplete.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod object_server;
mod written;

use std::{fs, path::Path};

use object_server::{Fault, ObjectServer, Request};
use rectiflow_data::{Error, Source, caption::Reading, choice::SourceKind};
use written::{Member, Row, id_of, picture, write_index, write_mds, write_parquet, write_tar};

fn list(place: impl AsRef<Path>, kind: SourceKind) -> Result<Source, Error> {
    let out = tempfile::tempdir().unwrap();
    Source::list(place.as_ref(), out.path(), kind, Reading::default())
}

/// Address, number in the pixels and captions of each sample.
fn contents(source: &Source) -> Vec<(String, u64, Vec<String>)> {
    let mut contents = Vec::new();
    for sample in source.samples() {
        let id = id_of(&source.open(sample).unwrap());
        let text = source.text(sample).text.unwrap_or_default();
        contents.push((sample.address().to_owned(), id, text.captions));
    }
    contents
}

/// Three pictures with texts, the texts behind the pictures.
fn members(first: u64) -> Vec<Member> {
    let ids = first..first + 3;
    let pictures = ids.clone().map(|id| (format!("p/{id}.png"), picture(id)));
    let texts = ids.map(|id| (format!("p/{id}.txt"), format!("picture {id}").into_bytes()));
    pictures.chain(texts).collect()
}

fn rows(num: u64) -> impl Iterator<Item = Row> {
    (0..num).map(|id| Row::new(picture(id), &format!("row {id}")))
}

/// Writes a source of each kind: `plain`, `indexed`, `rows` and `mds`.
fn write_all(root: &Path) {
    for shard in 0..3 {
        write_tar(
            &root.join(format!("plain/{shard:02}.tar")),
            members(10 * shard),
        );
        let path = root.join(format!("indexed/{shard:02}.tar"));
        write_tar(&path, members(10 * shard));
        write_index(&path, "size");
    }
    write_parquet(&root.join("rows/0.parquet"), rows(100), 40);
    write_mds(&root.join("mds"), rows(40), 20);
}

/// Places on the disk and below a URL, with the number of their samples.
const PLACES: [(&str, &str, usize); 4] = [
    ("plain", "plain/{00..02}.tar", 9),
    ("indexed", "indexed/{00..02}.tar", 9),
    ("rows", "rows/0.parquet", 100),
    ("mds", "mds", 40),
];

#[test]
fn named_files_at_a_url_are_read_as_from_a_disk() {
    let root = tempfile::tempdir().unwrap();
    write_all(root.path());
    // The first answer to each fourth request is busy, cut or late.
    let faults = |request: &Request| {
        if request.repeat > 0 || request.method != "GET" {
            return None;
        }
        match request.number % 8 {
            3 => Some(Fault::Status(503)),
            7 => Some(Fault::Cut(100)),
            _ => None,
        }
    };
    let server = ObjectServer::start(root.path(), faults);
    for (folder, url, num) in PLACES {
        let local = contents(&list(root.path().join(folder), SourceKind::Auto).unwrap());
        assert_eq!(local.len(), num);
        let far = list(format!("{}/{url}", server.url()), SourceKind::Auto).unwrap();
        assert!(far.remarks().is_empty(), "{:?}", far.remarks());
        assert_eq!(contents(&far), local, "{folder}");
    }
}

#[test]
fn an_index_saves_the_requests_of_a_listing() {
    let root = tempfile::tempdir().unwrap();
    // Pictures of more than a block of the cache, so that no two headers come with one request.
    let members: Vec<Member> = (0..20)
        .map(|id| {
            (
                format!("{id}.png"),
                [picture(id), vec![0; 200_000]].concat(),
            )
        })
        .collect();
    for name in ["plain.tar", "indexed.tar"] {
        write_tar(&root.path().join(name), members.clone());
    }
    write_index(&root.path().join("indexed.tar"), "length");
    let server = ObjectServer::start(root.path(), |_| None);
    let mut requests = Vec::new();
    for name in ["plain.tar", "indexed.tar"] {
        server.reset();
        let source = list(format!("{}/{name}", server.url()), SourceKind::Auto).unwrap();
        assert_eq!(source.samples().len(), 20);
        let served = server.served();
        requests.push(served.requests);
        // A listing reads no picture.
        assert!(served.bytes < 20 * 70_000, "{}", served.bytes);
    }
    assert!(requests[0] >= 20 && requests[1] <= 8, "{requests:?}");
}

#[test]
fn a_listing_that_cannot_be_complete_is_an_error() {
    let root = tempfile::tempdir().unwrap();
    write_all(root.path());
    let denied = |request: &Request| {
        let is_second = request.name.contains("01.") || request.name.contains("00001");
        is_second.then_some(Fault::Status(403))
    };
    let server = ObjectServer::start(root.path(), denied);
    for (_, url, _) in [PLACES[0], PLACES[1], PLACES[3]] {
        let place = format!("{}/{url}", server.url());
        let error = list(place, SourceKind::Auto).unwrap_err();
        assert!(matches!(error, Error::Remote { .. }), "{error}");
        assert!(error.to_string().contains("denies access"), "{error}");
    }
    // A server of plain HTTP has no listing.
    let error = list(format!("{}/plain", server.url()), SourceKind::Auto).unwrap_err();
    assert!(
        error.to_string().contains("shard-{0000..0099}.tar"),
        "{error}"
    );
}

/// Writes a folder of pictures with every kind of text, and names that a URL has to write in
/// another way: its pictures and captions are the numbers 0 to 7.
fn write_loose(root: &Path) {
    let names = [
        "a.png",
        "a_0.5.png",
        "b [1]~#%20?.png",
        "sub/a.png",
        "sub/deep/\u{e9} +&.webp.png",
        "10_kohya/c.png",
    ];
    for (id, name) in (0..).zip(names) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, picture(id)).unwrap();
        let caption = format!("loose {id}");
        match id % 3 {
            0 => fs::write(path.with_extension("txt"), caption).unwrap(),
            1 => {
                let json = format!("{{\"caption\": \"{caption}\", \"width\": 64, \"height\": 64}}");
                fs::write(format!("{}.json", path.display()), json).unwrap();
            }
            _ => fs::write(path.with_extension("caption"), caption).unwrap(),
        }
    }
    fs::write(root.join("sub/row.png"), picture(6)).unwrap();
    let lines = "{\"file_name\": \"row.png\", \"text\": \"loose 6\"}\n\
                 {\"file_name\": \"gone.png\", \"text\": \"lost\"}\n";
    fs::write(root.join("sub/metadata.jsonl"), lines).unwrap();
    fs::write(root.join("1000123.png"), picture(7)).unwrap();
    let posts = "id,tag_string_general,rating,score\n1000123,1girl long_hair,g,5\n";
    fs::write(root.join("posts.csv"), posts).unwrap();
    fs::write(root.join(".hidden.png"), picture(8)).unwrap();
    fs::write(root.join("orphan.txt"), "no picture").unwrap();
}

/// What a list of remarks says, in order.
fn lines(source: &Source) -> Vec<String> {
    let remarks = source.remarks().iter();
    let mut lines: Vec<String> = remarks.map(|remark| format!("{remark:?}")).collect();
    lines.sort();
    lines
}

/// A server that answers a second request of each kind, after a fault.
fn faulty(request: &Request) -> Option<Fault> {
    match (request.repeat, request.number % 5) {
        (0, 2) => Some(Fault::Status(503)),
        (0, 4) if request.method == "GET" && request.query.is_empty() => Some(Fault::Cut(3)),
        _ => None,
    }
}

#[test]
fn loose_pictures_in_a_bucket_are_read_as_from_a_disk() {
    let Ok(bucket) = std::env::var(object_server::CHILD) else {
        let root = tempfile::tempdir().unwrap();
        let bucket = root.path().join("bucket");
        write_loose(&bucket.join("data"));
        let test = "loose_pictures_in_a_bucket_are_read_as_from_a_disk";
        return object_server::with_s3(test, &bucket, faulty);
    };
    let local = list(Path::new(&bucket).join("data"), SourceKind::Auto).unwrap();
    assert_eq!(local.samples().len(), 8);
    for kind in [SourceKind::Auto, SourceKind::Folder] {
        let far = list("s3://bucket/data", kind).unwrap();
        assert_eq!(contents(&far), contents(&local));
        assert_eq!(lines(&far), lines(&local));
        assert!(lines(&far).iter().any(|line| line.contains("gone.png")));
        for (far_sample, sample) in far.samples().iter().zip(local.samples()) {
            let path = Path::new(&bucket).join("data").join(sample.address());
            let bytes = fs::metadata(path).unwrap().len();
            assert_eq!(far_sample.size_bytes(), Some(bytes));
            let texts = (far.text(far_sample), local.text(sample));
            assert_eq!(texts.0.text, texts.1.text, "{}", sample.address());
        }
    }
}

#[test]
fn pictures_that_a_table_at_a_plain_server_names_are_read() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("set");
    fs::create_dir_all(folder.join("images")).unwrap();
    let mut lines = String::new();
    let mut csv = "file_name,text\n".to_owned();
    for id in 0..20 {
        fs::write(folder.join(format!("images/{id:02} [x].png")), picture(id)).unwrap();
        lines +=
            &format!("{{\"file_name\": \"images/{id:02} [x].png\", \"text\": \"row {id}\"}}\n");
        csv += &format!("./images/{id:02} [x].png,row {id}\n");
    }
    fs::write(folder.join("metadata.jsonl"), &lines).unwrap();
    fs::write(folder.join("pictures.csv"), csv).unwrap();
    let server = ObjectServer::start(root.path(), faulty);
    let local = list(folder.join("images"), SourceKind::Auto).unwrap();
    assert_eq!(local.samples().len(), 20);
    // The folder, whose metadata.jsonl is looked for, and a table by name.
    for place in ["set", "set/pictures.csv", "set/metadata.jsonl"] {
        let far = list(format!("{}/{place}", server.url()), SourceKind::Auto).unwrap();
        assert!(far.remarks().is_empty(), "{place}: {:?}", far.remarks());
        let found = contents(&far);
        assert_eq!(found.len(), 20, "{place}");
        for (id, (address, pixels, captions)) in (0..).zip(found) {
            assert_eq!(address, format!("images/{id:02} [x].png"));
            assert_eq!((pixels, captions), (id, vec![format!("row {id}")]));
        }
    }
}

#[test]
fn a_picture_that_a_server_does_not_have_is_named() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("a.png"), picture(1)).unwrap();
    let rows = "{\"file_name\": \"a.png\", \"text\": \"a\"}\n\
                {\"file_name\": \"gone.png\", \"text\": \"b\"}\n\
                {\"file_name\": \"https://other/c.png\", \"text\": \"c\"}\n";
    fs::write(root.path().join("metadata.jsonl"), rows).unwrap();
    let server = ObjectServer::start(root.path(), |_| None);
    let source = list(server.url(), SourceKind::Auto).unwrap();
    assert_eq!(source.samples().len(), 2);
    let fault = source.open(&source.samples()[1]).unwrap_err();
    assert!(fault.detail.contains("no such object"), "{fault:?}");
    assert!(fault.detail.contains("/gone.png"), "{fault:?}");
    let remarks = lines(&source);
    assert!(
        remarks.len() == 1 && remarks[0].contains("outside of the source"),
        "{remarks:?}"
    );

    // A table that names nothing.
    fs::write(root.path().join("metadata.jsonl"), "{\"text\": \"a\"}\n").unwrap();
    let error = list(server.url(), SourceKind::Auto)
        .unwrap_err()
        .to_string();
    assert!(error.contains("no table names a picture"), "{error}");
    assert!(
        error.contains("metadata.jsonl: row 1: it names no image"),
        "{error}"
    );
}

#[test]
fn a_table_that_cannot_be_reached_ends_the_listing() {
    let root = tempfile::tempdir().unwrap();
    fs::write(
        root.path().join("metadata.csv"),
        "file_name,text\na.png,a\n",
    )
    .unwrap();
    let denied = |request: &Request| {
        let is_table = request.name == "metadata.csv" && request.method == "GET";
        is_table.then_some(Fault::Status(403))
    };
    let server = ObjectServer::start(root.path(), denied);
    let error = list(server.url(), SourceKind::Auto).unwrap_err();
    assert!(matches!(error, Error::Remote { .. }), "{error}");
    assert!(error.to_string().contains("denies access"), "{error}");
}

const CHILD: &str = "RECTIFLOW_TEST_SOURCES_BUCKET";

#[test]
fn a_prefix_in_a_bucket_is_listed() {
    let Ok(bucket) = std::env::var(CHILD) else {
        return in_child();
    };
    for (folder, _, num) in PLACES {
        let local = list(
            Path::new(&bucket).join("data").join(folder),
            SourceKind::Auto,
        )
        .unwrap();
        let far = list(format!("s3://bucket/data/{folder}"), SourceKind::Auto).unwrap();
        assert_eq!(contents(&far), contents(&local), "{folder}");
        assert_eq!(far.samples().len(), num);
    }
    // Loose pictures, and several kinds at once.
    let loose = list("s3://bucket/loose", SourceKind::Auto).unwrap();
    assert_eq!(loose.samples().len(), 1);
    let error = list("s3://bucket/data", SourceKind::Auto)
        .unwrap_err()
        .to_string();
    assert!(error.contains("set prep.source to one of"), "{error}");
}

/// Runs the test again in a child process with the environment of a bucket.
fn in_child() {
    let root = tempfile::tempdir().unwrap();
    let bucket = root.path().join("bucket");
    write_all(&bucket.join("data"));
    fs::create_dir(bucket.join("loose")).unwrap();
    fs::write(bucket.join("loose/a.png"), picture(1)).unwrap();
    let server = ObjectServer::start(root.path(), |_| None);
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_prefix_in_a_bucket_is_listed"])
        .envs([
            ("AWS_ENDPOINT_URL", server.url().as_str()),
            ("AWS_REGION", "auto"),
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
        ])
        .env(CHILD, &bucket)
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{output}");
}
