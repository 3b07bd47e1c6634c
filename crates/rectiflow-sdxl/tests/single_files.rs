//! Single files of other tools: what they predict, weights in fp8, hashes, and messages that name
//! the file that was given.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod tiny;

use std::{collections::BTreeMap, fs, path::Path};

use rectiflow_sdxl::{
    bundle::{Bundle, CONFIGS_KEY},
    export::{ExportOptions, export_diffusers, export_single_file},
    flow::Parameterization,
    model::{self, Component, Configs, Model, OpenOptions},
    tensor_file::TensorFile,
    unet::UNet,
    visit::visit_weights,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tiny::Contents;

const OWN_KEY: &str = "rectiflow.parameterization";
const STAMP: &str = "modelspec.prediction_type";
const HASH: &str = "modelspec.hash_sha256";

fn empty() -> Tensor {
    Tensor::zeros([0], (Kind::Float, Device::Cpu))
}

/// The tiny file without what says what it predicts, and without its hash.
fn silent(folder: &Path) -> Contents {
    let path = folder.join("own.safetensors");
    tiny::write_single_file(&path, Parameterization::Flow);
    let mut contents = Contents::read(&path);
    for key in [OWN_KEY, STAMP, HASH] {
        contents.set(key, None);
    }
    contents
}

/// Header entries, marker tensors, and what the file is taken for, with words of the line that says
/// so.
type Case = (
    &'static [(&'static str, &'static str)],
    &'static [&'static str],
    Option<Parameterization>,
    &'static [&'static str],
);

const CASES: &[Case] = &[
    (&[], &[], None, &[]),
    (&[(STAMP, "x0")], &[], None, &[]),
    (
        &[(STAMP, "epsilon")],
        &[],
        Some(Parameterization::Eps),
        &[
            "eps",
            STAMP,
            "epsilon",
            "flow models too",
            "--parameterization flow",
        ],
    ),
    (
        &[(STAMP, "v")],
        &[],
        Some(Parameterization::V),
        &["predicts v", STAMP],
    ),
    (
        &[(STAMP, "V-Prediction")],
        &[],
        Some(Parameterization::V),
        &[STAMP],
    ),
    (
        &[(STAMP, "flow")],
        &[],
        Some(Parameterization::Flow),
        &["flow", "--parameterization eps or v"],
    ),
    (
        &[(STAMP, "rectified_flow")],
        &[],
        Some(Parameterization::Flow),
        &[STAMP],
    ),
    // ComfyUI's own key.
    (
        &[("modelspec.predict_key", "v")],
        &[],
        Some(Parameterization::V),
        &["predict_key"],
    ),
    (
        &[("modelspec.predict_key", "epsilon")],
        &[],
        Some(Parameterization::Eps),
        &["flow models too"],
    ),
    // A tensor wins over any text.
    (
        &[],
        &["v_pred"],
        Some(Parameterization::V),
        &["tensor v_pred"],
    ),
    (
        &[(STAMP, "epsilon")],
        &["v_pred"],
        Some(Parameterization::V),
        &["tensor v_pred", "wins over", STAMP],
    ),
    (
        &[(OWN_KEY, "flow")],
        &["v_pred"],
        Some(Parameterization::V),
        &["wins over", OWN_KEY],
    ),
    (
        &[(STAMP, "epsilon")],
        &["v_pred", "ztsnr"],
        Some(Parameterization::VZtsnr),
        &["zero terminal SNR", "v_pred and ztsnr"],
    ),
    (
        &[(STAMP, "v")],
        &["ztsnr"],
        Some(Parameterization::VZtsnr),
        &["v_ztsnr"],
    ),
    (
        &[(OWN_KEY, "v_ztsnr")],
        &[],
        Some(Parameterization::VZtsnr),
        &[OWN_KEY],
    ),
    // This program's key wins over the stamp.
    (
        &[(OWN_KEY, "flow"), (STAMP, "epsilon")],
        &[],
        Some(Parameterization::Flow),
        &[OWN_KEY],
    ),
];

