//! rectiflow's part of the comparison of loaders, `scripts/peers/loaders`.
//!
//! Packs the samples, serves them and the other engines' copies, and reads them with this crate's
//! loader.
//!
//!     side_by_side pack FOLDER       FOLDER/train, 16,000 samples in 40 buckets, FOLDER/test,
//!                                    2,048 in 300, and FOLDER/disk, 4,000 in 20; 2.8 GB
//!     side_by_side serve FOLDER      an object store whose buckets are the folders in FOLDER
//!     side_by_side train URL SECS    one epoch in training's order, or SECS seconds of it
//!     side_by_side test URL SECS     the test set in the test loss's order
//!     side_by_side passes FOLDER MODE N    N epochs of a set on a disk
//!
//! `serve` prints its URL and then obeys lines on standard input: `delay MS` delays each answer by
//! that much and resets the counts, `served` prints what has been requested since. The others print
//! one JSON object.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "an example prints its results"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a measurement that fails has nothing else to say"
)]

#[path = "../tests/object_server/mod.rs"]
mod object_server;
#[path = "../tests/packed/mod.rs"]
mod packed;

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use clap::Parser;
use object_server::{Asked, Fault, ObjectServer};
use rectiflow_data::{
    Result, SampleId,
    amplification::amplification,
    batch::MicroBatch,
    loader::Loader,
    order::{Mode, OrderSettings, RankOf},
    test_batches::test_batches,
};
use serde_json::json;

const BATCH: usize = 16;

/// rectiflow's part of the comparison of loaders.
#[derive(Debug, Parser)]
enum Command {
    /// Packs the samples, 2.3 GB.
    Pack { folder: PathBuf },
    /// Serves the folders in FOLDER as buckets of an object store.
    Serve { folder: PathBuf },
    /// Reads one epoch in training's order.
    Train {
        url: String,
        /// Time after which it stops.
        secs: f64,
    },
    /// Reads the test set in the test loss's order.
    Test {
        url: String,
        /// Time after which it stops.
        secs: f64,
    },
    /// Reads epochs of a set on a disk in training's order, and measures each.
    Passes {
        folder: String,
        mode: String,
        /// Number of epochs.
        passes: u64,
    },
}

fn main() {
    match Command::parse() {
        Command::Pack { folder } => pack(&folder),
        Command::Serve { folder } => serve(&folder),
        Command::Train { url, secs } => read(&mut train(url), secs),
        Command::Test { url, secs } => read(&mut test(url), secs),
        Command::Passes {
            folder,
            mode,
            passes,
        } => read_passes(folder, &mode, passes),
    }
}

/// Width, height, training rows and test rows of a bucket, as [`packed::pack`] takes them.
type BucketSize = (u32, u32, u64, u64);

fn pack(folder: &Path) {
    let (train, test, disk) = (
        train_buckets(16_000, 40),
        test_buckets(),
        train_buckets(4_000, 20),
    );
    for (name, buckets, first_id) in [
        ("train", &train, 0),
        ("test", &test, 20_000),
        ("disk", &disk, 0),
    ] {
        let root = folder.join(name);
        if !root.join("manifest.json").exists() {
            packed::pack(&root, buckets, first_id, "synthetic");
        }
    }
    println!(
        "{}",
        json!({ "train": num_samples(&train), "test": num_samples(&test) })
    );
}

fn num_samples(buckets: &[BucketSize]) -> u64 {
    buckets.iter().map(|bucket| bucket.2 + bucket.3).sum()
}

/// The height of a bucket of about a megapixel, a multiple of `step`.
fn height_of(width: u32, step: u32) -> u32 {
    (1 << 20) / width / step * step
}

/// `num_buckets` buckets, some far more common than others, as in collections of pictures.
fn train_buckets(num_samples: u32, num_buckets: u32) -> Vec<BucketSize> {
    let shares: Vec<f64> = (0..num_buckets)
        .map(|bucket| 1.0 / f64::from(bucket + 2))
        .collect();
    let all: f64 = shares.iter().sum();
    let mut buckets = Vec::new();
    for (bucket, share) in (0..).zip(&shares) {
        // The square and its neighbours first, wider and narrower in turn.
        let is_wide = bucket % 2 == 0;
        let width = if is_wide {
            1024 + 16 * bucket
        } else {
            1008 - 16 * (bucket - 1)
        };
        let rows = (f64::from(num_samples) * share / all).round() as u64;
        buckets.push((width, height_of(width, 16), rows, 0));
    }
    buckets
}

/// 300 buckets of 1 to 12 samples; the first one has what is missing from 2,048.
fn test_buckets() -> Vec<BucketSize> {
    let mut buckets = Vec::new();
    for bucket in 0..300 {
        let width = 512 + 8 * bucket;
        buckets.push((
            width,
            height_of(width, 8),
            0,
            u64::from(1 + bucket * 7 % 12),
        ));
    }
    buckets[0].3 += 2048 - num_samples(&buckets);
    buckets
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
        if let Some(("delay", ms)) = line.unwrap().split_once(' ') {
            delay_ms.store(ms.parse().expect("delay MS"), Ordering::Relaxed);
            server.reset();
        } else {
            let served = server.served();
            let line = json!({
                "requests": served.requests,
                "bytes": served.bytes,
                "distinct_bytes": distinct_bytes(folder, &served.names),
            });
            println!("{line}");
        }
    }
}

/// The bytes requested, each counted once however often. A request without a range asks for a whole
/// file.
fn distinct_bytes(folder: &Path, asked: &[Asked]) -> u64 {
    let mut by_file = BTreeMap::<&str, Vec<Range<u64>>>::new();
    for (name, range) in asked {
        let len = fs::metadata(folder.join(name)).map_or(0, |of| of.len());
        let range = range.clone().unwrap_or(0..len);
        by_file
            .entry(name)
            .or_default()
            .push(range.start..range.end.min(len));
    }
    by_file.into_values().map(union_len).sum()
}

