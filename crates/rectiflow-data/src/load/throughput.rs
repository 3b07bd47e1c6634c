//! How fast a data set is read: the numbers that `rectiflow bench loader` prints. Takes the time; changes nothing.

use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Serialize;

use crate::{
    dataset::Dataset,
    error::Result,
    format::manifest::Split,
    load::{batch::Source, loader::Loader},
    order::{OrderSettings, RankOf, pass::RUN_BLOCKS},
    remote::request::ObjectFile,
};

/// What reading with the loader took.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoaderNumbers {
    /// Mode of the order.
    pub mode: String,
    /// Bytes of latents and text that were allowed to be read ahead.
    pub read_ahead_bytes: u64,
    /// From nothing to the first step.
    pub first_step_secs: f64,
    /// Steps after the first.
    pub steps: u64,
    /// Their samples, of this rank.
    pub samples: u64,
    /// Their latents.
    pub latent_bytes: u64,
    /// The time that they took.
    pub secs: f64,
    /// Samples a second after the first step.
    pub samples_per_sec: f64,
    /// Millions of bytes of latents a second after the first step.
    pub megabytes_per_sec: f64,
}

/// Reads steps for at least `at_least` after the first one, as fast as they come.
///
/// # Errors
/// As [`Loader::new`] and [`Loader::next_step`].
pub fn loader(
    sources: Vec<Source>,
    settings: OrderSettings,
    rank: RankOf,
    at_least: Duration,
) -> Result<LoaderNumbers> {
    let began = Instant::now();
    let mut loader = Loader::new(sources, settings, rank)?;
    let mode = loader.order().settings().mode.to_string();
    let read_ahead_bytes = loader.read_ahead_bytes();
    loader.next_step()?;
    let first_step_secs = began.elapsed().as_secs_f64();
    let began = Instant::now();
    let (mut steps, mut samples, mut latent_bytes) = (0, 0, 0);
    while began.elapsed() < at_least {
        let step = loader.next_step()?;
        steps += 1;
        samples += step.micro_batches.iter().map(|batch| batch.ids.len() as u64).sum::<u64>();
        latent_bytes += step.micro_batches.iter().map(|batch| 2 * batch.latents.len() as u64).sum::<u64>();
    }
    let secs = began.elapsed().as_secs_f64();
    let (samples_per_sec, megabytes_per_sec) = (samples as f64 / secs, latent_bytes as f64 / secs / 1e6);
    Ok(LoaderNumbers {
        mode,
        read_ahead_bytes,
        first_step_secs,
        steps,
        samples,
        latent_bytes,
        secs,
        samples_per_sec,
        megabytes_per_sec,
    })
}

/// Bytes a second of the plainest reading there is: the training latents from front to back, one request of a run of
/// blocks after the other, each verified. For at least `at_least`, from the front again if need be; at least once.
///
/// # Errors
/// What reading met.
pub fn sequential(dataset: &Dataset, at_least: Duration) -> Result<f64> {
    let began = Instant::now();
    let mut num_bytes = 0;
    loop {
        for (index, object) in dataset.manifest().objects.iter().enumerate() {
            if object.split != Split::Train {
                continue;
            }
            for first in (0..object.num_blocks()).step_by(RUN_BLOCKS as usize) {
                let run = first..object.num_blocks().min(first + RUN_BLOCKS);
                num_bytes +=
                    dataset.start(ObjectFile::Latents, index, run)?.wait()?.iter().map(Bytes::len).sum::<usize>();
                if began.elapsed() >= at_least {
                    return Ok(num_bytes as f64 / began.elapsed().as_secs_f64());
                }
            }
        }
        if num_bytes == 0 {
            return Ok(0.0);
        }
    }
}
