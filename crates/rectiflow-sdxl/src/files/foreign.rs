//! Recognizes files that are not SDXL checkpoints, and extra tensors, by tensor names and shapes.
//!
//! Used for messages only: a file of the wrong kind is refused with the name of its kind. Pure.

use std::collections::BTreeMap;

use crate::{
    error::counted,
    files::prediction::{V_TENSOR, ZTSNR_TENSOR},
    weights::{component::Component, keys::single_prefix, quantised},
};

/// What identifies a kind of file in the name of one of its tensors.
enum Mark {
    /// A part of the name.
    Part(&'static str),
    /// Its beginning.
    Start(&'static str),
}

use Mark::{Part, Start};

impl Mark {
    fn is_in(&self, names: &[&str]) -> bool {
        match self {
            Part(part) => names.iter().any(|name| name.contains(part)),
            Start(start) => names.iter().any(|name| name.starts_with(start)),
        }
    }
}

/// Kinds of files that are no SDXL checkpoint: the marks of each, one of which suffices, and what
/// it is and what to do.
const FOREIGN: [(&[Mark], &str); 12] = [
    (
        &[
            Part(".lora_down."),
            Part(".lora_up."),
            Part(".lora_A."),
            Part("lora.down."),
        ],
        "this is a LoRA, a change to a checkpoint; merge it into an SDXL checkpoint and use that",
    ),
    (
        &[Part("double_blocks.")],
        "this is a Flux model; use an SDXL checkpoint",
    ),
    (
        &[Part("joint_blocks.")],
        "this is a Stable Diffusion 3 model; use an SDXL checkpoint",
    ),
    (
        &[Start("cond_stage_model.transformer.")],
        "this is a Stable Diffusion 1 checkpoint; use an SDXL checkpoint",
    ),
    (
        &[Start("cond_stage_model.model.")],
        "this is a Stable Diffusion 2 checkpoint; use an SDXL checkpoint",
    ),
    (
        &[Start("conditioner.embedders.0.model.")],
        "this is an SDXL refiner, which has only one text encoder; use a base checkpoint",
    ),
    (
        &[
            Part("control_model."),
            Start("controlnet_"),
            Start("input_hint_block"),
        ],
        "this is a ControlNet; use an SDXL checkpoint",
    ),
    (
        &[Start("decoder.layers."), Start("encoder.layers.")],
        "this is a tiny autoencoder (TAESD), which approximates; use SDXL's autoencoder",
    ),
    (
        &[
            Start("down_blocks."),
            Start("decoder."),
            Start("encoder."),
            Start("text_model."),
        ],
        "this is one part of a model, not a whole checkpoint; use its folder, with the \
         config.json",
    ),
    (
        &[Start("edm_mean"), Start("edm_std")],
        "this is an EDM model (it has the tensor edm_mean or edm_std, as Playground 2.5), whose \
         latents and noise levels are scaled differently; use an SDXL checkpoint",
    ),
    (
        &[Start("edm_vpred.")],
        "this is an EDM model that predicts v (it has the tensor edm_vpred.sigma_max, as CosXL), \
         whose noise levels are not SDXL's; use an SDXL checkpoint",
    ),
    (
        &[
            Part(".quant_state."),
            Part(".absmax"),
            Part(".qweight"),
            Part(".quant_map"),
        ],
        "its weights are quantised to a few bits (bitsandbytes, GPTQ or SVDQuant); use the file \
         that it was made from",
    ),
];

/// What an SDXL checkpoint or one of its UNets has.
const UNET: [Mark; 2] = [
    Start("input_blocks.0."),
    Start("model.diffusion_model.input_blocks.0."),
];
const SIZE_CONDITIONING: Mark = Part("label_emb.0.0.");
const OTHER_PARTS: [Mark; 2] = [Start("conditioner.embedders."), Start("first_stage_model.")];

/// The name of the UNet's first weight, `[width, latent channels, 3, 3]`, with and without prefix.
const FIRST_WEIGHT: [&str; 2] = [
    "model.diffusion_model.input_blocks.0.0.weight",
    "input_blocks.0.0.weight",
];

/// The tensors by which an autoencoder alone is known, and that of its latent channels.
const VAE: [&str; 2] = ["encoder.conv_in.weight", LATENT_WEIGHT];
const LATENT_WEIGHT: &str = "decoder.conv_in.weight";
const SDXL_LATENT_CHANNELS: i64 = 4;

/// Relatives of SDXL by the number of transformer blocks at each place of the UNet's way down that
/// has any.
const RELATIVES: [(&[usize], &str); 4] = [
    (&[2, 2, 4, 4], "SSD-1B"),
    (&[1, 1, 2, 2], "Segmind Vega"),
    (&[2, 5], "KOALA-700M"),
    (&[2, 6], "KOALA-1B"),
];
const SDXL_WIDTH: i64 = 320;
const SDXL_DEPTHS: [usize; 4] = [2, 2, 10, 10];

/// Says what a file is and what to do, if its UNet is a relative of SDXL with other sizes; `shape`
/// returns the shape of a tensor. `None` if the UNet can be SDXL's.
pub(crate) fn relative<'a>(
    names: impl Iterator<Item = &'a str>,
    shape: impl Fn(&str) -> Option<&'a [i64]>,
) -> Option<String> {
    match FIRST_WEIGHT.iter().find_map(|name| shape(name)) {
        Some([384, ..]) => return Some("this is the UNet of an SDXL refiner; use a base".into()),
        Some([_, 9, ..]) => {
            return Some(
                "this is an inpainting model (its UNet takes 9 channels); use an SDXL checkpoint"
                    .into(),
            );
        }
        Some([_, 8, ..]) => {
            return Some(
                "this is an instruct-pix2pix model (its UNet takes 8 channels); use an SDXL \
                 checkpoint"
                    .into(),
            );
        }
        Some([width, ..]) if *width != SDXL_WIDTH => return None,
        _ => {}
    }
    let depths = depths(names);
    if depths.is_empty() || depths == SDXL_DEPTHS {
        return None;
    }
    let known = RELATIVES.iter().find(|(known, _)| *known == depths);
    let what = known.map_or("a relative of SDXL of another depth", |(_, name)| name);
    Some(format!(
        "this is {what}: its UNet has {} transformer blocks on the way down, SDXL's has {}; use an \
         SDXL checkpoint",
        listed(&depths),
        listed(&SDXL_DEPTHS)
    ))
}

/// Whether a file with these tensor names is an autoencoder alone, in the layout of SDXL's.
pub(crate) fn is_vae<'a>(names: impl Iterator<Item = &'a str>) -> bool {
    names.filter(|name| VAE.contains(name)).count() == VAE.len()
}

