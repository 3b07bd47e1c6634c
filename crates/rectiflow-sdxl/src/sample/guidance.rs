//! Guidance: a UNet and its texts as one denoiser that follows the prompt more strongly than the
//! UNet alone.
//!
//! Computed on denoised latents, as ComfyUI's nodes do and in their order. `c` is the prediction
//! for the prompt, `u` for the negative prompt, `p` for the prompt with self-attention switched
//! off:
//!
//! ```text
//! guided = u + cfg * (c - u)               classifier-free guidance; `u` is not computed at cfg 1
//! guided = rescaled to the spread of c     RescaleCFG (arXiv 2305.08891, section 3.4)
//! guided = guided + pag_scale * (c - p)    PerturbedAttentionGuidance (arXiv 2403.17377)
//! ```
//!
//! All predictions are one batch of the UNet (ComfyUI runs a second pass for `p`): prompts first,
//! then negative prompts, then perturbed prompts. Texts of unequal length are repeated to the least
//! common multiple of their lengths, which does not change attention.

use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result},
    flow::Parameterization,
    nets::{
        cond::Cond,
        unet::{Perturbation, UNet, UNetInput, UNetPart},
    },
    sample::denoise::denoised_by,
};

/// Kinds and scales of guidance.
#[derive(Clone, Debug, PartialEq)]
pub struct Guidance {
    /// Scale of classifier-free guidance; 1 turns it off.
    pub cfg: f64,
    /// Share of CFG's result that is rescaled to the spread of the prompt's prediction, against
    /// excessive contrast; 0 (none) to 1 (all).
    pub cfg_rescale: f64,
    /// Scale of perturbed-attention guidance; 0 turns it off. Needs a lower `cfg`: 3 and 3 work
    /// well together.
    pub pag_scale: f64,
    /// Where attention is perturbed: `mid` as in ComfyUI, or `down.N` and `up.N` with the number of
    /// a level.
    pub pag_parts: Vec<UNetPart>,
}

impl Default for Guidance {
    fn default() -> Self {
        Self {
            cfg: 4.5,
            cfg_rescale: 0.0,
            pag_scale: 0.0,
            pag_parts: vec![UNetPart::Mid],
        }
    }
}

impl Guidance {
    /// Whether the negative prompt is used: `cfg` is not close to 1 by Python's `math.isclose`, as
    /// in ComfyUI.
    pub fn is_guided(&self) -> bool {
        (self.cfg - 1.0).abs() > 1e-9 * self.cfg.abs().max(1.0)
    }

    /// Whether attention is perturbed.
    pub fn is_perturbed(&self) -> bool {
        self.pag_scale != 0.0
    }

    /// Returns what is wrong with the values; empty if nothing is.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !self.cfg.is_finite() {
            problems.push(format!(
                "cfg is {}, expected a finite number (1 turns guidance off)",
                self.cfg
            ));
        }
        if !(0.0..=1.0).contains(&self.cfg_rescale) {
            problems.push(format!(
                "cfg_rescale is {}, expected 0 (none) to 1",
                self.cfg_rescale
            ));
        }
        if !self.pag_scale.is_finite() {
            problems.push(format!(
                "pag_scale is {}, expected a finite number (0 turns it off)",
                self.pag_scale
            ));
        }
        if self.is_perturbed() && self.pag_parts.is_empty() {
            problems.push(
                "pag_parts is empty, expected \"mid\" or other parts, since pag_scale is not 0"
                    .into(),
            );
        }
        problems
    }
}

/// The prompts and the negative prompts.
#[derive(Clone, Copy, Debug)]
pub struct Texts<'a> {
    /// The prompt, or one per picture.
    pub cond: &'a Cond,
    /// The negative prompt (the empty text by default), or one per picture.
    pub uncond: &'a Cond,
}

/// A UNet with its conditioning, as one denoiser.
#[derive(Debug)]
pub struct Guided<'a> {
    unet: &'a UNet,
    parameterization: Parameterization,
    guidance: &'a Guidance,
    /// Number of rows per picture in the UNet's batch.
    copies: i64,
    batch: i64,
    context: Tensor,
    context_mask: Option<Tensor>,
    pooled: Tensor,
    time_ids: Tensor,
}

