//! Updates during the backward pass: the same run as with the sum of gradients where nothing is
//! scaled, and what becomes of a step that cannot be applied.

use std::fs;

use rectiflow_data::batch::Step;
use rectiflow_train::{
    Error,
    metrics::{Event, StepMetrics},
    replay::replay,
    run::Options,
    state::TrainState,
};
use tch::Tensor;

use crate::fixture::{Fixture, Ran, run, run_disturbed, run_spoilt, run_until, spoil_with_nan};

/// 16 steps of one micro-batch, guarded by the loss alone.
const ONE: &[&str] = &[
    "train.micro_batches=1",
    "train.samples=64",
    "guard.skip_by=loss",
    "guard.vitals_every_updates=0",
    "ema.half_life_samples=20",
];
const IN_BACKWARD: &str = "train.update_in_backward=true";
/// A norm that no gradient reaches.
const NO_LIMIT: &str = "train.clip_ratio=1e9";

const FILES: [&str; 4] = [
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder_2/model.safetensors",
    "ema/unet/diffusion_pytorch_model.safetensors",
    "optimizer.safetensors",
];

#[test]
fn a_run_without_a_sum_of_gradients_is_the_same_and_resumes_exactly() {
    let fixture = Fixture::new();
    for (name, more) in [
        ("fp32", &["train.dtype=fp32"][..]),
        (
            "8bit",
            &[
                "train.dtype=bf16",
                "optimizer.state=8bit",
                "memory.checkpointing=full",
            ],
        ),
    ] {
        let two = [
            "train.text_encoders=text_encoder_2",
            "lr.peak=1e-4",
            "train.samples=32",
        ];
        let summed = [ONE, &two, more].concat();
        let apart = [&summed[..], &[IN_BACKWARD, NO_LIMIT]].concat();
        let names = ["sum", "apart", "resumed"].map(|kind| format!("{name}-{kind}"));
        assert!(run(&fixture.recipe(&names[0], &summed)).unwrap().finished);
        assert!(run(&fixture.recipe(&names[1], &apart)).unwrap().finished);
        let resumed = fixture.recipe(&names[2], &apart);
        run_until(&resumed, Options::default(), 5);
        assert!(run(&resumed).unwrap().finished);
        for file in FILES {
            let [sum, apart, resumed] = names
                .each_ref()
                .map(|run| fs::read(fixture.checkpoint(run, 8).join(file)).unwrap());
            assert!(sum == apart, "{name}: {file}");
            assert!(resumed == apart, "{name}, resumed: {file}");
        }
    }
}

fn metrics(ran: &Ran, number: u64) -> &StepMetrics {
    let steps = ran.events.iter().filter_map(|event| match event {
        Event::Step(step) => Some(step),
        _ => None,
    });
    let mut found = steps.filter(|step| step.step == number);
    found.next().expect("the step is in the log")
}

#[test]
fn a_loss_skips_its_step_before_the_backward_pass() {
    let fixture = Fixture::new();
    let keys = [ONE, &[IN_BACKWARD]].concat();
    let ran = run_spoilt(&fixture.recipe("spoilt", &keys), |step, samples| {
        if step == 12 {
            spoil_with_nan(samples);
        }
    });
    assert!(ran.outcome.as_ref().is_ok_and(|outcome| outcome.finished));
    assert_eq!(ran.acts(), [(12, "skip")]);
    assert_eq!(ran.passed_over(), [12]);
    assert!(
        metrics(&ran, 12).gradient_norm.is_nan(),
        "there was no backward pass"
    );
    assert!(metrics(&ran, 11).gradient_norm > 0.0);
}

/// Sets weights of the samples of step 12 with which the loss is finite and gradients are not.
fn overflow(step: &mut Step) {
    if step.step == 11 {
        step.micro_batches[0].weights.fill(1e37);
    }
}

/// A guard that takes no loss for a spike.
const LEARNING: &str = "guard.warmup_updates=1000";

