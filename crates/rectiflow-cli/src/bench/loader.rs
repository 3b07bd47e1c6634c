//! `rectiflow bench loader`: how fast this machine reads a data set, from a folder or a URL.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use rectiflow_data::{
    batch::Source,
    cache::DiskCache,
    dataset::Dataset,
    order::{Amount, Mode, OrderSettings, RankOf},
    prompt::PromptSettings,
    throughput,
};
use serde_json::json;

use crate::terminal::{answer::Answer, numbers::short};

/// Read a data set as training does and discard it: time to the first step, samples and bytes per
/// second, and the bytes per second of plain sequential reading.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder that `rectiflow prep` wrote, or the URL of a copy of it.
    dataset: PathBuf,
    /// Samples per micro-batch.
    #[arg(long, default_value_t = 16)]
    micro_batch: usize,
    /// Micro-batches per step.
    #[arg(long, default_value_t = 8)]
    micro_batches: usize,
    /// Samples of a window.
    #[arg(long, default_value_t = 2048)]
    window_samples: u64,
    /// How samples are spread over an epoch: auto, local, window or owned.
    #[arg(long, default_value = "auto", value_parser = parse_mode)]
    mode: Mode,
    /// Keep blocks that come over the network in this folder; owned mode needs it.
    #[arg(long, requires = "cache_gib")]
    cache_dir: Option<PathBuf>,
    /// Limit of the cache in GiB.
    #[arg(long, requires = "cache_dir")]
    cache_gib: Option<u64>,
    /// Seconds of each of the two readings.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    secs: u64,
}

fn parse_mode(name: &str) -> Result<Mode, String> {
    Mode::try_from(name.to_owned())
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let began = Instant::now();
    let dataset = open(args)?;
    let open_secs = began.elapsed().as_secs_f64();

    let at_least = Duration::from_secs(args.secs);
    let source = Source {
        dataset: dataset.clone(),
        prompt: PromptSettings::default(),
        amount: Amount::Repeats(1.0),
    };
    let settings = args.order();
    let numbers = throughput::loader(vec![source], settings, RankOf::ONLY, at_least)?;
    let sequential = throughput::sequential(&dataset, at_least)? / 1e6;
    let text = format!(
        "{}: mode {}\nopened in {} s, first step after {} s\n\
         {} samples/s, {} MB/s of latents; plain reading from front to back: {} MB/s",
        args.dataset.display(),
        numbers.mode,
        short(open_secs, 3),
        short(numbers.first_step_secs, 3),
        short(numbers.samples_per_sec, 4),
        short(numbers.megabytes_per_sec, 4),
        short(sequential, 4)
    );
    let json = json!({
        "dataset": args.dataset,
        "open_secs": open_secs,
        "loader": numbers,
        "sequential_megabytes_per_sec": sequential,
    });
    Ok(Answer::done(text, json))
}

/// The data set, with the disk cache that the arguments ask for.
fn open(args: &Args) -> anyhow::Result<Arc<Dataset>> {
    let mut dataset = Dataset::open(&args.dataset)?;
    if let Some((folder, gib)) = args.cache_dir.as_ref().zip(args.cache_gib) {
        let cache = DiskCache::open(folder, gib.saturating_mul(1 << 30))?;
        dataset = dataset.with_cache(&Arc::new(cache));
    }
    Ok(Arc::new(dataset))
}

impl Args {
    fn order(&self) -> OrderSettings {
        OrderSettings {
            seed: 0,
            micro_batch: self.micro_batch,
            micro_batches: self.micro_batches,
            lanes: None,
            mode: self.mode,
            window_samples: self.window_samples,
        }
    }
}