/// Says what a file is and what to do, if it has an autoencoder of another kind than SDXL's;
/// `shape` returns the shape of a tensor. `None` if the autoencoder can be SDXL's.
pub(crate) fn other_vae<'a>(shape: impl Fn(&str) -> Option<&'a [i64]>) -> Option<String> {
    let inside = format!("{}{LATENT_WEIGHT}", single_prefix(Component::Vae));
    let found = shape(LATENT_WEIGHT).or_else(|| shape(&inside))?;
    match found {
        [_, channels, ..] if *channels != SDXL_LATENT_CHANNELS => Some(format!(
            "its autoencoder has {channels} latent channels (16 have those of Stable Diffusion 3 \
             and Flux), SDXL's has {SDXL_LATENT_CHANNELS}; use SDXL's"
        )),
        _ => None,
    }
}

/// Returns the number of transformer blocks at each place of the UNet's way down that has any.
fn depths<'a>(names: impl Iterator<Item = &'a str>) -> Vec<usize> {
    let mut depths = BTreeMap::new();
    for name in names {
        let name = name
            .strip_prefix(single_prefix(Component::UNet))
            .unwrap_or(name);
        if let Some((place, block)) = transformer_block(name) {
            let depth = depths.entry(place).or_insert(0);
            *depth = (block + 1).max(*depth);
        }
    }
    depths.into_values().collect()
}

