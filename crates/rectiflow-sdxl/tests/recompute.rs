//! Recomputation: the same gradients, bit for bit, with less memory.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use rectiflow_sdxl::{
    config::UNetConfig,
    cost::{Load, choose, parts, peak_bytes},
    model::OpenOptions,
    tensor_file::TensorFile,
    unet::{UNet, UNetInput},
};
use tch::{Device, Kind, Tensor};

/// Returns the gradients of the context and of all parameters, and the output, with the named
/// blocks recomputed.
fn passes(masked: bool, choose: impl FnMut(&str) -> bool) -> Vec<Tensor> {
    rectiflow_sdxl::test_threads::set();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/unet");
    let mut unet = UNet::open(&golden, &OpenOptions::default()).unwrap();
    unet.parameters.set_requires_grad(true);
    unet.checkpoint_blocks(choose);
    let file = TensorFile::open(&golden.join("cases.safetensors")).unwrap();
    let get = |name: &str| file.tensor(&format!("1.{name}")).unwrap();
    let context = get("encoder_hidden_states").set_requires_grad(true);
    let tokens = Tensor::arange(context.size()[1], (Kind::Int64, Device::Cpu)).unsqueeze(0);
    let mask = tokens.less_tensor(&Tensor::from_slice(&[154i64, 77]).unsqueeze(1)); // [2, n]
    let out = unet
        .forward(&UNetInput {
            sample: &get("sample"),
            timestep: &get("timestep"),
            context: &context,
            context_mask: masked.then_some(&mask),
            text_embeds: &get("text_embeds"),
            time_ids: &get("time_ids"),
        })
        .unwrap();
    let loss = out.mse_loss(&get("target"), tch::Reduction::Mean);
    let mut inputs: Vec<&Tensor> = vec![&context];
    inputs.extend(unet.parameters.iter().map(|(_, tensor)| tensor));
    let mut all = Tensor::run_backward(&[loss], &inputs, false, false);
    all.push(out);
    all
}

#[test]
fn gradients_are_the_same_bit_for_bit() {
    for masked in [false, true] {
        let kept = passes(masked, |_| false);
        let mut names = Vec::new();
        let recomputed = passes(masked, |name| {
            names.push(name.to_owned());
            true
        });
        assert_eq!(
            names.len(),
            34,
            "17 residual blocks and 17 transformer blocks: {names:?}"
        );
        let some = passes(masked, |name| name.contains("resnets.1"));
        for (kept, others) in kept.iter().zip(recomputed.iter().zip(&some)) {
            assert!(kept.equal(others.0) && kept.equal(others.1));
        }
    }
}

#[test]
fn gradients_are_the_same_with_the_blocks_that_a_budget_picks() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/unet/config.json");
    let config = UNetConfig::read(&golden).unwrap();
    let parts = parts(
        &config,
        Load {
            batch: 2,
            height: 16,
            width: 16,
            tokens: 154,
            bytes: 4,
            fused: true,
        },
    );
    let peak = |names: &std::collections::BTreeSet<String>| {
        peak_bytes(&parts, 4, 1, |part| names.contains(&part.name))
    };
    let (all, none) = (choose(&parts, |_| false), choose(&parts, |_| true));
    let room = (peak(&all) + peak(&none)) / 2;
    let names = choose(&parts, |names| peak(names) <= room);
    assert!(
        peak(&names) <= room && !names.is_empty() && names.len() < all.len(),
        "{names:?}"
    );
    let kept = passes(false, |_| false);
    let recomputed = passes(false, |name| names.contains(name));
    assert!(
        kept.iter()
            .zip(&recomputed)
            .all(|(kept, recomputed)| kept.equal(recomputed))
    );
}
