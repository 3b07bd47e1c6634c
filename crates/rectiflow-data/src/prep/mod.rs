//! Preparation: a folder of captioned images to a packed data set. A killed run resumes, and only
//! changes are encoded.
//!
//! ```text
//! list (source) -> hash, header, text (scan) -> new, deleted, rewritten (here)
//!   -> order, objects (objects) -> decode, encode, write (encode) -> manifest (journal)
//! ```
//!
//! The encoder is an argument, because this crate has no tensor library. A killed run leaves
//! finished objects, which the next run reuses: unchanged if the folder is the same; otherwise they
//! become part of the data set and the rest is planned again. The content of a file never ends a
//! run; a full disk or a failing encoder does.

pub(crate) mod encode;
pub(crate) mod events;
pub(crate) mod filtered;
pub(crate) mod journal;
pub(crate) mod objects;
pub mod publish;
pub(crate) mod scan;
pub(crate) mod settings;
pub mod speed;
pub(crate) mod split;
pub(crate) mod text_notes;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    path::Path,
    time::Instant,
};

use half::f16;

use crate::{
    error::{Error, Result},
    format::{
        block_table::Block,
        bucket::Bucket,
        manifest::{Codec, Split},
        record::{Record, SampleId},
        shard::write_text,
    },
    prep::{
        encode::{Encode, Encoding},
        journal::{Journal, JournalRow, Store, Stored, text_name, text_revision},
        objects::{Cut, Item, ObjectPlan, PlannedObject},
        scan::{Accepted, Scan},
        split::sides,
    },
    reject::{self, NOTES_FILE, REJECTED_FILE, Reason, Remark},
    remote::{Location, network::Network},
    source::{Source, no_folder},
};

pub use events::{BucketCount, PrepEvent, PrepSummary, RgbBatch};
pub use settings::PrepSettings;

const FACTS_FILE: &str = "prep/files.jsonl";

/// Packs the images in `source` into the data set `out`. If `out` exists already, only changes are
/// encoded.
///
/// `encode` takes images of one bucket and returns the posterior means of their latents, `[n, C,
/// h/f, w/f]`, unscaled. Two preparations of the same folder with the same settings, codec and
/// encoder write the same bytes, interrupted or not.
///
/// # Errors
/// [`Error::Invalid`] for settings that cannot work, or that differ from the data set's;
/// [`Error::Encode`] if the encoder fails; [`Error::Io`] if `source` cannot be listed or `out`
/// cannot be written; [`Error::Malformed`] if `out` is not a data set. A bad file in `source` is
/// not an error.
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
    check_folders(source, out)?;
    let store = Store::open(out, codec, &settings.geometry())?;
    let (kind, boards) = (settings.source, settings.boards());
    let source = Source::with_tables(source, out, kind, settings.reading(), &boards)?;
    let scan = Scan::run(&source, &out.join(FACTS_FILE), settings, progress)?;
    let mut preparation = Preparation {
        source,
        scan,
        store,
        settings,
        codec,
        counts: Counts::default(),
    };
    preparation.run(encode, progress)?;
    preparation.leave_lists(out)?;
    Ok(preparation.summary(start.elapsed().as_secs_f64()))
}

/// Fails if `source` is no source, or if `out` is the same folder.
fn check_folders(source: &Path, out: &Path) -> Result<()> {
    no_folder::refuse(source)?;
    // Before anything is written: what a failed call leaves could be part of the next one's source.
    if let Location::Folder(path) = Location::parse(source, &Network::default())? {
        fs::metadata(&path).map_err(Error::io(&path))?;
    }
    let (Ok(from), Ok(to)) = (fs::canonicalize(source), fs::canonicalize(out)) else {
        return Ok(());
    };
    if from == to {
        let reason = "the data set cannot be the source folder: name another folder".to_owned();
        return Err(Error::Invalid {
            what: out.display().to_string(),
            reason,
        });
    }
    Ok(())
}

