//! Measures how fast the pictures of a folder are prepared for an ONNX model, and scored by it.
//!
//!     cargo run --release -p rectiflow-annotate --example bench_score -- FOLDER --model FILE \
//!         [--preset siglip] [--batch 16] [--prepare-only]
//!
//! Prints one JSON object: pictures a second, from the first file that is read to the last score,
//! without opening the model; and the score of each file. scripts/peers/score/compare.py runs it
//! and Python's onnxruntime in turn. RAYON_NUM_THREADS is the number of threads that prepare.

#![expect(clippy::print_stdout, reason = "an example prints its results")]

#[path = "../tests/runtime/mod.rs"]
mod runtime;

use std::{collections::BTreeMap, error::Error, fs, path::PathBuf, time::Instant};

use clap::Parser;
use rayon::prelude::*;
use rectiflow_annotate::onnx::{
    feed::{Answer, Feed, Opened},
    input::Said,
    model::{Choices, Device, Model},
    preparation::{Elements, Memory, Preparation, Preparer, Preset},
};
use serde_json::json;

/// Measures how fast pictures are prepared and scored.
#[derive(Debug, Parser)]
struct Arguments {
    /// The folder of pictures.
    folder: PathBuf,
    /// The model.
    #[arg(long)]
    model: PathBuf,
    /// How pictures become its input.
    #[arg(long, default_value = "siglip")]
    preset: String,
    /// Pictures at a time.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Threads of the model.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Do not run the model.
    #[arg(long)]
    prepare_only: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let preset = Preset::ALL
        .iter()
        .find(|(name, _)| *name == arguments.preset);
    let preparation = preset.ok_or("no such preset")?.1.preparation();
    let choices = Choices {
        input: Said {
            batch: arguments.batch,
            ..Said::default()
        },
        output: None,
        device: Device::Cpu,
        threads: arguments.threads,
    };
    let mut model = Model::open(&arguments.model, &choices, &runtime::places())?;
    let mut files = Vec::new();
    for entry in fs::read_dir(&arguments.folder)? {
        files.push(entry?.path());
    }
    files.sort();
    let start = Instant::now();
    let scores = match arguments.prepare_only {
        true => prepare(&model, preparation, &files)?,
        false => score(&mut model, preparation, &files)?,
    };
    let secs = start.elapsed().as_secs_f64();
    let numbers = json!({
        "pictures": files.len(),
        "secs": secs,
        "pictures_per_sec": files.len() as f64 / secs,
        "scores": scores,
    });
    println!("{numbers}");
    Ok(())
}

/// The scores of files by name.
type Scores = BTreeMap<String, Vec<f32>>;

/// Prepares the files in batches. Instead of scores, returns one element of each picture.
fn prepare(
    model: &Model,
    preparation: Preparation,
    files: &[PathBuf],
) -> Result<Scores, Box<dyn Error>> {
    let preparer = Preparer::new(preparation, model.input());
    let mut middles = Scores::new();
    let mut elements = Elements::F32(Vec::new());
    for batch in files.chunks(model.input().batch) {
        let prepared: Result<Vec<Vec<u8>>, String> = batch
            .par_iter()
            .map_init(Memory::default, |memory, path| {
                let bytes = fs::read(path).map_err(|error| error.to_string())?;
                preparer
                    .pixels(&bytes, memory)
                    .map_err(|fault| fault.detail)
            })
            .collect();
        let prepared = prepared?;
        preparer.fill(&prepared, prepared.len(), &mut elements);
        let Elements::F32(values) = &elements else {
            return Err("the model takes no 32-bit floats".into());
        };
        // One element of each, so that nothing is left out and little is added.
        for (path, values) in batch
            .iter()
            .zip(values.chunks_exact(values.len() / batch.len()))
        {
            middles.insert(name(path), vec![values[values.len() / 2]]);
        }
    }
    Ok(middles)
}

fn score(
    model: &mut Model,
    preparation: Preparation,
    files: &[PathBuf],
) -> Result<Scores, Box<dyn Error>> {
    let mut scores = Scores::new();
    let mut feed = Feed { model, preparation };
    let open = |path: &PathBuf| Opened::File((), fs::read(path).unwrap_or_default());
    feed.run(files, &open, &mut |path, said| {
        if let Answer::Numbers((), numbers) = said {
            scores.insert(name(path), numbers.to_vec());
        }
        Ok(())
    })?;
    match scores.len() == files.len() {
        true => Ok(scores),
        false => Err("a file is no picture".into()),
    }
}

fn name(path: &std::path::Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
