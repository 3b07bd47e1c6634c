//! Several workers on one data set: what they make together is what one preparation makes, byte for
//! byte, also when they are killed, and what is missing is named.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod small_preparation;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
};

use half::f16;
use image::{Rgb, RgbImage};
use rectiflow_data::{
    Dataset, Error, PrepSettings, RgbBatch,
    prep::{
        Part, PartSummary, PrepEvent, PrepSummary, Stage, gather_facts, join_parts, list,
        prepare_part,
    },
    prepare,
    reject::Reason,
};
use small_preparation::{codec, settings as small_settings};

fn settings() -> PrepSettings {
    PrepSettings {
        area_px: 32 * 32,
        step_px: 8,
        bucket_min_px: 16,
        bucket_max_px: 64,
        encode_batch: 5,
        object_rows: 32,
        test_fraction: 0.1,
        filter: "not tag:comic".to_owned(),
        ..small_settings()
    }
}

/// Latents that depend on every pixel.
fn sums(batch: &RgbBatch) -> Vec<f16> {
    let (width, height) = (batch.width_px as usize, batch.height_px as usize);
    let mut latents = Vec::new();
    for image in batch.pixels.chunks(width * height * 3) {
        for number in 0..4 * (width / 8) * (height / 8) {
            let bytes = image.iter().skip(number).step_by(7);
            latents.push(f16::from_f32(
                bytes.map(|&byte| f32::from(byte)).sum::<f32>() / 64.0,
            ));
        }
    }
    latents
}

/// A folder with pictures of several shapes, copies, damaged ones, and ones that a setting or the
/// filter excludes.
fn pictures(num: u32) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..num {
        let width = 24 + 8 * (number % 4);
        let image = RgbImage::from_fn(width, 32, |x, y| {
            Rgb([(number % 251) as u8, (x + number / 251) as u8, y as u8])
        });
        let name = format!("{}/{number:05}", number % 3);
        let path = folder.path().join(format!("{name}.png"));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        image.save(&path).unwrap();
        if number % 50 == 7 {
            fs::copy(&path, folder.path().join(format!("{name}-copy.png"))).unwrap();
            fs::write(folder.path().join(format!("{name}-copy.txt")), "a copy").unwrap();
        }
        if number % 40 == 9 {
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        }
        let text = match number {
            _ if number % 30 == 3 => continue,
            _ if number % 25 == 4 => "comic, page".to_owned(),
            _ => format!("picture, number {number}"),
        };
        fs::write(folder.path().join(format!("{name}.tags")), text).unwrap();
    }
    folder
}

fn whole(source: &Path, out: &Path) -> PrepSummary {
    let mut encode = |batch: &RgbBatch| Ok(sums(batch));
    prepare(source, out, &settings(), &codec(), &mut encode, &mut |_| {}).unwrap()
}

fn part(worker: u32, num_workers: u32) -> Part {
    Part {
        worker,
        num_workers,
    }
}

fn work(source: &Path, out: &Path, part: Part, stage: Stage) -> Result<PartSummary, Error> {
    let mut encode = |batch: &RgbBatch| Ok(sums(batch));
    let part = (part, stage);
    prepare_part(
        source,
        out,
        &settings(),
        &codec(),
        part,
        &mut encode,
        &mut |_| {},
    )
}

fn facts(source: &Path, out: &Path, part: Part) -> Result<u64, Error> {
    gather_facts(source, out, &settings(), part, &mut |_| {})
}

fn join(source: &Path, out: &Path) -> Result<PrepSummary, Error> {
    join_parts(source, out, &settings(), &codec(), &mut |_| {})
}

