//! Preparation: a folder of captioned images to a packed data set. Restartable; only changes are encoded.
//!
//! ```text
//! list (source) -> hash, header, text (scan) -> what is new, gone, rewritten (here) -> order, objects (plan)
//!   -> decode, encode, write (encode) -> manifest (store)
//! ```
//!
//! The encoder is an argument: this crate knows no tensor library. A run that is killed leaves finished objects, which
//! the next run takes over: exactly, if the folder is the same; otherwise they become part of the data set and what is
//! left is planned anew. Nothing that a file contains ends a run; a disk that is full, or an encoder that fails, does.

pub(crate) mod encode;
pub(crate) mod plan;
pub mod publish;
pub(crate) mod scan;
pub(crate) mod source;
pub(crate) mod split;
pub(crate) mod store;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    path::Path,
    time::Instant,
};

use half::f16;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    format::{
        bucket::{Bucket, Geometry, ResizeSpace},
        manifest::{Block, Codec, Split},
        record::SampleId,
        shard::write_text,
    },
    prep::{
        encode::{Encode, Encoding},
        plan::{Cut, Item, Plan, PlannedObject},
        scan::{Accepted, Scan},
        source::Source,
        split::{Share, sides},
        store::{Journal, Row, Store, Stored, text_name, text_revision},
    },
    reject::{self, NOTES_FILE, REJECTED_FILE, Reason},
};

const FACTS_FILE: &str = "prep/files.jsonl";

/// The `[prep]` section of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PrepSettings {
    /// Most pixels of a bucket: width times height. Range 1024 to 2^26. Default 1048576 = 1024 * 1024, what SDXL was
    /// trained at.
    pub area_px: u64,
    /// Sides of buckets are multiples of this many pixels. A multiple of the VAE's factor times the UNet's down-sampling,
    /// 8 * 4 = 32 for SDXL. Range 8 to 1024. Default 64, as SDXL's own buckets.
    pub step_px: u32,
    /// Shortest side of a bucket in pixels. Range step_px to bucket_max_px. Default 512.
    pub bucket_min_px: u32,
    /// Longest side of a bucket in pixels. Range bucket_min_px to 65536. Default 2048.
    pub bucket_max_px: u32,
    /// How far an image's shape may be from its bucket's: the larger ratio of the sides over the smaller, less 1. Images
    /// beyond it are rejected. Range 0 to 100. Default 0.5: at most a third of an image is cropped away, which only shapes
    /// beyond 1:4 come near.
    pub max_aspect_error: f64,
    /// Images whose shorter side has fewer pixels are rejected; all others are enlarged where their bucket is larger, and
    /// the model is told by SDXL's size conditioning. Range 1 to 65536. Default 256, which enlarges at most fourfold at
    /// the default area.
    pub min_side_px: u32,
    /// Images that announce more pixels are rejected before any memory is reserved. Range 1 to 2^32. Default 134217728,
    /// above the largest cameras; decoding one takes up to 1.5 GB.
    pub max_pixels: u64,
    /// Longer image files are rejected unread, in MiB. Range 1 to 65536. Default 512.
    pub max_file_mib: u32,
    /// Colour behind transparent pixels: red, green, blue, each 0 to 255. Default white, as web pages show them.
    pub background: [u8; 3],
    /// "gamma" resizes on sRGB's encoded values, as the pictures that SDXL was trained on were; "linear" on light
    /// intensities. Default "gamma".
    pub resize: ResizeSpace,
    /// Keys crops, the order of rows and the test split. Any number. Default 0.
    pub seed: u64,
    /// Part of the samples that is held out for the test loss; a picture's side depends on its content alone. At most
    /// half of a set is ever held out. Range 0 to 0.5. Default 0.01; 0 with `test_count` 0 holds nothing out.
    pub test_fraction: f64,
    /// Number of samples that are held out, instead of a fraction. Any number; at most half of the set. Default 0: use
    /// `test_fraction`.
    pub test_count: u64,
    /// Keep images without any caption or tag; they are trained on with the empty prompt. Default false: they are named in
    /// rejected.jsonl, since a missing caption is most often a mistake.
    pub keep_captionless: bool,
    /// Captions that hold one of these (whole words, case does not matter), or one of their image's own `quality` words,
    /// are marked verbatim, so that training adds no quality words of its own. Default: the usual ones.
    pub quality_words: Vec<String>,
    /// Images encoded at once. More is faster on a GPU until its memory is full. Range 1 to 1024. Default 8.
    pub encode_batch: u32,
    /// Most rows of an object. An object is also at most 512 MiB. A killed run loses what it had of one object. Range 32 to
    /// 1048576. Default 4096, about 512 MiB at 1024 x 1024.
    pub object_rows: u32,
    /// Mix all rows anew, also those that are packed already; latents that exist are not encoded again. Not a setting of a
    /// recipe: `--repack`.
    #[serde(skip)]
    pub repack: bool,
}

