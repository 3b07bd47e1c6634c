//! The settings of a picture as text, in the form that AUTOMATIC1111's web interface writes and
//! many programs read.
//!
//! The prompt, a line with the negative prompt, a line of `Key: value` pairs; a value that would
//! parse as several is a JSON string. Samplers and schedules have the web interface's names, so
//! that it can read them back. It keeps unknown keys (`Shift`, `CFG rescale`, `PAG scale`...)
//! unchanged; Forge's and reForge's own keys for the same settings stand beside them. Forge has no
//! RescaleCFG (its latent modifier rescales something else), and no shift for SDXL.
//!
//! Our prompts are literal, the web interface's are not. Brackets and backslashes get a backslash,
//! as its parser expects. That parser also drops a lone backslash, which splits what it would take
//! for a keyword: `A\ND`, `B\REAK`, `<\lora:x:1>`, `/\/` (reForge's comments), `10:\30` (a
//! weight at the end of a text), `\Negative prompt:`. What no backslash helps is in [`remarks`].

use std::fmt::Write;

use crate::{
    flow::Parameterization,
    nets::unet::UNetPart,
    provenance::drawing::Drawing,
    sample::{SizeConditioning, guidance::Guidance, schedule::Schedule},
};

/// Begins the negative prompt where it begins a line.
const NEGATIVE: &str = "Negative prompt:";
/// Words between which the web interface divides a prompt.
const DIVIDERS: [&str; 2] = ["AND", "BREAK"];
/// Comments of reForge; all pairs are ASCII.
const COMMENTS: [&str; 3] = ["//", "/*", "*/"];

/// Returns the text of the picture at a position of its batch, from 0.
pub fn infotext(drawing: &Drawing<'_>, position: usize) -> String {
    let mut text = escaped(drawing.prompt.text);
    if !drawing.negative.text.is_empty() {
        let _ = write!(text, "\n{NEGATIVE} {}", escaped(drawing.negative.text));
    }
    let mut remarks = remarks(drawing);
    let mut pairs = pairs(drawing, position);
    if !remarks.is_empty() {
        remarks.insert(0, "not as drawn".to_owned());
        pairs.push(("Remark", remarks.join("; ")));
    }
    let mut fields = Vec::new();
    for (key, value) in pairs {
        fields.push(format!("{key}: {}", quoted(&value)));
    }
    format!("{text}\n{}", fields.join(", "))
}

/// Returns why the web interface does not read a drawing's texts as they were drawn, one sentence
/// each.
pub fn remarks(drawing: &Drawing<'_>) -> Vec<String> {
    let texts = [drawing.prompt.text, drawing.negative.text];
    let mut remarks = Vec::new();
    if texts.iter().any(|text| text.contains('#')) {
        remarks.push(
            "the web interface reads # and the rest of its line as a comment, unless its option \
             \"Enable comments\" is off"
                .to_owned(),
        );
    }
    if texts.iter().any(|text| text.contains('\0')) {
        remarks.push("the text in the picture is without the prompt's NUL characters".to_owned());
    }
    remarks
}

/// Returns the text that the web interface's parsers read as `text`.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    let weight_at = weight_at_the_end(text);
    let mut before = '\n';
    for (at_byte, letter) in text.char_indices() {
        let rest = &text[at_byte..];
        let is_special = matches!(letter, '\\' | '(' | ')' | '[' | ']');
        if is_special
            || weight_at == Some(at_byte)
            || begins_a_keyword(&text[..at_byte], rest)
            || is_inside(COMMENTS, before, letter)
            || is_network(before, rest)
        {
            escaped.push('\\');
        }
        // A PNG's text ends at a NUL.
        if letter != '\0' {
            escaped.push(letter);
        }
        before = letter;
    }
    escaped
}

