//! `rectiflow export` and `rectiflow import`: models for other tools, and models from them.
//!
//! Both read any layout as a bundle of tensors and write another; which layout a path is in is told by what is there.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use rectiflow_data::token::{Clip, tokenizer_files};
use rectiflow_sdxl::{
    bundle::Bundle,
    export::{ExportOptions, TokenizerFile, export_diffusers, export_single_file},
    flow::Parameterization,
};
use rectiflow_train::{checkpoint, model};
use serde_json::json;
use tch::Kind;

use crate::answer::Answer;

/// Write a model for other tools: one file for ComfyUI, or a folder for diffusers.
///
/// A diffusers folder has both tokenizers, and a scheduler that samples it as it was trained: nothing has to be fetched
/// to use it. In ComfyUI put a ModelSamplingSD3 node (shift 3 to 6) behind the loader of a flow model.
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
    /// Numbers in the file; fp16 and bf16 halve its size.
    #[arg(long, value_enum, default_value_t = Dtype::Fp16)]
    dtype: Dtype,
    /// Shift that the diffusers scheduler samples a flow model with.
    #[arg(long, default_value_t = 6.0, allow_negative_numbers = true)]
    shift: f64,
    /// What the model predicts (flow, eps or v), where neither its metadata nor its scheduler says.
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
    /// What the model predicts (flow, eps or v), where the file does not say.
    #[arg(long)]
    parameterization: Option<Parameterization>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// One safetensors file in the original SDXL layout, for ComfyUI and web interfaces.
    SingleFile,
    /// A folder for `StableDiffusionXLPipeline.from_pretrained`.
    Diffusers,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Dtype {
    Fp32,
    Fp16,
    Bf16,
}

impl From<Dtype> for Kind {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Fp32 => Self::Float,
            Dtype::Fp16 => Self::Half,
            Dtype::Bf16 => Self::BFloat16,
        }
    }
}

pub(crate) fn export(args: &ExportArgs) -> anyhow::Result<Answer> {
    let mut bundle = open(&args.model)?;
    bundle.parameterization = args.parameterization.or(bundle.parameterization);
    let options = ExportOptions {
        kind: Some(args.dtype.into()),
        sampling_shift: args.shift,
        title: title(&args.model),
        ..options()
    };
    match args.format {
        Format::SingleFile => export_single_file(&bundle, &args.out, &options)?,
        Format::Diffusers => export_diffusers(&bundle, &args.out, &options)?,
    }
    Ok(written(&bundle, &args.out))
}

pub(crate) fn import(args: &ImportArgs) -> anyhow::Result<Answer> {
    let mut bundle = Bundle::open_single_file(&args.file)?;
    bundle.parameterization = args.parameterization.or(bundle.parameterization);
    if !bundle.ignored.is_empty() {
        tracing::warn!("{} tensors belong to no part of SDXL and are left out", bundle.ignored.len());
    }
    export_diffusers(&bundle, &args.out, &ExportOptions { title: title(&args.file), ..options() })?;
    Ok(written(&bundle, &args.out))
}

fn written(bundle: &Bundle<'_>, out: &Path) -> Answer {
    let predicts = bundle.parameterization.map(|parameterization| parameterization.to_string());
    Answer::done(out.display().to_string(), json!({ "out": out, "parameterization": predicts }))
}

/// Opens a model of any layout without loading it.
fn open(path: &Path) -> anyhow::Result<Bundle<'static>> {
    if path.is_file() {
        return Ok(Bundle::open_single_file(path)?);
    }
    let predicts = match model::objective(path)? {
        Some(objective) => Some(objective.parameterization),
        None => rectiflow_sdxl::model::parameterization(path)?,
    };
    let components = checkpoint::Components::find(path)?;
    Ok(Bundle::open_folders(|component| components.folder(component).to_owned(), predicts)?)
}

fn options() -> ExportOptions {
    let files = |folder, which| {
        tokenizer_files(which).into_iter().map(move |(name, bytes)| TokenizerFile {
            folder,
            name: name.to_owned(),
            bytes,
        })
    };
    let tokenizers = files("tokenizer", Clip::L).chain(files("tokenizer_2", Clip::G)).collect();
    ExportOptions { tokenizers, ..ExportOptions::default() }
}

/// A name for the model: its file or folder, and for a checkpoint its run as well.
fn title(path: &Path) -> String {
    let names: Vec<String> = path
        .components()
        .map(|part| part.as_os_str().to_string_lossy().into_owned())
        .filter(|name| name != "checkpoints" && name != "." && name != "..")
        .collect();
    let wanted = if checkpoint::is_checkpoint(path) { 2 } else { 1 };
    names[names.len().saturating_sub(wanted)..].join(" ")
}
