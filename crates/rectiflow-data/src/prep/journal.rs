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
    prep::objects::{Series, parse_stem},
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

/// The data set in a folder, open in one preparation at a time.
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
    /// [`Error::Invalid`] if another preparation has it open, or if its codec or geometry differs;
    /// also the errors of [`Dataset::open`].
    pub(crate) fn open(root: &Path, codec: &Codec, geometry: &Geometry) -> Result<Self> {
        let folder = root.join(OBJECTS_FOLDER);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let lock = lock(root)?;
        let dataset = match fs::exists(root.join(MANIFEST_FILE)).map_err(Error::io(root))? {
            true => Some(Dataset::open(root)?),
            false => None,
        };
        if let Some(dataset) = &dataset {
            check_same(root, dataset.manifest(), codec, geometry)?;
        }
        let (codec, geometry) = (codec.clone(), geometry.clone());
        let (root, objects, pending) = (root.to_owned(), Vec::new(), Vec::new());
        let mut store = Self {
            root,
            codec,
            geometry,
            objects,
            pending,
            dataset,
            _lock: lock,
        };
        store.read_objects()?;
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
        let key = |stored: &Stored| {
            let Journal {
                bucket,
                split,
                stem,
                ..
            } = &stored.journal;
            let number = parse_stem(stem).map(|(_, number)| number);
            (
                bucket.width_px,
                bucket.height_px,
                *split,
                number,
                stem.clone(),
            )
        };
        self.objects.sort_by_cached_key(key);
        let mut manifest = Manifest::new(self.codec.clone(), self.geometry.clone());
        for (index, stored) in self.objects.iter_mut().enumerate() {
            let journal = &stored.journal;
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
            let deleted = (0u32..)
                .zip(&stored.deleted)
                .filter(|&(_, &deleted)| deleted);
            deleted.for_each(|(row, _)| object.delete(row));
            manifest.objects.push(object);
            stored.in_manifest = Some(index);
        }
        let blocks: Vec<Vec<Block>> = self
            .objects
            .iter()
            .map(|stored| stored.journal.blocks.clone())
            .collect();
        commit(&self.root, &mut manifest, &blocks)?;
        self.pending.clear();
        self.dataset = Some(Dataset::open(&self.root)?);
        self.sweep(&manifest)
    }

    /// Deletes temporary files and the files that `manifest` does not name. Files with names that a
    /// preparation does not write are left alone.
    fn sweep(&self, manifest: &Manifest) -> Result<()> {
        let latents = manifest.objects.iter().map(|object| object.latents.clone());
        let text = manifest.objects.iter().map(|object| object.text.clone());
        let journals = self
            .objects
            .iter()
            .map(|stored| format!("{OBJECTS_FOLDER}/{}.json", stored.journal.stem));
        let mut keep: HashSet<String> = latents.chain(text).chain(journals).collect();
        keep.insert(manifest.blocks.file.clone());
        let ours = |folder: &str, name: &str| match folder {
            "" => name.starts_with("blocks-") && name.ends_with(".bin"),
            _ => name
                .split_once('.')
                .is_some_and(|(stem, _)| parse_stem(base_stem(stem)).is_some()),
        };
        for folder in ["", "latents", "text", OBJECTS_FOLDER] {
            let path = self.root.join(folder);
            let Ok(entries) = fs::read_dir(&path) else {
                continue;
            };
            for entry in entries.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let full = if folder.is_empty() {
                    name.clone()
                } else {
                    format!("{folder}/{name}")
                };
                let stale = ours(folder, &name) && !keep.contains(&full);
                if stale || name.starts_with(TEMPORARY_PREFIX) {
                    fs::remove_file(entry.path()).map_err(Error::io(entry.path()))?;
                }
            }
        }
        Ok(())
    }

    fn read_objects(&mut self) -> Result<()> {
        let Some(dataset) = &self.dataset else {
            return Ok(());
        };
        let manifest = dataset.manifest();
        for (index, object) in manifest.objects.iter().enumerate() {
            let name = &object.latents;
            let stem = name
                .trim_start_matches("latents/")
                .trim_end_matches(".safetensors")
                .to_owned();
            let (bucket, split) = (manifest.buckets[object.bucket as usize], object.split);
            let blocks: Vec<Block> = (0..object.num_blocks())
                .map(|b| dataset.blocks().block(index, b))
                .collect();
            let fits = |journal: &Journal| {
                journal.text == object.text
                    && journal.rows.len() == object.rows as usize
                    && journal.blocks == blocks
            };
            let journal = match read_journal(&journal_path(&self.root, &stem)).filter(fits) {
                Some(journal) => journal,
                None => {
                    let rows = dataset
                        .object_records(index)?
                        .iter()
                        .map(JournalRow::of)
                        .collect();
                    let (text, text_bytes, plan) =
                        (object.text.clone(), object.text_bytes, String::new());
                    let (faults, notes) = (Vec::new(), Vec::new());
                    Journal {
                        plan,
                        stem,
                        bucket,
                        split,
                        text,
                        text_bytes,
                        rows,
                        blocks,
                        faults,
                        notes,
                    }
                }
            };
            let bits = object.deleted_bits().unwrap_or_default();
            let deleted = |row: usize| {
                bits.get(row / 8)
                    .is_some_and(|byte| byte >> (row % 8) & 1 == 1)
            };
            let deleted = (0..object.rows as usize).map(deleted).collect();
            self.objects.push(Stored {
                journal,
                deleted,
                in_manifest: Some(index),
            });
        }
        Ok(())
    }

    fn read_pending(&mut self) -> Result<()> {
        let known: HashSet<String> = self
            .objects
            .iter()
            .map(|stored| stored.journal.stem.clone())
            .collect();
        let folder = self.root.join(OBJECTS_FOLDER);
        for entry in fs::read_dir(&folder).map_err(Error::io(&folder))? {
            let path = entry.map_err(Error::io(&folder))?.path();
            let stem = path.file_stem().and_then(OsStr::to_str).unwrap_or_default();
            if path.extension() != Some(OsStr::new("json")) || known.contains(stem) {
                continue;
            }
            let complete = |journal: &Journal| journal.stem == stem && self.is_complete(journal);
            self.pending.extend(read_journal(&path).filter(complete));
        }
        self.pending.sort_by(|a, b| a.stem.cmp(&b.stem));
        Ok(())
    }

    /// Whether the files of a journal exist at full length. They were flushed before the journal
    /// was written.
    fn is_complete(&self, journal: &Journal) -> bool {
        if journal.rows.is_empty() {
            return true;
        }
        let side = |px: u32| u64::from(px / self.codec.down_factor);
        let Bucket {
            width_px,
            height_px,
        } = journal.bucket;
        let row_bytes = 2 * u64::from(self.codec.channels) * side(width_px) * side(height_px);
        let latents = LATENTS_OFFSET + journal.rows.len() as u64 * row_bytes;
        let has_len =
            |name: &str, len: u64| fs::metadata(self.root.join(name)).is_ok_and(|m| m.len() == len);
        has_len(&latents_name(&journal.stem), latents) && has_len(&journal.text, journal.text_bytes)
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

fn base_stem(stem: &str) -> &str {
    stem.split_once("_r").map_or(stem, |(base, _)| base)
}

fn journal_path(root: &Path, stem: &str) -> PathBuf {
    root.join(OBJECTS_FOLDER).join(format!("{stem}.json"))
}

/// Reads a journal. None if it cannot be read: the object's text is then read again, or, if it is
/// not committed, its images are encoded again.
fn read_journal(path: &Path) -> Option<Journal> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Locks the data set. The lock ends with the process, however it ends.
fn lock(root: &Path) -> Result<File> {
    let path = root.join(LOCK_FILE);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(Error::io(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::Error(source)) => Err(Error::Io { path, source }),
        Err(fs::TryLockError::WouldBlock) => {
            let reason = "another preparation is writing it: wait until it ends".to_owned();
            Err(Error::Invalid {
                what: root.display().to_string(),
                reason,
            })
        }
    }
}

/// Fails with the first setting that differs: a data set must not mix codecs or geometries.
fn check_same(root: &Path, manifest: &Manifest, codec: &Codec, geometry: &Geometry) -> Result<()> {
    let (old, new) = (&manifest.codec, codec);
    let pairs = [
        ("VAE (hash)", old.hash.clone(), new.hash.clone()),
        (
            "scaling_factor",
            old.scaling_factor.to_string(),
            new.scaling_factor.to_string(),
        ),
        (
            "down_factor",
            old.down_factor.to_string(),
            new.down_factor.to_string(),
        ),
        (
            "channels",
            old.channels.to_string(),
            new.channels.to_string(),
        ),
    ];
    let fields = |geometry: &Geometry| match serde_json::to_value(geometry) {
        Ok(serde_json::Value::Object(fields)) => fields,
        _ => unreachable!("a geometry is written as an object"),
    };
    let (old, new) = (fields(&manifest.geometry), fields(geometry));
    let geometry = old
        .iter()
        .map(|(key, value)| (key.as_str(), value.to_string(), new[key].to_string()));
    let differs = pairs
        .into_iter()
        .chain(geometry)
        .find(|(_, old, new)| old != new);
    let Some((what, old, new)) = differs else {
        return Ok(());
    };
    let what = format!("{what} = {new}");
    let reason = format!(
        "{} was prepared with {old}: keep that, or prepare into a new folder",
        root.display()
    );
    Err(Error::Invalid { what, reason })
}
