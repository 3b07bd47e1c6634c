//! Mirrors: a copy that is whole or not there, from which a run resumes bit for bit on an empty
//! machine, and which never stands in the way of training.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use rectiflow_train::{
    Error, checkpoint::found::verify, metrics::Event, recipe::Checked, run::Options,
};

use crate::fixture::{
    Fixture, Ran, run, run_ranks, run_spoilt, run_until, run_with, spoil_with_nan,
};

/// Every feature that has its own state.
const ALL: [&str; 4] = [
    "optimizer.name=stable_adamw",
    "ema.half_life_samples=50",
    "train.text_encoders=text_encoder_2",
    "lr.ratio.text_encoder_2=0.1",
];

/// Returns the recipe of a run with a mirror, the folder `NAME-mirror`.
fn recipe(fixture: &Fixture, name: &str, more: &[&str]) -> Checked {
    let mirror = mirror(fixture, name);
    let set = format!("checkpoint.mirror=file://{}", mirror.display());
    fixture.recipe(name, &[&[set.as_str()], more].concat())
}

fn mirror(fixture: &Fixture, name: &str) -> PathBuf {
    fixture.path(&format!("{name}-mirror"))
}

/// Returns the lines of a checkpoint's list of hashes, without those of the files that name the
/// run's folder and its duration.
fn hashes(checkpoint: &Path) -> Vec<String> {
    let sums = fs::read_to_string(checkpoint.join("BLAKE3SUMS")).unwrap();
    let mut lines: Vec<String> = sums.lines().map(str::to_owned).collect();
    lines.retain(|line| !line.ends_with("state.json") && !line.ends_with("recipe.toml"));
    assert!(lines.len() >= 3, "{sums}");
    lines
}

/// Returns the names of the checkpoints of a folder that have a list of hashes.
fn whole(run: &Path) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(run.join("checkpoints")).unwrap() {
        let entry = entry.unwrap();
        if entry.path().join("BLAKE3SUMS").is_file() {
            names.insert(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names
}

fn first_step(ran: &Ran) -> u64 {
    match ran.events.first() {
        Some(Event::Start(start)) => start.step,
        _ => panic!("{:?}", ran.outcome),
    }
}

fn num_steps(events: &Path) -> usize {
    let events = fs::read_to_string(events).unwrap();
    let is_step = |line: &&str| line.contains("\"event\":\"step\"");
    events.lines().filter(is_step).count()
}

#[test]
fn a_run_on_an_empty_machine_resumes_from_the_mirror_bit_for_bit() {
    let fixture = Fixture::new();
    run(&fixture.recipe("straight", &ALL)).unwrap();
    let checked = recipe(&fixture, "moved", &ALL);
    run_until(&checked, Options::default(), 10);
    let there = mirror(&fixture, "moved");
    verify(&there.join("checkpoints/step-00000010")).unwrap();
    assert_eq!(num_steps(&there.join("metrics.jsonl")), 10);

    fs::remove_dir_all(fixture.path("moved")).unwrap();
    let ran = run_with(&checked, Options::default(), |_| {});
    assert_eq!(first_step(&ran), 10);
    assert!(ran.outcome.unwrap().finished);
    let straight = hashes(&fixture.checkpoint("straight", 16));
    assert_eq!(hashes(&fixture.checkpoint("moved", 16)), straight);
    assert_eq!(hashes(&there.join("checkpoints/step-00000016")), straight);
    verify(&there.join("checkpoints/step-00000016")).unwrap();
    // The events of both machines are one history.
    assert_eq!(num_steps(&there.join("metrics.jsonl")), 16);
    let (here, copy) = (fixture.path("moved"), there);
    let events = |folder: &Path| fs::read(folder.join("metrics.jsonl")).unwrap();
    assert!(events(&here) == events(&copy), "the end of the run is sent");

    // A finished run begins nothing on a third machine.
    fs::remove_dir_all(fixture.path("moved")).unwrap();
    let ran = run_with(&checked, Options::default(), |_| {});
    assert_eq!(first_step(&ran), 16);
    assert!(ran.outcome.unwrap().finished);
}

#[test]
fn rotation_is_the_same_on_both_sides() {
    let fixture = Fixture::new();
    let keep = [
        "checkpoint.every_steps=2",
        "checkpoint.keep=2",
        "checkpoint.keep_every_steps=6",
    ];
    run(&recipe(&fixture, "rotated", &keep)).unwrap();
    let (here, there) = (fixture.path("rotated"), mirror(&fixture, "rotated"));
    let names = whole(&there);
    assert!(
        names.contains("step-00000014") && names.contains("step-00000016"),
        "{names:?}"
    );
    // The folder may have one more that was being copied when its turn had come.
    assert!(names.is_subset(&whole(&here)), "{names:?}");
    for name in &names {
        verify(&there.join("checkpoints").join(name)).unwrap();
    }
    // Nothing is left of those that were removed.
    for entry in fs::read_dir(there.join("checkpoints")).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().to_string_lossy().into_owned();
        if !names.contains(&name) {
            assert_eq!(num_files(&entry.path()), 0, "{name}");
        }
    }
}

fn num_files(folder: &Path) -> usize {
    let mut num = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        num += if path.is_dir() { num_files(&path) } else { 1 };
    }
    num
}

