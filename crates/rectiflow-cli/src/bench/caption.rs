//! `rectiflow bench caption`: how many requests a second the client of `rectiflow caption` sends
//! from one core, to a server on another that takes a while for each.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use rectiflow_annotate::{
    caption::run::{Captioner, Job, run_lines},
    loopback::{manner::Manner, server::Loopback},
    pictures::{
        jpeg::{JpegSettings, encoded, jpeg_of},
        listed::Pictures,
    },
    table::answers::Answers,
};
use rectiflow_data::{
    annotation::Status,
    captioning::CaptionSettings,
    picture::Picture,
    prep::PrepSettings,
    rng::{Purpose, Rng},
};
use serde::Serialize;
use serde_json::json;

use crate::terminal::{
    answer::Answer,
    numbers::{bytes, grouped, short},
};

/// Bytes of a ready JPEG, at least.
const READY_BYTES: usize = 60_000;
/// The cores of the client and of the server.
const CLIENT_CORE: usize = 0;
const SERVER_CORE: usize = 1;
/// Sides of the pictures that are made smaller and encoded.
const LARGE_PX: (u32, u32) = (1600, 1200);

/// Measure the client of `rectiflow caption`: it runs on the first core, and on the second a server
/// that answers each request after a while and does nothing else. First with JPEGs of 60 kB that
/// are sent as they are, then with photographs that are made smaller and encoded, beside the same
/// encoder without a client.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// JPEGs that are sent as they are.
    #[arg(long, default_value_t = 6000, value_parser = clap::value_parser!(u32).range(100..))]
    ready: u32,
    /// Pictures that are made smaller and encoded.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(10..))]
    large: u32,
    /// Requests under way at once.
    #[arg(long, default_value_t = 320, value_parser = clap::value_parser!(u32).range(1..=4096))]
    requests: u32,
    /// Milliseconds that the server takes for a request.
    #[arg(long, default_value_t = 200)]
    delay_ms: u64,
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Numbers {
    ready_per_sec: f64,
    ready_bytes: u64,
    encoded_per_sec: f64,
    encoder_alone_per_sec: f64,
    /// Peak memory of the process, the server and its pictures in flight included.
    peak_bytes: u64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    // Threads that are made from here on have the core of the one that makes them.
    pin(CLIENT_CORE).context("the client needs a core of its own")?;
    let folder = tempfile::tempdir().context("a folder for pictures")?;
    let ready = folder.path().join("ready");
    let ready_bytes = write_ready(&ready, args.ready)?;
    let large = folder.path().join("large");
    write_large(&large, args.large)?;

    let ready_per_sec = measure(args, &ready, folder.path(), args.ready)?;
    let encoder_alone_per_sec = encoder_alone(&large)?;
    let encoded_per_sec = measure(args, &large, folder.path(), args.large)?;
    let numbers = Numbers {
        ready_per_sec,
        ready_bytes,
        encoded_per_sec,
        encoder_alone_per_sec,
        peak_bytes: peak_bytes()?,
    };
    let share = 100.0 * encoded_per_sec / encoder_alone_per_sec;
    let (width, height) = LARGE_PX;
    let text = format!(
        "client on core {CLIENT_CORE}, server on core {SERVER_CORE}, {} ms a request, {} at once\n\
         {} requests/s with {} JPEGs of {}, sent as they are\n\
         {} requests/s with {} JPEGs of {width}x{height}, made smaller and encoded: {}% of the \
         encoder alone, {}/s\n\
         peak memory, server included: {}",
        args.delay_ms,
        args.requests,
        short(ready_per_sec, 4),
        grouped(u64::from(args.ready)),
        bytes(ready_bytes),
        short(encoded_per_sec, 4),
        grouped(u64::from(args.large)),
        short(share, 3),
        short(encoder_alone_per_sec, 4),
        bytes(numbers.peak_bytes)
    );
    Ok(Answer::done(text, json!({ "captions": numbers })))
}

/// Binds this thread, and those that it makes, to a core.
fn pin(core: usize) -> anyhow::Result<()> {
    let mut cores = CpuSet::new();
    cores.set(core)?;
    sched_setaffinity(Pid::from_raw(0), &cores).with_context(|| format!("core {core}"))
}

