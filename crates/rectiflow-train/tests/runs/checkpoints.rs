//! Checkpoints: exact, verified, and never an obstacle to training.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rectiflow_train::{
    Error,
    checkpoint::{Saved, found::verify},
    metrics::Event,
    recipe::Checked,
    run::Options,
};

use crate::fixture::{Fixture, run, run_spoilt, run_until, run_with, spoil_with_nan};

/// Every feature that has its own state.
const ALL: &[&str] = &[
    "optimizer.name=stable_adamw",
    "ema.half_life_samples=50",
    "train.text_encoders=text_encoder_2",
    "lr.ratio.text_encoder_2=0.1",
    "train.offset_noise=0.05",
];

/// Returns the bytes of all tensor files of a checkpoint.
fn tensors(checkpoint: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let names = [
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder_2/model.safetensors",
        "ema/unet/diffusion_pytorch_model.safetensors",
        "ema/text_encoder_2/model.safetensors",
        "optimizer.safetensors",
    ];
    assert!(
        !checkpoint.join("text_encoder").exists(),
        "frozen components are not copied"
    );
    names
        .into_iter()
        .map(|name| {
            (
                PathBuf::from(name),
                fs::read(checkpoint.join(name)).unwrap(),
            )
        })
        .collect()
}

fn assert_same_tensors(a: &Path, b: &Path) {
    for ((name, a), (_, b)) in tensors(a).into_iter().zip(tensors(b)) {
        assert!(a == b, "{} differs", name.display());
    }
}

/// As [`run_spoilt`], with a bad step that the guard skips before the first checkpoint.
fn run_with_a_skip(checked: &Checked) {
    let ran = run_spoilt(checked, |step, samples| {
        if step == 5 {
            spoil_with_nan(samples);
        }
    });
    assert_eq!(ran.acts(), [(5, "skip")]);
    assert!(ran.outcome.unwrap().finished);
}

#[test]
fn a_resumed_or_damaged_run_ends_with_the_bytes_of_the_straight_one() {
    let fixture = Fixture::new();
    run_with_a_skip(&fixture.recipe("straight", ALL));
    // A seventeenth step replaces the skipped one.
    let straight = fixture.checkpoint("straight", 17);
    let (weights, average) = (&tensors(&straight)[0].1, &tensors(&straight)[2].1);
    assert!(weights != average, "the average is another model");

    let checked = fixture.recipe("resumed", ALL);
    let mut spoil = |step: &mut _, _: &mut _| spoil_fifth(step);
    run_until(
        &checked,
        Options {
            before_step: Some(&mut spoil),
            ..Options::default()
        },
        11,
    );
    let saved = Saved::read(&fixture.checkpoint("resumed", 11)).unwrap();
    assert_eq!(
        (
            saved.position.cursor,
            saved.position.update,
            saved.position.samples
        ),
        (11, 10, 80)
    );
    assert_eq!(
        (saved.passed_over, saved.guard.acts.skips),
        (vec![(4, 5)], 1)
    );
    run(&checked).unwrap();
    assert_same_tensors(&straight, &fixture.checkpoint("resumed", 17));

    // The newest checkpoint has a flipped bit: the run resumes from the one before and ends with
    // the same bytes.
    let broken = fixture
        .checkpoint("resumed", 17)
        .join("optimizer.safetensors");
    let mut bytes = fs::read(&broken).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&broken, bytes).unwrap();
    let error = verify(&fixture.checkpoint("resumed", 17))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("optimizer.safetensors") && error.contains("damaged"),
        "{error}"
    );
    let ran = run_with(&checked, Options::default(), |_| {});
    let Some(Event::Start(start)) = ran.events.first() else {
        panic!("{:?}", ran.outcome)
    };
    assert_eq!(start.step, 16);
    assert_same_tensors(&straight, &fixture.checkpoint("resumed", 17));
    assert!(
        fixture
            .checkpoint("resumed", 17)
            .with_extension("damaged")
            .is_dir(),
        "the evidence is kept"
    );

    // Without a sound checkpoint the run does not silently start from the beginning.
    for entry in fs::read_dir(fixture.path("resumed/checkpoints")).unwrap() {
        fs::remove_file(entry.unwrap().path().join("recipe.toml")).unwrap();
    }
    let error = run(&checked).unwrap_err().to_string();
    assert!(error.contains("no other checkpoint is intact"), "{error}");
}

