//! Several ranks, each a thread with its own process group: any number of them is the same run.

use std::{fs, path::Path};

use rectiflow_train::{
    Error,
    blackbox::BlackBox,
    checkpoint::{Saved, found::verify},
    metrics::{Event, StepMetrics},
    recipe::Checked,
    traffic::Collective,
};

use crate::fixture::{Fixture, Ran, run_ranks, run_until, spoil_with_nan};

/// Steps of four micro-batches of two samples, so that there are four lanes, at a rate at which
/// rounding errors stay small.
const FOUR: [&str; 4] = [
    "train.micro_batch=2",
    "train.micro_batches=4",
    "lr.peak=1e-4",
    "ranks.timeout_secs=20",
];

fn recipes(fixture: &Fixture, name: &str, ranks: usize, more: &[&str]) -> Vec<Checked> {
    (0..ranks)
        .map(|_| fixture.recipe(name, &[&FOUR[..], more].concat()))
        .collect()
}

fn steps(ran: &Ran) -> Vec<&StepMetrics> {
    fn step(event: &Event) -> Option<&StepMetrics> {
        if let Event::Step(step) = event {
            Some(step)
        } else {
            None
        }
    }
    ran.events.iter().filter_map(step).collect()
}

fn losses(ran: &Ran) -> Vec<f64> {
    steps(ran).iter().map(|step| step.loss).collect()
}

fn first_test(ran: &Ran) -> f64 {
    let test = |event: &Event| {
        if let Event::Test(test) = event {
            Some(test.loss)
        } else {
            None
        }
    };
    ran.events
        .iter()
        .find_map(test)
        .expect("the start of a run is measured")
}

fn assert_finished(ran: &[Ran]) {
    for (rank, ran) in ran.iter().enumerate() {
        assert!(
            ran.outcome.as_ref().is_ok_and(|outcome| outcome.finished),
            "rank {rank}: {:?}",
            ran.outcome
        );
    }
}

/// Returns the bytes of the UNet and of all parts of the optimiser's state, in order.
fn weights_and_moments(checkpoint: &Path) -> (Vec<u8>, Vec<Vec<u8>>) {
    verify(checkpoint).unwrap();
    let mut names: Vec<_> = fs::read_dir(checkpoint)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    names.retain(|path| {
        path.file_name()
            .unwrap()
            .to_string_lossy()
            .starts_with("optimizer")
    });
    names.sort();
    let moments: Vec<Vec<u8>> = names.iter().map(|path| fs::read(path).unwrap()).collect();
    assert_eq!(moments.len(), Saved::read(checkpoint).unwrap().shards);
    (
        fs::read(checkpoint.join("unet/diffusion_pytorch_model.safetensors")).unwrap(),
        moments,
    )
}

#[test]
fn a_run_is_the_same_at_any_number_of_ranks_and_with_any_sharding() {
    let fixture = Fixture::new();
    let fifty = [
        "train.micro_batch=1",
        "train.samples=200",
        "checkpoint.every_steps=50",
        "test.training_samples=13",
    ];
    let run = |name: &str, ranks: usize, sharding: &str| {
        let set = format!("ranks.sharding={sharding}");
        let ran = run_ranks(
            &recipes(&fixture, name, ranks, &[&fifty[..], &[&set]].concat()),
            |_, _| {},
        );
        assert_finished(&ran);
        ran
    };
    let alone = run("one", 1, "once");
    assert_eq!(losses(&alone[0]).len(), 50);
    for (name, ranks, sharding) in [
        ("two", 2, "once"),
        ("three", 3, "once"),
        ("four", 4, "once"),
        ("all", 2, "none"),
        ("each", 3, "each"),
    ] {
        let ran = run(name, ranks, sharding);
        for (step, (a, b)) in losses(&alone[0]).iter().zip(losses(&ran[0])).enumerate() {
            assert!(
                (a / b - 1.0).abs() < 1e-5,
                "{name}, step {step}: {a} and {b}"
            );
        }
        for other in &ran[1..] {
            assert_eq!(
                losses(other),
                losses(&ran[0]),
                "all ranks record the same numbers"
            );
        }
        let (a, b) = (first_test(&alone[0]), first_test(&ran[0]));
        assert!(
            (a / b - 1.0).abs() < 1e-6,
            "the test loss of the same weights, {name}: {a} and {b}"
        );
    }
    // The same number of ranks twice has the same bits.
    let again = run("again", 3, "once");
    let of = |name: &str| weights_and_moments(&fixture.checkpoint(name, 50));
    assert!(of("three") == of("again"));
    assert_eq!(of("four").1.len(), 4);
    check_traffic(&again[0]);
    assert!(
        fixture.path("three/metrics-rank-00002.jsonl").is_file(),
        "every rank has its own metrics"
    );
}

