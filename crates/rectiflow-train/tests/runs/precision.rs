//! Runs in bf16 and with recomputed blocks: what is stored, and that a resume is as exact as in
//! fp32.

use rectiflow_sdxl::{model::Component, tensor_file::TensorFile};
use rectiflow_train::{eval::evaluate, run::Options};
use tch::Kind;

use crate::fixture::{Fixture, run, run_until};

/// bf16 with every feature that has its own state, and a second trained component.
const LOW: &[&str] = &[
    "train.dtype=bf16",
    "ema.half_life_samples=50",
    "train.text_encoders=text_encoder_2",
    "lr.ratio.text_encoder_2=0.1",
    "lr.peak=1e-4",
];

const FILES: [&str; 4] = [
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder_2/model.safetensors",
    "ema/unet/diffusion_pytorch_model.safetensors",
    "optimizer.safetensors",
];

#[test]
fn bf16_runs_keep_fp32_masters_and_resume_exactly_with_or_without_checkpointing() {
    let fixture = Fixture::new();
    assert!(run(&fixture.recipe("straight", LOW)).unwrap().finished);
    let straight = fixture.checkpoint("straight", 16);
    let weights = TensorFile::open(&straight.join(FILES[0]))
        .unwrap()
        .tensor("conv_in.weight")
        .unwrap();
    assert_eq!(weights.kind(), Kind::Float);
    assert!(
        weights != weights.to_kind(Kind::BFloat16).to_kind(Kind::Float),
        "masters have more bits than copies"
    );

    // The second half recomputes the blocks: neither that nor the resume changes a bit.
    let checked = fixture.recipe("resumed", LOW);
    run_until(&checked, Options::default(), 9);
    let remade = [LOW, &["memory.checkpointing=full"]].concat();
    assert!(run(&fixture.recipe("resumed", &remade)).unwrap().finished);
    let resumed = fixture.checkpoint("resumed", 16);
    for name in FILES {
        assert!(
            std::fs::read(straight.join(name)).unwrap()
                == std::fs::read(resumed.join(name)).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn a_bf16_run_ends_where_an_fp32_run_does_and_its_checkpoint_is_evaluated_in_either() {
    let fixture = Fixture::new();
    let high: Vec<&str> = LOW
        .iter()
        .copied()
        .filter(|key| !key.contains("bf16"))
        .collect();
    let (low, high) = (fixture.recipe("low", LOW), fixture.recipe("high", &high));
    for checked in [&low, &high] {
        assert!(run(checked).unwrap().finished);
    }
    let loss = |checked, run: &str| {
        let losses = evaluate(checked, &fixture.checkpoint(run, 16), None).unwrap();
        assert!(losses.ema.is_some());
        losses.trained.test.unwrap().loss
    };
    let (low_in_low, low_in_high, high_in_high) =
        (loss(&low, "low"), loss(&high, "low"), loss(&high, "high"));
    let near = |a: f64, b: f64| (a - b).abs() < 0.01 * b;
    assert!(
        near(low_in_high, high_in_high) && near(low_in_low, low_in_high),
        "{low_in_low} {low_in_high} {high_in_high}"
    );
    assert!(
        low_in_low != low_in_high,
        "one of them was computed in bf16"
    );
    assert!(Component::ALL.iter().all(|part| {
        fixture.checkpoint("low", 16).join(part.folder()).exists() == checked_trains(*part)
    }));
}

fn checked_trains(component: Component) -> bool {
    matches!(component, Component::UNet | Component::ClipG)
}

#[test]
fn a_budget_changes_nothing_but_memory_and_refuses_a_run_that_it_has_no_room_for() {
    let fixture = Fixture::new();
    let budget = |gib: &'static str| [LOW, &["memory.checkpointing=budget", gib]].concat();
    assert!(run(&fixture.recipe("off", LOW)).unwrap().finished);
    assert!(
        run(&fixture.recipe("wide", &budget("memory.budget_gib=8")))
            .unwrap()
            .finished
    );
    for name in FILES {
        let bytes = |run| std::fs::read(fixture.checkpoint(run, 16).join(name)).unwrap();
        assert!(bytes("off") == bytes("wide"), "{name}");
    }
    let error = run(&fixture.recipe("narrow", &budget("memory.budget_gib=0.01")))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("memory.budget_gib") && error.contains("train.micro_batch"),
        "{error}"
    );
}
