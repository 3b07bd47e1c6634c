//! Our part of the comparison of data engines, `scripts/peers/loaders`: packs the samples, serves them and all that the
//! others made of them, and reads them with this crate's loader.
//!
//!     side_by_side pack FOLDER       FOLDER/train, 16,000 samples in 40 buckets, and FOLDER/test, 2,048 in 300; 2.3 GB
//!     side_by_side serve FOLDER      an object store whose buckets are the folders in FOLDER
//!     side_by_side train URL SECS    one epoch as training reads it, or as much as SECS seconds allow
//!     side_by_side test URL SECS     the test set as the test loss reads it
//!
//! `serve` prints its URL and then obeys lines on its standard input: `delay MS` has every request answered so much
//! later and counts from zero, `served` prints what was asked of it since. The other three print one JSON object.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example talks to whoever runs it")]
#![allow(clippy::unwrap_used, reason = "a measurement that fails has nothing else to say")]

#[path = "../tests/object_server/mod.rs"]
mod object_server;
#[path = "../tests/packed/mod.rs"]
mod packed;

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use object_server::{Asked, Fault, ObjectServer};
use rectiflow_data::{
    Result,
    amplification::amplification,
    batch::MicroBatch,
    loader::Loader,
    order::{Mode, OrderSettings, RankOf},
    test_batches::test_batches,
};
use serde_json::json;

const BATCH: usize = 16;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let usage = "usage: side_by_side pack|serve FOLDER, or side_by_side train|test URL SECS";
    match words[..] {
        ["pack", folder] => pack(Path::new(folder)),
        ["serve", folder] => serve(Path::new(folder)),
        ["train", url, secs] => read(&mut train(url), secs.parse().expect(usage)),
        ["test", url, secs] => read(&mut test(url), secs.parse().expect(usage)),
        _ => panic!("{usage}"),
    }
}

/// Buckets of about a megapixel, of which some are far more common than others, as in collections of pictures.
fn pack(folder: &Path) {
    let of_area = |width: u32, step: u32| (width, (1 << 20) / width / step * step);
    let shares: Vec<f64> = (0..40).map(|bucket| 1.0 / f64::from(bucket + 2)).collect();
    let all: f64 = shares.iter().sum();
    let train = (0..).zip(&shares).map(|(bucket, share)| {
        // Neighbours of the square first.
        let width = if bucket % 2 == 0 { 1024 + 16 * bucket } else { 1008 - 16 * (bucket - 1) };
        let (width, height) = of_area(width, 16);
        (width, height, (16_000.0 * share / all).round() as u64, 0)
    });
    let test = (0..300u32).map(|bucket| {
        let (width, height) = of_area(512 + 8 * bucket, 8);
        (width, height, 0, u64::from(1 + bucket * 7 % 12))
    });
    let (train, mut test): (Vec<_>, Vec<_>) = (train.collect(), test.collect());
    let num = |buckets: &[(u32, u32, u64, u64)]| buckets.iter().map(|bucket| bucket.2 + bucket.3).sum::<u64>();
    // 1 to 12 samples in each bucket but the first.
    test[0].3 += 2048 - num(&test);
    for (name, buckets, first_id) in [("train", &train, 0), ("test", &test, 20_000)] {
        let root = folder.join(name);
        if !root.join("manifest.json").exists() {
            packed::pack(&root, buckets, first_id, "synthetic");
        }
    }
    println!("{}", json!({ "train": num(&train), "test": num(&test) }));
}

fn serve(folder: &Path) {
    let delay_ms = Arc::new(AtomicU64::new(0));
    let delay = delay_ms.clone();
    let server = ObjectServer::start(folder, move |_| {
        let delay = Duration::from_millis(delay.load(Ordering::Relaxed));
        (!delay.is_zero()).then_some(Fault::Slow(delay))
    });
    println!("{}", server.url());
    for line in std::io::stdin().lines() {
        match line.unwrap().split_once(' ') {
            Some(("delay", ms)) => {
                delay_ms.store(ms.parse().expect("delay MS"), Ordering::Relaxed);
                server.reset();
            }
            _ => {
                let served = server.served();
                let distinct = distinct_bytes(folder, &served.names);
                println!(
                    "{}",
                    json!({ "requests": served.requests, "bytes": served.bytes, "distinct_bytes": distinct })
                );
            }
        }
    }
}

