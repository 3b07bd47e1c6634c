//! What trackers tell of a run beside its events: its name, its recipe, its previews.

use std::path::{Path, PathBuf};

use rectiflow_data::text_file;
use serde_json::{Map, Value};

use crate::measure::metrics::{Event, Start};

/// A run, as its trackers know it.
#[derive(Debug, Clone)]
pub struct About {
    /// The run's folder.
    pub run_dir: PathBuf,
    /// The recipe, as TOML; empty if it is not known.
    pub recipe: String,
    /// Whether the run is one of the past: times then follow from its events.
    pub is_past: bool,
}

/// A preview's file.
#[derive(Debug)]
pub(super) struct Preview {
    pub(super) png: Vec<u8>,
    pub(super) width: u32,
    pub(super) height: u32,
}

/// Largest preview that is copied, 64 MiB.
const MAX_PREVIEW_BYTES: u64 = 64 << 20;

impl About {
    /// Returns the name of the run's folder.
    pub(super) fn name(&self) -> String {
        let full = self.run_dir.canonicalize();
        let folder = full.as_ref().unwrap_or(&self.run_dir);
        match folder.file_name() {
            Some(name) => name.to_string_lossy().into_owned(),
            None => "run".to_owned(),
        }
    }

    /// Returns the recipe as a tree, without `[report]`: an address for alerts may be in it, and
    /// trackers are made to be passed on.
    pub(super) fn config(&self) -> Map<String, Value> {
        let mut table = self.table();
        table.remove("report");
        match serde_json::to_value(table) {
            Ok(Value::Object(config)) => config,
            _ => Map::new(),
        }
    }

    /// Returns the prompts of the previews.
    pub(super) fn prompts(&self) -> Vec<String> {
        let table = self.table();
        let preview = table.get("preview").and_then(toml::Value::as_table);
        let listed = preview.and_then(|preview| preview.get("prompts")?.as_array());
        let mut prompts = Vec::new();
        for prompt in listed.into_iter().flatten() {
            prompts.extend(prompt.as_str().map(str::to_owned));
        }
        prompts
    }

    fn table(&self) -> toml::Table {
        self.recipe.parse().unwrap_or_default()
    }

    /// Reads a preview; `None` for what cannot be read or is no PNG, and for a name that leads to
    /// another folder: copies have the same name.
    pub(super) fn preview(&self, name: &str) -> Option<Preview> {
        if Path::new(name).file_name() != Some(name.as_ref()) {
            return None;
        }
        let path = self.run_dir.join("previews").join(name);
        let png = text_file::bytes(&path, MAX_PREVIEW_BYTES).ok()?;
        let (width, height) = png_size(&png)?;
        Some(Preview { png, width, height })
    }
}

/// Width and height of a PNG file in pixels, from its first chunk.
fn png_size(png: &[u8]) -> Option<(u32, u32)> {
    if !png.starts_with(b"\x89PNG\r\n\x1a\n") {
        return None;
    }
    let number = |at: usize| Some(u32::from_be_bytes(png.get(at..at + 4)?.try_into().ok()?));
    Some((number(16)?, number(20)?))
}

/// Whether what an earlier process wrote of a step comes again after a start. A run that begins
/// again also measures and draws again before its first step.
pub(super) fn comes_again(step: u64, start: &Start) -> bool {
    step > start.step || start.step == 0
}

/// An act of the guard: a word and a reason. Clipping is routine and left out.
pub(super) fn act_of(event: &Event) -> Option<(&str, String)> {
    let Event::Guard(act) = event else {
        return None;
    };
    if act.action == "clip" {
        return None;
    }
    let mut reason = act.reason.clone();
    if let Some(name) = &act.black_box {
        reason += &format!(" (blackbox/{name})");
    }
    Some((&act.action, reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(recipe: &str) -> About {
        About {
            run_dir: PathBuf::from("runs/mine"),
            recipe: recipe.to_owned(),
            is_past: true,
        }
    }

    #[test]
    fn the_prompts_of_a_recipe_are_texts() {
        let recipe = "[preview]\nprompts = [\"a fox\", \"tea\"]\n";
        assert_eq!(about(recipe).prompts(), ["a fox", "tea"]);
        assert!(about("no toml [").prompts().is_empty());
    }

    #[test]
    fn a_config_has_no_address_of_alerts() {
        let about = about("[lr]\npeak = 1e-4\n[report.alert]\nwebhook = \"secret\"\n");
        let config = Value::Object(about.config()).to_string();
        assert_eq!(config, r#"{"lr":{"peak":0.0001}}"#);
        assert_eq!(about.name(), "mine");
    }

    #[test]
    fn a_preview_is_in_its_folder() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let about = About {
            run_dir: run.path().to_owned(),
            ..about("")
        };
        std::fs::create_dir(run.path().join("previews")).expect("a folder");
        let png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x80\0\0\0\x60";
        for path in ["a.png", "previews/a.png"] {
            std::fs::write(run.path().join(path), png).expect("writes");
        }
        assert!(about.preview("a.png").is_some());
        for name in ["../a.png", "./../a.png", "..", "", "a.png/"] {
            assert!(about.preview(name).is_none(), "{name}");
        }
    }

    #[test]
    fn the_size_of_a_picture_is_in_its_first_chunk() {
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
        png.extend(640_u32.to_be_bytes());
        png.extend(64_u32.to_be_bytes());
        assert_eq!(png_size(&png), Some((640, 64)));
        assert_eq!(png_size(&png[..20]), None);
        assert_eq!(png_size(b"GIF89a, and more of it"), None);
    }
}