/// Returns the place and the number of a transformer block on the UNet's way down from the name of
/// one of its tensors, `input_blocks.PLACE.1.transformer_blocks.BLOCK...`.
fn transformer_block(name: &str) -> Option<(usize, usize)> {
    let (place, rest) = name.strip_prefix("input_blocks.")?.split_once('.')?;
    let (block, _) = rest
        .strip_prefix("1.transformer_blocks.")?
        .split_once('.')?;
    let block: usize = block.parse().ok()?;
    // A hostile name must not overflow.
    (block < 1000).then_some((place.parse().ok()?, block))
}

fn listed(numbers: &[usize]) -> String {
    let texts: Vec<String> = numbers.iter().map(usize::to_string).collect();
    texts.join(", ")
}

/// Says what a file with these tensor names is and what to do, if it is not an SDXL checkpoint.
/// `None` if it can be one.
pub(crate) fn architecture<'a>(names: impl Iterator<Item = &'a str>) -> Option<&'static str> {
    let names: Vec<&str> = names.collect();
    if names.is_empty() {
        return Some("it holds no tensor");
    }
    if is_vae(names.iter().copied()) {
        return None;
    }
    for (marks, what) in &FOREIGN {
        if has_any(marks, &names) {
            return Some(what);
        }
    }
    let is_unet = has_any(&UNET, &names);
    if is_unet && !SIZE_CONDITIONING.is_in(&names) {
        return Some(
            "this is a Stable Diffusion 1 or 2 UNet (it lacks label_emb, the size \
             conditioning); use an SDXL checkpoint",
        );
    }
    let has_sdxl = is_unet || has_any(&OTHER_PARTS, &names);
    (!has_sdxl).then_some("none of its tensors has a name that SDXL uses; use an SDXL checkpoint")
}

fn has_any(marks: &[Mark], names: &[&str]) -> bool {
    marks.iter().any(|mark| mark.is_in(names))
}

/// Describes the tensors that a checkpoint holds besides the model's weights, in one sentence per
/// kind. Markers, which say something about the model, are not among them.
pub(crate) fn extras(names: &[String]) -> Vec<String> {
    // The names by kind.
    let mut averaged = Vec::new();
    let mut constant = Vec::new();
    let mut other = Vec::new();
    for name in names {
        if is_marker(name) {
            continue;
        }
        if name.starts_with("model_ema.") {
            averaged.push(name);
        } else if is_constant(name) {
            constant.push(name);
        } else {
            other.push(name);
        }
    }
    // A sentence for each kind that occurs.
    let mut sentences = Vec::new();
    if !averaged.is_empty() {
        let what = if averaged.len() == 1 { "is" } else { "are" };
        let tensors = counted(averaged.len(), "tensor");
        let names = first_names(&averaged);
        sentences.push(format!(
            "{tensors} of averaged weights (model_ema.) {what} ignored, the plain weights are \
             used: {names}"
        ));
    }
    if !constant.is_empty() {
        let what = if constant.len() == 1 {
            "is a constant that SDXL's code computes itself, and is ignored"
        } else {
            "are constants that SDXL's code computes itself, and are ignored"
        };
        sentences.push(sentence(&constant, what));
    }
    if !other.is_empty() {
        let what = if other.len() == 1 {
            "belongs to no part of SDXL and is ignored"
        } else {
            "belong to no part of SDXL and are ignored"
        };
        sentences.push(sentence(&other, what));
    }
    sentences
}

/// Whether a tensor is a marker: it says what the model predicts, or how weights are stored.
fn is_marker(name: &str) -> bool {
    name == V_TENSOR || name == ZTSNR_TENSOR || quantised::is_marker(name)
}

