//! Models of scripts/golden/onnx_models.py: what they return for picture files is what Python's
//! onnxruntime returns for pictures that Pillow and NumPy have prepared.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod runtime;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use rectiflow_annotate::{
    error::Error,
    onnx::{
        feed::{Answer, Feed, Opened},
        input,
        model::{Choices, Device, Model},
        preparation::{Filter, Fit, Preparation, Preset},
    },
};
use rectiflow_data::reject::{Fault, Reason};
use runtime::{golden, places};

const TOLERANCE: f32 = 1e-4;

fn choices() -> Choices {
    Choices {
        input: input::Said {
            batch: 3,
            ..input::Said::default()
        },
        output: None,
        device: Device::Cpu,
        threads: 2,
    }
}

fn open(name: &str, choices: &Choices) -> Model {
    Model::open(&golden(name), choices, &places()).unwrap()
}

type Outputs = BTreeMap<String, BTreeMap<String, Vec<f32>>>;

fn expected() -> Outputs {
    serde_json::from_slice(&fs::read(golden("outputs.json")).unwrap()).unwrap()
}

/// What a model says of each picture, in the order of the pictures.
fn outputs(model: &mut Model, preparation: Preparation, files: &[PathBuf]) -> Vec<Vec<f32>> {
    let mut found = Vec::new();
    let open = |path: &PathBuf| Opened::File((), fs::read(path).unwrap());
    let mut feed = Feed { model, preparation };
    feed.run(files, &open, &mut |_, said| {
        match said {
            Answer::Numbers((), numbers) => found.push(numbers.to_vec()),
            other => panic!("{other:?}"),
        }
        Ok(())
    })
    .unwrap();
    found
}

fn compare(model: &str, preparation: Preparation, choices: &Choices) {
    let expected = &expected()[model];
    let files: Vec<PathBuf> = expected.keys().map(|name| golden(name)).collect();
    let mut opened = open(&format!("{model}.onnx"), choices);
    let found = outputs(&mut opened, preparation, &files);
    let mut largest: f32 = 0.0;
    for ((name, expected), found) in expected.iter().zip(&found) {
        assert_eq!(found.len(), expected.len(), "{model} {name}");
        for (a, b) in expected.iter().zip(found) {
            largest = largest.max((a - b).abs());
        }
    }
    assert!(largest <= TOLERANCE, "{model}: {largest} of {TOLERANCE}");
}

#[test]
fn a_tagger_says_what_it_says_in_python() {
    compare("tagger", Preset::Wd.preparation(), &choices());
}

#[test]
fn a_head_on_a_crop_says_what_it_says_in_python() {
    let preparation = Preparation {
        crop_share: 0.875,
        ..Preset::Imagenet.preparation()
    };
    compare("quality", preparation, &choices());
}

#[test]
fn a_model_for_one_picture_at_a_time_takes_many() {
    compare("classes", Preset::Siglip.preparation(), &choices());
}

#[test]
fn an_open_size_is_the_user_s() {
    let mut choices = choices();
    choices.input.size = Some((44, 36));
    compare("open", Preset::Siglip.preparation(), &choices);
}

#[test]
fn a_model_of_bytes_takes_bytes() {
    let preparation = Preparation {
        filter: Filter::Bilinear,
        scale: 1.0,
        ..Preset::Unit.preparation()
    };
    compare("bytes", preparation, &choices());
}

/// Halves have 11 bits: an output near 1 is in steps of 1e-3, and inputs round to others.
#[test]
fn a_model_of_halves_takes_halves() {
    let mut model = open("half.onnx", &choices());
    let expected = &expected()["half"];
    let files: Vec<PathBuf> = expected.keys().map(|name| golden(name)).collect();
    let found = outputs(&mut model, Preset::Siglip.preparation(), &files);
    for (expected, found) in expected.values().zip(&found) {
        for (a, b) in expected.iter().zip(found) {
            assert!((a - b).abs() <= 2e-3, "{a} {b}");
        }
    }
}

