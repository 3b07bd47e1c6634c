//! Near-copies in a data set: found, taken out, kept out by later preparations, and brought back.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod small_preparation;

use std::{collections::BTreeMap, fs, io::Cursor, path::Path};

use image::{DynamicImage, Rgb, RgbImage, codecs::jpeg::JpegEncoder, imageops};
use rectiflow_data::{
    Dataset, PrepSettings, PrepSummary, RgbBatch, SampleId,
    annotation::{Annotation, Kind},
    near_copies::{
        NEAR_COPIES_FILE, NearCopies, NearCopyEvent, drop_near_copies, find_near_copies,
    },
    picture::Picture,
    prep::{SignedAgain, find_near_copies_in_source, sign_again},
    prepare,
    reject::Reason,
    small_pictures::SmallPictures,
};
use small_preparation::{codec, zeros};

const NUM_SCENES: u32 = 24;

fn settings() -> PrepSettings {
    PrepSettings {
        object_rows: 32,
        test_fraction: 0.5,
        ..small_preparation::settings()
    }
}

/// A drawn scene: waves of three colours that the number decides.
fn scene(number: u32, width: u32, height: u32) -> RgbImage {
    // Hashed: with a product and a remainder, two scenes differed by a thirtieth of their range.
    let draw = |k: u32| {
        let bytes = [number, k].map(u32::to_le_bytes).concat();
        xxhash_rust::xxh3::xxh3_64(&bytes) % 1000
    };
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
    let mut encode = |batch: &RgbBatch| Ok(zeros(batch));
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

#[test]
fn of_equal_pictures_the_one_with_the_highest_score_stays() {
    let [source, out] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    pictures(source.path());
    let tables = tempfile::tempdir().unwrap();
    let table = tables.path().join("scores.jsonl");
    let score = |name: &str, rank: f64| {
        let bytes = fs::read(source.path().join(name)).unwrap();
        let row = Annotation {
            score: Some(7.0 * rank),
            rank: Some(rank),
            ..Annotation::new(SampleId::of(&bytes), name, Kind::Score, "s")
        };
        row.to_line() + "\n"
    };
    // Smaller ones stay behind whatever their score is.
    let lines = [
        score("03-mirror.png", 0.5),
        score("06.png", 0.2),
        score("06-mirror.png", 0.9),
        score("09-small.jpg", 1.0),
    ];
    fs::write(&table, lines.concat()).unwrap();
    let scored = PrepSettings {
        annotations: vec![table.clone()],
        ..settings()
    };
    run(source.path(), out.path(), &scored);
    let found = find(out.path());
    let mut kept: Vec<&str> = found
        .clusters
        .iter()
        .map(|c| c[0].address.as_str())
        .collect();
    kept.sort_unstable();
    let expected = [
        "00.png",
        "03-mirror.png",
        "06-mirror.png",
        "09.png",
        "12.png",
        "15.png",
        "18.png",
        "21.png",
    ];
    assert_eq!(kept, expected);
    let sixth = found
        .clusters
        .iter()
        .find(|c| c[0].address == "06-mirror.png")
        .unwrap();
    assert_eq!((sixth[0].score, sixth[1].score), (Some(0.9), Some(0.2)));

    // A table that is gone counts for nothing, and is no error.
    fs::remove_file(&table).unwrap();
    assert_eq!(addresses(&find(out.path())), self::expected());
}

#[test]
fn lost_and_old_signatures_are_made_again_from_the_pictures() {
    let [source, out] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    pictures(source.path());
    run(source.path(), out.path(), &settings());
    let before = find(out.path());
    let sign = || sign_again(out.path(), source.path(), &mut |_| {}).unwrap();
    assert_eq!(sign(), SignedAgain::default(), "nothing is lost yet");

    // One file is lost, one is torn, the others are of the first version, which had no head.
    let folder = out.path().join("prep/signatures");
    let mut files: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    files.sort();
    assert!(files.len() >= 2, "{files:?}");
    let contents: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).unwrap()).collect();
    for (number, (file, bytes)) in files.iter().zip(&contents).enumerate() {
        match number {
            0 => fs::remove_file(file).unwrap(),
            1 => fs::write(file, &bytes[..bytes.len() / 2]).unwrap(),
            _ => fs::write(file, &bytes[8..]).unwrap(),
        }
    }
    let lost = find(out.path());
    assert!(lost.num_unsigned > 0 && lost.num_unsigned < lost.num_pictures);
    assert_eq!(sign().signed, lost.num_unsigned);
    for (file, bytes) in files.iter().zip(&contents) {
        assert!(fs::read(file).unwrap() == *bytes, "{}", file.display());
    }
    let after = find(out.path());
    assert_eq!(addresses(&after), addresses(&before));
    assert_eq!(after.num_unsigned, 0);

    // A picture that changed is not the one that was packed.
    fs::remove_dir_all(&folder).unwrap();
    fs::write(source.path().join("01.png"), b"no picture").unwrap();
    fs::remove_file(source.path().join("02.png")).unwrap();
    assert_eq!(sign().missing, 2);
    assert_eq!(find(out.path()).num_unsigned, 2);
    let again = run(source.path(), out.path(), &settings());
    assert_eq!(again.written_rows, 0, "and nothing is encoded");
}

