//! Many pictures with one model: batches side by side, where the processor has cores for it.

use rectiflow_data::picture::Picture;
use rectiflow_sdxl::{flow::Parameterization, model::Model, sample::SampleSettings};

use crate::{
    error::Result,
    pictures::draw::draw,
    state::workers::{Shared, Workers},
};

/// Pictures that are drawn together from one noise.
#[derive(Debug, Clone)]
pub struct Batch {
    /// One a picture.
    pub prompts: Vec<String>,
    /// How they are sampled; `batch` is the number of prompts.
    pub settings: SampleSettings,
}

/// Draws all batches; `progress` is told the number of pictures whenever a batch is done. What is drawn does not depend
/// on how many batches are worked on at a time.
///
/// # Errors
/// [`crate::error::Error::Model`]: settings that cannot work, or libtorch failing.
pub fn draw_all(
    model: &Model,
    parameterization: Parameterization,
    batches: &[Batch],
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Vec<Vec<Picture>>> {
    let workers = Workers::new(model.unet.device(), batches.len());
    // SAFETY: sampling reads the model's tensors and writes its own.
    let shared = unsafe { Shared::new(model) };
    let draw_one = |Batch { prompts, settings }: &Batch| {
        let pictures = draw(shared.get(), parameterization, prompts, "", settings, &mut |_| {});
        progress(prompts.len());
        pictures
    };
    workers.map(batches, draw_one).into_iter().collect()
}
