//! The loader's numbers on this machine, against an object store on the loopback with a delay of its own.
//!
//!     cargo run --release -p rectiflow-data --example loader_numbers -- FOLDER
//!
//! Packs synthetic data sets into FOLDER (1.2 GB), reads them in several ways for a few seconds each, and prints one
//! JSON object a line. `cpu_secs` is the processor time of this process, all threads and the server included: on a machine
//! that others use, samples for each second of it say more than samples for each second of the clock.

#![expect(clippy::print_stdout, reason = "an example talks to whoever runs it")]
#![allow(clippy::unwrap_used, reason = "a measurement that fails has nothing else to say")]

#[path = "../tests/object_server/mod.rs"]
mod object_server;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use half::f16;
use object_server::{Fault, ObjectServer};
use rectiflow_data::{
    Codec, Dataset, Manifest, Record, SampleId, Split,
    bucket::{Geometry, ResizeSpace},
    epoch::Steps,
    lanes::amplification,
    loader::{Amount, RankOf, Source},
    manifest::{Bucket, Object, commit},
    measure,
    order::{BucketRows, DataShape, Mode, Order, OrderSettings},
    prompt::PromptSettings,
    shard::ObjectWriter,
    token::{Cut, Tokenizer},
};
use serde_json::json;

const SECS: Duration = Duration::from_secs(5);

fn main() {
    let folder = PathBuf::from(std::env::args().nth(1).expect("usage: loader_numbers FOLDER"));
    let large = packed(&folder.join("large"), &[(1024, 1024, 4096); 1]);
    let many: Vec<(u32, u32, u64)> = (0..300).map(|at| (256 + 8 * (at % 20), 256 + 8 * (at / 20), 64)).collect();
    let many = packed(&folder.join("many"), &many);
    order();
    tokens();
    from_disk(&large);
    over_the_wire(&large);
    for micro_batches in [1, 8] {
        first_step(&many, micro_batches);
    }
}

fn settings(mode: Mode, micro_batches: usize) -> OrderSettings {
    OrderSettings { seed: 0, micro_batch: 16, micro_batches, lanes: None, mode, window_samples: 512 }
}

fn source(place: &str) -> Source {
    let dataset = Arc::new(Dataset::open(place).unwrap());
    Source { dataset, prompt: PromptSettings::default(), amount: Amount::Repeats(1.0) }
}

/// Order for 13 million samples in 93 buckets, up to the plan of the first step.
fn order() {
    for (samples, buckets) in [(13_000_000u64, 93u64), (1_000_000_000, 93)] {
        for mode in [Mode::Local, Mode::Window] {
            // Buckets of very different size, in objects of 4096 rows.
            let weight = |bucket: u64| 1 + bucket % 7;
            let all: u64 = (0..buckets).map(weight).sum();
            let bucket = |bucket| {
                let rows = samples * weight(bucket) / all;
                let objects = (0..rows).step_by(4096);
                let runs =
                    objects.flat_map(|first| (first..rows.min(first + 4096)).step_by(128).map(move |run| (first, run)));
                let ends = runs.map(|(first, run)| (run + 128).min(first + 4096).min(rows) as u32);
                let run_ends = if mode == Mode::Window { ends.collect() } else { Vec::new() };
                BucketRows { bucket: bucket as u32, rows, run_ends }
            };
            let buckets = (0..buckets).map(bucket).collect();
            let shape = DataShape { identity: "i".into(), text: "t".into(), amount: Amount::Repeats(1.0), buckets };
            let settings = OrderSettings { window_samples: 2048, ..settings(mode, 256) };
            let (before, began) = (peak_bytes(), Instant::now());
            let order = Arc::new(Order::new(&[shape], settings).unwrap());
            Steps::new(order.clone()).plan(0);
            let first_secs = began.elapsed().as_secs_f64();
            let began = Instant::now();
            Steps::new(order.clone()).plan(order.epoch_start(2) / 256 - 1);
            let seek_secs = began.elapsed().as_secs_f64();
            let peak_megabytes = (peak_bytes() - before) as f64 / 1e6;
            let read = if mode == Mode::Window && samples < 100_000_000 { amplification(&order, 0) } else { 1.0 };
            println!(
                "{}",
                json!({ "what": "order", "samples": samples, "mode": mode, "first_step_secs": first_secs,
                "seek_to_end_of_an_epoch_secs": seek_secs, "peak_megabytes_more": peak_megabytes, "amplification": read })
            );
        }
    }
}

/// Prompts of about 200 tokens on one core.
fn tokens() {
    let text = "a photograph of a small red house beside the quiet river in the early morning light, ".repeat(12);
    let tokenizer = Tokenizer::shared();
    let ids: usize = tokenizer.chunks(&text).clip_l.len();
    let (began, cpu, mut count) = (Instant::now(), cpu_secs(), 0);
    while began.elapsed() < Duration::from_secs(2) {
        tokenizer.chunks_cut(&text, Cut::Plain);
        count += 1;
    }
    let rate = f64::from(count) / (cpu_secs() - cpu);
    println!("{}", json!({ "what": "tokens", "chunks": ids, "prompts_per_cpu_sec": rate }));
}