#[test]
fn what_a_file_predicts_is_said_with_the_key_it_comes_from() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.safetensors");
    for (texts, markers, expected, words) in CASES {
        let mut contents = silent(folder.path());
        for (key, value) in *texts {
            contents.set(key, Some(*value));
        }
        for marker in *markers {
            contents.add(marker, empty());
        }
        contents.write(&path);
        let bundle = Bundle::open_single_file(&path, None).unwrap();
        assert_eq!(bundle.parameterization, *expected, "{texts:?} {markers:?}");
        assert_eq!(model::parameterization(&path).unwrap(), *expected);
        let line = bundle.prediction.line();
        assert_eq!(line.is_some(), expected.is_some(), "{line:?}");
        let line = line.unwrap_or_default();
        assert!(!line.contains('\n'));
        for word in *words {
            assert!(line.contains(word), "{texts:?} {markers:?}: {word}: {line}");
        }
        assert!(
            bundle.notes.is_empty(),
            "a marker is no leftover: {:?}",
            bundle.notes
        );
        // An argument says otherwise.
        let said = bundle
            .prediction
            .settled(Some(Parameterization::Flow))
            .unwrap();
        assert_eq!(said, Some(Parameterization::Flow));
    }
}

#[test]
fn noise_with_zero_terminal_snr_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.safetensors");
    for stamp in [Some("epsilon"), None] {
        let mut contents = silent(folder.path());
        contents.set(STAMP, stamp);
        contents.add("ztsnr", empty());
        contents.write(&path);
        let bundle = Bundle::open_single_file(&path, None).unwrap();
        let settled = |argument| bundle.prediction.settled(argument);
        let error = settled(Some(Parameterization::Eps))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("zero terminal SNR") && error.contains("noise alone"),
            "{error}"
        );
        // An argument that resolves it; v keeps the file's schedule.
        let v = settled(Some(Parameterization::V)).unwrap();
        assert_eq!(v, Some(Parameterization::VZtsnr));
        assert_eq!(settled(None).is_err(), stamp.is_some());
        let error = export_single_file(
            &bundle,
            &folder.path().join("x.safetensors"),
            &ExportOptions::default(),
        )
        .unwrap_err()
        .to_string();
        assert!(error.contains("--parameterization"), "{error}");
    }
}

#[test]
fn v_exports_carry_the_markers_that_other_tools_go_by_and_others_none() {
    let folder = tempfile::tempdir().unwrap();
    for (name, parameterization) in Parameterization::ALL {
        let path = folder.path().join(format!("{name}.safetensors"));
        tiny::write_single_file(&path, parameterization);
        let file = TensorFile::open(&path).unwrap();
        let marker = |name| file.shape(name).map(<[i64]>::to_vec);
        assert_eq!(
            marker("v_pred").is_some(),
            parameterization.predicts_v(),
            "{name}"
        );
        let is_ztsnr = parameterization == Parameterization::VZtsnr;
        assert_eq!(marker("ztsnr"), is_ztsnr.then(|| vec![0]), "{name}");
        assert_eq!(file.metadata()[OWN_KEY], name);
        // The folder of it, and back.
        let bundle = Bundle::open_single_file(&path, None).unwrap();
        let (out, again) = (
            folder.path().join(name),
            folder.path().join("again.safetensors"),
        );
        let options = ExportOptions {
            kind: Some(Kind::Float),
            ..ExportOptions::default()
        };
        export_diffusers(&bundle, &out, &options).unwrap();
        let scheduler = model::scheduler(&out).unwrap().unwrap();
        assert_eq!(scheduler.parameterization, Some(parameterization));
        assert_eq!(
            model::parameterization(&out).unwrap(),
            Some(parameterization)
        );
        let back = Bundle::open_folders(|c| out.join(c.folder()), Some(parameterization)).unwrap();
        export_single_file(&back, &again, &options).unwrap();
        assert!(
            fs::read(&path).unwrap() == fs::read(&again).unwrap(),
            "{name}"
        );
    }
}