fn spoil_fifth(step: &mut rectiflow_data::batch::Step) {
    if step.step == 4 {
        spoil_with_nan(step);
    }
}

#[test]
fn a_checkpoint_that_cannot_be_written_does_not_stop_training() {
    let fixture = Fixture::new();
    let checked = fixture.recipe("full", &[]);
    let obstacle = fixture.checkpoint("full", 8).with_extension("unfinished");
    let ran = run_with(&checked, Options::default(), |event| {
        // A file in place of the folder: writing fails, as on a full disk.
        if matches!(event, Event::Step(step) if step.step == 7) {
            fs::write(&obstacle, "").unwrap();
        }
    });
    assert!(ran.outcome.unwrap().finished);
    let failed: Vec<_> = ran
        .events
        .iter()
        .filter_map(|event| match event {
            Event::SaveFailed { step, reason } => Some((*step, reason.clone())),
            _ => None,
        })
        .collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert!(
        failed[0].0 == 8 && failed[0].1.contains("step-00000008.unfinished"),
        "{failed:?}"
    );
    assert!(!fixture.checkpoint("full", 8).exists());
    verify(&fixture.checkpoint("full", 16)).unwrap();
}

#[test]
fn a_thread_that_cannot_write_does_not_stop_training() {
    let fixture = Fixture::new();
    let checked = fixture.recipe("late", &[]);
    let unfinished = fixture.checkpoint("late", 8).with_extension("unfinished");
    let ran = run_with(&checked, Options::default(), |event| {
        // A folder in place of the thread's first file: writing fails when training has already
        // continued.
        if matches!(event, Event::Step(step) if step.step == 7) {
            fs::create_dir_all(unfinished.join("unet/config.json/occupied")).unwrap();
        }
    });
    assert!(ran.outcome.unwrap().finished);
    let failed = ran.events.iter().find_map(|event| match event {
        Event::SaveFailed { step, reason } => Some((*step, reason.clone())),
        _ => None,
    });
    let (step, reason) = failed.expect("a warning");
    assert!(
        step == 8 && reason.contains("unet/config.json"),
        "{step} {reason}"
    );
    assert!(!unfinished.exists(), "the disk space is freed");
    assert!(!fixture.checkpoint("late", 8).exists());
    verify(&fixture.checkpoint("late", 16)).unwrap();
}

#[test]
fn a_checkpoint_is_the_state_of_its_step_although_training_goes_on() {
    let fixture = Fixture::new();
    let often = [ALL, &["checkpoint.every_steps=2", "checkpoint.keep=100"]].concat();
    run(&fixture.recipe("behind", &often)).unwrap();
    run(&fixture.recipe(
        "waiting",
        &[&often[..], &["checkpoint.in_background=false"]].concat(),
    ))
    .unwrap();
    for step in (2..=16).step_by(2) {
        verify(&fixture.checkpoint("behind", step)).unwrap();
        assert_same_tensors(
            &fixture.checkpoint("behind", step),
            &fixture.checkpoint("waiting", step),
        );
    }
}

#[test]
fn a_run_that_fails_keeps_the_checkpoint_that_was_being_written() {
    let fixture = Fixture::new();
    let checked = fixture.recipe("fails", &["guard.enabled=false"]);
    let ran = run_spoilt(&checked, |step, samples| {
        if step == 9 {
            spoil_with_nan(samples);
        }
    });
    assert!(
        matches!(ran.outcome, Err(Error::NotFinite { step: 8, .. })),
        "{:?}",
        ran.outcome
    );
    verify(&fixture.checkpoint("fails", 8)).unwrap();
}

