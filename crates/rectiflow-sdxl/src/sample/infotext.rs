//! The settings of a picture as text, in the form that AUTOMATIC1111's web interface writes and
//! many programs read.
//!
//! The prompt, a line with the negative prompt, a line of `Key: value` pairs; a value that contains
//! a comma, a colon or a quote is a JSON string. Samplers and schedules have the web interface's
//! names, so that it can read them back. It keeps unknown keys (`Shift`, `CFG rescale`,
//! `PAG scale`...) unchanged.

use std::fmt::Write;

use crate::{
    flow::Parameterization,
    nets::unet::UNetPart,
    sample::{SampleSettings, SizeConditioning, guidance::Guidance, schedule::Schedule},
};

/// The origin of a picture, as input of [`infotext`] and [`crate::workflow::Workflow`].
#[derive(Debug, Clone, Copy)]
pub struct Drawing<'a> {
    /// The sampling settings.
    pub settings: &'a SampleSettings,
    /// The model's parameterization.
    pub parameterization: Parameterization,
    /// The prompt.
    pub prompt: &'a str,
    /// The negative prompt; empty for none.
    pub negative: &'a str,
    /// The model's file name without extension.
    pub model: &'a str,
}

/// Returns the text of the picture at a position of its batch, from 0.
pub fn infotext(drawing: &Drawing<'_>, position: usize) -> String {
    let mut text = drawing.prompt.to_owned();
    if !drawing.negative.is_empty() {
        let _ = write!(text, "\nNegative prompt: {}", drawing.negative);
    }
    let pairs: Vec<String> = pairs(drawing, position)
        .into_iter()
        .map(|(key, value)| format!("{key}: {}", quoted(&value)))
        .collect();
    format!("{text}\n{}", pairs.join(", "))
}

/// A key and its value.
type Pair = (&'static str, String);

/// Returns all settings of a picture, in the web interface's order.
fn pairs(drawing: &Drawing<'_>, position: usize) -> Vec<Pair> {
    let settings = drawing.settings;
    let mut pairs = main_pairs(drawing);
    if drawing.parameterization == Parameterization::Flow {
        pairs.push(("Shift", settings.shift.to_string()));
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
    ]
}

/// Returns the settings of guidance besides its scale.
fn guidance_pairs(guidance: &Guidance) -> Vec<Pair> {
    let mut pairs = Vec::new();
    if guidance.is_guided() && guidance.cfg_rescale > 0.0 {
        pairs.push(("CFG rescale", guidance.cfg_rescale.to_string()));
    }
    if guidance.is_perturbed() {
        pairs.push(("PAG scale", guidance.pag_scale.to_string()));
        if guidance.pag_parts != [UNetPart::Mid] {
            let parts: Vec<String> = guidance.pag_parts.iter().map(ToString::to_string).collect();
            pairs.push(("PAG parts", parts.join(" ")));
        }
    }
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

/// Returns a value unchanged, or as a JSON string if it would parse as several.
fn quoted(value: &str) -> String {
    if value.contains([',', ':', '\n', '"']) {
        serde_json::Value::from(value).to_string()
    } else {
        value.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::sampler::Sampler;

    #[test]
    fn a_plain_picture_has_a_plain_text() {
        let settings = SampleSettings {
            width_px: 832,
            height_px: 1216,
            seed: 5,
            ..Default::default()
        };
        let drawing = Drawing {
            settings: &settings,
            parameterization: Parameterization::Flow,
            prompt: "a fox",
            negative: "",
            model: "fox",
        };
        let expected = format!(
            "a fox\nSteps: 28, Sampler: Euler, Schedule type: Simple, CFG scale: 4.5, Seed: 5, \
             Size: 832x1216, Model: fox, Shift: 6, Version: rectiflow {}",
            env!("CARGO_PKG_VERSION")
        );
        assert_eq!(infotext(&drawing, 0), expected);
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
            settings: &settings,
            parameterization: Parameterization::Eps,
            prompt: "a fox",
            negative: "blurry, grey",
            model: "fox, v2: \"red\"",
        };
        let text = infotext(&drawing, 2);
        for needle in [
            "a fox\nNegative prompt: blurry, grey\nSteps: 28, Sampler: DPM++ 2M SDE, \
             Schedule type: SGM Uniform, ",
            "Model: \"fox, v2: \\\"red\\\"\", CFG rescale: 0.7, PAG scale: 3, \
             PAG parts: mid up.0, ",
            "Original size: 1000x1500, Crop: +3+5, Target size: 1024x1024, Batch size: 4, \
             Batch pos: 2, Version: ",
        ] {
            assert!(text.contains(needle), "{needle}: {text}");
        }
        assert!(!text.contains("Shift"), "eps has none: {text}");
    }
}
