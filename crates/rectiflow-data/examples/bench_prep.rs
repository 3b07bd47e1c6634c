//! Measures the preparation of a folder of pictures without the encoder, as `rectiflow bench prep`
//! does, and writes what the encoder would take.
//!
//!     cargo run --release -p rectiflow-data --example bench_prep -- FOLDER [--secs 5]
//!     cargo run --release -p rectiflow-data --example bench_prep -- FOLDER --write OUT
//!
//! Prints one JSON object. With `--write` each picture is written to OUT as PNG in the size of its
//! bucket, and a line of JSON tells how it was fitted: scripts/peers/prep/compare.py compares these
//! pixels with those of other programs.

#![expect(clippy::print_stdout, reason = "an example prints its results")]

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Parser;
use rectiflow_data::{PrepSettings, speed};
use serde_json::json;

/// Measures the preparation of a folder of pictures without the encoder.
#[derive(Debug, Parser)]
struct Arguments {
    /// The folder of pictures.
    folder: PathBuf,
    /// Seconds to measure, at least.
    #[arg(long, default_value_t = 5)]
    secs: u64,
    /// Sides of buckets are multiples of this many pixels.
    #[arg(long, default_value_t = PrepSettings::default().step_px)]
    step_px: u32,
    /// Writes the fitted pictures into this folder instead of measuring.
    #[arg(long)]
    write: Option<PathBuf>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let settings = PrepSettings {
        step_px: arguments.step_px,
        ..PrepSettings::default()
    };
    if let Some(out) = &arguments.write {
        return write(&arguments.folder, out, &settings);
    }
    let at_least = Duration::from_secs(arguments.secs);
    let numbers = speed::measure(&arguments.folder, &settings, at_least)?;
    println!("{}", serde_json::to_string(&numbers)?);
    Ok(())
}

/// Writes the fitted pictures of a folder, without its subfolders.
fn write(folder: &Path, out: &Path, settings: &PrepSettings) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(out)?;
    let buckets = settings.geometry().buckets();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let fitted = match speed::fitted(&path, &buckets, settings) {
            Ok(fitted) => fitted,
            Err(fault) => return Err(format!("{}: {}", path.display(), fault.detail).into()),
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        fitted
            .picture
            .write_png(&out.join(format!("{name}.png")), &[])?;
        let placement = fitted.placement;
        let line = json!({
            "file": name,
            "resized": [placement.resized_width_px, placement.resized_height_px],
            "crop": [placement.crop_left_px, placement.crop_top_px],
        });
        println!("{line}");
    }
    Ok(())
}
