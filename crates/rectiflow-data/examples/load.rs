//! Opens a packed data set and prints what the first steps hold.
//!
//!     cargo run --release -p rectiflow-data --example load -- DATASET

#![expect(clippy::print_stdout, reason = "an example talks to whoever runs it")]

use std::{error::Error, path::Path, sync::Arc};

use rectiflow_data::{
    Dataset,
    batch::Source,
    loader::Loader,
    order::{Amount, Mode, OrderSettings, RankOf},
    prompt::PromptSettings,
};

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: load DATASET")?;
    let dataset = Arc::new(Dataset::open(Path::new(&path))?);
    let source = Source { dataset, prompt: PromptSettings::default(), amount: Amount::Repeats(1.0) };
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
        println!("step {} of epoch {}: {} samples", step.step, step.epoch, step.num_samples);
        for batch in &step.micro_batches {
            println!("  {}x{} px, {} chunks: {:?}", batch.width_px, batch.height_px, batch.tokens, batch.prompts);
        }
    }
    Ok(())
}
