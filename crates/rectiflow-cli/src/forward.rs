//! `rectiflow forward`: one forward pass from tensors in a file, for checking against other
//! implementations.

use std::path::PathBuf;

use clap::ValueEnum;
use rectiflow_sdxl::{
    forward::{Pass, forward},
    model::{Component, OpenOptions},
    tensor_file::TensorFile,
};
use rectiflow_train::components::Components;
use serde_json::{Map, Value, json};

use crate::terminal::{answer::Answer, base::BaseArg, dtype::ComputeDtype};

/// Run one forward pass on tensors from a file, to compare a model with another implementation of
/// it.
///
/// Tensors are found by name; floating-point ones have any dtype. The unet takes `sample`,
/// `timestep`, `encoder_hidden_states`, `text_embeds` and `time_ids`, and returns `sample`. The
/// text encoders take `input_ids` and return `hidden` (penultimate states) and `pooled`. vae-encode
/// takes `pixels` in -1 to 1 and returns `mean` and `logvar`. vae-decode takes `latents` and
/// returns `pixels`. No scaling factor is applied.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which part of the model to run.
    #[arg(value_enum)]
    part: Part,
    /// A diffusers model folder, a single-file checkpoint, a training checkpoint, or the folder of
    /// this one part, with its config.json.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    base: BaseArg,
    /// Dtype of the calculation and of the results, whatever the files hold.
    #[arg(long, value_enum, default_value_t = ComputeDtype::Fp32)]
    dtype: ComputeDtype,
    /// The safetensors file with the input tensors.
    #[arg(long)]
    input: PathBuf,
    /// The safetensors file to write.
    #[arg(long)]
    output: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Part {
    Unet,
    ClipL,
    ClipG,
    VaeEncode,
    VaeDecode,
}

impl Part {
    fn component(self) -> Component {
        match self {
            Self::Unet => Component::UNet,
            Self::ClipL => Component::ClipL,
            Self::ClipG => Component::ClipG,
            Self::VaeEncode | Self::VaeDecode => Component::Vae,
        }
    }
}

impl From<Part> for Pass {
    fn from(part: Part) -> Self {
        match part {
            Part::Unet => Self::UNet,
            Part::ClipL => Self::ClipL,
            Part::ClipG => Self::ClipG,
            Part::VaeEncode => Self::VaeEncode,
            Part::VaeDecode => Self::VaeDecode,
        }
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let options = OpenOptions {
        kind: args.dtype.into(),
        ..OpenOptions::default()
    };
    let input = TensorFile::open(&args.input)?;
    let place = Components::find_one(args.part.component(), &args.model, &args.base.bases())?;
    let written = forward(args.part.into(), &place, &input, &args.output, &options)?;
    let output = args.output.display();
    let lines: Vec<String> = written
        .iter()
        .map(|(name, shape)| format!("{output}: {name} {shape:?}"))
        .collect();
    let shapes: Map<String, Value> = written
        .iter()
        .map(|(name, shape)| ((*name).to_owned(), json!(shape)))
        .collect();
    Ok(Answer::done(
        lines.join("\n"),
        json!({ "output": args.output, "tensors": shapes }),
    ))
}