/// A folder that another tool made: no header of this program, but a scheduler.
#[test]
fn a_scheduler_with_zero_terminal_snr_reaches_the_exports() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model");
    tiny::write_folder(&out, Parameterization::V);
    let weights = out.join("unet/diffusion_pytorch_model.safetensors");
    let mut contents = Contents::read(&weights);
    contents.set(OWN_KEY, None);
    contents.write(&weights);
    let scheduler = out.join("scheduler/scheduler_config.json");
    let config = r#"{"_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": true,
        "lambda_min_clipped": -Infinity, "use_karras_sigmas": true}"#;
    fs::write(&scheduler, config).unwrap();
    let prediction = model::prediction(&out).unwrap();
    assert_eq!(prediction.parameterization, Some(Parameterization::VZtsnr));
    let open = || {
        let mut bundle =
            Bundle::open_folders(|c| out.join(c.folder()), prediction.parameterization).unwrap();
        bundle.scheduler = model::scheduler(&out).unwrap();
        bundle
    };
    let single = folder.path().join("x.safetensors");
    export_single_file(&open(), &single, &ExportOptions::default()).unwrap();
    let file = TensorFile::open(&single).unwrap();
    assert!(file.shape("v_pred").is_some() && file.shape("ztsnr").is_some());
    let again = folder.path().join("again");
    export_diffusers(&open(), &again, &ExportOptions::default()).unwrap();
    let kept = fs::read_to_string(again.join("scheduler/scheduler_config.json")).unwrap();
    let kept: Value = serde_json::from_str(&kept).unwrap();
    assert_eq!(kept["use_karras_sigmas"], true);
    assert_eq!(kept["rescale_betas_zero_snr"], true);
    let index = fs::read_to_string(again.join("model_index.json")).unwrap();
    assert!(index.contains("DPMSolverMultistepScheduler"), "{index}");
    // The header of an older export says v alone; the scheduler still counts.
    contents.set(OWN_KEY, Some("v"));
    contents.write(&weights);
    assert_eq!(
        model::parameterization(&out).unwrap(),
        Some(Parameterization::VZtsnr)
    );
    fs::write(&scheduler, config.replace("v_prediction", "epsilon")).unwrap();
    for error in [
        model::prediction(&out).unwrap_err(),
        Model::open(&out, &OpenOptions::default()).unwrap_err(),
    ] {
        let error = error.to_string();
        assert!(
            error.contains("scheduler_config.json") && error.contains("rescale_betas_zero_snr"),
            "{error}"
        );
    }
}

/// The number that a code of an fp8 format with this many bits of exponent means.
fn fp8_value(code: u8, exponent_bits: u32) -> f64 {
    let mantissa_bits = 7 - exponent_bits;
    let bias = (1 << (exponent_bits - 1)) - 1;
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from((code & 0x7f) >> mantissa_bits);
    let fraction = f64::from(code & ((1 << mantissa_bits) - 1)) / f64::from(1 << mantissa_bits);
    if exponent == 0 {
        sign * fraction * 2f64.powi(1 - bias)
    } else {
        sign * (1.0 + fraction) * 2f64.powi(exponent - bias)
    }
}

/// Codes of finite numbers, as many as asked for, every one among the first 256.
fn finite_codes(exponent_bits: u32, number: usize) -> Vec<u8> {
    let is_finite = |code: &u8| match exponent_bits {
        4 => code & 0x7f != 0x7f,
        _ => code & 0x7c != 0x7c,
    };
    (0..=255).filter(is_finite).cycle().take(number).collect()
}

/// A tensor to be written as it is.
struct Raw {
    name: String,
    dtype: &'static str,
    shape: Vec<i64>,
    bytes: Vec<u8>,
}

