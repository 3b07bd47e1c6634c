//! The guard end to end: with it a spoilt run is as good as a clean one, without it it is lost.

use std::fs;

use rectiflow_data::batch::Step;
use rectiflow_train::{
    Error, blackbox::BlackBox, metrics::Event, replay::replay, run::Options, state::TrainState,
};
use tch::Tensor;

use crate::fixture::{
    Fixture, Ran, run_disturbed, run_spoilt, run_with, scale_latents, spoil_with_nan,
};

/// 100 steps, so that the four that are passed over are no great loss by themselves, whose rate
/// falls to nothing: at a constant one the last losses of two runs that differ in a rounding are
/// 10% apart.
const LONG: &[&str] = &["train.samples=800", "lr.decay=cosine"];

#[test]
fn poisoned_samples_cost_a_guarded_run_their_steps_and_an_unguarded_one_everything() {
    let fixture = Fixture::new();
    let clean = run_spoilt(&fixture.recipe("clean", LONG), |_, _| {});
    assert_eq!(
        (clean.acts(), clean.passed_over()),
        (vec![], vec![]),
        "no false alarm"
    );
    let untrained = first_test_loss(&clean);
    assert!(
        clean.test_loss() < 0.9 * untrained,
        "it learns: {untrained} to {}",
        clean.test_loss()
    );

    let poison = |step: u64, samples: &mut _| match step {
        72 | 89 => spoil_with_nan(samples),
        62 | 68 => scale_latents(samples, 1e4),
        _ => {}
    };
    let guarded = run_spoilt(&fixture.recipe("guarded", LONG), poison);
    assert!(
        guarded
            .outcome
            .as_ref()
            .is_ok_and(|outcome| outcome.finished)
    );
    assert_eq!(guarded.passed_over(), [62, 68, 72, 89]);
    assert_eq!(
        guarded.acts(),
        [(62, "skip"), (68, "skip"), (72, "skip"), (89, "skip")]
    );
    let ratio = guarded.test_loss() / clean.test_loss();
    assert!(
        ratio < 1.02,
        "guarded {}, clean {}",
        guarded.test_loss(),
        clean.test_loss()
    );

    let off = &[LONG, &["guard.enabled=false"]].concat();
    let scaled = |step: u64, samples: &mut _| {
        if [62, 68].contains(&step) {
            scale_latents(samples, 1e4);
        }
    };
    let lost = run_spoilt(&fixture.recipe("unguarded", off), scaled);
    let ratio = lost.test_loss() / clean.test_loss();
    assert!(
        ratio > 1.2 || ratio.is_nan(),
        "unguarded {}, clean {}",
        lost.test_loss(),
        clean.test_loss()
    );

    let ended = run_spoilt(&fixture.recipe("unguarded-nan", off), poison);
    assert!(
        matches!(ended.outcome, Err(Error::NotFinite { step: 71, .. })),
        "{:?}",
        ended.outcome
    );
}

/// 300 steps whose rate falls to nothing, so that their losses can be compared to a percent.
const SETTLED: &[&str] = &["train.samples=2400", "lr.decay=cosine"];

#[test]
fn a_corrupted_second_moment_is_rewound() {
    let fixture = Fixture::new();
    // A bad memory cell: numbers that are squares turn negative, and their roots are NaN.
    let corrupt = |step: &mut Step, state: &mut TrainState| {
        if step.step == 20 {
            let _ = state.optimizer.tensors()[1].1.narrow(0, 0, 8).fill_(-1.0);
        }
    };
    let guarded = run_disturbed(&fixture.recipe("guarded", &["train.samples=256"]), corrupt);
    assert_eq!(guarded.acts(), [(22, "skip"), (23, "skip"), (24, "rewind")]);
    assert!(
        guarded
            .outcome
            .as_ref()
            .is_ok_and(|outcome| outcome.finished)
    );
    assert!(
        guarded.test_loss() < first_test_loss(&guarded),
        "{}",
        guarded.test_loss()
    );
}

#[test]
#[ignore = "minutes: make guard-runs"]
fn a_corrupted_second_moment_costs_a_guarded_run_a_rewind_and_an_unguarded_one_everything() {
    let fixture = Fixture::new();
    let clean = run_spoilt(&fixture.recipe("clean", SETTLED), |_, _| {});
    assert_eq!(
        (clean.acts(), clean.passed_over()),
        (vec![], vec![]),
        "no false alarm"
    );
    // A bad memory cell: numbers that are squares turn negative, and their roots are NaN.
    let corrupt = |step: &mut Step, state: &mut TrainState| {
        if step.step == 100 {
            let _ = state.optimizer.tensors()[1].1.narrow(0, 0, 8).fill_(-1.0);
        }
    };
    let guarded = run_disturbed(&fixture.recipe("guarded", SETTLED), corrupt);
    assert_eq!(
        guarded.acts(),
        [(102, "skip"), (103, "skip"), (104, "rewind")]
    );
    assert!(
        guarded
            .outcome
            .as_ref()
            .is_ok_and(|outcome| outcome.finished)
    );
    let ratio = guarded.test_loss() / clean.test_loss();
    assert!(
        ratio < 1.02,
        "guarded {}, clean {}",
        guarded.test_loss(),
        clean.test_loss()
    );
    let off = fixture.recipe("unguarded", &[SETTLED, &["guard.enabled=false"]].concat());
    let lost = run_disturbed(&off, corrupt);
    assert!(
        matches!(lost.outcome, Err(Error::NotFinite { step: 101, .. })),
        "{:?}",
        lost.outcome
    );
}