#[test]
fn the_newest_are_kept_and_every_so_many_for_ever() {
    let fixture = Fixture::new();
    let keep = [
        "checkpoint.every_steps=2",
        "checkpoint.keep=2",
        "checkpoint.keep_every_steps=6",
    ];
    run(&fixture.recipe("kept", &keep)).unwrap();
    let mut names: Vec<String> = fs::read_dir(fixture.path("kept/checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert_eq!(names, [6, 12, 14, 16].map(|step| format!("step-{step:08}")));
}

#[test]
fn a_changed_recipe_is_shown_or_refused() {
    let fixture = Fixture::new();
    run_until(&fixture.recipe("changed", &[]), Options::default(), 8);
    let error = run(&fixture.recipe(
        "changed",
        &["lr.peak=2e-3", "train.micro_batch=8", "test.bins=5"],
    ))
    .unwrap_err();
    assert!(matches!(error, Error::Changed { .. }), "{error}");
    let message = error.to_string();
    for needle in [
        "lr.peak: 0.001 -> 0.002",
        "train.micro_batch: 4 -> 8",
        "--branch-from",
        "step-00000008",
    ] {
        assert!(message.contains(needle), "{needle} is missing in {message}");
    }
    assert!(
        !message.contains("test.bins"),
        "an allowed change is not listed: {message}"
    );

    let ran = run_with(
        &fixture.recipe("changed", &["test.bins=5", "train.samples=80"]),
        Options::default(),
        |_| {},
    );
    let Some(Event::Start(start)) = ran.events.first() else {
        panic!("{:?}", ran.outcome)
    };
    assert_eq!(
        start.changes,
        ["test.bins: 10 -> 5", "train.samples: 128 -> 80"]
    );
    assert_eq!(ran.outcome.unwrap().position.samples, 80);
}

#[test]
fn the_last_save_waits_for_what_is_in_its_way() {
    let fixture = Fixture::new();
    // A file in place of the folder, and a folder in place of a file.
    for (name, place) in [
        ("blocked", "step-00000016.unfinished"),
        (
            "occupied",
            "step-00000016.unfinished/unet/config.json/occupied",
        ),
    ] {
        let checked = fixture.recipe(name, &["checkpoint.every_steps=100"]);
        let obstacle = fixture.path(name).join("checkpoints").join(place);
        let folder = obstacle.parent().unwrap().to_owned();
        let ran = run_with(&checked, Options::default(), |event| match event {
            Event::Step(step) if step.step == 15 => {
                fs::create_dir_all(&folder).unwrap();
                fs::write(&obstacle, "").unwrap();
            }
            Event::SaveFailed { .. } if obstacle.exists() => fs::remove_file(&obstacle).unwrap(),
            _ => {}
        });
        let tries = |event: &&Event| matches!(event, Event::SaveFailed { step: 16, .. });
        assert_eq!(ran.events.iter().filter(tries).count(), 1, "{name}");
        assert!(ran.outcome.unwrap().finished);
        verify(&fixture.checkpoint(name, 16)).unwrap();
    }

    // Without patience the run fails, and does not claim to continue. Its weights are elsewhere.
    let spare = fixture.path("spare");
    let set = format!("checkpoint.spare_dir={}", spare.display());
    let checked = fixture.recipe("hasty", &["checkpoint.retry_secs=0", &set]);
    let obstacle = fixture.checkpoint("hasty", 16).with_extension("unfinished");
    let ran = run_with(&checked, Options::default(), |event| {
        if matches!(event, Event::Step(step) if step.step == 15) {
            fs::write(&obstacle, "").unwrap();
        }
    });
    let error = ran.outcome.unwrap_err().to_string();
    assert!(error.contains("step-00000016.unfinished"), "{error}");
    assert!(
        !ran.events
            .iter()
            .any(|event| matches!(event, Event::End { .. }))
    );
    verify(&fixture.checkpoint("hasty", 8)).unwrap();
    let folder = fs::read_dir(&spare).unwrap().next().unwrap().unwrap();
    let place = folder.path().join("step-00000016");
    verify(&place).unwrap();
    assert!(error.contains(place.to_str().unwrap()), "{error}");

    // Nor if no folder can be written: the message is that of the run's own.
    fs::write(fixture.path("file"), "").unwrap();
    let set = format!("checkpoint.spare_dir={}", fixture.path("file").display());
    let checked = fixture.recipe("hopeless", &["checkpoint.retry_secs=0", &set]);
    let obstacle = fixture
        .checkpoint("hopeless", 16)
        .with_extension("unfinished");
    let ran = run_with(&checked, Options::default(), |event| {
        if matches!(event, Event::Step(step) if step.step == 15) {
            fs::write(&obstacle, "").unwrap();
        }
    });
    let error = ran.outcome.unwrap_err().to_string();
    assert!(error.contains("step-00000016.unfinished"), "{error}");
}

#[test]
fn a_copy_that_a_user_made_is_neither_resumed_from_nor_removed() {
    let fixture = Fixture::new();
    run_until(&fixture.recipe("copied", &[]), Options::default(), 8);
    let folder = fixture.path("copied/checkpoints");
    for name in ["step-9", "step-00000099", "best"] {
        copy_folder(&fixture.checkpoint("copied", 8), &folder.join(name));
    }
    let keep = ["checkpoint.keep=1", "checkpoint.every_steps=4"];
    let ran = run_with(&fixture.recipe("copied", &keep), Options::default(), |_| {});
    let Some(Event::Start(start)) = ran.events.first() else {
        panic!("{:?}", ran.outcome)
    };
    assert_eq!(start.step, 8);
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert_eq!(names, ["best", "step-00000016", "step-00000099", "step-9"]);
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let place = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_folder(&path, &place);
        } else {
            fs::copy(&path, &place).unwrap();
        }
    }
}

