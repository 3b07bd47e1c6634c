//! The synthetic data sets that are read: latents of each shape, no captions.

use std::path::{Path, PathBuf};

use half::f16;
use rectiflow_data::{
    Codec, Manifest, Record, SampleId, Split,
    bucket::{Bucket, Geometry, ResizeSpace},
    manifest::{Object, commit},
    shard::ObjectWriter,
};

/// Packs a data set of pictures without captions, so that only latents are measured. Each bucket is
/// width, height and rows. A packed set is kept.
pub(crate) fn packed(root: &Path, buckets: &[(u32, u32, u64)]) -> PathBuf {
    if root.join("manifest.json").exists() {
        return root.to_owned();
    }
    let mut manifest = empty_manifest();
    let mut blocks = Vec::new();
    let mut first_id = 0;
    for (bucket, &(width_px, height_px, rows)) in (0..).zip(buckets) {
        manifest.buckets.push(Bucket {
            width_px,
            height_px,
        });
        for (number, first) in (0..rows).step_by(2048).enumerate() {
            let name = format!("{width_px}x{height_px}-{number:05}");
            let latents = format!("latents/{name}.safetensors");
            let text = format!("text/{name}.parquet");
            let shape = [4, height_px as usize / 8, width_px as usize / 8];
            let row: Vec<f16> = (0..shape.iter().product())
                .map(|at| f16::from_f32((at % 97) as f32))
                .collect();
            let mut writer = ObjectWriter::create(root, &latents, &text, shape).unwrap();
            let num_rows = (rows - first).min(2048);
            for id in first_id..first_id + num_rows {
                writer.push(&row, record(id, width_px, height_px)).unwrap();
            }
            first_id += num_rows;
            let done = writer.finish().unwrap();
            manifest.objects.push(Object {
                bucket,
                split: Split::Train,
                rows: done.rows,
                latents,
                text,
                text_bytes: done.text_bytes,
                deleted: None,
            });
            blocks.push(done.blocks);
        }
    }
    commit(root, &mut manifest, &blocks).unwrap();
    root.to_owned()
}

fn empty_manifest() -> Manifest {
    let codec = Codec {
        vae: "synthetic".to_owned(),
        hash: "00".repeat(32),
        scaling_factor: 0.13025,
        down_factor: 8,
        channels: 4,
        dtype: "F16".to_owned(),
    };
    let geometry = Geometry {
        area_px: 1 << 20,
        step_px: 8,
        bucket_min_px: 64,
        bucket_max_px: 2048,
        resize: ResizeSpace::Gamma,
        background: [255; 3],
        seed: 0,
    };
    Manifest::new(codec, geometry)
}

fn record(id: u64, width_px: u32, height_px: u32) -> Record {
    Record {
        id: SampleId(id),
        caption_sources: Vec::new(),
        captions: Vec::new(),
        tags: Vec::new(),
        important_tags: Vec::new(),
        quality: Vec::new(),
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
