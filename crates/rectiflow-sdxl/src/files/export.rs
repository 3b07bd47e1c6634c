//! A model for other tools: a diffusers folder, or a single-file SDXL checkpoint. Both carry what they need.
//!
//! - The diffusers folder samples with the stock `StableDiffusionXLPipeline`, nothing fetched: both tokenizers are in
//!   it, and for a flow model the scheduler is `DPMSolverMultistepScheduler` of order 1 on flow sigmas, which is
//!   Euler's method. (diffusers' own flow-matching Euler lacks two members that the SDXL pipeline uses.) Two of its
//!   habits differ from `rectiflow sample`: it starts just below sigma 1, and truncates timesteps to integers.
//! - The single file says in its header what it is (`model_spec`) and holds the four configurations, so that a tiny
//!   model can be read back. No tool reads "flow" from a file by itself yet: in ComfyUI the model goes through a
//!   ModelSamplingSD3 node.
//!
//! Every tensor is loaded, checked, converted, written and dropped before the next: memory holds one tensor, whatever
//! the size of the model. A folder or file appears under its name only when it is whole.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use crate::{
    durable::{rename_folder, write_bytes},
    error::{Error, Result},
    files::{bundle::Bundle, model_spec},
    flow::Parameterization,
    weights::{
        component::{Component, PARAMETERIZATION_KEY},
        keys::{Form, SingleKey},
        tensor_file::{Metadata, Planned, stored_kind, write_streamed},
    },
};

/// The diffusers version whose configuration keys are written.
const DIFFUSERS_VERSION: &str = "0.42.1";

/// The largest fp16 number.
const LARGEST_HALF: f64 = 65504.0;

/// How to export.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// Dtype on disk; `None` keeps each tensor's own.
    pub kind: Option<Kind>,
    /// Shift of the noise levels that the diffusers scheduler samples a flow model with.
    pub sampling_shift: f64,
    /// Name of the model in the single file's header.
    pub title: String,
    /// What the model is and comes from, in the single file's header; nothing if empty.
    pub description: String,
    /// More files for the diffusers folder: both tokenizers', a model card.
    pub attachments: Vec<Attachment>,
    /// More entries for the headers of weight files.
    pub metadata: Vec<(String, String)>,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            kind: None,
            // What `rectiflow sample` takes: the article trained with 3 and sampled best with 6.
            sampling_shift: 6.0,
            title: "rectiflow SDXL".into(),
            description: String::new(),
            attachments: Vec::new(),
            metadata: Vec::new(),
        }
    }
}

/// A file of an exported folder that holds no weights.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// Its place in the folder, e.g. `tokenizer/vocab.json`.
    pub path: PathBuf,
    /// Its contents.
    pub bytes: Vec<u8>,
}

/// Writes a diffusers folder. An earlier export of that name is replaced.
///
/// # Errors
/// [`Error::Invalid`] if it is not known what the model predicts, a tensor holds NaN or does not fit fp16, or `out` is
/// something that no export made; [`Error::Io`].
pub fn export_diffusers(bundle: &Bundle<'_>, out: &Path, options: &ExportOptions) -> Result<()> {
    let parameterization = known_parameterization(bundle)?;
    refuse_foreign(out)?;
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(Error::io(parent))?;
    let staging = beside(out, "tmp");
    let written = write_folder(bundle, &staging, parameterization, options).and_then(|()| replace(&staging, out));
    if written.is_err() {
        // The first failure is the one to report; a temporary folder that stays is only untidy.
        let _ = fs::remove_dir_all(&staging);
    }
    written
}

fn write_folder(
    bundle: &Bundle<'_>,
    folder: &Path,
    parameterization: Parameterization,
    options: &ExportOptions,
) -> Result<()> {
    let create = |folder: &Path| fs::create_dir_all(folder).map_err(Error::io(folder));
    create(folder)?;
    for component in Component::ALL {
        let folder = folder.join(component.folder());
        create(&folder)?;
        write_component(bundle, component, &folder, parameterization, options)?;
    }
    create(&folder.join("scheduler"))?;
    let scheduler = scheduler_config(parameterization, options.sampling_shift);
    write_json(&folder.join("scheduler").join("scheduler_config.json"), &scheduler)?;
    for file in &options.attachments {
        let path = folder.join(&file.path);
        create(path.parent().unwrap_or(folder))?;
        write_bytes(&path, &file.bytes)?;
    }
    write_json(&folder.join("model_index.json"), &model_index(parameterization))
}

