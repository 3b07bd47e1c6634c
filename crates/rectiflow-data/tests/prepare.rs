//! Preparation end to end with a simple, checkable encoder: from generated good and bad pictures to
//! a data set.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod small_preparation;

use std::{
    collections::BTreeMap,
    fs,
    io::Cursor,
    os::unix::{ffi::OsStrExt, fs::symlink},
    path::Path,
};

use half::f16;
use image::{
    DynamicImage, GrayImage, ImageBuffer, ImageFormat, Luma, Rgb, RgbImage, Rgba, RgbaImage,
};
use rectiflow_data::{
    Codec, Dataset, Error, PrepSettings, PrepSummary, Record, RgbBatch, SampleId, Split, prepare,
    reject::Reason,
};
use small_preparation::{codec, settings as small_settings};

fn settings() -> PrepSettings {
    PrepSettings {
        max_pixels: 1_000_000,
        encode_batch: 3,
        object_rows: 32,
        test_fraction: 0.2,
        ..small_settings()
    }
}

/// Latents with the mean colour of each 8x8 square, and the square's number in the fourth channel.
fn means(batch: &RgbBatch) -> Vec<f16> {
    let (width, height) = (batch.width_px as usize, batch.height_px as usize);
    let (w, h) = (width / 8, height / 8);
    let mut latents = vec![0f32; batch.num_images * 4 * h * w];
    for (image, out) in batch
        .pixels
        .chunks(width * height * 3)
        .zip(latents.chunks_mut(4 * h * w))
    {
        for (i, &value) in image.iter().enumerate() {
            let (channel, x, y) = (i % 3, i / 3 % width / 8, i / 3 / width / 8);
            out[(channel * h + y) * w + x] += f32::from(value) / 64.0;
        }
        (0..h * w).for_each(|i| out[3 * h * w + i] = i as f32);
    }
    latents.into_iter().map(f16::from_f32).collect()
}

fn run(source: &Path, out: &Path, settings: &PrepSettings) -> PrepSummary {
    prepare(
        source,
        out,
        settings,
        &codec(),
        &mut |batch| Ok(means(batch)),
        &mut |_| {},
    )
    .unwrap()
}

/// As [`run`], with an encoder that must not be called.
fn run_without_encoding(source: &Path, out: &Path, settings: &PrepSettings) -> PrepSummary {
    prepare(
        source,
        out,
        settings,
        &codec(),
        &mut |_| panic!("the encoder must not be called"),
        &mut |_| {},
    )
    .unwrap()
}

fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A picture with the colour `left` in its left half and `right` in its right half; `mark` makes
/// its bytes unique.
fn halves(width: u32, height: u32, left: [u8; 3], right: [u8; 3], mark: u8) -> RgbImage {
    let mut image = RgbImage::from_fn(width, height, |x, _| {
        Rgb(if x < width / 2 { left } else { right })
    });
    image.put_pixel(0, 0, Rgb([mark, mark, mark]));
    image
}

fn png(mark: u8) -> Vec<u8> {
    let image = halves(
        64 + u32::from(mark % 7) * 8,
        64,
        [mark, 0, 0],
        [0, 0, 255 - mark],
        mark,
    );
    encoded(&image.into(), ImageFormat::Png)
}

