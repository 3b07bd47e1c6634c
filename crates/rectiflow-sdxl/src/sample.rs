//! Noise to pictures: initial noise, guidance, Euler's method, decoding.
//!
//! Samplers are plain functions of (denoise, x, sigmas). `denoise` answers the clean picture that a noisy one points
//! to, whatever the model predicts, so that samplers and guidance know nothing of parameterizations. Everything is
//! ComfyUI's arithmetic in ComfyUI's order: the same seed, schedule and weights give the same picture there.
//!
//! - Noise comes from torch's CPU generator in fp32, over the whole batch's shape, on every device.
//! - Guidance is applied to denoised predictions; prompt and negative go through the UNet as one batch, the shorter
//!   context repeated up to the least common multiple. At scale 1 the negative is not computed.
//! - Latents are the model's own (scaled) ones until [`decode`], which divides by the VAE's scaling factor.
//!
//! Not here: texts (the caller brings token ids through [`crate::cond`]) and picture files.

use std::sync::Mutex;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{
    cond::Cond,
    config::VaeConfig,
    discrete,
    error::{Error, Result},
    flow::{self, Parameterization},
    schedule::{MAX_STEPS, NoiseLevels, Schedule},
    unet::{UNet, UNetInput},
    vae::Vae,
};

/// What to draw, apart from the texts. Defaults are the article's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SampleSettings {
    /// Number of steps, 1 to 1000. 28 is where Euler on a flow model stops gaining much.
    pub steps: usize,
    /// Which noise levels are visited.
    pub schedule: Schedule,
    /// Shift of a flow model's levels; 3 to 6 is useful. Without meaning for eps and v.
    pub shift: f64,
    /// Guidance scale; 1 is none.
    pub cfg: f64,
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
        Self {
            steps: 28,
            schedule: Schedule::default(),
            shift: 6.0,
            cfg: 4.5,
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
    /// The shape of the latents, `[batch, 4, height / 8, width / 8]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] with everything that is wrong with the settings.
    pub fn latent_shape(&self, vae: &VaeConfig) -> Result<[i64; 4]> {
        let factor = vae.down_factor();
        let mut problems = Vec::new();
        for (name, value) in [("width_px", self.width_px), ("height_px", self.height_px)] {
            if value == 0 || value % factor != 0 {
                problems.push(format!("{name} is {value}, expected a multiple of {factor}"));
            }
        }
        if !(1..=MAX_STEPS).contains(&self.steps) {
            problems.push(format!("steps is {}, expected 1 to {MAX_STEPS}", self.steps));
        }
        if self.batch == 0 {
            problems.push("batch is 0, expected at least 1".into());
        }
        if !self.cfg.is_finite() {
            problems.push(format!("cfg is {}, expected a finite number (1 is no guidance)", self.cfg));
        }
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
        self.schedule.sigmas(self.steps, &NoiseLevels::new(parameterization, self.shift)?)
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

/// What a sampler tells after each evaluation of the model.
#[derive(Debug)]
pub struct Progress<'a> {
    /// Steps done before this one.
    pub step: usize,
    /// Steps in all.
    pub num_steps: usize,
    /// The noise level the model saw.
    pub sigma: f64,
    /// The noisy latents it saw. `[b, 4, h, w]`
    pub x: &'a Tensor,
    /// The clean latents it pointed to. `[b, 4, h, w]`
    pub denoised: &'a Tensor,
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
        let shape = settings.latent_shape(vae)?;
        let sigmas = settings.sigmas(parameterization)?;
        let guided = Guided::new(unet, parameterization, texts, &settings.time_ids(), settings.cfg)?;
        let noise = initial_noise(settings.seed, &shape).to_device(unet.device());
        let levels = NoiseLevels::new(parameterization, settings.shift)?;
        let x = noised_start(parameterization, &noise, sigmas[0], levels.sigma_max());
        euler(&mut |x, sigma| guided.denoise(x, sigma), x, &sigmas, progress)
    })
}

