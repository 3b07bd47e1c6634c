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
pub mod noise;
pub mod sampler;
pub mod schedule;
pub mod settings;
pub mod solvers;
pub mod stochastic;
pub mod unipc;

use tch::{Device, Kind, Tensor};

pub use crate::sample::{
    guidance::Texts,
    noise::initial_noise,
    settings::{SampleSettings, SizeConditioning},
    solvers::Progress,
};
use crate::{
    config::vae::VaeConfig,
    error::{Error, Result},
    flow::Parameterization,
    nets::{unet::UNet, vae::Vae},
    sample::{
        denoise::{Denoise, noised_start},
        guidance::Guided,
        noise::f_initial_noise,
        sampler::Course,
        schedule::NoiseLevels,
    },
};

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
