//! Bases that have moved since a checkpoint was written.

use std::{fs, path::Path};

use crate::fixture::{
    Fixture, READERS, Reads, STEP, TINY, Wrong, rectiflow_in, replace_by_copy, stderr, text,
};

/// The readers that are tried with everything.
const FEW: [&str; 3] = ["export, single file", "eval", "resume"];

/// The hash of a part in a checkpoint's `state.json`.
fn recorded(checkpoint: &Path, part: &str) -> String {
    let state = fs::read_to_string(checkpoint.join("state.json")).expect("a state");
    let state: serde_json::Value = serde_json::from_str(&state).expect("JSON");
    let hash = state["frozen"][part]["blake3"].as_str();
    hash.expect("the part is frozen").to_owned()
}

#[test]
fn a_moved_base_is_found_by_its_hash_at_every_place_where_it_may_be() {
    let fixture = Fixture::new();
    let checkpoint = fixture.checkpoint();
    let averaged = checkpoint.join("ema");
    let mut wrong = Wrong::default();
    // Renamed: nothing is at the recorded path.
    let moved = fixture.path("models/renamed");
    fs::create_dir(fixture.path("models")).expect("a folder");
    fs::rename(fixture.path("base"), &moved).expect("renamed");
    nothing_says_where(&fixture, &mut wrong);
    let single = fixture.path("base.safetensors");
    for (what, base) in [("a folder", text(&moved)), ("a single file", text(&single))] {
        for reader in READERS {
            // A process takes a second: every reader takes a folder, some a single file.
            if base == text(&single) && !FEW.contains(&reader.name) {
                continue;
            }
            let output = (reader.run)(&fixture, &checkpoint, &["--base", base]);
            let what = format!("{}, --base with {what}", reader.name);
            wrong.expect_success(&what, &output);
            let is_told = stderr(&output).contains(&format!("is taken from {base}"));
            assert!(is_told, "{what}: {}", stderr(&output));
        }
    }
    let base = format!("model.base='{}'", moved.display());
    for reader in READERS {
        if ["eval", "resume", "--branch-from"].contains(&reader.name) {
            let output = (reader.run)(&fixture, &checkpoint, &["--set", &base]);
            wrong.expect_success(&format!("{}, model.base", reader.name), &output);
        }
        if reader.reads == Reads::Model {
            let output = (reader.run)(&fixture, &averaged, &["--base", text(&moved)]);
            wrong.expect_success(&format!("{}, averaged", reader.name), &output);
        }
    }

    another_model_at_the_old_path(&fixture, &moved, &mut wrong);
    parts_by_themselves(&fixture, &moved, &mut wrong);
    wrong.assert_none();
}

/// The message says which part is missing, by its hash, and where it was looked for.
fn nothing_says_where(fixture: &Fixture, wrong: &mut Wrong) {
    let checkpoint = fixture.checkpoint();
    let old = fixture.path("base");
    for reader in READERS {
        let part = match reader.name {
            "prep --vae" | "inspect --vae" => "vae",
            "forward clip-g" => "text_encoder_2",
            _ => "text_encoder",
        };
        let hash = recorded(&checkpoint, part);
        let place = old.join(part);
        let words = [
            STEP,
            part,
            &hash,
            text(&place),
            "the recorded path: nothing at",
            "model.base",
            "--base",
        ];
        let output = (reader.run)(fixture, &checkpoint, &[]);
        wrong.expect_refusal(&format!("{}, moved", reader.name), &output, &words);
    }
}

/// A place with other weights is passed over, and named if nothing else is found.
fn another_model_at_the_old_path(fixture: &Fixture, moved: &Path, wrong: &mut Wrong) {
    let checkpoint = fixture.checkpoint();
    let old = fixture.path("base");
    replace_by_copy(moved, &old);
    // The second text encoder of one model in the folder of another: a byte differs.
    let weights = old.join("text_encoder_2/model.safetensors");
    let mut bytes = fs::read(&weights).expect("weights");
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).expect("written");
    for reader in READERS {
        if !FEW.contains(&reader.name) {
            continue;
        }
        let output = (reader.run)(fixture, &checkpoint, &["--base", text(moved)]);
        wrong.expect_success(&format!("{}, another base", reader.name), &output);
        let output = (reader.run)(fixture, &checkpoint, &[]);
        let hash = recorded(&checkpoint, "text_encoder_2");
        let words = ["text_encoder_2", &hash, "has BLAKE3", "the recorded path"];
        let what = format!("{}, only another base", reader.name);
        wrong.expect_refusal(&what, &output, &words);
    }
    fs::remove_dir_all(&old).expect("removed");
}

