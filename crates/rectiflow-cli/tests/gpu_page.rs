//! `scripts/gpu/run --dry-run`: every stage of the checks and measurements for a machine with a
//! GPU, with tiny models on the processor. A fault of the script must not be found on a rented
//! machine.

use std::{fs, path::Path, process::Command};

#[test]
#[ignore = "a minute on two cores: run it after a change of scripts/gpu, with --run-ignored all"]
fn the_gpu_script_goes_through_all_of_its_stages_without_a_gpu() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("out");
    let answer = Command::new("python3")
        .arg(root.join("scripts/gpu/measure.py"))
        .args(["--dry-run", "--program", env!("CARGO_BIN_EXE_rectiflow")])
        .arg("--out")
        .arg(&out)
        .env("OMP_NUM_THREADS", "1")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("python3 is there");
    let text = String::from_utf8_lossy(&answer.stdout);
    let said = String::from_utf8_lossy(&answer.stderr);
    assert!(answer.status.success(), "{text}{said}");

    let page = fs::read_to_string(out.join("gpu.md")).expect("the page is written");
    for part in [
        "0 failed",
        "tiny, bf16, recomputation: losses",
        "resume from the middle",
        "latents of the autoencoder",
        "picture, bf16",
        "two ranks on this machine: they train",
        "## A training step",
        "## Preparation",
        "## Sampling",
    ] {
        assert!(page.contains(part), "{part} is missing:\n{page}");
    }
    let results = fs::read_to_string(out.join("results.jsonl")).expect("the results are written");
    let mut failed = Vec::new();
    for line in results.lines() {
        let result: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
        if result.get("error").is_some() {
            failed.push(result);
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}
