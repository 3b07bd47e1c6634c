//! Lists a source and opens each picture: one JSON object a line on standard output, with its
//! address, the SHA-256 of its bytes and its texts. What is no sample goes to standard error.
//!
//! `scripts/peers/sources.py` compares the lines with what the tools that wrote the source wrote.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "an example prints its results"
)]

use std::path::PathBuf;

use clap::Parser;
use rectiflow_data::{PrepSettings, Source, caption::Reading};
use serde_json::json;
use sha2::{Digest, Sha256};

/// Lists a source and opens each picture.
#[derive(Debug, Parser)]
struct Args {
    /// A folder, a file or a URL.
    place: PathBuf,
    /// What kind of source it is, as in `prep.source`.
    #[arg(long, default_value = "auto")]
    source: String,
    /// A folder to work in.
    #[arg(long)]
    work: PathBuf,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let settings: PrepSettings = serde_json::from_value(json!({ "source": args.source }))?;
    let reading = Reading::default();
    let source = Source::list(&args.place, &args.work, settings.source, reading)?;
    for remark in source.remarks() {
        eprintln!("{}: {}", remark.path, remark.fault.detail);
    }
    for sample in source.samples() {
        let line = match source.open(sample) {
            Ok(bytes) => {
                let text = source.text(sample).text.unwrap_or_default();
                json!({
                    "address": sample.address(),
                    "sha256": hex(&Sha256::digest(&bytes)),
                    "captions": text.captions,
                    "tags": text.tags,
                })
            }
            Err(fault) => json!({ "address": sample.address(), "fault": fault.detail }),
        };
        println!("{line}");
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