fn write(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Writes good pictures with captions, one for each mark in `range`.
fn write_many(folder: &Path, range: std::ops::Range<u8>) {
    for mark in range {
        write(folder, &format!("{mark:03}.png"), png(mark));
        write(folder, &format!("{mark:03}.txt"), format!("picture {mark}"));
    }
}

fn rows(out: &Path) -> BTreeMap<String, (Split, Record, Vec<f16>)> {
    let data = Dataset::open(out).unwrap();
    let mut rows = BTreeMap::new();
    for split in [Split::Train, Split::Test] {
        for shape in data.buckets(split) {
            let len: usize = data.latent_shape(shape.bucket).iter().product();
            for (row, record) in data
                .records(split, shape.bucket)
                .unwrap()
                .into_iter()
                .enumerate()
            {
                let mut latents = vec![f16::ZERO; len];
                data.read_latents(split, shape.bucket, &[row as u64], &mut latents)
                    .unwrap();
                assert_eq!(
                    (record.target_width_px, record.target_height_px),
                    (shape.width_px, shape.height_px)
                );
                let earlier = rows.insert(record.source.clone(), (split, record, latents));
                assert!(earlier.is_none(), "a sample is in the data set twice");
            }
        }
    }
    rows
}

/// Mean colour of a row at latent (x, y).
fn colour(row: &(Split, Record, Vec<f16>), x: usize, y: usize) -> [f32; 3] {
    let (w, h) = (
        (row.1.target_width_px / 8) as usize,
        (row.1.target_height_px / 8) as usize,
    );
    std::array::from_fn(|channel| row.2[(channel * h + y) * w + x].to_f32())
}

fn assert_near(found: [f32; 3], expected: [f32; 3], tolerance: f32) {
    let near = found
        .iter()
        .zip(expected)
        .all(|(a, b)| (a - b).abs() <= tolerance);
    assert!(near, "found {found:?}, expected {expected:?}");
}

fn rejected(out: &Path) -> BTreeMap<String, Vec<String>> {
    let mut reasons = BTreeMap::<String, Vec<String>>::new();
    for line in fs::read_to_string(out.join("rejected.jsonl"))
        .unwrap()
        .lines()
    {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(!line["detail"].as_str().unwrap().is_empty());
        let path = line["path"].as_str().unwrap().to_owned();
        reasons
            .entry(path)
            .or_default()
            .push(line["reason"].as_str().unwrap().to_owned());
    }
    reasons
}

/// All files of a data set by name.
fn files(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path
                    .strip_prefix(root)
                    .unwrap()
                    .to_string_lossy()
                    .into_owned();
                files.insert(name, fs::read(path).unwrap());
            }
        }
    }
    files
}

/// EXIF data, a big-endian TIFF with only an orientation.
fn exif(orientation: u8) -> Vec<u8> {
    let mut exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
    exif.extend([orientation, 0, 0, 0, 0, 0, 0]);
    exif
}

/// Inserts EXIF data into a JPEG, after the start marker.
fn with_exif(jpeg: &[u8], orientation: u8) -> Vec<u8> {
    let payload = [b"Exif\0\0".as_slice(), &exif(orientation)].concat();
    let len = (payload.len() as u16 + 2).to_be_bytes();
    [&jpeg[..2], &[0xff, 0xe1], &len, &payload, &jpeg[2..]].concat()
}

/// Writes a picture of every kind, left half red or dark, right half blue, light or transparent.
fn write_every_kind(folder: &Path) {
    let red = RED;
    let blue = BLUE;
    let rgb: DynamicImage = halves(64, 64, red, blue, 0).into();
    write(folder, "a.png", encoded(&rgb, ImageFormat::Png));
    write(folder, "sub/folder/b.jpg", encoded(&rgb, ImageFormat::Jpeg));
    write(folder, "c.webp", encoded(&rgb, ImageFormat::WebP));
    write(
        folder,
        "d.gif",
        encoded(&DynamicImage::ImageRgba8(rgb.to_rgba8()), ImageFormat::Gif),
    );
    write(
        folder,
        "wrong.jpg",
        encoded(&halves(64, 64, red, blue, 9).into(), ImageFormat::Png),
    );
    write(
        folder,
        "sixteen.png",
        encoded(&DynamicImage::ImageRgb16(rgb.to_rgb16()), ImageFormat::Png),
    );
    let gray = GrayImage::from_fn(64, 64, |x, _| Luma([if x < 32 { 40 } else { 220 }]));
    write(
        folder,
        "gray.png",
        encoded(&gray.clone().into(), ImageFormat::Png),
    );
    write(
        folder,
        "gray.jpeg",
        encoded(&gray.into(), ImageFormat::Jpeg),
    );
    let gray16 = ImageBuffer::<Luma<u16>, Vec<u16>>::from_fn(64, 64, |x, _| {
        Luma([if x < 32 { 40 * 257 } else { 220 * 257 }])
    });
    write(
        folder,
        "gray16.png",
        encoded(&gray16.into(), ImageFormat::Png),
    );
    let glass = RgbaImage::from_fn(64, 64, |x, _| {
        if x < 32 {
            Rgba([200, 30, 30, 255])
        } else {
            Rgba([30, 30, 200, 0])
        }
    });
    write(
        folder,
        "glass.png",
        encoded(&glass.clone().into(), ImageFormat::Png),
    );
    write(
        folder,
        "glass.webp",
        encoded(&glass.into(), ImageFormat::WebP),
    );
}

