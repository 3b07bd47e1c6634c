//! Why ComfyUI's picture of a workflow is not ours.
//!
//! The promise of a workflow: ComfyUI draws the same picture, or a sentence from here says why not.
//! Limits of values are those of its nodes; its server refuses a graph that exceeds one. The
//! sentences were found by drawing the same settings with both programs (`make peers-comfy`).

use tch::Kind;

use crate::{
    flow::Parameterization,
    nets::unet::UNetPart,
    provenance::drawing::Drawing,
    sample::{SampleSettings, sampler::Sampler, schedule::Schedule},
};

/// Largest guidance scale, PAG scale and shift of ComfyUI's nodes.
const MAX_SCALE: f64 = 100.0;
/// Shortest side of `EmptyLatentImage`.
const MIN_SIDE_PX: u32 = 16;
/// Longest side, and longest crop, of every node.
const MAX_SIDE_PX: u32 = 16384;
/// Largest number that a page holds exactly; its numbers are JavaScript's.
const MAX_PAGE_SEED: u64 = 1 << 53;

/// Returns what ComfyUI cannot reproduce of a drawing, one sentence each.
pub fn differences(drawing: &Drawing<'_>) -> Vec<String> {
    let mut found = text_differences(drawing);
    found.extend(refused_values(drawing));
    found.extend(sampler_differences(drawing.settings));
    found.extend(perturbed_parts(drawing.settings));
    let seed = drawing.settings.seed;
    if seed > MAX_PAGE_SEED {
        found.push(format!(
            "the page rounds seed {seed}, which is above 2^53: send `prompt` to the server instead"
        ));
    }
    if drawing.computed_in != Kind::Float {
        found.push(format!(
            "rectiflow computed in {}, where every program rounds in other places",
            dtype_name(drawing.computed_in)
        ));
    }
    found
}

fn dtype_name(kind: Kind) -> String {
    match kind {
        Kind::Half => "fp16".into(),
        Kind::BFloat16 => "bf16".into(),
        other => format!("{other:?}"),
    }
}

fn text_differences(drawing: &Drawing<'_>) -> Vec<String> {
    let mut found = Vec::new();
    if drawing.read_texts().any(|text| text.is_cut) {
        found.push(
            "a text is longer than three chunks of 75 tokens: rectiflow reads three, ComfyUI all"
                .to_owned(),
        );
    }
    let mut texts = drawing.read_texts();
    let odd = texts.find_map(|text| text.text.chars().find(|letter| is_read_otherwise(*letter)));
    if let Some(letter) = odd {
        found.push(format!(
            "a text contains U+{:04X}: ComfyUI with transformers 4 and without ftfy separates \
             Chinese characters, drops invisible and unknown ones, and writes a capital sigma \
             otherwise; with transformers 5 it reads them as rectiflow does",
            u32::from(letter)
        ));
    }
    found
}

/// Whether the tokenizer of transformers 4, in Python and without ftfy, reads a character otherwise
/// than the fast tokenizers. Characters that Unicode has not assigned are not listed.
fn is_read_otherwise(letter: char) -> bool {
    if matches!(letter, '\t' | '\n' | '\r') {
        return false;
    }
    letter.is_control() || is_invisible(letter) || is_ideograph(letter)
        // The sigma's small form, the combining iota and the replacement character.
        || matches!(letter, '\u{3a3}' | '\u{345}' | '\u{fffd}')
}

/// Unicode's format characters, and its private ones.
fn is_invisible(letter: char) -> bool {
    matches!(
        u32::from(letter),
        0xad | 0x600..=0x605
            | 0x61c
            | 0x6dd
            | 0x70f
            | 0x890..=0x891
            | 0x8e2
            | 0x180e
            | 0x200b..=0x200f
            | 0x202a..=0x202e
            | 0x2060..=0x206f
            | 0xe000..=0xf8ff
            | 0xfeff
            | 0xfff9..=0xfffb
            | 0x110bd
            | 0x110cd
            | 0x13430..=0x1343f
            | 0x1bca0..=0x1bca3
            | 0x1d173..=0x1d17a
            | 0xe0000..=0xe007f
            | 0xf0000..
    )
}

/// The blocks that transformers takes for Chinese characters.
fn is_ideograph(letter: char) -> bool {
    matches!(
        u32::from(letter),
        0x3400..=0x4dbf
            | 0x4e00..=0x9fff
            | 0xf900..=0xfaff
            | 0x20000..=0x2a6df
            | 0x2a700..=0x2ceaf
            | 0x2f800..=0x2fa1f
    )
}