/// The bytes of all files of a data set, but those of locks.
fn files(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name().unwrap() != "lock" {
                let name = path.strip_prefix(root).unwrap().to_owned();
                files.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    files
}

fn assert_same(one: &Path, other: &Path) {
    let (one, other) = (files(one), files(other));
    assert_eq!(
        one.keys().collect::<Vec<_>>(),
        other.keys().collect::<Vec<_>>()
    );
    for (name, bytes) in &one {
        assert!(other[name] == *bytes, "{} differs", name.display());
    }
}

#[test]
fn workers_write_what_one_preparation_writes() {
    let source = pictures(1_300);
    let alone = tempfile::tempdir().unwrap();
    let summary = whole(source.path(), alone.path());
    for reason in [
        Reason::Broken,
        Reason::Duplicate,
        Reason::NoCaption,
        Reason::Filtered,
    ] {
        assert!(summary.rejected[&reason] > 5, "{reason:?}");
    }
    for num_workers in [1, 3] {
        let out = tempfile::tempdir().unwrap();
        thread::scope(|scope| {
            let mut running = Vec::new();
            for worker in 0..num_workers {
                let (source, out) = (source.path(), out.path());
                let part = part(worker, num_workers);
                running.push(scope.spawn(move || work(source, out, part, Stage::Both).unwrap()));
            }
            let done: Vec<PartSummary> = running
                .into_iter()
                .map(|worker| worker.join().unwrap())
                .collect();
            let own: u64 = done.iter().map(|part| part.own_objects).sum();
            let written: u64 = done.iter().map(|part| part.written_rows).sum();
            assert_eq!(own, done[0].all_objects);
            assert_eq!(written, summary.train_rows + summary.test_rows);
        });
        let joined = join(source.path(), out.path()).unwrap();
        assert_eq!(
            (joined.written_rows, joined.resumed_rows),
            (0, summary.written_rows)
        );
        assert_eq!(
            (&joined.rejected, &joined.filter),
            (&summary.rejected, &summary.filter)
        );
        assert_same(alone.path(), out.path());
    }
}

#[test]
fn a_worker_that_died_goes_on_and_what_is_missing_is_named() {
    let source = pictures(700);
    let out = tempfile::tempdir().unwrap();
    let error = join(source.path(), out.path()).unwrap_err().to_string();
    assert!(error.contains("no worker has been here"), "{error}");
    facts(source.path(), out.path(), part(0, 2)).unwrap();
    let error = work(source.path(), out.path(), part(0, 2), Stage::Objects).unwrap_err();
    assert!(error.to_string().contains("1/2 has none yet"), "{error}");
    assert_eq!(facts(source.path(), out.path(), part(1, 2)).unwrap(), 202);

    // The encoder of worker 1 fails in its third object.
    work(source.path(), out.path(), part(0, 2), Stage::Objects).unwrap();
    let mut num_batches = 0;
    let mut dies = |batch: &RgbBatch| {
        num_batches += 1;
        match num_batches {
            15 => Err("the GPU is gone".to_owned()),
            _ => Ok(sums(batch)),
        }
    };
    let one = (part(1, 2), Stage::Objects);
    prepare_part(
        source.path(),
        out.path(),
        &settings(),
        &codec(),
        one,
        &mut dies,
        &mut |_| {},
    )
    .unwrap_err();
    let error = join(source.path(), out.path()).unwrap_err().to_string();
    assert!(error.contains("of worker 1/2 (the first is "), "{error}");
    assert!(!error.contains("worker 0/2"), "{error}");
    assert!(Dataset::open(out.path()).is_err(), "nothing is committed");

    let again = work(source.path(), out.path(), part(1, 2), Stage::Both).unwrap();
    assert!(again.resumed_objects >= 2, "{again:?}");
    assert!(again.resumed_objects < again.own_objects, "{again:?}");
    join(source.path(), out.path()).unwrap();
    let alone = tempfile::tempdir().unwrap();
    whole(source.path(), alone.path());
    assert_same(alone.path(), out.path());
}

#[test]
fn a_preparation_without_workers_takes_over_from_them() {
    let source = pictures(700);
    let (out, alone) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for worker in 0..2 {
        facts(source.path(), out.path(), part(worker, 2)).unwrap();
    }
    let done = work(source.path(), out.path(), part(1, 2), Stage::Objects).unwrap();
    let taken_over = whole(source.path(), out.path());
    assert_eq!(taken_over.resumed_rows, done.written_rows);
    assert!(taken_over.written_rows > 0);
    assert_eq!(
        taken_over.reread_pictures, 0,
        "their facts are those of the workers"
    );
    whole(source.path(), alone.path());
    assert_same(alone.path(), out.path());
}

#[test]
fn workers_with_one_number_or_another_listing_are_refused() {
    let source = pictures(600);
    let out = tempfile::tempdir().unwrap();
    thread::scope(|scope| {
        let (is_waiting, waits) = mpsc::channel();
        let (from, to) = (source.path(), out.path());
        let first = scope.spawn(move || {
            let mut encode = |batch: &RgbBatch| Ok(sums(batch));
            let mut progress = |event| {
                if matches!(event, PrepEvent::Waiting { .. }) {
                    let _ = is_waiting.send(());
                }
            };
            let one = (part(0, 2), Stage::Both);
            prepare_part(
                from,
                to,
                &settings(),
                &codec(),
                one,
                &mut encode,
                &mut progress,
            )
        });
        waits.recv().unwrap();
        let error = work(from, to, part(0, 2), Stage::Both)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("worker 0/2: a process with this number"),
            "{error}"
        );
        let mut encode = |_: &RgbBatch| panic!("nothing may be encoded");
        let error = prepare(from, to, &settings(), &codec(), &mut encode, &mut |_| {});
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("another preparation, or a worker, is writing"),
            "{error}"
        );

        // The other worker sees a picture more: the first ends, and once it is started again, both
        // go on.
        fs::copy(from.join("0/00000.png"), from.join("0/new.png")).unwrap();
        let other = scope.spawn(move || work(from, to, part(1, 2), Stage::Both));
        let error = first.join().unwrap().unwrap_err().to_string();
        assert!(error.contains("(613 samples, here 612)"), "{error}");
        work(from, to, part(0, 2), Stage::Both).unwrap();
        other.join().unwrap().unwrap();
        join(from, to).unwrap();
    });
}

