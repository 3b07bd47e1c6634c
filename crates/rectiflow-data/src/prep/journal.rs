//! The data set under preparation: its objects with the ids of their rows, the finished objects of
//! an interrupted run, and the commit.
//!
//! Each object has a journal, `prep/objects/<stem>.json`, which is written when both its files are
//! complete. Objects in the manifest are part of the data set; a journal whose object is not in the
//! manifest comes from an interrupted run. The journal of a committed object saves reading its text
//! again; a missing one is no loss.

use std::{
    collections::{BTreeMap, HashSet},
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    dataset::Dataset,
    durable::{self, TEMPORARY_PREFIX},
    error::{Error, Result},
    format::{
        block_table::Block,
        bucket::{Bucket, Geometry},
        manifest::{Codec, LATENTS_OFFSET, MANIFEST_FILE, Manifest, Object, Split, commit},
        record::{Record, SampleId},
    },
    lock_file::{lock_alone, lock_together},
    prep::{
        objects::{Series, parse_stem},
        signatures::{SIGNATURES_FOLDER, signatures_name},
    },
    reject::Fault,
    text::caption::Text,
};

const OBJECTS_FOLDER: &str = "prep/objects";
const LOCK_FILE: &str = "prep/lock";

/// A row: its sample and the fingerprint of its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JournalRow {
    pub(crate) id: SampleId,
    pub(crate) text: u64,
}

impl JournalRow {
    pub(crate) fn of(record: &Record) -> Self {
        let text = Text {
            captions: record.captions.clone(),
            caption_sources: record.caption_sources.clone(),
            tags: record.tags.clone(),
            important_tags: record.important_tags.clone(),
            quality: record.quality.clone(),
            verbatim: record.verbatim,
        };
        Self {
            id: record.id,
            text: text.fingerprint(&record.source),
        }
    }
}

/// A finished object. One without rows has no files: all its samples failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Journal {
    /// Id of the plan that it belongs to.
    pub(crate) plan: String,
    pub(crate) stem: String,
    pub(crate) bucket: Bucket,
    pub(crate) split: Split,
    /// Name of the text file.
    pub(crate) text: String,
    pub(crate) text_bytes: u64,
    pub(crate) rows: Vec<JournalRow>,
    pub(crate) blocks: Vec<Block>,
    /// Faults and notes that encoding found in samples.
    pub(crate) faults: Vec<(SampleId, Fault)>,
    pub(crate) notes: Vec<(SampleId, Fault)>,
    /// Bytes of its signatures; 0 if an earlier version wrote it.
    #[serde(default)]
    pub(crate) signatures_bytes: u64,
    /// Whether its latents are at the data set's URL, and not here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_sent: bool,
}

impl Journal {
    /// Whether this is the journal of `object` with these blocks.
    fn describes(&self, object: &Object, blocks: &[Block]) -> bool {
        self.text == object.text && self.rows.len() == object.rows as usize && self.blocks == blocks
    }
}

/// An object of the data set.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) journal: Journal,
    /// Whether each row is deleted.
    pub(crate) deleted: Vec<bool>,
    /// Index in the manifest that was read. None for a new object.
    pub(crate) in_manifest: Option<usize>,
}

/// Who has a data set open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holders {
    /// One preparation, which commits.
    One,
    /// Workers, which write objects that one preparation commits later.
    Workers,
}

/// The data set in a folder, open in one preparation or in its workers.
#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) root: PathBuf,
    codec: Codec,
    geometry: Geometry,
    /// The objects of the data set.
    pub(crate) objects: Vec<Stored>,
    /// Objects that an interrupted run finished.
    pub(crate) pending: Vec<Journal>,
    /// The data set as it was read.
    pub(crate) dataset: Option<Dataset>,
    /// Locked for the lifetime of the store.
    _lock: File,
}

impl Store {
    /// Opens the data set in `root`, or starts a new one.
    ///
    /// # Errors
    /// [`Error::NotReady`] if another preparation has it open; [`Error::Invalid`] if its codec or
    /// geometry differs; also the errors of [`Dataset::open`].
    pub(crate) fn open(
        root: &Path,
        codec: &Codec,
        geometry: &Geometry,
        holders: Holders,
    ) -> Result<Self> {
        let lock = lock_root(root, holders)?;
        let mut store = Self {
            _lock: lock,
            root: root.to_owned(),
            codec: codec.clone(),
            geometry: geometry.clone(),
            objects: Vec::new(),
            pending: Vec::new(),
            dataset: None,
        };
        if fs::exists(root.join(MANIFEST_FILE)).map_err(Error::io(root))? {
            let dataset = Dataset::open(root)?;
            check_same(root, dataset.manifest(), codec, geometry)?;
            store.objects = read_objects(root, &dataset)?;
            store.dataset = Some(dataset);
        }
        store.read_pending()?;
        Ok(store)
    }