/// Initial noise as ComfyUI draws it: torch's CPU generator seeded with `seed`, fp32, the whole batch at once.
pub fn initial_noise(seed: u64, shape: &[i64]) -> Tensor {
    // The generator belongs to the process: between seeding and drawing nobody else may seed it.
    static GENERATOR: Mutex<()> = Mutex::new(());
    let _guard = GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    tch::manual_seed(seed as i64);
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

/// Noise at the first level, for a picture that is empty.
///
/// An eps or v model that starts at the top gets the variance of its noisiest training inputs, `1 + sigma^2`.
pub fn noised_start(parameterization: Parameterization, noise: &Tensor, sigma: f64, sigma_max: f64) -> Tensor {
    let starts_at_top = sigma >= sigma_max * (1.0 - 1e-5);
    match parameterization {
        Parameterization::Eps | Parameterization::V if starts_at_top => noise * (1.0 + sigma * sigma).sqrt(),
        _ => noise * sigma,
    }
}

/// Euler's method on `dx/dsigma = (x - denoised) / sigma`, from `sigmas[0]` to the last.
///
/// # Errors
/// What `denoise` returns.
pub fn euler(
    denoise: &mut dyn FnMut(&Tensor, f64) -> Result<Tensor>,
    x: Tensor,
    sigmas: &[f64],
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Tensor> {
    let mut x = x;
    for (step, pair) in sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = denoise(&x, sigma)?;
        progress(Progress { step, num_steps: sigmas.len() - 1, sigma, x: &x, denoised: &denoised });
        let slope = (&x - denoised) / sigma;
        // Not in place: the caller may still hold the tensor.
        x = &x + slope * (next - sigma);
    }
    Ok(x)
}

/// One evaluation of a model seen as a denoiser: scales its input, gives it its timestep, turns its answer into clean
/// latents. `model` takes (input `[b, 4, h, w]`, timestep `[b]` fp32) and answers in the input's shape.
///
/// # Errors
/// What `model` returns.
pub fn denoised_by(
    parameterization: Parameterization,
    x: &Tensor,
    sigma: f64,
    model: &mut dyn FnMut(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let batch = |value: f64| Tensor::full([x.size()[0]], value, (Kind::Float, x.device()));
    if parameterization == Parameterization::Flow {
        let sigma = batch(sigma);
        let velocity = model(x, &flow::timestep(&sigma))?.to_kind(Kind::Float);
        return Ok(flow::clean_estimate(x, &velocity, &sigma));
    }
    let variance = sigma * sigma + 1.0;
    let timestep = batch(discrete::timestep(sigma as f32) as f64);
    let output = model(&(x / variance.sqrt()), &timestep)?.to_kind(Kind::Float);
    Ok(match parameterization {
        Parameterization::V => x / variance - output * (sigma / variance.sqrt()),
        _ => x - output * sigma,
    })
}

/// What to draw and what to stay away from.
#[derive(Clone, Copy, Debug)]
pub struct Texts<'a> {
    /// The prompt, or one for each picture.
    pub cond: &'a Cond,
    /// The negative prompt (the empty text if the user gives none), or one for each picture.
    pub uncond: &'a Cond,
}

/// A UNet with its conditions, as one denoiser.
#[derive(Debug)]
struct Guided<'a> {
    unet: &'a UNet,
    parameterization: Parameterization,
    cfg: f64,
    /// 1 without guidance, 2 with: prompts first, then negatives.
    copies: i64,
    context: Tensor,
    context_mask: Option<Tensor>,
    pooled: Tensor,
    time_ids: Tensor,
}

