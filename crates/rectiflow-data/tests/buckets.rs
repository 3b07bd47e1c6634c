//! Buckets over S3: parts, retries, hashes, and the limit on the rate.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod object_server;

use std::{fs, path::Path, time::Instant};

use object_server::{CHILD, Fault, Request, with_s3};
use rectiflow_data::{Bucket, Error};

/// Writes a file of `len` bytes that do not repeat; returns its hash.
fn write_file(path: &Path, len: usize) -> String {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    fs::write(path, &bytes).unwrap();
    blake3::hash(&bytes).to_hex().to_string()
}

#[test]
fn files_are_sent_in_parts_listed_fetched_and_removed() {
    let Ok(served) = std::env::var(CHILD) else {
        let folder = tempfile::tempdir().unwrap();
        let bucket = folder.path().join("bucket");
        fs::create_dir_all(&bucket).unwrap();
        // Every fourth request fails once.
        let busy = |request: &Request| {
            (request.number % 4 == 3 && request.repeat == 0).then_some(Fault::Status(503))
        };
        return with_s3(
            "files_are_sent_in_parts_listed_fetched_and_removed",
            &bucket,
            busy,
        );
    };
    let dir = tempfile::tempdir().unwrap();
    let bucket = Bucket::open("s3://bucket/run/", None).unwrap();
    let (large, small) = (dir.path().join("large"), dir.path().join("small"));
    let hash = write_file(&large, (40 << 20) + 12_345);
    write_file(&small, 100);
    bucket.put_file("a/large", &large, Some(&hash)).unwrap();
    bucket.put_file("small", &small, None).unwrap();
    bucket.put("b/tiny", b"x").unwrap();
    assert!(bucket.sent_bytes() >= (40 << 20) + 12_346);

    // Another hash: neither a large nor a small object appears.
    for path in [&large, &small] {
        let refused = bucket.put_file("refused", path, Some(&hash.replace(['0', '1'], "2")));
        assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
    }
    let mut names = Vec::new();
    for object in bucket.list().unwrap() {
        names.push((object.name, object.bytes));
    }
    let expected = [
        ("a/large", (40 << 20) + 12_345),
        ("b/tiny", 1),
        ("small", 100),
    ];
    assert_eq!(names, expected.map(|(name, len)| (name.to_owned(), len)));
    assert!(Path::new(&served).join("run/a/large").is_file());

    let copy = dir.path().join("copy");
    bucket.fetch("a/large", &copy).unwrap();
    let found = blake3::hash(&fs::read(&copy).unwrap()).to_hex().to_string();
    assert_eq!(found, hash);
    assert_eq!(bucket.read("none", 10).unwrap(), None);
    bucket.remove("a/large").unwrap();
    bucket.remove("none").unwrap();
    assert_eq!(bucket.list().unwrap().len(), 2);
}

#[test]
fn uploads_keep_to_the_limit() {
    if std::env::var(CHILD).is_err() {
        let folder = tempfile::tempdir().unwrap();
        let bucket = folder.path().join("bucket");
        fs::create_dir_all(&bucket).unwrap();
        return with_s3("uploads_keep_to_the_limit", &bucket, |_| None);
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    let hash = write_file(&file, 3_000_000);
    // 6 MB of two files at 6 MB a second.
    let bucket = Bucket::open("s3://bucket/run", Some(48.0)).unwrap();
    let began = Instant::now();
    for name in ["a", "b"] {
        bucket.put_file(name, &file, Some(&hash)).unwrap();
    }
    let secs = began.elapsed().as_secs_f64();
    assert_eq!(bucket.sent_bytes(), 6_000_000);
    assert!(secs >= 0.99, "6 MB at 6 MB/s took {secs} s");
}

#[test]
fn a_store_that_denies_access_is_told_apart() {
    if std::env::var(CHILD).is_err() {
        let folder = tempfile::tempdir().unwrap();
        let bucket = folder.path().join("bucket");
        fs::create_dir_all(&bucket).unwrap();
        let denies = |request: &Request| (request.method == "PUT").then_some(Fault::Status(403));
        return with_s3("a_store_that_denies_access_is_told_apart", &bucket, denies);
    }
    let bucket = Bucket::open("s3://bucket/run", None).unwrap();
    let denied = bucket.put("small", b"x").unwrap_err().to_string();
    assert!(denied.contains("denies access"), "{denied}");
}