impl Default for PrepSettings {
    fn default() -> Self {
        let words = ["masterpiece", "best quality", "high quality", "normal quality", "low quality", "worst quality"];
        Self {
            area_px: 1024 * 1024,
            step_px: 64,
            bucket_min_px: 512,
            bucket_max_px: 2048,
            max_aspect_error: 0.5,
            min_side_px: 256,
            max_pixels: 1 << 27,
            max_file_mib: 512,
            background: [255; 3],
            resize: ResizeSpace::Gamma,
            seed: 0,
            test_fraction: 0.01,
            test_count: 0,
            keep_captionless: false,
            quality_words: words.map(str::to_owned).to_vec(),
            encode_batch: 8,
            object_rows: 4096,
            repack: false,
        }
    }
}

impl PrepSettings {
    /// All that is wrong with the settings, a sentence each, named as in a recipe.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut range = |name: &str, value: u64, from: u64, to: u64| {
            if !(from..=to).contains(&value) {
                problems.push(format!("prep.{name} = {value}: must be {from} to {to}"));
            }
        };
        range("area_px", self.area_px, 1024, 1 << 26);
        range("step_px", self.step_px.into(), 8, 1024);
        range("bucket_min_px", self.bucket_min_px.into(), self.step_px.into(), self.bucket_max_px.into());
        range("bucket_max_px", self.bucket_max_px.into(), self.bucket_min_px.into(), 65_536);
        range("min_side_px", self.min_side_px.into(), 1, 65_536);
        range("max_pixels", self.max_pixels, 1, 1 << 32);
        range("max_file_mib", self.max_file_mib.into(), 1, 65_536);
        range("encode_batch", self.encode_batch.into(), 1, 1024);
        range("object_rows", self.object_rows.into(), 32, 1 << 20);
        if !(0.0..=100.0).contains(&self.max_aspect_error) {
            problems.push(format!("prep.max_aspect_error = {}: must be 0 to 100", self.max_aspect_error));
        }
        if !(0.0..=0.5).contains(&self.test_fraction) {
            problems.push(format!("prep.test_fraction = {}: must be 0 to 0.5", self.test_fraction));
        }
        if problems.is_empty() && self.geometry().buckets().is_empty() {
            let Self { area_px, step_px, bucket_min_px, bucket_max_px, .. } = self;
            let limits = format!("area_px {area_px}, step_px {step_px} and sides {bucket_min_px} to {bucket_max_px}");
            problems.push(format!("prep: {limits} allow no bucket: lower bucket_min_px or raise area_px"));
        }
        problems
    }

    /// The settings that decide what is encoded.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            area_px: self.area_px,
            step_px: self.step_px,
            bucket_min_px: self.bucket_min_px,
            bucket_max_px: self.bucket_max_px,
            resize: self.resize,
            background: self.background,
            seed: self.seed,
        }
    }

    fn share(&self) -> Share {
        if self.test_count > 0 { Share::Count(self.test_count) } else { Share::Fraction(self.test_fraction) }
    }
}