/// Writes the file with some tensors replaced or added.
fn write_raw(path: &Path, contents: &Contents, raw: Vec<Raw>) {
    let mut all = raw;
    for (name, tensor) in &contents.tensors {
        if all.iter().any(|raw| raw.name == *name) {
            continue;
        }
        let values = Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap();
        all.push(Raw {
            name: name.clone(),
            dtype: "F32",
            shape: tensor.size(),
            bytes: values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        });
    }
    let metadata: BTreeMap<_, _> = contents.metadata.iter().cloned().collect();
    let mut header = json!({ "__metadata__": metadata });
    let mut data = Vec::new();
    for Raw {
        name,
        dtype,
        shape,
        bytes,
    } in &all
    {
        let end = data.len() + bytes.len();
        header[name] = json!({"dtype": dtype, "shape": shape, "data_offsets": [data.len(), end]});
        data.extend(bytes);
    }
    let header = header.to_string();
    let file = [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        &data,
    ]
    .concat();
    fs::write(path, file).unwrap();
}

const UNET: &str = "model.diffusion_model.";

/// Tensors in every form that the single file has: name, component, diffusers' name.
const IN_EVERY_FORM: [(&str, Component, &str); 5] = [
    (
        "model.diffusion_model.input_blocks.0.0.weight",
        Component::UNet,
        "conv_in.weight",
    ),
    (
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight",
        Component::UNet,
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    ),
    (
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
        Component::ClipL,
        "text_model.embeddings.token_embedding.weight",
    ),
    (
        "conditioner.embedders.1.model.text_projection",
        Component::ClipG,
        "text_projection.weight",
    ),
    (
        "first_stage_model.decoder.mid.attn_1.q.weight",
        Component::Vae,
        "decoder.mid_block.attentions.0.to_q.weight",
    ),
];

/// A tensor of the file in fp8, and its values in fp32.
fn fp8(contents: &Contents, name: &str, dtype: &'static str) -> (Raw, Tensor) {
    let exponent_bits = if dtype == "F8_E4M3" { 4 } else { 5 };
    let (_, tensor) = contents
        .tensors
        .iter()
        .find(|(known, _)| known == name)
        .unwrap();
    let bytes = finite_codes(exponent_bits, tensor.numel());
    let values: Vec<f32> = bytes
        .iter()
        .map(|code| fp8_value(*code, exponent_bits) as f32)
        .collect();
    let shape = tensor.size();
    let values = Tensor::from_slice(&values).reshape(&shape);
    let name = name.to_owned();
    let raw = Raw {
        name,
        dtype,
        shape,
        bytes,
    };
    (raw, values)
}

#[test]
fn fp8_is_read_as_bf16_with_the_same_values() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fp8.safetensors");
    let contents = silent(folder.path());
    for dtype in ["F8_E4M3", "F8_E5M2"] {
        let mut raw = Vec::new();
        let mut expected = Vec::new();
        for (name, component, diffusers) in IN_EVERY_FORM {
            let (tensor, values) = fp8(&contents, name, dtype);
            raw.push(tensor);
            let values = match component {
                Component::ClipG => values.tr(),
                Component::Vae => values.flatten(1, -1),
                _ => values,
            };
            expected.push((component, diffusers, values));
        }
        write_raw(&path, &contents, raw);
        let mut bundle = Bundle::open_single_file(&path, None).unwrap();
        bundle.parameterization = Some(Parameterization::Eps);
        let notes = bundle.notes.join("\n");
        assert!(
            notes.contains("2 tensors of the unet are stored in fp8 and read as bf16"),
            "{notes}"
        );
        assert!(
            notes.contains("1 tensor of the vae is stored in fp8"),
            "{notes}"
        );
        let out = folder.path().join(dtype);
        export_diffusers(&bundle, &out, &ExportOptions::default()).unwrap();
        let opened = Model::open(&out, &OpenOptions::default()).unwrap();
        let direct = Model::open(&path, &OpenOptions::default()).unwrap();
        for (component, name, values) in &expected {
            let loaded = bundle.load(*component, name).unwrap();
            assert_eq!(loaded.kind(), Kind::BFloat16, "{name}");
            assert!(loaded.to_kind(Kind::Float).equal(values), "{dtype} {name}");
            for model in [&opened, &direct] {
                let parameters = match component {
                    Component::UNet => &model.unet.parameters,
                    Component::ClipL => &model.clip_l.parameters,
                    Component::ClipG => &model.clip_g.parameters,
                    Component::Vae => &model.vae.parameters,
                };
                assert!(
                    parameters.get(name).unwrap().equal(values),
                    "{dtype} {name}"
                );
            }
        }
        // In the dtype that it is read as, with weights mapped where they can be.
        let options = OpenOptions {
            kind: Kind::BFloat16,
            map: true,
            ..OpenOptions::default()
        };
        let unet = UNet::open(&path, &options).unwrap();
        let (_, name, values) = &expected[0];
        let found = unet.parameters.get(name).unwrap();
        assert!(found.to_kind(Kind::Float).equal(values));
        // fp16 holds the same values too.
        let half = ExportOptions {
            kind: Some(Kind::Half),
            ..ExportOptions::default()
        };
        let single = folder.path().join("half.safetensors");
        export_single_file(&bundle, &single, &half).unwrap();
        let file = TensorFile::open(&single).unwrap();
        let (name, values) = (IN_EVERY_FORM[0].0, &expected[0].2);
        assert!(
            file.tensor(name)
                .unwrap()
                .to_kind(Kind::Float)
                .equal(values)
        );
    }
}

