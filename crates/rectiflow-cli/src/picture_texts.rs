//! The texts in a PNG by which other programs draw the picture again, and what is said of them.

use std::path::Path;

use rectiflow_data::{overflow::Overflow, token::Cut};
use rectiflow_sdxl::{
    drawing::{Drawing, DrawnText},
    infotext::{infotext, remarks},
    workflow::{Workflow, ascii_json},
};
use serde_json::json;

/// Keywords of PNG chunks with their texts.
pub(crate) type PngTexts = Vec<(&'static str, String)>;

/// The keyword of our own text, which no other program reads.
const OWN_KEYWORD: &str = "rectiflow";
/// Largest number of sentences that are logged; the answer has all of them.
const MAX_LOGGED: usize = 6;

/// How other programs know a model.
#[derive(Debug)]
pub(crate) struct ModelNames {
    /// The file or folder, without the ending of a single file.
    pub(crate) name: String,
    /// The single file; `None` for a folder.
    pub(crate) file: Option<String>,
}

impl ModelNames {
    pub(crate) fn of(path: &Path) -> Self {
        let full = || path.canonicalize().ok();
        let last = path.file_name().map(ToOwned::to_owned);
        let last = last.or_else(|| full()?.file_name().map(ToOwned::to_owned));
        let last = last.unwrap_or_else(|| path.as_os_str().to_owned());
        let last = last.to_string_lossy();
        let name = [".safetensors", ".sft"]
            .iter()
            .find_map(|ending| last.strip_suffix(ending))
            .unwrap_or(&last);
        Self {
            name: name.to_owned(),
            file: path.is_file().then(|| last.clone().into_owned()),
        }
    }
}

/// A text, and whether its end is not read.
pub(crate) fn drawn(text: &str) -> DrawnText<'_> {
    DrawnText {
        text,
        is_cut: Overflow::of(text, Cut::Plain).is_some(),
    }
}

/// The texts of the picture at a position of its batch.
pub(crate) fn picture_texts(drawing: &Drawing<'_>, position: usize) -> PngTexts {
    let workflow = Workflow::new(drawing);
    vec![
        ("parameters", infotext(drawing, position)),
        ("prompt", ascii_json(&workflow.prompt())),
        ("workflow", ascii_json(&workflow.workflow())),
    ]
}

/// The texts of a sheet of pictures. The pictures of one prompt are one batch, which one graph
/// draws. Those of several prompts have no text that another program would take for a recipe.
pub(crate) fn sheet_texts(drawing: &Drawing<'_>, prompts: &[String]) -> PngTexts {
    let mut texts = match prompts {
        [prompt] => picture_texts(&of_prompt(drawing, prompt), 0),
        _ => Vec::new(),
    };
    let own = json!({
        "model": drawing.model,
        "prompts": prompts,
        "negative": drawing.negative.text,
        "parameterization": drawing.parameterization.to_string(),
        "settings": drawing.settings,
    });
    texts.push((OWN_KEYWORD, ascii_json(&own)));
    texts
}

/// The bytes that a sheet of this model holds.
pub(crate) fn sheet_mark(model: &str) -> String {
    format!("\"model\":{}", ascii_json(&model.into()))
}

/// The drawing of another prompt.
pub(crate) fn of_prompt<'a>(drawing: &Drawing<'a>, prompt: &'a str) -> Drawing<'a> {
    Drawing {
        prompt: drawn(prompt),
        ..*drawing
    }
}

/// What other programs do not draw as it was drawn here, each sentence once.
#[derive(Debug, Default)]
pub(crate) struct Elsewhere {
    /// Differences of ComfyUI.
    pub(crate) differences: Vec<String>,
    /// What the readers of `parameters` take otherwise.
    pub(crate) remarks: Vec<String>,
    /// What ComfyUI needs before.
    pub(crate) needs: Option<String>,
}

