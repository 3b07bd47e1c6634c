//! `rectiflow export` and `rectiflow import`: models for other tools, and models from them.
//!
//! Both read any layout as a bundle of tensors and write another. The files at a path decide its
//! layout.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use clap::ValueEnum;
use rectiflow_data::token::{Clip, tokenizer_files};
use rectiflow_sdxl::{
    bundle::Bundle,
    durable::write_bytes,
    export::{Attachment, ExportOptions, export_diffusers, export_single_file},
    flow::Parameterization,
    infotext::Drawing,
    model::Component,
    sample::SampleSettings,
    workflow::{Workflow, ascii_json},
};
use rectiflow_train::{components::Components, model};
use serde_json::json;

use crate::{
    model_card::ModelCard,
    terminal::{
        answer::{Answer, Misuse},
        dtype::{self, FileDtype},
    },
};

/// Write a model for other tools: one file for ComfyUI, or a folder for diffusers.
///
/// A diffusers folder holds both tokenizers, and a scheduler that samples the model as it was
/// trained, so it works offline. In ComfyUI put a ModelSamplingSD3 node (shift 3 to 6) behind the
/// loader of a flow model. A model card says what the model is and, for a checkpoint, how it was
/// trained: README.md in the folder, NAME.md beside the file.
#[derive(Debug, clap::Args)]
pub(crate) struct ExportArgs {
    /// A training checkpoint, a diffusers model folder or a single-file checkpoint.
    #[arg(long)]
    model: PathBuf,
    /// Which layout to write.
    #[arg(long, value_enum)]
    format: Format,
    /// The file or folder to write; an earlier export there is replaced.
    #[arg(long)]
    out: PathBuf,
    /// Dtype of the numbers in the file; fp16 and bf16 halve its size.
    #[arg(long, value_enum, default_value_t = FileDtype::Fp16)]
    dtype: FileDtype,
    /// Shift that the diffusers scheduler samples a flow model with.
    #[arg(long, default_value_t = ExportOptions::default().sampling_shift, allow_negative_numbers = true)]
    shift: f64,
    /// What the model predicts (flow, eps or v), if neither its metadata nor its scheduler says so.
    #[arg(long)]
    parameterization: Option<Parameterization>,
}

/// Read a single-file SDXL checkpoint and write it as a diffusers folder, which can be trained on.
#[derive(Debug, clap::Args)]
pub(crate) struct ImportArgs {
    /// The checkpoint, a safetensors file.
    file: PathBuf,
    /// The folder to write; an earlier export there is replaced.
    #[arg(long)]
    out: PathBuf,
    /// What the model predicts (flow, eps or v), if the file does not say so.
    #[arg(long)]
    parameterization: Option<Parameterization>,
    /// A diffusers model folder that supplies the parts missing from the file, such as text
    /// encoders.
    #[arg(long, value_name = "MODEL")]
    missing_from: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// One safetensors file in the original SDXL layout, for ComfyUI and web interfaces.
    SingleFile,
    /// A folder for `StableDiffusionXLPipeline.from_pretrained`.
    Diffusers,
}

pub(crate) fn export(args: &ExportArgs) -> anyhow::Result<Answer> {
    let mut bundle = open(&args.model)?;
    bundle.parameterization = args.parameterization.or(bundle.parameterization);
    let card = ModelCard::of(&args.model, bundle.parameterization, args.shift)?;
    let options = ExportOptions {
        kind: Some(args.dtype.into()),
        sampling_shift: args.shift,
        title: card.title.clone(),
        description: card.description(),
        ..ExportOptions::default()
    };
    match args.format {
        Format::SingleFile => {
            if args.out.is_dir() {
                let out = args.out.display();
                return Err(Misuse(format!(
                    "{out} is a folder: name a file, such as model.safetensors"
                ))
                .into());
            }
            export_single_file(&bundle, &args.out, &options)?;
            write_card_beside(&args.out, &card)?;
            write_workflow_beside(&args.out, &bundle, args.shift)?;
        }
        Format::Diffusers => {
            export_diffusers(&bundle, &args.out, &with_attachments(options, &card))?
        }
    }
    Ok(written(&bundle, &args.out))
}