/// Returns the values that exceed a limit of ComfyUI's nodes.
fn refused_values(drawing: &Drawing<'_>) -> Vec<String> {
    let mut found = Vec::new();
    let settings = drawing.settings;
    let guidance = settings.guidance();
    let mut scales = vec![("cfg", guidance.cfg), ("pag_scale", guidance.pag_scale)];
    if drawing.parameterization == Parameterization::Flow {
        scales.push(("shift", settings.shift));
    }
    for (name, value) in scales {
        if !(0.0..=MAX_SCALE).contains(&value) {
            found.push(format!(
                "ComfyUI refuses {name} {value}: its node takes 0 to {MAX_SCALE}"
            ));
        }
    }
    for (name, side) in [("width", settings.width_px), ("height", settings.height_px)] {
        if side < MIN_SIDE_PX {
            found.push(format!(
                "ComfyUI refuses a {name} of {side} px: its node takes at least {MIN_SIDE_PX}"
            ));
        }
    }
    found.extend(refused_size(settings));
    found
}

/// Returns the sentence about a size conditioning that exceeds the limit of `CLIPTextEncodeSDXL`.
fn refused_size(settings: &SampleSettings) -> Option<String> {
    let size = settings.size?;
    let longest = [
        size.original_width_px,
        size.original_height_px,
        size.crop_left_px,
        size.crop_top_px,
        size.target_width_px,
        size.target_height_px,
    ]
    .into_iter()
    .max()?;
    (longest > MAX_SIDE_PX).then(|| {
        format!(
            "ComfyUI refuses {longest} px in the size conditioning: its node takes at most \
             {MAX_SIDE_PX}"
        )
    })
}

fn sampler_differences(settings: &SampleSettings) -> Vec<String> {
    let mut found = Vec::new();
    if settings.sampler == Sampler::EulerAncestral {
        found.push(
            "ComfyUI draws the noise of euler_ancestral's steps as rectiflow does on a CPU only, \
             since its pull request 11528 of December 2025; before that, and on a GPU, it is other \
             noise"
                .to_owned(),
        );
        if settings.seed == u64::MAX {
            found.push(format!(
                "ComfyUI fails at seed {} with euler_ancestral, whose steps have one more as seed",
                u64::MAX
            ));
        }
    }
    let is_uni_pc = settings.sampler == Sampler::UniPc;
    if is_uni_pc && settings.steps == 1 {
        found.push("ComfyUI's uni_pc fails or draws noise with a single step".to_owned());
    }
    if is_uni_pc && settings.schedule == Schedule::Simple && settings.steps == 1000 {
        found.push(
            "ComfyUI's uni_pc has a step of length 0 with schedule simple and 1000 steps"
                .to_owned(),
        );
    }
    if is_uni_pc && settings.steps > UNI_PC_STEPS {
        found.push(format!(
            "uni_pc can differ a little from ComfyUI's with more than {UNI_PC_STEPS} steps"
        ));
    }
    if !is_uni_pc && settings.schedule == Schedule::KlOptimal && settings.steps == 1 {
        found.push("ComfyUI's kl_optimal divides by 0 with a single step".to_owned());
    }
    found
}

/// Steps up to which UniPC draws ComfyUI's picture. With schedule beta and 400 steps the largest
/// difference was 1 of 255, with 600 it was 2, with 800 it was 14; with schedule simple it was 1 at
/// 700 steps and 14 at 999 (the cases of `make peers-comfy`, 2026-11-30). Steps so short make its
/// linear systems almost singular.
const UNI_PC_STEPS: usize = 500;

