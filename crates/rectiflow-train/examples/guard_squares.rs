//! Writes the data set and the base model that `tests/runs` trains on, for `scripts/guard_runs.py`.
//!
//! ```text
//! OMP_NUM_THREADS=1 cargo run --release --example guard_squares -- FOLDER
//! ```
//!
//! Leaves `squares-packed`, 61 coloured squares as latents, and `tests`, a checkpoint after one
//! step from random weights.
#![allow(
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a program, not a library"
)]

#[allow(dead_code, reason = "made for tests")]
#[path = "../tests/runs/fixture.rs"]
mod fixture;

use std::{env, fs, path::Path, process::ExitCode};

use fixture::Fixture;

fn main() -> ExitCode {
    rectiflow_sdxl::waiting::sleep_soon();
    let Some(folder) = env::args().nth(1) else {
        eprintln!("usage: guard_squares FOLDER");
        return ExitCode::from(2);
    };
    let folder = Path::new(&folder);
    let fixture = Fixture::new();
    copy(&fixture.path("data"), &folder.join("squares-packed"));
    copy(&fixture.base(), &folder.join("tests"));
    ExitCode::SUCCESS
}

/// Copies a folder and everything in it.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if source.is_dir() {
            copy(&source, &target);
        } else {
            fs::copy(&source, &target).unwrap();
        }
    }
}
