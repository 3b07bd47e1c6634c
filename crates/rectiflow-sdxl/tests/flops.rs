//! The count of FLOPs against PyTorch's, in diffusers' and transformers' models
//! (`scripts/golden/flops.py`).

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use rectiflow_sdxl::{
    config::{ClipConfig, NUM_TIME_IDS, UNetConfig, VaeConfig},
    cost::{Load, parts},
    flops::{FORWARD_AND_BACKWARD, Flops, text_encoder, unet, vae_decoder, vae_encoder},
    walk::{Block, BlockKind, unet_blocks},
};
use serde_json::Value;

const GOLDEN: &str = include_str!("golden/flops.json");

fn cases(of: &str) -> Vec<Value> {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    golden[of].as_array().unwrap().clone()
}

fn config(case: &Value) -> std::path::PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    root.join(case["config"].as_str().unwrap())
        .join("config.json")
}

fn number(case: &Value, key: &str) -> i64 {
    case[key]
        .as_i64()
        .unwrap_or_else(|| panic!("{key} in {case}"))
}

fn size(case: &Value) -> [i64; 2] {
    [number(case, "height"), number(case, "width")]
}

fn flops(counted: &Value) -> Flops {
    let of = |kind: &str| counted[kind].as_u64().unwrap();
    Flops {
        convolutions: of("convolutions"),
        products: of("products"),
        attention: of("attention"),
    }
}

#[test]
fn the_unet_is_counted_as_pytorch_counts_it() {
    for case in cases("unet") {
        let config = UNetConfig::read(&config(&case)).unwrap();
        let batch = number(&case, "batch") as u64;
        let ours = unet(&config, size(&case), number(&case, "tokens")) * batch;
        assert_eq!(ours, flops(&case["forward"]), "{case}");
    }
}

/// FLOPs of gradients that training with frozen text encoders does not need: with respect to the
/// latents, the sinusoids and the text.
fn not_needed(config: &UNetConfig, size: [i64; 2], num_tokens: i64) -> Flops {
    let [h, w] = size;
    let added = config.pooled_dim + NUM_TIME_IDS * config.addition_time_embed_dim;
    let of_text = unet_blocks(config, size)
        .into_iter()
        .map(|block| match block.kind {
            BlockKind::Layer {
                channels,
                context_dim,
            } => block.repeats as i64 * 2 * num_tokens * channels * context_dim,
            _ => 0,
        });
    Flops {
        convolutions: (2 * 9 * config.in_channels * config.down[0].channels * h * w) as u64,
        products: (2 * (config.down[0].channels + added) * config.time_embed_dim
            + 2 * of_text.sum::<i64>()) as u64,
        attention: 0,
    }
}

#[test]
fn a_backward_pass_is_two_forward_passes_but_for_what_nothing_asks_for() {
    for case in cases("unet") {
        let config = UNetConfig::read(&config(&case)).unwrap();
        let (batch, size, tokens) = (
            number(&case, "batch") as u64,
            size(&case),
            number(&case, "tokens"),
        );
        let (forward, backward) = (
            unet(&config, size, tokens) * batch,
            flops(&case["backward"]),
        );
        assert_eq!(
            backward + not_needed(&config, size, tokens) * batch,
            forward * 2,
            "{case}"
        );
    }
    // At SDXL's size that is 0.3% of a training step; with 231 tokens 0.8%.
    let golden = &cases("unet")[0];
    let counted = flops(&golden["forward"]).total() + flops(&golden["backward"]).total();
    let ours = flops(&golden["forward"]).total() * FORWARD_AND_BACKWARD;
    let excess = ours as f64 / counted as f64 - 1.0;
    assert!((0.002..0.004).contains(&excess), "{excess}");
}

