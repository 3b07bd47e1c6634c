//! Measures the loader on this machine, against an object store on the loopback with a delay of its
//! own.
//!
//!     cargo run --release -p rectiflow-data --example loader_numbers -- FOLDER [PART]
//!
//! Packs synthetic data sets into FOLDER (0.7 GB), reads them in several ways for a few seconds
//! each, and prints one JSON object per line. `cpu_secs` is the processor time of this process, all
//! threads; the server is a process of its own. On a shared machine bytes per CPU second say more
//! than bytes per second.

#![expect(clippy::print_stdout, reason = "an example prints its results")]
#![allow(
    clippy::unwrap_used,
    reason = "a measurement that fails has nothing else to say"
)]

#[path = "../../tests/object_server/mod.rs"]
mod object_server;
mod synthetic_set;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use clap::{Parser, Subcommand, ValueEnum};
use object_server::{Fault, ObjectServer};
use rectiflow_data::{
    Dataset, Split,
    amplification::amplification,
    batch::Source,
    cache::DiskCache,
    epoch::Steps,
    loader::Loader,
    order::{Amount, BucketRows, DataShape, Mode, Order, OrderSettings, RankOf},
    prompt::PromptSettings,
    rng::{Purpose, Rng},
    throughput,
    token::{Cut, Tokenizer},
};
use serde_json::json;
use synthetic_set::packed;

const SECS: Duration = Duration::from_secs(5);

/// Measures the loader on this machine.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(disable_help_subcommand = true)]
struct Arguments {
    /// Folder for the synthetic data sets, 0.7 GB.
    #[arg(required = true)]
    folder: Option<PathBuf>,
    /// The only part to run; without it all run.
    part: Option<Part>,
    #[command(subcommand)]
    child: Option<ChildProcess>,
}

/// What this program runs itself as, in a process of its own.
#[derive(Debug, Subcommand)]
enum ChildProcess {
    /// Serves a folder's files, each answer `delay_ms` later.
    #[command(hide = true)]
    ServeObjects { folder: PathBuf, delay_ms: u64 },
    /// Measures the memory of reading from `url`.
    #[command(hide = true)]
    MeasureMemory { url: String, lanes: usize },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The order of large data sets, up to the plan of the first step.
    Order,
    /// The tokenizer on one core.
    Tokens,
    /// Latents from the page cache.
    Disk,
    /// The loader beside plain reading, from the object store.
    Wire,
    /// Resident memory.
    Memory,
    /// `owned` mode with a disk cache.
    Owned,
    /// From opening to the first step.
    First,
}

fn main() {
    let arguments = Arguments::parse();
    match arguments.child {
        Some(ChildProcess::ServeObjects { folder, delay_ms }) => serve_objects(&folder, delay_ms),
        Some(ChildProcess::MeasureMemory { url, lanes }) => memory_of(&url, lanes),
        None => {
            let folder = arguments
                .folder
                .expect("clap requires it without a subcommand");
            run_parts(&folder, arguments.part);
        }
    }
}

fn run_parts(folder: &Path, only: Option<Part>) {
    let large = packed(&folder.join("large"), &[(1024, 1024, 4096)]);
    // 300 buckets of 64 rows.
    let sizes = (0..300).map(|at| (256 + 8 * (at % 20), 256 + 8 * (at / 20), 64));
    let many = packed(&folder.join("many"), &sizes.collect::<Vec<_>>());
    for &part in Part::value_variants() {
        if only.is_some_and(|only| only != part) {
            continue;
        }
        match part {
            Part::Order => order(),
            Part::Tokens => tokens(),
            Part::Disk => from_disk(&large),
            Part::Wire => over_the_wire(&large),
            Part::Memory => memory(&large),
            Part::Owned => owned(&large, &folder.join("cache")),
            Part::First => {
                first_step(&many, 1);
                first_step(&many, 8);
            }
        }
    }
}

fn settings(mode: Mode, micro_batches: usize) -> OrderSettings {
    OrderSettings {
        seed: 0,
        micro_batch: 16,
        micro_batches,
        lanes: None,
        mode,
        window_samples: 512,
    }
}

fn source(place: &str) -> Source {
    let dataset = Arc::new(Dataset::open(place).unwrap());
    Source {
        dataset,
        prompt: PromptSettings::default(),
        amount: Amount::Repeats(1.0),
    }
}