fn write_component(
    bundle: &Bundle<'_>,
    component: Component,
    folder: &Path,
    parameterization: Parameterization,
    options: &ExportOptions,
) -> Result<()> {
    let planned: Vec<Planned> = bundle
        .names(component)
        .into_iter()
        .map(|name| Planned {
            name: name.to_owned(),
            kind: stored(bundle, component, name, options),
            shape: bundle.shape(component, name).expect("listed tensors have shapes"),
        })
        .collect();
    let config = component_config(component, bundle.config(component), planned.first().map(|planned| planned.kind));
    write_json(&folder.join("config.json"), &Value::Object(config))?;
    let mut metadata = vec![("format".to_owned(), "pt".to_owned())];
    metadata.extend(options.metadata.iter().cloned());
    if component == Component::UNet {
        metadata.push((PARAMETERIZATION_KEY.into(), parameterization.to_string()));
    }
    let path = folder.join(component.weights_name());
    let metadata = Metadata { entries: &borrowed(&metadata), hash: None };
    write_streamed(&path, planned, metadata, &mut |name| loaded(bundle, component, name, options))
}

/// Writes a single-file SDXL checkpoint. An earlier file of that name is replaced.
///
/// # Errors
/// [`Error::Invalid`] if it is not known what the model predicts, or a tensor holds NaN or does not fit fp16;
/// [`Error::Io`].
pub fn export_single_file(bundle: &Bundle<'_>, out: &Path, options: &ExportOptions) -> Result<()> {
    let parameterization = known_parameterization(bundle)?;
    // For each tensor of the single file the diffusers tensors in it, in the order of the stack.
    let mut contents: BTreeMap<String, Vec<(Component, String, Form)>> = BTreeMap::new();
    for component in Component::ALL {
        for diffusers in bundle.names(component) {
            let SingleKey { name, form } = bundle
                .table()
                .to_single(component, diffusers)
                .expect("the table has a place for every tensor of the configured model");
            contents.entry(name).or_default().push((component, diffusers.to_owned(), form));
        }
    }
    for parts in contents.values_mut() {
        parts.sort_by_key(|(_, _, form)| if let Form::Stacked { index, .. } = form { *index } else { 0 });
    }
    let planned = contents.iter().map(|(name, parts)| {
        let (component, diffusers, form) = &parts[0];
        let shape = bundle.shape(*component, diffusers).expect("listed tensors have shapes");
        let kinds = parts.iter().map(|(component, diffusers, _)| stored(bundle, *component, diffusers, options));
        let kind = kinds.reduce(wider).expect("every tensor of the file holds one of the model");
        Planned { name: name.clone(), kind, shape: form.single_shape(&shape) }
    });
    let configs = Component::ALL.map(|component| {
        (component.folder().to_owned(), component_config(component, bundle.config(component), options.kind).into())
    });
    let metadata = model_spec::metadata(bundle, parameterization, options, configs.into_iter().collect())?;
    let metadata = Metadata { entries: &borrowed(&metadata), hash: Some(model_spec::HASH_KEY) };
    write_streamed(out, planned.collect(), metadata, &mut |name| {
        let parts = contents[name].iter();
        let tensors =
            parts.map(|(component, diffusers, form)| Ok((loaded(bundle, *component, diffusers, options)?, *form)));
        to_single(tensors.collect::<Result<_>>()?).map_err(Error::torch(format!("converting {name}")))
    })
}

/// Diffusers tensors in the form of the single file.
fn to_single(mut parts: Vec<(Tensor, Form)>) -> std::result::Result<Tensor, tch::TchError> {
    if parts.len() > 1 {
        return Tensor::f_cat(&parts.iter().map(|(tensor, _)| tensor).collect::<Vec<_>>(), 0);
    }
    let (tensor, form) = parts.pop().expect("every tensor of the file holds one of the model");
    match form {
        Form::Same | Form::Stacked { .. } => Ok(tensor),
        Form::Transposed => tensor.f_tr(),
        Form::Pointwise => tensor.f_unsqueeze(-1)?.f_unsqueeze(-1),
    }
}

