//! Draws pictures: the settings, the path from noise to latents, and decoding.
//!
//! Samplers ([`crate::sampler`]) are plain functions of (denoise, x, sigmas). `denoise`
//! ([`crate::denoise`], [`crate::guidance`]) returns the clean latents predicted from noisy ones,
//! in whatever parameterization the model predicts, so that samplers do not depend on
//! parameterizations or guidance. Everything is ComfyUI's arithmetic in ComfyUI's order: the same
//! seed, schedule and weights produce the same picture there. The noise is in [`crate::noise`].
//!
//! Latents are in the UNet's scale until [`decode`], which divides by the VAE's scaling factor.
//!
//! Not here: texts (the caller encodes token ids with [`crate::cond`]) and picture files.

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

/// Draws latents, without decoding.
///
/// `cond` and `uncond` have one row for all pictures or one per picture. Returns `[b, 4, h, w]`
/// fp32 on the UNet's device, in the UNet's scale.
///
/// # Errors
/// [`Error::Invalid`] if the settings are invalid, [`Error::Input`] for texts that do not fit the
/// batch, and errors of the UNet.
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
        let guided = Guided::new(
            unet,
            parameterization,
            texts,
            &settings.time_ids(),
            &guidance,
        )?;
        let model = (vae, parameterization, unet.device());
        sample_latents_by(
            &mut |x, sigma| guided.denoise(x, sigma),
            model,
            settings,
            progress,
        )
    })
}

/// As [`sample_latents`], with any denoiser of the whole batch, for example one that several
/// processes share. The tuple holds the autoencoder's sizes, the parameterization and the device of
/// the model.
///
/// # Errors
/// [`Error::Invalid`] if the settings are invalid, and errors of the denoiser.
pub fn sample_latents_by(
    denoise: &mut Denoise<'_>,
    (vae, parameterization, device): (&VaeConfig, Parameterization, Device),
    settings: &SampleSettings,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Tensor> {
    tch::no_grad(|| {
        let shape = settings.latent_shape(vae)?;
        let sigmas = settings.sigmas(parameterization)?;
        let noise =
            f_initial_noise(settings.seed, &shape).and_then(|noise| noise.f_to_device(device));
        let noise = noise.map_err(Error::torch(format!(
            "drawing the noise of latents {shape:?}"
        )))?;
        let levels = NoiseLevels::new(parameterization, settings.shift)?;
        let x = noised_start(parameterization, &noise, sigmas[0], levels.sigma_max());
        let course = Course {
            sigmas: &sigmas,
            parameterization,
            levels: &levels,
            seed: settings.seed,
        };
        settings.sampler.run(denoise, x, course, progress)
    })
}

/// Decodes latents in the UNet's scale to pictures: `[b, h, w, 3]` u8, sRGB, on the CPU.
///
/// Decodes one picture at a time, since the VAE needs far more memory than the UNet. Values are
/// rounded, as in diffusers (ComfyUI truncates them, which is up to one level darker).
///
/// # Errors
/// Errors of the VAE.
pub fn decode(vae: &Vae, latents: &Tensor) -> Result<Tensor> {
    tch::no_grad(|| {
        let latents = latents.to_kind(Kind::Float) / vae.config.scaling_factor;
        let mut pictures = Vec::new();
        for row in latents
            .to_device(vae.device())
            .to_kind(vae.kind())
            .split(1, 0)
        {
            let pixels = vae.decode(&row)?.to_kind(Kind::Float); // [1, 3, h, w]
            let levels = ((pixels * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round();
            pictures.push(
                levels
                    .to_kind(Kind::Uint8)
                    .to_device(Device::Cpu)
                    .permute([0, 2, 3, 1]),
            );
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
                "down_block_types": vec!["DownEncoderBlock2D"; 4],
                "up_block_types": vec!["UpDecoderBlock2D"; 4]})
            .as_object()
            .unwrap()
            .clone(),
            "vae",
        )
        .unwrap();
        let good = SampleSettings {
            width_px: 832,
            height_px: 1216,
            batch: 3,
            ..Default::default()
        };
        assert_eq!(good.latent_shape(&vae).unwrap(), [3, 4, 152, 104]);
        let bad = SampleSettings {
            width_px: 1020,
            height_px: 0,
            steps: 0,
            batch: 0,
            cfg: f64::NAN,
            ..Default::default()
        };
        let message = bad.latent_shape(&vae).unwrap_err().to_string();
        let huge = SampleSettings {
            width_px: u32::MAX,
            batch: usize::MAX,
            ..Default::default()
        };
        let too_much = huge.latent_shape(&vae).unwrap_err().to_string();
        assert!(
            too_much.contains("at most 16384") && too_much.contains("1 to 4096"),
            "{too_much}"
        );
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
        let settings = SampleSettings {
            width_px: 832,
            height_px: 1216,
            batch: 2,
            ..Default::default()
        };
        let ids: Vec<f32> = settings.time_ids().get(1).try_into().unwrap();
        assert_eq!(ids, [1216.0, 832.0, 0.0, 0.0, 1216.0, 832.0]);
    }
}
