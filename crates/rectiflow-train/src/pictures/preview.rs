//! Pictures sampled during training: the same prompts and noise each time, so that progress is
//! visible.

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
    slice::from_ref,
};

use rectiflow_data::{contact_sheet::ContactSheet, picture::Picture, token::Tokenizer};
use rectiflow_sdxl::{
    cond::Cond,
    error::Error as ModelError,
    guidance::Guided,
    model::Model,
    sample::{SampleSettings, Texts, decode, sample_latents_by},
    write::write_to,
};
use tch::{Device, Kind, Tensor};

use crate::{
    error::{Error, Result},
    pictures::generate::{condition, pictures},
    ranks::comm::Comm,
    recipe::{Checked, sections::PreviewConfig},
    state::{layout::narrow, partition::Partition},
};

/// Samples a run's preview pictures.
#[derive(Debug)]
pub(crate) struct Previewer {
    config: PreviewConfig,
    folder: PathBuf,
}

impl Previewer {
    pub(crate) fn new(config: &PreviewConfig, run_dir: &Path) -> Self {
        Self {
            config: config.clone(),
            folder: run_dir.join("previews"),
        }
    }

    /// Samples all prompts as a row of pictures in one file and returns its name, or `None` if
    /// there are no prompts.
    pub(crate) fn draw(
        &self,
        model: &Model,
        checked: &Checked,
        step: u64,
        comm: &Comm,
    ) -> Result<Option<String>> {
        if self.config.prompts.is_empty() {
            return Ok(None);
        }
        let name = format!("step-{step:08}.png");
        let pictures = self.pictures(model, checked, comm)?;
        comm.first(|| self.write(&pictures, &name, step))?;
        Ok(Some(name))
    }

    /// Writes pictures as a row in one file.
    fn write(&self, pictures: &[Picture], name: &str, step: u64) -> Result<()> {
        fs::create_dir_all(&self.folder).map_err(Error::io(&self.folder))?;
        let prompts = &self.config.prompts;
        let grid = ContactSheet {
            row_labels: &[],
            column_labels: prompts,
            columns: prompts.len(),
            pictures,
        };
        let path = self.folder.join(name);
        let title = format!("step {step}");
        Ok(grid.draw().write_png(&path, &[("Title", &title)])?)
    }

    /// Returns the pictures of all prompts, on all ranks. Each rank runs the UNet on its rows of
    /// the batch and decodes them; the noise and the sampler's arithmetic are those of the whole
    /// batch on every rank, so that the pictures do not depend on the number of ranks.
    fn pictures(&self, model: &Model, checked: &Checked, comm: &Comm) -> Result<Vec<Picture>> {
        let count = self.config.prompts.len() as i64;
        let rows = Partition::new(count, comm.rank().ranks).buckets()[0].of(comm.rank().rank);
        let latents = self.latents(model, checked, &rows, comm)?;
        let height = i64::from(self.config.sample.height_px);
        let width = i64::from(self.config.sample.width_px);
        let pixels = Tensor::zeros([count, height, width, 3], (Kind::Uint8, checked.device));
        if !rows.is_empty() {
            let own = decode(&model.vae, &narrow(&latents, &rows))?;
            write_to(&narrow(&pixels, &rows), &own);
        }
        gather_rows(comm, &pixels)?;
        Ok(pictures(&pixels.to_device(Device::Cpu)))
    }

    /// Returns the latents of all prompts, of which this rank denoises `rows`.
    fn latents(
        &self,
        model: &Model,
        checked: &Checked,
        rows: &Range<i64>,
        comm: &Comm,
    ) -> Result<Tensor> {
        let config = &self.config;
        let parameterization = checked.recipe.objective.parameterization;
        let settings = SampleSettings {
            batch: config.prompts.len(),
            ..config.sample.clone()
        };

        // This rank's denoiser; `None` if there are more ranks than pictures.
        let tokenizer = Tokenizer::new();
        let cond = rows_of(&condition(model, &tokenizer, &config.prompts)?, rows);
        let uncond = condition(model, &tokenizer, from_ref(&config.negative))?;
        let texts = Texts {
            cond: &cond,
            uncond: &uncond,
        };
        let own = SampleSettings {
            batch: (rows.end - rows.start) as usize,
            ..settings.clone()
        };
        let time_ids = own.time_ids();
        let guidance = settings.guidance();
        let guided = if rows.is_empty() {
            None
        } else {
            let unet = &model.unet;
            Some(Guided::new(
                unet,
                parameterization,
                texts,
                &time_ids,
                &guidance,
            )?)
        };

        // A sampler can only return the model's errors, so that others are kept aside.
        let share = Share { guided, rows, comm };
        let mut failed = None;
        let mut denoise = |x: &Tensor, sigma: f64| match share.denoise(x, sigma) {
            Ok(denoised) => Ok(denoised),
            Err(Error::Model(error)) => Err(error),
            Err(error) => {
                failed = Some(error);
                let found = "a failed collective";
                Err(ModelError::input("previews", "all ranks", found))
            }
        };
        let place = (&model.vae.config, parameterization, model.unet.device());
        let latents = sample_latents_by(&mut denoise, place, &settings, &mut |_| {});
        match failed {
            Some(error) => Err(error),
            None => Ok(latents?),
        }
    }
}

/// A rank's share of the denoising.
struct Share<'a> {
    /// The denoiser of the rank's rows, if it has any.
    guided: Option<Guided<'a>>,
    rows: &'a Range<i64>,
    comm: &'a Comm,
}

impl Share<'_> {
    /// Returns the denoised `x`, of which each rank computes its rows.
    fn denoise(&self, x: &Tensor, sigma: f64) -> Result<Tensor> {
        let whole = x.zeros_like();
        if let Some(guided) = &self.guided {
            let denoised = guided.denoise(&narrow(x, self.rows), sigma)?;
            write_to(&narrow(&whole, self.rows), &denoised);
        }
        gather_rows(self.comm, &whole)?;
        Ok(whole)
    }
}

/// Gathers the rows of a tensor `[b, ...]` that other ranks have computed, in equal parts of the
/// batch.
fn gather_rows(comm: &Comm, tensor: &Tensor) -> Result<()> {
    let (rows, width) = (tensor.size()[0], tensor.get(0).numel() as i64);
    comm.all_gather(
        &tensor.view([-1]),
        &Partition::of_rows(rows, width, comm.rank().ranks),
    )
}

/// Returns some rows of a conditioning.
fn rows_of(cond: &Cond, rows: &Range<i64>) -> Cond {
    let cut = |tensor: &Tensor| narrow(tensor, rows);
    Cond {
        context: cut(&cond.context),
        context_mask: cond.context_mask.as_ref().map(cut),
        pooled: cut(&cond.pooled),
    }
}
