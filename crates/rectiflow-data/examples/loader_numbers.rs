//! The loader's numbers on this machine, against an object store on the loopback with a delay of its own.
//!
//!     cargo run --release -p rectiflow-data --example loader_numbers -- FOLDER [order|tokens|disk|wire|memory|owned|first]
//!
//! Packs synthetic data sets into FOLDER (0.7 GB), reads them in several ways for a few seconds each, and prints one JSON
//! object a line. `cpu_secs` is the processor time of this process, all threads; the server is a process of its own. On a
//! machine that others use, bytes for each second of it say more than bytes for each second of the clock.

#![expect(clippy::print_stdout, reason = "an example talks to whoever runs it")]
#![allow(clippy::unwrap_used, reason = "a measurement that fails has nothing else to say")]

#[path = "../tests/object_server/mod.rs"]
mod object_server;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use half::f16;
use object_server::{Fault, ObjectServer};
use rectiflow_data::{
    Codec, Dataset, Manifest, Record, SampleId, Split,
    amplification::amplification,
    batch::Source,
    bucket::{Bucket, Geometry, ResizeSpace},
    cache::DiskCache,
    epoch::Steps,
    loader::Loader,
    manifest::{Object, commit},
    order::{Amount, BucketRows, DataShape, Mode, Order, OrderSettings, RankOf},
    prompt::PromptSettings,
    rng::{Purpose, Rng},
    shard::ObjectWriter,
    throughput,
    token::{Cut, Tokenizer},
};
use serde_json::json;

