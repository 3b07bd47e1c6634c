//! Damaged checkpoints: every reader verifies what it reads, and nothing else.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::fixture::{Fixture, READERS, Reader, Reads, STEP, Wrong, replace_by_copy, stderr};

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const NEWER: [&str; 10] = [
    "shards",
    "buckets",
    "epochs",
    "moments_from",
    "passed_over",
    "guard",
    "secs",
    "lineage",
    "moments",
    "tensor_norms",
];

/// A damage: its name, the file that the message names, and who meets it.
struct Damage {
    name: &'static str,
    file: &'static str,
    spoil: fn(&Path),
    /// The least that a reader reads to meet it.
    met_by: &'static [Reads],
}

/// The damages that every reader is tried with.
const FOR_ALL: [&str; 2] = ["a bit of the UNet", "the averaged weights"];
/// The readers that every damage is tried with.
const FEW: [&str; 2] = ["export, single file", "resume"];

const ALL: &[Reads] = &[Reads::Everything, Reads::Model, Reads::State];
const MODEL: &[Reads] = &[Reads::Everything, Reads::Model];
const EVERYTHING: &[Reads] = &[Reads::Everything];

fn flip(path: PathBuf, from_end: usize, bit: u8) {
    let mut bytes = fs::read(&path).expect("the file is there");
    let place = bytes.len() - from_end;
    bytes[place] ^= 1 << bit;
    fs::write(path, bytes).expect("written");
}

fn edit(path: PathBuf, edit: impl Fn(&str) -> String) {
    let text = fs::read_to_string(&path).expect("the file is there");
    fs::write(path, edit(&text)).expect("written");
}

/// Edits the keys of `state.json`.
fn edit_state(checkpoint: &Path, change: impl Fn(&mut serde_json::Map<String, serde_json::Value>)) {
    edit(checkpoint.join("state.json"), |text| {
        let mut state = serde_json::from_str(text).expect("JSON");
        change(&mut state);
        serde_json::to_string_pretty(&state).expect("JSON")
    });
}

