//! Copies a packed data set with its rows sorted, which undoes preparation's random order.
//!
//! The key is the caption read backwards. `scripts/mixing.sh` measures with such a copy what the
//! random order is worth.
//!
//!     cargo run --release -p rectiflow-data --example sort_rows -- DATASET OUT

use std::{
    error::Error,
    path::{Path, PathBuf},
};

use clap::Parser;
use rectiflow_data::{
    Dataset, Manifest, Record, Split,
    manifest::{Object, commit},
    shard::{Finished, ObjectWriter},
};

/// Copies a packed data set with the rows of each bucket sorted by their captions read backwards.
#[derive(Debug, Parser)]
struct Arguments {
    /// Folder of the packed data set.
    dataset: PathBuf,
    /// Folder of the copy.
    out: PathBuf,
}

/// The names of a bucket's two files.
struct Names {
    latents: String,
    text: String,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let from = Dataset::open(arguments.dataset)?;
    let mut manifest = empty_copy(from.manifest());
    let mut blocks = Vec::new();
    for split in [Split::Train, Split::Test] {
        for bucket in from.buckets(split) {
            let stem = format!("{}x{}-{}", bucket.width_px, bucket.height_px, split as u8);
            let names = Names {
                latents: format!("latents/{stem}.safetensors"),
                text: format!("text/{stem}.parquet"),
            };
            let done = copy_bucket(&from, split, bucket.bucket, &arguments.out, &names)?;
            manifest.objects.push(Object {
                bucket: bucket.bucket,
                split,
                rows: done.rows,
                latents: names.latents,
                text: names.text,
                text_bytes: done.text_bytes,
                deleted: None,
            });
            blocks.push(done.blocks);
        }
    }
    commit(&arguments.out, &mut manifest, &blocks)?;
    Ok(())
}

/// A manifest with the same buckets and no objects.
fn empty_copy(manifest: &Manifest) -> Manifest {
    let mut copy = Manifest::new(manifest.codec.clone(), manifest.geometry.clone());
    copy.buckets.clone_from(&manifest.buckets);
    copy
}

/// Writes a bucket's rows, sorted, to two files in `out`.
fn copy_bucket(
    from: &Dataset,
    split: Split,
    bucket: u32,
    out: &Path,
    names: &Names,
) -> rectiflow_data::Result<Finished> {
    let shape = from.latent_shape(bucket);
    let mut writer = ObjectWriter::create(out, &names.latents, &names.text, shape)?;
    let mut rows: Vec<(u64, Record)> = (0..).zip(from.records(split, bucket)?).collect();
    rows.sort_by_cached_key(|(row, record)| (backwards(record), *row));
    let mut latent = vec![half::f16::ZERO; shape.iter().product()];
    for (row, record) in rows {
        from.read_latents(split, bucket, &[row], &mut latent)?;
        writer.push(&latent, record)?;
    }
    writer.finish()
}

/// The words of the first caption, last word first. The demo's captions end with the background:
/// "... red apple on a white background".
fn backwards(record: &Record) -> String {
    let caption = record.captions.first().map_or("", String::as_str);
    let words: Vec<&str> = caption.split_whitespace().rev().collect();
    words.join(" ")
}
