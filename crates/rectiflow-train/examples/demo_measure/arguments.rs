//! The command line.

use std::path::PathBuf;

use clap::Parser;
use rectiflow_sdxl::flow::Parameterization;

/// Measures the demo's models side by side: the same prompts, the same noise.
#[derive(Debug, Parser)]
pub(crate) struct Arguments {
    /// Folder for the results.
    pub(crate) run: PathBuf,
    /// Folder of held-out pictures and their `metadata.jsonl`.
    #[arg(long, value_name = "DIR")]
    pub(crate) heldout: PathBuf,
    /// The autoencoder whose features compare pictures.
    #[arg(long, value_name = "DIR")]
    pub(crate) vae: PathBuf,
    /// Pictures to draw for each model and seed.
    #[arg(long = "pictures", value_name = "N", default_value_t = 192)]
    #[arg(value_parser = at_least_one)]
    pub(crate) num_pictures: usize,
    /// Seeds, each with other noise.
    #[arg(long = "seeds", value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) num_seeds: u64,
    /// Folder to keep the measured pictures in, for other programs.
    #[arg(long, value_name = "DIR")]
    pub(crate) keep: Option<PathBuf>,
    /// The models to measure, optionally sampled as another parameterization than their own.
    #[arg(required = true, value_name = "LABEL=MODEL[@PARAMETERIZATION]")]
    #[arg(value_parser = NamedModel::parse)]
    pub(crate) models: Vec<NamedModel>,
}

/// `LABEL=MODEL[@PARAMETERIZATION]`.
#[derive(Debug, Clone)]
pub(crate) struct NamedModel {
    pub(crate) label: String,
    pub(crate) path: PathBuf,
    /// Replaces the model's own.
    pub(crate) parameterization: Option<Parameterization>,
}

impl NamedModel {
    fn parse(text: &str) -> Result<Self, String> {
        let Some((label, model)) = text.split_once('=') else {
            return Err("expected LABEL=MODEL".to_owned());
        };
        let (path, name) = match model.split_once('@') {
            None => (model, None),
            Some((path, name)) => (path, Some(name)),
        };
        let parameterization = match name {
            None => None,
            Some(name) => Some(
                name.parse::<Parameterization>()
                    .map_err(|error| error.to_string())?,
            ),
        };
        Ok(Self {
            label: label.to_owned(),
            path: path.into(),
            parameterization,
        })
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err("expected a number of at least 1".to_owned()),
    }
}