const RED: [u8; 3] = [200, 30, 30];
const BLUE: [u8; 3] = [30, 30, 200];

#[test]
fn every_kind_of_picture_arrives_with_its_colours() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let folder = source.path();
    write_every_kind(folder);
    let settings = PrepSettings {
        keep_captionless: true,
        background: [0, 255, 0],
        test_fraction: 0.0,
        ..settings()
    };
    let summary = run(folder, out.path(), &settings);
    assert_eq!(
        (summary.train_rows, summary.test_rows),
        (11, 0),
        "{:?}",
        rejected(out.path())
    );
    let (red, blue) = (RED.map(f32::from), BLUE.map(f32::from));
    let rows = rows(out.path());
    for (name, row) in &rows {
        let (left, right, tolerance) = match name.as_str() {
            "gray.png" | "gray16.png" | "gray.jpeg" => ([40.0; 3], [220.0; 3], 2.0),
            "glass.png" | "glass.webp" => (red, [0.0, 255.0, 0.0], 0.2),
            "sub/folder/b.jpg" | "d.gif" => (red, blue, 5.0),
            _ => (red, blue, 0.2),
        };
        assert_near(colour(row, 2, 4), left, tolerance);
        assert_near(colour(row, 6, 4), right, tolerance);
        assert_eq!(
            (row.1.original_width_px, row.1.original_height_px),
            (64, 64)
        );
    }
}

#[test]
fn orientation_is_applied_to_pixels_and_sizes() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let image = halves(96, 32, [250, 0, 0], [0, 0, 250], 0);
    let jpeg = encoded(&image.into(), ImageFormat::Jpeg);
    for orientation in 1..=8 {
        write(
            source.path(),
            &format!("{orientation}.jpg"),
            with_exif(&jpeg, orientation),
        );
    }
    run(
        source.path(),
        out.path(),
        &PrepSettings {
            keep_captionless: true,
            ..settings()
        },
    );
    let rows = rows(out.path());
    assert_eq!(rows.len(), 8);
    for (name, row) in rows {
        let upright = name.as_bytes()[0] < b'5';
        let record = &row.1;
        let size = (record.original_width_px, record.original_height_px);
        assert_eq!(size, if upright { (96, 32) } else { (32, 96) }, "{name}");
        let (w, h) = (
            (record.target_width_px / 8) as usize,
            (record.target_height_px / 8) as usize,
        );
        // The place of red after the orientation is applied: EXIF 2.32, table of Orientation.
        let (x, y) = match name.as_bytes()[0] {
            b'1' | b'4' => (0, h / 2),
            b'2' | b'3' => (w - 1, h / 2),
            b'5' | b'6' => (w / 2, 0),
            _ => (w / 2, h - 1),
        };
        assert_near(colour(&row, x, y), [250.0, 0.0, 0.0], 12.0);
    }
}

