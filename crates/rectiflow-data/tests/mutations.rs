//! Seeded mutations of every file of a packed data set. What a checksum protects is read right or
//! refused; what has new checksums is read or refused, never a panic.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod packed;

use std::{
    fs,
    path::{Path, PathBuf},
};

use checks::mutation::{Mutation, Random, cases};
use half::f16;
use rectiflow_data::{
    Dataset, Manifest, Record, Result, Split,
    block_table::{BLOCK_ROWS, Block, BlockTable},
    manifest::{LATENTS_OFFSET, MANIFEST_FILE},
};
use xxhash_rust::xxh3::xxh3_64;

/// Everything that a data set holds: for each bucket and split its records, and the bits of its
/// latents.
type Contents = Vec<(Vec<Record>, Vec<u16>)>;

fn read(root: &Path) -> Result<Contents> {
    let dataset = Dataset::open(root)?;
    let mut contents = Vec::new();
    for split in [Split::Train, Split::Test] {
        for shape in dataset.buckets(split) {
            let records = dataset.records(split, shape.bucket)?;
            let row_len: usize = dataset.latent_shape(shape.bucket).iter().product();
            let rows: Vec<u64> = (0..shape.num_rows).collect();
            let mut latents = vec![f16::ZERO; rows.len() * row_len];
            dataset.read_latents(split, shape.bucket, &rows, &mut latents)?;
            contents.push((records, latents.iter().map(|x| x.to_bits()).collect()));
        }
    }
    Ok(contents)
}

/// Whether `inspect --verify` finds a data set as it was written.
fn is_verified(root: &Path) -> bool {
    let Ok(dataset) = Dataset::open(root) else {
        return false;
    };
    (0..dataset.manifest().objects.len()).all(|object| dataset.verify_object(object).is_ok())
}

/// The files of a data set that a reader reads, relative to it.
fn files(root: &Path) -> Vec<PathBuf> {
    let manifest = Dataset::open(root).unwrap().manifest().clone();
    let mut files = vec![PathBuf::from(&manifest.blocks.file)];
    for object in &manifest.objects {
        files.push(PathBuf::from(&object.latents));
        files.push(PathBuf::from(&object.text));
    }
    files
}

#[test]
fn mutated_data_sets_are_right_or_refused() {
    let root = packed::packed();
    let files = files(root.path());
    let expected = read(root.path()).unwrap();
    assert!(is_verified(root.path()));
    for case in cases() {
        let mut random = case.random();
        let path = root.path().join(random.of(&files));
        let good = fs::read(&path).unwrap();
        let bad = case.mutation.of(&good, &mut random);
        fs::write(&path, &bad).unwrap();
        case.run(&path.display().to_string(), || {
            if let Ok(found) = read(root.path()) {
                assert!(found == expected, "other contents and no error");
            }
            assert_eq!(is_verified(root.path()), bad == good, "inspect --verify");
        });
        fs::write(&path, good).unwrap();
    }
}

#[test]
fn mutated_manifests_are_read_or_refused() {
    let root = packed::packed();
    let path = root.path().join(MANIFEST_FILE);
    let good = fs::read(&path).unwrap();
    for case in cases() {
        let bad = case.mutation.of(&good, &mut case.random());
        fs::write(&path, bad).unwrap();
        case.run("a manifest", || {
            // No checksum covers the manifest itself.
            let _ = read(root.path());
            let _ = is_verified(root.path());
        });
    }
}

/// A data set whose files can be mutated and get new checksums.
struct Forge {
    root: tempfile::TempDir,
    manifest: Manifest,
    blocks: Vec<Vec<Block>>,
}

impl Forge {
    fn new() -> Self {
        let root = packed::packed();
        let dataset = Dataset::open(root.path()).unwrap();
        let manifest = dataset.manifest().clone();
        let mut blocks = Vec::new();
        for (object, entry) in manifest.objects.iter().enumerate() {
            let block = |block| dataset.blocks().block(object, block);
            blocks.push((0..entry.num_blocks()).map(block).collect());
        }
        Self {
            root,
            manifest,
            blocks,
        }
    }