    /// Opens the data set in `root`, whatever its codec and geometry are.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`Error::Io`] if there is no data set.
    pub(crate) fn open_packed(root: &Path, holders: Holders) -> Result<Self> {
        let manifest = root.join(MANIFEST_FILE);
        fs::metadata(&manifest).map_err(Error::io(&manifest))?;
        let lock = lock_root(root, holders)?;
        let dataset = Dataset::open(root)?;
        let mut store = Self {
            _lock: lock,
            root: root.to_owned(),
            codec: dataset.manifest().codec.clone(),
            geometry: dataset.manifest().geometry.clone(),
            objects: read_objects(root, &dataset)?,
            pending: Vec::new(),
            dataset: Some(dataset),
        };
        store.read_pending()?;
        Ok(store)
    }

    /// The number of each series' next object.
    pub(crate) fn next_numbers(&self) -> BTreeMap<Series, u32> {
        let mut next = BTreeMap::new();
        for stored in &self.objects {
            if let Some((series, number)) = parse_stem(&stored.journal.stem) {
                let entry = next.entry(series).or_insert(0);
                *entry = (number + 1).max(*entry);
            }
        }
        next
    }

    /// Writes the journal of an object whose files are complete.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn write_journal(&self, journal: &Journal) -> Result<()> {
        let bytes = serde_json::to_vec(journal).expect("a journal is strings and numbers");
        durable::write(&journal_path(&self.root, &journal.stem), &bytes)
    }

    /// Commits `self.objects` as the data set, and deletes the files that are no longer part of it.
    /// Objects without a live row are dropped.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn commit(&mut self) -> Result<()> {
        self.objects
            .retain(|stored| stored.deleted.contains(&false));
        self.objects.sort_by_cached_key(Stored::sort_key);
        let mut manifest = Manifest::new(self.codec.clone(), self.geometry.clone());
        let mut blocks = Vec::new();
        for (index, stored) in self.objects.iter_mut().enumerate() {
            stored.enter(&mut manifest);
            stored.in_manifest = Some(index);
            blocks.push(stored.journal.blocks.clone());
        }
        commit(&self.root, &mut manifest, &blocks)?;
        self.pending.clear();
        self.dataset = Some(Dataset::open(&self.root)?);
        self.sweep(&manifest)
    }

    /// Deletes temporary files and the files that `manifest` does not name. Files with names that a
    /// preparation does not write are left alone.
    fn sweep(&self, manifest: &Manifest) -> Result<()> {
        let keep = self.live_files(manifest);
        for folder in ["", "latents", "text", OBJECTS_FOLDER, SIGNATURES_FOLDER] {
            let Ok(entries) = fs::read_dir(self.root.join(folder)) else {
                continue;
            };
            for entry in entries.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let full = match folder {
                    "" => name.clone(),
                    _ => format!("{folder}/{name}"),
                };
                let is_stale = is_ours(folder, &name) && !keep.contains(&full);
                if is_stale || name.starts_with(TEMPORARY_PREFIX) {
                    fs::remove_file(entry.path()).map_err(Error::io(entry.path()))?;
                }
            }
        }
        Ok(())
    }

    /// The names of the data set's files and journals.
    fn live_files(&self, manifest: &Manifest) -> HashSet<String> {
        let mut files = HashSet::from([manifest.blocks.file.clone()]);
        for object in &manifest.objects {
            files.insert(object.latents.clone());
            files.insert(object.text.clone());
        }
        for stored in &self.objects {
            files.insert(format!("{OBJECTS_FOLDER}/{}.json", stored.journal.stem));
            files.insert(signatures_name(&stored.journal.stem));
        }
        files
    }

    fn read_pending(&mut self) -> Result<()> {
        let stems = self
            .objects
            .iter()
            .map(|stored| stored.journal.stem.as_str());
        let known: HashSet<&str> = stems.collect();
        let folder = self.root.join(OBJECTS_FOLDER);
        for entry in fs::read_dir(&folder).map_err(Error::io(&folder))? {
            let path = entry.map_err(Error::io(&folder))?.path();
            if let Some(stem) = journal_stem(&path)
                && !known.contains(stem)
                && let Some(journal) = read_journal(&path)
                && journal.stem == stem
                && self.is_complete(&journal)
            {
                self.pending.push(journal);
            }
        }
        self.pending.sort_by(|a, b| a.stem.cmp(&b.stem));
        Ok(())
    }

    /// Whether the files of a journal exist at full length, but for latents that were sent. They
    /// were flushed before the journal was written.
    fn is_complete(&self, journal: &Journal) -> bool {
        if journal.rows.is_empty() {
            return true;
        }
        let width = u64::from(journal.bucket.width_px / self.codec.down_factor);
        let height = u64::from(journal.bucket.height_px / self.codec.down_factor);
        let row_bytes = 2 * u64::from(self.codec.channels) * width * height;
        let latents_bytes = LATENTS_OFFSET + journal.rows.len() as u64 * row_bytes;
        let signatures = signatures_name(&journal.stem);
        if journal.signatures_bytes > 0 && !self.has_file(&signatures, journal.signatures_bytes) {
            return false;
        }
        (journal.is_sent || self.has_file(&latents_name(&journal.stem), latents_bytes))
            && self.has_file(&journal.text, journal.text_bytes)
    }

    /// Whether the data set has a file of `bytes` bytes under `name`.
    fn has_file(&self, name: &str, bytes: u64) -> bool {
        fs::metadata(self.root.join(name)).is_ok_and(|metadata| metadata.len() == bytes)
    }
}