pub(crate) fn import(args: &ImportArgs) -> anyhow::Result<Answer> {
    let mut bundle = Bundle::open_single_file(&args.file, args.missing_from.as_deref())?;
    warn(&bundle);
    bundle.parameterization = args.parameterization.or(bundle.parameterization);
    let options = ExportOptions::default();
    let card = ModelCard::of(&args.file, bundle.parameterization, options.sampling_shift)?;
    let options = ExportOptions {
        title: card.title.clone(),
        description: card.description(),
        ..options
    };
    export_diffusers(&bundle, &args.out, &with_attachments(options, &card))?;
    Ok(written(&bundle, &args.out))
}

fn warn(bundle: &Bundle<'_>) {
    for note in &bundle.notes {
        tracing::warn!("{note}");
    }
}

fn written(bundle: &Bundle<'_>, out: &Path) -> Answer {
    let predicts = bundle
        .parameterization
        .map(|parameterization| parameterization.to_string());
    let json = json!({ "out": out, "parameterization": predicts, "read_as": dtypes(bundle), "notes": bundle.notes });
    Answer::done(out.display().to_string(), json)
}

/// The dtypes that each component's tensors were stored in.
fn dtypes(bundle: &Bundle<'_>) -> BTreeMap<&'static str, Vec<String>> {
    let of = |component: Component| {
        let names = bundle.names(component);
        let mut kinds: Vec<String> = names
            .iter()
            .filter_map(|name| bundle.kind(component, name))
            .map(dtype::name)
            .collect();
        kinds.sort();
        kinds.dedup();
        (component.folder(), kinds)
    };
    Component::ALL.map(of).into_iter().collect()
}

/// A ComfyUI workflow that draws with the file, `NAME.workflow.json`: open it on ComfyUI's page.
fn write_workflow_beside(file: &Path, bundle: &Bundle<'_>, shift: f64) -> anyhow::Result<()> {
    let Some(parameterization) = bundle.parameterization else {
        return Ok(());
    };
    let settings = SampleSettings {
        shift,
        ..SampleSettings::default()
    };
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let model = name.strip_suffix(".safetensors").unwrap_or(&name);
    let drawing = Drawing {
        settings: &settings,
        parameterization,
        prompt: "",
        negative: "",
        model,
    };
    let workflow = Workflow::new(&drawing, &name).workflow();
    let path = file.with_extension("workflow.json");
    Ok(write_bytes(&path, ascii_json(&workflow).as_bytes())?)
}

/// Writes `NAME.md` and, if the run has a picture, `NAME.png`, which many programs show beside
/// `NAME.safetensors`.
fn write_card_beside(out: &Path, card: &ModelCard) -> anyhow::Result<()> {
    let picture = out.with_extension("png");
    let name = picture
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    write_bytes(&out.with_extension("md"), card.markdown(&name).as_bytes())?;
    if let Some(pixels) = &card.samples {
        write_bytes(&picture, pixels)?;
    }
    Ok(())
}

/// Both tokenizers, the model card and its picture.
fn with_attachments(options: ExportOptions, card: &ModelCard) -> ExportOptions {
    let files = |folder: &'static str, which| {
        let file = move |(name, bytes): (&str, Vec<u8>)| Attachment {
            path: Path::new(folder).join(name),
            bytes,
        };
        tokenizer_files(which).into_iter().map(file)
    };
    let mut attachments: Vec<Attachment> = files("tokenizer", Clip::L)
        .chain(files("tokenizer_2", Clip::G))
        .collect();
    attachments.push(Attachment {
        path: "README.md".into(),
        bytes: (card.front_matter() + &card.markdown(PICTURE)).into_bytes(),
    });
    attachments.extend(card.samples.clone().map(|bytes| Attachment {
        path: PICTURE.into(),
        bytes,
    }));
    ExportOptions {
        attachments,
        ..options
    }
}

/// The picture of the model card in a diffusers folder.
const PICTURE: &str = "samples.png";

/// Opens a model of any layout without loading it.
fn open(path: &Path) -> anyhow::Result<Bundle<'static>> {
    if path.is_file() {
        let bundle = Bundle::open_single_file(path, None)?;
        warn(&bundle);
        return Ok(bundle);
    }
    let components = Components::find(path)?;
    let predicts = model::parameterization(path)?;
    Ok(Bundle::open_folders(
        |component| components.folder(component).to_owned(),
        predicts,
    )?)
}
