//! A data set that goes to a URL while it is made: the disk never holds more than a few objects,
//! and what is at the URL is what a folder would have.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod object_server;
mod small_preparation;

use std::{fs, path::Path};

use half::f16;
use image::{Rgb, RgbImage};
use object_server::{CHILD, Fault, Request, with_s3};
use rectiflow_data::{
    Dataset, Error, PrepSettings, PrepSummary, RgbBatch, prepare, publish::publish,
};
use small_preparation::{codec, settings as small_settings};

const URL: &str = "s3://bucket/new";

fn settings(send_to: Option<&str>) -> PrepSettings {
    PrepSettings {
        area_px: 32 * 32,
        step_px: 8,
        bucket_min_px: 16,
        bucket_max_px: 64,
        test_fraction: PrepSettings::default().test_fraction,
        object_rows: 32,
        keep_captionless: true,
        send_to: send_to.map(str::to_owned),
        ..small_settings()
    }
}

fn pictures(folder: &Path) {
    for number in 0..300u32 {
        let image = RgbImage::from_fn(32, 32, |x, y| {
            Rgb([
                (number % 256) as u8,
                (number / 256) as u8 + x as u8,
                y as u8,
            ])
        });
        image.save(folder.join(format!("{number}.png"))).unwrap();
    }
}

/// Prepares into `out`; `most_batches` is the number of batches after which the encoder fails.
fn run(
    source: &Path,
    out: &Path,
    send_to: Option<&str>,
    most_batches: usize,
) -> Result<PrepSummary, Error> {
    let mut num_batches = 0;
    let mut encode = |batch: &RgbBatch| {
        num_batches += 1;
        if num_batches > most_batches {
            return Err("the GPU is gone".to_owned());
        }
        let image_bytes = 3 * 32 * 32;
        let mut latents = Vec::new();
        for image in batch.pixels.chunks(image_bytes) {
            latents.extend((0..64).map(|at| f16::from_f32(f32::from(image[at * 48]))));
        }
        Ok(latents)
    };
    let mut progress = |_| {
        let latents = fs::read_dir(out.join("latents"));
        let num_here = latents.map_or(0, |files| files.count());
        // One is written, one waits, one is on its way, one is about to be deleted.
        assert!(send_to.is_none() || num_here <= 4, "{num_here}");
    };
    prepare(
        source,
        out,
        &settings(send_to),
        &codec(),
        &mut encode,
        &mut progress,
    )
}

fn num_latents(out: &Path) -> usize {
    fs::read_dir(out.join("latents")).unwrap().count()
}

#[test]
fn latents_are_sent_while_others_are_encoded_and_a_killed_run_resumes() {
    if std::env::var(CHILD).is_err() {
        let folder = tempfile::tempdir().unwrap();
        let bucket = folder.path().join("bucket");
        fs::create_dir_all(&bucket).unwrap();
        // The client retries when the store is busy.
        let busy = |r: &Request| {
            (r.method == "PUT" && r.number.is_multiple_of(5) && r.repeat == 0)
                .then_some(Fault::Status(503))
        };
        let name = "latents_are_sent_while_others_are_encoded_and_a_killed_run_resumes";
        return with_s3(name, &bucket, busy);
    }
    let [source, out, local] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    pictures(source.path());
    let whole = run(source.path(), local.path(), None, usize::MAX).unwrap();
    run(source.path(), out.path(), Some(URL), 23).unwrap_err();
    let rest = run(source.path(), out.path(), Some(URL), usize::MAX).unwrap();
    assert!(rest.resumed_rows >= 128, "{}", rest.resumed_rows);
    assert_eq!(rest.resumed_rows + rest.written_rows, whole.written_rows);
    assert_eq!(num_latents(out.path()), 0);

    let published = publish(out.path(), URL, &mut |_, _| {}).unwrap();
    let (there, here) = (
        Dataset::open(URL).unwrap(),
        Dataset::open(local.path()).unwrap(),
    );
    assert_eq!(there.identity(), here.identity());
    let num_objects = there.manifest().objects.len();
    assert!(num_objects >= 9);
    assert_eq!(
        published.num_kept, num_objects as u64,
        "the latents were there"
    );
    (0..num_objects).for_each(|object| there.verify_object(object).unwrap());

    // A picture more, in a later run: only its object is sent.
    fs::copy(source.path().join("7.png"), source.path().join("again.png")).unwrap();
    let new = RgbImage::from_pixel(32, 32, Rgb([1, 2, 3]));
    new.save(source.path().join("new.png")).unwrap();
    let more = run(source.path(), out.path(), Some(URL), usize::MAX).unwrap();
    assert_eq!(more.written_rows, 1);
    publish(out.path(), URL, &mut |_, _| {}).unwrap();
    let there = Dataset::open(URL).unwrap();
    (0..num_objects + 1).for_each(|object| there.verify_object(object).unwrap());
}

#[test]
fn a_store_that_refuses_ends_the_preparation_with_its_reason() {
    if std::env::var(CHILD).is_err() {
        let folder = tempfile::tempdir().unwrap();
        let bucket = folder.path().join("bucket");
        fs::create_dir_all(&bucket).unwrap();
        let refuses =
            |r: &Request| (r.method == "PUT" && r.number > 3).then_some(Fault::Status(403));
        let name = "a_store_that_refuses_ends_the_preparation_with_its_reason";
        return with_s3(name, &bucket, refuses);
    }
    let [source, out] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    pictures(source.path());
    let error = run(source.path(), out.path(), Some(URL), usize::MAX).unwrap_err();
    assert!(matches!(error, Error::Remote { .. }), "{error}");
    assert!(
        error.to_string().contains("s3://bucket/new/latents/"),
        "{error}"
    );
    assert!(num_latents(out.path()) > 0, "what was not sent is here");
}
