//! `rectiflow bench prep`: how fast this machine prepares a folder of pictures, without the VAE.

use std::{path::PathBuf, time::Duration};

use rectiflow_data::speed::{self, PrepNumbers};
use rectiflow_train::recipe::Recipe;
use serde_json::json;

use crate::terminal::{answer::Answer, numbers::short};

/// Read, decode, resize and crop the pictures of a folder as `rectiflow prep` does, and discard
/// them: pictures per second and per second of processor time, and where the time goes. Nothing is
/// encoded or written.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder of images; its subfolders are read too.
    folder: PathBuf,
    /// A recipe whose `[prep]` section sets area, bucket step and more.
    #[arg(long)]
    recipe: Option<PathBuf>,
    /// Override a key of the recipe, e.g. --set prep.area_px=262144. Repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
    /// Seconds to measure, at least, after a first time over all pictures.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    secs: u64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let settings = Recipe::load_prep(args.recipe.as_deref(), &args.overrides)?;
    let numbers = speed::measure(&args.folder, &settings, Duration::from_secs(args.secs))?;
    let mut text = format!(
        "{}: {} pictures, {} threads\n\
         {} pictures/s; per CPU second {} pictures, {} megapixels\n{}",
        args.folder.display(),
        numbers.pictures,
        numbers.threads,
        short(numbers.pictures_per_sec, 4),
        short(numbers.pictures_per_cpu_sec, 4),
        short(numbers.megapixels_per_cpu_sec, 4),
        stages(&numbers)
    );
    if let Some(first) = numbers.rejected.first() {
        let count = numbers.rejected.len();
        text += &format!("\n{count} files are not pictures that can be used, such as {first}");
    }
    let json = json!({ "folder": args.folder, "prep": numbers });
    Ok(Answer::done(text, json))
}

/// The processor time of a picture by stage, in a line.
fn stages(numbers: &PrepNumbers) -> String {
    let secs = numbers.stage_secs;
    let parts = [
        ("read and hash", secs.read),
        ("decode", secs.decode),
        ("colour", secs.colour),
        ("orientation", secs.orientation),
        ("resize and crop", secs.resize),
    ];
    let parts = parts.map(|(name, secs)| format!("{name} {}", short(secs * 1e3, 3)));
    format!("CPU milliseconds of a picture: {}", parts.join(", "))
}