fn scalar(name: String, value: f32, shape: &[i64]) -> Raw {
    Raw {
        name,
        dtype: "F32",
        shape: shape.to_vec(),
        bytes: value.to_le_bytes().to_vec(),
    }
}

#[test]
fn scales_of_fp8_weights_are_multiplied_in() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scaled.safetensors");
    let contents = silent(folder.path());
    let layer = IN_EVERY_FORM[1].0.trim_end_matches(".weight");
    let [old, new] = [
        [("scale_weight", &[][..]), ("scale_input", &[])],
        [("weight_scale", &[1][..]), ("input_scale", &[1])],
    ];
    let formats = json!({"layers": {layer: {"format": "float8_e4m3fn"}}}).to_string();
    for (companions, metadata) in [(old, None), (new, Some(formats.as_str()))] {
        let (weight, values) = fp8(&contents, IN_EVERY_FORM[1].0, "F8_E4M3");
        let mut raw = vec![weight];
        for ((suffix, shape), value) in companions.into_iter().zip([0.013_7, 3.0]) {
            raw.push(scalar(format!("{layer}.{suffix}"), value, shape));
        }
        if metadata.is_none() {
            raw.push(Raw {
                name: format!("{UNET}scaled_fp8"),
                dtype: "F8_E4M3",
                shape: vec![2],
                bytes: vec![0, 0],
            });
        } else {
            let bytes = br#"{"format": "float8_e4m3fn"}"#.to_vec();
            raw.push(Raw {
                name: format!("{layer}.comfy_quant"),
                dtype: "U8",
                shape: vec![bytes.len() as i64],
                bytes,
            });
        }
        let mut contents = silent(folder.path());
        contents.set("_quantization_metadata", metadata);
        write_raw(&path, &contents, raw);
        let bundle = Bundle::open_single_file(&path, None).unwrap();
        let found = bundle.load(Component::UNet, IN_EVERY_FORM[1].2).unwrap();
        assert!(
            found.equal(&(values * Tensor::from(0.013_7f32))),
            "in fp32, rounded once"
        );
        assert_eq!(
            bundle.kind(Component::UNet, IN_EVERY_FORM[1].2),
            Some(Kind::BFloat16)
        );
        assert_eq!(bundle.notes.len(), 1, "{:?}", bundle.notes);
        assert!(
            bundle.notes[0].contains("1 of them with a scale"),
            "{:?}",
            bundle.notes
        );
    }
}