impl<'a> Guided<'a> {
    fn new(
        unet: &'a UNet,
        parameterization: Parameterization,
        texts: Texts<'_>,
        time_ids: &Tensor,
        cfg: f64,
    ) -> Result<Self> {
        let batch = time_ids.size()[0];
        let device = unet.device();
        // math.isclose, which is how ComfyUI decides.
        let is_guided = (cfg - 1.0).abs() > 1e-9 * cfg.abs().max(1.0);
        let parts = if is_guided { vec![texts.cond, texts.uncond] } else { vec![texts.cond] };
        for (part, name) in parts.iter().zip(["prompts", "negative prompts"]) {
            let rows = part.pooled.size()[0];
            if rows != 1 && rows != batch {
                return Err(Error::input(name, format!("1 or {batch} (one for each picture)"), rows.to_string()));
            }
        }
        let num_tokens = parts.iter().map(|part| part.context.size()[1]).fold(1, least_common_multiple);
        let context: Vec<_> = parts.iter().map(|part| repeated(&part.context, batch, num_tokens)).collect();
        let masks: Vec<_> = parts.iter().map(|part| repeated(&mask_of(part), batch, num_tokens)).collect();
        let pooled: Vec<_> = parts.iter().map(|part| part.pooled.expand([batch, -1], false)).collect();
        let is_masked = parts.iter().any(|part| part.context_mask.is_some());
        Ok(Self {
            unet,
            parameterization,
            cfg,
            copies: parts.len() as i64,
            context: Tensor::cat(&context, 0).to_device(device).to_kind(unet.kind()),
            context_mask: is_masked.then(|| Tensor::cat(&masks, 0).to_device(device)),
            pooled: Tensor::cat(&pooled, 0).to_device(device).to_kind(unet.kind()),
            time_ids: time_ids.repeat([parts.len() as i64, 1]).to_device(device),
        })
    }

    fn denoise(&self, x: &Tensor, sigma: f64) -> Result<Tensor> {
        let stacked = x.repeat([self.copies, 1, 1, 1]);
        let denoised = denoised_by(self.parameterization, &stacked, sigma, &mut |sample, timestep| {
            self.unet.forward(&UNetInput {
                sample: &sample.to_kind(self.unet.kind()),
                timestep,
                context: &self.context,
                context_mask: self.context_mask.as_ref(),
                text_embeds: &self.pooled,
                time_ids: &self.time_ids,
            })
        })?;
        if self.copies == 1 {
            return Ok(denoised);
        }
        let parts = denoised.chunk(2, 0);
        let (cond, uncond) = (&parts[0], &parts[1]);
        Ok(uncond + (cond - uncond) * self.cfg)
    }
}

/// `[1 or b, n, ...]` -> `[batch, num_tokens, ...]`: rows expanded, tokens repeated, which leaves attention as it is.
fn repeated(tokens: &Tensor, batch: i64, num_tokens: i64) -> Tensor {
    let size = tokens.size();
    let mut repeats = vec![1; size.len()];
    repeats[0] = batch / size[0];
    repeats[1] = num_tokens / size[1];
    tokens.repeat(repeats)
}

/// `[b, n]` bool: which tokens are real.
fn mask_of(cond: &Cond) -> Tensor {
    let size = cond.context.size();
    match &cond.context_mask {
        Some(mask) => mask.shallow_clone(),
        None => Tensor::ones([size[0], size[1]], (Kind::Bool, cond.context.device())),
    }
}