#[test]
fn a_listing_opens_no_picture_and_counts_what_tables_say() {
    let source = tempfile::tempdir().unwrap();
    let mut rows = String::new();
    for number in 0..2_000 {
        // Empty files: a listing must not look into them.
        let name = format!("{number}.jpg");
        fs::write(source.path().join(&name), "").unwrap();
        let size = match number % 10 {
            0 => String::new(),
            1 => r#""width": 8, "height": 900, "#.to_owned(),
            2 => r#""width": 900, "height": 17, "#.to_owned(),
            _ => r#""width": 96, "height": 64, "#.to_owned(),
        };
        let tags = if number % 10 == 3 { "comic" } else { "photo" };
        rows += &format!("{{{size}\"file_name\": \"{name}\", \"tags\": [\"{tags}\"]}}\n");
    }
    fs::write(source.path().join("metadata.jsonl"), rows).unwrap();
    let out = tempfile::tempdir().unwrap();
    let summary = list(source.path(), out.path(), &settings(), 3, &mut |_| {}).unwrap();
    assert_eq!((summary.samples, summary.with_size), (2_000, 1_800));
    assert_eq!(
        (summary.too_small.count, summary.aspect_ratio.count),
        (200, 200)
    );
    assert_eq!(summary.filter[0].removed.count, 200);
    assert_eq!(summary.usable, 1_400);
    let in_buckets: u64 = summary.buckets.iter().map(|bucket| bucket.samples).sum();
    assert_eq!((summary.buckets.len(), in_buckets), (1, 1_200));
    let shares: Vec<u64> = summary.workers.iter().map(|share| share.samples).collect();
    assert_eq!(shares, [976, 512, 512]);
    let left = files(out.path());
    assert!(left.is_empty(), "{left:?}");
}
