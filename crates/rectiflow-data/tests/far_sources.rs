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
    let error = list("s3://bucket/loose", SourceKind::Auto)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("loose pictures at a URL are not read"),
        "{error}"
    );
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
