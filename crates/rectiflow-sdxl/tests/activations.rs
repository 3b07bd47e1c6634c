//! The count of activations against what PyTorch saves in diffusers' UNet
//! (`scripts/golden/activations.py`).

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{collections::BTreeMap, path::Path};

use rectiflow_sdxl::{
    config::UNetConfig,
    cost::{Load, PartCost, parts},
};
use serde_json::Value;

const GOLDEN: &str = include_str!("golden/activations.json");

/// A case: its configuration, its sizes, and what PyTorch saves.
struct Case {
    name: String,
    config: UNetConfig,
    load: Load,
    total_bytes: u64,
    part_bytes: BTreeMap<String, u64>,
}

fn cases() -> Vec<Case> {
    let golden: Vec<Value> = serde_json::from_str(GOLDEN).unwrap();
    golden.iter().map(case).collect()
}

fn case(golden: &Value) -> Case {
    let number = |key: &str| golden[key].as_u64().unwrap();
    let folder = golden["config"].as_str().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(folder);
    Case {
        name: format!("{folder}, {} samples", number("batch")),
        config: UNetConfig::read(&path.join("config.json")).unwrap(),
        load: Load {
            batch: number("batch"),
            height: number("height"),
            width: number("width"),
            tokens: number("tokens"),
            bytes: number("bytes_per_value"),
            fused: false,
        },
        total_bytes: number("total_bytes"),
        part_bytes: serde_json::from_value(golden["part_bytes"].clone()).unwrap(),
    }
}

impl Case {
    fn is_sdxl(&self) -> bool {
        self.name.contains("configs/unet")
    }

    /// Bytes that PyTorch saves for a part; where ours has two parts in one, for both.
    fn golden(&self, part: &PartCost) -> u64 {
        self.part_bytes.get(&part.name).copied().unwrap_or(0)
    }
}

/// The total, on which a plan's memory rests.
#[test]
fn sdxl_keeps_what_pytorch_keeps() {
    let mut num_cases = 0;
    for case in cases().into_iter().filter(Case::is_sdxl) {
        let parts = parts(&case.config, case.load);
        let ours: u64 = parts.iter().map(|part| part.kept_bytes).sum();
        let ratio = ours as f64 / case.total_bytes as f64;
        assert!((0.998..1.0).contains(&ratio), "{}: {ratio}", case.name);
        num_cases += 1;
    }
    assert_eq!(num_cases, 4);
}

/// Bytes that PyTorch saves for a part beyond what is counted, at least and at most: statistics of
/// norms and of attention's softmax. A block's first use of the text, and the
/// states of attention's random numbers, make up the difference between the two.
fn statistics(case: &Case, part: &PartCost) -> [u64; 2] {
    let load = &case.load;
    let is_layer = part.name.contains("transformer_blocks");
    let num_norms = if part.name.contains(".resnets.") {
        2
    } else {
        u64::from(part.name.ends_with(".norm"))
    };
    if !is_layer {
        // Mean and deviation of 32 groups a sample; what a residual block takes of time is shared.
        let of_groups = num_norms * 2 * 32 * load.bytes * load.batch;
        let time = 4 * load.batch * case.config.time_embed_dim as u64 * load.bytes;
        return [of_groups, of_groups + if num_norms == 2 { time } else { 0 }];
    }
    let channels = part.input_bytes / load.bytes;
    let (level, pixels) = level_of(case, channels);
    // Three norms of tokens, and for each of a head's queries in two attentions a number.
    let heads = level / 64;
    let least = (3 * 2 * 4 + 2 * heads * 4) * pixels;
    let text = load.batch * load.tokens * 2048 * load.bytes;
    [least, least + text + 64 * load.batch]
}

/// Channels, and pixels of all samples, of a layer whose input has this number of values.
fn level_of(case: &Case, numbers: u64) -> (u64, u64) {
    let load = &case.load;
    let sides = |halvings: u32| {
        let side = |length: u64| length.div_ceil(1 << halvings);
        load.batch * side(load.height) * side(load.width)
    };
    let levels = [(640, sides(1)), (1280, sides(2))];
    let found = levels.into_iter().find(|(c, pixels)| c * pixels == numbers);
    found.expect("transformers of SDXL are of one of two sizes")
}

/// Part by part: what PyTorch saves in bf16 beyond our count are statistics, and nothing else.
#[test]
fn only_statistics_are_not_counted() {
    let is_bf16 = |case: &Case| case.is_sdxl() && case.load.bytes == 2;
    for case in cases().into_iter().filter(is_bf16) {
        for part in parts(&case.config, case.load) {
            let golden = case.golden(&part);
            let context = format!(
                "{} {}: {} of {golden}",
                case.name, part.name, part.kept_bytes
            );
            match part.name.as_str() {
                // Sinusoids, and the inputs of linear layers on them: one row a sample.
                "time_embedding" | "add_embedding" => assert!(golden < 12_000 * case.load.batch),
                // Ours computes the last convolution in fp32, diffusers in bf16.
                "conv_norm_out" => assert_ours_is_wider(&case, &part, golden),
                _ => {
                    let [least, most] = statistics(&case, &part);
                    let beyond = golden.checked_sub(part.kept_bytes).expect(&context);
                    assert!(
                        (least..=most).contains(&beyond),
                        "{context}: {least} to {most}"
                    );
                }
            }
        }
    }
}

fn assert_ours_is_wider(case: &Case, part: &PartCost, golden: u64) {
    let Load {
        batch,
        height,
        width,
        bytes,
        ..
    } = case.load;
    let wider = batch * height * width * 320 * (4 - bytes);
    assert_eq!(part.kept_bytes - wider + 2 * 32 * bytes * batch, golden);
}

/// Small models, where statistics weigh more.
#[test]
fn small_models_keep_nearly_what_pytorch_keeps() {
    let mut num_cases = 0;
    for case in cases().into_iter().filter(|case| !case.is_sdxl()) {
        let parts = parts(&case.config, case.load);
        for part in &parts {
            assert!(
                part.kept_bytes <= case.golden(part),
                "{} {}",
                case.name,
                part.name
            );
        }
        let ours: u64 = parts.iter().map(|part| part.kept_bytes).sum();
        let ratio = ours as f64 / case.total_bytes as f64;
        assert!((0.96..1.0).contains(&ratio), "{}: {ratio}", case.name);
        num_cases += 1;
    }
    assert_eq!(num_cases, 2);
}