/// Whether a backslash before `rest` splits a word that the web interface would act on: behind the
/// first letter of a divider, or before "Negative prompt:" at the start of a line.
fn begins_a_keyword(before: &str, rest: &str) -> bool {
    if rest.starts_with(NEGATIVE) {
        let line = before.rsplit('\n').next().unwrap_or(before);
        return line.trim().is_empty();
    }
    DIVIDERS.iter().any(|word| {
        let (first, others) = word.split_at(1);
        let outside = before.strip_suffix(first);
        let is_split = rest.starts_with(others) && outside.is_some();
        is_split
            && !outside.is_some_and(|text| text.ends_with(is_of_a_word))
            && !rest[others.len()..].starts_with(is_of_a_word)
    })
}

/// Whether Python's `\b` surely takes a character for part of a word. A needless backslash is
/// dropped like any other.
fn is_of_a_word(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || letter == '_'
}

/// Whether two characters that follow each other are one of `pairs`.
fn is_inside(pairs: [&str; 3], before: char, letter: char) -> bool {
    pairs
        .iter()
        .any(|pair| pair.starts_with(before) && pair.ends_with(letter))
}

/// Whether `rest`, behind a `<`, names an extra network: `lora:x:1>`.
fn is_network(before: char, rest: &str) -> bool {
    let is_outside = |letter: char| matches!(letter, '<' | '>' | ':') || letter.is_whitespace();
    let after_name = rest.find(is_outside).map(|at| &rest[at..]);
    before == '<' && after_name.is_some_and(|after| after.starts_with(':') && after != rest)
}

/// Returns the byte behind a colon at which a text ends in a number, which the web interface takes
/// for the text's weight.
fn weight_at_the_end(text: &str) -> Option<usize> {
    let (before, number) = text.trim_end().rsplit_once(':')?;
    let digits = number.trim_start().trim_start_matches(['+', '-']);
    let is_number = digits.starts_with(|c: char| c.is_numeric() || c == '.')
        && digits.chars().all(|c| c.is_numeric() || c == '.');
    is_number.then_some(before.len() + 1)
}

