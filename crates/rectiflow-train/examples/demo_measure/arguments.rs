//! What the command line says.

use std::path::PathBuf;

use rectiflow_sdxl::flow::Parameterization;

const USAGE: &str =
    "usage: demo_measure RUN --heldout DIR --vae DIR [--pictures N] [--seeds N] [--keep DIR] LABEL=MODEL[@flow] ...";

/// The command line, checked.
#[derive(Debug)]
pub(crate) struct Arguments {
    /// Where results go.
    pub(crate) run: PathBuf,
    /// The folder of held-out pictures and their `metadata.jsonl`.
    pub(crate) heldout: PathBuf,
    /// The autoencoder whose features pictures are compared by.
    pub(crate) vae: PathBuf,
    /// Pictures to draw for each model and seed.
    pub(crate) num_pictures: usize,
    /// How often all is drawn anew with other noise.
    pub(crate) num_seeds: u64,
    /// Where the pictures that were measured are left, for other programs.
    pub(crate) keep: Option<PathBuf>,
    /// At least one.
    pub(crate) models: Vec<NamedModel>,
}

/// `LABEL=MODEL[@PARAMETERIZATION]`.
#[derive(Debug)]
pub(crate) struct NamedModel {
    pub(crate) label: String,
    pub(crate) path: PathBuf,
    /// Where the model is to be sampled as something else than it says.
    pub(crate) parameterization: Option<Parameterization>,
}

impl Arguments {
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut run, mut heldout, mut vae, mut keep) = (None, None, None, None);
        let (mut num_pictures, mut num_seeds, mut models) = (192, 1, Vec::new());
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value; {USAGE}"));
            match argument.as_str() {
                "--heldout" => heldout = Some(PathBuf::from(value()?)),
                "--vae" => vae = Some(PathBuf::from(value()?)),
                "--keep" => keep = Some(PathBuf::from(value()?)),
                "--pictures" => num_pictures = number(&argument, &value()?)?,
                "--seeds" => num_seeds = number(&argument, &value()?)?,
                flag if flag.starts_with('-') => return Err(format!("{flag}: no such option; {USAGE}")),
                text if text.contains('=') => models.push(NamedModel::parse(text)?),
                text if run.is_none() => run = Some(PathBuf::from(text)),
                text => return Err(format!("{text}: expected LABEL=MODEL; {USAGE}")),
            }
        }
        let (Some(run), Some(heldout), Some(vae)) = (run, heldout, vae) else { return Err(USAGE.to_owned()) };
        if models.is_empty() {
            return Err(format!("no model to measure; {USAGE}"));
        }
        Ok(Self { run, heldout, vae, num_pictures, num_seeds: num_seeds as u64, keep, models })
    }
}

impl NamedModel {
    fn parse(text: &str) -> Result<Self, String> {
        let (label, rest) = text.split_once('=').expect("the caller saw the sign");
        let (path, parameterization) = match rest.split_once('@') {
            None => (rest, None),
            Some((path, name)) => (path, Some(name.parse().map_err(|error| format!("{text}: {error}"))?)),
        };
        Ok(Self { label: label.to_owned(), path: path.into(), parameterization })
    }
}

fn number(option: &str, text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(format!("{option}: expected a number of at least 1, found '{text}'")),
    }
}