/// Requests a second of a whole run over the pictures of a folder.
fn measure(args: &Args, source: &Path, work: &Path, num: u32) -> anyhow::Result<f64> {
    let manner = Manner {
        delay: Duration::from_millis(args.delay_ms),
        looks: false,
        ..Manner::default()
    };
    let server = Loopback::start(manner, || {
        pin(SERVER_CORE).expect("the server needs a core of its own");
    });
    let settings = CaptionSettings {
        servers: vec![server.url()],
        requests: args.requests,
        probe: false,
        ..CaptionSettings::default()
    };
    let captioner = Captioner::open(&settings)?;
    let table = work.join(format!("{num}.parquet"));
    let mut answers = Answers::open(&table, &run_lines(&settings, &captioner.models()))?;
    let prep = PrepSettings::default();
    let pictures = Pictures::of_source(source, answers.work(), &prep)?;
    let job = Job {
        pictures: &pictures,
        settings: &settings,
        jpeg: jpeg_settings(),
        modes: None,
        again: Vec::new(),
        reread: false,
        limit: None,
        threads: 1,
    };
    let began = Instant::now();
    let tally = captioner.run(&job, &mut answers, &mut |_| {}, &AtomicBool::new(false))?;
    let secs = began.elapsed().as_secs_f64();
    let num_answered = tally.num(Status::Ok);
    ensure!(
        num_answered == u64::from(num),
        "{num_answered} answers to {num} requests"
    );
    Ok(f64::from(num) / secs)
}

fn jpeg_settings() -> JpegSettings {
    let settings = CaptionSettings::default();
    JpegSettings {
        max_side_px: settings.max_side_px,
        quality: settings.jpeg_quality,
        max_pixels: PrepSettings::default().max_pixels,
        background: [255; 3],
    }
}

/// Pictures a second that are read, made smaller and encoded on this core, and then dropped.
fn encoder_alone(folder: &Path) -> anyhow::Result<f64> {
    let settings = jpeg_settings();
    let began = Instant::now();
    let mut num = 0;
    for entry in fs::read_dir(folder)? {
        let jpeg = jpeg_of(fs::read(entry?.path())?, &settings);
        let jpeg = jpeg.map_err(|fault| anyhow::anyhow!(fault.detail))?;
        std::hint::black_box(jpeg);
        num += 1;
    }
    Ok(f64::from(num) / began.elapsed().as_secs_f64())
}

/// Writes JPEGs of [`READY_BYTES`], each with other bytes after its end. Returns their length.
fn write_ready(folder: &Path, num: u32) -> anyhow::Result<u64> {
    let picture = clouds(512, 512);
    let mut jpeg = Vec::new();
    for quality in 50..=100 {
        jpeg = encoded(&picture, quality).map_err(|fault| anyhow::anyhow!(fault.detail))?;
        if jpeg.len() >= READY_BYTES {
            break;
        }
    }
    write_numbered(folder, &jpeg, num)?;
    Ok(jpeg.len() as u64 + 4)
}

fn write_large(folder: &Path, num: u32) -> anyhow::Result<()> {
    let (width, height) = LARGE_PX;
    let jpeg = encoded(&clouds(width, height), 90);
    write_numbered(
        folder,
        &jpeg.map_err(|fault| anyhow::anyhow!(fault.detail))?,
        num,
    )
}

/// Writes a JPEG many times. Decoders do not read what follows its end, which makes each another
/// picture.
fn write_numbered(folder: &Path, jpeg: &[u8], num: u32) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    let mut bytes = jpeg.to_vec();
    let end = bytes.len();
    bytes.extend([0; 4]);
    for number in 0..num {
        bytes[end..].copy_from_slice(&number.to_le_bytes());
        let path: PathBuf = folder.join(format!("{number:06}.jpg"));
        fs::write(path, &bytes)?;
    }
    Ok(())
}

/// A picture between noise and a gradient, about as hard to encode as a photograph.
fn clouds(width_px: u32, height_px: u32) -> Picture {
    let mut rng = Rng::keyed(0, Purpose::Noise, &[u64::from(width_px)]);
    let mut pixels = Vec::with_capacity(3 * (width_px * height_px) as usize);
    for y in 0..height_px {
        for x in 0..width_px {
            let grain = rng.below(24) as u8;
            let wave = (f64::from(x) / 17.0).sin() * (f64::from(y) / 23.0).cos();
            let light = (110.0 + 80.0 * wave) as u8;
            pixels.extend([
                light + grain,
                light / 2 + grain,
                (x * 200 / width_px) as u8 + grain,
            ]);
        }
    }
    Picture::new(width_px, height_px, pixels)
}

/// The most memory that this process has had.
fn peak_bytes() -> anyhow::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| {
        line.trim()
            .trim_end_matches(" kB")
            .trim()
            .parse::<u64>()
            .ok()
    });
    Ok(kib.context("the system does not say how much memory was used")? << 10)
}