/// The order of pictures and the size of batches change nothing; unusable pictures are told.
#[test]
fn batches_of_any_size_say_the_same() {
    let names = [
        "wide.png",
        "selected_tags.csv",
        "high.png",
        "clear.png",
        "square.png",
    ];
    let mut items = Vec::new();
    for round in 0..7 {
        items.extend(names.map(|name| (round, name)));
    }
    let mut all = Vec::new();
    for batch in [1, 2, 5, 64] {
        let mut choices = choices();
        choices.input.batch = batch;
        let mut model = open("quality.onnx", &choices);
        let mut told = Vec::new();
        let open = |&(round, name): &(i32, &'static str)| match (round, name) {
            (3, "wide.png") => Opened::Skip,
            (4, "high.png") => Opened::Fault(Fault::new(Reason::Unreadable, "gone")),
            _ => Opened::File(round, fs::read(golden(name)).unwrap()),
        };
        let preparation = Preset::Imagenet.preparation();
        let mut feed = Feed {
            model: &mut model,
            preparation,
        };
        feed.run(&items, &open, &mut |&(round, name), said| {
            told.push(match said {
                Answer::Numbers(key, numbers) => {
                    assert_eq!(key, round);
                    (name, Some(numbers[0]))
                }
                Answer::Broken(key, fault) => {
                    assert_eq!((key, fault.reason), (round, Reason::NotAnImage));
                    (name, None)
                }
                Answer::Unreadable(_) | Answer::Skipped => ("none", None),
            });
            Ok(())
        })
        .unwrap();
        assert_eq!(told.len(), items.len());
        all.push(told);
    }
    for (batch, told) in all.iter().enumerate() {
        for (one, other) in all[0].iter().zip(told) {
            assert_eq!(one.0, other.0, "{batch}");
            let difference = one.1.unwrap_or(0.0) - other.1.unwrap_or(0.0);
            assert!(one.1.is_some() == other.1.is_some() && difference.abs() < 1e-5);
        }
    }
    let named: Vec<_> = all[0].iter().map(|(name, _)| *name).collect();
    assert_eq!((named[15], named[22]), ("none", "none"));
}

#[test]
fn an_error_ends_a_feed() {
    let mut model = open("quality.onnx", &choices());
    let items = vec![golden("wide.png"); 200];
    let open = |path: &PathBuf| Opened::File((), fs::read(path).unwrap());
    let mut feed = Feed {
        model: &mut model,
        preparation: Preset::Imagenet.preparation(),
    };
    let mut count = 0;
    let result = feed.run(&items, &open, &mut |_, _| {
        count += 1;
        Err(Error::Invalid {
            what: "disk".to_owned(),
            reason: "full".to_owned(),
        })
    });
    assert_eq!(
        (result.unwrap_err().to_string().as_str(), count),
        ("disk: full", 1)
    );
}

fn refusal(path: &Path, choices: &Choices) -> String {
    let error = Model::open(path, choices, &places())
        .unwrap_err()
        .to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

#[test]
fn files_of_another_kind_are_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("notes.onnx");
    fs::write(&text, "no model").unwrap();
    let cut = folder.path().join("cut.onnx");
    let whole = fs::read(golden("quality.onnx")).unwrap();
    fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    let empty = folder.path().join("empty.onnx");
    fs::write(&empty, "").unwrap();
    let gone = folder.path().join("gone.onnx");
    for (path, expected) in [
        (text, "cannot open it as a model"),
        (cut, "cannot open it as a model"),
        (empty, "model"),
        (gone, "there is no such file"),
        (
            golden("text.onnx"),
            "input \"input_ids\" is [?, 77]: expected a picture",
        ),
        (
            golden("detector.onnx"),
            "\"boxes\" is [?, 6, 64]: expected a number or logits",
        ),
        (golden("two_inputs.onnx"), "2 inputs (a, b): expected one"),
        (
            golden("open.onnx"),
            "[?, 3, ?, ?]: its size in pixels is open",
        ),
    ] {
        let error = refusal(&path, &choices());
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(error.contains(expected) && error.contains(name), "{error}");
    }
    let cuda = Choices {
        device: Device::Cuda(0),
        ..choices()
    };
    assert!(refusal(&golden("quality.onnx"), &cuda).contains("--features cuda"));
    let output = Choices {
        output: Some("logits".to_owned()),
        ..choices()
    };
    assert!(refusal(&golden("tagger.onnx"), &output).contains("only output, embedding"));
    let output = Choices {
        output: Some("embedding".to_owned()),
        ..choices()
    };
    assert!(refusal(&golden("tagger.onnx"), &output).contains("[?, 16, 16, 16]"));
}

#[test]
fn a_stretched_picture_is_not_a_padded_one() {
    // What makes the comparisons with Python able to fail.
    let files = [golden("wide.png")];
    let mut model = open("tagger.onnx", &choices());
    let padded = outputs(&mut model, Preset::Wd.preparation(), &files);
    for other in [
        Preparation {
            fit: Fit::Stretch,
            ..Preset::Wd.preparation()
        },
        Preset::Unit.preparation(),
    ] {
        let found = outputs(&mut model, other, &files);
        let difference = padded[0][0] - found[0][0];
        assert!(difference.abs() > 10.0 * TOLERANCE, "{difference}");
    }
}
