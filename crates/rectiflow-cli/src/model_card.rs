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

use rectiflow_sdxl::{flow::Parameterization, model_spec::usage_hint};
use rectiflow_train::checkpoint::{Saved, found::Found};

use crate::{picture_texts::sheet_mark, terminal::numbers};

/// What a card is written of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    /// The model's file or folder.
    pub(crate) path: &'a Path,
    /// The checkpoint that it is, if it is one.
    pub(crate) checkpoint: Option<&'a Found>,
}

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

/// How to use a flow model in diffusers, and what goes wrong there without a message (measured with
/// diffusers 0.42.1).
const FLOW_IN_DIFFUSERS: &str = "
In diffusers the exported folder opens in the stock `StableDiffusionXLPipeline`; its scheduler is
Euler's method on flow sigmas. `UniPCMultistepScheduler` and `DPMSolverMultistepScheduler` of order
2 work too, made with `from_config`. Two things break the pictures there without a message:

- `use_karras_sigmas`, `use_exponential_sigmas` and `use_beta_sigmas`: in most schedulers they
  replace the flow sigmas (1 to 0) by those of a model that predicts noise (14.6 to 0.03), and the
  latents end in NaN, a black picture. Leave them off.
- `DEISMultistepScheduler`: it ends at the last sigma above 0, so noise is left in the picture.
";

#[derive(Debug)]
struct Training {
    saved: Saved,
    /// `None` if it cannot be read.
    recipe: Option<String>,
    /// Whether these are the averaged weights.
    is_average: bool,
}

impl ModelCard {
    /// The card of a model; `shift` is the recommended sampling shift. What cannot be read of a
    /// checkpoint is left out with a warning, since an export needs no card.
    pub(crate) fn of(
        model: Source<'_>,
        parameterization: Option<Parameterization>,
        shift: f64,
    ) -> Self {
        let names = names(model.path);
        let source = names.last().cloned().unwrap_or_default();
        let mut card = Self {
            title: source.clone(),
            samples: None,
            parameterization,
            shift,
            source,
            training: None,
        };
        if let Some(checkpoint) = model.checkpoint {
            // The run, the step, and for averaged weights their name.
            let num_names = if checkpoint.is_average() { 3 } else { 2 };
            card.title = names[names.len().saturating_sub(num_names)..].join(" ");
            card.training = Some(Training::of(checkpoint));
            if !checkpoint.is_average() {
                card.samples = samples_of(model.path);
            }
        }
        card
    }