fn check(settings: &PrepSettings, codec: &Codec) -> Result<()> {
    let mut problems = settings.validate();
    if codec.down_factor == 0 || !settings.step_px.is_multiple_of(codec.down_factor) {
        let factor = codec.down_factor;
        problems.push(format!(
            "prep.step_px = {}: must be a multiple of the VAE factor {factor}",
            settings.step_px
        ));
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::Invalid {
        what: "settings of the preparation".to_owned(),
        reason: problems.join("; "),
    })
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
        let mut pending = self.store.pending.iter();
        if pending.any(|journal| journal.plan != plan.id) {
            // An interrupted run had another plan: its finished objects join the data set first.
            self.adopt_pending()?;
            plan = self.plan();
        }
        let mut changed = self.store.dataset.is_none();
        if !self.repacks(&plan) {
            changed |= self.mark_deleted();
            changed |= self.rewrite_texts(progress)?;
        }
        changed |= self.write_objects(&plan, encode, progress)?;
        if self.repacks(&plan) {
            self.store
                .objects
                .retain(|stored| stored.in_manifest.is_none());
        }
        if changed {
            self.store.commit()?;
        }
        Ok(())
    }

    /// Whether the plan's objects replace all others.
    fn repacks(&self, plan: &ObjectPlan) -> bool {
        self.settings.repack && !plan.objects.is_empty()
    }

    /// The objects to write: of accepted samples without an object, or of all with `repack`.
    fn plan(&self) -> ObjectPlan {
        let packed = self.packed_samples();
        let mut new = Vec::new();
        let mut train = 0;
        let mut test = 0;
        for (index, accepted) in self.scan.accepted.iter().enumerate() {
            match packed.get(&accepted.id) {
                None if self.scan.failed.contains(&accepted.id) => {}
                None => new.push(index),
                Some(Split::Train) => train += 1,
                Some(Split::Test) => test += 1,
            }
        }
        let items = self.items(&new, (train, test));
        ObjectPlan::new(items, &self.store.next_numbers(), &self.cut())
    }

    /// Accepted samples with their splits. `packed` counts the samples that have a split already.
    fn items(&self, new: &[usize], packed: (u64, u64)) -> Vec<Item> {
        let mut ids = Vec::with_capacity(new.len());
        for &index in new {
            ids.push(self.scan.accepted[index].id);
        }
        let sides = sides(&ids, packed, self.settings.share(), self.settings.seed);
        let mut items = Vec::with_capacity(new.len());
        for (&index, split) in new.iter().zip(sides) {
            let Accepted { id, bucket, .. } = self.scan.accepted[index];
            items.push(Item {
                index,
                id,
                bucket,
                split,
            });
        }
        items
    }

    /// The splits of the samples that keep their objects.
    fn packed_samples(&self) -> HashMap<SampleId, Split> {
        let mut packed = HashMap::new();
        for stored in &self.store.objects {
            if self.settings.repack && stored.in_manifest.is_some() {
                continue;
            }
            for row in &stored.journal.rows {
                packed.insert(row.id, stored.journal.split);
            }
        }
        packed
    }

    fn cut(&self) -> Cut {
        let Codec {
            hash,
            channels,
            down_factor,
            ..
        } = self.codec;
        let geometry = serde_json::to_string(&self.settings.geometry())
            .expect("a geometry is strings and numbers");
        let factor = u64::from(*down_factor);
        Cut {
            seed: self.settings.seed,
            max_rows: self.settings.object_rows,
            bytes_per_px: (2 * u64::from(*channels), factor * factor),
            salt: format!("{hash} {channels} {down_factor} {geometry}"),
        }
    }

    /// Adds the objects of an interrupted run to the data set. Rows whose samples are in the data
    /// set already are marked deleted.
    fn adopt_pending(&mut self) -> Result<()> {
        let mut present = HashSet::new();
        for stored in &self.store.objects {
            for row in &stored.journal.rows {
                present.insert(row.id);
            }
        }
        for journal in std::mem::take(&mut self.store.pending) {
            self.learn(&journal);
            let mut stored = Stored::new(journal);
            for (row, deleted) in stored.journal.rows.iter().zip(&mut stored.deleted) {
                *deleted = !present.insert(row.id);
            }
            self.store.objects.push(stored);
        }
        self.store.commit()
    }

    /// Updates every object's bitmap of deleted rows and returns whether one changed. Rows of
    /// images that are back in the folder become live again.
    fn mark_deleted(&mut self) -> bool {
        let mut wanted = HashMap::new();
        for accepted in &self.scan.accepted {
            wanted.insert(accepted.id, accepted.bucket);
        }
        let mut seen = HashSet::new();
        let mut changed = false;
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

    /// Rewrites the text files in which the text of a live row changed. Returns whether there are
    /// any.
    fn rewrite_texts(&mut self, progress: &mut dyn FnMut(PrepEvent)) -> Result<bool> {
        let mut by_id = HashMap::new();
        for (index, accepted) in self.scan.accepted.iter().enumerate() {
            by_id.insert(accepted.id, index);
        }
        let mut stale = Vec::new();
        for (index, stored) in self.store.objects.iter().enumerate() {
            if self.has_stale_text(stored, &by_id) {
                stale.push(index);
            }
        }
        let num_objects = stale.len() as u64;
        for (done, &index) in (1..).zip(&stale) {
            self.rewrite_text(index, &by_id)?;
            progress(PrepEvent::Rewriting { done, num_objects });
        }
        Ok(!stale.is_empty())
    }

    /// The accepted sample of a live row whose text changed. None for any other row.
    fn changed_sample(
        &self,
        row: &JournalRow,
        is_deleted: bool,
        by_id: &HashMap<SampleId, usize>,
    ) -> Option<&Accepted> {
        let accepted = &self.scan.accepted[*by_id.get(&row.id)?];
        (!is_deleted && accepted.text != row.text).then_some(accepted)
    }

    fn has_stale_text(&self, stored: &Stored, by_id: &HashMap<SampleId, usize>) -> bool {
        let mut rows = stored.journal.rows.iter().zip(&stored.deleted);
        rows.any(|(row, &is_deleted)| self.changed_sample(row, is_deleted, by_id).is_some())
    }

    fn rewrite_text(&mut self, index: usize, by_id: &HashMap<SampleId, usize>) -> Result<()> {
        let stored = &self.store.objects[index];
        let dataset = self.store.dataset.as_ref();
        let dataset = dataset.expect("objects come from a data set");
        let in_manifest = stored.in_manifest;
        let in_manifest = in_manifest.expect("texts of new objects are current");
        let mut records = dataset.object_records(in_manifest)?;
        let mut journal = stored.journal.clone();
        let mut num_rewritten = 0;
        let rows = journal.rows.iter_mut().zip(&stored.deleted);
        for (record, (row, &is_deleted)) in records.iter_mut().zip(rows) {
            if let Some(accepted) = self.changed_sample(row, is_deleted, by_id) {
                self.replace_text(record, accepted);
                *row = JournalRow::of(record);
                num_rewritten += 1;
            }
        }
        self.counts.rewritten += num_rewritten;
        self.write_revision(&mut journal, &records)?;
        self.store.objects[index].journal = journal;
        Ok(())
    }

    /// Writes an object's text under the next name, and its journal. The latents keep their
    /// checksums.
    fn write_revision(&self, journal: &mut Journal, records: &[Record]) -> Result<()> {
        journal.text = text_name(&journal.stem, text_revision(&journal.text) + 1);
        let (text_bytes, blocks) = write_text(&self.store.root, &journal.text, records)?;
        journal.text_bytes = text_bytes;
        for (block, text) in journal.blocks.iter_mut().zip(blocks) {
            *block = Block {
                latents_xxh3: block.latents_xxh3,
                ..text
            };
        }
        self.store.write_journal(journal)
    }

    /// Puts the current text of a sample into its record.
    fn replace_text(&self, record: &mut Record, accepted: &Accepted) {
        let found = &self.source.samples[accepted.file];
        let text = self.source.text(found).text.unwrap_or_default();
        record.captions = text.captions;
        record.tags = text.tags;
        record.important_tags = text.important_tags;
        record.quality = text.quality;
        record.verbatim = text.verbatim;
        record.source = found.path.clone();
    }

    /// Writes the plan's objects, except those that an interrupted run finished. Returns whether
    /// the plan has any.
    fn write_objects(
        &mut self,
        plan: &ObjectPlan,
        encode: &mut Encode<'_>,
        progress: &mut dyn FnMut(PrepEvent),
    ) -> Result<bool> {
        let resumed = std::mem::take(&mut self.store.pending);
        let left = without(&plan.objects, &resumed);
        let latents = self.existing_latents();
        let written = self.encode_objects(&left, &plan.id, &latents, encode, progress)?;
        self.counts.resumed = num_rows(&resumed);
        self.counts.written = num_rows(&written);
        self.counts.copied = num_copied(&written, &latents);
        for journal in resumed.into_iter().chain(written) {
            self.learn(&journal);
            if !journal.rows.is_empty() {
                self.store.objects.push(Stored::new(journal));
            }
        }
        Ok(!plan.objects.is_empty())
    }

    /// Writes `objects` and returns their journals.
    fn encode_objects(
        &self,
        objects: &[&PlannedObject],
        plan: &str,
        latents: &HashMap<SampleId, (usize, u32)>,
        encode: &mut Encode<'_>,
        progress: &mut dyn FnMut(PrepEvent),
    ) -> Result<Vec<Journal>> {
        let encoding = Encoding {
            store: &self.store,
            source: &self.source,
            settings: self.settings,
            accepted: &self.scan.accepted,
            latents,
            shape: &|bucket| latent_shape(self.codec, bucket),
            plan,
        };
        let mut written = Vec::new();
        let mut finished = |journal| written.push(journal);
        encoding.run(objects, encode, progress, &mut finished)?;
        Ok(written)
    }

    /// Object and row of the latents of each packed sample. Empty without `repack`.
    fn existing_latents(&self) -> HashMap<SampleId, (usize, u32)> {
        let mut latents = HashMap::new();
        if self.settings.repack {
            for stored in &self.store.objects {
                let Some(object) = stored.in_manifest else {
                    continue;
                };
                for (number, row) in (0..).zip(&stored.journal.rows) {
                    latents.insert(row.id, (object, number));
                }
            }
        }
        latents
    }

    fn learn(&mut self, journal: &Journal) {
        for (id, fault) in &journal.faults {
            self.scan.learn_fault(*id, fault);
        }
        for (id, note) in &journal.notes {
            self.scan.learn_note(*id, note);
        }
    }

    /// Writes the lists of rejected files and of notes, and the facts for the next run.
    fn leave_lists(&mut self, out: &Path) -> Result<()> {
        reject::write(out, REJECTED_FILE, &self.rejected())?;
        reject::write(out, NOTES_FILE, &self.scan.all_notes())?;
        self.scan.remember(&out.join(FACTS_FILE))
    }

    /// The remarks about files that are not in the data set: of filtered pictures the first.
    fn rejected(&self) -> Vec<Remark> {
        let mut rejected = self.scan.rejected.clone();
        rejected.extend_from_slice(&self.scan.filtered.listed);
        rejected
    }

    fn summary(&self, secs: f64) -> PrepSummary {
        let buckets = self.bucket_counts();
        let mut deleted_rows = 0;
        let mut bytes = 0;
        for stored in &self.store.objects {
            deleted_rows += stored.deleted.len() as u64 - stored.num_live();
            bytes += stored.journal.text_bytes + self.latents_bytes(stored);
        }
        let notes = self.scan.all_notes();
        let rejected = self.rejected();
        let mut counts = reject::count(&rejected);
        if let Some(count) = counts.get_mut(&Reason::Filtered) {
            *count = self.scan.filtered.count();
        }
        PrepSummary {
            train_rows: buckets.iter().map(|count| count.train).sum(),
            test_rows: buckets.iter().map(|count| count.test).sum(),
            buckets,
            rejected: counts,
            notes: reject::count(&notes),
            examples: reject::examples(rejected.iter().chain(&notes)),
            boards: self.source.boards.count(),
            filter: self.scan.filtered.clauses.clone(),
            written_rows: self.counts.written,
            copied_rows: self.counts.copied,
            resumed_rows: self.counts.resumed,
            rewritten_rows: self.counts.rewritten,
            deleted_rows,
            bytes,
            secs,
        }
    }

    /// Bytes of an object's latents, deleted rows included.
    fn latents_bytes(&self, stored: &Stored) -> u64 {
        let shape = latent_shape(self.codec, stored.journal.bucket);
        (2 * stored.deleted.len() * shape.iter().product::<usize>()) as u64
    }

    /// Live rows by bucket, in order of width and height.
    fn bucket_counts(&self) -> Vec<BucketCount> {
        let mut counts = BTreeMap::<(u32, u32), BucketCount>::new();
        for stored in &self.store.objects {
            let bucket = stored.journal.bucket;
            counts
                .entry((bucket.width_px, bucket.height_px))
                .or_insert_with(|| BucketCount::empty(bucket))
                .add(stored.journal.split, stored.num_live());
        }
        counts.into_values().collect()
    }
}

/// The objects that have no journal.
fn without<'a>(objects: &'a [PlannedObject], done: &[Journal]) -> Vec<&'a PlannedObject> {
    let done: HashSet<&str> = done.iter().map(|journal| journal.stem.as_str()).collect();
    let mut left: Vec<&PlannedObject> = objects.iter().collect();
    left.retain(|planned| !done.contains(planned.stem.as_str()));
    left
}

fn num_rows(journals: &[Journal]) -> u64 {
    let mut rows = 0;
    for journal in journals {
        rows += journal.rows.len() as u64;
    }
    rows
}

/// Number of rows whose latents existed already.
fn num_copied(journals: &[Journal], latents: &HashMap<SampleId, (usize, u32)>) -> u64 {
    let rows = journals.iter().flat_map(|journal| &journal.rows);
    rows.filter(|row| latents.contains_key(&row.id)).count() as u64
}

fn latent_shape(codec: &Codec, bucket: Bucket) -> [usize; 3] {
    [
        codec.channels as usize,
        (bucket.height_px / codec.down_factor) as usize,
        (bucket.width_px / codec.down_factor) as usize,
    ]
}
