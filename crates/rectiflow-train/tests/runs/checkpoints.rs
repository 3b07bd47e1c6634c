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