/// Order for 13 million and a billion samples in 93 buckets, up to the plan of the first step.
fn order() {
    for samples in [13_000_000, 1_000_000_000] {
        for mode in [Mode::Local, Mode::Window] {
            let shape = synthetic_shape(samples, mode);
            let settings = OrderSettings {
                window_samples: 2048,
                ..settings(mode, 256)
            };
            let peak_before = peak_bytes();
            let began = Instant::now();
            let order = Arc::new(Order::new(&[shape], settings).unwrap());
            Steps::new(order.clone()).plan(0);
            let first_secs = began.elapsed().as_secs_f64();
            let began = Instant::now();
            Steps::new(order.clone()).plan(order.epoch_start(2) / 256 - 1);
            let seek_secs = began.elapsed().as_secs_f64();
            let peak_megabytes = (peak_bytes() - peak_before) as f64 / 1e6;
            let is_windowed = mode == Mode::Window && samples < 100_000_000;
            let read = if is_windowed {
                amplification(&order, 0)
            } else {
                1.0
            };
            let line = json!({
                "what": "order",
                "samples": samples,
                "mode": mode,
                "first_step_secs": first_secs,
                "seek_to_end_of_an_epoch_secs": seek_secs,
                "peak_megabytes_more": peak_megabytes,
                "amplification": read,
            });
            println!("{line}");
        }
    }
}

/// A data set of 93 buckets of very different sizes, in objects of 4096 rows.
fn synthetic_shape(samples: u64, mode: Mode) -> DataShape {
    let weights: Vec<u64> = (0..93).map(|bucket| 1 + bucket % 7).collect();
    let all: u64 = weights.iter().sum();
    let mut buckets = Vec::new();
    for (bucket, weight) in (0..).zip(&weights) {
        let rows = samples * weight / all;
        let run_ends = if mode == Mode::Window {
            run_ends(rows)
        } else {
            Vec::new()
        };
        buckets.push(BucketRows {
            bucket,
            rows,
            run_ends,
        });
    }
    DataShape {
        identity: "i".into(),
        text: "t".into(),
        amount: Amount::Repeats(1.0),
        buckets,
    }
}

/// The ends of the runs of at most 128 rows, which do not cross objects of 4096 rows.
fn run_ends(rows: u64) -> Vec<u32> {
    let mut ends = Vec::new();
    for first in (0..rows).step_by(4096) {
        let end = rows.min(first + 4096);
        ends.extend(
            (first..end)
                .step_by(128)
                .map(|run| (run + 128).min(end) as u32),
        );
    }
    ends
}

/// Prompts of about 200 tokens on one core: of a few words repeated, and of 50,000 words whose
/// frequency falls with their rank.
fn tokens() {
    let few =
        "a photograph of a small red house beside the quiet river in the early morning light, ";
    measure_tokens("few", &[few.repeat(12)]);
    measure_tokens("varied", &varied_prompts());
}

/// 20,000 prompts of 80 words; the n-th word is about n times as rare as the first.
fn varied_prompts() -> Vec<String> {
    const NUM_WORDS: usize = 50_000;
    let words: Vec<String> = (0..NUM_WORDS).map(word).collect();
    let mut rng = Rng::keyed(0, Purpose::Prompt, &[]);
    let mut prompts = Vec::new();
    for _ in 0..20_000 {
        let drawn = (0..80).map(|_| {
            let at = (NUM_WORDS as f64).powf(rng.f64()) as usize - 1;
            words[at].as_str()
        });
        prompts.push(drawn.collect::<Vec<_>>().join(" "));
    }
    prompts
}

/// A word of four syllables.
fn word(at: usize) -> String {
    const SYLLABLES: [&str; 16] = [
        "ra", "ti", "no", "el", "mu", "sa", "ke", "vo", "di", "lu", "pe", "an", "or", "is", "fo",
        "gy",
    ];
    [at, at / 16, at / 256, at / 4096]
        .map(|at| SYLLABLES[at % 16])
        .concat()
}

fn measure_tokens(name: &str, prompts: &[String]) {
    let tokenizer = Tokenizer::shared();
    let ids: usize = prompts
        .iter()
        .map(|prompt| tokenizer.ids(prompt).len())
        .sum();
    let began = Instant::now();
    let cpu_before = cpu_secs();
    let mut count = 0;
    while began.elapsed() < Duration::from_secs(2) {
        tokenizer.chunks_cut(&prompts[count % prompts.len()], Cut::Plain);
        count += 1;
    }
    let line = json!({
        "what": "tokens",
        "words": name,
        "tokens": ids as f64 / prompts.len() as f64,
        "prompts_per_cpu_sec": count as f64 / (cpu_secs() - cpu_before),
    });
    println!("{line}");
}

