//! Copies a packed data set with the rows of each bucket in the order of their captions read backwards, and so undoes
//! the random order that preparation puts them in. Only good for showing what that order is worth: `scripts/mixing.sh`.
//!
//!     cargo run --release -p rectiflow-data --example sort_rows -- DATASET OUT

use std::{error::Error, path::Path};

use rectiflow_data::{
    Dataset, Manifest, Record, Split,
    manifest::{Object, commit},
    shard::ObjectWriter,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut paths = std::env::args().skip(1);
    let (Some(from), Some(to)) = (paths.next(), paths.next()) else {
        return Err("usage: sort_rows DATASET OUT".into());
    };
    let (from, to) = (Dataset::open(from)?, Path::new(&to));
    let mut manifest = Manifest::new(from.manifest().codec.clone(), from.manifest().geometry.clone());
    manifest.buckets.clone_from(&from.manifest().buckets);
    let mut blocks = Vec::new();
    for split in [Split::Train, Split::Test] {
        for bucket in from.buckets(split) {
            let shape = from.latent_shape(bucket.bucket);
            let name = format!("{}x{}-{}", bucket.width_px, bucket.height_px, split as u8);
            let (latents, text) = (format!("latents/{name}.safetensors"), format!("text/{name}.parquet"));
            let mut out = ObjectWriter::create(to, &latents, &text, shape)?;
            let mut rows: Vec<(u64, Record)> = (0..).zip(from.records(split, bucket.bucket)?).collect();
            rows.sort_by_cached_key(|(row, record)| (backwards(record), *row));
            let mut latent = vec![half::f16::ZERO; shape.iter().product()];
            for (row, record) in rows {
                from.read_latents(split, bucket.bucket, &[row], &mut latent)?;
                out.push(&latent, record)?;
            }
            let done = out.finish()?;
            let (bucket, rows, text_bytes, deleted) = (bucket.bucket, done.rows, done.text_bytes, None);
            manifest.objects.push(Object { bucket, split, rows, latents, text, text_bytes, deleted });
            blocks.push(done.blocks);
        }
    }
    commit(to, &mut manifest, &blocks)?;
    Ok(())
}

/// The demo's captions end with the background: "... red apple on a white background".
fn backwards(record: &Record) -> String {
    record.captions.first().map(|text| text.split_whitespace().rev().collect::<Vec<_>>().join(" ")).unwrap_or_default()
}