/// Gradients and weights are sent once per step, and a few numbers.
fn check_traffic(ran: &Ran) {
    let Some(Event::Start(start)) = ran.events.first() else {
        panic!("{:?}", ran.outcome)
    };
    // Micro-batches 0 to 3 of lanes 0 to 3 on three ranks: rank 0 has two, and the others wait for
    // it.
    assert_eq!((start.ranks, start.idle_share), (3, 1.0 - 4.0 / 6.0));
    for step in steps(ran) {
        let ranks = step.ranks.as_ref().expect("several ranks are measured");
        let theory = 4.0 * start.num_parameters as f64 * 2.0 / 3.0;
        for collective in [Collective::ReduceScatter, Collective::AllGather] {
            let ratio = ranks.bytes[&collective] as f64 / theory;
            assert!(
                (ratio - 1.0).abs() < 0.01,
                "{collective:?}: {ratio} of the theory"
            );
        }
        assert!(ranks.communication_secs > 0.0 && ranks.passes_secs > 0.0);
    }
}

#[test]
fn a_checkpoint_of_many_ranks_goes_on_with_the_same_bits_and_with_other_numbers_of_ranks() {
    let fixture = Fixture::new();
    let all = ["optimizer.name=stable_adamw", "ema.half_life_samples=50"];
    assert_finished(&run_ranks(
        &recipes(&fixture, "straight", 4, &all),
        |_, _| {},
    ));

    // The run loses its newest checkpoint, and four ranks resume it from the middle.
    assert_finished(&run_ranks(
        &recipes(&fixture, "resumed", 4, &all),
        |_, _| {},
    ));
    fs::remove_dir_all(fixture.checkpoint("resumed", 16)).unwrap();
    assert_finished(&run_ranks(
        &recipes(&fixture, "resumed", 4, &all),
        |_, _| {},
    ));
    let of = |name: &str| weights_and_moments(&fixture.checkpoint(name, 16));
    assert!(
        of("straight") == of("resumed"),
        "a resume at the same number of ranks is exact"
    );
    let average = |name: &str| {
        fs::read(
            fixture
                .checkpoint(name, 16)
                .join("ema/unet/diffusion_pytorch_model.safetensors"),
        )
        .unwrap()
    };
    assert!(average("straight") == average("resumed") && average("straight") != of("straight").0);

    // Other numbers of ranks take turns: the losses are those of the straight run.
    let one = &recipes(&fixture, "moving", 1, &all)[0];
    run_until(one, rectiflow_train::run::Options::default(), 3);
    for (ranks, last) in [(3, 6), (2, 9), (4, 12), (1, 16)] {
        let set = format!("train.samples={}", 8 * last);
        let ran = run_ranks(
            &recipes(&fixture, "moving", ranks, &[&all[..], &[&set]].concat()),
            |_, _| {},
        );
        assert_finished(&ran);
    }
    let recorded = |name: &str| {
        let events = rectiflow_train::metrics::tail::read(&fixture.path(name)).unwrap();
        events
            .iter()
            .filter_map(|event| {
                if let Event::Step(step) = event {
                    Some(step.loss)
                } else {
                    None
                }
            })
            .collect::<Vec<_>>()
    };
    let (straight, moving) = (recorded("straight"), recorded("moving"));
    assert_eq!((straight.len(), moving.len()), (16, 16));
    for (step, (a, b)) in straight.iter().zip(&moving).enumerate() {
        assert!((a / b - 1.0).abs() < 1e-5, "step {step}: {a} and {b}");
    }
}