#[test]
fn quantised_weights_that_are_not_read_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("quantised.safetensors");
    let contents = silent(folder.path());
    let name = IN_EVERY_FORM[1].0;
    let layer = name.trim_end_matches(".weight");
    let weight = |dtype: &'static str| {
        let (raw, _) = fp8(&contents, name, "F8_E4M3");
        Raw { dtype, ..raw }
    };
    let bytes = |suffix: &str, text: &str| Raw {
        name: format!("{layer}.{suffix}"),
        dtype: "U8",
        shape: vec![text.len() as i64],
        bytes: text.as_bytes().to_vec(),
    };
    let block_scales = Raw {
        name: format!("{layer}.weight_scale"),
        dtype: "F32",
        shape: vec![4],
        bytes: vec![0; 16],
    };
    for (raw, words) in [
        (
            vec![
                weight("I8"),
                scalar(format!("{layer}.weight_scale"), 0.5, &[]),
            ],
            &["weight_scale", "I8", "only scaled fp8"][..],
        ),
        (
            vec![weight("F8_E4M3"), block_scales],
            &["weight_scale", "[4]", "one scale"],
        ),
        (
            vec![
                weight("F8_E4M3"),
                bytes("comfy_quant", r#"{"format": "nvfp4"}"#),
            ],
            &["comfy_quant", "nvfp4", "float8_e4m3fn"],
        ),
        (
            vec![weight("F8_E4M3"), bytes("comfy_quant", "{")],
            &["comfy_quant", "not JSON"],
        ),
        (vec![weight("I8")], &["Int8", "to_q.weight"]),
        (vec![weight("F8_E8M0")], &["F8_E8M0", "not supported"]),
        (
            vec![
                weight("F8_E4M3"),
                scalar(format!("{layer}.scale_weight"), f32::NAN, &[]),
            ],
            &["to_q.weight", "not finite"],
        ),
    ] {
        write_raw(&path, &contents, raw);
        let error = UNet::open(&path, &OpenOptions::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("quantised.safetensors") && !error.contains('\n'),
            "{error}"
        );
        for word in words {
            assert!(error.contains(word), "{word}: {error}");
        }
    }
    let mut header = silent(folder.path());
    let formats = json!({"layers": {"a.b": {"format": "int8_tensorwise"}}}).to_string();
    header.set("_quantization_metadata", Some(&formats));
    header.write(&path);
    let error = Bundle::open_single_file(&path, None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("a.b") && error.contains("int8_tensorwise"),
        "{error}"
    );
}

/// Every bit of a tensor counts, in any part; so does a hash that was edited.
#[test]
fn a_file_of_this_program_whose_tensors_changed_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("own.safetensors");
    tiny::write_single_file(&path, Parameterization::Flow);
    let good = fs::read(&path).unwrap();
    assert!(
        Bundle::open_single_file(&path, None)
            .unwrap()
            .notes
            .is_empty()
    );
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    for (place, bit) in [
        (header, 0),
        (good.len() - 1001, 4),
        (good.len() - 1, 7),
        (header + 4097, 3),
    ] {
        let mut bytes = good.clone();
        bytes[place] ^= 1 << bit;
        fs::write(&path, bytes).unwrap();
        let error = Bundle::open_single_file(&path, None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("own.safetensors") && error.contains(HASH),
            "{place}: {error}"
        );
        assert_eq!(error.matches("0x").count(), 2, "both hashes: {error}");
    }
    fs::write(&path, &good).unwrap();
    let own = Contents::read(&path);
    for (hash, is_good) in [
        (
            own.metadata
                .iter()
                .find(|(key, _)| key == HASH)
                .unwrap()
                .1
                .clone(),
            true,
        ),
        ("0x0".into(), false),
        (String::new(), false),
    ] {
        let mut contents = Contents::read(&path);
        let spellings = [
            hash.clone(),
            hash.to_uppercase().replace("0X", "0x"),
            hash.replace("0x", ""),
        ];
        for spelling in spellings {
            contents.set(HASH, Some(&spelling));
            let edited = folder.path().join("edited.safetensors");
            contents.write(&edited);
            let opened = Bundle::open_single_file(&edited, None);
            assert_eq!(opened.is_ok(), is_good, "{spelling:?}");
        }
    }
}