/// Latents from the page cache.
fn from_disk(root: &Path) {
    for mode in [Mode::Local, Mode::Window] {
        let source = source(root.to_str().unwrap());
        // The first pass reads and verifies whole blocks, and fills the page cache.
        for round in ["first", "second"] {
            let cpu = cpu_secs();
            let numbers = measure::loader(vec![source.clone()], settings(mode, 8), RankOf::ONLY, SECS).unwrap();
            let rate = numbers.samples as f64 / (cpu_secs() - cpu);
            println!(
                "{}",
                json!({ "what": "from disk", "round": round, "numbers": numbers, "samples_per_cpu_sec": rate })
            );
        }
    }
}

fn over_the_wire(root: &Path) {
    for delay_ms in [0, 20, 50] {
        let delay = Duration::from_millis(delay_ms);
        let server = ObjectServer::start(root, move |_| (!delay.is_zero()).then_some(Fault::Slow(delay)));
        let source = source(&server.url());
        let (began, cpu) = (Instant::now(), cpu_secs());
        let sequential = measure::sequential(&source.dataset, SECS).unwrap() / 1e6;
        let sequential_cpu = sequential * began.elapsed().as_secs_f64() / (cpu_secs() - cpu);
        server.reset();
        let row_bytes = source.dataset.num_bytes(Split::Train) as f64 / 4096.0;
        let cpu = cpu_secs();
        let numbers = measure::loader(vec![source], settings(Mode::Window, 8), RankOf::ONLY, SECS).unwrap();
        let (served, cpu) = (server.served(), cpu_secs() - cpu);
        let per_request = served.bytes as f64 / row_bytes / served.requests as f64;
        let fetched = served.bytes as f64 / 1e6;
        println!(
            "{}",
            json!({ "what": "over the loopback", "delay_ms": delay_ms, "sequential_megabytes_per_sec": sequential,
            "sequential_megabytes_per_cpu_sec": sequential_cpu, "numbers": numbers, "samples_a_request": per_request,
            "fetched_megabytes": fetched, "fetched_megabytes_per_cpu_sec": fetched / cpu, "peak_megabytes": peak_bytes() as f64 / 1e6 })
        );
    }
}

/// From opening to the first step, with 300 buckets and 20 ms for every request.
fn first_step(root: &Path, micro_batches: usize) {
    let server = ObjectServer::start(root, |_| Some(Fault::Slow(Duration::from_millis(20))));
    for mode in [Mode::Local, Mode::Window] {
        let began = Instant::now();
        let source = source(&server.url());
        let open_secs = began.elapsed().as_secs_f64();
        let numbers =
            measure::loader(vec![source], settings(mode, micro_batches), RankOf::ONLY, Duration::ZERO).unwrap();
        println!(
            "{}",
            json!({ "what": "first step, 300 buckets, 20 ms", "micro_batches": micro_batches, "mode": mode,
            "open_secs": open_secs, "first_step_secs": numbers.first_step_secs })
        );
    }
}

/// Processor time of this process so far, from the kernel: user and system, in hundredths of a second.
fn cpu_secs() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name of the program, in parentheses, may hold spaces.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    let ticks = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok());
    ticks.sum::<f64>() / 100.0
}

/// Most memory that this process has had, from the kernel.
fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

/// A data set of captionless pictures, so that latents alone are measured.
fn packed(root: &Path, buckets: &[(u32, u32, u64)]) -> PathBuf {
    if root.join("manifest.json").exists() {
        return root.to_owned();
    }
    let hash = "00".repeat(32);
    let (vae, dtype) = ("synthetic".to_owned(), "F16".to_owned());
    let codec = Codec { vae, hash, scaling_factor: 0.13025, down_factor: 8, channels: 4, dtype };
    let (resize, background) = (ResizeSpace::Gamma, [255; 3]);
    let geometry =
        Geometry { area_px: 1 << 20, step_px: 8, bucket_min_px: 64, bucket_max_px: 2048, resize, background, seed: 0 };
    let mut manifest = Manifest::new(codec, geometry);
    let (mut blocks, mut ids) = (Vec::new(), 0u64..);
    for (bucket, &(width_px, height_px, rows)) in (0..).zip(buckets) {
        manifest.buckets.push(Bucket { width_px, height_px });
        for (number, first) in (0..rows).step_by(2048).enumerate() {
            let name = format!("{width_px}x{height_px}-{number:05}");
            let (latents, text) = (format!("latents/{name}.safetensors"), format!("text/{name}.parquet"));
            let shape = [4, height_px as usize / 8, width_px as usize / 8];
            let mut writer = ObjectWriter::create(root, &latents, &text, shape).unwrap();
            for id in ids.by_ref().take((rows - first).min(2048) as usize) {
                let row: Vec<f16> =
                    (0..shape.iter().product()).map(|at: usize| f16::from_f32((at % 97) as f32)).collect();
                writer.push(&row, record(id, width_px, height_px)).unwrap();
            }
            let done = writer.finish().unwrap();
            let (rows, text_bytes, deleted) = (done.rows, done.text_bytes, None);
            manifest.objects.push(Object { bucket, split: Split::Train, rows, latents, text, text_bytes, deleted });
            blocks.push(done.blocks);
        }
    }
    commit(root, &mut manifest, &blocks).unwrap();
    root.to_owned()
}

fn record(id: u64, width_px: u32, height_px: u32) -> Record {
    let (captions, tags, important_tags, quality) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    Record {
        id: SampleId(id),
        captions,
        tags,
        important_tags,
        quality,
        verbatim: false,
        original_width_px: width_px,
        original_height_px: height_px,
        crop_left_px: 0,
        crop_top_px: 0,
        target_width_px: width_px,
        target_height_px: height_px,
        source: format!("{id}.png"),
    }
}