/// Images of one bucket for the encoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbBatch {
    /// Width of each.
    pub width_px: u32,
    /// Height of each.
    pub height_px: u32,
    /// How many.
    pub num_images: usize,
    /// sRGB, [n, h, w, 3].
    pub pixels: Vec<u8>,
}

/// How far a preparation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PrepEvent {
    /// Files are hashed and their headers read.
    Scanning {
        /// Files looked at.
        done: u64,
        /// Files in the folder.
        num_files: u64,
        /// Rejected so far.
        rejected: u64,
    },
    /// Images are decoded, encoded and written, or latents taken over.
    Encoding {
        /// Width of the bucket at hand.
        width_px: u32,
        /// Height of the bucket at hand.
        height_px: u32,
        /// Samples done in this run.
        done: u64,
        /// Samples to do in this run.
        num_samples: u64,
        /// Samples rejected while they were encoded.
        rejected: u64,
    },
    /// Text files are written anew because captions changed.
    Rewriting {
        /// Objects done.
        done: u64,
        /// Objects whose text changed.
        num_objects: u64,
    },
}

/// Rows of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BucketCount {
    /// Width of its images.
    pub width_px: u32,
    /// Height of its images.
    pub height_px: u32,
    /// Rows to train on.
    pub train: u64,
    /// Rows held out.
    pub test: u64,
}

/// What a preparation did, and what the data set holds now.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PrepSummary {
    /// The data set's buckets.
    pub buckets: Vec<BucketCount>,
    /// Rows to train on.
    pub train_rows: u64,
    /// Rows held out.
    pub test_rows: u64,
    /// Files that are not in the data set, by reason (see `rejected.jsonl`).
    pub rejected: BTreeMap<Reason, u64>,
    /// Files that are in it with a remark, by reason (see `notes.jsonl`).
    pub notes: BTreeMap<Reason, u64>,
    /// Rows that this run wrote.
    pub written_rows: u64,
    /// Of these, rows whose latents existed already.
    pub copied_rows: u64,
    /// Rows that an interrupted run had finished.
    pub resumed_rows: u64,
    /// Rows whose text changed.
    pub rewritten_rows: u64,
    /// Rows that are deleted in the data set's bitmaps.
    pub deleted_rows: u64,
    /// Bytes of latents and text.
    pub bytes: u64,
    /// Duration of this run.
    pub secs: f64,
}

/// Packs the images in `source` into the data set `out`, which may exist: then only changes are encoded.
///
/// `encode` is given images of one bucket and returns the posterior means of their latents, [n, C, h/f, w/f], unscaled.
/// Two preparations of the same folder with the same settings, codec and encoder write the same bytes, interrupted or
/// not.
///
/// # Errors
/// [`Error::Invalid`] for settings that cannot work, or that differ from the data set's; [`Error::Encode`] if the
/// encoder fails; [`Error::Io`] if `source` cannot be listed or `out` not written; [`Error::Malformed`] if `out` is not
/// a data set. A bad file in `source` is not an error.
pub fn prepare(
    source: &Path,
    out: &Path,
    settings: &PrepSettings,
    codec: &Codec,
    encode: &mut dyn FnMut(&RgbBatch) -> std::result::Result<Vec<f16>, String>,
    progress: &mut dyn FnMut(PrepEvent),
) -> Result<PrepSummary> {
    let start = Instant::now();
    check(settings, codec)?;
    let same = |a: &Path, b: &Path| matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b);
    fs::read_dir(source).map_err(Error::io(source))?;
    if same(source, out) {
        let reason = "the data set cannot be the folder that is prepared: name another".to_owned();
        return Err(Error::Invalid { what: out.display().to_string(), reason });
    }
    let store = Store::open(out, codec, &settings.geometry())?;
    let source = Source::list(source, out)?;
    let scan = Scan::run(&source, &out.join(FACTS_FILE), settings, progress)?;
    let mut preparation = Preparation { source, scan, store, settings, codec, counts: Counts::default() };
    preparation.run(encode, progress)?;
    preparation.leave_lists(out)?;
    Ok(preparation.summary(start.elapsed().as_secs_f64()))
}

