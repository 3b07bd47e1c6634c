//! Near-copies in a data set: found, taken out, kept out by later preparations, and brought back.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{collections::BTreeMap, fs, io::Cursor, path::Path};

use half::f16;
use image::{DynamicImage, Rgb, RgbImage, codecs::jpeg::JpegEncoder, imageops};
use rectiflow_data::{
    Codec, Dataset, PrepSettings, PrepSummary, RgbBatch,
    near_copies::{NEAR_COPIES_FILE, NearCopies, drop_near_copies, find_near_copies},
    picture::Picture,
    prepare,
    reject::Reason,
    small_pictures::SmallPictures,
};

const NUM_SCENES: u32 = 24;

fn codec() -> Codec {
    Codec {
        vae: "grey".to_owned(),
        hash: "44".repeat(32),
        scaling_factor: 0.13025,
        down_factor: 8,
        channels: 4,
        dtype: "F16".to_owned(),
    }
}

fn settings() -> PrepSettings {
    PrepSettings {
        area_px: 64 * 64,
        step_px: 16,
        bucket_min_px: 32,
        bucket_max_px: 128,
        min_side_px: 16,
        object_rows: 32,
        test_fraction: 0.5,
        ..PrepSettings::default()
    }
}

/// A drawn scene: waves of three colours that the number decides.
fn scene(number: u32, width: u32, height: u32) -> RgbImage {
    let draw = |k: u32| (number * 7919 + k * 104_729) % 1000;
    let wave = |channel: u32, x: f32, y: f32| {
        let [a, b, c] = [0, 1, 2].map(|k| draw(3 * channel + k) as f32 / 1000.0);
        let turns = (2.0 + 9.0 * a) * x + (2.0 + 9.0 * b) * y + 6.0 * c;
        (127.0 + 100.0 * turns.sin()) as u8
    };
    RgbImage::from_fn(width, height, |x, y| {
        let (x, y) = (x as f32 / width as f32, y as f32 / height as f32);
        Rgb([0, 1, 2].map(|channel| wave(channel, x, y)))
    })
}

/// Scenes, and of every third a smaller JPEG and a mirror image.
fn pictures(folder: &Path) {
    for number in 0..NUM_SCENES {
        let image = scene(number, 200, 150);
        save(folder, &format!("{number:02}"), &image.clone().into());
        if number % 3 == 0 {
            let small = DynamicImage::from(scene(number, 120, 90));
            let mut bytes = Cursor::new(Vec::new());
            JpegEncoder::new_with_quality(&mut bytes, 60)
                .encode_image(&small)
                .unwrap();
            fs::write(
                folder.join(format!("{number:02}-small.jpg")),
                bytes.into_inner(),
            )
            .unwrap();
            fs::write(folder.join(format!("{number:02}-small.txt")), "a copy").unwrap();
            let mirror = imageops::flip_horizontal(&image);
            save(folder, &format!("{number:02}-mirror"), &mirror.into());
        }
    }
}

fn save(folder: &Path, name: &str, image: &DynamicImage) {
    image.save(folder.join(format!("{name}.png"))).unwrap();
    // The longest text is the scene's own.
    let text = if name.len() == 2 {
        "a scene of waves"
    } else {
        "a copy"
    };
    fs::write(folder.join(format!("{name}.txt")), text).unwrap();
}

fn run(source: &Path, out: &Path, settings: &PrepSettings) -> PrepSummary {
    let mut encode = |batch: &RgbBatch| {
        let num_squares = (batch.width_px / 8 * (batch.height_px / 8)) as usize;
        Ok(vec![f16::ONE; batch.num_images * 4 * num_squares])
    };
    prepare(source, out, settings, &codec(), &mut encode, &mut |_| {}).unwrap()
}

fn find(out: &Path) -> NearCopies {
    find_near_copies(out, &mut |_| {}).unwrap()
}

/// The addresses of each cluster, by that of the picture that stays.
fn addresses(found: &NearCopies) -> BTreeMap<String, Vec<String>> {
    let mut all = BTreeMap::new();
    for cluster in &found.clusters {
        let mut copies: Vec<String> = cluster[1..]
            .iter()
            .map(|copy| copy.address.clone())
            .collect();
        copies.sort();
        all.insert(cluster[0].address.clone(), copies);
    }
    all
}

fn expected() -> BTreeMap<String, Vec<String>> {
    let mut all = BTreeMap::new();
    for number in (0..NUM_SCENES).step_by(3) {
        let copies = [
            format!("{number:02}-mirror.png"),
            format!("{number:02}-small.jpg"),
        ];
        all.insert(format!("{number:02}.png"), copies.to_vec());
    }
    all
}