/// A key and its value.
type Pair = (&'static str, String);

/// Returns all settings of a picture, in the web interface's order.
fn pairs(drawing: &Drawing<'_>, position: usize) -> Vec<Pair> {
    let settings = drawing.settings;
    let mut pairs = main_pairs(drawing);
    if drawing.parameterization == Parameterization::Flow {
        pairs.extend(shift_pairs(settings.shift));
    }
    pairs.extend(guidance_pairs(&settings.guidance()));
    pairs.extend(settings.size.iter().flat_map(size_pairs));
    if settings.batch > 1 {
        pairs.push(("Batch size", settings.batch.to_string()));
        pairs.push(("Batch pos", position.to_string()));
    }
    pairs.push((
        "Version",
        format!("rectiflow {}", env!("CARGO_PKG_VERSION")),
    ));
    pairs
}

/// Returns the settings that every text has.
fn main_pairs(drawing: &Drawing<'_>) -> Vec<Pair> {
    let settings = drawing.settings;
    let size = format!("{}x{}", settings.width_px, settings.height_px);
    vec![
        ("Steps", settings.steps.to_string()),
        ("Sampler", settings.sampler.web_name().to_owned()),
        ("Schedule type", schedule_name(settings.schedule).to_owned()),
        ("CFG scale", settings.cfg.to_string()),
        ("Seed", settings.seed.to_string()),
        ("Size", size),
        ("Model", drawing.model.to_owned()),
        // Where the noise comes from; without it programs take a GPU's.
        ("RNG", "CPU".to_owned()),
    ]
}

/// Returns the shift of a flow model, and reForge's keys for it.
fn shift_pairs(shift: f64) -> [Pair; 4] {
    [
        ("Shift", shift.to_string()),
        ("advanced_sampling_enabled", "True".to_owned()),
        ("advanced_sampling_mode", "SD3".to_owned()),
        ("sd3_shift", shift.to_string()),
    ]
}

/// Returns the settings of guidance besides its scale, with reForge's keys for RescaleCFG and
/// Forge's for PAG.
fn guidance_pairs(guidance: &Guidance) -> Vec<Pair> {
    let mut pairs = Vec::new();
    if guidance.is_guided() && guidance.cfg_rescale > 0.0 {
        let multiplier = guidance.cfg_rescale.to_string();
        pairs.extend([
            ("CFG rescale", multiplier.clone()),
            ("rescale_cfg_enabled", "True".to_owned()),
            ("rescale_cfg_version", "Normal".to_owned()),
            ("rescale_cfg_multiplier", multiplier),
        ]);
    }
    if guidance.is_perturbed() {
        pairs.extend(perturbation_pairs(guidance));
    }
    pairs
}

fn perturbation_pairs(guidance: &Guidance) -> Vec<Pair> {
    let scale = guidance.pag_scale.to_string();
    let mut pairs = vec![("PAG scale", scale.clone())];
    if guidance.pag_parts != [UNetPart::Mid] {
        let parts: Vec<String> = guidance.pag_parts.iter().map(ToString::to_string).collect();
        pairs.push(("PAG parts", parts.join(" ")));
        return pairs;
    }
    pairs.extend([
        ("pagi_enabled", "True".to_owned()),
        ("pagi_scale", scale),
        ("pagi_attenuation", "0".to_owned()),
        ("pagi_start_step", "0".to_owned()),
        ("pagi_end_step", "1".to_owned()),
    ]);
    pairs
}

/// Returns the size conditioning.
fn size_pairs(size: &SizeConditioning) -> [Pair; 3] {
    [
        (
            "Original size",
            format!("{}x{}", size.original_width_px, size.original_height_px),
        ),
        (
            "Crop",
            format!("+{}+{}", size.crop_left_px, size.crop_top_px),
        ),
        (
            "Target size",
            format!("{}x{}", size.target_width_px, size.target_height_px),
        ),
    ]
}

/// Returns the web interface's name of a schedule.
fn schedule_name(schedule: Schedule) -> &'static str {
    match schedule {
        Schedule::Simple => "Simple",
        Schedule::Normal => "Normal",
        Schedule::SgmUniform => "SGM Uniform",
        Schedule::Beta => "Beta",
        Schedule::Karras => "Karras",
        Schedule::Exponential => "Exponential",
        Schedule::DdimUniform => "DDIM",
        Schedule::KlOptimal => "KL Optimal",
    }
}

