//! Sampling settings, their defaults and limits.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    config::vae::VaeConfig,
    error::{Error, Result},
    flow::Parameterization,
    nets::unet::UNetPart,
    sample::{
        guidance::Guidance,
        sampler::Sampler,
        schedule::{MAX_STEPS, NoiseLevels, Schedule},
    },
};

/// The longest side of a picture, as in ComfyUI.
const MAX_SIDE_PX: u32 = 16384;
/// The largest number of pictures in a batch, as in ComfyUI.
const MAX_BATCH: usize = 4096;

/// Sampling settings, apart from the texts. Defaults are the article's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SampleSettings {
    /// Number of steps, 1 to 1000. Beyond 28, Euler on a flow model improves little.
    pub steps: usize,
    /// The sampler; `docs/samplers.md` compares them.
    pub sampler: Sampler,
    /// The schedule of noise levels.
    pub schedule: Schedule,
    /// Shift of a flow model's noise levels; 3 to 6 is useful. Ignored for eps and v.
    pub shift: f64,
    /// Scale of classifier-free guidance; 1 turns it off.
    pub cfg: f64,
    /// Share of CFG's result that is rescaled to the spread of the prompt's prediction, against
    /// excessive contrast; 0 (none) to 1 (all).
    pub cfg_rescale: f64,
    /// Scale of perturbed-attention guidance, which costs one more pass per step; 0 turns it off. 3
    /// works well with a `cfg` of 3.
    pub pag_scale: f64,
    /// Where attention is perturbed: `mid` as in ComfyUI, or `down.N` and `up.N` with the number of
    /// a level.
    #[schemars(with = "Vec<String>")]
    pub pag_parts: Vec<UNetPart>,
    /// Seed of the noise, as in ComfyUI.
    pub seed: u64,
    /// Width of the pictures in pixels, a multiple of the VAE's factor (8).
    pub width_px: u32,
    /// Height of the pictures in pixels, a multiple of the VAE's factor (8).
    pub height_px: u32,
    /// Number of pictures. Their noise is one draw, so picture 2 of a batch is not picture 1 of the
    /// next seed.
    pub batch: usize,
    /// Size conditioning; by default the picture's own size, uncropped.
    pub size: Option<SizeConditioning>,
}

impl Default for SampleSettings {
    fn default() -> Self {
        let Guidance {
            cfg,
            cfg_rescale,
            pag_scale,
            pag_parts,
        } = Guidance::default();
        Self {
            steps: 28,
            sampler: Sampler::default(),
            schedule: Schedule::default(),
            // The article trained with 3 and found 6 best for sampling.
            shift: 6.0,
            cfg,
            cfg_rescale,
            pag_scale,
            pag_parts,
            seed: 0,
            width_px: 1024,
            height_px: 1024,
            batch: 1,
            size: None,
        }
    }
}

/// SDXL's six size values, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SizeConditioning {
    /// Width of the picture before it was cropped and resized.
    pub original_width_px: u32,
    /// Height of the picture before it was cropped and resized.
    pub original_height_px: u32,
    /// Columns cut off at the left.
    #[serde(default)]
    pub crop_left_px: u32,
    /// Rows cut off at the top.
    #[serde(default)]
    pub crop_top_px: u32,
    /// Width of the picture.
    pub target_width_px: u32,
    /// Height of the picture.
    pub target_height_px: u32,
}

impl SampleSettings {
    /// Checks the settings that do not depend on the model; [`Self::latent_shape`] checks the
    /// others.
    ///
    /// # Errors
    /// [`Error::Invalid`] with every problem of the settings.
    pub fn check(&self) -> Result<()> {
        let problems = self.problems();
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Error::invalid("sampling", &problems))
        }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !(1..=MAX_STEPS).contains(&self.steps) {
            problems.push(format!(
                "steps is {}, expected 1 to {MAX_STEPS}",
                self.steps
            ));
        }
        if !(1..=MAX_BATCH).contains(&self.batch) {
            problems.push(format!(
                "batch is {}, expected 1 to {MAX_BATCH}",
                self.batch
            ));
        }
        problems.extend(self.guidance().problems());
        problems
    }

    /// Returns the shape of the latents, `[batch, 4, height / 8, width / 8]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] with every problem of the settings.
    pub fn latent_shape(&self, vae: &VaeConfig) -> Result<[i64; 4]> {
        let factor = vae.down_factor();
        let mut problems = Vec::new();
        problems.extend(side_problem("width_px", self.width_px, factor));
        problems.extend(side_problem("height_px", self.height_px, factor));
        problems.extend(self.problems());
        if !problems.is_empty() {
            return Err(Error::invalid("sampling", &problems));
        }
        let side = |px: u32| i64::from(px / factor);
        Ok([
            self.batch as i64,
            vae.latent_channels,
            side(self.height_px),
            side(self.width_px),
        ])
    }

    /// Returns the noise levels to visit, ending in 0, for a model of this parameterization.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the number of steps or the shift is out of range.
    pub fn sigmas(&self, parameterization: Parameterization) -> Result<Vec<f64>> {
        self.sampler.sigmas(
            self.schedule,
            self.steps,
            &NoiseLevels::new(parameterization, self.shift)?,
        )
    }

    /// Returns the guidance part of the settings.
    pub fn guidance(&self) -> Guidance {
        Guidance {
            cfg: self.cfg,
            cfg_rescale: self.cfg_rescale,
            pag_scale: self.pag_scale,
            pag_parts: self.pag_parts.clone(),
        }
    }

    /// Returns the size values in the UNet's order. `[batch, 6]` fp32 on the CPU
    pub fn time_ids(&self) -> Tensor {
        let size = self.size.unwrap_or(SizeConditioning {
            original_width_px: self.width_px,
            original_height_px: self.height_px,
            crop_left_px: 0,
            crop_top_px: 0,
            target_width_px: self.width_px,
            target_height_px: self.height_px,
        });
        let ids = [
            size.original_height_px,
            size.original_width_px,
            size.crop_top_px,
            size.crop_left_px,
            size.target_height_px,
            size.target_width_px,
        ];
        Tensor::from_slice(&ids.map(|px| px as f32)).repeat([self.batch as i64, 1])
    }
}

/// Returns what is wrong with a side of the pictures; the VAE makes one latent of `factor` pixels.
fn side_problem(name: &str, value: u32, factor: u32) -> Option<String> {
    if value > MAX_SIDE_PX {
        return Some(format!("{name} is {value}, expected at most {MAX_SIDE_PX}"));
    }
    if value > 0 && value.is_multiple_of(factor) {
        return None;
    }
    let above = value.max(1).next_multiple_of(factor);
    Some(format!(
        "{name} is {value}, expected a multiple of {factor} such as {above}"
    ))
}