impl<'a> Guided<'a> {
    /// Prepares the batch. `time_ids` are `[b, 6]`; each text has one row for all pictures or one
    /// per picture.
    ///
    /// # Errors
    /// [`Error::Input`] if texts do not fit the batch, [`Error::Invalid`] if perturbed parts of the
    /// UNet have no attention.
    pub fn new(
        unet: &'a UNet,
        parameterization: Parameterization,
        texts: Texts<'_>,
        time_ids: &Tensor,
        guidance: &'a Guidance,
    ) -> Result<Self> {
        if guidance.is_perturbed() {
            unet.check_parts(&guidance.pag_parts)?;
        }
        let batch = time_ids.size()[0];
        let parts = parts_of(texts, guidance);
        check_rows(&parts, batch)?;
        let copies = parts.len() as i64;
        let cond = stacked(&parts, batch);
        let device = unet.device();
        Ok(Self {
            unet,
            parameterization,
            guidance,
            copies,
            batch,
            context: cond.context.to_device(device).to_kind(unet.kind()),
            context_mask: cond.context_mask.map(|mask| mask.to_device(device)),
            pooled: cond.pooled.to_device(device).to_kind(unet.kind()),
            time_ids: time_ids.repeat([copies, 1]).to_device(device),
        })
    }

    /// Returns the guided prediction of the clean latents. `[b, 4, h, w]` fp32
    ///
    /// # Errors
    /// Errors of the UNet, and [`Error::Input`] if its output is not finite.
    pub fn denoise(&self, x: &Tensor, sigma: f64) -> Result<Tensor> {
        let stacked = x.repeat([self.copies, 1, 1, 1]);
        let perturbation = self.guidance.is_perturbed().then(|| Perturbation {
            parts: &self.guidance.pag_parts,
            first_row: (self.copies - 1) * self.batch,
        });
        let denoised = denoised_by(
            self.parameterization,
            &stacked,
            sigma,
            &mut |sample, timestep| self.predict(sample, timestep, perturbation),
        )?;
        if denoised.isfinite().all().int64_value(&[]) == 0 {
            let found = "NaN or infinity: the model is broken, or its values overflow its dtype";
            return Err(Error::input(
                format!("the UNet's output at sigma {sigma:.4}"),
                "finite numbers",
                found,
            ));
        }
        Ok(self.combined(x, sigma, &denoised.chunk(self.copies, 0)))
    }

    /// Returns the UNet's output for the stacked batch.
    fn predict(
        &self,
        sample: &Tensor,
        timestep: &Tensor,
        perturbation: Option<Perturbation<'_>>,
    ) -> Result<Tensor> {
        let input = UNetInput {
            sample: &sample.to_kind(self.unet.kind()),
            timestep,
            context: &self.context,
            context_mask: self.context_mask.as_ref(),
            text_embeds: &self.pooled,
            time_ids: &self.time_ids,
        };
        self.unet.forward_perturbed(&input, perturbation)
    }

    /// Combines the parts of the batch into one prediction.
    fn combined(&self, x: &Tensor, sigma: f64, parts: &[Tensor]) -> Tensor {
        let cond = &parts[0];
        let mut guided = cond.shallow_clone();
        if self.guidance.is_guided() {
            guided = &parts[1] + (cond - &parts[1]) * self.guidance.cfg;
            if self.guidance.cfg_rescale > 0.0 {
                guided = rescaled(x, sigma, cond, &guided, self.guidance.cfg_rescale);
            }
        }
        if self.guidance.is_perturbed() {
            // Not in place: without CFG, `guided` shares storage with `cond`.
            guided = &guided + (cond - &parts[parts.len() - 1]) * self.guidance.pag_scale;
        }
        guided
    }
}