/// Latents from the page cache.
fn from_disk(root: &Path) {
    for mode in [Mode::Local, Mode::Window] {
        let source = source(root.to_str().unwrap());
        // The first round reads and verifies whole blocks, and fills the page cache.
        for round in ["first", "second"] {
            let cpu_before = cpu_secs();
            let sources = vec![source.clone()];
            let numbers =
                throughput::loader(sources, settings(mode, 8), RankOf::ONLY, SECS).unwrap();
            let rate = numbers.samples as f64 / (cpu_secs() - cpu_before);
            let line = json!({
                "what": "from disk",
                "round": round,
                "numbers": numbers,
                "samples_per_cpu_sec": rate,
            });
            println!("{line}");
        }
    }
}

/// Pairs of plain reading and the loader, in turn, so that other load affects both alike.
const PAIRS: usize = 3;
/// Five passes over the data, after which the state is steady.
const WARM_UP_STEPS: usize = 160;

/// The loader's rate over that of plain reading.
struct Ratio {
    by_the_clock: f64,
    by_cpu_time: f64,
}

fn over_the_wire(root: &Path) {
    for delay_ms in [0, 20, 50] {
        let mut server = Server::start(root, delay_ms);
        let mut by_the_clock = Vec::new();
        let mut by_cpu_time = Vec::new();
        for pair in 0..PAIRS {
            let ratio = measure_pair(&mut server, delay_ms, pair);
            by_the_clock.push(ratio.by_the_clock);
            by_cpu_time.push(ratio.by_cpu_time);
        }
        let line = json!({
            "what": "loader over plain reading, medians",
            "delay_ms": delay_ms,
            "by_the_clock": median(by_the_clock),
            "by_cpu_time": median(by_cpu_time),
        });
        println!("{line}");
    }
}

