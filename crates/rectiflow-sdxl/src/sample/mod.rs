//! Settings and noise to pictures: what to draw, the whole way from noise to latents, decoding.
//!
//! Samplers ([`crate::sampler`]) are plain functions of (denoise, x, sigmas). `denoise` ([`crate::denoise`],
//! [`crate::guidance`]) answers the clean picture that a noisy one points to, whatever the model predicts, so that
//! samplers know nothing of parameterizations and guidance. Everything is ComfyUI's arithmetic in ComfyUI's order: the
//! same seed, schedule and weights give the same picture there. Where the noise comes from is in [`crate::noise`].
//!
//! Latents are the model's own (scaled) ones until [`decode`], which divides by the VAE's scaling factor.
//!
//! Not here: texts (the caller brings token ids through [`crate::cond`]) and picture files.

pub mod brownian;
pub mod denoise;
pub mod guidance;
pub mod infotext;
pub mod noise;
pub mod sampler;
pub mod schedule;
pub mod solvers;
pub mod stochastic;
pub mod unipc;
pub mod workflow;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

pub use crate::sample::{guidance::Texts, noise::initial_noise, solvers::Progress};
use crate::{
    config::vae::VaeConfig,
    error::{Error, Result},
    flow::Parameterization,
    nets::{
        unet::{UNet, UNetPart},
        vae::Vae,
    },
    sample::{
        denoise::{Denoise, noised_start},
        guidance::{Guidance, Guided},
        noise::f_initial_noise,
        sampler::{Course, Sampler},
        schedule::{MAX_STEPS, NoiseLevels, Schedule},
    },
};

/// The longest side of a picture, as ComfyUI's.
const MAX_SIDE_PX: u32 = 16384;
/// The largest number of pictures drawn together, as ComfyUI's.
const MAX_BATCH: usize = 4096;

/// What to draw, apart from the texts. Defaults are the article's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SampleSettings {
    /// Number of steps, 1 to 1000. 28 is where Euler on a flow model stops gaining much.
    pub steps: usize,
    /// How the steps are made; `docs/samplers.md` compares them.
    pub sampler: Sampler,
    /// Which noise levels are visited.
    pub schedule: Schedule,
    /// Shift of a flow model's levels; 3 to 6 is useful. Without meaning for eps and v.
    pub shift: f64,
    /// Scale of classifier-free guidance; 1 is none.
    pub cfg: f64,
    /// Share of CFG's result that is rescaled to the prompt's spread, against too much contrast: 0 is none, 1 all.
    pub cfg_rescale: f64,
    /// Scale of perturbed-attention guidance, which costs one more pass a step; 0 is none. 3 goes with a `cfg` of 3.
    pub pag_scale: f64,
    /// Where it perturbs attention: `mid` as ComfyUI does, or `down.N` and `up.N` with a level's number.
    #[schemars(with = "Vec<String>")]
    pub pag_parts: Vec<UNetPart>,
    /// Seed of the noise, as ComfyUI's.
    pub seed: u64,
    /// Width of the pictures in pixels, a multiple of the VAE's factor (8).
    pub width_px: u32,
    /// Height of the pictures in pixels, a multiple of the VAE's factor (8).
    pub height_px: u32,
    /// Number of pictures. They share one draw of noise, so picture 2 of a batch is not picture 1 of the next seed.
    pub batch: usize,
    /// What the model is told about size; the picture's own size, uncropped, if left out.
    pub size: Option<SizeConditioning>,
}

