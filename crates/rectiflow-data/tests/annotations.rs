//! Tables of annotations merged into a data set: texts are written again and no picture is encoded;
//! the data set has version 2 of the format while a caption has a source, and version 1 without.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod small_preparation;

use std::{collections::BTreeMap, fs, path::Path};

use rectiflow_data::{
    Dataset, PrepSettings, PrepSummary, Record, Result, RgbBatch, SampleId, Split,
    annotation::{Annotation, Kind, Status},
    annotation_rows::AnnotationWriter,
    picture::Picture,
    prepare,
};
use small_preparation::{codec, zeros};

fn settings() -> PrepSettings {
    PrepSettings {
        object_rows: 32,
        test_fraction: 0.2,
        ..small_preparation::settings()
    }
}

fn run(source: &Path, out: &Path, settings: &PrepSettings) -> (Result<PrepSummary>, usize) {
    let codec = codec();
    let mut num_encoded = 0;
    let encode = &mut |batch: &RgbBatch| {
        num_encoded += batch.num_images;
        Ok(zeros(batch))
    };
    let summary = prepare(source, out, settings, &codec, encode, &mut |_| {});
    (summary, num_encoded)
}

fn records(out: &Path) -> BTreeMap<SampleId, Record> {
    let dataset = Dataset::open(out).unwrap();
    let mut found = BTreeMap::new();
    for split in [Split::Train, Split::Test] {
        for shape in dataset.buckets(split) {
            for record in dataset.records(split, shape.bucket).unwrap() {
                found.insert(record.id, record);
            }
        }
    }
    for object in 0..dataset.manifest().objects.len() {
        dataset.verify_object(object).unwrap();
    }
    found
}

/// A folder of 40 pictures, of which the first half has a caption. Returns their ids.
fn pictures(source: &Path) -> Vec<SampleId> {
    let mut ids = Vec::new();
    for number in 0..40_u8 {
        let picture = Picture::filled(64, 64, [number, 9, 200]).to_png();
        ids.push(SampleId::of(&picture));
        fs::write(source.join(format!("{number:02}.png")), picture).unwrap();
        if number < 20 {
            fs::write(
                source.join(format!("{number:02}.txt")),
                format!("own {number}"),
            )
            .unwrap();
        }
    }
    ids
}

fn write_table(path: &Path, rows: &[Annotation]) {
    let file = fs::File::create(path).unwrap();
    let mut table = AnnotationWriter::new(file, &[]).unwrap();
    for row in rows {
        table.push(row.clone()).unwrap();
    }
    table.finish().unwrap();
}

fn caption(id: SampleId, mode: &str) -> Annotation {
    Annotation {
        text: Some(format!("{mode} of {id}")),
        model: "m".to_owned(),
        ..Annotation::new(id, "x", Kind::Caption, mode)
    }
}

