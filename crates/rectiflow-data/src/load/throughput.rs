//! Reading speed of a data set: the numbers that `rectiflow bench loader` prints. Changes nothing.

use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Serialize;

use crate::{
    dataset::Dataset,
    error::Result,
    format::manifest::Split,
    load::{batch::Source, loader::Loader},
    order::{OrderSettings, RankOf, pass::RUN_BLOCKS},
    remote::request::{ObjectFile, coalesce},
};

/// Measurements of reading with the loader.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoaderNumbers {
    /// Mode of the order.
    pub mode: String,
    /// Limit in bytes of latents and text read ahead.
    pub read_ahead_bytes: u64,
    /// Time from the construction of the loader to its first step.
    pub first_step_secs: f64,
    /// Number of steps after the first.
    pub steps: u64,
    /// Samples of these steps, on this rank.
    pub samples: u64,
    /// Bytes of latents of these samples.
    pub latent_bytes: u64,
    /// Time for these steps.
    pub secs: f64,
    /// Samples per second after the first step.
    pub samples_per_sec: f64,
    /// Millions of bytes of latents per second after the first step.
    pub megabytes_per_sec: f64,
}

/// Reads steps as fast as possible, for at least `at_least` after the first one.
///
/// # Errors
/// As [`Loader::new`] and [`Loader::next_step`].
pub fn loader(
    sources: Vec<Source>,
    settings: OrderSettings,
    rank: RankOf,
    at_least: Duration,
) -> Result<LoaderNumbers> {
    // The first step.
    let began = Instant::now();
    let mut loader = Loader::new(sources, settings, rank)?;
    let mode = loader.order().settings().mode.to_string();
    let read_ahead_bytes = loader.read_ahead_bytes();
    loader.next_step()?;
    let first_step_secs = began.elapsed().as_secs_f64();
    // The steps after it.
    let began = Instant::now();
    let mut steps = 0;
    let mut samples = 0;
    let mut latent_bytes = 0;
    while began.elapsed() < at_least {
        steps += 1;
        for batch in loader.next_step()?.micro_batches {
            samples += batch.ids.len() as u64;
            latent_bytes += 2 * batch.latents.len() as u64;
        }
    }
    let secs = began.elapsed().as_secs_f64();
    Ok(LoaderNumbers {
        mode,
        read_ahead_bytes,
        first_step_secs,
        steps,
        samples,
        latent_bytes,
        secs,
        samples_per_sec: samples as f64 / secs,
        megabytes_per_sec: latent_bytes as f64 / secs / 1e6,
    })
}

/// Bytes per second of plain sequential reading: the training latents from front to back, one
/// request for a run of blocks after the other, each verified. Reads for at least `at_least` and
/// starts over at the end of the data set; returns 0 for a data set without training latents.
///
/// # Errors
/// The errors of reading.
pub fn sequential(dataset: &Dataset, at_least: Duration) -> Result<f64> {
    let began = Instant::now();
    let mut num_bytes = 0;
    loop {
        for (index, object) in dataset.manifest().objects.iter().enumerate() {
            if object.split != Split::Train {
                continue;
            }
            for run in coalesce(0..object.num_blocks(), RUN_BLOCKS) {
                let blocks = dataset.start(ObjectFile::Latents, index, run)?.wait()?;
                num_bytes += blocks.iter().map(Bytes::len).sum::<usize>();
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
