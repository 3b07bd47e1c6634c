//! The model card of an export, in Markdown: what the model is, how and on which data it was
//! trained, how to use it.
//!
//! Everything in it comes from the model itself: a training checkpoint names its recipe, its data
//! sets and its frozen parts. The card of a converted model says what it was converted from.
//! Nothing is guessed.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use rectiflow_sdxl::{flow::Parameterization, model_spec::usage_hint};
use rectiflow_train::checkpoint::{self, Saved};

use crate::terminal::numbers;

/// Facts about a model.
#[derive(Debug)]
pub(crate) struct ModelCard {
    /// A name: the model's file or folder, and for a checkpoint its run as well.
    pub(crate) title: String,
    /// A PNG of samples drawn with exactly this checkpoint, if the run has one.
    pub(crate) samples: Option<Vec<u8>>,
    parameterization: Option<Parameterization>,
    shift: f64,
    source: String,
    training: Option<Training>,
}

#[derive(Debug)]
struct Training {
    saved: Saved,
    recipe: String,
}

impl ModelCard {
    /// The card of the model at `path`; `shift` is the recommended sampling shift.
    pub(crate) fn of(
        path: &Path,
        parameterization: Option<Parameterization>,
        shift: f64,
    ) -> anyhow::Result<Self> {
        let is_checkpoint = checkpoint::is_checkpoint(path);
        let names = names(path);
        let title = names[names
            .len()
            .saturating_sub(if is_checkpoint { 2 } else { 1 })..]
            .join(" ");
        let training = is_checkpoint.then(|| Training::read(path)).transpose()?;
        let samples = if is_checkpoint {
            samples_of(path)?
        } else {
            None
        };
        let source = names.last().cloned().unwrap_or_default();
        Ok(Self {
            title,
            samples,
            parameterization,
            shift,
            source,
            training,
        })
    }

    /// The model in a sentence or two, for the header of a file.
    pub(crate) fn description(&self) -> String {
        let kind = match self.parameterization {
            Some(Parameterization::Flow) => {
                "A Stable Diffusion XL that predicts velocity (rectified flow)"
            }
            Some(Parameterization::V) => "A Stable Diffusion XL with v-prediction",
            Some(Parameterization::Eps) | None => "A Stable Diffusion XL",
        };
        match &self.training {
            Some(Training { saved, .. }) => {
                let position = saved.position;
                let samples = numbers::grouped(position.samples);
                format!(
                    "{kind}, trained by {} on {samples} samples in {} updates.",
                    saved.program, position.update
                )
            }
            None => format!(
                "{kind}, converted from {} by rectiflow {}.",
                self.source,
                env!("CARGO_PKG_VERSION")
            ),
        }
    }

    /// The YAML block that the Hugging Face hub reads from the top of a README.
    pub(crate) fn front_matter(&self) -> String {
        let flow = if self.parameterization == Some(Parameterization::Flow) {
            "- rectified-flow\n"
        } else {
            ""
        };
        format!(
            "---\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags:\n- stable-diffusion-xl\n{flow}---\n\n"
        )
    }

    /// The whole card; `picture` is the file name of the samples.
    pub(crate) fn markdown(&self, picture: &str) -> String {
        let mut text = format!("# {}\n\n{}\n", self.title, self.description());
        if self.samples.is_some() {
            text += &format!("\n![Samples of this checkpoint]({picture})\n");
        }
        let hint = self
            .parameterization
            .map(|p| usage_hint(p, self.shift))
            .unwrap_or_default();
        if !hint.is_empty() {
            text += &format!("\n## Use\n\n{hint}\n");
        }
        if self.parameterization == Some(Parameterization::Flow) {
            text += "\nIn diffusers the exported folder opens in the stock `StableDiffusionXLPipeline`; its scheduler is \
                     Euler's method on flow sigmas.\n";
        }
        if let Some(training) = &self.training {
            training.write(&mut text);
        }
        text
    }
}

impl Training {
    fn read(checkpoint: &Path) -> anyhow::Result<Self> {
        let path = checkpoint.join("recipe.toml");
        let recipe = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        Ok(Self {
            saved: Saved::read(checkpoint)?,
            recipe,
        })
    }

    fn write(&self, text: &mut String) {
        let Self { saved, recipe } = self;
        let mut row = |name: &str, value: &str| {
            writeln!(text, "| {name} | {value} |").expect("writing to a string does not fail");
        };
        row("\n## Training\n\n| what", "which");
        row("---", "---");
        row("samples seen", &numbers::grouped(saved.position.samples));
        row("updates", &numbers::grouped(saved.position.update));
        for identity in &saved.data {
            row("data set", &format!("`{identity}`"));
        }
        row("order of samples", &format!("`{}`", saved.order_hash));
        for (name, frozen) in &saved.frozen {
            row(
                &format!("{name}, not trained"),
                &format!("BLAKE3 `{}`", frozen.blake3),
            );
        }
        row("program", &format!("`{}`", saved.program));
        *text += &format!(
            "\n### Recipe\n\nWith every default:\n\n```toml\n{}\n```\n",
            recipe.trim_end()
        );
    }
}