/// Returns a value unchanged, or as a JSON string if it would parse as several or as another one.
fn quoted(value: &str) -> String {
    let is_special = |letter: char| matches!(letter, ',' | ':' | '"') || letter.is_control();
    if value.contains(is_special) || value.trim() != value {
        serde_json::Value::from(value).to_string()
    } else {
        value.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::{
        provenance::drawing::DrawnText,
        sample::{SampleSettings, sampler::Sampler},
    };

    fn drawing(settings: &SampleSettings) -> Drawing<'_> {
        Drawing {
            settings,
            parameterization: Parameterization::Flow,
            prompt: DrawnText::whole("a fox"),
            negative: DrawnText::default(),
            model: "fox",
            file: Some("fox.safetensors"),
            computed_in: Kind::Float,
        }
    }

    #[test]
    fn a_plain_picture_has_a_plain_text() {
        let settings = SampleSettings {
            width_px: 832,
            height_px: 1216,
            seed: 5,
            ..Default::default()
        };
        let expected = format!(
            "a fox\nSteps: 28, Sampler: Euler, Schedule type: Simple, CFG scale: 4.5, Seed: 5, \
             Size: 832x1216, Model: fox, RNG: CPU, Shift: 6, advanced_sampling_enabled: True, \
             advanced_sampling_mode: SD3, sd3_shift: 6, Version: rectiflow {}",
            env!("CARGO_PKG_VERSION")
        );
        assert_eq!(infotext(&drawing(&settings), 0), expected);
    }

    #[test]
    fn everything_that_was_set_is_said_and_values_are_quoted() {
        let size = SizeConditioning {
            original_width_px: 1000,
            original_height_px: 1500,
            crop_left_px: 3,
            crop_top_px: 5,
            target_width_px: 1024,
            target_height_px: 1024,
        };
        let settings = SampleSettings {
            sampler: Sampler::DpmPp2mSde,
            schedule: Schedule::SgmUniform,
            cfg_rescale: 0.7,
            pag_scale: 3.0,
            pag_parts: vec![UNetPart::Mid, UNetPart::Up(0)],
            batch: 4,
            size: Some(size),
            ..Default::default()
        };
        let drawing = Drawing {
            parameterization: Parameterization::Eps,
            negative: DrawnText::whole("blurry, grey"),
            model: "fox, v2: \"red\"\nb",
            ..drawing(&settings)
        };
        let text = infotext(&drawing, 2);
        for needle in [
            "a fox\nNegative prompt: blurry, grey\nSteps: 28, Sampler: DPM++ 2M SDE, \
             Schedule type: SGM Uniform, ",
            "Model: \"fox, v2: \\\"red\\\"\\nb\", RNG: CPU, CFG rescale: 0.7, \
             rescale_cfg_enabled: True, rescale_cfg_version: Normal, \
             rescale_cfg_multiplier: 0.7, PAG scale: 3, PAG parts: mid up.0, ",
            "Original size: 1000x1500, Crop: +3+5, Target size: 1024x1024, Batch size: 4, \
             Batch pos: 2, Version: ",
        ] {
            assert!(text.contains(needle), "{needle}: {text}");
        }
        assert!(!text.contains("hift"), "eps has no shift: {text}");
        assert!(!text.contains("pagi"), "Forge perturbs the middle: {text}");
        let middle = SampleSettings {
            pag_scale: 3.0,
            ..Default::default()
        };
        let text = infotext(&self::drawing(&middle), 0);
        assert!(
            text.contains("PAG scale: 3, pagi_enabled: True, pagi_scale: 3, "),
            "{text}"
        );
    }

    /// Prompts and negative prompts that the web interface would interpret, if they were not
    /// escaped.
    const INTERPRETED: [(&str, &str); 40] = [
        ("a fox", ""),
        ("", ""),
        ("", "a (grey) fox"),
        ("a (red) fox, ((very)) red (fox:1.2)", "(bad:1.4)"),
        ("a [red] fox [on:off:0.5] [a|b]", "[grey]"),
        ("\\", "\\"),
        ("a\\", "\\("),
        ("C:\\fox\\(1\\)", ""),
        ("a \\ b \\\\ c", ""),
        ("a AND b", "b AND c"),
        ("AND", "AND:2"),
        ("ANDAND BRAND LANDAND and AND_ _AND ÄAND AND, (AND)", ""),
        ("a BREAK b", "BREAK"),
        ("BREAKS BREAK. BREAK BREAK", ""),
        ("a AND BREAK AND b", ""),
        ("a <lora:x:1> fox <hypernet:y>", "<lora:x:0.5>"),
        ("<b> a < b:c > d <:e> <lora:", ""),
        ("<lora:AND:1> <AND:1>", ""),
        ("see https://fox.org/a//b", "//"),
        ("/* a */ fox /*", "*/ b"),
        ("///**/*/", ""),
        ("at 10:30", "at 10:30"),
        ("a ratio of 1: 2 ", ": -.5"),
        ("12:+3.\n", "a:b:7"),
        ("a AND 10:30 AND b", ""),
        ("10:30 (at night:2)", ""),
        ("Negative prompt: x", "Negative prompt: y"),
        ("a\nNegative prompt: b", ""),
        ("a\n  \tNegative prompt: b", "c\nNegative prompt:\nd"),
        ("a Negative prompt: b", ""),
        ("Negative prompt:", "Negative prompt:"),
        ("a\nb\n\n  c\r\nd", "e\n\nf"),
        ("Steps: 20, Sampler: Heun, CFG scale: 7, Seed: 1", ""),
        (
            "a\nSteps: 20, Sampler: Heun, CFG scale: 7",
            "Steps: 20, Size: 8x8, Seed: 3",
        ),
        ("a {b|c} | d __e__ 100%", ""),
        ("\"a, b\": 'c', \"d\\\"", "\""),
        ("赤い狐 (赤:2) é 🐈", "猫 AND 犬"),
        ("embedding:x <lora:猫:1>", ""),
        (":", "::"),
        ("a:)", "(:"),
    ];
    const MODELS: [&str; 4] = ["fox", "fox, v2: \"red\"", "two\nlines", " \\spaced "];
    const RECORDED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/infotext.json");

    /// Returns the texts of the prompts above, as `scripts/golden/infotext.py` reads them.
    fn written() -> Vec<serde_json::Value> {
        let settings = SampleSettings {
            cfg_rescale: 0.5,
            pag_scale: 2.0,
            ..Default::default()
        };
        let mut cases = Vec::new();
        for (index, (prompt, negative)) in INTERPRETED.into_iter().enumerate() {
            let model = MODELS[index % MODELS.len()];
            let drawing = Drawing {
                prompt: DrawnText::whole(prompt),
                negative: DrawnText::whole(negative),
                model,
                ..drawing(&settings)
            };
            let text = infotext(&drawing, 0).replace(env!("CARGO_PKG_VERSION"), "VERSION");
            cases.push(serde_json::json!({
                "prompt": prompt, "negative": negative, "model": model, "infotext": text
            }));
        }
        cases
    }

    /// The words of a text, which are all that CLIP reads of its white space.
    fn words(text: &serde_json::Value) -> Vec<&str> {
        text.as_str().unwrap().split_whitespace().collect()
    }

    /// `scripts/golden/infotext.py` records what Forge's and reForge's own parsers read of these
    /// texts. `RECTIFLOW_WRITE_INFOTEXTS=1` writes the texts for it.
    #[test]
    fn forge_and_reforge_read_the_texts_back() {
        let written = written();
        if std::env::var_os("RECTIFLOW_WRITE_INFOTEXTS").is_some() {
            let json = serde_json::json!({ "cases": written });
            let json = serde_json::to_string_pretty(&json).unwrap();
            std::fs::write(RECORDED, json + "\n").unwrap();
            return;
        }
        let recorded = std::fs::read_to_string(RECORDED).unwrap();
        let recorded: serde_json::Value = serde_json::from_str(&recorded).unwrap();
        let cases = recorded["cases"].as_array().unwrap();
        assert_eq!(cases.len(), written.len());
        for (case, ours) in cases.iter().zip(&written) {
            for key in ["prompt", "negative", "model", "infotext"] {
                assert_eq!(case[key], ours[key]);
            }
            for program in ["forge", "reforge"] {
                let read = &case[program];
                for key in ["prompt", "negative"] {
                    assert_eq!(words(&read[key]), words(&case[key]), "{program}: {case}");
                }
                assert_eq!(read["model"], case["model"], "{program}: {case}");
                let settings = &read["settings"];
                assert_eq!(settings["RNG"], "CPU", "{case}");
                assert_eq!(
                    (&settings["Shift"], &settings["sd3_shift"]),
                    (&"6".into(), &"6".into())
                );
                assert_eq!(settings["rescale_cfg_multiplier"], "0.5");
                assert_eq!(settings["pagi_scale"], "2");
            }
        }
    }

    #[test]
    fn what_no_backslash_helps_is_remarked() {
        let settings = SampleSettings::default();
        for (prompt, negative, expected) in [
            ("a fox", "", ""),
            ("the #1 fox", "", "comment"),
            ("a fox", "C#", "comment"),
            ("a\0fox", "", "NUL"),
        ] {
            let drawing = Drawing {
                prompt: DrawnText::whole(prompt),
                negative: DrawnText::whole(negative),
                ..drawing(&settings)
            };
            let found = remarks(&drawing).join("; ");
            assert!(found.contains(expected) && found.is_empty() == expected.is_empty());
            let text = infotext(&drawing, 0);
            assert_eq!(text.contains("Remark: "), !expected.is_empty(), "{text}");
            assert!(!text.contains('\0'));
        }
    }
}