fn least_common_multiple(a: i64, b: i64) -> i64 {
    let (mut divisor, mut rest) = (a, b);
    while rest != 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    a / divisor * b
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

    /// Data that are Gaussian with this mean and deviation, whose exact denoiser is known.
    const MEAN: f64 = 0.7;
    const DEVIATION: f64 = 0.4;

    /// A perfect model of that data, answering in the parameterization it is asked for.
    fn gaussian_model(parameterization: Parameterization, input: &Tensor, timestep: &Tensor) -> Tensor {
        let time = timestep.double_value(&[0]);
        let (signal, noise) = match parameterization {
            Parameterization::Flow => (1.0 - time / 1000.0, time / 1000.0),
            _ => {
                let alpha_bar = discrete::alpha_bar(time as usize);
                (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt())
            }
        };
        let variance = (signal * DEVIATION).powi(2) + noise * noise;
        let centred = input - signal * MEAN;
        let x0 = &centred * (signal * DEVIATION * DEVIATION / variance) + MEAN;
        let eps = centred * (noise / variance);
        match parameterization {
            Parameterization::Flow => eps - x0,
            Parameterization::Eps => eps,
            Parameterization::V => signal * eps - noise * x0,
        }
    }

    fn sampled(parameterization: Parameterization, sigmas: &[f64], x: &Tensor) -> Tensor {
        let mut denoise = |x: &Tensor, sigma: f64| {
            let mut model = |input: &Tensor, t: &Tensor| Ok(gaussian_model(parameterization, input, t));
            denoised_by(parameterization, x, sigma, &mut model)
        };
        euler(&mut denoise, x.shallow_clone(), sigmas, &mut |_| ()).unwrap()
    }

    fn noise() -> Tensor {
        initial_noise(3, &[2, 4, 8, 8]).to_kind(Kind::Double)
    }

    fn rms(difference: &Tensor) -> f64 {
        difference.square().mean(Kind::Double).double_value(&[]).sqrt()
    }

    #[test]
    fn euler_converges_on_flow_with_order_one() {
        // On straight paths of Gaussian data x(0) = mean + deviation * x(1), exactly.
        let exact = noise() * DEVIATION + MEAN;
        let errors: Vec<f64> = [16, 32, 64, 128, 256]
            .into_iter()
            .map(|steps| {
                let sigmas: Vec<f64> = (0..=steps).map(|i| 1.0 - i as f64 / steps as f64).collect();
                rms(&(sampled(Parameterization::Flow, &sigmas, &noise()) - &exact))
            })
            .collect();
        assert!(errors[4] < 3e-3, "{errors:?}");
        for pair in errors.windows(2) {
            let order = (pair[0] / pair[1]).log2();
            assert!((0.9..1.1).contains(&order), "order {order}: {errors:?}");
        }
    }

    #[test]
    fn euler_draws_the_data_from_eps_and_v_models() {
        for parameterization in [Parameterization::Eps, Parameterization::V] {
            let levels = NoiseLevels::new(parameterization, 1.0).unwrap();
            let error = |steps| {
                let sigmas = Schedule::Normal.sigmas(steps, &levels).unwrap();
                let start = noised_start(parameterization, &noise(), sigmas[0], levels.sigma_max());
                let scale = DEVIATION / (DEVIATION * DEVIATION + sigmas[0] * sigmas[0]).sqrt();
                let exact = (&start - MEAN) * scale + MEAN;
                rms(&(sampled(parameterization, &sigmas, &start) - exact))
            };
            // Each of the 1000 levels is a training step, so no timestep is rounded at 1000 steps.
            let (coarse, fine) = (error(100), error(1000));
            assert!(fine < 3e-3 && fine < coarse / 5.0, "{parameterization}: {coarse} then {fine}");
        }
    }

    #[test]
    fn noise_is_torchs() {
        // torch 2.13.0: torch.randn(2, 4, 2, 3, generator=torch.manual_seed(42)).flatten()[[0, 1, 24, 47]], and
        // torch.randn(1, 1, 1, 5, generator=torch.manual_seed(2**64 - 1)), so few that torch draws them one by one.
        let noise = initial_noise(42, &[2, 4, 2, 3]).flatten(0, -1);
        let picked = [0, 1, 24, 47].map(|i| noise.double_value(&[i]) as f32);
        assert_eq!(picked, [1.9269153, 1.4872841, 1.2791244, -0.48791388]);
        let few: Vec<f32> = initial_noise(u64::MAX, &[1, 1, 1, 5]).flatten(0, -1).try_into().unwrap();
        assert_eq!(few, [1.219763, -0.39297947, 1.0230751, -0.37342113, -0.0755102]);
    }

    #[test]
    fn start_has_the_first_levels_noise() {
        let noise = Tensor::from_slice(&[1.0f64]);
        let start = |parameterization, sigma| noised_start(parameterization, &noise, sigma, 14.0).double_value(&[0]);
        assert_eq!(start(Parameterization::Flow, 1.0), 1.0);
        assert_eq!(start(Parameterization::Flow, 0.9), 0.9);
        assert_eq!(start(Parameterization::Eps, 14.0), 197f64.sqrt());
        assert_eq!(start(Parameterization::V, 3.0), 3.0);
    }

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
        for word in ["width_px is 1020", "height_px is 0", "multiple of 8", "steps is 0", "batch is 0", "cfg is NaN"] {
            assert!(message.contains(word), "{word}: {message}");
        }
    }

    #[test]
    fn size_numbers_default_to_the_picture_uncropped() {
        let settings = SampleSettings { width_px: 832, height_px: 1216, batch: 2, ..Default::default() };
        let ids: Vec<f32> = settings.time_ids().get(1).try_into().unwrap();
        assert_eq!(ids, [1216.0, 832.0, 0.0, 0.0, 1216.0, 832.0]);
    }

    fn tiny_unet() -> UNet {
        let mut config = crate::bundle::sdxl_configs().remove(&crate::model::Component::UNet).unwrap();
        let changes = serde_json::json!({"block_out_channels": [8, 16], "attention_head_dim": [2, 2],
            "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 12,
            "transformer_layers_per_block": [1, 1], "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 54, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]});
        config.extend(changes.as_object().unwrap().clone());
        let config = crate::config::UNetConfig::from_json(config, "unet").unwrap();
        UNet::new(config, crate::weights::Weights::random(1, Kind::Float, Device::Cpu)).unwrap()
    }

    fn cond(seed: u64, rows: i64, num_chunks: i64) -> Cond {
        let context = initial_noise(seed, &[rows, 77 * num_chunks, 12]) * 3.0;
        Cond { context, context_mask: None, pooled: initial_noise(seed + 1, &[rows, 6]) }
    }

    #[test]
    fn one_guided_pass_equals_two_even_with_unequal_lengths() {
        let unet = tiny_unet();
        let x = initial_noise(5, &[2, 4, 6, 10]);
        let time_ids = SampleSettings { batch: 2, ..Default::default() }.time_ids();
        // A prompt for each picture (3 chunks, the second one's last masked out) against one negative of 2 chunks.
        let mut prompts = cond(1, 2, 3);
        let real = Tensor::from_slice(&[3i64, 2]).view([2, 1]) * 77;
        prompts.context_mask = Some(Tensor::arange(3 * 77, (Kind::Int64, Device::Cpu)).view([1, -1]).lt_tensor(&real));
        let negative = cond(3, 1, 2);
        let denoise = |cond: &Cond, uncond: &Cond, cfg: f64| {
            let guided = Guided::new(&unet, Parameterization::Flow, Texts { cond, uncond }, &time_ids, cfg).unwrap();
            assert_eq!(guided.copies, if cfg == 1.0 { 1 } else { 2 });
            tch::no_grad(|| guided.denoise(&x, 0.8).unwrap())
        };
        let (alone, against) = (denoise(&prompts, &negative, 1.0), denoise(&negative, &prompts, 1.0));
        let expected = &against + (&alone - &against) * 4.5;
        let together = denoise(&prompts, &negative, 4.5);
        let largest = |difference: Tensor| difference.abs().max().double_value(&[]);
        assert!(largest(&together - expected) < 1e-4);
        assert!(largest(alone - against) > 1e-3, "the two texts must differ for this to show anything");
    }

    #[test]
    fn wrong_numbers_of_texts_are_refused() {
        let (unet, settings) = (tiny_unet(), SampleSettings { batch: 3, ..Default::default() });
        let texts = Texts { cond: &cond(1, 2, 1), uncond: &cond(3, 1, 1) };
        let message = Guided::new(&unet, Parameterization::Flow, texts, &settings.time_ids(), 4.5).unwrap_err();
        assert_eq!(message.to_string(), "prompts: expected 1 or 3 (one for each picture), found 2");
    }
}