/// Writes a folder with one file for each fault, and a good picture.
fn write_bad(folder: &Path) {
    let good = png(1);
    write(folder, "good.png", &good);
    write(folder, "good.txt", "a good picture");
    write(folder, "copy.png", &good);
    write(folder, "copy.txt", "the same picture");
    for stem in ["cut", "noise"] {
        write(folder, &format!("{stem}.txt"), "a picture that is damaged");
    }
    write(folder, "empty.png", "");
    write(folder, "notes.md", "# not a picture");
    write(folder, "cut.png", &png(2)[..90]);
    let jpeg = encoded(
        &halves(64, 64, [1, 2, 3], [200, 100, 0], 3).into(),
        ImageFormat::Jpeg,
    );
    write(folder, "cut.jpg", &jpeg[..jpeg.len() / 2]);
    write(
        folder,
        "cut.webp",
        &encoded(
            &halves(64, 64, [1, 2, 3], [200, 100, 0], 3).into(),
            ImageFormat::WebP,
        )[..60],
    );
    let busy = RgbImage::from_fn(64, 64, |x, y| {
        Rgb([x * 37 % 256, y * 91 % 256, x * y % 256].map(|v| v as u8))
    });
    let busy = encoded(&busy.into(), ImageFormat::Jpeg);
    write(folder, "noise.jpg", &busy[..busy.len() * 2 / 3]);
    write(
        folder,
        "one.png",
        encoded(&halves(1, 1, [0; 3], [0; 3], 4).into(), ImageFormat::Png),
    );
    write(
        folder,
        "long.png",
        encoded(&halves(600, 20, [0; 3], [0; 3], 5).into(), ImageFormat::Png),
    );
    write(folder, "mute.png", png(6));
    write(folder, "photo.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic");
    write(folder, "scan.tif", b"II*\0\x08\0\0\0");
    write(folder, "bomb.png", bomb());
    write(folder, "bad.png", png(7));
    write(folder, "bad.json", "{\"caption\": 7}");
    write(folder, "latin.png", png(8));
    write(folder, "latin.txt", b"caf\xe9");
    write(folder, "widow.txt", "no picture");
    write(folder, "nan.png", png(13));
    write(folder, "nan.txt", "the encoder fails on this");
    fs::write(
        folder.join(std::ffi::OsStr::from_bytes(b"na\xffme.png")),
        png(9),
    )
    .unwrap();
    symlink("/nowhere/at/all.png", folder.join("dangling.png")).unwrap();
    fs::create_dir(folder.join("real")).unwrap();
    symlink(folder, folder.join("real/circle")).unwrap();
    let mark = [0xff, 0x0a, 1, 2, 3, 4];
    write(folder, "new.jxl", mark);
}

