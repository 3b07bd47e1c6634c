//! `rectiflow prep --workers N`: the workers of a preparation on one machine, each a process of the
//! same command.
//!
//! Each gets its number in an environment variable. Worker 0 shows its progress; what the others
//! say goes to files beside the data set. A worker ends when this process does, since its standard
//! input ends.

use std::{
    env,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use rectiflow_data::prep::Part;
use tch::Device;

use crate::terminal::answer::Misuse;

/// The variable with the part of a worker, such as `0/8`.
const PART: &str = "RECTIFLOW_PREP_WORKER";
/// Exit code of a worker whose parent has ended.
const ORPHANED: i32 = 130;
/// How often the workers are looked after.
const GLANCE: Duration = Duration::from_millis(100);
/// Lines of a worker's messages that are shown if it fails.
const LINES_SHOWN: usize = 5;

/// The part of this process, if it is a worker that [`run`] has started.
pub(super) fn own_part() -> anyhow::Result<Option<Part>> {
    let Some(text) = env::var_os(PART) else {
        return Ok(None);
    };
    let part = text.to_string_lossy().parse();
    let part = part.map_err(|reason| anyhow::anyhow!("{PART}: {reason}"))?;
    thread::spawn(|| {
        // Nothing is ever written to it; an error counts as its end.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        // Without the destructors of libtorch, which the main thread is still using.
        signal_hook::low_level::exit(ORPHANED);
    });
    Ok(Some(part))
}

/// The device of this process: for a worker that [`run`] has started, the GPU of its number.
pub(super) fn own_device(device: Device) -> anyhow::Result<Device> {
    let part = env::var(PART)
        .ok()
        .and_then(|text| text.parse::<Part>().ok());
    Ok(match (device, part) {
        (Device::Cuda(_), Some(part)) => {
            let num_gpus = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
            if num_gpus < part.num_workers as usize {
                bail!(
                    "--workers {} with --device cuda needs a GPU for each, found {num_gpus}",
                    part.num_workers
                );
            }
            Device::Cuda(part.worker as usize)
        }
        (device, _) => device,
    })
}

/// Runs this command as `num_workers` workers and waits for all. `folder` is the data set's.
///
/// # Errors
/// If a worker fails, with what it said last. The others are ended then, since they could wait for
/// its facts; what they have written stays.
pub(super) fn run(num_workers: u32, folder: &Path) -> anyhow::Result<()> {
    let mut running = Vec::new();
    for worker in 0..num_workers {
        let part = Part {
            worker,
            num_workers,
        };
        running.push((worker, start(part, folder)?));
    }
    let mut failed = None;
    while !running.is_empty() {
        let mut left = Vec::new();
        for (worker, mut child) in running {
            match child.try_wait().context("waiting for a worker")? {
                None => left.push((worker, child)),
                Some(status) if status.success() || failed.is_some() => {}
                Some(status) => failed = Some((worker, status)),
            }
        }
        if failed.is_some() {
            for (_, child) in &mut left {
                drop(child.stdin.take());
            }
        }
        running = left;
        thread::sleep(GLANCE);
    }
    match failed {
        None => Ok(()),
        Some((worker, status)) => {
            let text = failure(worker, num_workers, status, folder);
            match status.code() {
                Some(2) => Err(Misuse(text).into()),
                _ => bail!(text),
            }
        }
    }
}

fn start(part: Part, folder: &Path) -> anyhow::Result<Child> {
    let program = env::current_exe().context("finding this program")?;
    let mut command = Command::new(program);
    command
        .args(env::args_os().skip(1))
        .env(PART, part.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    if part.worker > 0 {
        let log = log_path(folder, part.worker);
        let parent = log.parent().context("the file is in a folder")?;
        fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
        let file = File::create(&log).with_context(|| log.display().to_string())?;
        command.stderr(file);
    }
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = (cores / part.num_workers as usize).max(1).to_string();
    for variable in ["OMP_NUM_THREADS", "RAYON_NUM_THREADS"] {
        if env::var_os(variable).is_none() {
            command.env(variable, &threads);
        }
    }
    command.spawn().context("starting a worker")
}

/// Why the preparation failed: how a worker ended, and what it said last.
fn failure(worker: u32, num_workers: u32, status: ExitStatus, folder: &Path) -> String {
    let mut text = format!("worker {worker}/{num_workers} ended with {status}");
    if worker == 0 {
        return text + ", its message is above";
    }
    let log = log_path(folder, worker);
    let said = fs::read_to_string(&log).unwrap_or_default();
    let lines: Vec<&str> = said.lines().collect();
    text += &format!(", its messages are in {}", log.display());
    for line in &lines[lines.len().saturating_sub(LINES_SHOWN)..] {
        text += &format!("\n  {line}");
    }
    text
}

/// The file with the messages of a worker.
fn log_path(folder: &Path, worker: u32) -> PathBuf {
    folder
        .join("prep/logs")
        .join(format!("worker-{worker}.log"))
}