/// One part's own folder is enough for a command that needs no other, and so is another checkpoint
/// that references or holds the part.
fn parts_by_themselves(fixture: &Fixture, moved: &Path, wrong: &mut Wrong) {
    let checkpoint = fixture.checkpoint();
    let own = moved.join("text_encoder_2");
    let other = fixture.path("first/checkpoints").join(STEP);
    for reader in READERS {
        if reader.name == "forward clip-g" {
            for base in [&own, &other] {
                let output = (reader.run)(fixture, &checkpoint, &["--base", text(base)]);
                wrong.expect_success(&format!("--base {}", base.display()), &output);
            }
        }
    }
    let nowhere = fixture.path("nowhere");
    let output = (READERS[0].run)(fixture, &checkpoint, &["--base", text(&nowhere)]);
    let words = ["--base: nothing at", text(&nowhere)];
    wrong.expect_refusal("--base names nothing", &output, &words);
}

/// A recipe may name its base by a relative path, and a branch keeps parts in its run's folder:
/// both are found when everything moves together.
#[test]
fn a_project_that_moves_as_a_whole_keeps_working() {
    let fixture = Fixture::new();
    let mut wrong = Wrong::default();
    // A branch of the first run freezes both text encoders, and copies them.
    let first = fixture.path("first/checkpoints").join(STEP);
    let set = [
        "--set",
        "run.dir='project/child'",
        "--set",
        "train.samples=8",
    ];
    let tiny = Path::new(TINY);
    let recipe = fixture.write_recipe("branch", tiny, "first-data", "");
    let branch = ["train", text(&recipe), "--branch-from", text(&first)];
    fixture.succeed(&[&branch[..], &set].concat());
    // A run whose base has a relative path.
    fs::create_dir(fixture.path("project/models")).expect("a folder");
    fs::rename(fixture.path("base"), fixture.path("project/models/base")).expect("moved");
    let relative = fixture.write_recipe("relative", Path::new("models/base"), "data", "");
    let run = ["train", text(&relative), "--set", "run.dir='runs/relative'"];
    let output = rectiflow_in(&fixture.path("project"), &run);
    wrong.expect_success("a relative base", &output);

    fs::rename(fixture.path("project"), fixture.path("elsewhere")).expect("moved");
    let elsewhere = fixture.path("elsewhere");
    let sample = |model: &str| {
        let arguments = ["sample", "--model", model, "--prompt", "a", "--steps", "1"];
        rectiflow_in(&elsewhere, &[&arguments[..], &["--size", "64x64"]].concat())
    };
    let relative_run = format!("runs/relative/checkpoints/{STEP}");
    wrong.expect_success("its recipe's base", &sample(&relative_run));
    // The branch has its text encoders in its run's folder, and the VAE at the first base.
    let child = fs::read_dir(elsewhere.join("child/checkpoints")).expect("checkpoints");
    let child = child
        .last()
        .expect("a checkpoint")
        .expect("an entry")
        .path();
    wrong.expect_success("a branch that moved", &sample(text(&child)));
    // Repeating the command that began a branch resumes it, though its parent has moved too.
    let parent = fixture.path("parent");
    replace_by_copy(&first, &parent);
    fs::remove_dir_all(fixture.path("first")).expect("removed");
    let set = [
        "--set",
        "run.dir='elsewhere/child'",
        "--set",
        "train.samples=10",
    ];
    let branch = ["train", text(&recipe), "--branch-from", text(&parent)];
    let output = fixture.rectiflow(&[&branch[..], &set].concat());
    wrong.expect_success("a branch of a parent that moved", &output);
    wrong.assert_none();
}