/// Visits a component and collects name, dtype, shape and bytes.
fn visited(component: Component, place: &Path) -> Vec<(String, Kind, Vec<i64>, Vec<u8>)> {
    let mut found = Vec::new();
    visit_weights(component, place, &mut |name, kind, shape, bytes| {
        found.push((name.to_owned(), kind, shape.to_vec(), bytes.to_vec()));
    })
    .unwrap();
    found
}

#[test]
fn a_file_and_the_folder_imported_from_it_have_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fp8.safetensors");
    let contents = silent(folder.path());
    let scale = IN_EVERY_FORM[1].0.replace(".weight", ".scale_weight");
    let raw = vec![
        fp8(&contents, IN_EVERY_FORM[1].0, "F8_E4M3").0,
        scalar(scale, 0.37, &[]),
        fp8(&contents, IN_EVERY_FORM[4].0, "F8_E5M2").0,
    ];
    write_raw(&path, &contents, raw);
    let mut bundle = Bundle::open_single_file(&path, None).unwrap();
    bundle.parameterization = Some(Parameterization::Flow);
    let out = folder.path().join("imported");
    export_diffusers(&bundle, &out, &ExportOptions::default()).unwrap();
    for component in Component::ALL {
        let (file, imported) = (
            visited(component, &path),
            visited(component, &out.join(component.folder())),
        );
        assert!(
            !file.is_empty() && file == imported,
            "{}",
            component.folder()
        );
    }
}

/// A configuration in the header is called by the file and the key; a folder's by its path.
#[test]
fn messages_name_the_file_that_was_given() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("given.safetensors");
    let parts = [
        (Component::UNet, "block_out_channels", json!([0])),
        (Component::ClipL, "num_hidden_layers", json!(1)),
        (Component::ClipG, "hidden_size", json!(-3)),
        (Component::Vae, "norm_num_groups", json!(3)),
    ];
    for (component, key, value) in parts {
        let mut contents = silent(folder.path());
        let (_, text) = contents
            .metadata
            .iter()
            .find(|(key, _)| key == CONFIGS_KEY)
            .unwrap();
        let mut configs: Value = serde_json::from_str(text).unwrap();
        configs[component.folder()][key] = value.clone();
        contents.set(CONFIGS_KEY, Some(&configs.to_string()));
        contents.write(&path);
        let errors = [
            Bundle::open_single_file(&path, None).map(drop),
            Model::open(&path, &OpenOptions::default()).map(drop),
            Configs::read([path.as_path(); 4]).map(drop),
        ];
        for error in errors {
            let error = error.unwrap_err().to_string();
            for word in [path.to_str().unwrap(), CONFIGS_KEY, component.folder(), key] {
                assert!(error.contains(word), "{word}: {error}");
            }
            assert!(
                !error.contains("config.json"),
                "there is no such file: {error}"
            );
        }
    }
    // A folder, of which one part is another model's.
    let out = folder.path().join("model");
    tiny::write_folder(&out, Parameterization::Flow);
    for (component, key, value) in [
        (Component::ClipL, "vocab_size", json!(51)),
        (Component::ClipG, "intermediate_size", json!(9)),
        (Component::Vae, "latent_channels", json!(5)),
    ] {
        let place = out.join(component.folder()).join("config.json");
        let good = fs::read_to_string(&place).unwrap();
        let mut config: Value = serde_json::from_str(&good).unwrap();
        config[key] = value;
        fs::write(&place, config.to_string()).unwrap();
        let error = Bundle::open_folders(|c| out.join(c.folder()), None)
            .unwrap_err()
            .to_string();
        let own = out.join(component.folder());
        assert!(error.starts_with(own.to_str().unwrap()), "{error}");
        assert!(
            !error.contains(out.join("unet").to_str().unwrap()),
            "{error}"
        );
        fs::write(&place, good).unwrap();
    }
}
