//! Properties of the models beyond their outputs: true sizes, independence of samples, errors
//! instead of panics.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};

use rectiflow_sdxl::{
    clip::ClipText,
    cond::{self, ChunkedIds},
    config::{ClipConfig, UNetConfig, VaeConfig},
    error::Error,
    init::Init,
    model::{Component, Model, OpenOptions},
    tensor_file::{TensorFile, write_tensors},
    unet::{UNet, UNetInput},
    vae::Vae,
    weights::Weights,
};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

fn golden(name: &str) -> PathBuf {
    // The models are tiny: two threads would only wait for each other, for minutes if tests run in
    // parallel.
    rectiflow_sdxl::test_threads::set();
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn options() -> OpenOptions {
    OpenOptions::default()
}

fn object(json: Value) -> Map<String, Value> {
    json.as_object().unwrap().clone()
}

/// Distinct values, the same on every run.
fn noise(name: &str, shape: &[i64]) -> Tensor {
    let num_values = shape.iter().product::<i64>() as usize;
    Tensor::from_slice(&Init::Normal { std: 1.0 }.values(1, name, num_values)).reshape(shape)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

fn sdxl_unet() -> Map<String, Value> {
    object(json!({
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": true
    }))
}

#[test]
fn true_sizes_have_the_published_number_of_parameters() {
    let unet = UNet::new(
        UNetConfig::from_json(sdxl_unet(), "unet").unwrap(),
        Weights::shapes_only(),
    )
    .unwrap();
    assert_eq!(unet.parameters.num_elements(), 2_567_463_684);
    assert_eq!(unet.parameters.len(), 1680);
    let clip = |json: Value, projected| {
        let config = ClipConfig::from_json(object(json), projected, "clip").unwrap();
        ClipText::new(config, Weights::shapes_only())
            .unwrap()
            .parameters
            .num_elements()
    };
    let l = json!({"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12});
    assert_eq!(clip(l, false), 123_060_480);
    let g = json!({"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280, "hidden_act": "gelu"});
    assert_eq!(clip(g, true), 694_659_840);
    let vae = json!({"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": vec!["DownEncoderBlock2D"; 4],
        "up_block_types": vec!["UpDecoderBlock2D"; 4]});
    let vae = Vae::new(
        VaeConfig::from_json(object(vae), "vae").unwrap(),
        Weights::shapes_only(),
    )
    .unwrap();
    assert_eq!(vae.parameters.num_elements(), 83_653_863);
}

/// A batch for the golden UNet (context 20 wide, pooled 12).
struct Batch {
    sample: Tensor,
    timestep: Tensor,
    context: Tensor,
    mask: Option<Tensor>,
    text_embeds: Tensor,
    time_ids: Tensor,
}

impl Batch {
    fn new(b: i64, [h, w]: [i64; 2], num_tokens: i64) -> Self {
        Self {
            sample: noise("sample", &[b, 4, h, w]),
            timestep: noise("timestep", &[b]).abs() * 400.0,
            context: noise("context", &[b, num_tokens, 20]),
            mask: None,
            text_embeds: noise("text", &[b, 12]),
            time_ids: noise("ids", &[b, 6]).abs() * 500.0,
        }
    }

    fn input(&self) -> UNetInput<'_> {
        UNetInput {
            sample: &self.sample,
            timestep: &self.timestep,
            context: &self.context,
            context_mask: self.mask.as_ref(),
            text_embeds: &self.text_embeds,
            time_ids: &self.time_ids,
        }
    }

    /// Returns sample `i` alone, with the first `num_tokens` of its context.
    fn alone(&self, i: i64, num_tokens: i64) -> Self {
        let row = |x: &Tensor| x.narrow(0, i, 1);
        Self {
            sample: row(&self.sample),
            timestep: row(&self.timestep),
            context: row(&self.context).narrow(1, 0, num_tokens),
            mask: None,
            text_embeds: row(&self.text_embeds),
            time_ids: row(&self.time_ids),
        }
    }
}

#[test]
fn a_sample_does_not_depend_on_its_neighbours_nor_on_its_padding() {
    let unet = UNet::open(&golden("unet"), &options()).unwrap();
    let mut batch = Batch::new(3, [6, 5], 231);
    let lengths = [77, 231, 154];
    let real: Vec<bool> = lengths
        .iter()
        .flat_map(|&n| (0..231).map(move |t| t < n))
        .collect();
    let mask = Tensor::from_slice(&real).reshape([3, 231]);
    // Padding that would change the output if it were attended to.
    let padding = mask.logical_not().unsqueeze(-1).to_kind(Kind::Float) * 1e4;
    batch.context = &batch.context + &padding;
    batch.mask = Some(mask);
    let together = tch::no_grad(|| unet.forward(&batch.input())).unwrap();
    for (i, num_tokens) in lengths.into_iter().enumerate() {
        let alone =
            tch::no_grad(|| unet.forward(&batch.alone(i as i64, num_tokens).input())).unwrap();
        let difference = largest_difference(&together.narrow(0, i as i64, 1), &alone);
        assert!(difference < 1e-5, "sample {i}: {difference}");
    }
    batch.mask = None;
    let unmasked = tch::no_grad(|| unet.forward(&batch.input())).unwrap();
    assert!(
        largest_difference(&unmasked, &together) > 1e-2,
        "without the mask, padding must change the output"
    );
}

#[test]
fn padding_gets_no_gradient() {
    let unet = UNet::open(&golden("unet"), &options()).unwrap();
    let mut batch = Batch::new(2, [4, 4], 154);
    let real: Vec<bool> = (0..154)
        .map(|t| t < 77)
        .chain((0..154).map(|_| true))
        .collect();
    batch.mask = Some(Tensor::from_slice(&real).reshape([2, 154]));
    batch.context = batch.context.set_requires_grad(true);
    unet.forward(&batch.input())
        .unwrap()
        .square()
        .sum(Kind::Float)
        .backward();
    let gradient = batch.context.grad();
    assert_eq!(
        gradient
            .get(0)
            .narrow(0, 77, 77)
            .abs()
            .max()
            .double_value(&[]),
        0.0
    );
    assert!(
        gradient
            .get(0)
            .narrow(0, 0, 77)
            .abs()
            .max()
            .double_value(&[])
            > 0.0
    );
}

#[test]
fn time_is_not_rounded_and_is_each_samples_own() {
    let unet = UNet::open(&golden("unet"), &options()).unwrap();
    let mut batch = Batch::new(1, [4, 4], 77);
    let mut at = |time: f32| {
        batch.timestep = Tensor::from_slice(&[time]);
        tch::no_grad(|| unet.forward(&batch.input())).unwrap()
    };
    assert!(largest_difference(&at(500.0), &at(500.25)) > 1e-6);
}

#[test]
fn any_latent_size_works() {
    let unet = UNet::open(&golden("unet"), &options()).unwrap();
    for size in [[1, 1], [1, 9], [2, 3], [5, 5], [9, 4], [11, 6]] {
        let out = tch::no_grad(|| unet.forward(&Batch::new(1, size, 77).input())).unwrap();
        assert_eq!(out.size(), [1, 4, size[0], size[1]]);
        assert!(out.isfinite().all().int64_value(&[]) != 0);
    }
}

fn zeros(shape: &[i64]) -> Tensor {
    Tensor::zeros(shape, (Kind::Float, CPU))
}

#[test]
fn unet_tensors_that_do_not_fit_are_errors_that_name_them() {
    let unet = UNet::open(&golden("unet"), &options()).unwrap();
    let fresh = || Batch::new(2, [4, 4], 77);
    let wrong: [(&str, Batch); 8] = [
        (
            "sample",
            Batch {
                sample: zeros(&[2, 3, 4, 4]),
                ..fresh()
            },
        ),
        (
            "sample",
            Batch {
                sample: zeros(&[2, 4, 4]),
                ..fresh()
            },
        ),
        (
            "sample",
            Batch {
                sample: zeros(&[2, 4, 0, 4]),
                ..fresh()
            },
        ),
        (
            "timestep",
            Batch {
                timestep: zeros(&[3]),
                ..fresh()
            },
        ),
        (
            "encoder_hidden_states",
            Batch {
                context: zeros(&[2, 77, 21]),
                ..fresh()
            },
        ),
        (
            "encoder_hidden_states",
            Batch {
                context: zeros(&[2, 0, 20]),
                ..fresh()
            },
        ),
        (
            "context mask",
            Batch {
                mask: Some(zeros(&[2, 77])),
                ..fresh()
            },
        ),
        (
            "time_ids",
            Batch {
                time_ids: zeros(&[2, 5]),
                ..fresh()
            },
        ),
    ];
    for (name, batch) in wrong {
        let error = unet.forward(&batch.input()).unwrap_err();
        assert!(
            matches!(&error, Error::Input { what, .. } if what == name),
            "{name}: {error}"
        );
    }
}

#[test]
fn token_ids_that_do_not_fit_are_errors() {
    let clip = ClipText::open(&golden("clip-l"), Component::ClipL, &options()).unwrap();
    for ids in [
        Tensor::from_slice(&[64i64]).reshape([1, 1]),
        Tensor::from_slice(&[-1i64]).reshape([1, 1]),
        Tensor::zeros([1, 78], (Kind::Int64, CPU)),
        Tensor::zeros([1, 77], (Kind::Int, CPU)),
        zeros(&[77]),
    ] {
        assert!(
            matches!(clip.forward(&ids), Err(Error::Input { .. })),
            "{ids:?}"
        );
    }
}

#[test]
fn pixels_and_latents_that_do_not_fit_are_errors() {
    let vae = Vae::open(&golden("vae"), &options()).unwrap();
    for pixels in [
        zeros(&[1, 3, 7, 8]),
        zeros(&[1, 4, 8, 8]),
        zeros(&[3, 8, 8]),
        zeros(&[0, 3, 8, 8]),
    ] {
        assert!(
            matches!(vae.encode(&pixels), Err(Error::Input { .. })),
            "{pixels:?}"
        );
        assert!(
            matches!(vae.decode(&pixels), Err(Error::Input { .. }))
                || pixels.size() == [1, 4, 8, 8]
        );
    }
}

fn encoders() -> (ClipText, ClipText) {
    let open = |name: &str, which| ClipText::open(&golden(name), which, &options()).unwrap();
    (
        open("clip-l", Component::ClipL),
        open("clip-g", Component::ClipG),
    )
}

/// Token ids `[b, 3, 77]` for the golden encoders: begin 62, words, end 63.
fn ids(b: i64) -> Tensor {
    let words = (noise("words", &[b, 3, 77]).abs() * 20.0)
        .clamp(1.0, 61.0)
        .to_kind(Kind::Int64);
    let _ = words.select(2, 0).fill_(62);
    let _ = words.select(2, 40).fill_(63);
    words
}

#[test]
fn texts_of_mixed_lengths_are_encoded_as_if_alone() {
    let (l, g) = encoders();
    let ids = ids(3);
    let num_chunks = [2, 1, 3];
    let encode = |ids: &Tensor, num_chunks: &[u32]| {
        tch::no_grad(|| {
            cond::encode(
                &l,
                &g,
                ChunkedIds {
                    clip_l: ids,
                    clip_g: ids,
                    num_chunks,
                },
            )
        })
        .unwrap()
    };
    let together = encode(&ids, &num_chunks);
    assert_eq!(together.context.size(), [3, 231, 64]);
    let mask = together.context_mask.unwrap();
    for (i, &k) in num_chunks.iter().enumerate() {
        let (i, num_tokens) = (i as i64, i64::from(k) * 77);
        let alone = encode(&ids.narrow(0, i, 1).narrow(1, 0, i64::from(k)), &[k]);
        assert!(alone.context_mask.is_none());
        let context = together.context.narrow(0, i, 1).narrow(1, 0, num_tokens);
        assert!(largest_difference(&context, &alone.context) < 1e-5);
        assert!(largest_difference(&together.pooled.narrow(0, i, 1), &alone.pooled) < 1e-5);
        assert_eq!(mask.get(i).sum(Kind::Int64).int64_value(&[]), num_tokens);
    }
    // The parts are in the conventional order: L before G, chunk by chunk, pooled from the first
    // chunk of G.
    let chunk = ids.get(0);
    let (hidden_l, out_g) =
        tch::no_grad(|| (l.hidden(&chunk).unwrap(), g.forward(&chunk).unwrap()));
    let second = together.context.get(0).narrow(0, 77, 77);
    assert!(largest_difference(&second.narrow(1, 0, 32), &hidden_l.get(1)) < 1e-5);
    assert!(largest_difference(&second.narrow(1, 32, 32), &out_g.hidden.get(1)) < 1e-5);
    assert!(largest_difference(&together.pooled.get(0), &out_g.pooled.get(0)) < 1e-5);
    let wrong = ChunkedIds {
        clip_l: &ids,
        clip_g: &ids,
        num_chunks: &[1, 4, 1],
    };
    assert!(
        cond::encode(&l, &g, wrong)
            .unwrap_err()
            .to_string()
            .contains("num_chunks")
    );
}

#[test]
fn gradients_reach_trained_text_encoders() {
    let (l, g) = encoders();
    for encoder in [&l, &g] {
        encoder.parameters.set_requires_grad(true);
    }
    let ids = ids(2);
    let cond = cond::encode(
        &l,
        &g,
        ChunkedIds {
            clip_l: &ids,
            clip_g: &ids,
            num_chunks: &[1, 2],
        },
    )
    .unwrap();
    (cond.context.square().sum(Kind::Float) + cond.pooled.square().sum(Kind::Float)).backward();
    let without = |encoder: &ClipText| {
        let parameters = encoder
            .parameters
            .iter()
            .filter(|(_, tensor)| !tensor.grad().defined());
        parameters
            .map(|(name, _)| name.to_owned())
            .collect::<Vec<_>>()
    };
    assert!(without(&g).is_empty());
    let unused = without(&l);
    let last =
        |name: &String| name.contains("encoder.layers.2.") || name.contains("final_layer_norm");
    assert!(!unused.is_empty() && unused.iter().all(last), "{unused:?}");
}

/// Makes a diffusers folder with configurations only, whose parts fit each other.
fn tiny_model(folder: &Path) {
    for component in Component::ALL {
        let from = golden(match component {
            Component::UNet => "unet",
            other => other.name(),
        });
        let text = std::fs::read_to_string(from.join("config.json")).unwrap();
        let mut config: Map<String, Value> = serde_json::from_str(&text).unwrap();
        if component == Component::UNet {
            config.insert("cross_attention_dim".into(), json!(64));
            config.insert(
                "projection_class_embeddings_input_dim".into(),
                json!(24 + 48),
            );
        }
        let to = folder.join(component.folder());
        std::fs::create_dir_all(&to).unwrap();
        std::fs::write(
            to.join("config.json"),
            serde_json::to_string(&config).unwrap(),
        )
        .unwrap();
    }
}

#[test]
fn a_model_starts_from_configurations_and_is_a_function_of_the_seed() {
    rectiflow_sdxl::test_threads::set();
    let folder = tempfile::tempdir().unwrap();
    tiny_model(folder.path());
    let open = |seed| {
        let options = OpenOptions {
            random: Component::ALL.to_vec(),
            seed,
            ..options()
        };
        Model::open(folder.path(), &options).unwrap()
    };
    let saved = |model: &Model, name: &str| {
        let path = folder.path().join(name);
        model.unet.parameters.save(&path, None).unwrap();
        std::fs::read(&path).unwrap()
    };
    let (one, same, other) = (open(1), open(1), open(2));
    assert_eq!(one.parameterization, None);
    assert_eq!(saved(&one, "one"), saved(&same, "same"));
    assert_ne!(saved(&one, "one"), saved(&other, "other"));
    let std = |name: &str| {
        one.unet
            .parameters
            .get(name)
            .unwrap()
            .std(false)
            .double_value(&[])
    };
    assert!(
        std("conv_out.weight") > 0.05,
        "diffusers does not zero the last convolution"
    );
    let missing = UNet::open(folder.path(), &options())
        .unwrap_err()
        .to_string();
    assert!(
        missing.contains("diffusion_pytorch_model.safetensors"),
        "{missing}"
    );
    let scheduler = folder.path().join("scheduler");
    std::fs::create_dir(&scheduler).unwrap();
    std::fs::write(
        scheduler.join("scheduler_config.json"),
        r#"{"prediction_type": "v_prediction"}"#,
    )
    .unwrap();
    assert_eq!(
        open(1).parameterization,
        Some(rectiflow_sdxl::flow::Parameterization::V)
    );
}

#[test]
fn parts_that_do_not_fit_each_other_are_refused() {
    rectiflow_sdxl::test_threads::set();
    let folder = tempfile::tempdir().unwrap();
    tiny_model(folder.path());
    std::fs::copy(
        golden("unet/config.json"),
        folder.path().join("unet/config.json"),
    )
    .unwrap();
    let options = OpenOptions {
        random: Component::ALL.to_vec(),
        ..options()
    };
    let error = Model::open(folder.path(), &options)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("cross_attention_dim (20)") && error.contains("pooled"),
        "{error}"
    );
    let error = UNet::open(&golden("vae"), &options)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("_class_name: expected UNet2DConditionModel, found \"AutoencoderKL\""),
        "{error}"
    );
}

#[test]
fn a_wrong_weight_file_is_reported_whole() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        golden("unet/config.json"),
        folder.path().join("config.json"),
    )
    .unwrap();
    let source = TensorFile::open(&golden("unet/diffusion_pytorch_model.safetensors")).unwrap();
    let names: Vec<&str> = source
        .names()
        .filter(|name| !name.starts_with("mid_block"))
        .collect();
    let mut tensors: Vec<(&str, Tensor)> = names
        .iter()
        .map(|name| (*name, source.tensor(name).unwrap()))
        .collect();
    tensors
        .iter_mut()
        .filter(|(name, _)| *name == "conv_in.weight")
        .for_each(|(_, t)| *t = t.transpose(0, 1));
    tensors.push(("model_ema.decay", Tensor::from_slice(&[1f32])));
    let path = folder.path().join("diffusion_pytorch_model.safetensors");
    write_tensors(
        &path,
        tensors.iter().map(|(name, tensor)| (*name, tensor)),
        None,
        &[],
    )
    .unwrap();
    let text = UNet::open(folder.path(), &options())
        .unwrap_err()
        .to_string();
    let num_missing = source.names().count() - names.len();
    assert!(
        text.contains(&format!("{num_missing} missing")) && text.contains("1 unexpected"),
        "{text}"
    );
    assert!(
        text.contains("conv_in.weight: expected [8, 4, 3, 3], found [4, 8, 3, 3]"),
        "{text}"
    );
    assert!(text.lines().count() < 50, "{text}");
}

#[test]
fn clip_files_are_read_with_and_without_their_prefix() {
    let (_, g) = encoders();
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        golden("clip-g/config.json"),
        folder.path().join("config.json"),
    )
    .unwrap();
    let short = |name: &str| name.trim_start_matches("text_model.").to_owned();
    let tensors: Vec<_> = g
        .parameters
        .iter()
        .map(|(name, tensor)| (short(name), tensor))
        .collect();
    let path = folder.path().join("model.safetensors");
    write_tensors(
        &path,
        tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), *tensor)),
        None,
        &[],
    )
    .unwrap();
    let again = ClipText::open(folder.path(), Component::ClipG, &options()).unwrap();
    for (name, tensor) in g.parameters.iter() {
        assert!(again.parameters.get(name).unwrap().equal(tensor), "{name}");
    }
}