/// The dtype that holds what both hold: parts of a stack need not have one dtype.
fn wider(a: Kind, b: Kind) -> Kind {
    match (a, b) {
        (a, b) if a == b => a,
        (Kind::Half, Kind::BFloat16) | (Kind::BFloat16, Kind::Half) => Kind::Float,
        (a, b) if a.elt_size_in_bytes() < b.elt_size_in_bytes() => b,
        (a, _) => a,
    }
}

/// The dtype a tensor is written in.
fn stored(bundle: &Bundle<'_>, component: Component, name: &str, options: &ExportOptions) -> Kind {
    stored_kind(bundle.kind(component, name).unwrap_or(Kind::Float), options.kind)
}

/// A tensor that is finite, and stays so in the dtype it is written in.
fn loaded(bundle: &Bundle<'_>, component: Component, name: &str, options: &ExportOptions) -> Result<Tensor> {
    let tensor = bundle.load(component, name)?;
    if stored_kind(tensor.kind(), options.kind) == Kind::Half && tensor.numel() > 0 {
        let largest = tensor.abs().max().double_value(&[]);
        if largest > LARGEST_HALF {
            let reason = format!("holds {largest}, and fp16 ends at {LARGEST_HALF}: export as bf16 or fp32");
            return Err(Error::Invalid { what: format!("tensor {name} of {}", component.folder()), reason });
        }
    }
    Ok(tensor)
}

fn known_parameterization(bundle: &Bundle<'_>) -> Result<Parameterization> {
    bundle.parameterization.ok_or_else(|| Error::Invalid {
        what: "the model".into(),
        reason: "nothing in it says what its UNet predicts: say flow, eps or v (--parameterization)".into(),
    })
}

/// A component's configuration for upstream's loaders: what was read, with the keys that they insist on.
fn component_config(component: Component, config: &Map<String, Value>, kind: Option<Kind>) -> Map<String, Value> {
    let mut config = config.clone();
    let mut default = |key: &str, value: Value| {
        config.entry(key).or_insert(value);
    };
    match component {
        Component::UNet => default("_class_name", json!("UNet2DConditionModel")),
        Component::Vae => default("_class_name", json!("AutoencoderKL")),
        Component::ClipL | Component::ClipG => {
            let class = if component == Component::ClipL { "CLIPTextModel" } else { "CLIPTextModelWithProjection" };
            default("architectures", json!([class]));
            default("model_type", json!("clip_text_model"));
            config.remove("dtype");
            if let Some(name) = kind.and_then(torch_name) {
                config.insert("torch_dtype".into(), json!(name));
            }
        }
    }
    config
}

fn torch_name(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Float => Some("float32"),
        Kind::Half => Some("float16"),
        Kind::BFloat16 => Some("bfloat16"),
        _ => None,
    }
}

fn model_index(parameterization: Parameterization) -> Value {
    let scheduler = match parameterization {
        Parameterization::Flow => "DPMSolverMultistepScheduler",
        Parameterization::Eps | Parameterization::V => "EulerDiscreteScheduler",
    };
    json!({
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        // The empty negative prompt is encoded, as in training and in ComfyUI, and not replaced by zeros.
        "force_zeros_for_empty_prompt": false,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [null, null],
        "image_encoder": [null, null]
    })
}

fn scheduler_config(parameterization: Parameterization, sampling_shift: f64) -> Value {
    let mut config = json!({
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear"
    });
    let more = match parameterization {
        Parameterization::Flow => json!({
            "_class_name": "DPMSolverMultistepScheduler",
            "solver_order": 1,
            "algorithm_type": "dpmsolver++",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": true,
            "flow_shift": sampling_shift,
            "final_sigmas_type": "zero"
        }),
        // SDXL 1.0's own.
        Parameterization::Eps | Parameterization::V => json!({
            "_class_name": "EulerDiscreteScheduler",
            "prediction_type": if parameterization == Parameterization::V { "v_prediction" } else { "epsilon" },
            "interpolation_type": "linear",
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "use_karras_sigmas": false
        }),
    };
    let (Value::Object(config), Value::Object(more)) = (&mut config, more) else { unreachable!("both are objects") };
    config.extend(more);
    Value::Object(std::mem::take(config))
}

fn borrowed(metadata: &[(String, String)]) -> Vec<(&str, &str)> {
    metadata.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).expect("a JSON value serialises");
    text.push('\n');
    write_bytes(path, text.as_bytes())
}