    /// Returns an object's blocks with the checksums of the files that are there.
    fn sealed(&self, object: usize) -> Vec<Block> {
        let entry = &self.manifest.objects[object];
        let latents = fs::read(self.root.path().join(&entry.latents)).unwrap();
        let text = fs::read(self.root.path().join(&entry.text)).unwrap();
        let block_bytes = u64::from(BLOCK_ROWS) * self.manifest.row_bytes(entry.bucket);
        let end = self.manifest.latents_bytes(entry);
        let mut sealed = self.blocks[object].clone();
        for (start, block) in (LATENTS_OFFSET..)
            .step_by(block_bytes as usize)
            .zip(&mut sealed)
        {
            let rows = start..(start + block_bytes).min(end);
            block.latents_xxh3 = hash(&latents, rows);
            let group = block.text_offset..block.text_offset + block.text_bytes();
            block.text_xxh3 = hash(&text, group);
        }
        sealed
    }

    /// Writes a block table and the manifest that names it.
    fn write(&self, blocks: &[Vec<Block>], text_bytes: &[u64]) {
        let table = BlockTable::new(blocks.iter().map(Vec::as_slice));
        let mut manifest = self.manifest.clone();
        manifest.blocks = table.file();
        for (object, &bytes) in manifest.objects.iter_mut().zip(text_bytes) {
            object.text_bytes = bytes;
        }
        let root = self.root.path();
        fs::write(root.join(&manifest.blocks.file), table.as_bytes()).unwrap();
        fs::write(root.join(MANIFEST_FILE), manifest.to_json()).unwrap();
    }
}

/// The checksum of those of the bytes that there are.
fn hash(bytes: &[u8], range: std::ops::Range<u64>) -> u64 {
    let len = bytes.len() as u64;
    xxh3_64(&bytes[range.start.min(len) as usize..range.end.min(len) as usize])
}

#[test]
fn mutated_data_sets_with_new_checksums_are_read_or_refused() {
    let forge = Forge::new();
    let root = forge.root.path();
    let mut num_read = 0;
    for case in cases() {
        let mut random = case.random();
        let object = random.below(forge.manifest.objects.len());
        let entry = &forge.manifest.objects[object];
        // Latents and their header, text and its footer, or the table.
        let part = random.below(5);
        let path = root.join(if part < 2 {
            &entry.latents
        } else {
            &entry.text
        });
        let good = fs::read(&path).unwrap();
        let bad = case.mutation.of(&good, &mut random);
        let mut blocks = forge.blocks.clone();
        let mut text_bytes: Vec<u64> = forge
            .manifest
            .objects
            .iter()
            .map(|object| object.text_bytes)
            .collect();
        if part == 4 {
            let block = random.below(blocks[object].len());
            mutate_entry(&mut blocks[object][block], case.mutation, &mut random);
        } else {
            fs::write(&path, &bad).unwrap();
            blocks[object] = forge.sealed(object);
            if part >= 2 {
                text_bytes[object] = bad.len() as u64;
            }
        }
        forge.write(&blocks, &text_bytes);
        num_read += usize::from(case.run(&path.display().to_string(), || {
            let _ = is_verified(root);
            read(root).is_ok()
        }));
        fs::write(&path, good).unwrap();
    }
    // Latents with another bit are numbers all the same.
    assert!(num_read > cases().len() / 20, "{num_read}");
}

/// Mutates the numbers of a block's entry, as JSON. One that cannot be read any more stays.
fn mutate_entry(block: &mut Block, mutation: Mutation, random: &mut Random) {
    let json = serde_json::to_vec(&block).unwrap();
    if let Ok(other) = serde_json::from_slice(&mutation.of(&json, random)) {
        *block = other;
    }
}