#[test]
fn captions_are_merged_without_encoding_and_taken_out_again() {
    let folder = tempfile::tempdir().unwrap();
    let [source, out] = ["source", "out"].map(|name| folder.path().join(name));
    fs::create_dir_all(&source).unwrap();
    let ids = pictures(&source);
    let plain = settings();
    let (summary, num_encoded) = run(&source, &out, &plain);
    let summary = summary.unwrap();
    assert_eq!(
        (summary.train_rows + summary.test_rows, num_encoded),
        (20, 20)
    );
    let before = Dataset::open(&out).unwrap();
    let (identity, version) = (before.identity(), before.manifest().format_version);
    assert_eq!(version, 1);

    // Two modes for some pictures, a refusal, and a caption for one that had no text.
    let table = folder.path().join("captions.parquet");
    let refused = Annotation {
        status: Status::Refused,
        ..caption(ids[2], "short")
    };
    let rows = [
        caption(ids[0], "short"),
        caption(ids[0], "long"),
        caption(ids[1], "short"),
        refused,
        caption(ids[30], "short"),
        caption(SampleId(1), "short"),
    ];
    write_table(&table, &rows);
    let merged = PrepSettings {
        annotations: vec![table.clone()],
        ..settings()
    };
    let (summary, num_encoded) = run(&source, &out, &merged);
    let summary = summary.unwrap();
    assert_eq!(num_encoded, 1, "the picture that had no text");
    assert_eq!(summary.rewritten_rows, 2);
    assert_eq!(Dataset::open(&out).unwrap().manifest().format_version, 2);
    let found = records(&out);
    assert_eq!(found.len(), 21);
    let long = format!("long of {}", ids[0]);
    let short = format!("short of {}", ids[0]);
    assert_eq!(found[&ids[0]].captions, ["own 0".to_owned(), long, short]);
    assert_eq!(
        found[&ids[0]].caption_sources,
        ["source", "long by m", "short by m"]
    );
    assert_eq!(found[&ids[2]].captions, ["own 2"]);
    assert!(found[&ids[2]].caption_sources.is_empty());
    assert_eq!(found[&ids[30]].caption_sources, ["short by m"]);
    let rejected = fs::read_to_string(out.join("rejected.jsonl")).unwrap();
    assert!(rejected.contains("1 of its 5 usable rows are about no picture here"));

    // The same again changes nothing; without the table the first data set is back.
    let identity_2 = Dataset::open(&out).unwrap().identity();
    let (summary, num_encoded) = run(&source, &out, &merged);
    assert_eq!((summary.unwrap().rewritten_rows, num_encoded), (0, 0));
    assert_eq!(Dataset::open(&out).unwrap().identity(), identity_2);
    let error = run(&source, &out, &plain).0.unwrap_err().to_string();
    assert!(
        error.contains("it was prepared with --annotations"),
        "{error}"
    );
    assert_eq!(Dataset::open(&out).unwrap().identity(), identity_2);
    fs::remove_file(out.join("prep/annotations.txt")).unwrap();
    let (summary, num_encoded) = run(&source, &out, &plain);
    assert_eq!((summary.unwrap().rewritten_rows, num_encoded), (2, 0));
    let after = Dataset::open(&out).unwrap();
    assert_eq!(after.manifest().format_version, 1);
    assert_ne!(after.identity(), identity, "texts have a newer name");
    let found = records(&out);
    assert!(
        found.len() == 20
            && found
                .values()
                .all(|record| record.caption_sources.is_empty())
    );
}

#[test]
fn a_data_set_made_with_a_table_is_the_one_that_it_is_merged_into() {
    let folder = tempfile::tempdir().unwrap();
    let [source, first, second] = ["source", "a", "b"].map(|name| folder.path().join(name));
    fs::create_dir_all(&source).unwrap();
    let ids = pictures(&source);
    let table = folder.path().join("captions.parquet");
    let rows: Vec<Annotation> = ids[..20].iter().map(|id| caption(*id, "short")).collect();
    write_table(&table, &rows);
    let merged = PrepSettings {
        annotations: vec![table],
        ..settings()
    };
    run(&source, &first, &settings()).0.unwrap();
    run(&source, &first, &merged).0.unwrap();
    run(&source, &second, &merged).0.unwrap();
    assert_eq!(records(&first), records(&second));
}

#[test]
fn a_table_about_other_pictures_is_refused_before_anything_is_encoded() {
    let folder = tempfile::tempdir().unwrap();
    let [source, out] = ["source", "out"].map(|name| folder.path().join(name));
    fs::create_dir_all(&source).unwrap();
    pictures(&source);
    let table = folder.path().join("captions.parquet");
    write_table(
        &table,
        &[caption(SampleId(1), "short"), caption(SampleId(2), "short")],
    );
    let merged = PrepSettings {
        annotations: vec![table.clone()],
        ..settings()
    };
    let (result, num_encoded) = run(&source, &out, &merged);
    let error = result.unwrap_err().to_string();
    assert!(
        error.contains("captions.parquet: none of its 2 usable rows"),
        "{error}"
    );
    assert!(error.contains("one of the 40 pictures here"), "{error}");
    assert_eq!(num_encoded, 0);
    fs::write(&table, "PAR1 and no more").unwrap();
    let error = run(&source, &out, &merged).0.unwrap_err().to_string();
    assert!(
        error.contains("not a valid table of annotations"),
        "{error}"
    );
}