/// Whatever stands at `out` may be deleted only if it is an export (or empty).
fn refuse_foreign(out: &Path) -> Result<()> {
    let entries = match fs::read_dir(out) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::Io { path: out.to_owned(), source }),
        Ok(mut entries) => entries.next(),
    };
    if entries.is_none() || out.join("model_index.json").is_file() {
        return Ok(());
    }
    let reason = "is a folder that holds something else than an exported model: give another name";
    Err(Error::Invalid { what: out.display().to_string(), reason: reason.into() })
}

/// Puts the finished folder in the place of what was there.
fn replace(staging: &Path, out: &Path) -> Result<()> {
    let old = beside(out, "old");
    let had_old = out.exists();
    if had_old {
        fs::rename(out, &old).map_err(Error::io(out))?;
    }
    rename_folder(staging, out)?;
    if had_old { fs::remove_dir_all(&old).map_err(Error::io(old)) } else { Ok(()) }
}

/// `OUT.tmp-PID` beside `OUT`.
fn beside(out: &Path, what: &str) -> PathBuf {
    let mut name: OsString = out.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{what}-{}", std::process::id()));
    out.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{
        config::{clip::ClipConfig, unet::UNetConfig, vae::VaeConfig},
        files::{
            folder,
            model::{Model, OpenOptions},
            single_file::{CONFIGS_KEY, sdxl_configs},
        },
        nets::{clip::ClipText, unet::UNet, vae::Vae},
        weights::{
            Parameters, Weights,
            tensor_file::{TensorFile, write_tensors},
        },
    };

    /// SDXL's configurations with these keys changed.
    fn tiny_config(component: Component, changes: Value) -> Map<String, Value> {
        let mut config = sdxl_configs().remove(&component).unwrap();
        config.extend(changes.as_object().unwrap().clone());
        config
    }

    /// Two levels instead of three, another number of blocks, and a projection that is not square.
    fn tiny_model(parameterization: Option<Parameterization>) -> Model {
        let unet = json!({"block_out_channels": [8, 16], "attention_head_dim": [2, 2], "norm_num_groups": 4,
            "layers_per_block": 1, "cross_attention_dim": 12, "transformer_layers_per_block": [1, 1],
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 54, "sample_size": 16,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]});
        let clip = json!({"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 50, "intermediate_size": 8});
        let mut clip_l = tiny_config(Component::ClipL, clip.clone());
        clip_l.extend([("hidden_size".into(), json!(4)), ("projection_dim".into(), json!(4))]);
        let mut clip_g = tiny_config(Component::ClipG, clip);
        clip_g.extend([("hidden_size".into(), json!(8)), ("projection_dim".into(), json!(6))]);
        let vae = json!({"block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1,
            "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"]});
        let weights = |seed| Weights::random(seed, Kind::Float, Device::Cpu);
        let unet = UNetConfig::from_json(tiny_config(Component::UNet, unet), "unet").unwrap();
        let vae = VaeConfig::from_json(tiny_config(Component::Vae, vae), "vae").unwrap();
        Model {
            unet: UNet::new(unet, weights(1)).unwrap(),
            clip_l: ClipText::new(ClipConfig::from_json(clip_l, false, "l").unwrap(), weights(2)).unwrap(),
            clip_g: ClipText::new(ClipConfig::from_json(clip_g, true, "g").unwrap(), weights(3)).unwrap(),
            vae: Vae::new(vae, weights(4)).unwrap(),
            parameterization,
            scheduler: None,
        }
    }

    fn parameters(model: &Model, component: Component) -> &Parameters {
        match component {
            Component::UNet => &model.unet.parameters,
            Component::ClipL => &model.clip_l.parameters,
            Component::ClipG => &model.clip_g.parameters,
            Component::Vae => &model.vae.parameters,
        }
    }

    /// The bytes that a file would hold of this tensor.
    fn bytes(tensor: &Tensor, kind: Kind) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        write_tensors(&path, [("x", tensor)], Some(kind), &[]).unwrap();
        TensorFile::open(&path).unwrap().bytes("x").unwrap().to_vec()
    }

    fn options(kind: Kind) -> ExportOptions {
        let file = |path: &str| Attachment { path: path.into(), bytes: b"{}".to_vec() };
        ExportOptions {
            kind: Some(kind),
            attachments: vec![file("tokenizer/vocab.json"), file("tokenizer_2/vocab.json"), file("README.md")],
            metadata: vec![("run".into(), "demo".into())],
            ..ExportOptions::default()
        }
    }

    const KINDS: [Kind; 3] = [Kind::Float, Kind::Half, Kind::BFloat16];

    #[test]
    fn a_diffusers_folder_holds_the_models_bytes() {
        let model = tiny_model(Some(Parameterization::Flow));
        let folder = tempfile::tempdir().unwrap();
        for kind in KINDS {
            // The second and third replace the one before.
            let out = folder.path().join("export");
            export_diffusers(&Bundle::of_model(&model).unwrap(), &out, &options(kind)).unwrap();
            for component in Component::ALL {
                let files = folder::weight_files(component, &folder::find(component, &out).unwrap()).unwrap();
                let file = TensorFile::open(&files[0]).unwrap();
                assert_eq!(file.names().count(), parameters(&model, component).len());
                for (name, tensor) in parameters(&model, component).iter() {
                    assert!(file.bytes(name).unwrap() == bytes(tensor, kind), "{name} in {kind:?}");
                    assert_eq!(file.kind(name), Some(kind), "{name}");
                }
                assert_eq!(file.metadata()["run"], "demo");
            }
            let opened = Model::open(&out, &OpenOptions::default()).unwrap();
            assert_eq!(opened.parameterization, Some(Parameterization::Flow));
            assert_eq!(opened.scheduler.unwrap().flow_shift, Some(6.0));
            assert!(
                out.join("tokenizer_2/vocab.json").is_file()
                    && out.join("README.md").is_file()
                    && out.join("model_index.json").is_file()
            );
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing but the export is left");
        }
    }

    #[test]
    fn a_single_file_holds_the_models_bytes_in_its_own_forms() {
        let model = tiny_model(Some(Parameterization::Flow));
        let folder = tempfile::tempdir().unwrap();
        for kind in KINDS {
            let out = folder.path().join("model.safetensors");
            export_single_file(&Bundle::of_model(&model).unwrap(), &out, &options(kind)).unwrap();
            let file = TensorFile::open(&out).unwrap();
            let clip_g = |name: &str| model.clip_g.parameters.get(name).unwrap();
            let projection = clip_g("text_projection.weight");
            assert_eq!(projection.size(), [6, 8]);
            let stored = "conditioner.embedders.1.model.text_projection";
            assert!(file.bytes(stored).unwrap() == bytes(&projection.tr(), kind), "transposed");
            let layer = "text_model.encoder.layers.1.self_attn";
            let [q, k, v] = ["q", "k", "v"].map(|part| clip_g(&format!("{layer}.{part}_proj.weight")));
            let stored = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight";
            assert!(file.bytes(stored).unwrap() == bytes(&Tensor::cat(&[q, k, v], 0), kind), "query, key, value");
            let query = model.vae.parameters.get("decoder.mid_block.attentions.0.to_q.weight").unwrap();
            let stored = "first_stage_model.decoder.mid.attn_1.q.weight";
            assert_eq!(file.shape(stored), Some(&[16, 16, 1, 1][..]));
            assert!(file.bytes(stored).unwrap() == bytes(query, kind));
            // All of them, read back through the table.
            let back = Bundle::open_single_file(&out, None).unwrap();
            let expected = if kind == Kind::Half { vec![true] } else { vec![] };
            let about_fp16: Vec<bool> =
                back.notes.iter().map(|note| note.contains("the VAE is stored in fp16")).collect();
            assert_eq!(about_fp16, expected, "{:?}", back.notes);
            for component in Component::ALL {
                for (name, tensor) in parameters(&model, component).iter() {
                    let read = back.load(component, name).unwrap();
                    assert!(bytes(&read, kind) == bytes(tensor, kind) && read.kind() == kind, "{name} in {kind:?}");
                }
            }
        }
    }

    #[test]
    fn importing_a_single_file_gives_the_diffusers_folder() {
        let model = tiny_model(Some(Parameterization::V));
        let folder = tempfile::tempdir().unwrap();
        let (direct, single) = (folder.path().join("direct"), folder.path().join("model.safetensors"));
        let (imported, again) = (folder.path().join("imported"), folder.path().join("again.safetensors"));
        let bundle = Bundle::of_model(&model).unwrap();
        export_diffusers(&bundle, &direct, &options(Kind::Half)).unwrap();
        export_single_file(&bundle, &single, &options(Kind::Half)).unwrap();
        let kept = ExportOptions { kind: None, ..options(Kind::Half) };
        export_diffusers(&Bundle::open_single_file(&single, None).unwrap(), &imported, &kept).unwrap();
        for component in Component::ALL {
            for name in ["config.json", component.weights_name()] {
                let read = |root: &Path| fs::read(root.join(component.folder()).join(name)).unwrap();
                assert!(read(&direct) == read(&imported), "{}/{name}", component.folder());
            }
        }
        let index = fs::read_to_string(imported.join("scheduler/scheduler_config.json")).unwrap();
        assert!(index.contains("v_prediction"), "{index}");
        let bundle = Bundle::open_folders(|component| imported.join(component.folder()), Some(Parameterization::V));
        export_single_file(&bundle.unwrap(), &again, &kept).unwrap();
        assert!(fs::read(&single).unwrap() == fs::read(&again).unwrap(), "there and back gives the same file");
    }

    #[test]
    fn broken_weights_are_refused_by_name_and_leave_nothing() {
        let model = tiny_model(Some(Parameterization::Flow));
        let name = "mid_block.resnets.0.conv1.weight";
        let mut value = model.unet.parameters.get(name).unwrap().view(-1).get(7);
        for (wrong, kind, expected) in [(f64::NAN, Kind::Float, "not finite"), (1e5, Kind::Half, "fp16 ends at 65504")]
        {
            let _ = value.fill_(wrong);
            let folder = tempfile::tempdir().unwrap();
            let bundle = Bundle::of_model(&model).unwrap();
            let to_folder = export_diffusers(&bundle, &folder.path().join("x"), &options(kind)).unwrap_err();
            let to_file =
                export_single_file(&bundle, &folder.path().join("x.safetensors"), &options(kind)).unwrap_err();
            for message in [to_folder.to_string(), to_file.to_string()] {
                assert!(message.contains(name) && message.contains("unet") && message.contains(expected), "{message}");
            }
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn foreign_folders_and_silent_models_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("pictures");
        fs::create_dir(&out).unwrap();
        fs::write(out.join("cat.png"), b"meow").unwrap();
        let model = tiny_model(Some(Parameterization::Eps));
        let message = export_diffusers(&Bundle::of_model(&model).unwrap(), &out, &ExportOptions::default());
        assert!(message.unwrap_err().to_string().contains("pictures"));
        assert_eq!(fs::read(out.join("cat.png")).unwrap(), b"meow");
        let silent = tiny_model(None);
        let message =
            export_diffusers(&Bundle::of_model(&silent).unwrap(), &folder.path().join("x"), &options(Kind::Half));
        assert!(message.unwrap_err().to_string().contains("flow, eps or v"));
    }

    #[test]
    fn a_single_file_opens_as_the_model_that_it_is() {
        let model = tiny_model(Some(Parameterization::Eps));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        export_single_file(&Bundle::of_model(&model).unwrap(), &path, &options(Kind::Float)).unwrap();
        let opened = Model::open(&path, &OpenOptions::default()).unwrap();
        assert_eq!(opened.parameterization, Some(Parameterization::Eps));
        for component in Component::ALL {
            let found = parameters(&opened, component);
            assert_eq!(found.len(), parameters(&model, component).len());
            for (name, tensor) in parameters(&model, component).iter() {
                assert!(found.get(name).unwrap().equal(tensor), "{}/{name}", component.folder());
            }
        }
        let half = OpenOptions { kind: Kind::Half, ..OpenOptions::default() };
        let opened = Model::open(&path, &half).unwrap();
        assert_eq!((opened.unet.kind(), opened.vae.kind()), (Kind::Half, Kind::Float), "SDXL's VAE overflows in fp16");
        let metadata = TensorFile::open(&path).unwrap().metadata().clone();
        assert_eq!(metadata["modelspec.prediction_type"], "epsilon");
        assert_eq!(metadata["modelspec.resolution"], "32x32", "16 latents of 2 pixels a side");
        assert!(!metadata.contains_key("modelspec.usage_hint"), "there is nothing to say");
    }

    #[test]
    fn parts_that_a_file_lacks_come_from_another_model() {
        let [model, other] = [Parameterization::Flow, Parameterization::Eps].map(|p| tiny_model(Some(p)));
        let folder = tempfile::tempdir().unwrap();
        let [whole, part] = ["whole.safetensors", "unet.safetensors"].map(|name| folder.path().join(name));
        let parts = folder.path().join("parts");
        let _ = other.clip_g.parameters.get("text_projection.weight").unwrap().shallow_clone().fill_(0.25);
        export_single_file(&Bundle::of_model(&model).unwrap(), &whole, &options(Kind::Float)).unwrap();
        export_diffusers(&Bundle::of_model(&other).unwrap(), &parts, &options(Kind::Float)).unwrap();
        // A UNet alone, without its prefix, as such files are.
        let file = TensorFile::open(&whole).unwrap();
        let bare = |name: &str| name.strip_prefix("model.diffusion_model.").map(str::to_owned);
        let tensors: Vec<_> = file.names().filter_map(|name| Some((bare(name)?, file.tensor(name).unwrap()))).collect();
        let metadata: Vec<_> = file.metadata().iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        write_tensors(&part, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), None, &metadata).unwrap();
        let message = Bundle::open_single_file(&part, None).unwrap_err().to_string();
        assert!(message.contains("clip-l") && message.contains("--missing-from"), "{message}");
        let bundle = Bundle::open_single_file(&part, Some(&parts)).unwrap();
        assert_eq!(bundle.notes.len(), 3, "{:?}", bundle.notes);
        assert!(bundle.notes[1].starts_with("the clip-g is from"), "{:?}", bundle.notes);
        let projection = bundle.load(Component::ClipG, "text_projection.weight").unwrap();
        assert!(projection.eq(0.25).all().int64_value(&[]) == 1);
        for (name, tensor) in model.unet.parameters.iter() {
            assert!(bundle.load(Component::UNet, name).unwrap().equal(tensor), "{name}");
        }
    }

    #[test]
    fn a_stack_is_as_wide_as_its_widest_part() {
        for (a, b, expected) in [
            (Kind::Half, Kind::Half, Kind::Half),
            (Kind::Half, Kind::BFloat16, Kind::Float),
            (Kind::BFloat16, Kind::Float, Kind::Float),
            (Kind::Double, Kind::Half, Kind::Double),
        ] {
            assert_eq!((wider(a, b), wider(b, a)), (expected, expected), "{a:?} and {b:?}");
        }
    }

    #[test]
    fn unfit_single_files_are_answered_with_what_is_wrong() {
        let model = tiny_model(Some(Parameterization::Flow));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        export_single_file(&Bundle::of_model(&model).unwrap(), &path, &options(Kind::Float)).unwrap();
        let file = TensorFile::open(&path).unwrap();
        // A copy of the file without the tensors that `keep` refuses, with another one, under another header.
        let rewritten = |keep: &dyn Fn(&str) -> bool, metadata: &[(&str, &str)]| {
            let extra = Tensor::from_slice(&[1f32]);
            let tensors: Vec<_> =
                file.names().filter(|name| keep(name)).map(|n| (n, file.tensor(n).unwrap())).collect();
            let all = tensors.iter().map(|(name, tensor)| (*name, tensor)).chain([("model_ema.decay", &extra)]);
            let path = folder.path().join("other.safetensors");
            write_tensors(&path, all, None, metadata).unwrap();
            path
        };
        let own: Vec<_> = file.metadata().iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let bundle = Bundle::open_single_file(&rewritten(&|_| true, &own), None).unwrap();
        assert!(bundle.notes[0].starts_with("1 tensor of averaged weights"), "no obstacle: {:?}", bundle.notes);
        let error = |path: PathBuf| Bundle::open_single_file(&path, None).unwrap_err().to_string();
        let message = error(rewritten(&|name| !name.contains("embedders.1"), &own));
        assert!(message.contains("clip-g") && message.contains("conditioner.embedders.1.model."), "{message}");
        let message = error(rewritten(&|name| !name.ends_with("out.2.bias"), &own));
        assert!(message.ends_with("unet/conv_out.bias [4] is missing"), "{message}");
        let message = error(rewritten(&|_| true, &[]));
        assert!(message.contains("unet/conv_in.weight: expected [320, 4, 3, 3], found [8, 4, 3, 3]"), "{message}");
        let message = error(rewritten(&|_| true, &[(CONFIGS_KEY, "{\"unet\": 3}")]));
        assert!(message.contains(CONFIGS_KEY), "{message}");
    }
}
