//! One forward pass from tensors in a file to tensors in a file, to compare with other
//! implementations.
//!
//! | pass | input | output |
//! |---|---|---|
//! | unet | `sample`, `timestep`, `encoder_hidden_states`, `text_embeds`, `time_ids` | `sample` |
//! | clip-l, clip-g | `input_ids` | `hidden` (penultimate states), `pooled` |
//! | vae-encode | `pixels` in -1 to 1 | `mean`, `logvar` |
//! | vae-decode | `latents` | `pixels` |
//!
//! ```text
//! sample, latents         [b, 4, h, w]
//! timestep                [b] or a single number
//! encoder_hidden_states   [b, n, 2048]
//! text_embeds             [b, 1280]
//! time_ids                [b, 6]
//! input_ids               [b, n]
//! pixels                  [b, 3, h, w]
//! ```
//!
//! No scaling factor is applied. Results are in the model's dtype.

use std::path::Path;

use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result},
    files::model::OpenOptions,
    nets::{
        clip::ClipText,
        unet::{UNet, UNetInput},
        vae::Vae,
    },
    weights::{
        component::Component,
        tensor_file::{TensorFile, write_tensors},
    },
};

/// A forward pass of one component.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Noisy latents to velocity, noise or v.
    UNet,
    /// Token ids to CLIP-L's states.
    ClipL,
    /// Token ids to bigG's states.
    ClipG,
    /// Pictures to the posterior of their latents.
    VaeEncode,
    /// Latents to pictures.
    VaeDecode,
}

/// Opens the component of `model` that `pass` needs, runs it on the tensors of `input` and writes
/// `output`. Returns the names and shapes written.
///
/// # Errors
/// An error if the model or the input is unusable; [`Error::Io`] if the output cannot be written.
pub fn forward(
    pass: Pass,
    model: &Path,
    input: &TensorFile,
    output: &Path,
    options: &OpenOptions,
) -> Result<Vec<(&'static str, Vec<i64>)>> {
    let results = tch::no_grad(|| results(pass, model, input, options))?;
    let named = results.iter().map(|(name, tensor)| (*name, tensor));
    write_tensors(output, named, None, &[("format", "pt")])?;
    let mut shapes = Vec::new();
    for (name, tensor) in results {
        shapes.push((name, tensor.size()));
    }
    Ok(shapes)
}

type Named = Vec<(&'static str, Tensor)>;

fn results(pass: Pass, model: &Path, input: &TensorFile, options: &OpenOptions) -> Result<Named> {
    match pass {
        Pass::UNet => unet(model, input, options),
        Pass::ClipL => clip(model, Component::ClipL, input, options),
        Pass::ClipG => clip(model, Component::ClipG, input, options),
        Pass::VaeEncode => {
            let (mean, logvar) = Vae::open(model, options)?.encode(&input.tensor("pixels")?)?;
            Ok(vec![("mean", mean), ("logvar", logvar)])
        }
        Pass::VaeDecode => {
            let pixels = Vae::open(model, options)?.decode(&input.tensor("latents")?)?;
            Ok(vec![("pixels", pixels)])
        }
    }
}

fn unet(model: &Path, input: &TensorFile, options: &OpenOptions) -> Result<Named> {
    let sample = input.tensor("sample")?;
    let batch = sample.size().first().copied().unwrap_or(0);
    let mut timestep = input.tensor("timestep")?;
    if timestep.numel() == 1 {
        // A single timestep applies to the whole batch, as in diffusers.
        timestep = timestep.reshape([1]).expand([batch], false);
    }
    let context = input.tensor("encoder_hidden_states")?;
    let text_embeds = input.tensor("text_embeds")?;
    let time_ids = input.tensor("time_ids")?;
    let given = UNetInput {
        sample: &sample,
        timestep: &timestep,
        context: &context,
        context_mask: None,
        text_embeds: &text_embeds,
        time_ids: &time_ids,
    };
    let output = UNet::open(model, options)?.forward(&given)?;
    Ok(vec![("sample", output)])
}

fn clip(
    model: &Path,
    which: Component,
    input: &TensorFile,
    options: &OpenOptions,
) -> Result<Named> {
    let ids = input.tensor("input_ids")?;
    if ids.is_floating_point() || ids.kind() == Kind::Bool {
        return Err(Error::input(
            "input_ids",
            "an integer dtype",
            format!("{:?}", ids.kind()),
        ));
    }
    let output = ClipText::open(model, which, options)?.forward(&ids.to_kind(Kind::Int64))?;
    Ok(vec![("hidden", output.hidden), ("pooled", output.pooled)])
}
