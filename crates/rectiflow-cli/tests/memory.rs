//! The memory estimate of a training step against the process's peak resident set.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(target_os = "linux")]

use std::process::{Command, Stdio};

use serde_json::Value;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tiny-sdxl/unet");

/// Runs `bench step` on random weights and returns its numbers.
fn step(more: &[&str]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rectiflow"));
    command.args([
        "--json", "bench", "step", "--unet", TINY, "--random", "--steps", "3", "--size", "512x512",
    ]);
    let output = command
        .args(more)
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

/// Resident pages of mapped files on the machine whose program the estimate counts ("AMD EPYC",
/// family 26, 2026-11-30). They depend on the page cache: another machine had 15 MB fewer.
const FILE_BYTES: f64 = 91e6;

#[test]
fn the_estimate_is_what_a_step_takes_to_a_tenth() {
    let mut wrong = Vec::new();
    for dtype in ["fp32", "bf16"] {
        for more in [
            &["--batch", "4"][..],
            &["--batch", "4", "--checkpointing"],
            &["--batch", "4", "--budget-gib", "0.4"],
            &["--batch", "8", "--micro-batches", "2"],
        ] {
            let found = step(&[&["--dtype", dtype], more].concat());
            let [peak, files, estimated] = ["peak_bytes", "file_bytes", "estimated_bytes"]
                .map(|key| found[key].as_f64().unwrap());
            if ((estimated - FILE_BYTES) / (peak - files) - 1.0).abs() > 0.1 {
                wrong.push(format!(
                    "{dtype} {more:?}: estimated {estimated:e}, took {peak:e}, of which {files:e} \
                     are pages of files"
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