/// Returns the sentence about perturbed attention outside of the middle block.
fn perturbed_parts(settings: &SampleSettings) -> Option<String> {
    let guidance = settings.guidance();
    if !guidance.is_perturbed() || guidance.pag_parts == [UNetPart::Mid] {
        return None;
    }
    let parts: Vec<String> = guidance.pag_parts.iter().map(ToString::to_string).collect();
    Some(format!(
        "attention was perturbed in {}; ComfyUI's node does it in mid",
        parts.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{provenance::drawing::DrawnText, sample::SizeConditioning};

    fn drawing<'a>(settings: &'a SampleSettings, prompt: &'a str) -> Drawing<'a> {
        Drawing {
            settings,
            parameterization: Parameterization::Flow,
            prompt: DrawnText::whole(prompt),
            negative: DrawnText::default(),
            model: "fox",
            file: Some("fox.safetensors"),
            computed_in: Kind::Float,
        }
    }

    fn of(settings: &SampleSettings, prompt: &str) -> String {
        differences(&drawing(settings, prompt)).join("\n")
    }

    fn sized(original_width_px: u32, crop_top_px: u32) -> Option<SizeConditioning> {
        Some(SizeConditioning {
            original_width_px,
            original_height_px: 64,
            crop_left_px: 0,
            crop_top_px,
            target_width_px: 64,
            target_height_px: 64,
        })
    }

    #[test]
    fn a_limit_is_named_when_it_is_exceeded_and_not_when_it_is_reached() {
        type Change = fn(&mut SampleSettings);
        let good: [(&str, Change); 7] = [
            ("the defaults", |_| ()),
            ("cfg", |s| s.cfg = 100.0),
            ("cfg", |s| s.cfg = 0.0),
            ("pag", |s| s.pag_scale = 100.0),
            ("shift", |s| s.shift = 100.0),
            ("side", |s| s.width_px = 16),
            ("seed", |s| s.seed = 1 << 53),
        ];
        for (name, change) in good {
            let mut settings = SampleSettings::default();
            change(&mut settings);
            assert_eq!(of(&settings, "a fox"), "", "{name}");
        }
        let bad: [(&str, Change); 15] = [
            ("cfg 100.5", |s| s.cfg = 100.5),
            ("cfg -1", |s| s.cfg = -1.0),
            ("pag_scale 101", |s| s.pag_scale = 101.0),
            ("pag_scale -2", |s| s.pag_scale = -2.0),
            ("shift 200", |s| s.shift = 200.0),
            ("width of 8", |s| s.width_px = 8),
            ("height of 8", |s| s.height_px = 8),
            ("2^53", |s| s.seed = (1 << 53) + 1),
            ("down.2, mid", |s| {
                s.pag_scale = 3.0;
                s.pag_parts = vec![UNetPart::Down(2), UNetPart::Mid];
            }),
            ("11528", |s| s.sampler = Sampler::EulerAncestral),
            ("one more", |s| {
                s.sampler = Sampler::EulerAncestral;
                s.seed = u64::MAX;
            }),
            ("uni_pc", |s| {
                s.sampler = Sampler::UniPc;
                s.steps = 1;
            }),
            ("length 0", |s| {
                s.sampler = Sampler::UniPc;
                s.steps = 1000;
            }),
            ("more than 500", |s| {
                s.sampler = Sampler::UniPc;
                s.schedule = Schedule::Beta;
                s.steps = 501;
            }),
            ("kl_optimal", |s| {
                s.schedule = Schedule::KlOptimal;
                s.steps = 1;
            }),
        ];
        for (needle, change) in bad {
            let mut settings = SampleSettings::default();
            change(&mut settings);
            let found = of(&settings, "a fox");
            assert!(found.contains(needle), "{needle}: {found}");
        }
    }

    #[test]
    fn a_size_is_named_beyond_its_limit() {
        for (size, is_refused) in [
            (sized(16384, 16384), false),
            (sized(16385, 0), true),
            (sized(64, 16385), true),
        ] {
            let settings = SampleSettings {
                size,
                ..Default::default()
            };
            assert_eq!(
                of(&settings, "a fox").contains("size conditioning"),
                is_refused
            );
        }
    }

    #[test]
    fn texts_that_comfyui_reads_otherwise_are_named_and_others_are_not() {
        let settings = SampleSettings::default();
        for same in [
            "a fox (red) {x|y} // c:\\ /* embedding:x",
            "une forêt, 한국어, ひらがな, 🐈 «x»\n\ttab\r\n",
            "e\u{301} ½² İ ß ﬁ",
        ] {
            assert_eq!(of(&settings, same), "", "{same:?}");
        }
        for other in [
            "猫",
            "赤い狐",
            "a\u{200b}b",
            "🐈\u{200d}⬛",
            "a\0b",
            "ΑΣ",
            "\u{fffd}",
            "\u{f8ff}",
            "\u{7f}",
        ] {
            let found = of(&settings, other);
            assert!(found.contains("transformers 4"), "{other:?}: {found}");
        }
    }

    #[test]
    fn a_negative_prompt_counts_where_it_is_read() {
        let cut = DrawnText {
            text: "猫 and more",
            is_cut: true,
        };
        for (cfg, num_found) in [(1.0, 0), (4.5, 2)] {
            let settings = SampleSettings {
                cfg,
                ..Default::default()
            };
            let drawing = Drawing {
                negative: cut,
                ..drawing(&settings, "a fox")
            };
            assert_eq!(differences(&drawing).len(), num_found, "cfg {cfg}");
        }
    }

    #[test]
    fn another_dtype_is_named() {
        let settings = SampleSettings::default();
        let drawing = Drawing {
            computed_in: Kind::BFloat16,
            ..drawing(&settings, "a fox")
        };
        assert!(differences(&drawing)[0].contains("bf16"));
    }
}