impl Stored {
    /// A new object, all of its rows live.
    pub(crate) fn new(journal: Journal) -> Self {
        Self {
            deleted: vec![false; journal.rows.len()],
            journal,
            in_manifest: None,
        }
    }

    /// Number of rows that are not deleted.
    pub(crate) fn num_live(&self) -> u64 {
        self.deleted.iter().filter(|&&deleted| !deleted).count() as u64
    }

    /// The place of the object in the manifest: by series and number.
    fn sort_key(&self) -> (Series, Option<u32>, String) {
        let Journal {
            bucket,
            split,
            stem,
            ..
        } = &self.journal;
        let number = parse_stem(stem).map(|(_, number)| number);
        let series = (bucket.width_px, bucket.height_px, *split);
        (series, number, stem.clone())
    }

    /// Adds the object to the manifest, and its bucket if it is a new one.
    fn enter(&self, manifest: &mut Manifest) {
        let journal = &self.journal;
        if manifest.buckets.last() != Some(&journal.bucket) {
            manifest.buckets.push(journal.bucket);
        }
        let mut object = Object {
            bucket: manifest.buckets.len() as u32 - 1,
            split: journal.split,
            rows: journal.rows.len() as u32,
            latents: latents_name(&journal.stem),
            text: journal.text.clone(),
            text_bytes: journal.text_bytes,
            deleted: None,
        };
        for (row, &is_deleted) in (0..).zip(&self.deleted) {
            if is_deleted {
                object.delete(row);
            }
        }
        manifest.objects.push(object);
    }
}

/// Makes the folder of journals, and locks the data set.
fn lock_root(root: &Path, holders: Holders) -> Result<File> {
    let folder = root.join(OBJECTS_FOLDER);
    fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    lock(root, holders)
}

/// The latents file of an object.
pub(crate) fn latents_name(stem: &str) -> String {
    format!("latents/{stem}.safetensors")
}

/// The text file of an object after `revision` rewrites.
pub(crate) fn text_name(stem: &str, revision: u32) -> String {
    if revision == 0 {
        format!("text/{stem}.parquet")
    } else {
        format!("text/{stem}_r{revision}.parquet")
    }
}

/// The number of rewrites in the name of a text file.
pub(crate) fn text_revision(name: &str) -> u32 {
    let stem = name.trim_end_matches(".parquet");
    stem.rsplit_once("_r")
        .and_then(|(_, revision)| revision.parse().ok())
        .unwrap_or(0)
}

/// Whether a preparation writes files of this name in a folder.
fn is_ours(folder: &str, name: &str) -> bool {
    if folder.is_empty() {
        return name.starts_with("blocks-") && name.ends_with(".bin");
    }
    match name.split_once('.') {
        Some((stem, _)) => parse_stem(base_stem(stem)).is_some(),
        None => false,
    }
}

fn base_stem(stem: &str) -> &str {
    stem.split_once("_r").map_or(stem, |(base, _)| base)
}

/// Reads the objects of the data set in `root`.
fn read_objects(root: &Path, dataset: &Dataset) -> Result<Vec<Stored>> {
    let mut objects = Vec::new();
    for index in 0..dataset.manifest().objects.len() {
        objects.push(read_stored(root, dataset, index)?);
    }
    Ok(objects)
}