/// A PNG of a few bytes whose header declares 60000 x 60000 pixels.
fn bomb() -> Vec<u8> {
    let mut png = png(10);
    png[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
    let crc = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    png
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// As [`means`], with a NaN in the latents of the picture with mark 13.
fn failing(batch: &RgbBatch) -> Vec<f16> {
    let mut latents = means(batch);
    let (pixels, numbers) = (
        batch.pixels.len() / batch.num_images,
        latents.len() / batch.num_images,
    );
    for (image, out) in batch.pixels.chunks(pixels).zip(latents.chunks_mut(numbers)) {
        if image[pixels / 2 - 3] == 0 && image.contains(&(255 - 13)) {
            out[5] = f16::NAN;
        }
    }
    latents
}

#[test]
fn bad_files_are_named_and_nothing_stops() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_bad(source.path());
    let settings = PrepSettings {
        max_aspect_error: 0.5,
        test_fraction: 0.0,
        ..settings()
    };
    let codec = codec();
    let summary = prepare(
        source.path(),
        out.path(),
        &settings,
        &codec,
        &mut |batch| Ok(failing(batch)),
        &mut |_| {},
    )
    .unwrap();
    let found = rejected(out.path());
    let expected = [
        ("good.png", "duplicate"),
        ("empty.png", "empty"),
        ("notes.md", "not_an_image"),
        ("cut.png", "broken"),
        ("cut.jpg", "broken"),
        ("cut.webp", "broken"),
        ("noise.jpg", "broken"),
        ("one.png", "too_small"),
        ("long.png", "aspect_ratio"),
        ("mute.png", "no_caption"),
        ("photo.heic", "unsupported_format"),
        ("scan.tif", "unsupported_format"),
        ("new.jxl", "broken"),
        ("bomb.png", "too_many_pixels"),
        ("bad.json", "bad_caption"),
        ("bad.png", "no_caption"),
        ("latin.txt", "bad_caption"),
        ("latin.png", "no_caption"),
        ("widow.txt", "orphan_caption"),
        ("nan.png", "not_finite"),
        ("na\u{fffd}me.png", "unreadable_name"),
        ("dangling.png", "unreadable"),
        ("real/circle", "linked_folder"),
    ];
    let expected: BTreeMap<String, Vec<String>> = expected
        .into_iter()
        .map(|(path, reason)| (path.to_owned(), vec![reason.to_owned()]))
        .collect();
    assert_eq!(found, expected);
    assert_eq!(summary.rejected.values().sum::<u64>(), 23);
    assert_eq!(summary.rejected[&Reason::Broken], 5);
    assert_eq!(rows(out.path()).keys().collect::<Vec<_>>(), ["copy.png"]);
    let again = run_without_encoding(source.path(), out.path(), &settings);
    assert_eq!((again.rejected, again.train_rows), (summary.rejected, 1));
    assert_eq!(rejected(out.path()), expected);
}

#[test]
fn caption_sources_have_an_order() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let folder = source.path();
    for (mark, name) in (20..).zip(["a", "b", "sub/c", "sub/d", "e"]) {
        write(folder, &format!("{name}.png"), png(mark));
    }
    write(
        folder,
        "a.json",
        r#"{"captions": ["json &amp;amp; one", "json two"], "tags": "x, y",
            "quality": ["high quality"]}"#,
    );
    write(folder, "a.txt", "txt");
    write(folder, "b.txt", "txt\n");
    let lines = [
        r#"{"file_name": "a.png", "caption": "line"}"#,
        r#"{"file_name": "sub/c.png", "caption": "upper line"}"#,
        r#"{"file_name": "sub/d.png", "alt_text": "line of d"}"#,
        r#"{"file_name": "sub/d.png", "caption": "second line of d"}"#,
        r#"{"file_name": "../x.png", "caption": "out"}"#,
        r#"{"file_name": "gone.png", "caption": "gone"}"#,
        "",
        "not json",
        r#"{"file_name": "./e.png", "caption": "e, a masterpiece"}"#,
    ];
    write(folder, "metadata.jsonl", lines.join("\n"));
    write(
        folder,
        "sub/metadata.jsonl",
        r#"{"file_name": "c.png", "caption": "lower line"}"#,
    );
    run(folder, out.path(), &settings());
    let rows = rows(out.path());
    let captions = |name: &str| rows[name].1.captions.clone();
    assert_eq!(captions("a.png"), ["json & one", "json two"]);
    let a = &rows["a.png"].1;
    assert_eq!(
        (a.tags.as_slice(), a.quality.as_slice(), a.verbatim),
        (
            &["x".to_owned(), "y".to_owned()][..],
            &["high quality".to_owned()][..],
            false
        )
    );
    assert_eq!(captions("b.png"), ["txt"]);
    assert_eq!(captions("sub/c.png"), ["lower line"]);
    assert_eq!(
        (captions("sub/d.png"), rows["sub/d.png"].1.verbatim),
        (vec!["line of d".to_owned()], true)
    );
    assert_eq!(
        (captions("e.png"), rows["e.png"].1.verbatim),
        (vec!["e, a masterpiece".to_owned()], true)
    );
    let expected = [
        ("a.txt", "second_caption"),
        ("metadata.jsonl:1", "second_caption"),
        ("metadata.jsonl:2", "second_caption"),
        ("metadata.jsonl:4", "second_caption"),
        ("metadata.jsonl:5", "bad_caption"),
        ("metadata.jsonl:6", "orphan_caption"),
        ("metadata.jsonl:8", "bad_caption"),
    ];
    let expected = expected
        .into_iter()
        .map(|(path, reason)| (path.to_owned(), vec![reason.to_owned()]))
        .collect();
    assert_eq!(rejected(out.path()), expected);
}