/// The last parts of a path, without the folders of this machine.
fn names(path: &Path) -> Vec<String> {
    let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let parts = full
        .components()
        .map(|part| part.as_os_str().to_string_lossy().into_owned());
    parts.filter(|name| name != "checkpoints").collect()
}

/// A sheet of samples of exactly this checkpoint: the grid of `rectiflow sample` in the run's
/// `samples`, if it was drawn with this checkpoint, otherwise the preview of that step.
fn samples_of(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    let full = path
        .canonicalize()
        .with_context(|| format!("{}", path.display()))?;
    let (Some(name), Some(run)) = (full.file_name(), full.parent().and_then(Path::parent)) else {
        return Ok(None);
    };
    let name = name.to_string_lossy();
    let drawn_with = format!("Model: {name},");
    let read = |path: PathBuf| fs::read(path).ok();
    let grid = read(run.join("samples").join("grid.png")).filter(|bytes| {
        bytes
            .windows(drawn_with.len())
            .any(|window| window == drawn_with.as_bytes())
    });
    Ok(grid.or_else(|| read(run.join("previews").join(format!("{name}.png")))))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run folder with a checkpoint that trained nothing.
    fn checkpoint(run: &Path) -> PathBuf {
        let folder = run.join("checkpoints/step-00000012");
        fs::create_dir_all(&folder).unwrap();
        let state = serde_json::json!({
            "format": 1, "position": {"cursor": 12, "update": 11, "samples": 12_345}, "order_hash": "0d3f",
            "objective": rectiflow_sdxl::flow::ObjectiveSettings::default(),
            "frozen": {"vae": {"path": "/base/vae", "blake3": "f07e4"}},
            "data": ["1de7", "07e5"], "program": "rectiflow 0.1.0 b1a3e3", "layout": []
        });
        fs::write(folder.join("state.json"), state.to_string()).unwrap();
        fs::write(folder.join("recipe.toml"), "[train]\nsamples = 99\n\n").unwrap();
        folder
    }

    #[test]
    fn a_checkpoint_says_how_it_was_trained() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("birds");
        let path = checkpoint(&run);
        let card = ModelCard::of(&path, Some(Parameterization::Flow), 5.5).unwrap();
        assert_eq!(card.title, "birds step-00000012");
        assert_eq!(
            card.description(),
            "A Stable Diffusion XL that predicts velocity (rectified flow), trained by rectiflow 0.1.0 b1a3e3 on \
             12,345 samples in 11 updates."
        );
        let text = card.markdown("x.png");
        for needle in [
            "shift 5.5",
            "| data set | `1de7` |",
            "| data set | `07e5` |",
            "BLAKE3 `f07e4`",
            "`0d3f`",
        ] {
            assert!(text.contains(needle), "{needle}: {text}");
        }
        assert!(card.front_matter().contains("- rectified-flow\n---\n"));
        assert!(
            text.ends_with("```toml\n[train]\nsamples = 99\n```\n"),
            "{text}"
        );
        assert!(
            !text.contains("x.png") && !text.contains("/base"),
            "no picture, no path of this machine: {text}"
        );
    }

    #[test]
    fn the_picture_is_of_this_checkpoint_or_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = checkpoint(folder.path());
        let samples = || ModelCard::of(&path, None, 6.0).unwrap().samples;
        assert_eq!(samples(), None);
        fs::create_dir(folder.path().join("previews")).unwrap();
        fs::write(folder.path().join("previews/step-00000011.png"), b"earlier").unwrap();
        assert_eq!(samples(), None);
        fs::write(folder.path().join("previews/step-00000012.png"), b"preview").unwrap();
        fs::create_dir(folder.path().join("samples")).unwrap();
        fs::write(
            folder.path().join("samples/grid.png"),
            b"Size: 8x8, Model: step-00000011, Shift: 6",
        )
        .unwrap();
        assert_eq!(
            samples().as_deref(),
            Some(&b"preview"[..]),
            "the sheet is of another checkpoint"
        );
        let sheet = b"Size: 8x8, Model: step-00000012, Shift: 6";
        fs::write(folder.path().join("samples/grid.png"), sheet).unwrap();
        assert_eq!(samples().as_deref(), Some(&sheet[..]));
        let card = ModelCard::of(&path, None, 6.0).unwrap();
        assert!(card.markdown("x.png").contains("(x.png)"));
    }

    #[test]
    fn a_converted_model_says_from_what() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        fs::write(&path, b"").unwrap();
        let card = ModelCard::of(&path, Some(Parameterization::Eps), 6.0).unwrap();
        assert_eq!(card.title, "model.safetensors");
        assert!(
            card.description().starts_with(
                "A Stable Diffusion XL, converted from model.safetensors by rectiflow"
            )
        );
        assert!(
            !card.markdown("x.png").contains("Training") && !card.front_matter().contains("flow")
        );
    }
}
