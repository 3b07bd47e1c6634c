//! Opens a packed data set and prints the contents of the first steps.
//!
//!     cargo run --release -p rectiflow-data --example load -- DATASET

#![expect(clippy::print_stdout, reason = "an example prints its results")]

use std::{error::Error, path::PathBuf, sync::Arc};

use clap::Parser;
use rectiflow_data::{
    Dataset,
    batch::Source,
    loader::Loader,
    order::{Amount, Mode, OrderSettings, RankOf},
    prompt::PromptSettings,
};

/// Prints the contents of a packed data set's first steps.
#[derive(Debug, Parser)]
struct Arguments {
    /// Folder or URL of the packed data set.
    dataset: PathBuf,
}

fn main() -> Result<(), Box<dyn Error>> {
    let dataset = Arc::new(Dataset::open(Arguments::parse().dataset)?);
    let source = Source {
        dataset,
        prompt: PromptSettings::default(),
        amount: Amount::Repeats(1.0),
    };
    let settings = OrderSettings {
        seed: 0,
        micro_batch: 4,
        micro_batches: 2,
        lanes: None,
        mode: Mode::Local,
        window_samples: 1024,
    };
    let mut loader = Loader::new(vec![source], settings, RankOf::ONLY)?;
    println!("order {}", loader.order_hash());
    for _ in 0..3 {
        let step = loader.next_step()?;
        println!(
            "step {} of epoch {}: {} samples",
            step.step, step.epoch, step.num_samples
        );
        for batch in &step.micro_batches {
            let (width, height) = (batch.width_px, batch.height_px);
            println!(
                "  {width}x{height} px, {} chunks: {:?}",
                batch.tokens, batch.prompts
            );
        }
    }
    Ok(())
}
