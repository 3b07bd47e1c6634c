//! Pictures sampled while training goes on: the same prompts and noise each time, so that progress can be seen.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rectiflow_data::grid::Grid;
use rectiflow_sdxl::{model::Model, sample::SampleSettings};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    comm::Comm,
    config::Checked,
    draw::draw,
    error::{Error, Result},
};

/// `[preview]`: pictures sampled while training goes on.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PreviewConfig {
    /// Steps from one set of pictures to the next; the first is before training, the last at its end.
    pub every_steps: u64,
    /// One picture each; none by default, and then nothing is sampled.
    pub prompts: Vec<String>,
    /// What the pictures are steered away from, with `cfg` above 1.
    pub negative: String,
    /// How they are sampled; `batch` is the number of prompts.
    pub sample: SampleSettings,
}

impl Default for PreviewConfig {
    fn default() -> Self {
        Self { every_steps: 500, prompts: Vec::new(), negative: String::new(), sample: SampleSettings::default() }
    }
}

impl PreviewConfig {
    /// What is wrong with these settings: (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        if self.every_steps == 0 {
            return vec![("preview.every_steps".into(), "expected at least 1, found 0".into())];
        }
        Vec::new()
    }
}

/// Draws a run's previews.
#[derive(Debug)]
pub(crate) struct Previewer {
    config: PreviewConfig,
    folder: PathBuf,
}

impl Previewer {
    pub(crate) fn new(config: &PreviewConfig, run_dir: &Path) -> Self {
        Self { config: config.clone(), folder: run_dir.join("previews") }
    }

    /// Samples all prompts as a row of pictures; gives the file's name, or `None` where there are no prompts.
    pub(crate) fn draw(&self, model: &Model, checked: &Checked, step: u64, comm: &Comm) -> Result<Option<String>> {
        if self.config.prompts.is_empty() {
            return Ok(None);
        }
        let name = format!("step-{step:08}.png");
        comm.first(|| self.draw_all(model, checked, step, &name))?;
        Ok(Some(name))
    }

    fn draw_all(&self, model: &Model, checked: &Checked, step: u64, name: &str) -> Result<()> {
        let PreviewConfig { prompts, negative, sample, .. } = &self.config;
        let parameterization = checked.recipe.objective.parameterization;
        let pictures = draw(model, parameterization, prompts, negative, sample, &mut |_| {})?;
        fs::create_dir_all(&self.folder).map_err(Error::io(&self.folder))?;
        let grid = Grid { row_labels: &[], column_labels: prompts, columns: prompts.len(), pictures: &pictures };
        grid.draw().write_png(&self.folder.join(name), &[("Title", &format!("step {step}"))])?;
        Ok(())
    }
}