    /// The model in a sentence or two, for the header of a file.
    pub(crate) fn description(&self) -> String {
        let kind = match self.parameterization {
            Some(Parameterization::Flow) => {
                "A Stable Diffusion XL that predicts velocity (rectified flow)"
            }
            Some(Parameterization::V) => "A Stable Diffusion XL with v-prediction",
            Some(Parameterization::VZtsnr) => {
                "A Stable Diffusion XL with v-prediction and zero terminal SNR"
            }
            Some(Parameterization::Eps) | None => "A Stable Diffusion XL",
        };
        match &self.training {
            Some(Training {
                saved, is_average, ..
            }) => {
                let position = saved.position;
                let samples = numbers::grouped(position.samples);
                let average = if *is_average {
                    "; these are the averaged weights"
                } else {
                    ""
                };
                format!(
                    "{kind}, trained by {} on {samples} samples in {} updates{average}.",
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
            text += FLOW_IN_DIFFUSERS;
        }
        if let Some(training) = &self.training {
            training.write(&mut text);
        }
        text
    }
}

impl Training {
    /// What a checkpoint says about its training.
    fn of(checkpoint: &Found) -> Self {
        let recipe = match checkpoint.recipe() {
            Ok(recipe) => Some(recipe),
            Err(error) => {
                tracing::warn!("the model card is without the recipe: {error}");
                None
            }
        };
        Self {
            saved: checkpoint.saved().clone(),
            recipe,
            is_average: checkpoint.is_average(),
        }
    }

    fn write(&self, text: &mut String) {
        let saved = &self.saved;
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
        if let Some(recipe) = &self.recipe {
            *text += &format!(
                "\n### Recipe\n\nWith every default:\n\n```toml\n{}\n```\n",
                recipe.trim_end()
            );
        }
    }
}

/// The last parts of a path, without the folders of this machine. Each is a line of its own at
/// most.
fn names(path: &Path) -> Vec<String> {
    let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let parts = full.components().map(|part| {
        let name = part.as_os_str().to_string_lossy();
        name.replace(char::is_control, " ")
    });
    parts.filter(|name| name != "checkpoints").collect()
}

/// A sheet of samples of exactly this checkpoint: the grid of `rectiflow sample` in the run's
/// `samples`, if it was drawn with this checkpoint, otherwise the preview of that step. Not for
/// averaged weights, whose folders all have the same name.
fn samples_of(path: &Path) -> Option<Vec<u8>> {
    let full = path.canonicalize().ok()?;
    let run = full.parent()?.parent()?;
    let name = full.file_name()?.to_string_lossy();
    // The second mark is that of sheets drawn before there was the first.
    let marks = [sheet_mark(&name), format!("Model: {name},")];
    let read = |path: PathBuf| fs::read(path).ok();
    let grid = read(run.join("samples").join("grid.png"))
        .filter(|bytes| marks.iter().any(|mark| holds(bytes, mark)));
    grid.or_else(|| read(run.join("previews").join(format!("{name}.png"))))
}

fn holds(bytes: &[u8], mark: &str) -> bool {
    let mut windows = bytes.windows(mark.len());
    windows.any(|window| window == mark.as_bytes())
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

    /// The card of a checkpoint or of another model.
    fn card_of(path: &Path, parameterization: Option<Parameterization>, shift: f64) -> ModelCard {
        let checkpoint = Found::unverified(path).ok();
        let source = Source {
            path,
            checkpoint: checkpoint.as_ref(),
        };
        ModelCard::of(source, parameterization, shift)
    }

    #[test]
    fn a_checkpoint_says_how_it_was_trained() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("birds");
        let path = checkpoint(&run);
        let card = card_of(&path, Some(Parameterization::Flow), 5.5);
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

    /// Averaged weights, and what is missing or broken in a checkpoint: there is a card of the
    /// rest.
    #[test]
    fn nothing_stops_a_card() {
        let folder = tempfile::tempdir().unwrap();
        let path = checkpoint(&folder.path().join("birds"));
        let ema = path.join("ema");
        fs::create_dir(&ema).unwrap();
        fs::copy(path.join("state.json"), ema.join("state.json")).unwrap();
        let card = || card_of(&ema, Some(Parameterization::Flow), 6.0);
        assert_eq!(card().title, "birds step-00000012 ema");
        assert!(
            card()
                .description()
                .ends_with("; these are the averaged weights.")
        );
        assert!(
            card().markdown("x.png").contains("samples = 99"),
            "the recipe of the checkpoint"
        );
        fs::write(path.join("recipe.toml"), b"\xff\xfe").unwrap();
        let text = card().markdown("x.png");
        assert!(
            text.contains("`0d3f`") && !text.contains("Recipe"),
            "{text}"
        );
        fs::remove_file(path.join("recipe.toml")).unwrap();
        assert!(card().markdown("x.png").contains("`0d3f`"));
        for nowhere in ["", "/", "no/such/folder", ".."] {
            let card = card_of(Path::new(nowhere), None, 6.0);
            assert!(
                card.samples.is_none() && card.markdown("x").starts_with("# "),
                "{nowhere}"
            );
        }
    }

    #[test]
    fn flow_models_carry_a_warning_about_diffusers_and_others_do_not() {
        let markdown = |p| card_of(Path::new("x"), Some(p), 6.0).markdown("x.png");
        let flow = markdown(Parameterization::Flow);
        for word in [
            "use_karras_sigmas",
            "use_beta_sigmas",
            "DEIS",
            "UniPCMultistepScheduler",
        ] {
            assert!(flow.contains(word), "{word}: {flow}");
        }
        for (_, p) in Parameterization::ALL.into_iter().skip(1) {
            assert!(!markdown(p).contains("karras"), "{p}");
        }
        assert!(markdown(Parameterization::VZtsnr).contains("zero terminal SNR"));
    }

    #[test]
    fn the_picture_is_of_this_checkpoint_or_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = checkpoint(folder.path());
        let samples = || card_of(&path, None, 6.0).samples;
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
        let sheet = br#"{"model":"step-00000012","negative":""}"#;
        fs::write(folder.path().join("samples/grid.png"), sheet).unwrap();
        assert_eq!(samples().as_deref(), Some(&sheet[..]));
        let card = card_of(&path, None, 6.0);
        assert!(card.markdown("x.png").contains("(x.png)"));
    }

    #[test]
    fn a_name_with_line_breaks_stays_in_the_title() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fox\n## Use\tit.safetensors");
        fs::write(&path, b"").unwrap();
        let card = card_of(&path, None, 6.0);
        let text = card.markdown("x.png");
        assert!(text.starts_with("# fox ## Use it.safetensors\n"), "{text}");
        assert!(!card.description().contains('\n'));
    }

    #[test]
    fn a_converted_model_says_from_what() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        fs::write(&path, b"").unwrap();
        let card = card_of(&path, Some(Parameterization::Eps), 6.0);
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