impl Elsewhere {
    pub(crate) fn of(drawing: &Drawing<'_>, prompts: &[String]) -> Self {
        let mut found = Self::default();
        for prompt in prompts {
            let drawing = of_prompt(drawing, prompt);
            let workflow = Workflow::new(&drawing);
            add_new(&mut found.differences, workflow.differences());
            add_new(&mut found.remarks, &remarks(&drawing));
            found.needs = workflow.needs().map(str::to_owned);
        }
        found
    }

    /// Warns of what cannot be drawn elsewhere.
    pub(crate) fn log(&self) {
        if let Some(needs) = &self.needs {
            tracing::info!("ComfyUI: {needs}");
        }
        warn_all("ComfyUI draws another picture", &self.differences);
        warn_all("`parameters` are read otherwise", &self.remarks);
    }
}

fn add_new(list: &mut Vec<String>, sentences: &[String]) {
    for sentence in sentences {
        if !list.contains(sentence) {
            list.push(sentence.clone());
        }
    }
}

fn warn_all(what: &str, sentences: &[String]) {
    for sentence in sentences.iter().take(MAX_LOGGED) {
        tracing::warn!("{what}: {sentence}");
    }
    let num_more = sentences.len().saturating_sub(MAX_LOGGED);
    if num_more > 0 {
        tracing::warn!("{what}: {num_more} more reasons, which --json lists");
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rectiflow_sdxl::{flow::Parameterization, sample::SampleSettings};
    use tch::Kind;

    use super::*;

    fn drawing(settings: &SampleSettings) -> Drawing<'_> {
        Drawing {
            settings,
            parameterization: Parameterization::Flow,
            prompt: DrawnText::default(),
            negative: DrawnText::whole("grey"),
            model: "fox \"2\"",
            file: Some("fox \"2\".safetensors"),
            computed_in: Kind::Float,
        }
    }

    #[test]
    fn a_sheet_of_one_prompt_is_a_recipe_and_of_several_is_none() {
        let settings = SampleSettings::default();
        let drawing = drawing(&settings);
        let keywords = |prompts: &[&str]| {
            let prompts: Vec<String> = prompts.iter().map(ToString::to_string).collect();
            let texts = sheet_texts(&drawing, &prompts);
            let own = &texts.last().expect("our own text").1;
            assert!(own.contains(&sheet_mark("fox \"2\"")), "{own}");
            texts.iter().map(|(word, _)| *word).collect::<Vec<_>>()
        };
        assert_eq!(
            keywords(&["a fox"]),
            ["parameters", "prompt", "workflow", "rectiflow"]
        );
        assert_eq!(keywords(&["a fox", "a cat"]), ["rectiflow"]);
        let one = sheet_texts(&drawing, &["a fox".to_owned()]);
        assert_eq!(one[..3], picture_texts(&of_prompt(&drawing, "a fox"), 0));
        assert!(one[0].1.starts_with("a fox\nNegative prompt: grey\n"));
    }

    #[test]
    fn models_have_the_names_that_other_programs_see() {
        let folder = tempfile::tempdir().unwrap();
        for (name, expected, is_file) in [
            ("fox.safetensors", "fox", true),
            ("fox.sft", "fox", true),
            ("fox v1.5", "fox v1.5", true),
            ("step-8", "step-8", false),
            ("two\nlines.safetensors", "two\nlines", true),
        ] {
            let path = folder.path().join(name);
            if is_file {
                fs::write(&path, "").unwrap();
            } else {
                fs::create_dir(&path).unwrap();
            }
            let names = ModelNames::of(&path);
            assert_eq!(names.name, expected);
            assert_eq!(names.file, is_file.then(|| name.to_owned()));
        }
    }

    #[test]
    fn each_reason_is_said_once() {
        let settings = SampleSettings {
            cfg: 200.0,
            ..Default::default()
        };
        let long = "fox ".repeat(300);
        let prompts = ["a #1 fox", "a #2 fox", long.as_str(), long.as_str()].map(str::to_owned);
        let found = Elsewhere::of(&drawing(&settings), &prompts);
        assert_eq!((found.differences.len(), found.remarks.len()), (2, 1));
        let found = found.differences.join("\n");
        assert!(
            found.contains("cfg 200") && found.contains("three chunks"),
            "{found}"
        );
    }
}