#[test]
fn a_rate_that_jumps_is_refused_unless_it_is_accepted() {
    let fixture = Fixture::new();
    let cosine = |samples: &str| fixture.recipe("longer", &["lr.decay=cosine", samples]);
    run(&cosine("train.samples=32")).unwrap();
    let refused = run(&cosine("train.samples=64")).unwrap_err();
    assert!(matches!(refused, Error::RateJump { .. }), "{refused}");
    let message = refused.to_string();
    for needle in [
        "train.samples 32 -> 64",
        "from 1.5e-4 to 5.0e-4",
        "--accept-rate-jump",
        "--branch-from",
    ] {
        assert!(message.contains(needle), "{needle} is missing in {message}");
    }
    let accept = || Options {
        accept_rate_jump: true,
        ..Options::default()
    };
    let ran = run_with(&cosine("train.samples=64"), accept(), |_| {});
    assert_eq!(ran.outcome.unwrap().position.samples, 64);
    // The checkpoint has the longer recipe now: what was accepted is not asked again.
    assert!(run(&cosine("train.samples=64")).unwrap().finished);
    assert!(run(&cosine("train.samples=32")).unwrap().finished);
}

#[test]
fn numbers_that_cannot_be_end_a_run_with_a_message() {
    let fixture = Fixture::new();
    let checked = fixture.recipe("forged", &[]);
    run_until(&checked, Options::default(), 8);
    let checkpoint = fixture.checkpoint("forged", 8);
    let path = checkpoint.join("state.json");
    let good = fs::read_to_string(&path).unwrap();
    for (place, value, key) in [
        ("/shards", serde_json::json!(0), "shards"),
        ("/buckets", serde_json::json!([-1]), "buckets[0]"),
        (
            "/position/update",
            serde_json::json!(u64::MAX),
            "position.update",
        ),
        (
            "/guard/normal/updates",
            serde_json::json!(u64::MAX),
            "guard.normal.updates",
        ),
    ] {
        let mut state: serde_json::Value = serde_json::from_str(&good).unwrap();
        *state.pointer_mut(place).unwrap() = value;
        let bad = serde_json::to_string_pretty(&state).unwrap();
        write_with_sum(&checkpoint, &bad);
        verify(&checkpoint).unwrap_or_else(|error| assert!(error.to_string().contains(key)));
        let message = run(&checked).unwrap_err().to_string();
        assert!(
            message.contains("state.json") && message.contains(key),
            "{message}"
        );
    }
    write_with_sum(&checkpoint, &good);
    assert!(run(&checked).unwrap().finished);
}

/// Writes the `state.json` of a checkpoint, and its sum.
fn write_with_sum(checkpoint: &Path, state: &str) {
    fs::write(checkpoint.join("state.json"), state).unwrap();
    let path = checkpoint.join("BLAKE3SUMS");
    let mut sums = String::new();
    for line in fs::read_to_string(&path).unwrap().lines() {
        let hash = blake3::hash(state.as_bytes()).to_hex();
        if line.ends_with("  state.json") {
            sums += &format!("{hash}  state.json\n");
        } else {
            sums += &format!("{line}\n");
        }
    }
    fs::write(path, sums).unwrap();
}