#[test]
fn interrupted_run_continues_to_the_same_bytes() {
    let source = tempfile::tempdir().unwrap();
    write_many(source.path(), 0..150);
    write_bad(&source.path().join("bad"));
    let whole = tempfile::tempdir().unwrap();
    let (codec, settings) = (codec(), settings());
    let mut calls = 0;
    let summary = prepare(
        source.path(),
        whole.path(),
        &settings,
        &codec,
        &mut |batch| {
            calls += 1;
            Ok(failing(batch))
        },
        &mut |_| {},
    );
    let rows = summary.unwrap().written_rows;
    for fail_at in [1, calls / 3, calls - 1] {
        let out = tempfile::tempdir().unwrap();
        let mut left = fail_at;
        let mut encode = |batch: &RgbBatch| {
            left -= 1;
            if left == 0 {
                Err("the power went".to_owned())
            } else {
                Ok(failing(batch))
            }
        };
        let error = prepare(
            source.path(),
            out.path(),
            &settings,
            &codec,
            &mut encode,
            &mut |_| {},
        )
        .unwrap_err();
        assert!(matches!(error, Error::Encode { .. }), "{error}");
        assert!(!out.path().join("manifest.json").exists());
        // `kill -9` also leaves a half-written file.
        write(out.path(), "latents/.writing-x.safetensors", "half");
        let mut again = 0;
        let mut encode = |batch: &RgbBatch| {
            again += 1;
            Ok(failing(batch))
        };
        let summary = prepare(
            source.path(),
            out.path(),
            &settings,
            &codec,
            &mut encode,
            &mut |_| {},
        )
        .unwrap();
        assert_eq!(summary.written_rows + summary.resumed_rows, rows);
        assert!(
            fail_at == 1 || summary.resumed_rows > 0,
            "finished objects are reused"
        );
        assert!(
            again <= calls - fail_at + 32,
            "{again} calls after {fail_at} of {calls}"
        );
        let (expected, found) = (files(whole.path()), files(out.path()));
        assert_eq!(
            found.keys().collect::<Vec<_>>(),
            expected.keys().collect::<Vec<_>>()
        );
        for (name, bytes) in expected {
            assert!(found[&name] == bytes, "{name} differs");
        }
    }
}

#[test]
fn unchanged_folder_changes_nothing() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_many(source.path(), 0..60);
    let first = run(source.path(), out.path(), &settings());
    assert_eq!(
        (first.written_rows, first.train_rows + first.test_rows),
        (60, 60)
    );
    assert!(
        first.test_rows > 0 && first.test_rows < 30,
        "{}",
        first.test_rows
    );
    let before = files(out.path());
    let second = run_without_encoding(source.path(), out.path(), &settings());
    assert!(before == files(out.path()));
    assert_eq!((second.written_rows, second.buckets), (0, first.buckets));
    // Without the files in `prep` it scans again, with the same result.
    fs::remove_dir_all(out.path().join("prep")).unwrap();
    run_without_encoding(source.path(), out.path(), &settings());
    let name = |name: &&String| !name.starts_with("prep/");
    let after = files(out.path());
    assert!(
        before
            .iter()
            .filter(|(n, _)| name(n))
            .eq(after.iter().filter(|(n, _)| name(n)))
    );
}

/// A new run reuses the results of a killed scan: here they wrongly report that a picture is
/// broken.
#[test]
fn killed_scan_is_continued() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_many(source.path(), 0..3);
    run(source.path(), out.path(), &settings());
    let facts = fs::read_to_string(out.path().join("prep/files.jsonl")).unwrap();
    let mut lines: Vec<serde_json::Value> = facts
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    lines[1]["fault"] = serde_json::json!({"reason": "broken", "detail": "a lie"});
    let other = tempfile::tempdir().unwrap();
    write(
        other.path(),
        "prep/files.part.jsonl",
        format!("\n{}\n{}\n{{\"pa", lines[0], lines[1]),
    );
    let summary = run(source.path(), other.path(), &settings());
    assert_eq!((summary.written_rows, rejected(other.path()).len()), (2, 1));
    let names = files(other.path());
    assert!(names.contains_key("prep/files.jsonl") && !names.contains_key("prep/files.part.jsonl"));
}

/// The files of latents.
fn latents(files: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    files
        .into_iter()
        .filter(|(name, _)| name.starts_with("latents/"))
        .collect()
}