/// Makes the updates from the end of step `first` to that of step `last` `factor` times as long:
/// what a learning rate does that is too high. A rewind is left as it is.
fn stretch((first, last): (u64, u64), factor: f64) -> impl FnMut(&mut Step, &mut TrainState) {
    let mut before: Option<(u64, Tensor)> = None;
    move |step, state| {
        let mut values = state.parameters.masters.to_tensor();
        let update = state.position.update;
        if let Some((_, old)) = before.as_ref().filter(|(last, _)| update == last + 1)
            && (first..=last).contains(&step.step)
        {
            values = old + (&values - old) * factor;
            state.parameters.masters.write(0, &values);
        }
        before = Some((update, values));
    }
}

#[test]
#[ignore = "minutes: make guard-runs"]
fn a_rate_that_is_too_high_for_a_while_costs_a_guarded_run_a_rewind_and_an_unguarded_one_everything()
 {
    let fixture = Fixture::new();
    let clean = run_spoilt(&fixture.recipe("clean", SETTLED), |_, _| {});
    let drift = |name: &str, enabled: &str| {
        let checked = fixture.recipe(name, &[SETTLED, &[enabled]].concat());
        run_disturbed(&checked, stretch((120, 160), 12.0))
    };
    let guarded = drift("guarded", "guard.enabled=true");
    let [(step, "rewind")] = guarded.acts()[..] else {
        panic!("{:?}", guarded.acts())
    };
    assert!((125..160).contains(&step), "{step}");
    let ratio = guarded.test_loss() / clean.test_loss();
    assert!(
        ratio < 1.02,
        "guarded {}, clean {}",
        guarded.test_loss(),
        clean.test_loss()
    );
    let lost = drift("unguarded", "guard.enabled=false");
    let ratio = lost.test_loss() / clean.test_loss();
    assert!(
        ratio > 1.2,
        "unguarded {}, clean {}",
        lost.test_loss(),
        clean.test_loss()
    );
}

#[test]
fn five_clean_runs_raise_no_alarm() {
    let fixture = Fixture::new();
    for seed in 1..=5 {
        let seed = format!("run.seed={seed}");
        // The guard as it is by default, and judging from the tenth update on.
        let more = ["train.samples=640", "guard.warmup_updates=10", &seed];
        let ran = run_spoilt(&fixture.recipe(&seed, &more), |_, _| {});
        assert!(ran.outcome.as_ref().is_ok_and(|outcome| outcome.finished));
        assert_eq!((ran.acts(), ran.passed_over()), (vec![], vec![]), "{seed}");
    }
}

fn first_test_loss(ran: &Ran) -> f64 {
    let loss = |event: &Event| match event {
        Event::Test(test) => Some(test.loss),
        _ => None,
    };
    ran.events.iter().find_map(loss).unwrap()
}

#[test]
fn without_room_for_snapshots_a_rewind_is_a_stop() {
    let fixture = Fixture::new();
    let checked = fixture.recipe("no-room", &["guard.snapshot_gib=0", "train.samples=200"]);
    let ran = run_spoilt(&checked, |step, samples| {
        if step > 10 {
            spoil_with_nan(samples);
        }
    });
    let Err(Error::Stopped { reason, .. }) = &ran.outcome else {
        panic!("{:?}", ran.outcome)
    };
    assert!(
        reason.contains("guard.snapshot_gib leaves no room"),
        "{reason}"
    );
    assert_eq!(ran.acts(), [(11, "skip"), (12, "skip"), (13, "stop")]);
}