/// Rescales CFG's result to the spread of the prompt's prediction, by `share` (0 to 1). `guided`
/// and `cond` are denoised latents `[b, 4, h, w]`.
///
/// The spread is the standard deviation per picture of the v prediction
/// `(x / (sigma^2 + 1) - denoised) * sqrt(sigma^2 + 1) / sigma`. ComfyUI's node uses the same
/// expression for a flow model, where it is not a velocity, only a mixture of latents and
/// prediction; it is kept so that the same workflow draws the same picture.
pub fn rescaled(x: &Tensor, sigma: f64, cond: &Tensor, guided: &Tensor, share: f64) -> Tensor {
    let variance = sigma * sigma + 1.0;
    let from_x = x / variance;
    let to_v = |denoised: &Tensor| (&from_x - denoised) * (variance.sqrt() / sigma);
    let spread = |v: &Tensor| v.std_dim(&[1i64, 2, 3][..], true, true); // [b, 1, 1, 1]
    let v_cond = to_v(cond);
    let v_guided = to_v(guided);
    let factor = spread(&v_cond) / spread(&v_guided) * share + (1.0 - share);
    from_x - v_guided * factor * (sigma / variance.sqrt())
}

/// Returns the texts in the order of the batch, with their names for messages.
fn parts_of<'a>(texts: Texts<'a>, guidance: &Guidance) -> Vec<(&'static str, &'a Cond)> {
    let mut parts = vec![("prompts", texts.cond)];
    if guidance.is_guided() {
        parts.push(("negative prompts", texts.uncond));
    }
    if guidance.is_perturbed() {
        parts.push(("prompts", texts.cond));
    }
    parts
}