/// The number of bytes in at least one of the ranges.
fn union_len(mut ranges: Vec<Range<u64>>) -> u64 {
    ranges.sort_by_key(|range| range.start);
    let mut sum = 0;
    let mut past = 0;
    for range in ranges {
        sum += range.end.saturating_sub(range.start.max(past));
        past = past.max(range.end);
    }
    sum
}

fn settings() -> OrderSettings {
    OrderSettings {
        seed: 0,
        micro_batch: BATCH,
        micro_batches: 1,
        lanes: None,
        mode: Mode::Window,
        window_samples: 2048,
    }
}

/// One epoch on one rank with one micro-batch per step.
fn train(url: String) -> impl Iterator<Item = Result<MicroBatch>> {
    let settings = settings();
    // Opening counts: it happens when the first batch is requested.
    std::iter::once_with(move || {
        let mut loader = Loader::new(vec![packed::source(url)], settings, RankOf::ONLY).unwrap();
        let steps = loader.order().epoch_start(1);
        let second_pass = amplification(loader.order(), 1);
        eprintln!("second pass by arithmetic: fetched / needed {second_pass:.4}");
        (0..steps).map(move |_| {
            loader
                .next_step()
                .map(|mut step| step.micro_batches.remove(0))
        })
    })
    .flatten()
}

/// The test set on one rank.
fn test(url: String) -> impl Iterator<Item = Result<MicroBatch>> {
    std::iter::once_with(move || {
        test_batches(&[packed::source(url)], BATCH, 0, RankOf::ONLY).unwrap()
    })
    .flatten()
}

/// What has been read.
#[derive(Default)]
struct Reading {
    first_batch_secs: Option<f64>,
    first_samples: usize,
    num_batches: u64,
    latent_bytes: u64,
    ids: Vec<SampleId>,
}

impl Reading {
    fn add(&mut self, batch: MicroBatch, began: Instant) {
        self.num_batches += 1;
        self.latent_bytes += 2 * batch.latents.len() as u64;
        self.ids.extend(batch.ids);
        if self.first_batch_secs.is_none() {
            self.first_batch_secs = Some(began.elapsed().as_secs_f64());
            self.first_samples = self.ids.len();
        }
    }
}

/// Reads to the end or for at most `secs`, as `scripts/peers/loaders/read.py` does with the others.
fn read(batches: &mut dyn Iterator<Item = Result<MicroBatch>>, secs: f64) {
    let began = Instant::now();
    let mut reading = Reading::default();
    let mut whole_pass = true;
    for batch in batches {
        reading.add(batch.unwrap(), began);
        if began.elapsed().as_secs_f64() > secs {
            whole_pass = false;
            break;
        }
    }
    let secs = began.elapsed().as_secs_f64();
    let samples = reading.ids.len();
    let after_first = (samples - reading.first_samples) as f64;
    let line = json!({
        "first_batch_secs": reading.first_batch_secs,
        "secs": secs,
        "samples": samples,
        "distinct": reading.ids.iter().collect::<HashSet<_>>().len(),
        "batches": reading.num_batches,
        "latent_bytes": reading.latent_bytes,
        "whole_pass": whole_pass,
        "error": null,
        "samples_per_sec": samples as f64 / secs,
        "samples_per_sec_after_first": after_first / (secs - reading.first_batch_secs.unwrap()),
    });
    println!("{line}");
}

/// Reads `passes` epochs on one rank with one micro-batch per step. Opening counts to the first.
fn read_passes(folder: String, mode: &str, passes: u64) {
    let mode = match mode {
        "local" => Mode::Local,
        "window" => Mode::Window,
        other => panic!("expected local or window, found {other}"),
    };
    let settings = OrderSettings { mode, ..settings() };
    let mut measured = Vec::new();
    let mut began = Instant::now();
    let mut loader = Loader::new(vec![packed::source(folder)], settings, RankOf::ONLY).unwrap();
    for pass in 0..passes {
        let steps = loader.order().epoch_start(pass)..loader.order().epoch_start(pass + 1);
        let before = Usage::now();
        let mut samples = 0;
        for _ in steps {
            for batch in loader.next_step().unwrap().micro_batches {
                samples += batch.ids.len();
            }
        }
        let secs = began.elapsed().as_secs_f64();
        let used = Usage::now();
        measured.push(json!({
            "samples": samples,
            "secs": secs,
            "samples_per_sec": samples as f64 / secs,
            "cpu_secs": used.cpu_secs - before.cpu_secs,
            "minor_faults": used.minor_faults - before.minor_faults,
            "peak_bytes": used.peak_bytes,
        }));
        began = Instant::now();
    }
    println!("{}", json!({ "passes": measured }));
}

/// What this process has used since it started.
struct Usage {
    /// User and system, all threads.
    cpu_secs: f64,
    minor_faults: u64,
    /// Most memory resident at one time.
    peak_bytes: u64,
}

impl Usage {
    fn now() -> Self {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        // The name of the program, in parentheses, may hold spaces.
        let (_, rest) = stat.rsplit_once(')').unwrap();
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let number = |at: usize| fields[at].parse::<u64>().unwrap();
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let peak_kib = peak.unwrap().trim().trim_end_matches(" kB");
        Self {
            cpu_secs: (number(11) + number(12)) as f64 / 100.0,
            minor_faults: number(7),
            peak_bytes: peak_kib.parse::<u64>().unwrap() * 1024,
        }
    }
}