/// Searches a source. Returns what was found and the number of pictures that were read.
fn search(source: &Path, work: &Path, settings: &PrepSettings) -> (NearCopies, usize) {
    let lines = || {
        let text = fs::read_to_string(work.join("pictures.jsonl")).unwrap_or_default();
        text.lines().filter(|line| line.starts_with('{')).count()
    };
    let before = lines();
    let found = find_near_copies_in_source(source, work, settings, &mut |_| {}).unwrap();
    (found, lines() - before)
}

#[test]
fn a_source_is_searched_without_a_data_set_and_prep_leaves_out_what_is_listed() {
    let [source, work, out] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    pictures(source.path());
    fs::write(
        source.path().join("broken.png"),
        b"\x89PNG\r\n\x1a\nno more",
    )
    .unwrap();
    fs::copy(
        source.path().join("01.png"),
        source.path().join("01-same.png"),
    )
    .unwrap();
    let num_pictures = u64::from(NUM_SCENES + 2 * NUM_SCENES / 3);
    let (found, num_read) = search(source.path(), work.path(), &settings());
    assert_eq!((found.num_pictures, found.num_unsigned), (num_pictures, 0));
    assert_eq!(addresses(&found), expected());
    assert_eq!(num_read as u64, num_pictures + 2);
    assert!(
        found
            .clusters
            .iter()
            .flatten()
            .all(|copy| copy.split.is_none())
    );

    // A later search reads what is new, and what lost its signature.
    assert_eq!(search(source.path(), work.path(), &settings()).1, 0);
    fs::copy(
        source.path().join("02.png"),
        source.path().join("02-same.png"),
    )
    .unwrap();
    let signatures = work.path().join("signatures.bin");
    let file = fs::File::options().write(true).open(&signatures).unwrap();
    file.set_len(file.metadata().unwrap().len() - 100).unwrap();
    let (again, num_read) = search(source.path(), work.path(), &settings());
    assert!((2..=3).contains(&num_read), "{num_read}");
    assert_eq!(again.num_unsigned, 0);
    assert_eq!(addresses(&again), expected());

    // The list.
    let list = work.path().join(NEAR_COPIES_FILE);
    let without = PrepSettings {
        without: vec![list.clone()],
        ..settings()
    };
    let prepared = run(source.path(), out.path(), &without);
    let num_copies = u64::from(2 * NUM_SCENES / 3);
    assert_eq!(prepared.rejected[&Reason::NearCopy], num_copies);
    assert_eq!(
        prepared.train_rows + prepared.test_rows,
        u64::from(NUM_SCENES)
    );
    assert!(find(out.path()).clusters.is_empty());

    // A list that is not there is a mistake.
    fs::remove_file(&list).unwrap();
    let mut encode = |_: &RgbBatch| panic!("nothing may be encoded");
    let error = prepare(
        source.path(),
        out.path(),
        &without,
        &codec(),
        &mut encode,
        &mut |_| {},
    );
    let error = error.unwrap_err().to_string();
    assert!(error.contains(NEAR_COPIES_FILE), "{error}");
}

#[test]
fn an_interrupted_search_goes_on_where_it_was() {
    let [source, whole, halves] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    pictures(source.path());
    let (expected, num_read) = search(source.path(), whole.path(), &settings());
    search(source.path(), halves.path(), &settings());
    // As a kill leaves it: signatures without facts, and half a line.
    let facts = halves.path().join("pictures.jsonl");
    let text = fs::read_to_string(&facts).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let kept = lines[..lines.len() / 2].join("\n") + "\n{\"path\": \"0";
    fs::write(&facts, kept).unwrap();
    let (found, num_again) = search(source.path(), halves.path(), &settings());
    assert!(
        num_again > 0 && num_again < num_read,
        "{num_again} of {num_read}"
    );
    assert_eq!(addresses(&found), addresses(&expected));

    let mut events = Vec::new();
    let mut take = |event| {
        if let NearCopyEvent::Signing {
            done, num_pictures, ..
        } = event
        {
            events.push((done, num_pictures));
        }
    };
    let settings = settings();
    find_near_copies_in_source(source.path(), halves.path(), &settings, &mut take).unwrap();
    assert_eq!(events.last(), Some(&(num_read as u64, num_read as u64)));
}

#[test]
fn the_filter_keeps_pictures_out_of_the_search() {
    let [source, work] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    pictures(source.path());
    let filtered = PrepSettings {
        filter: "width >= 150".to_owned(),
        ..settings()
    };
    let (found, _) = search(source.path(), work.path(), &filtered);
    let small = found
        .clusters
        .iter()
        .flatten()
        .filter(|copy| copy.width_px < 150);
    assert_eq!(small.count(), 0);
    assert_eq!(found.clusters.len() as u32, NUM_SCENES / 3);
}