/// Bytes that were asked for, each counted once however often that was; of what is asked for whole, all.
fn distinct_bytes(folder: &Path, asked: &[Asked]) -> u64 {
    let mut by_file = BTreeMap::<&str, Vec<Range<u64>>>::new();
    for (name, range) in asked {
        let len = fs::metadata(folder.join(name)).map_or(0, |of| of.len());
        let range = range.clone().unwrap_or(0..len);
        by_file.entry(name).or_default().push(range.start..range.end.min(len));
    }
    let in_file = |mut ranges: Vec<Range<u64>>| {
        ranges.sort_by_key(|range| range.start);
        let add = |(sum, past): (u64, u64), range: Range<u64>| {
            (sum + range.end.saturating_sub(range.start.max(past)), past.max(range.end))
        };
        ranges.into_iter().fold((0, 0), add).0
    };
    by_file.into_values().map(in_file).sum()
}

/// One epoch on one rank that asks for one micro-batch a step.
fn train(url: &str) -> impl Iterator<Item = Result<MicroBatch>> + use<> {
    let settings = OrderSettings {
        seed: 0,
        micro_batch: BATCH,
        micro_batches: 1,
        lanes: None,
        mode: Mode::Window,
        window_samples: 2048,
    };
    let url = url.to_owned();
    // Opening counts: it happens when the first batch is asked for.
    std::iter::once_with(move || {
        let mut loader = Loader::new(vec![packed::source(url)], settings, RankOf::ONLY).unwrap();
        let steps = loader.order().epoch_start(1);
        eprintln!("second pass by arithmetic: fetched / needed {:.4}", amplification(loader.order(), 1));
        (0..steps).map(move |_| loader.next_step().map(|mut step| step.micro_batches.remove(0)))
    })
    .flatten()
}

/// The test set on one rank.
fn test(url: &str) -> impl Iterator<Item = Result<MicroBatch>> + use<> {
    let url = url.to_owned();
    std::iter::once_with(move || test_batches(&[packed::source(url)], BATCH, 0, RankOf::ONLY).unwrap()).flatten()
}

/// Reads to the end or for so many seconds, as `scripts/peers/loaders/read.py` does with the others.
fn read(batches: &mut dyn Iterator<Item = Result<MicroBatch>>, secs: f64) {
    let began = Instant::now();
    let (mut first_secs, mut first_samples, mut num_batches, mut latent_bytes) = (None, 0, 0u64, 0);
    let mut ids = Vec::new();
    let whole_pass = loop {
        let Some(batch) = batches.next() else { break true };
        let batch = batch.unwrap();
        num_batches += 1;
        latent_bytes += 2 * batch.latents.len() as u64;
        ids.extend(batch.ids);
        if first_secs.is_none() {
            (first_secs, first_samples) = (Some(began.elapsed().as_secs_f64()), ids.len());
        }
        if began.elapsed().as_secs_f64() > secs {
            break false;
        }
    };
    let secs = began.elapsed().as_secs_f64();
    let distinct = ids.iter().collect::<HashSet<_>>().len();
    let (rate, after_first) = (ids.len() as f64 / secs, (ids.len() - first_samples) as f64);
    println!(
        "{}",
        json!({ "first_batch_secs": first_secs, "secs": secs, "samples": ids.len(), "distinct": distinct,
            "batches": num_batches, "latent_bytes": latent_bytes, "whole_pass": whole_pass, "error": null,
            "samples_per_sec": rate, "samples_per_sec_after_first": after_first / (secs - first_secs.unwrap()) })
    );
}