/// Reads the object `index`, with its journal or, without a fitting one, with what its text says.
fn read_stored(root: &Path, dataset: &Dataset, index: usize) -> Result<Stored> {
    let object = &dataset.manifest().objects[index];
    let stem = object
        .latents
        .trim_start_matches("latents/")
        .trim_end_matches(".safetensors");
    let mut blocks = Vec::new();
    for block in 0..object.num_blocks() {
        blocks.push(dataset.blocks().block(index, block));
    }
    let journal = match read_journal(&journal_path(root, stem)) {
        Some(journal) if journal.describes(object, &blocks) => journal,
        _ => journal_of(dataset, index, stem, blocks)?,
    };
    Ok(Stored {
        journal,
        deleted: deleted_rows(object),
        in_manifest: Some(index),
    })
}

/// The journal of an object, from the object's own text.
fn journal_of(dataset: &Dataset, index: usize, stem: &str, blocks: Vec<Block>) -> Result<Journal> {
    let manifest = dataset.manifest();
    let object = &manifest.objects[index];
    let records = dataset.object_records(index)?;
    Ok(Journal {
        plan: String::new(),
        stem: stem.to_owned(),
        bucket: manifest.buckets[object.bucket as usize],
        split: object.split,
        text: object.text.clone(),
        text_bytes: object.text_bytes,
        rows: records.iter().map(JournalRow::of).collect(),
        blocks,
        faults: Vec::new(),
        notes: Vec::new(),
        signatures_bytes: 0,
        is_sent: false,
    })
}

/// Whether each row of an object is deleted.
fn deleted_rows(object: &Object) -> Vec<bool> {
    let mut deleted = vec![false; object.rows as usize];
    let bits = object.deleted_bits().unwrap_or_default();
    for (row, is_deleted) in deleted.iter_mut().enumerate() {
        *is_deleted = bits.get(row / 8).copied().unwrap_or(0) >> (row % 8) & 1 == 1;
    }
    deleted
}

fn journal_path(root: &Path, stem: &str) -> PathBuf {
    root.join(OBJECTS_FOLDER).join(format!("{stem}.json"))
}

/// Reads a journal. None if it cannot be read: the object's text is then read again, or, if it is
/// not committed, its images are encoded again.
fn read_journal(path: &Path) -> Option<Journal> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// The stem of the object whose journal a file is. None for any other file.
fn journal_stem(path: &Path) -> Option<&str> {
    if path.extension() != Some(OsStr::new("json")) {
        return None;
    }
    path.file_stem()?.to_str()
}

/// Locks the data set. The lock ends with the process, however it ends.
fn lock(root: &Path, holders: Holders) -> Result<File> {
    let path = root.join(LOCK_FILE);
    let locked = match holders {
        Holders::One => lock_alone(&path)?,
        Holders::Workers => lock_together(&path)?,
    };
    locked.ok_or_else(|| Error::NotReady {
        what: root.display().to_string(),
        reason: "another preparation, or a worker, is writing it: wait until it ends, or end it"
            .to_owned(),
    })
}

/// Fails with the first setting that differs: a data set must not mix codecs or geometries.
fn check_same(root: &Path, manifest: &Manifest, codec: &Codec, geometry: &Geometry) -> Result<()> {
    let old = fixed_settings(&manifest.codec, &manifest.geometry);
    let new = fixed_settings(codec, geometry);
    for ((key, old), (_, new)) in old.into_iter().zip(new) {
        if old != new {
            let reason = format!(
                "{} was prepared with {old}: keep that, or prepare into a new folder",
                root.display()
            );
            return Err(Error::Invalid {
                what: format!("{key} = {new}"),
                reason,
            });
        }
    }
    Ok(())
}

/// The settings that all objects of a data set share, by key.
fn fixed_settings(codec: &Codec, geometry: &Geometry) -> Vec<(String, String)> {
    let mut settings = vec![
        ("VAE (hash)".to_owned(), codec.hash.clone()),
        (
            "scaling_factor".to_owned(),
            codec.scaling_factor.to_string(),
        ),
        ("down_factor".to_owned(), codec.down_factor.to_string()),
        ("channels".to_owned(), codec.channels.to_string()),
    ];
    let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(geometry) else {
        unreachable!("a geometry is written as an object");
    };
    for (key, value) in fields {
        settings.push((key, value.to_string()));
    }
    settings
}