const DAMAGES: &[Damage] = &[
    Damage {
        name: "a bit of the UNet",
        file: UNET,
        spoil: |at| flip(at.join(UNET), 1001, 4),
        met_by: MODEL,
    },
    Damage {
        name: "the last bit of the UNet",
        file: UNET,
        spoil: |at| flip(at.join(UNET), 1, 7),
        met_by: MODEL,
    },
    Damage {
        name: "a configuration",
        file: "unet/config.json",
        spoil: |at| edit(at.join("unet/config.json"), |text| format!("{text} ")),
        met_by: MODEL,
    },
    Damage {
        name: "a file that the list does not have",
        file: "unet/diffusion_pytorch_model.fp16.safetensors",
        spoil: |at| {
            let added = at.join("unet/diffusion_pytorch_model.fp16.safetensors");
            fs::copy(at.join(UNET), added).expect("copied");
        },
        met_by: MODEL,
    },
    Damage {
        name: "the moments",
        file: "optimizer.safetensors",
        spoil: |at| flip(at.join("optimizer.safetensors"), 9, 0),
        met_by: EVERYTHING,
    },
    Damage {
        name: "the averaged weights",
        file: "ema/unet/diffusion_pytorch_model.safetensors",
        spoil: |at| flip(at.join("ema").join(UNET), 1001, 4),
        met_by: EVERYTHING,
    },
    Damage {
        name: "the recipe",
        file: "recipe.toml",
        spoil: |at| {
            edit(at.join("recipe.toml"), |text| {
                text.replace("seed = 7", "seed = 3")
            })
        },
        met_by: EVERYTHING,
    },
    Damage {
        name: "a missing file",
        file: "optimizer.safetensors",
        spoil: |at| fs::remove_file(at.join("optimizer.safetensors")).expect("removed"),
        met_by: EVERYTHING,
    },
    Damage {
        name: "the state",
        file: "state.json",
        spoil: |at| {
            edit_state(at, |state| state["epochs"] = 0.125.into());
        },
        met_by: ALL,
    },
    Damage {
        name: "no state",
        file: "state.json",
        spoil: |at| fs::remove_file(at.join("state.json")).expect("removed"),
        // A run does not see such a folder.
        met_by: &[Reads::Model, Reads::State],
    },
    Damage {
        name: "no list",
        file: "BLAKE3SUMS",
        spoil: |at| fs::remove_file(at.join("BLAKE3SUMS")).expect("removed"),
        met_by: ALL,
    },
    Damage {
        name: "an empty list",
        file: "BLAKE3SUMS",
        spoil: |at| edit(at.join("BLAKE3SUMS"), |_| String::new()),
        met_by: ALL,
    },
    Damage {
        name: "a list that is cut",
        file: "BLAKE3SUMS",
        spoil: |at| edit(at.join("BLAKE3SUMS"), |text| text[..100].to_owned()),
        met_by: ALL,
    },
    Damage {
        name: "a list of bytes",
        file: "BLAKE3SUMS",
        spoil: |at| fs::write(at.join("BLAKE3SUMS"), b"\xff\xfe\0\0").expect("written"),
        met_by: ALL,
    },
    Damage {
        name: "a list with a line twice",
        file: "BLAKE3SUMS",
        spoil: |at| edit(at.join("BLAKE3SUMS"), |text| format!("{text}{text}")),
        met_by: ALL,
    },
    Damage {
        name: "another format, and another model",
        file: "state.json",
        spoil: |at| {
            edit_state(at, |state| state["format"] = 1.into());
            flip(at.join(UNET), 1001, 4);
        },
        met_by: ALL,
    },
    Damage {
        name: "another format and no list",
        file: "state.json",
        spoil: |at| {
            edit_state(at, |state| state["format"] = 1.into());
            fs::remove_file(at.join("BLAKE3SUMS")).expect("removed");
        },
        met_by: ALL,
    },
    Damage {
        name: "format 1 with averaged weights",
        file: "state.json",
        spoil: |at| {
            to_format_1(at);
            fs::create_dir(at.join("ema")).expect("a folder");
        },
        met_by: ALL,
    },
];

/// Makes what format 1 was of a checkpoint.
fn to_format_1(checkpoint: &Path) {
    fs::remove_file(checkpoint.join("BLAKE3SUMS")).expect("removed");
    fs::remove_dir_all(checkpoint.join("ema")).expect("removed");
    edit_state(checkpoint, |state| {
        state["format"] = 1.into();
        for key in NEWER {
            state.remove(key);
        }
    });
}

#[test]
fn every_reader_refuses_damage_in_what_it_reads_and_only_there() {
    let fixture = Fixture::new();
    let spoilt = fixture.path("spoilt").join(STEP);
    let mut wrong = Wrong::default();
    for damage in DAMAGES {
        replace_by_copy(&fixture.checkpoint(), &spoilt);
        (damage.spoil)(&spoilt);
        for reader in READERS {
            let what = format!("{}, {}", reader.name, damage.name);
            // A process takes a second: all readers meet some damages, two readers the others.
            let is_skipped = !FOR_ALL.contains(&damage.name) && !FEW.contains(&reader.name);
            if is_skipped || (reader.name == "resume" && damage.name == "no state") {
                continue;
            }
            let output = (reader.run)(&fixture, &spoilt, &[]);
            // A test loss is that of the weights and of their average.
            let is_average = damage.name == "the averaged weights" && reader.name == "eval";
            let is_met = damage.met_by.contains(&reader.reads) || damage.name == "no state";
            if is_met || is_average {
                wrong.expect_refusal(&what, &output, &["damaged", damage.file]);
            } else {
                wrong.expect_success(&what, &output);
            }
        }
    }
    averaged_weights(&fixture, &spoilt, &mut wrong);
    the_card(&fixture, &spoilt);
    wrong.assert_none();
}