#[test]
fn changed_folder_costs_only_the_changes() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_many(source.path(), 0..60);
    run(source.path(), out.path(), &settings());
    let before = rows(out.path());
    let old_latents = latents(files(out.path()));
    fs::remove_file(source.path().join("003.png")).unwrap();
    fs::remove_file(source.path().join("003.txt")).unwrap();
    write(source.path(), "005.txt", "another caption");
    fs::rename(source.path().join("007.png"), source.path().join("new.png")).unwrap();
    fs::rename(source.path().join("007.txt"), source.path().join("new.txt")).unwrap();
    write_many(source.path(), 100..110);
    let mut encoded = 0;
    let mut encode = |batch: &RgbBatch| {
        encoded += batch.num_images;
        Ok(means(batch))
    };
    let summary = prepare(
        source.path(),
        out.path(),
        &settings(),
        &codec(),
        &mut encode,
        &mut |_| {},
    )
    .unwrap();
    assert_eq!(
        (
            encoded,
            summary.written_rows,
            summary.deleted_rows,
            summary.rewritten_rows
        ),
        (10, 10, 1, 2)
    );
    let after = rows(out.path());
    assert_eq!(after.len(), 69);
    assert_eq!(after["005.png"].1.captions, ["another caption"]);
    assert_eq!(after["new.png"].2, before["007.png"].2);
    for (name, row) in &before {
        if !["003.png", "005.png", "007.png"].contains(&name.as_str()) {
            assert_eq!(&after[name], row, "{name}");
        }
    }
    let new_latents = latents(files(out.path()));
    assert!(
        old_latents
            .iter()
            .all(|(name, bytes)| new_latents.get(name) == Some(bytes)),
        "old objects are unchanged"
    );
    // A picture that is added again is not encoded again.
    write_many(source.path(), 3..4);
    let summary = run_without_encoding(source.path(), out.path(), &settings());
    assert_eq!(
        (summary.deleted_rows, rows(out.path())["003.png"].2.clone()),
        (0, before["003.png"].2.clone())
    );
    // All pictures can be deleted.
    let empty = tempfile::tempdir().unwrap();
    let summary = run_without_encoding(empty.path(), out.path(), &settings());
    assert_eq!(
        (
            summary.train_rows,
            summary.test_rows,
            rows(out.path()).len()
        ),
        (0, 0, 0)
    );
    assert_eq!(
        files(out.path())
            .keys()
            .filter(|name| name.contains("x"))
            .count(),
        0,
        "no object remains"
    );
}

#[test]
fn repack_mixes_anew_without_encoding() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_many(source.path(), 0..60);
    run(source.path(), out.path(), &settings());
    fs::remove_file(source.path().join("003.png")).unwrap();
    write_many(source.path(), 100..110);
    run(source.path(), out.path(), &settings());
    let before = rows(out.path());
    let order = |out: &Path| {
        let data = Dataset::open(out).unwrap();
        let shape = data.buckets(Split::Train)[0];
        data.records(Split::Train, shape.bucket)
            .unwrap()
            .into_iter()
            .map(|r| r.id)
            .collect::<Vec<SampleId>>()
    };
    let old_order = order(out.path());
    write(source.path(), "005.txt", "another caption");
    let repack = PrepSettings {
        repack: true,
        ..settings()
    };
    let summary = run_without_encoding(source.path(), out.path(), &repack);
    assert_eq!(
        (
            summary.written_rows,
            summary.copied_rows,
            summary.deleted_rows
        ),
        (69, 69, 0)
    );
    let after = rows(out.path());
    assert_ne!(order(out.path()), old_order);
    assert_eq!(
        after.keys().collect::<Vec<_>>(),
        before.keys().collect::<Vec<_>>()
    );
    assert_eq!(after["005.png"].1.captions, ["another caption"]);
    assert!(after.iter().all(|(name, row)| row.2 == before[name].2));
    let names = files(out.path());
    let data = Dataset::open(out.path()).unwrap();
    let listed = data.manifest().objects.len();
    assert_eq!(
        names
            .keys()
            .filter(|name| name.starts_with("latents/"))
            .count(),
        listed,
        "old objects are gone"
    );
    assert_eq!(
        names
            .keys()
            .filter(|name| name.starts_with("blocks-"))
            .count(),
        1
    );
}