#[test]
fn a_partial_or_damaged_checkpoint_of_the_mirror_is_passed_over() {
    let fixture = Fixture::new();
    let often = ["checkpoint.every_steps=4"];
    let checked = recipe(&fixture, "partial", &often);
    run(&checked).unwrap();
    let straight = hashes(&fixture.checkpoint("partial", 16));
    let there = mirror(&fixture, "partial").join("checkpoints");
    // The list of hashes of one is not there yet, a byte of another has changed.
    fs::remove_file(there.join("step-00000016/BLAKE3SUMS")).unwrap();
    let damaged = there.join("step-00000012/optimizer.safetensors");
    let mut bytes = fs::read(&damaged).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&damaged, bytes).unwrap();

    fs::remove_dir_all(fixture.path("partial")).unwrap();
    let ran = run_with(&checked, Options::default(), |_| {});
    assert_eq!(first_step(&ran), 8);
    assert!(ran.outcome.unwrap().finished);
    assert_eq!(hashes(&fixture.checkpoint("partial", 16)), straight);
    for step in [12, 16] {
        verify(&there.join(format!("step-{step:08}"))).unwrap();
    }

    // With none but damaged ones a run does not begin from the start.
    for step in [8, 12, 16] {
        fs::write(there.join(format!("step-{step:08}/recipe.toml")), "").unwrap();
    }
    fs::remove_dir_all(fixture.path("partial")).unwrap();
    let error = run(&checked).unwrap_err().to_string();
    assert!(error.contains("damaged"), "{error}");
}

#[test]
fn a_stop_counts_on_another_machine() {
    let fixture = Fixture::new();
    let checked = recipe(
        &fixture,
        "stopped",
        &["guard.max_rewinds=2", "train.samples=200"],
    );
    let ran = run_spoilt(&checked, |step, samples| {
        if step > 10 {
            spoil_with_nan(samples);
        }
    });
    assert!(
        matches!(ran.outcome, Err(Error::Stopped { .. })),
        "{:?}",
        ran.outcome
    );
    let there = mirror(&fixture, "stopped");
    let reason = fs::read_to_string(there.join("STOPPED")).unwrap();
    assert!(fs::read_dir(there.join("blackbox")).unwrap().count() > 0);

    fs::remove_dir_all(fixture.path("stopped")).unwrap();
    for _ in 0..2 {
        let again = run(&checked);
        assert!(matches!(again, Err(Error::Stopped { .. })), "{again:?}");
    }
    let options = Options {
        acknowledge_stop: true,
        ..Options::default()
    };
    let ran = run_with(&checked, options, |_| {});
    assert!(first_step(&ran) >= 8);
    assert!(ran.outcome.unwrap().finished);
    assert!(!there.join("STOPPED").exists());
    let acknowledged = fs::read_to_string(there.join("STOPPED.acknowledged")).unwrap();
    assert_eq!(acknowledged, reason);
    // What was acknowledged is not asked again.
    assert!(run(&checked).unwrap().finished);
}

