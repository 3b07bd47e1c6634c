//! Prompts to pictures with a whole model: the tokenizer (`data`) and the sampler (`sdxl`) meet
//! here.

use rectiflow_data::{
    picture::Picture,
    token::{CHUNK_LEN, Clip, TokenChunks, Tokenizer, empty_chunk},
};
use rectiflow_sdxl::{
    clip::ClipText,
    cond::{self, ChunkedIds, Cond},
    flow::Parameterization,
    model::Model,
    sample::{Progress, SampleSettings, Texts, decode, sample_latents},
};
use tch::{Tensor, no_grad};

use crate::{error::Result, state::workers::Workers};

/// Returns the conditioning of `prompts` by a model's text encoders, one row each.
///
/// # Errors
/// [`crate::error::Error::Model`].
pub fn condition(model: &Model, tokenizer: &Tokenizer, prompts: &[String]) -> Result<Cond> {
    encode_texts(&model.clip_l, &model.clip_g, tokenizer, prompts)
}

/// Returns the conditioning of `prompts` by both text encoders, one row each.
///
/// # Errors
/// [`crate::error::Error::Model`].
pub fn encode_texts(
    encoder_l: &ClipText,
    encoder_g: &ClipText,
    tokenizer: &Tokenizer,
    prompts: &[String],
) -> Result<Cond> {
    let mut chunks = Vec::with_capacity(prompts.len());
    let mut num_chunks = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let prompt_chunks = tokenizer.chunks(prompt);
        num_chunks.push(prompt_chunks.clip_l.len() as u32);
        chunks.push(prompt_chunks);
    }
    let most = num_chunks.iter().copied().max().unwrap_or(1) as usize;
    let device = encoder_g.device();
    let clip_l = token_ids(&chunks, most, Clip::L).to_device(device);
    let clip_g = token_ids(&chunks, most, Clip::G).to_device(device);
    let ids = ChunkedIds {
        clip_l: &clip_l,
        clip_g: &clip_g,
        num_chunks: &num_chunks,
    };
    Ok(no_grad(|| cond::encode(encoder_l, encoder_g, ids))?)
}

/// Returns the token ids of an encoder for each prompt, `[b, most, 77]`, filled up with empty
/// chunks.
fn token_ids(prompts: &[TokenChunks], most: usize, which: Clip) -> Tensor {
    let padding = empty_chunk(which);
    let mut ids = Vec::with_capacity(prompts.len() * most * CHUNK_LEN);
    for prompt in prompts {
        let own = match which {
            Clip::L => &prompt.clip_l,
            Clip::G => &prompt.clip_g,
        };
        for chunk in 0..most {
            ids.extend_from_slice(own.get(chunk).unwrap_or(&padding));
        }
    }
    Tensor::from_slice(&ids).view([prompts.len() as i64, most as i64, CHUNK_LEN as i64])
}

/// Samples one picture per prompt, as one batch: `settings.batch` is replaced by the number of
/// prompts.
///
/// # Errors
/// [`crate::error::Error::Model`] for invalid settings, or if libtorch fails.
pub fn generate(
    model: &Model,
    parameterization: Parameterization,
    prompts: &[String],
    negative: &str,
    settings: &SampleSettings,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<Picture>> {
    let tokenizer = Tokenizer::new();
    let cond = condition(model, &tokenizer, prompts)?;
    let uncond = condition(model, &tokenizer, &[negative.to_owned()])?;
    let settings = SampleSettings {
        batch: prompts.len(),
        ..settings.clone()
    };
    let texts = Texts {
        cond: &cond,
        uncond: &uncond,
    };
    let latents = sample_latents(
        &model.unet,
        &model.vae.config,
        parameterization,
        texts,
        &settings,
        progress,
    )?;
    Ok(pictures(&decode(&model.vae, &latents)?))
}

/// Pictures that are sampled together from one noise tensor.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Prompts, one per picture.
    pub prompts: Vec<String>,
    /// Settings of the sampler; `batch` is ignored.
    pub settings: SampleSettings,
}

/// Samples all batches, in parallel if the processor has cores for it; `progress` is called with
/// the number of pictures of each completed batch. The pictures do not depend on how many batches
/// run at the same time.
///
/// # Errors
/// [`crate::error::Error::Model`] for invalid settings, or if libtorch fails.
pub fn generate_all(
    model: &Model,
    parameterization: Parameterization,
    batches: &[Batch],
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Vec<Vec<Picture>>> {
    let workers = Workers::new(model.unet.device(), batches.len());
    let one = |model: &Model, Batch { prompts, settings }: &Batch| {
        let pictures = generate(model, parameterization, prompts, "", settings, &mut |_| {});
        progress(prompts.len());
        pictures
    };
    workers
        .map_tensors(model, batches, one)
        .into_iter()
        .collect()
}

/// Converts `[b, h, w, 3]` u8 on the CPU, as [`decode`] returns it, to pictures.
///
/// # Panics
/// If the tensor has another shape, dtype or device.
pub fn pictures(pixels: &Tensor) -> Vec<Picture> {
    let size = pixels.size();
    let (height, width) = (size[1] as u32, size[2] as u32);
    let bytes =
        Vec::<u8>::try_from(pixels.flatten(0, -1)).expect("decoded pictures are bytes on the CPU");
    let length = 3 * width as usize * height as usize;
    bytes
        .chunks_exact(length)
        .map(|pixels| Picture::new(width, height, pixels.to_vec()))
        .collect()
}