fn sentence(names: &[&String], what: &str) -> String {
    let tensors = counted(names.len(), "tensor");
    format!("{tensors} {what}: {}", first_names(names))
}

/// Returns the first three names.
fn first_names(names: &[&String]) -> String {
    let first: Vec<&str> = names.iter().take(3).map(|name| name.as_str()).collect();
    let more = if names.len() > first.len() {
        ", ..."
    } else {
        ""
    };
    first.join(", ") + more
}

/// Whether `name` is a buffer of the training code or OpenCLIP's temperature; no picture depends on
/// them.
fn is_constant(name: &str) -> bool {
    const SCHEDULE: [&str; 11] = [
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "denoiser.sigmas",
        "denoiser.log_sigmas",
    ];
    SCHEDULE.contains(&name)
        || name.starts_with("posterior_")
        || ["logit_scale", "position_ids", "attn_mask"]
            .iter()
            .any(|last| name.ends_with(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_wrong_kind_are_called_by_their_name() {
        for (name, expected) in [
            ("lora_unet_down_blocks_0.lora_down.weight", "LoRA"),
            (
                "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
                "Flux",
            ),
            ("double_blocks.0.img_attn.qkv.weight", "Flux"),
            (
                "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
                "Stable Diffusion 3",
            ),
            (
                "cond_stage_model.transformer.text_model.final_layer_norm.bias",
                "Stable Diffusion 1",
            ),
            ("cond_stage_model.model.ln_final.bias", "Stable Diffusion 2"),
            ("conditioner.embedders.0.model.ln_final.bias", "refiner"),
            ("control_model.input_blocks.0.0.bias", "ControlNet"),
            ("down_blocks.0.resnets.0.norm1.weight", "one part"),
            ("text_model.final_layer_norm.bias", "one part"),
            (
                "model.diffusion_model.input_blocks.0.0.weight",
                "Stable Diffusion 1 or 2 UNet",
            ),
            ("bert.embeddings.weight", "none of its tensors"),
        ] {
            let found =
                architecture([name].into_iter()).unwrap_or_else(|| panic!("{name} is not SDXL's"));
            assert!(found.contains(expected), "{name}: {found}");
        }
        assert_eq!(architecture([].into_iter()), Some("it holds no tensor"));
        for prefix in ["model.diffusion_model.", ""] {
            let names = ["input_blocks.0.0.weight", "label_emb.0.0.weight"]
                .map(|name| format!("{prefix}{name}"));
            assert_eq!(
                architecture(names.iter().map(String::as_str)),
                None,
                "{names:?}"
            );
        }
        assert_eq!(
            architecture(["first_stage_model.quant_conv.bias"].into_iter()),
            None,
            "the other parts can be in other files"
        );
    }

    #[test]
    fn counts_are_grammatical() {
        for (name, expected) in [
            (
                "model_ema.a",
                "1 tensor of averaged weights (model_ema.) is ignored",
            ),
            (
                "betas",
                "1 tensor is a constant that SDXL's code computes itself, and is ignored",
            ),
            ("x", "1 tensor belongs to no part of SDXL and is ignored: x"),
        ] {
            let found = extras(&[name.to_owned()]);
            assert!(
                found.len() == 1 && found[0].starts_with(expected),
                "{found:?}"
            );
            let found = extras(&[name.to_owned(), format!("{name}.posterior_")]);
            assert!(
                found
                    .iter()
                    .all(|line| line.contains(" are ") || line.starts_with("1 "))
            );
        }
    }

    #[test]
    fn edm_and_quantised_files_are_called_by_their_name() {
        let unet = [
            "model.diffusion_model.input_blocks.0.0.weight",
            "label_emb.0.0.weight",
        ];
        for (name, expected) in [
            ("edm_mean", "Playground 2.5"),
            ("edm_std", "Playground 2.5"),
            ("edm_vpred.sigma_max", "CosXL"),
            ("edm_vpred.sigma_min", "CosXL"),
            ("model.diffusion_model.x.weight.absmax", "quantised"),
            (
                "model.diffusion_model.x.weight.quant_state.bitsandbytes__nf4",
                "bitsandbytes",
            ),
            ("model.diffusion_model.x.qweight", "SVDQuant"),
        ] {
            let names = unet.into_iter().chain([name]);
            let found = architecture(names).unwrap_or_else(|| panic!("{name} is not SDXL's"));
            assert!(found.contains(expected), "{name}: {found}");
        }
    }

    #[test]
    fn relatives_of_another_depth_or_width_are_called_by_their_name() {
        let blocks = |depths: &[(usize, usize)], prefix: &str| {
            let mut names = vec![format!("{prefix}input_blocks.0.0.weight")];
            for (place, depth) in depths {
                for block in 0..*depth {
                    names.push(format!(
                        "{prefix}input_blocks.{place}.1.transformer_blocks.{block}.norm1.bias"
                    ));
                }
            }
            names
        };
        let found = |names: &[String], first: &'static [i64]| {
            relative(names.iter().map(String::as_str), |name| {
                name.ends_with("input_blocks.0.0.weight").then_some(first)
            })
        };
        for (depths, expected) in [
            (&[(4, 2), (5, 2), (7, 4), (8, 4)][..], "this is SSD-1B: "),
            (&[(4, 1), (5, 1), (7, 2), (8, 2)], "this is Segmind Vega: "),
            (&[(3, 2), (5, 5)], "this is KOALA-700M: "),
            (&[(3, 2), (5, 6)], "this is KOALA-1B: "),
            (
                &[(4, 2), (5, 2), (7, 9), (8, 10)],
                "2, 2, 9, 10 transformer blocks",
            ),
            (&[(10, 1), (4, 3)], "3, 1 transformer blocks"),
        ] {
            for prefix in ["", "model.diffusion_model."] {
                let message = found(&blocks(depths, prefix), &[320, 4, 3, 3]).expect(expected);
                assert!(message.contains(expected), "{message}");
            }
        }
        let own = blocks(&[(4, 2), (5, 2), (7, 10), (8, 10)], "");
        for (first, expected) in [
            (&[384, 4, 3, 3][..], "refiner"),
            (&[320, 9, 3, 3], "inpainting"),
            (&[320, 8, 3, 3], "instruct-pix2pix"),
        ] {
            assert!(found(&own, first).expect(expected).contains(expected));
        }
        assert_eq!(found(&own, &[320, 4, 3, 3]), None);
        assert_eq!(found(&[], &[320, 4, 3, 3]), None, "a file of other parts");
        let hostile = [
            "input_blocks.18446744073709551616.1.transformer_blocks.0.x",
            "input_blocks.4.1.transformer_blocks.18446744073709551615.x",
        ]
        .map(str::to_owned);
        assert_eq!(found(&hostile, &[]), None);
    }

    #[test]
    fn extras_are_counted_by_sort() {
        let names: Vec<String> = [
            "model_ema.decay",
            "model_ema.a",
            "alphas_cumprod",
            "x.logit_scale",
            "v_pred",
            "a",
            "ztsnr",
            "b",
            "model.diffusion_model.scaled_fp8",
        ]
        .map(String::from)
        .to_vec();
        let found = extras(&names);
        assert_eq!(found.len(), 3);
        assert!(
            found[0].starts_with("2 tensors of averaged weights"),
            "{found:?}"
        );
        assert!(
            found[1].ends_with("alphas_cumprod, x.logit_scale"),
            "{found:?}"
        );
        assert!(
            found[2].contains("2 tensors belong to no part of SDXL") && found[2].ends_with("a, b"),
            "{found:?}"
        );
        assert!(extras(&[]).is_empty());
        let many: Vec<String> = (0..9).map(|i| format!("t{i}")).collect();
        assert!(extras(&many)[0].starts_with("9 tensors") && extras(&many)[0].ends_with("t2, ..."));
    }
}