#[test]
fn a_mirror_that_is_away_stops_no_run_that_has_checkpoints() {
    let fixture = Fixture::new();
    let hasty = ["checkpoint.mirror_wait_secs=1"];
    let checked = recipe(&fixture, "alone", &hasty);
    let there = mirror(&fixture, "alone");
    // A file in place of the folder: nothing can be written.
    fs::write(&there, "").unwrap();
    let refused = run(&checked).unwrap_err().to_string();
    for needle in ["no checkpoint", "alone-mirror", "checkpoint.mirror"] {
        assert!(refused.contains(needle), "{needle} is missing in {refused}");
    }
    fs::remove_file(&there).unwrap();
    run_until(&checked, Options::default(), 8);
    fs::remove_dir_all(&there).unwrap();
    fs::write(&there, "").unwrap();
    assert!(run(&checked).unwrap().finished);
    verify(&fixture.checkpoint("alone", 16)).unwrap();
    // It is brought up to date by a later start.
    fs::remove_file(&there).unwrap();
    assert!(run(&checked).unwrap().finished);
    assert_eq!(whole(&there), whole(&fixture.path("alone")));
}

#[test]
fn a_full_disk_at_the_end_loses_no_weights() {
    let fixture = Fixture::new();
    run(&fixture.recipe("straight", &[])).unwrap();
    let spare = fixture.path("spare");
    let set = format!("checkpoint.spare_dir={}", spare.display());
    let full = [
        set.as_str(),
        "checkpoint.retry_secs=0",
        "checkpoint.every_steps=8",
    ];
    let checked = recipe(&fixture, "full", &full);
    let obstacle = fixture.checkpoint("full", 16).with_extension("unfinished");
    let ran = run_with(&checked, Options::default(), |event| {
        if matches!(event, Event::Step(step) if step.step == 15) {
            fs::write(&obstacle, "").unwrap();
        }
    });
    let message = ran.outcome.unwrap_err().to_string();
    let there = mirror(&fixture, "full");
    for needle in [spare.to_str().unwrap(), there.to_str().unwrap(), "mv "] {
        assert!(message.contains(needle), "{needle} is missing in {message}");
    }
    let folder = fs::read_dir(&spare)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let straight = hashes(&fixture.checkpoint("straight", 16));
    for place in [folder, there.join("checkpoints")] {
        let checkpoint = place.join("step-00000016");
        verify(&checkpoint).unwrap();
        assert_eq!(hashes(&checkpoint), straight);
    }
    // The same command takes it from the mirror, which is newer than the folder.
    fs::remove_file(&obstacle).unwrap();
    let ran = run_with(&checked, Options::default(), |_| {});
    assert_eq!(first_step(&ran), 16);
    assert!(ran.outcome.unwrap().finished);
    assert_eq!(hashes(&fixture.checkpoint("full", 16)), straight);
}

#[test]
fn several_ranks_have_one_mirror() {
    let fixture = Fixture::new();
    let checked = recipe(&fixture, "ranks", &["ranks.timeout_secs=20"]);
    let ran = run_ranks(&[checked.clone(), checked.clone()], |_, _| {});
    assert!(ran.iter().all(|ran| ran.outcome.is_ok()));
    let there = mirror(&fixture, "ranks");
    let last = there.join("checkpoints/step-00000016");
    verify(&last).unwrap();
    assert!(last.join("optimizer-00002-of-00002.safetensors").is_file());
    assert!(there.join("metrics-rank-00001.jsonl").is_file());
    let hashes = hashes(&last);
    fs::remove_dir_all(fixture.path("ranks")).unwrap();
    fs::remove_file(last.join("BLAKE3SUMS")).unwrap();
    let ran = run_ranks(&[checked.clone(), checked], |_, _| {});
    for rank in &ran {
        assert_eq!(first_step(rank), 8);
        assert!(rank.outcome.as_ref().is_ok_and(|outcome| outcome.finished));
    }
    assert_eq!(self::hashes(&fixture.checkpoint("ranks", 16)), hashes);
}