#[test]
fn a_rewind_from_disk_is_that_from_memory() {
    let fixture = Fixture::new();
    let [memory, disk] = [
        ("memory", "guard.snapshot_gib=1"),
        ("disk", "guard.snapshot_gib=0"),
    ]
    .map(|(name, gib)| {
        let checked = fixture.recipe(
            name,
            &[gib, "guard.snapshot_disk_gib=1", "train.samples=200"],
        );
        let ran = run_spoilt(&checked, |step, samples| {
            if (15..=17).contains(&step) {
                assert_eq!(
                    fixture.path(name).join("snapshots").exists(),
                    name == "disk"
                );
                spoil_with_nan(samples);
            }
        });
        assert_eq!(ran.acts(), [(15, "skip"), (16, "skip"), (17, "rewind")]);
        ran
    });
    assert_eq!(memory.test_loss(), disk.test_loss());
    assert_eq!(
        fs::read_dir(fixture.path("disk/snapshots"))
            .unwrap()
            .count(),
        0,
        "none is left behind"
    );
}

#[test]
fn what_cannot_be_saved_is_rewound_and_then_stopped_for_good() {
    let fixture = Fixture::new();
    let checked = fixture.recipe("broken", &["guard.max_rewinds=2", "train.samples=200"]);
    let ran = run_spoilt(&checked, |step, samples| {
        if step > 10 {
            spoil_with_nan(samples);
        }
    });
    let Err(Error::Stopped { run_dir, reason }) = &ran.outcome else {
        panic!("{:?}", ran.outcome)
    };
    assert!(
        reason.contains("all 2 rewinds are spent") && reason.contains("NaN"),
        "{reason}"
    );
    let skips = |from: u64| [(from, "skip"), (from + 1, "skip")];
    let expected = [
        &skips(11)[..],
        &[(13, "rewind")],
        &skips(14),
        &[(16, "rewind")],
        &skips(17),
        &[(19, "stop")],
    ];
    assert_eq!(ran.acts(), expected.concat());
    let updates = ran.events.iter().filter_map(|event| match event {
        Event::Guard(act) if act.action == "rewind" => Some(act.update),
        _ => None,
    });
    assert_eq!(
        updates.collect::<Vec<_>>(),
        [5, 0],
        "at least 5 updates back from 10, then 50, or all there are"
    );

    let black_box = BlackBox::read(&run_dir.join("blackbox/step-00000013-rewind.json")).unwrap();
    assert_eq!(black_box.steps.len(), 10);
    let last = black_box.steps.last().unwrap();
    assert_eq!((last.step, last.samples.len()), (12, 8));
    assert!(
        last.loss.is_nan() && last.samples[0].loss.is_nan() && last.samples[7].loss.is_finite()
    );
    assert!(
        last.samples
            .iter()
            .all(|sample| sample.prompt.contains("square") || sample.prompt.is_empty())
    );
    assert!(
        black_box
            .checkpoint
            .unwrap()
            .ends_with("broken/checkpoints/step-00000008")
    );

    let again = run_with(&checked, Options::default(), |_| {});
    assert!(
        matches!(again.outcome, Err(Error::Stopped { .. })) && again.events.is_empty(),
        "a stop stays a stop"
    );
    let options = Options {
        acknowledge_stop: true,
        ..Options::default()
    };
    let acknowledged = run_with(&checked, options, |_| {});
    assert!(acknowledged.test_loss().is_finite());
    assert!(acknowledged.outcome.unwrap().finished);
    assert_eq!(
        fs::read_to_string(run_dir.join("STOPPED.acknowledged"))
            .unwrap()
            .trim(),
        reason
    );
}

#[test]
fn a_replay_makes_the_same_numbers_and_finds_the_poisoned_sample() {
    const POISON: u64 = 17;
    let fixture = Fixture::with_poison(Some(POISON));
    let checked = fixture.recipe("poisoned", &["guard.warmup_updates=2"]);
    let ran = run_with(&checked, Options::default(), |_| {});
    assert!(
        ran.outcome.as_ref().is_ok_and(|outcome| outcome.finished),
        "{:?}",
        ran.outcome
    );
    // Once an epoch of 61 samples; the second time there is a checkpoint behind it.
    let [(first, "skip"), (second, "skip"), ..] = ran.acts()[..] else {
        panic!("{:?}", ran.acts())
    };
    assert!(first <= 8 && second > 8, "{first} {second}");
    for step in [first, second] {
        let mut steps = Vec::new();
        let path = fixture.path(&format!("poisoned/blackbox/step-{step:08}-skip.json"));
        replay(&path, None, &mut |step| steps.push(step.clone())).unwrap();
        let (last, before) = steps.split_last().unwrap();
        assert_eq!((last.step + 1, last.worst.id), (step, POISON));
        assert!(
            last.wrong
                .as_ref()
                .is_some_and(|reason| reason.contains("times its mean")),
            "{last:?}"
        );
        assert!(before.iter().all(|step| step.wrong.is_none()), "{before:?}");
        let differing: Vec<_> = steps
            .iter()
            .filter(|step| step.is_as_seen() == Some(false))
            .collect();
        assert!(
            differing.is_empty() && last.is_as_seen() == Some(true),
            "{differing:?}"
        );
    }
}