fn check_rows(parts: &[(&'static str, &Cond)], batch: i64) -> Result<()> {
    for (name, part) in parts {
        let rows = part.pooled.size()[0];
        if rows != 1 && rows != batch {
            return Err(Error::input(
                *name,
                format!("1 or {batch} (one per picture)"),
                rows.to_string(),
            ));
        }
    }
    Ok(())
}

/// Stacks all texts as one batch, part by part; each part has a row per picture, all rows the same
/// number of tokens.
fn stacked(parts: &[(&'static str, &Cond)], batch: i64) -> Cond {
    let num_tokens = common_num_tokens(parts);
    let mut context = Vec::new();
    let mut masks = Vec::new();
    let mut pooled = Vec::new();
    for (_, part) in parts {
        context.push(repeated(&part.context, batch, num_tokens));
        masks.push(repeated(&mask_of(part), batch, num_tokens));
        pooled.push(part.pooled.expand([batch, -1], false));
    }
    let is_masked = parts.iter().any(|(_, part)| part.context_mask.is_some());
    Cond {
        context: Tensor::cat(&context, 0),
        context_mask: is_masked.then(|| Tensor::cat(&masks, 0)),
        pooled: Tensor::cat(&pooled, 0),
    }
}

/// Returns the smallest number of tokens that all texts can be repeated to.
fn common_num_tokens(parts: &[(&'static str, &Cond)]) -> i64 {
    let mut num_tokens = 1;
    for (_, part) in parts {
        num_tokens = num_integer::lcm(num_tokens, part.context.size()[1]);
    }
    num_tokens
}

/// `[1 or b, n, ...]` -> `[batch, num_tokens, ...]`: repeats rows and tokens; repeated tokens do
/// not change attention.
fn repeated(tokens: &Tensor, batch: i64, num_tokens: i64) -> Tensor {
    let size = tokens.size();
    let mut repeats = vec![1; size.len()];
    repeats[0] = batch / size[0];
    repeats[1] = num_tokens / size[1];
    tokens.repeat(repeats)
}

/// Returns the mask of tokens that are not padding, `[b, n]` bool.
fn mask_of(cond: &Cond) -> Tensor {
    let size = cond.context.size();
    match &cond.context_mask {
        Some(mask) => mask.shallow_clone(),
        None => Tensor::ones([size[0], size[1]], (Kind::Bool, cond.context.device())),
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{
        config::unet::UNetConfig,
        files::single_file::sdxl_configs,
        sample::{SampleSettings, noise::initial_noise},
        weights::{Weights, component::Component},
    };

    fn tiny_unet(weights: Weights) -> UNet {
        let mut config = sdxl_configs().remove(&Component::UNet).unwrap();
        let changes = serde_json::json!({"block_out_channels": [8, 16],
            "attention_head_dim": [2, 2],
            "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 12,
            "transformer_layers_per_block": [1, 2], "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 54,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]});
        config.extend(changes.as_object().unwrap().clone());
        UNet::new(UNetConfig::from_json(config, "unet").unwrap(), weights).unwrap()
    }

    fn random_unet() -> UNet {
        tiny_unet(Weights::random(1, Kind::Float, Device::Cpu))
    }

    fn cond(seed: u64, rows: i64, num_chunks: i64) -> Cond {
        let context = initial_noise(seed, &[rows, 77 * num_chunks, 12]) * 3.0;
        Cond {
            context,
            context_mask: None,
            pooled: initial_noise(seed + 1, &[rows, 6]),
        }
    }

    fn time_ids(batch: usize) -> Tensor {
        SampleSettings {
            batch,
            ..Default::default()
        }
        .time_ids()
    }

    fn guided(unet: &UNet, texts: Texts<'_>, x: &Tensor, guidance: &Guidance) -> Tensor {
        let guided = Guided::new(
            unet,
            Parameterization::Flow,
            texts,
            &time_ids(x.size()[0] as usize),
            guidance,
        );
        tch::no_grad(|| guided.unwrap().denoise(x, 0.8).unwrap())
    }

    fn largest(difference: &Tensor) -> f64 {
        difference.abs().max().double_value(&[])
    }

    const NONE: Guidance = Guidance {
        cfg: 1.0,
        cfg_rescale: 0.0,
        pag_scale: 0.0,
        pag_parts: Vec::new(),
    };

    #[test]
    fn one_guided_pass_equals_two_even_with_unequal_lengths() {
        let unet = random_unet();
        let x = initial_noise(5, &[2, 4, 6, 10]);
        // A prompt per picture (3 chunks, the last of the second masked) and one negative prompt of
        // 2 chunks.
        let mut prompts = cond(1, 2, 3);
        let real = Tensor::from_slice(&[3i64, 2]).view([2, 1]) * 77;
        prompts.context_mask = Some(
            Tensor::arange(3 * 77, (Kind::Int64, Device::Cpu))
                .view([1, -1])
                .lt_tensor(&real),
        );
        let negative = cond(3, 1, 2);
        let denoise = |cond: &Cond, uncond: &Cond, cfg: f64| {
            guided(&unet, Texts { cond, uncond }, &x, &Guidance { cfg, ..NONE })
        };
        let (alone, against) = (
            denoise(&prompts, &negative, 1.0),
            denoise(&negative, &prompts, 1.0),
        );
        let expected = &against + (&alone - &against) * 4.5;
        let together = denoise(&prompts, &negative, 4.5);
        assert!(largest(&(together - expected)) < 1e-4);
        assert!(
            largest(&(alone - against)) > 1e-3,
            "the texts must lead to different predictions"
        );
    }

    #[test]
    fn perturbed_attention_is_added_to_cfg_and_its_rows_leave_the_others_alone() {
        let unet = random_unet();
        let x = initial_noise(5, &[2, 4, 6, 10]);
        let (prompts, negative) = (cond(1, 2, 1), cond(3, 1, 1));
        let texts = Texts {
            cond: &prompts,
            uncond: &negative,
        };
        let with = |cfg: f64, pag_scale: f64, pag_parts: &[UNetPart]| {
            guided(
                &unet,
                texts,
                &x,
                &Guidance {
                    cfg,
                    pag_scale,
                    pag_parts: pag_parts.to_vec(),
                    ..NONE
                },
            )
        };
        let (alone, cfg) = (with(1.0, 0.0, &[]), with(3.0, 0.0, &[]));
        // At cfg 1 and scale -1 the result is the perturbed prediction: c - (c - p).
        let perturbed = with(1.0, -1.0, &[UNetPart::Mid]);
        let expected = &cfg + (&alone - &perturbed) * 2.5;
        assert!(largest(&(with(3.0, 2.5, &[UNetPart::Mid]) - expected)) < 1e-4);
        assert!(
            largest(&(&alone - &perturbed)) > 1e-3,
            "switching attention off must change something"
        );
        let elsewhere = with(1.0, -1.0, &[UNetPart::Down(1), UNetPart::Up(0)]);
        assert!(
            largest(&(elsewhere - perturbed)) > 1e-3,
            "other parts lead to other predictions"
        );
    }

    #[test]
    fn rescaling_gives_the_prompts_spread() {
        let unet = random_unet();
        let x = initial_noise(5, &[2, 4, 6, 10]);
        let (prompts, negative) = (cond(1, 2, 1), cond(3, 1, 1));
        let texts = Texts {
            cond: &prompts,
            uncond: &negative,
        };
        let with = |cfg_rescale: f64, cfg: f64| {
            guided(
                &unet,
                texts,
                &x,
                &Guidance {
                    cfg,
                    cfg_rescale,
                    ..NONE
                },
            )
        };
        // The standard deviation per picture of v as in ComfyUI's node, at sigma 0.8.
        let spread = |denoised: &Tensor| {
            let v = &x / 1.64 - denoised;
            Vec::<f32>::try_from(v.std_dim(&[1i64, 2, 3][..], true, false)).unwrap()
        };
        let (alone, full, plain) = (
            spread(&with(0.0, 1.0)),
            spread(&with(1.0, 7.0)),
            spread(&with(0.0, 7.0)),
        );
        for picture in 0..2 {
            assert!(
                (full[picture] / alone[picture] - 1.0).abs() < 1e-4,
                "{full:?} {alone:?}"
            );
            assert!(
                (plain[picture] / alone[picture] - 1.0).abs() > 1e-3,
                "CFG must have changed it: {plain:?}"
            );
        }
        let half = with(0.5, 7.0) - (with(1.0, 7.0) + with(0.0, 7.0)) * 0.5;
        assert!(largest(&half) < 1e-5);
    }

    #[test]
    fn wrong_numbers_of_texts_and_parts_without_attention_are_refused() {
        let unet = random_unet();
        let (prompts, negative) = (cond(1, 2, 1), cond(3, 1, 1));
        let texts = Texts {
            cond: &prompts,
            uncond: &negative,
        };
        let message = |batch: usize, guidance: &Guidance| {
            let guided = Guided::new(
                &unet,
                Parameterization::Flow,
                texts,
                &time_ids(batch),
                guidance,
            );
            guided.unwrap_err().to_string()
        };
        assert_eq!(
            message(3, &NONE),
            "prompts: expected 1 or 3 (one per picture), found 2"
        );
        let elsewhere = Guidance {
            pag_scale: 3.0,
            pag_parts: vec![UNetPart::Down(0)],
            ..NONE
        };
        let expected = "pag_parts: this UNet has no attention in down.0, only in down.1, mid, up.0";
        assert_eq!(message(2, &elsewhere), expected);
    }

    #[test]
    fn a_model_that_answers_nan_is_named_with_the_level() {
        // Weights are checked when they are loaded; activations can still overflow.
        let unet = random_unet();
        let texts = Texts {
            cond: &cond(1, 1, 1),
            uncond: &cond(3, 1, 1),
        };
        let guidance = NONE;
        let guided = Guided::new(
            &unet,
            Parameterization::Flow,
            texts,
            &time_ids(1),
            &guidance,
        )
        .unwrap();
        let x = Tensor::full([1, 4, 6, 10], f64::NAN, (Kind::Float, Device::Cpu));
        let message = tch::no_grad(|| guided.denoise(&x, 0.75))
            .unwrap_err()
            .to_string();
        assert!(
            message.starts_with(
                "the UNet's output at sigma 0.7500: expected finite numbers, found NaN"
            ),
            "{message}"
        );
    }

    #[test]
    fn bad_numbers_are_all_named() {
        let bad = Guidance {
            cfg: f64::NAN,
            cfg_rescale: 1.5,
            pag_scale: f64::INFINITY,
            pag_parts: Vec::new(),
        };
        let problems = bad.problems().join("; ");
        for word in [
            "cfg is NaN",
            "cfg_rescale is 1.5",
            "pag_scale is inf",
            "pag_parts is empty",
        ] {
            assert!(problems.contains(word), "{word}: {problems}");
        }
        assert_eq!(Guidance::default().problems(), [""; 0]);
    }
}