fn check(settings: &PrepSettings, codec: &Codec) -> Result<()> {
    let mut problems = settings.validate();
    if codec.down_factor == 0 || !settings.step_px.is_multiple_of(codec.down_factor) {
        let factor = codec.down_factor;
        problems.push(format!("prep.step_px = {}: must be a multiple of the VAE's {factor}", settings.step_px));
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::Invalid { what: "settings of the preparation".to_owned(), reason: problems.join("; ") })
}

/// One run of [`prepare`].
struct Preparation<'a> {
    source: Source,
    scan: Scan,
    store: Store,
    settings: &'a PrepSettings,
    codec: &'a Codec,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    written: u64,
    copied: u64,
    resumed: u64,
    rewritten: u64,
}

impl Preparation<'_> {
    fn run(&mut self, encode: &mut Encode<'_>, progress: &mut dyn FnMut(PrepEvent)) -> Result<()> {
        let mut plan = self.plan();
        if self.store.pending.iter().any(|journal| journal.plan != plan.id) {
            // An interrupted run was about another folder: what it finished becomes part of the data set first.
            self.adopt_pending()?;
            plan = self.plan();
        }
        let changed = self.mark_deleted(&plan);
        let rewritten = self.rewrite_texts(&plan, progress)?;
        let written = self.write_objects(&plan, encode, progress)?;
        if self.settings.repack && !plan.objects.is_empty() {
            self.store.objects.retain(|stored| stored.in_manifest.is_none());
        }
        if changed || rewritten || written || self.store.dataset.is_none() {
            self.store.commit()?;
        }
        Ok(())
    }

    /// What is to be written: the accepted samples that no object holds, or all of them when repacking.
    fn plan(&self) -> Plan {
        let held = |stored: &&Stored| !self.settings.repack || stored.in_manifest.is_none();
        let kept: Vec<&Stored> = self.store.objects.iter().filter(held).collect();
        let present: HashMap<SampleId, Split> =
            kept.iter().flat_map(|o| o.journal.rows.iter().map(|row| (row.id, o.journal.split))).collect();
        let (mut new, mut train, mut test) = (Vec::new(), 0, 0);
        for (index, accepted) in self.scan.accepted.iter().enumerate() {
            match present.get(&accepted.id) {
                None if self.scan.failed.contains(&accepted.id) => {}
                None => new.push(index),
                Some(Split::Train) => train += 1,
                Some(Split::Test) => test += 1,
            }
        }
        let accepted = |&index: &usize| &self.scan.accepted[index];
        let ids: Vec<SampleId> = new.iter().map(|index| accepted(index).id).collect();
        let sides = sides(&ids, (train, test), self.settings.share(), self.settings.seed);
        let items = new.iter().zip(sides).map(|(index, split)| {
            let Accepted { id, bucket, .. } = *accepted(index);
            Item { index: *index, id, bucket, split }
        });
        Plan::new(items.collect(), &self.store.next_numbers(), &self.cut())
    }

    fn cut(&self) -> Cut {
        let Codec { hash, channels, down_factor, .. } = self.codec;
        let geometry = serde_json::to_string(&self.settings.geometry()).expect("a geometry is strings and numbers");
        let factor = u64::from(*down_factor);
        Cut {
            seed: self.settings.seed,
            max_rows: self.settings.object_rows,
            bytes_per_px: (2 * u64::from(*channels), factor * factor),
            salt: format!("{hash} {channels} {down_factor} {geometry}"),
        }
    }

    /// Takes the objects of an interrupted run into the data set, rows that it has already excepted.
    fn adopt_pending(&mut self) -> Result<()> {
        let rows = |stored: &Stored| stored.journal.rows.iter().map(|row| row.id).collect::<Vec<_>>();
        let mut present: HashSet<SampleId> = self.store.objects.iter().flat_map(rows).collect();
        for journal in std::mem::take(&mut self.store.pending) {
            let deleted = journal.rows.iter().map(|row| !present.insert(row.id)).collect();
            self.learn(&journal);
            self.store.objects.push(Stored { deleted, ..Stored::new(journal) });
        }
        self.store.commit()
    }

    /// Brings every object's bitmap of deleted rows up to date. Rows of images that came back live again.
    fn mark_deleted(&mut self, plan: &Plan) -> bool {
        if self.settings.repack && !plan.objects.is_empty() {
            return false;
        }
        let wanted: HashMap<SampleId, Bucket> = self.scan.accepted.iter().map(|a| (a.id, a.bucket)).collect();
        let (mut seen, mut changed) = (HashSet::new(), false);
        for stored in &mut self.store.objects {
            let bucket = stored.journal.bucket;
            for (row, deleted) in stored.journal.rows.iter().zip(&mut stored.deleted) {
                let gone = wanted.get(&row.id) != Some(&bucket) || !seen.insert(row.id);
                changed |= gone != *deleted;
                *deleted = gone;
            }
        }
        changed
    }

    /// Writes the text files anew in which a live row's text changed.
    fn rewrite_texts(&mut self, plan: &Plan, progress: &mut dyn FnMut(PrepEvent)) -> Result<bool> {
        if self.settings.repack && !plan.objects.is_empty() {
            return Ok(false);
        }
        let by_id: HashMap<SampleId, usize> =
            self.scan.accepted.iter().enumerate().map(|(i, accepted)| (accepted.id, i)).collect();
        let stale = |stored: &Stored| {
            let mut live = stored.journal.rows.iter().zip(&stored.deleted).filter(|&(_, &deleted)| !deleted);
            live.any(|(row, _)| by_id.get(&row.id).is_some_and(|&i| self.scan.accepted[i].text != row.text))
        };
        let stale: Vec<usize> = (0..self.store.objects.len()).filter(|&i| stale(&self.store.objects[i])).collect();
        let num_objects = stale.len() as u64;
        for (done, &index) in (1..).zip(&stale) {
            self.rewrite_text(index, &by_id)?;
            progress(PrepEvent::Rewriting { done, num_objects });
        }
        Ok(!stale.is_empty())
    }

    fn rewrite_text(&mut self, index: usize, by_id: &HashMap<SampleId, usize>) -> Result<()> {
        let stored = &self.store.objects[index];
        let dataset = self.store.dataset.as_ref().expect("objects come from a data set");
        let mut records = dataset.object_records(stored.in_manifest.expect("new objects have fresh texts"))?;
        let mut journal = stored.journal.clone();
        for ((record, row), deleted) in records.iter_mut().zip(&mut journal.rows).zip(&stored.deleted) {
            let Some(accepted) = by_id.get(&record.id).map(|&i| &self.scan.accepted[i]) else { continue };
            if *deleted || accepted.text == row.text {
                continue;
            }
            let found = &self.source.files[accepted.file];
            let text = self.source.text(found, &self.settings.quality_words).0.unwrap_or_default();
            record.captions = text.captions;
            (record.tags, record.important_tags, record.quality) = (text.tags, text.important_tags, text.quality);
            (record.verbatim, record.source) = (text.verbatim, found.path.clone());
            *row = Row::of(record);
            self.counts.rewritten += 1;
        }
        journal.text = text_name(&journal.stem, text_revision(&journal.text) + 1);
        let (text_bytes, blocks) = write_text(&self.store.root, &journal.text, &records)?;
        journal.text_bytes = text_bytes;
        for (block, text) in journal.blocks.iter_mut().zip(blocks) {
            *block = Block { latents_xxh3: block.latents_xxh3, ..text };
        }
        self.store.write_journal(&journal)?;
        self.store.objects[index].journal = journal;
        Ok(())
    }

    /// Writes the plan's objects, except those that an interrupted run has finished.
    fn write_objects(
        &mut self,
        plan: &Plan,
        encode: &mut Encode<'_>,
        progress: &mut dyn FnMut(PrepEvent),
    ) -> Result<bool> {
        let resumed = std::mem::take(&mut self.store.pending);
        let done: HashSet<&str> = resumed.iter().map(|journal| journal.stem.as_str()).collect();
        let left: Vec<&PlannedObject> = plan.objects.iter().filter(|o| !done.contains(o.stem.as_str())).collect();
        let latents = self.existing_latents();
        let mut written = Vec::new();
        let encoding = Encoding {
            store: &self.store,
            source: &self.source,
            settings: self.settings,
            accepted: &self.scan.accepted,
            latents: &|id| latents.get(&id).copied(),
            shape: &|bucket| latent_shape(self.codec, bucket),
            plan: &plan.id,
        };
        encoding.run(&left, encode, progress, &mut |journal| written.push(journal))?;
        let has_rows = |journals: &[Journal]| journals.iter().map(|journal| journal.rows.len() as u64).sum::<u64>();
        (self.counts.resumed, self.counts.written) = (has_rows(&resumed), has_rows(&written));
        let copied = |journal: &Journal| journal.rows.iter().filter(|row| latents.contains_key(&row.id)).count() as u64;
        self.counts.copied = written.iter().map(copied).sum();
        for journal in resumed.into_iter().chain(written) {
            self.learn(&journal);
            if !journal.rows.is_empty() {
                self.store.objects.push(Stored::new(journal));
            }
        }
        Ok(!plan.objects.is_empty())
    }

    /// Where the latents of packed samples are, when they are to be repacked.
    fn existing_latents(&self) -> HashMap<SampleId, (usize, u32)> {
        let mut latents = HashMap::new();
        if self.settings.repack {
            for stored in &self.store.objects {
                let Some(object) = stored.in_manifest else { continue };
                latents.extend((0..).zip(&stored.journal.rows).map(|(number, row)| (row.id, (object, number))));
            }
        }
        latents
    }

    fn learn(&mut self, journal: &Journal) {
        for (id, fault) in &journal.faults {
            self.scan.learn(*id, Some(fault.clone()), None);
        }
        for (id, note) in &journal.notes {
            self.scan.learn(*id, None, Some(note.clone()));
        }
    }

    /// Leaves what was found out about files for people and for the next run.
    fn leave_lists(&mut self, out: &Path) -> Result<()> {
        reject::write(out, REJECTED_FILE, &self.scan.rejected)?;
        reject::write(out, NOTES_FILE, &self.scan.notes)?;
        self.scan.remember(&out.join(FACTS_FILE))
    }

    fn summary(&self, secs: f64) -> PrepSummary {
        let mut buckets = BTreeMap::<(u32, u32), BucketCount>::new();
        let (mut bytes, mut deleted_rows) = (0, 0);
        for stored in &self.store.objects {
            let Bucket { width_px, height_px } = stored.journal.bucket;
            let empty = BucketCount { width_px, height_px, train: 0, test: 0 };
            let count = buckets.entry((width_px, height_px)).or_insert(empty);
            let live = stored.deleted.iter().filter(|&&deleted| !deleted).count() as u64;
            match stored.journal.split {
                Split::Train => count.train += live,
                Split::Test => count.test += live,
            }
            deleted_rows += stored.deleted.len() as u64 - live;
            let row_bytes = 2 * latent_shape(self.codec, stored.journal.bucket).iter().product::<usize>();
            bytes += stored.journal.text_bytes + (stored.deleted.len() * row_bytes) as u64;
        }
        let buckets: Vec<BucketCount> = buckets.into_values().collect();
        PrepSummary {
            train_rows: buckets.iter().map(|count| count.train).sum(),
            test_rows: buckets.iter().map(|count| count.test).sum(),
            buckets,
            rejected: reject::count(&self.scan.rejected),
            notes: reject::count(&self.scan.notes),
            written_rows: self.counts.written,
            copied_rows: self.counts.copied,
            resumed_rows: self.counts.resumed,
            rewritten_rows: self.counts.rewritten,
            deleted_rows,
            bytes,
            secs,
        }
    }
}

fn latent_shape(codec: &Codec, bucket: Bucket) -> [usize; 3] {
    let side = |px: u32| (px / codec.down_factor) as usize;
    [codec.channels as usize, side(bucket.height_px), side(bucket.width_px)]
}