fn measure_pair(server: &mut Server, delay_ms: u64, pair: usize) -> Ratio {
    let source = source(&server.url);
    let row_bytes = source.dataset.num_bytes(Split::Train) as f64 / 4096.0;
    let began = Instant::now();
    let cpu_before = cpu_secs();
    let sequential = throughput::sequential(&source.dataset, SECS).unwrap() / 1e6;
    let sequential_cpu = sequential * began.elapsed().as_secs_f64() / (cpu_secs() - cpu_before);

    // The default: eight lanes, whose 2 GB of read-ahead take some of the first seconds.
    let mut loader = Loader::new(vec![source], settings(Mode::Window, 8), RankOf::ONLY).unwrap();
    for _ in 0..WARM_UP_STEPS {
        loader.next_step().unwrap();
    }
    let served_before = server.served();
    let began = Instant::now();
    let cpu_before = cpu_secs();
    let mut delivered = 0;
    while began.elapsed() < SECS {
        for batch in loader.next_step().unwrap().micro_batches {
            delivered += 2 * batch.latents.len() as u64;
        }
    }
    let served = server.served().since(served_before);
    let megabytes = delivered as f64 / 1e6;
    let per_sec = megabytes / began.elapsed().as_secs_f64();
    let per_cpu_sec = megabytes / (cpu_secs() - cpu_before);
    drop(loader);

    let line = json!({
        "what": "over the loopback",
        "delay_ms": delay_ms,
        "pair": pair,
        "sequential_megabytes_per_sec": sequential,
        "sequential_megabytes_per_cpu_sec": sequential_cpu,
        "samples_a_request": served.bytes as f64 / row_bytes / served.requests as f64,
        "fetched_megabytes": served.bytes as f64 / 1e6,
        "megabytes_per_sec": per_sec,
        "megabytes_per_cpu_sec": per_cpu_sec,
    });
    println!("{line}");
    Ratio {
        by_the_clock: per_sec / sequential,
        by_cpu_time: per_cpu_sec / sequential_cpu,
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Resident memory beside the formula of docs/streaming.md, each in a fresh process.
fn memory(root: &Path) {
    let server = Server::start(root, 0);
    for lanes in ["1", "2", "4"] {
        let program = std::env::current_exe().unwrap();
        let status = Command::new(program)
            .args(["measure-memory", &server.url, lanes])
            .status();
        assert!(status.unwrap().success());
    }
}

/// What a loader needs besides its read-ahead and deliveries: tokenizer, words, connections.
const BASE_BYTES: u64 = 90_000_000;

/// One measurement of [`memory`].
fn memory_of(url: &str, lanes: usize) {
    let settings = OrderSettings {
        lanes: Some(lanes),
        ..settings(Mode::Window, 8)
    };
    let source = source(url);
    let peak_before = peak_bytes();
    let numbers = throughput::loader(vec![source], settings, RankOf::ONLY, 4 * SECS).unwrap();
    let grown = (peak_bytes() - peak_before) as f64;
    let step_bytes = numbers.latent_bytes / numbers.steps;
    let formula = (numbers.read_ahead_bytes + 3 * step_bytes + BASE_BYTES) as f64;
    let line = json!({
        "what": "resident memory",
        "lanes": lanes,
        "megabytes": grown / 1e6,
        "formula_megabytes": formula / 1e6,
        "ratio": grown / formula,
    });
    println!("{line}");
}

/// `owned` mode from the first epoch on: later ones read single rows from the disk cache, which is
/// in the page cache.
fn owned(root: &Path, cache: &Path) {
    const STEPS_PER_EPOCH: usize = 4096 / 128;
    let mut server = Server::start(root, 0);
    let cache = Arc::new(DiskCache::open(cache, 1 << 30).unwrap());
    let dataset = Arc::new(Dataset::open(&server.url).unwrap().with_cache(&cache));
    let source = Source {
        dataset,
        ..source(&server.url)
    };
    let mut loader = Loader::new(vec![source], settings(Mode::Owned, 8), RankOf::ONLY).unwrap();
    for epoch in 0..4 {
        let served_before = server.served();
        let began = Instant::now();
        let cpu_before = cpu_secs();
        for _ in 0..STEPS_PER_EPOCH {
            loader.next_step().unwrap();
        }
        let (secs, cpu) = (began.elapsed().as_secs_f64(), cpu_secs() - cpu_before);
        let served = server.served().since(served_before);
        let line = json!({
            "what": "owned",
            "epoch": epoch,
            "samples_per_sec": 4096.0 / secs,
            "samples_per_cpu_sec": 4096.0 / cpu,
            "requests": served.requests,
            "fetched_megabytes": served.bytes as f64 / 1e6,
        });
        println!("{line}");
    }
}

/// An object server in a process of its own.
struct Server {
    url: String,
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

/// What a server has served.
#[derive(Debug, Clone, Copy)]
struct Counts {
    requests: u64,
    bytes: u64,
}

impl Counts {
    fn since(self, earlier: Self) -> Self {
        Self {
            requests: self.requests - earlier.requests,
            bytes: self.bytes - earlier.bytes,
        }
    }
}

impl Server {
    fn start(root: &Path, delay_ms: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg("serve-objects")
            .arg(root)
            .arg(delay_ms.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let questions = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut server = Self {
            url: String::new(),
            child,
            questions,
            answers,
        };
        server.url = server.answer();
        server
    }

    /// Requests and bytes since the start.
    fn served(&mut self) -> Counts {
        writeln!(self.questions).unwrap();
        let answer = self.answer();
        let (requests, bytes) = answer.split_once(' ').unwrap();
        Counts {
            requests: requests.parse().unwrap(),
            bytes: bytes.parse().unwrap(),
        }
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Its input is closed, so it may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves until standard input closes; answers each line with what has been served.
fn serve_objects(root: &Path, delay_ms: u64) {
    let delay = Duration::from_millis(delay_ms);
    let server = ObjectServer::start(root, move |_| {
        (!delay.is_zero()).then_some(Fault::Slow(delay))
    });
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
        let settings = settings(mode, micro_batches);
        let numbers =
            throughput::loader(vec![source], settings, RankOf::ONLY, Duration::ZERO).unwrap();
        let line = json!({
            "what": "first step, 300 buckets, 20 ms",
            "micro_batches": micro_batches,
            "mode": mode,
            "open_secs": open_secs,
            "first_step_secs": numbers.first_step_secs,
        });
        println!("{line}");
    }
}

/// This process's processor time, user and system, in steps of 10 ms.
fn cpu_secs() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name of the program, in parentheses, may hold spaces.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let times = fields.split_whitespace().skip(11).take(2);
    let ticks: f64 = times.filter_map(|field| field.parse::<f64>().ok()).sum();
    ticks / 100.0
}

/// The most memory this process has had resident.
fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap_or_default();
    let kibibytes = line
        .split_whitespace()
        .next()
        .and_then(|word| word.parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}
