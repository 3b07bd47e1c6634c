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
    drawing::{Drawing, DrawnText},
    durable::write_bytes,
    export::{Attachment, ExportOptions, export_diffusers, export_single_file},
    flow::Parameterization,
    model::{Component, scheduler},
    sample::SampleSettings,
    workflow::{Workflow, ascii_json},
};
use rectiflow_train::{bases::Bases, checkpoint::found::Found, components::Components};
use serde_json::json;
use tch::Kind;

use crate::{
    model_card::{ModelCard, Source},
    picture_texts::ModelNames,
    terminal::{
        answer::{Answer, Misuse},
        base::BaseArg,
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
    #[command(flatten)]
    base: BaseArg,
    /// Which layout to write.
    #[arg(long, value_enum)]
    format: Format,
    /// The file or folder to write; an earlier export there is replaced.
    #[arg(long)]
    out: PathBuf,
    /// Dtype of the numbers in the file; fp16 and bf16 halve its size.
    #[arg(long, value_enum, default_value_t = FileDtype::Fp16)]
    dtype: FileDtype,
    /// Shift that a flow model is sampled with: by the diffusers scheduler, by ComfyUI's loader
    /// node of this project. Default: the shift of the model's own scheduler or header, if it has
    /// one, otherwise 6.
    #[arg(long, allow_negative_numbers = true)]
    shift: Option<f64>,
    /// What the model predicts (flow, eps, v or v_ztsnr), if its metadata and its scheduler do not
    /// say so, or say something else.
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
    /// What the model predicts (flow, eps, v or v_ztsnr), if the file does not say so, or says
    /// something else.
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
    let out = match args.format {
        Format::SingleFile => single_file_name(&args.out)?,
        Format::Diffusers => args.out.clone(),
    };
    let (mut bundle, checkpoint) = open(&args.model, &args.base.bases())?;
    settle(&mut bundle, args.parameterization)?;
    let of_scheduler = bundle.scheduler.as_ref().and_then(|read| read.flow_shift);
    let own_shift = of_scheduler.or(bundle.prediction.shift);
    let shift = args
        .shift
        .or(own_shift)
        .unwrap_or(ExportOptions::default().sampling_shift);
    let source = Source {
        path: &args.model,
        checkpoint: checkpoint.as_ref(),
    };
    let card = ModelCard::of(source, bundle.parameterization, shift);
    let options = ExportOptions {
        kind: Some(args.dtype.into()),
        sampling_shift: shift,
        title: card.title.clone(),
        description: card.description(),
        ..ExportOptions::default()
    };
    match args.format {
        Format::SingleFile => {
            export_single_file(&bundle, &out, &options)?;
            keep_on("the model card", write_card_beside(&out, &card));
            keep_on("the workflow", write_workflow_beside(&out, &bundle, shift));
        }
        Format::Diffusers => export_diffusers(&bundle, &out, &with_attachments(options, &card))?,
    }
    Ok(written(&bundle, &out))
}

pub(crate) fn import(args: &ImportArgs) -> anyhow::Result<Answer> {
    if args.file.is_dir() {
        return Err(Misuse(format!(
            "{} is a folder, not a single-file checkpoint: pass it to `rectiflow export`, or use \
             it as it is",
            args.file.display()
        ))
        .into());
    }
    let mut bundle = Bundle::open_single_file(&args.file, args.missing_from.as_deref())?;
    settle(&mut bundle, args.parameterization)?;
    let options = ExportOptions::default();
    let source = Source {
        path: &args.file,
        checkpoint: None,
    };
    let shift = bundle.prediction.shift.unwrap_or(options.sampling_shift);
    let card = ModelCard::of(source, bundle.parameterization, shift);
    let options = ExportOptions {
        sampling_shift: shift,
        title: card.title.clone(),
        description: card.description(),
        ..options
    };
    export_diffusers(&bundle, &args.out, &with_attachments(options, &card))?;
    Ok(written(&bundle, &args.out))
}

/// Decides what the model predicts, and says what the source was taken for and what else a user
/// should know about it.
fn settle(bundle: &mut Bundle<'_>, argument: Option<Parameterization>) -> anyhow::Result<()> {
    bundle.parameterization = bundle.prediction.settled(argument)?;
    for note in &bundle.notes {
        tracing::warn!("{note}");
    }
    if let (None, Some(line)) = (argument, bundle.prediction.line()) {
        tracing::info!("{line}");
        bundle.notes.push(line);
    }
    Ok(())
}

/// Returns the name of a single file: with the ending by which other programs find it.
fn single_file_name(out: &Path) -> anyhow::Result<PathBuf> {
    const ENDINGS: [&str; 2] = ["safetensors", "sft"];
    const OTHERS: [&str; 8] = ["ckpt", "pt", "pth", "bin", "pkl", "gguf", "onnx", "zip"];
    let shown = out.display();
    let is_folder = out.is_dir() || out.as_os_str().to_string_lossy().ends_with(['/', '\\']);
    if is_folder || out.file_name().is_none() {
        return Err(Misuse(format!(
            "{shown} is a folder: name a file, such as model.safetensors"
        ))
        .into());
    }
    let ending = out.extension().unwrap_or_default().to_string_lossy();
    let ending = ending.to_ascii_lowercase();
    if ENDINGS.contains(&ending.as_str()) {
        return Ok(out.to_owned());
    }
    if OTHERS.contains(&ending.as_str()) {
        let better = out.with_extension(ENDINGS[0]);
        return Err(Misuse(format!(
            "{shown} would hold safetensors, and programs would read it as .{ending}: name it {}",
            better.display()
        ))
        .into());
    }
    let mut name = out.as_os_str().to_owned();
    name.push(".");
    name.push(ENDINGS[0]);
    let named = PathBuf::from(name);
    tracing::warn!("written as {}, so that programs list it", named.display());
    Ok(named)
}

/// Warns that a file beside the model was not written; the model is.
fn keep_on(what: &str, written: anyhow::Result<()>) {
    if let Err(error) = written {
        tracing::warn!("{what} is not written: {error:#}");
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
    let names = ModelNames::of(file);
    let drawing = Drawing {
        settings: &settings,
        parameterization,
        prompt: DrawnText::default(),
        negative: DrawnText::default(),
        model: &names.name,
        file: names.file.as_deref(),
        computed_in: Kind::Float,
    };
    let workflow = Workflow::new(&drawing).workflow();
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

/// Opens a model of any layout without loading it. Also returns the checkpoint that it is.
fn open(path: &Path, bases: &Bases) -> anyhow::Result<(Bundle<'static>, Option<Found>)> {
    if path.is_file() {
        return Ok((Bundle::open_single_file(path, None)?, None));
    }
    let components = Components::find(path, bases)?;
    let prediction = components.prediction()?;
    let folder = |component| components.folder(component).to_owned();
    let mut bundle = Bundle::open_folders(folder, prediction.parameterization)?;
    bundle.scheduler = scheduler(path)?;
    bundle.prediction = prediction;
    Ok((bundle, components.checkpoint().cloned()))
}