const SECS: Duration = Duration::from_secs(5);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [serve, folder, delay_ms] = &arguments[..]
        && serve == "--serve"
    {
        return serve_objects(Path::new(folder), delay_ms.parse().unwrap());
    }
    if let [memory, url, lanes] = &arguments[..]
        && memory == "--memory"
    {
        return memory_of(url, lanes.parse().unwrap());
    }
    let folder = PathBuf::from(arguments.first().expect("usage: loader_numbers FOLDER [PART]"));
    let large = packed(&folder.join("large"), &[(1024, 1024, 4096); 1]);
    let many: Vec<(u32, u32, u64)> = (0..300).map(|at| (256 + 8 * (at % 20), 256 + 8 * (at / 20), 64)).collect();
    let many = packed(&folder.join("many"), &many);
    let parts: [(&str, &dyn Fn()); 7] = [
        ("order", &order),
        ("tokens", &tokens),
        ("disk", &|| from_disk(&large)),
        ("wire", &|| over_the_wire(&large)),
        ("memory", &|| memory(&large)),
        ("owned", &|| owned(&large, &folder.join("cache"))),
        ("first", &|| [1, 8].into_iter().for_each(|micro_batches| first_step(&many, micro_batches))),
    ];
    for (name, part) in parts {
        if arguments.get(1).is_none_or(|only| only == name) {
            part();
        }
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

/// Prompts of about 200 tokens on one core: of a few words that come again and again, and of all words there are, the
/// n-th of them about n times as seldom as the first.
fn tokens() {
    const NUM_WORDS: usize = 50_000;
    let tokenizer = Tokenizer::shared();
    let mut rng = Rng::keyed(0, Purpose::Prompt, &[]);
    let syllables = ["ra", "ti", "no", "el", "mu", "sa", "ke", "vo", "di", "lu", "pe", "an", "or", "is", "fo", "gy"];
    let syllable = |at: usize| syllables[at % syllables.len()];
    let word = |at: usize| [at, at / 16, at / 256, at / 4096].map(syllable).concat();
    let words: Vec<String> = (0..NUM_WORDS).map(word).collect();
    let mut prompt = |_| {
        let mut word = || words[(NUM_WORDS as f64).powf(rng.f64()) as usize - 1].as_str();
        (0..80).map(|_| word()).collect::<Vec<_>>().join(" ")
    };
    let varied: Vec<String> = (0..20_000).map(&mut prompt).collect();
    let few = ["a photograph of a small red house beside the quiet river in the early morning light, ".repeat(12)];
    for (name, prompts) in [("few", &few[..]), ("varied", &varied)] {
        let ids: usize = prompts.iter().map(|prompt| tokenizer.ids(prompt).len()).sum();
        let (began, cpu, mut count) = (Instant::now(), cpu_secs(), 0);
        while began.elapsed() < Duration::from_secs(2) {
            tokenizer.chunks_cut(&prompts[count % prompts.len()], Cut::Plain);
            count += 1;
        }
        let rate = count as f64 / (cpu_secs() - cpu);
        let tokens = ids as f64 / prompts.len() as f64;
        println!("{}", json!({ "what": "tokens", "words": name, "tokens": tokens, "prompts_per_cpu_sec": rate }));
    }
}

/// Latents from the page cache.
fn from_disk(root: &Path) {
    for mode in [Mode::Local, Mode::Window] {
        let source = source(root.to_str().unwrap());
        // The first pass reads and verifies whole blocks, and fills the page cache.
        for round in ["first", "second"] {
            let cpu = cpu_secs();
            let numbers = throughput::loader(vec![source.clone()], settings(mode, 8), RankOf::ONLY, SECS).unwrap();
            let rate = numbers.samples as f64 / (cpu_secs() - cpu);
            println!(
                "{}",
                json!({ "what": "from disk", "round": round, "numbers": numbers, "samples_per_cpu_sec": rate })
            );
        }
    }
}

/// Pairs of plain reading and the loader, one after the other, so that neighbours disturb both alike.
const PAIRS: usize = 3;
/// Five passes over the data, so that what comes next is the steady state.
const WARM_UP_STEPS: usize = 160;

fn over_the_wire(root: &Path) {
    for delay_ms in [0, 20, 50] {
        let mut server = Server::start(root, delay_ms);
        let mut ratios = Vec::new();
        for pair in 0..PAIRS {
            let source = source(&server.url);
            let (began, cpu) = (Instant::now(), cpu_secs());
            let sequential = throughput::sequential(&source.dataset, SECS).unwrap() / 1e6;
            let sequential_cpu = sequential * began.elapsed().as_secs_f64() / (cpu_secs() - cpu);
            let row_bytes = source.dataset.num_bytes(Split::Train) as f64 / 4096.0;
            // As it comes: eight lanes, whose 2 GB ahead are filled in the first of some seconds.
            let settings = settings(Mode::Window, 8);
            let mut loader = Loader::new(vec![source], settings, RankOf::ONLY).unwrap();
            for _ in 0..WARM_UP_STEPS {
                loader.next_step().unwrap();
            }
            let (before, began, cpu) = (server.served(), Instant::now(), cpu_secs());
            let mut delivered = 0;
            while began.elapsed() < SECS {
                let step = loader.next_step().unwrap();
                delivered += step.micro_batches.iter().map(|batch| 2 * batch.latents.len() as u64).sum::<u64>();
            }
            let (after, secs, cpu) = (server.served(), began.elapsed().as_secs_f64(), cpu_secs() - cpu);
            drop(loader);
            let (requests, fetched) = (after.0 - before.0, (after.1 - before.1) as f64 / 1e6);
            let (per_sec, per_cpu_sec) = (delivered as f64 / 1e6 / secs, delivered as f64 / 1e6 / cpu);
            ratios.push((per_sec / sequential, per_cpu_sec / sequential_cpu));
            println!(
                "{}",
                json!({ "what": "over the loopback", "delay_ms": delay_ms, "pair": pair,
                "sequential_megabytes_per_sec": sequential, "sequential_megabytes_per_cpu_sec": sequential_cpu,
                "samples_a_request": fetched * 1e6 / row_bytes / requests as f64, "fetched_megabytes": fetched,
                "megabytes_per_sec": per_sec, "megabytes_per_cpu_sec": per_cpu_sec })
            );
        }
        let median = |mut ratios: Vec<f64>| {
            ratios.sort_by(f64::total_cmp);
            ratios[ratios.len() / 2]
        };
        let (clock, cpu) = (ratios.iter().map(|r| r.0).collect(), ratios.iter().map(|r| r.1).collect());
        println!(
            "{}",
            json!({ "what": "loader over plain reading, medians", "delay_ms": delay_ms, "by_the_clock": median(clock),
            "by_cpu_time": median(cpu) })
        );
    }
}

/// Resident memory against what docs/streaming.md says, in processes that have not had any yet.
fn memory(root: &Path) {
    let server = Server::start(root, 0);
    for lanes in ["1", "2", "4"] {
        let child = Command::new(std::env::current_exe().unwrap()).args(["--memory", &server.url, lanes]).status();
        assert!(child.unwrap().success());
    }
}

/// What a loader needs besides what it reads ahead and delivers: tokenizer, words, connections.
const BASE_BYTES: u64 = 90_000_000;

/// The same, in such a process.
fn memory_of(url: &str, lanes: usize) {
    let settings = OrderSettings { lanes: Some(lanes), ..settings(Mode::Window, 8) };
    let source = source(url);
    let before = peak_bytes();
    let numbers = throughput::loader(vec![source], settings, RankOf::ONLY, 4 * SECS).unwrap();
    let step_bytes = numbers.latent_bytes / numbers.steps;
    let (grown, formula) = (peak_bytes() - before, numbers.read_ahead_bytes + 3 * step_bytes + BASE_BYTES);
    println!(
        "{}",
        json!({ "what": "resident memory", "lanes": lanes, "megabytes": grown as f64 / 1e6,
        "formula_megabytes": formula as f64 / 1e6, "ratio": grown as f64 / formula as f64 })
    );
}

/// `owned` mode from the second epoch on: single rows from the disk cache, in the page cache.
fn owned(root: &Path, cache: &Path) {
    let mut server = Server::start(root, 0);
    let cache = Arc::new(DiskCache::open(cache, 1 << 30).unwrap());
    let dataset = Arc::new(Dataset::open(&server.url).unwrap().with_cache(&cache));
    let source = Source { dataset, ..source(&server.url) };
    let mut loader = Loader::new(vec![source], settings(Mode::Owned, 8), RankOf::ONLY).unwrap();
    for epoch in 0..4 {
        let (began, cpu, before) = (Instant::now(), cpu_secs(), server.served());
        let steps = 4096 / 128;
        for _ in 0..steps {
            loader.next_step().unwrap();
        }
        let (secs, cpu, after) = (began.elapsed().as_secs_f64(), cpu_secs() - cpu, server.served());
        println!(
            "{}",
            json!({ "what": "owned", "epoch": epoch, "samples_per_sec": 4096.0 / secs, "samples_per_cpu_sec": 4096.0 / cpu,
            "requests": after.0 - before.0, "fetched_megabytes": (after.1 - before.1) as f64 / 1e6 })
        );
    }
}

/// An object server in a process of its own.
struct Server {
    url: String,
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Server {
    fn start(root: &Path, delay_ms: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([Path::new("--serve"), root, Path::new(&delay_ms.to_string())])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (ask, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut server = Self { url: String::new(), child, ask, answers };
        server.url = server.answer();
        server
    }

    /// Requests and bytes so far.
    fn served(&mut self) -> (u64, u64) {
        writeln!(self.ask).unwrap();
        let answer = self.answer();
        let (requests, bytes) = answer.split_once(' ').unwrap();
        (requests.parse().unwrap(), bytes.parse().unwrap())
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself, since nobody asks it any more.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves until nobody asks any more; answers each line with what has been served.
fn serve_objects(root: &Path, delay_ms: u64) {
    let delay = Duration::from_millis(delay_ms);
    let server = ObjectServer::start(root, move |_| (!delay.is_zero()).then_some(Fault::Slow(delay)));
    println!("{}", server.url());
    for _ in std::io::stdin().lines() {
        let served = server.served();
        println!("{} {}", served.requests, served.bytes);
    }
}

/// From opening to the first step, with 300 buckets and 20 ms for every request.
fn first_step(root: &Path, micro_batches: usize) {
    let server = Server::start(root, 20);
    for mode in [Mode::Local, Mode::Window] {
        let began = Instant::now();
        let source = source(&server.url);
        let open_secs = began.elapsed().as_secs_f64();
        let numbers =
            throughput::loader(vec![source], settings(mode, micro_batches), RankOf::ONLY, Duration::ZERO).unwrap();
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