#[test]
fn interrupted_run_about_another_folder_is_not_lost() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_many(source.path(), 0..150);
    let (mut left, codec) = (40, codec());
    let mut encode = |batch: &RgbBatch| {
        left -= 1;
        if left == 0 {
            Err("the power went".to_owned())
        } else {
            Ok(means(batch))
        }
    };
    prepare(
        source.path(),
        out.path(),
        &settings(),
        &codec,
        &mut encode,
        &mut |_| {},
    )
    .unwrap_err();
    write_many(source.path(), 200..201);
    fs::remove_file(source.path().join("000.png")).unwrap();
    let summary = run(source.path(), out.path(), &settings());
    assert!(summary.written_rows < 150, "finished objects are kept");
    let found: Vec<String> = rows(out.path()).into_keys().collect();
    let expected: Vec<String> = (1..150)
        .chain([200])
        .map(|mark| format!("{mark:03}.png"))
        .collect();
    assert_eq!(found, expected);
    run_without_encoding(source.path(), out.path(), &settings());
}

#[test]
fn another_codec_or_geometry_is_refused_by_name() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_many(source.path(), 0..5);
    run(source.path(), out.path(), &settings());
    let attempt = |settings: &PrepSettings, codec: &Codec| {
        let result = prepare(
            source.path(),
            out.path(),
            settings,
            codec,
            &mut |b| Ok(means(b)),
            &mut |_| {},
        );
        result.unwrap_err().to_string()
    };
    let other_vae = Codec {
        hash: "22".repeat(32),
        ..codec()
    };
    assert!(attempt(&settings(), &other_vae).contains("VAE"));
    let other_seed = PrepSettings {
        seed: 1,
        ..settings()
    };
    let error = attempt(&other_seed, &codec());
    assert!(
        error.contains("seed = 1") && error.contains("prepared with 0"),
        "{error}"
    );
    let odd = PrepSettings {
        step_px: 20,
        bucket_min_px: 0,
        min_side_px: 0,
        ..settings()
    };
    let error = attempt(&odd, &codec());
    assert!(
        ["step_px", "bucket_min_px", "min_side_px"]
            .iter()
            .all(|name| error.contains(name)),
        "{error}"
    );
    let renamed = Codec {
        vae: "another name".to_owned(),
        ..codec()
    };
    prepare(
        source.path(),
        out.path(),
        &settings(),
        &renamed,
        &mut |b| Ok(means(b)),
        &mut |_| {},
    )
    .unwrap();
}

#[test]
fn folders_that_cannot_be_are_refused() {
    let out = tempfile::tempdir().unwrap();
    let missing = out.path().join("missing");
    let result = prepare(
        &missing,
        &out.path().join("o"),
        &settings(),
        &codec(),
        &mut |b| Ok(means(b)),
        &mut |_| {},
    );
    assert!(matches!(result.unwrap_err(), Error::Io { path, .. } if path == missing));
    let result = prepare(
        out.path(),
        out.path(),
        &settings(),
        &codec(),
        &mut |b| Ok(means(b)),
        &mut |_| {},
    );
    assert!(matches!(result.unwrap_err(), Error::Invalid { .. }));
    // The scan skips a data set inside the folder.
    write_many(out.path(), 0..3);
    let inside = out.path().join("packed");
    run(out.path(), &inside, &settings());
    run_without_encoding(out.path(), &inside, &settings());
    assert_eq!((rows(&inside).len(), rejected(&inside).len()), (3, 0));
}

#[test]
fn wrong_number_of_latents_is_the_encoders_fault() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_many(source.path(), 0..3);
    let mut encode = |_: &RgbBatch| Ok(vec![f16::ONE; 7]);
    let error = prepare(
        source.path(),
        out.path(),
        &settings(),
        &codec(),
        &mut encode,
        &mut |_| {},
    )
    .unwrap_err();
    assert!(error.to_string().contains("7 numbers"), "{error}");
}