/// FLOPs of the last product of each block that can be recomputed, over one sample: nothing of the
/// backward pass needs its result.
fn last_products(config: &UNetConfig, size: [i64; 2]) -> u64 {
    let of_block = |block: Block| {
        let pixels = block.size[0] * block.size[1];
        let of_one = match block.kind {
            // The shortcut, if there is one; otherwise the second convolution.
            BlockKind::Resnet {
                channels: [inputs, outputs],
            } if inputs != outputs => inputs * outputs,
            BlockKind::Resnet {
                channels: [_, outputs],
            } => 9 * outputs * outputs,
            BlockKind::Layer { channels, .. } => 4 * channels * channels,
            BlockKind::Conv { .. } | BlockKind::Projections { .. } => 0,
        };
        2 * pixels * of_one * block.repeats as i64
    };
    let sum: i64 = unet_blocks(config, size).into_iter().map(of_block).sum();
    sum as u64
}

/// That of the middle's first residual block.
fn last_of_middle(config: &UNetConfig, size: [i64; 2]) -> u64 {
    let pixels = unet_blocks(config, size)
        .into_iter()
        .map(|block| block.size[0] * block.size[1])
        .min();
    let channels = config.mid.channels;
    (2 * 9 * channels * channels * pixels.unwrap()) as u64
}

#[test]
fn pytorch_recomputes_all_of_each_block_but_its_last_product() {
    for case in cases("unet") {
        let config = UNetConfig::read(&config(&case)).unwrap();
        let (batch, size) = (number(&case, "batch") as u64, size(&case));
        let load = Load {
            batch,
            height: size[0] as u64,
            width: size[1] as u64,
            tokens: number(&case, "tokens") as u64,
            bytes: 2,
            fused: false,
        };
        // diffusers never recomputes the first residual block of the middle.
        let mut whole = 0;
        for part in parts(&config, load) {
            if part.name != "mid_block.resnets.0" {
                whole += part.flops;
            }
        }
        let left_out = batch * (last_products(&config, size) - last_of_middle(&config, size));
        assert_eq!(
            flops(&case["recomputed"]).total(),
            whole - left_out,
            "{case}"
        );
    }
    // The figure that a plan names beside that of whole blocks.
    let sdxl = flops(&cases("unet")[0]["recomputed"]).total() as f64;
    assert!((sdxl / 5.212e12 - 1.0).abs() < 1e-4, "{sdxl}");
}

#[test]
fn text_encoders_are_counted_as_pytorch_counts_them() {
    for case in cases("text_encoder") {
        let path = config(&case);
        let config = ClipConfig::read(&path, false).unwrap();
        let (batch, tokens) = (number(&case, "batch") as u64, number(&case, "tokens"));
        assert_eq!(
            text_encoder(&config, tokens, true) * batch,
            flops(&case["forward"]),
            "{case}"
        );
        let layers = config.num_hidden_layers as u64;
        let projection = config
            .projection_dim
            .map_or(0, |dim| 2 * (config.hidden_size * dim) as u64);
        let all = text_encoder(&config, tokens, true).total() - projection;
        assert_eq!(
            text_encoder(&config, tokens, false).total() * layers,
            all * (layers - 1),
            "one layer less"
        );
    }
}

#[test]
fn the_autoencoder_is_counted_as_pytorch_counts_it() {
    for case in cases("vae") {
        let config = VaeConfig::read(&config(&case)).unwrap();
        let (batch, size) = (number(&case, "batch") as u64, size(&case));
        assert_eq!(
            vae_encoder(&config, size) * batch,
            flops(&case["encode"]),
            "{case}"
        );
        let latents = size.map(|n| n / i64::from(config.down_factor()));
        assert_eq!(
            vae_decoder(&config, latents) * batch,
            flops(&case["decode"]),
            "{case}"
        );
    }
}

/// The usually quoted figures for SDXL, in TFLOP.
#[test]
fn sdxl_needs_what_is_known_of_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/unet/config.json");
    let config = UNetConfig::read(&root).unwrap();
    let tera = |height, width, tokens| unet(&config, [height, width], tokens).total() as f64 / 1e12;
    for (found, expected) in [
        (tera(128, 128, 77), 6.76),
        (tera(128, 128, 231), 6.93),
        (tera(152, 104, 77), 6.50),
        (tera(120, 128, 77), 6.30),
    ] {
        assert!((found - expected).abs() < 0.006, "{found} {expected}");
    }
}
