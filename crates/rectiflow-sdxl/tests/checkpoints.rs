//! Weights as found in practice: sharded, in variants, in a single file, of another model, broken.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use rectiflow_sdxl::{
    bundle::{Bundle, CONFIGS_KEY},
    model::{Component, OpenOptions},
    tensor_file::{TensorFile, write_tensors},
    unet::UNet,
};
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

fn golden_unet() -> PathBuf {
    rectiflow_sdxl::test_threads::set();
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/unet")
}

fn golden_tensors() -> Vec<(String, Tensor)> {
    let file =
        TensorFile::open(&golden_unet().join("diffusion_pytorch_model.safetensors")).unwrap();
    file.names()
        .map(|name| (name.to_owned(), file.tensor(name).unwrap()))
        .collect()
}

fn write(path: &Path, tensors: &[(String, Tensor)], metadata: &[(&str, &str)]) {
    write_tensors(
        path,
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)),
        None,
        metadata,
    )
    .unwrap();
}

/// Makes a folder with the golden UNet in two shards, under diffusers' file names of a variant.
fn write_shards(folder: &Path, tensors: &[(String, Tensor)], variant: &str) -> Vec<PathBuf> {
    fs::create_dir_all(folder).unwrap();
    fs::copy(
        golden_unet().join("config.json"),
        folder.join("config.json"),
    )
    .unwrap();
    let (mut map, mut shards) = (Map::new(), Vec::new());
    for (i, tensors) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let name = format!(
            "diffusion_pytorch_model-0000{}-of-00002{variant}.safetensors",
            i + 1
        );
        map.extend(
            tensors
                .iter()
                .map(|(tensor, _)| (tensor.clone(), json!(name))),
        );
        write(&folder.join(&name), tensors, &[("format", "pt")]);
        shards.push(folder.join(name));
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    let name = format!("diffusion_pytorch_model.safetensors.index{variant}.json");
    fs::write(folder.join(name), index.to_string()).unwrap();
    shards
}

#[test]
fn shards_and_variants_are_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = golden_tensors();
    let half: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.to_kind(Kind::Half)))
        .collect();
    for (variant, tensors) in [("", &tensors), (".fp16", &half)] {
        let place = folder.path().join(format!("sharded{variant}"));
        let shards = write_shards(&place, tensors, variant);
        let unet = UNet::open(&place, &OpenOptions::default()).unwrap();
        assert_eq!(unet.parameters.len(), tensors.len());
        for (name, tensor) in tensors {
            assert!(
                unet.parameters
                    .get(name)
                    .unwrap()
                    .equal(&tensor.to_kind(Kind::Float)),
                "{name}"
            );
        }
        fs::remove_file(&shards[1]).unwrap();
        let error = UNet::open(&place, &OpenOptions::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("00002-of-00002") && !error.contains('\n'),
            "{error}"
        );
    }
}

#[test]
fn one_broken_tensor_is_one_line_with_its_file_and_name() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(
        golden_unet().join("config.json"),
        folder.path().join("config.json"),
    )
    .unwrap();
    let path = folder.path().join("diffusion_pytorch_model.safetensors");
    for (broken, reason) in [(f64::NAN, "not finite"), (f64::INFINITY, "not finite")] {
        let mut tensors = golden_tensors();
        let (name, tensor) = tensors
            .iter_mut()
            .find(|(name, _)| name.ends_with("conv_out.weight"))
            .unwrap();
        let _ = tensor.view(-1).get(3).fill_(broken);
        let name = name.clone();
        write(&path, &tensors, &[]);
        let error = UNet::open(folder.path(), &OpenOptions::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(path.to_str().unwrap())
                && error.contains(&name)
                && error.contains(reason),
            "{error}"
        );
        assert!(!error.contains('\n'), "{error}");
    }
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let error = UNet::open(folder.path(), &OpenOptions::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(path.to_str().unwrap())
            && error.contains("it is truncated")
            && !error.contains('\n'),
        "{error}"
    );
}

#[test]
fn other_models_are_refused_by_name_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    for (name, expected) in [
        (
            "cond_stage_model.transformer.text_model.embeddings.position_ids",
            "Stable Diffusion 1 checkpoint",
        ),
        (
            "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
            "Flux",
        ),
        (
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
            "LoRA",
        ),
        ("conv_in.weight", "none of its tensors"),
        ("down_blocks.0.resnets.0.conv1.weight", "one part"),
    ] {
        let path = folder.path().join("other.safetensors");
        write(
            &path,
            &[(name.to_owned(), Tensor::from_slice(&[1f32]))],
            &[],
        );
        let from_bundle = Bundle::open_single_file(&path, None)
            .unwrap_err()
            .to_string();
        let from_model = UNet::open(&path, &OpenOptions::default())
            .unwrap_err()
            .to_string();
        for error in [from_bundle, from_model] {
            assert!(
                error.contains("other.safetensors") && error.contains(expected),
                "{name}: {error}"
            );
            assert!(!error.contains('\n'), "{error}");
        }
    }
}

#[test]
fn hostile_configurations_in_a_header_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile.safetensors");
    let unet = |key: &str, value: Value| {
        let mut configs: Map<String, Value> = Component::ALL
            .iter()
            .map(|component| (component.folder().to_owned(), json!({})))
            .collect();
        configs.insert(
            "unet".into(),
            json!({"addition_embed_type": "text_time", key: value}),
        );
        Value::Object(configs).to_string()
    };
    for (configs, expected) in [
        ("{".to_owned(), CONFIGS_KEY),
        ("[]".to_owned(), CONFIGS_KEY),
        ("{}".to_owned(), "no configuration for unet"),
        (
            unet("layers_per_block", json!(16_000_000)),
            "layers_per_block",
        ),
        (
            unet("block_out_channels", json!(vec![32; 1000])),
            "block_out_channels",
        ),
        (
            unet("block_out_channels", json!([1u64 << 40])),
            "block_out_channels",
        ),
        (
            unet("transformer_layers_per_block", json!(1_000_000_000)),
            "transformer_layers_per_block",
        ),
        (
            format!("{}1{}", "[".repeat(5000), "]".repeat(5000)),
            CONFIGS_KEY,
        ),
    ] {
        let tensors = [(
            "first_stage_model.quant_conv.bias".to_owned(),
            Tensor::from_slice(&[1f32]),
        )];
        write(&path, &tensors, &[(CONFIGS_KEY, &configs)]);
        let error = Bundle::open_single_file(&path, None)
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{configs:.60}: {error}");
    }
}
