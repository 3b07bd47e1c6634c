//! Branches: a run that begins at another run's checkpoint, with another batch, rate, frozen set or
//! objective.

use std::{fs, path::Path};

use rectiflow_sdxl::tensor_file::TensorFile;
use rectiflow_train::{
    Error,
    checkpoint::Saved,
    eval::evaluate,
    metrics::{Event, Start},
    run::Options,
};

use crate::fixture::{Fixture, Ran, run_until, run_with};

fn from(checkpoint: &Path) -> Options<'static> {
    Options {
        branch_from: Some(checkpoint.to_owned()),
        ..Options::default()
    }
}

fn start(ran: &Ran) -> &Start {
    match ran.events.first() {
        Some(Event::Start(start)) => start,
        other => panic!("{other:?}, {:?}", ran.outcome),
    }
}

#[test]
fn a_branch_carries_weights_samples_and_moments_on_with_another_batch_and_rate() {
    let fixture = Fixture::new();
    run_until(&fixture.recipe("parent", &[]), Options::default(), 8);
    let parent = fixture.checkpoint("parent", 8);

    let more = ["train.micro_batch=8", "train.samples=192", "lr.peak=1e-4"];
    let checked = fixture.recipe("child", &more);
    let ran = run_with(&checked, from(&parent), |_| {});
    let begun = start(&ran);
    assert_eq!(
        begun.branched_from.as_deref(),
        Some(parent.canonicalize().unwrap().as_path())
    );
    assert!(
        begun
            .changes
            .contains(&"train.micro_batch: 4 -> 8".to_owned()),
        "{:?}",
        begun.changes
    );
    // 64 samples at 61 per epoch, in steps of 16: four steps of the new order are the nearest whole
    // number.
    assert!((3..=4).contains(&begun.step), "{}", begun.step);
    let position = ran.outcome.as_ref().unwrap().position;
    assert!(
        position.samples >= 192 && position.update < 8 + 9,
        "{position:?}"
    );

    // Before its first step it is the parent's model with the parent's moments.
    let losses = evaluate(&checked, &parent, None)
        .unwrap()
        .trained
        .test
        .unwrap();
    let Some(Event::Test(test)) = ran
        .events
        .iter()
        .find(|event| matches!(event, Event::Test(_)))
    else {
        panic!()
    };
    assert_eq!((test.loss, test.samples), (losses.loss, 64));
    let last = ran.outcome.unwrap().checkpoint.unwrap();
    let saved = Saved::read(&last).unwrap();
    assert_eq!(saved.lineage.len(), 1);
    assert_eq!(
        (
            saved.lineage[0].position.samples,
            saved.moments_from["unet"]
        ),
        (64, 0)
    );

    // Repeating the command resumes; another ancestor is refused, and so is a run without samples
    // left.
    assert!(
        run_with(&checked, from(&parent), |_| {})
            .outcome
            .unwrap()
            .finished
    );
    let error = run_with(&checked, from(&fixture.base()), |_| {})
        .outcome
        .unwrap_err();
    assert!(
        matches!(error, Error::Branch { .. }) && error.to_string().contains("another run.dir"),
        "{error}"
    );
    let error = run_with(
        &fixture.recipe("short", &["train.samples=64"]),
        from(&parent),
        |_| {},
    )
    .outcome
    .unwrap_err();
    assert!(error.to_string().contains("has seen 64 samples"), "{error}");
}

#[test]
fn a_branch_may_freeze_and_thaw_and_does_not_need_its_parent_any_more() {
    let fixture = Fixture::new();
    let base = fixture.base(); // both text encoders were trained
    let other = [
        "train.text_encoders=text_encoder",
        "objective.parameterization=v",
        "optimizer.name=stable_adamw",
    ];
    let checked = fixture.recipe("child", &other);
    let ran = run_with(&checked, from(&base), |_| {});
    let last = ran.outcome.unwrap().checkpoint.unwrap();
    let frozen = &Saved::read(&last).unwrap().frozen;
    assert_eq!(frozen.keys().collect::<Vec<_>>(), ["text_encoder_2", "vae"]);
    let kept = fixture.path("child/base/text_encoder_2/model.safetensors");
    assert_eq!(
        fs::read(&kept).unwrap(),
        fs::read(base.join("text_encoder_2/model.safetensors")).unwrap()
    );

    // Unfreezing bigG: its moments begin here, CLIP-L's are dropped, the UNet's continue.
    let thawed = fixture.recipe(
        "grandchild",
        &["train.text_encoders=text_encoder_2", "train.samples=200"],
    );
    let outcome = run_until(&thawed, from(&last), 16);
    let saved = Saved::read(&outcome.checkpoint.unwrap()).unwrap();
    assert_eq!(saved.lineage.len(), 2);
    assert_eq!(
        (
            saved.moments_from["unet"],
            saved.moments_from["text_encoder_2"]
        ),
        (0, 16)
    );

    // The parents are deleted; the run continues.
    fs::remove_dir_all(fixture.path("base")).unwrap();
    fs::remove_dir_all(fixture.path("child/checkpoints")).unwrap();
    assert!(
        run_with(&thawed, from(&last), |_| {})
            .outcome
            .unwrap()
            .finished
    );
}

#[test]
fn averaged_weights_can_be_branched_from_and_have_no_moments() {
    let fixture = Fixture::new();
    run_until(
        &fixture.recipe("parent", &["ema.half_life_samples=30"]),
        Options::default(),
        8,
    );
    let averaged = fixture.checkpoint("parent", 8).join("ema");
    let checked = fixture.recipe("child", &["train.samples=72", "ema.half_life_samples=30"]);
    let outcome = run_with(&checked, from(&averaged), |_| {}).outcome.unwrap();
    let saved = Saved::read(&outcome.checkpoint.clone().unwrap()).unwrap();
    assert_eq!(
        (saved.moments_from["unet"], outcome.position.update),
        (8, 9)
    );
    // After one update from zero moments the second moment is (1 - beta2) times the squared
    // gradient, which is not negative.
    let moments =
        TensorFile::open(&outcome.checkpoint.unwrap().join("optimizer.safetensors")).unwrap();
    assert!(
        moments
            .tensor("mean_square")
            .unwrap()
            .min()
            .double_value(&[])
            >= 0.0
    );
}