/// Averaged weights are covered by the list of the checkpoint around them, however they are named.
fn averaged_weights(fixture: &Fixture, spoilt: &Path, wrong: &mut Wrong) {
    let readers = || {
        READERS
            .into_iter()
            .filter(|reader| reader.reads == Reads::Model)
    };
    let link = fixture.path("link");
    replace_by_copy(&fixture.checkpoint(), spoilt);
    std::os::unix::fs::symlink(spoilt.join("ema"), &link).expect("linked");
    let dotted = spoilt.join("ema/unet/..");
    // The other weights are not theirs.
    flip(spoilt.join(UNET), 1001, 4);
    let own = spoilt.join("ema");
    let all = [&own, &link, &dotted];
    let places = |reader: &Reader| {
        if FEW.contains(&reader.name) {
            &all[..]
        } else {
            &all[..1]
        }
    };
    for reader in readers() {
        for place in places(&reader) {
            let what = format!("{}, {}", reader.name, place.display());
            wrong.expect_success(&what, &(reader.run)(fixture, place, &[]));
        }
    }
    flip(spoilt.join("ema").join(UNET), 1001, 4);
    for reader in readers() {
        for place in places(&reader) {
            let output = (reader.run)(fixture, place, &[]);
            let what = format!("{}, spoilt {}", reader.name, place.display());
            wrong.expect_refusal(&what, &output, &["damaged", "ema", UNET]);
        }
    }
    // Without the checkpoint around them nothing covers them.
    let alone = fixture.path("alone/ema");
    replace_by_copy(&fixture.checkpoint().join("ema"), &alone);
    for reader in readers() {
        let output = (reader.run)(fixture, &alone, &[]);
        let words = ["damaged", "BLAKE3SUMS", "copy the whole checkpoint"];
        wrong.expect_refusal(&format!("{}, alone", reader.name), &output, &words);
    }
}

/// A part's own folder inside of a checkpoint is that checkpoint's; a card has no damaged recipe.
fn the_card(fixture: &Fixture, spoilt: &Path) {
    replace_by_copy(&fixture.checkpoint(), spoilt);
    edit(spoilt.join("recipe.toml"), |text| {
        text.replace("seed = 7", "seed = 3")
    });
    let export = READERS
        .iter()
        .find(|reader| reader.name == "export, single file");
    let output = (export.expect("it is there").run)(fixture, spoilt, &[]);
    let message = stderr(&output);
    assert!(
        output.status.success() && message.contains("recipe.toml: damaged"),
        "{message}"
    );
    let card = fs::read_to_string(fixture.path("out/single-file.md")).expect("a card");
    assert!(
        card.contains("samples seen") && !card.contains("### Recipe"),
        "{card}"
    );
    flip(spoilt.join(UNET), 1001, 4);
    let unet = spoilt.join("unet");
    let unet = unet.to_str().expect("UTF-8");
    for arguments in [
        &[
            "bench", "step", "--unet", unet, "--size", "64x64", "--steps", "3",
        ][..],
        &[
            "forward",
            "unet",
            "--model",
            unet,
            "--input",
            "ids.safetensors",
            "--output",
            "x",
        ],
    ] {
        let message = stderr(&fixture.rectiflow(arguments));
        assert!(
            message.contains(UNET) && message.contains("damaged"),
            "{message}"
        );
    }
}

#[test]
fn a_checkpoint_of_format_1_is_read_by_every_command_with_one_warning() {
    let fixture = Fixture::new();
    let old = fixture.path("old").join(STEP);
    replace_by_copy(&fixture.checkpoint(), &old);
    to_format_1(&old);
    let mut wrong = Wrong::default();
    for reader in READERS {
        let output = (reader.run)(&fixture, &old, &[]);
        wrong.expect_success(reader.name, &output);
        let message = stderr(&output);
        let warnings = message.matches("format 1 has no list of hashes").count();
        assert_eq!(warnings, 1, "{}: {message}", reader.name);
    }
    wrong.assert_none();
}