#[test]
fn bf16_runs_and_is_close() {
    let path = golden("unet");
    let (wide, narrow) = (
        UNet::open(&path, &options()),
        UNet::open(
            &path,
            &OpenOptions {
                kind: Kind::BFloat16,
                ..options()
            },
        ),
    );
    let (wide, narrow) = (wide.unwrap(), narrow.unwrap());
    let batch = Batch::new(2, [6, 5], 77);
    let (wide, narrow) = tch::no_grad(|| {
        (
            wide.forward(&batch.input()).unwrap(),
            narrow.forward(&batch.input()).unwrap(),
        )
    });
    assert_eq!(narrow.kind(), Kind::BFloat16);
    let error = (&narrow.to_kind(Kind::Float) - &wide)
        .norm()
        .double_value(&[])
        / wide.norm().double_value(&[]);
    assert!(error < 0.05, "{error}");
}

#[test]
fn a_mapped_unet_predicts_the_same_pass_after_pass() {
    let path = golden("unet");
    let copied = UNet::open(&path, &options()).unwrap();
    let mapped = UNet::open(
        &path,
        &OpenOptions {
            map: true,
            ..options()
        },
    )
    .unwrap();
    let batch = Batch::new(2, [6, 5], 77);
    let forward = |unet: &UNet| tch::no_grad(|| unet.forward(&batch.input()).unwrap());
    let wanted = forward(&copied);
    // Each level is unmapped after use, and read again in the next pass.
    assert!(forward(&mapped).equal(&wanted) && forward(&mapped).equal(&wanted));
}