#[test]
fn copies_are_found_and_stay_out_until_the_list_is_gone() {
    let [source, out] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    pictures(source.path());
    let all = run(source.path(), out.path(), &settings());
    let num_copies = u64::from(2 * NUM_SCENES / 3);
    let num_rows = u64::from(NUM_SCENES) + num_copies;
    assert_eq!(all.train_rows + all.test_rows, num_rows);

    let found = find(out.path());
    assert_eq!((found.num_pictures, found.num_unsigned), (num_rows, 0));
    assert_eq!(addresses(&found), expected());
    assert!(
        found.num_across_splits > 0,
        "half of the pictures are held out"
    );
    let before = Dataset::open(out.path()).unwrap().identity();
    assert_eq!(drop_near_copies(out.path(), &found).unwrap(), num_copies);
    let dataset = Dataset::open(out.path()).unwrap();
    assert_ne!(dataset.identity(), before);
    let objects = dataset.manifest().objects.iter();
    let num_live: u64 = objects.map(|object| u64::from(object.live_rows())).sum();
    assert_eq!(num_live, u64::from(NUM_SCENES));
    assert!(
        find(out.path()).clusters.is_empty(),
        "no split has a copy of another's"
    );

    // Later preparations honour the list, also one that shuffles all rows again.
    for settings in [
        settings(),
        PrepSettings {
            repack: true,
            ..settings()
        },
    ] {
        let again = run(source.path(), out.path(), &settings);
        assert_eq!(again.rejected[&Reason::NearCopy], num_copies);
        assert_eq!(again.train_rows + again.test_rows, u64::from(NUM_SCENES));
        assert_eq!(again.written_rows, again.copied_rows);
    }
    assert_eq!(
        find(out.path()).num_unsigned,
        0,
        "signatures move with their rows"
    );

    // A copy is back once the picture that stays instead is gone.
    fs::remove_file(source.path().join("00.png")).unwrap();
    let without = run(source.path(), out.path(), &settings());
    assert_eq!(without.rejected[&Reason::NearCopy], num_copies - 2);
    assert_eq!(
        addresses(&find(out.path())).len(),
        1,
        "its two copies are copies of each other"
    );
    fs::remove_file(out.path().join(NEAR_COPIES_FILE)).unwrap();
    let back = run(source.path(), out.path(), &settings());
    assert_eq!(back.train_rows + back.test_rows, num_rows - 1);
    assert!(!back.rejected.contains_key(&Reason::NearCopy));
}

#[test]
fn a_damaged_list_is_named_and_old_data_sets_say_what_is_missing() {
    let [source, out] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    pictures(source.path());
    run(source.path(), out.path(), &settings());
    fs::write(out.path().join(NEAR_COPIES_FILE), "{\"drop\": 7}\n").unwrap();
    let mut encode = |_: &RgbBatch| panic!("nothing may be encoded");
    let error = prepare(
        source.path(),
        out.path(),
        &settings(),
        &codec(),
        &mut encode,
        &mut |_| {},
    );
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("near-copies.jsonl: not a valid list"),
        "{error}"
    );
    assert!(error.contains("line 1"), "{error}");
    fs::remove_file(out.path().join(NEAR_COPIES_FILE)).unwrap();
    fs::remove_dir_all(out.path().join("prep")).unwrap();
    let found = find(out.path());
    assert_eq!(found.num_unsigned, found.num_pictures);
    assert!(found.clusters.is_empty());
}

#[test]
fn figures_are_the_pictures_or_what_was_compared() {
    let [source, out] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    pictures(source.path());
    run(source.path(), out.path(), &settings());
    let found = find(out.path());
    let geometry = settings().geometry();
    let small = SmallPictures::open(source.path(), out.path(), &geometry).unwrap();
    let first = &found.clusters[0][0];
    let (real, blurred) = (
        small.picture(&first.address, 160).unwrap(),
        first.thumbnail(160),
    );
    for picture in [&real, &blurred] {
        assert_eq!((picture.width_px(), picture.height_px()), (160, 120));
    }
    // Blurred, and nearer to its own picture than to any other.
    let distance = |other: &Picture| -> u64 {
        let differences = other.pixels().iter().zip(blurred.pixels());
        differences.map(|(&a, &b)| u64::from(a.abs_diff(b))).sum()
    };
    for number in 0..NUM_SCENES {
        let address = format!("{number:02}.png");
        let other = small.picture(&address, 160).unwrap();
        let is_nearer = distance(&real) * 2 < distance(&other);
        assert!(address == first.address || is_nearer, "{address}");
    }
    assert!(small.picture("nothing.png", 160).is_none());
}