#[test]
fn in_bf16_masters_are_split_and_what_the_model_calculates_with_is_gathered() {
    let fixture = Fixture::new();
    let low = [
        "train.dtype=bf16",
        "ema.half_life_samples=50",
        "guard.vitals_every_updates=4",
    ];
    let run = |name: &str, ranks: usize, sharding: &str| {
        let set = format!("ranks.sharding={sharding}");
        let ran = run_ranks(
            &recipes(&fixture, name, ranks, &[&low[..], &[&set]].concat()),
            |_, _| {},
        );
        assert_finished(&ran);
        ran
    };
    let tests = |ran: &Ran| -> Vec<[f64; 2]> {
        let losses = |event: &Event| match event {
            Event::Test(test) => Some([
                test.loss,
                test.ema.as_ref().expect("an average is kept").loss,
            ]),
            _ => None,
        };
        ran.events.iter().filter_map(losses).collect()
    };
    let near =
        |a: f64, b: f64, relative: f64| assert!((a / b - 1.0).abs() < relative, "{a} and {b}");
    let alone = run("one", 1, "once");
    for (name, ranks, sharding) in [
        ("three", 3, "once"),
        ("two", 2, "each"),
        ("four", 4, "none"),
    ] {
        let ran = run(name, ranks, sharding);
        // A sum in another order may round to the neighbouring bf16 number.
        losses(&alone[0])
            .iter()
            .zip(losses(&ran[0]))
            .for_each(|(a, b)| near(*a, b, 1e-3));
        for (a, b) in tests(&alone[0]).into_iter().zip(tests(&ran[0])) {
            a.into_iter().zip(b).for_each(|(a, b)| near(a, b, 1e-3));
        }
        near(first_test(&alone[0]), first_test(&ran[0]), 1e-6);
        if sharding != "none" {
            let Some(Event::Start(start)) = ran[0].events.first() else {
                panic!("{:?}", ran[0].outcome)
            };
            let others = (ranks - 1) as f64 / ranks as f64;
            let in_fp32 = 4.0 * start.num_parameters as f64 * others;
            for step in steps(&ran[0]) {
                let sent = step.ranks.as_ref().unwrap().bytes[&Collective::AllGather] as f64;
                assert!(
                    (0.5..0.6).contains(&(sent / in_fp32)),
                    "bf16, and some in fp32: {sent} of {in_fp32}"
                );
            }
        }
    }
    // The masters of three ranks are complete and exact: a resume continues with the same bits.
    assert_finished(&run_ranks(&recipes(&fixture, "again", 3, &low), |_, _| {}));
    fs::remove_dir_all(fixture.checkpoint("again", 16)).unwrap();
    assert_finished(&run_ranks(&recipes(&fixture, "again", 3, &low), |_, _| {}));
    let of = |name: &str| weights_and_moments(&fixture.checkpoint(name, 16));
    assert!(of("three") == of("again"));
}

#[test]
fn a_nan_on_one_rank_is_skipped_and_rewound_and_stopped_by_all() {
    let fixture = Fixture::new();
    let more = [
        "guard.max_rewinds=1",
        "train.samples=200",
        "ema.half_life_samples=50",
    ];
    let ran = run_ranks(&recipes(&fixture, "nan", 2, &more), |rank, step| {
        if rank == 1 && (step.step == 4 || step.step >= 9) {
            spoil_with_nan(step);
        }
    });
    let expected = [
        (5, "skip"),
        (10, "skip"),
        (11, "skip"),
        (12, "rewind"),
        (13, "skip"),
        (14, "skip"),
        (15, "stop"),
    ];
    for ran in &ran {
        assert_eq!(ran.acts(), expected);
        assert!(
            matches!(ran.outcome, Err(Error::Stopped { .. })),
            "{:?}",
            ran.outcome
        );
    }
    assert!(fixture.path("nan/STOPPED").is_file());
    let black_box = BlackBox::read(&fixture.path("nan/blackbox/step-00000005-skip.json")).unwrap();
    let last = black_box.steps.last().unwrap();
    let slots: Vec<u32> = last.samples.iter().map(|sample| sample.slot).collect();
    assert_eq!((black_box.ranks, slots), (2, vec![0, 0, 1, 1, 2, 2, 3, 3]));
    // Rank 1 has lanes 1 and 3, and its first sample is the spoilt one.
    let spoilt: Vec<usize> = (0..8)
        .filter(|&at| last.samples[at].loss.is_nan())
        .collect();
    assert_eq!(spoilt, [2]);
    let again = run_ranks(&recipes(&fixture, "nan", 2, &more), |_, _| {});
    assert!(
        again
            .iter()
            .all(|ran| matches!(ran.outcome, Err(Error::Stopped { .. }))),
        "a stop stays a stop"
    );
}