#[test]
fn a_gradient_that_is_not_finite_takes_the_run_back_to_a_snapshot() {
    let fixture = Fixture::new();
    let keys = [ONE, &[IN_BACKWARD, LEARNING]].concat();
    let ran = run_spoilt(&fixture.recipe("broken", &keys), |_, step| overflow(step));
    let outcome = ran.outcome.as_ref().expect("it goes on");
    assert!(outcome.finished);
    assert_eq!(ran.acts(), [(12, "rewind")]);
    assert!(metrics(&ran, 12).loss.is_finite());
    assert!(ran.test_loss().is_finite());
    // The snapshots are of updates 0, 5 and 10: steps 11 and 12 are lost, and made up for.
    assert_eq!(outcome.position.cursor, outcome.position.update + 2);
    assert!(outcome.position.samples >= 64);

    // The evidence shows it again.
    let folder = fixture.path("broken").join("blackbox");
    let black_box = fs::read_dir(folder)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let mut last = None;
    replay(&black_box, None, &mut |step| last = Some(step.clone())).unwrap();
    let last = last.expect("steps are repeated");
    assert_eq!(last.step, 11);
    assert!(last.wrong.is_some_and(|wrong| wrong.contains("not finite")) || last.loss < 1e30);
}

/// Masters, moments and usual norms.
fn everything(state: &TrainState) -> (Vec<Tensor>, Vec<f64>) {
    let mut all = vec![state.parameters.masters.to_tensor()];
    for (_, tensor) in state.optimizer.tensors() {
        all.push(tensor.copy());
    }
    all.push(state.average.as_ref().expect("an average").copy());
    let norms = state.tensor_norms.iter().map(|norm| norm.mean);
    (all, norms.collect())
}

#[test]
fn without_snapshots_it_goes_back_to_the_newest_checkpoint() {
    let fixture = Fixture::new();
    let keys = [
        ONE,
        &[
            IN_BACKWARD,
            LEARNING,
            "guard.snapshot_gib=0",
            "optimizer.state=8bit",
        ],
    ];
    let mut seen = Vec::new();
    let ran = run_disturbed(&fixture.recipe("broken", &keys.concat()), |step, state| {
        overflow(step);
        if step.step == 8 || step.step == 12 {
            seen.push((state.position, everything(state)));
        }
    });
    assert!(ran.outcome.as_ref().is_ok_and(|outcome| outcome.finished));
    assert_eq!(ran.acts(), [(12, "rewind")]);
    let [(at_checkpoint, before), (restored, after)] = &seen[..] else {
        panic!("two states: {}", seen.len())
    };
    assert_eq!((at_checkpoint.update, restored.update), (8, 8));
    assert_eq!(
        (restored.samples, restored.cursor),
        (at_checkpoint.samples, 12)
    );
    assert!(before.0.iter().zip(&after.0).all(|(a, b)| a.equal(b)));
    assert!(before.1 == after.1 && before.1.iter().all(|norm| *norm > 0.0));
}

#[test]
fn without_either_it_stops_and_writes_no_checkpoint() {
    let fixture = Fixture::new();
    let keys = [ONE, &[IN_BACKWARD, LEARNING, "checkpoint.every_steps=1000"]].concat();
    for (name, key) in [
        ("no-snapshot", "guard.snapshot_gib=0"),
        ("no-guard", "guard.enabled=false"),
    ] {
        let keys = [&keys[..], &[key]].concat();
        let ran = run_spoilt(&fixture.recipe(name, &keys), |_, step| overflow(step));
        let error = ran.outcome.expect_err("it ends");
        let is_named = match &error {
            // The program's exit code is 3.
            Error::Stopped { reason, .. } => reason.contains("neither a snapshot"),
            Error::HalfUpdated { step: 11, .. } => true,
            _ => false,
        };
        assert!(is_named, "{name}: {error:?}");
        let folder = fixture.path(name).join("checkpoints");
        let written = fs::read_dir(folder).map_or(0, Iterator::count);
        assert_eq!(written, 0, "{name}");
    }
}
