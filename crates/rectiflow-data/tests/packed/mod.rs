//! Small packed data sets whose bytes are a function of the sample numbers.

#![allow(dead_code, reason = "each user needs its own part")]

pub(crate) mod remote;

use std::{path::Path, sync::Arc};

use half::f16;
use rectiflow_data::{
    Codec, Dataset, Manifest, Record, SampleId, Split,
    batch::Source,
    bucket::{Bucket, Geometry, ResizeSpace},
    manifest::{LATENTS_OFFSET, Object, commit},
    order::Amount,
    prompt::PromptSettings,
    shard::ObjectWriter,
};

pub(crate) const SEED: u64 = 11;
/// Width, height, training rows and test rows of each bucket.
pub(crate) const BUCKETS: [(u32, u32, u64, u64); 4] = [
    (24, 16, 75, 9),
    (16, 24, 7, 2),
    (16, 16, 1, 0),
    (24, 24, 0, 1),
];

/// A record with captions of one to more than three chunks; some records have tags or quality
/// words.
pub(crate) fn record(id: u64, (width_px, height_px): (u32, u32)) -> Record {
    let caption = |words: u64| format!("{}photograph {id}", "a very long ".repeat(words as usize));
    let tags = ["solo", "long_hair", "outdoors"]
        .map(str::to_owned)
        .to_vec();
    Record {
        id: SampleId(id),
        caption_sources: Vec::new(),
        captions: vec![caption(0), caption(id % 4 * 20)],
        tags: if id.is_multiple_of(2) {
            tags
        } else {
            Vec::new()
        },
        important_tags: Vec::new(),
        quality: vec!["best quality".to_owned()],
        verbatim: id.is_multiple_of(5),
        original_width_px: 1000 + id as u32,
        original_height_px: 2000 + id as u32,
        crop_left_px: id as u32,
        crop_top_px: 3 * id as u32,
        target_width_px: width_px,
        target_height_px: height_px,
        source: format!("{id}.png"),
    }
}

pub(crate) fn latents(id: u64, len: usize) -> impl Iterator<Item = f16> {
    (0..len).map(move |at| f16::from_f32(id as f32 + at as f32 / 64.0))
}

fn empty_manifest(vae: &str) -> Manifest {
    let hash = "00".repeat(32);
    let codec = Codec {
        vae: vae.to_owned(),
        hash,
        scaling_factor: 0.13025,
        down_factor: 8,
        channels: 4,
        dtype: "F16".to_owned(),
    };
    let geometry = Geometry {
        area_px: 24 * 16,
        step_px: 8,
        bucket_min_px: 16,
        bucket_max_px: 24,
        resize: ResizeSpace::Gamma,
        background: [255; 3],
        seed: 0,
    };
    Manifest::new(codec, geometry)
}

/// Packs `buckets` with ids from `first_id` on. The same ids always result in the same bytes.
pub(crate) fn pack(root: &Path, buckets: &[(u32, u32, u64, u64)], first_id: u64, vae: &str) {
    let mut manifest = empty_manifest(vae);
    let (mut blocks, mut ids) = (Vec::new(), first_id..);
    for (bucket, &(width_px, height_px, train, test)) in (0..).zip(buckets) {
        manifest.buckets.push(Bucket {
            width_px,
            height_px,
        });
        for (split, num_rows) in [(Split::Train, train), (Split::Test, test)]
            .into_iter()
            .filter(|(_, n)| *n > 0)
        {
            let name = format!("{width_px}x{height_px}-{bucket}-{}", split as u8);
            let (latents_name, text) = (
                format!("latents/{name}.safetensors"),
                format!("text/{name}.parquet"),
            );
            let shape = [4, height_px as usize / 8, width_px as usize / 8];
            let mut writer = ObjectWriter::create(root, &latents_name, &text, shape).unwrap();
            for id in ids.by_ref().take(num_rows as usize) {
                let latents: Vec<f16> = latents(id, shape.iter().product()).collect();
                writer
                    .push(&latents, record(id, (width_px, height_px)))
                    .unwrap();
            }
            let done = writer.finish().unwrap();
            let (rows, text_bytes) = (done.rows, done.text_bytes);
            manifest.objects.push(Object {
                bucket,
                split,
                rows,
                latents: latents_name,
                text,
                text_bytes,
                deleted: None,
            });
            blocks.push(done.blocks);
        }
    }
    commit(root, &mut manifest, &blocks).unwrap();
}

pub(crate) fn source(root: impl AsRef<Path>) -> Source {
    let dataset = Arc::new(Dataset::open(root).unwrap());
    Source {
        dataset,
        prompt: PromptSettings::default(),
        amount: Amount::Repeats(1.0),
    }
}

/// A data set of [`BUCKETS`] in a new folder.
pub(crate) fn packed() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    pack(root.path(), &BUCKETS, 0, "a");
    root
}

/// Average bytes of latents and text of `num_samples` training samples, without file headers.
pub(crate) fn needed_bytes(dataset: &Dataset, num_samples: u64) -> f64 {
    let manifest = dataset.manifest();
    let train = manifest
        .objects
        .iter()
        .filter(|object| object.split == Split::Train);
    let bytes = train.clone().map(|object| {
        let text: u64 = (0..object.num_blocks())
            .map(|block| {
                let index = manifest
                    .objects
                    .iter()
                    .position(|other| other == object)
                    .unwrap();
                dataset.blocks().block(index, block).text_bytes()
            })
            .sum();
        manifest.latents_bytes(object) - LATENTS_OFFSET + text
    });
    let rows: u64 = train.map(|object| u64::from(object.live_rows())).sum();
    bytes.sum::<u64>() as f64 * num_samples as f64 / rows as f64
}