impl Default for SampleSettings {
    fn default() -> Self {
        let Guidance { cfg, cfg_rescale, pag_scale, pag_parts } = Guidance::default();
        Self {
            steps: 28,
            sampler: Sampler::default(),
            schedule: Schedule::default(),
            // The article trained with 3 and sampled best with 6.
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

/// SDXL's six size numbers, in pixels.
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
    /// Refuses what no model can draw; what depends on the model's factor is checked by [`Self::latent_shape`].
    ///
    /// # Errors
    /// [`Error::Invalid`] with everything that is wrong with the settings.
    pub fn check(&self) -> Result<()> {
        let problems = self.problems();
        if problems.is_empty() { Ok(()) } else { Err(Error::invalid("sampling", &problems)) }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !(1..=MAX_STEPS).contains(&self.steps) {
            problems.push(format!("steps is {}, expected 1 to {MAX_STEPS}", self.steps));
        }
        if !(1..=MAX_BATCH).contains(&self.batch) {
            problems.push(format!("batch is {}, expected 1 to {MAX_BATCH}", self.batch));
        }
        problems.extend(self.guidance().problems());
        problems
    }

    /// The shape of the latents, `[batch, 4, height / 8, width / 8]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] with everything that is wrong with the settings.
    pub fn latent_shape(&self, vae: &VaeConfig) -> Result<[i64; 4]> {
        let factor = vae.down_factor();
        let mut problems = Vec::new();
        for (name, value) in [("width_px", self.width_px), ("height_px", self.height_px)] {
            if value > MAX_SIDE_PX {
                problems.push(format!("{name} is {value}, expected at most {MAX_SIDE_PX}"));
            } else if value == 0 || value % factor != 0 {
                let above = value.max(1).next_multiple_of(factor);
                problems.push(format!("{name} is {value}, expected a multiple of {factor} such as {above}"));
            }
        }
        problems.extend(self.problems());
        if !problems.is_empty() {
            return Err(Error::invalid("sampling", &problems));
        }
        let side = |px: u32| i64::from(px / factor);
        Ok([self.batch as i64, vae.latent_channels, side(self.height_px), side(self.width_px)])
    }

    /// The noise levels to visit, ending in 0, for a model of this parameterization.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an impossible number of steps or shift.
    pub fn sigmas(&self, parameterization: Parameterization) -> Result<Vec<f64>> {
        self.sampler.sigmas(self.schedule, self.steps, &NoiseLevels::new(parameterization, self.shift)?)
    }

    /// How strongly the prompt is followed, and in which way.
    pub fn guidance(&self) -> Guidance {
        Guidance {
            cfg: self.cfg,
            cfg_rescale: self.cfg_rescale,
            pag_scale: self.pag_scale,
            pag_parts: self.pag_parts.clone(),
        }
    }

    /// The size numbers as the UNet takes them. `[batch, 6]` fp32 on the CPU
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

/// Draws latents: noise, every step, no decoding.
///
/// `cond` and `uncond` have one row for all pictures or one for each. Returns `[b, 4, h, w]` fp32 on the UNet's device,
/// in the UNet's scale.
///
/// # Errors
/// What is wrong with the settings, [`Error::Input`] for texts that fit neither each other nor the batch, and what the
/// UNet returns.
pub fn sample_latents(
    unet: &UNet,
    vae: &VaeConfig,
    parameterization: Parameterization,
    texts: Texts<'_>,
    settings: &SampleSettings,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Tensor> {
    tch::no_grad(|| {
        let guidance = settings.guidance();
        settings.latent_shape(vae)?;
        let guided = Guided::new(unet, parameterization, texts, &settings.time_ids(), &guidance)?;
        let model = (vae, parameterization, unet.device());
        sample_latents_by(&mut |x, sigma| guided.denoise(x, sigma), model, settings, progress)
    })
}

/// As [`sample_latents`], by any denoiser of the whole batch: one that several processes share, say. Besides the
/// settings, all that counts of the model is its autoencoder's sizes, what it predicts, and where it is.
///
/// # Errors
/// What is wrong with the settings, and what the denoiser returns.
pub fn sample_latents_by(
    denoise: &mut Denoise<'_>,
    (vae, parameterization, device): (&VaeConfig, Parameterization, Device),
    settings: &SampleSettings,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Tensor> {
    tch::no_grad(|| {
        let shape = settings.latent_shape(vae)?;
        let sigmas = settings.sigmas(parameterization)?;
        let noise = f_initial_noise(settings.seed, &shape).and_then(|noise| noise.f_to_device(device));
        let noise = noise.map_err(Error::torch(format!("drawing the noise of latents {shape:?}")))?;
        let levels = NoiseLevels::new(parameterization, settings.shift)?;
        let x = noised_start(parameterization, &noise, sigmas[0], levels.sigma_max());
        let course = Course { sigmas: &sigmas, parameterization, levels: &levels, seed: settings.seed };
        settings.sampler.run(denoise, x, course, progress)
    })
}

/// Latents in the UNet's scale to pictures: `[b, h, w, 3]` u8, sRGB, on the CPU.
///
/// One picture at a time, since the VAE needs far more memory than the UNet. Values are rounded, as diffusers does
/// (ComfyUI cuts them off, which is up to one level darker).
///
/// # Errors
/// What the VAE returns.
pub fn decode(vae: &Vae, latents: &Tensor) -> Result<Tensor> {
    tch::no_grad(|| {
        let latents = latents.to_kind(Kind::Float) / vae.config.scaling_factor;
        let mut pictures = Vec::new();
        for row in latents.to_device(vae.device()).to_kind(vae.kind()).split(1, 0) {
            let pixels = vae.decode(&row)?.to_kind(Kind::Float); // [1, 3, h, w]
            let levels = ((pixels * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round();
            pictures.push(levels.to_kind(Kind::Uint8).to_device(Device::Cpu).permute([0, 2, 3, 1]));
        }
        Ok(Tensor::cat(&pictures, 0).contiguous())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_settings_are_all_named() {
        let vae = VaeConfig::from_json(
            serde_json::json!({"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4,
                "down_block_types": vec!["DownEncoderBlock2D"; 4], "up_block_types": vec!["UpDecoderBlock2D"; 4]})
            .as_object()
            .unwrap()
            .clone(),
            "vae",
        )
        .unwrap();
        let good = SampleSettings { width_px: 832, height_px: 1216, batch: 3, ..Default::default() };
        assert_eq!(good.latent_shape(&vae).unwrap(), [3, 4, 152, 104]);
        let bad =
            SampleSettings { width_px: 1020, height_px: 0, steps: 0, batch: 0, cfg: f64::NAN, ..Default::default() };
        let message = bad.latent_shape(&vae).unwrap_err().to_string();
        let huge = SampleSettings { width_px: u32::MAX, batch: usize::MAX, ..Default::default() };
        let too_much = huge.latent_shape(&vae).unwrap_err().to_string();
        assert!(too_much.contains("at most 16384") && too_much.contains("1 to 4096"), "{too_much}");
        for word in [
            "width_px is 1020",
            "height_px is 0",
            "multiple of 8 such as 1024",
            "steps is 0",
            "batch is 0",
            "cfg is NaN",
        ] {
            assert!(message.contains(word), "{word}: {message}");
        }
    }

    #[test]
    fn size_numbers_default_to_the_picture_uncropped() {
        let settings = SampleSettings { width_px: 832, height_px: 1216, batch: 2, ..Default::default() };
        let ids: Vec<f32> = settings.time_ids().get(1).try_into().unwrap();
        assert_eq!(ids, [1216.0, 832.0, 0.0, 0.0, 1216.0, 832.0]);
    }
}