#[test]
fn ranks_that_do_not_fit_together_are_told_so_at_the_start() {
    let fixture = Fixture::new();
    let messages = |recipes: &[Checked]| -> Vec<String> {
        run_ranks(recipes, |_, _| {})
            .into_iter()
            .map(|ran| ran.outcome.unwrap_err().to_string())
            .collect()
    };
    let mut other = recipes(&fixture, "other", 3, &[]);
    other[2] = fixture.recipe(
        "other",
        &[&FOUR[..], &["lr.peak=2e-4", "run.read_ahead_mib=512"]].concat(),
    );
    for message in messages(&other) {
        assert!(
            message.contains("rank 2 differs from rank 0 in lr.peak: 0.0001 -> 0.0002; give all"),
            "{message}"
        );
    }
    for message in messages(&recipes(&fixture, "many", 3, &["train.micro_batches=2"])) {
        assert!(
            message.contains("3 ranks") && message.contains("lanes"),
            "{message}"
        );
    }
}

#[test]
fn a_rank_that_cannot_read_its_data_is_named_by_the_others() {
    let fixture = Fixture::new();
    let copy = fixture.path("damaged");
    copy_folder(&fixture.path("data"), &copy);
    for entry in fs::read_dir(copy.join("latents")).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle..].fill(0x55);
        fs::write(&path, bytes).unwrap();
    }
    let mut all = recipes(&fixture, "unreadable", 3, &[]);
    let path = format!("data.path={}", copy.display());
    all[1] = fixture.recipe("unreadable", &[&FOUR[..], &[&path]].concat());
    let ran = run_ranks(&all, |_, _| {});
    let own = ran[1].outcome.as_ref().unwrap_err().to_string();
    assert!(
        own.contains("damaged") && !own.contains("rank 1 failed"),
        "{own}"
    );
    for rank in [0, 2] {
        let message = ran[rank].outcome.as_ref().unwrap_err().to_string();
        assert!(
            message.contains("rank 1 failed ") && message.contains(&own),
            "{message}"
        );
    }
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
fn previews_are_divided_over_ranks_and_the_same() {
    let fixture = Fixture::new();
    let settings = [
        "train.samples=8",
        "preview.prompts=['a red square', 'a green square', 'a blue square']",
        "preview.sample={steps=2, width_px=64, height_px=64, sampler='euler_ancestral', cfg=3.0}",
    ];
    // Previews are sampled before the first step; one case has more ranks than pictures.
    let pictures = [("alone", 1), ("two", 2), ("four", 4)].map(|(name, ranks)| {
        assert_finished(&run_ranks(
            &recipes(&fixture, name, ranks, &settings),
            |_, _| {},
        ));
        let path = fixture.path(name).join("previews/step-00000000.png");
        rectiflow_data::decode::decode(&fs::read(&path).unwrap(), u64::MAX, [255; 3])
            .unwrap()
            .picture
    });
    for other in &pictures[1..] {
        let (a, b) = (pictures[0].pixels(), other.pixels());
        assert_eq!(a.len(), b.len());
        // Latents that agree to 1e-6 may be rounded to neighbouring levels.
        let furthest = a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(furthest <= Some(1), "{furthest:?}");
    }
}
