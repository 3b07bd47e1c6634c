//! Recognizes files that are not SDXL checkpoints, and extra tensors, by tensor names.
//!
//! Used for messages only: a file of the wrong kind is refused with the name of its kind. Pure.

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
const FOREIGN: [(&[Mark], &str); 8] = [
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
        &[
            Start("down_blocks."),
            Start("decoder."),
            Start("encoder."),
            Start("text_model."),
        ],
        "this is one part of a model, not a whole checkpoint; use its folder, with the \
         config.json",
    ),
];

/// What an SDXL checkpoint or one of its UNets has.
const UNET: [Mark; 2] = [
    Start("input_blocks.0."),
    Start("model.diffusion_model.input_blocks.0."),
];
const SIZE_CONDITIONING: Mark = Part("label_emb.0.0.");
const OTHER_PARTS: [Mark; 2] = [Start("conditioner.embedders."), Start("first_stage_model.")];

/// Says what a file with these tensor names is and what to do, if it is not an SDXL checkpoint.
/// `None` if it can be one.
pub(crate) fn architecture<'a>(names: impl Iterator<Item = &'a str>) -> Option<&'static str> {
    let names: Vec<&str> = names.collect();
    if names.is_empty() {
        return Some("it holds no tensor");
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
/// kind.
pub(crate) fn extras(names: &[String]) -> Vec<String> {
    // The names by kind.
    let mut averaged = Vec::new();
    let mut constant = Vec::new();
    let mut other = Vec::new();
    for name in names {
        if name.starts_with("model_ema.") {
            averaged.push(name);
        } else if is_constant(name) {
            constant.push(name);
        } else {
            other.push(name);
        }
    }
    // A sentence for each kind that occurs.
    let sorts = [
        (
            averaged,
            "of averaged weights (model_ema.) are ignored; the plain weights are used",
        ),
        (
            constant,
            "are constants that SDXL's code computes itself, and are ignored",
        ),
        (other, "belong to no part of SDXL and are ignored"),
    ];
    let mut sentences = Vec::new();
    for (names, what) in &sorts {
        if !names.is_empty() {
            sentences.push(sentence(names, what));
        }
    }
    sentences
}

fn sentence(names: &[&String], what: &str) -> String {
    let first: Vec<&str> = names.iter().take(3).map(|name| name.as_str()).collect();
    let more = if names.len() > first.len() {
        ", ..."
    } else {
        ""
    };
    let tensors = if names.len() == 1 {
        "tensor"
    } else {
        "tensors"
    };
    format!(
        "{} {tensors} {what}: {}{more}",
        names.len(),
        first.join(", ")
    )
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
    fn extras_are_counted_by_sort() {
        let names: Vec<String> = [
            "model_ema.decay",
            "model_ema.a",
            "alphas_cumprod",
            "x.logit_scale",
            "v_pred",
            "ztsnr",
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
            found[2].contains("belong to no part of SDXL") && found[2].ends_with("v_pred, ztsnr"),
            "{found:?}"
        );
        assert!(extras(&[]).is_empty());
        let many: Vec<String> = (0..9).map(|i| format!("t{i}")).collect();
        assert!(extras(&many)[0].starts_with("9 tensors") && extras(&many)[0].ends_with("t2, ..."));
    }
}
