//! Settings and loaders shared by the tests of data sets at a URL.

use std::{path::Path, sync::Arc, time::Duration};

use rectiflow_data::{
    Dataset, Network,
    batch::{Source, Step},
    cache::DiskCache,
    loader::Loader,
    order::{Amount, Mode, OrderSettings, RankOf},
    prompt::PromptSettings,
};

use super::SEED;

/// Short timeouts, so that tests of timeouts are short.
pub(crate) fn network() -> Network {
    Network {
        stall_timeout: Duration::from_millis(300),
        pause: Duration::from_millis(2),
        longest_pause: Duration::from_millis(10),
        attempts: 4,
        deadline: Duration::from_secs(8),
        ..Network::default()
    }
}

pub(crate) fn settings(mode: Mode) -> OrderSettings {
    OrderSettings {
        seed: SEED,
        micro_batch: 4,
        micro_batches: 8,
        lanes: None,
        mode,
        window_samples: 64,
    }
}

pub(crate) fn open(url: &str) -> Source {
    let dataset = Arc::new(Dataset::open_with(url, &network()).unwrap());
    Source {
        dataset,
        prompt: PromptSettings::default(),
        amount: Amount::Repeats(1.0),
    }
}

pub(crate) fn take(loader: &mut Loader, num_steps: usize) -> Vec<Step> {
    (0..num_steps)
        .map(|_| loader.next_step().unwrap())
        .collect()
}

pub(crate) fn steps(source: &Source, mode: Mode, num_steps: usize) -> Vec<Step> {
    take(
        &mut Loader::new(vec![source.clone()], settings(mode), RankOf::ONLY).unwrap(),
        num_steps,
    )
}

/// The data set at a URL with a cache of `limit_bytes` in `folder`, opened as if by a process of
/// its own.
pub(crate) fn cached(url: &str, folder: &Path, limit_bytes: u64) -> (Source, Arc<DiskCache>) {
    let cache = Arc::new(DiskCache::open(folder, limit_bytes).unwrap());
    let dataset = Arc::new(
        Dataset::open_with(url, &network())
            .unwrap()
            .with_cache(&cache),
    );
    (
        Source {
            dataset,
            prompt: PromptSettings::default(),
            amount: Amount::Repeats(1.0),
        },
        cache,
    )
}
