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
pub(crate) mod journal;
pub(crate) mod objects;
pub mod publish;
pub(crate) mod scan;
pub(crate) mod settings;
pub(crate) mod source;
pub(crate) mod split;

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
        record::SampleId,
        shard::write_text,
    },
    prep::{
        encode::{Encode, Encoding},
        journal::{Journal, JournalRow, Store, Stored, text_name, text_revision},
        objects::{Cut, Item, ObjectPlan, PlannedObject},
        scan::{Accepted, Scan},
        source::Source,
        split::sides,
    },
    reject::{self, NOTES_FILE, REJECTED_FILE},
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
    let same = |a: &Path, b: &Path| matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b);
    fs::read_dir(source).map_err(Error::io(source))?;
    if same(source, out) {
        let reason = "the data set cannot be the source folder: name another folder".to_owned();
        return Err(Error::Invalid {
            what: out.display().to_string(),
            reason,
        });
    }
    let store = Store::open(out, codec, &settings.geometry())?;
    let source = Source::list(source, out)?;
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
        if self
            .store
            .pending
            .iter()
            .any(|journal| journal.plan != plan.id)
        {
            // An interrupted run had another plan: its finished objects join the data set first.
            self.adopt_pending()?;
            plan = self.plan();
        }
        let changed = self.mark_deleted(&plan);
        let rewritten = self.rewrite_texts(&plan, progress)?;
        let written = self.write_objects(&plan, encode, progress)?;
        if self.settings.repack && !plan.objects.is_empty() {
            self.store
                .objects
                .retain(|stored| stored.in_manifest.is_none());
        }
        if changed || rewritten || written || self.store.dataset.is_none() {
            self.store.commit()?;
        }
        Ok(())
    }

    /// The objects to write: of accepted samples without an object, or of all with `repack`.
    fn plan(&self) -> ObjectPlan {
        let held = |stored: &&Stored| !self.settings.repack || stored.in_manifest.is_none();
        let kept: Vec<&Stored> = self.store.objects.iter().filter(held).collect();
        let present: HashMap<SampleId, Split> = kept
            .iter()
            .flat_map(|o| o.journal.rows.iter().map(|row| (row.id, o.journal.split)))
            .collect();
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
        let sides = sides(
            &ids,
            (train, test),
            self.settings.share(),
            self.settings.seed,
        );
        let items = new.iter().zip(sides).map(|(index, split)| {
            let Accepted { id, bucket, .. } = *accepted(index);
            Item {
                index: *index,
                id,
                bucket,
                split,
            }
        });
        ObjectPlan::new(items.collect(), &self.store.next_numbers(), &self.cut())
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
        let rows = |stored: &Stored| {
            stored
                .journal
                .rows
                .iter()
                .map(|row| row.id)
                .collect::<Vec<_>>()
        };
        let mut present: HashSet<SampleId> = self.store.objects.iter().flat_map(rows).collect();
        for journal in std::mem::take(&mut self.store.pending) {
            let deleted = journal
                .rows
                .iter()
                .map(|row| !present.insert(row.id))
                .collect();
            self.learn(&journal);
            self.store.objects.push(Stored {
                deleted,
                ..Stored::new(journal)
            });
        }
        self.store.commit()
    }

    /// Updates every object's bitmap of deleted rows and returns whether one changed. Rows of
    /// images that are back in the folder become live again.
    fn mark_deleted(&mut self, plan: &ObjectPlan) -> bool {
        if self.settings.repack && !plan.objects.is_empty() {
            return false;
        }
        let wanted: HashMap<SampleId, Bucket> = self
            .scan
            .accepted
            .iter()
            .map(|a| (a.id, a.bucket))
            .collect();
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

    /// Rewrites the text files in which the text of a live row changed. Returns whether there are
    /// any.
    fn rewrite_texts(
        &mut self,
        plan: &ObjectPlan,
        progress: &mut dyn FnMut(PrepEvent),
    ) -> Result<bool> {
        if self.settings.repack && !plan.objects.is_empty() {
            return Ok(false);
        }
        let by_id: HashMap<SampleId, usize> = self
            .scan
            .accepted
            .iter()
            .enumerate()
            .map(|(i, accepted)| (accepted.id, i))
            .collect();
        let stale = |stored: &Stored| {
            let mut live = stored
                .journal
                .rows
                .iter()
                .zip(&stored.deleted)
                .filter(|&(_, &deleted)| !deleted);
            live.any(|(row, _)| {
                by_id
                    .get(&row.id)
                    .is_some_and(|&i| self.scan.accepted[i].text != row.text)
            })
        };
        let stale: Vec<usize> = (0..self.store.objects.len())
            .filter(|&i| stale(&self.store.objects[i]))
            .collect();
        let num_objects = stale.len() as u64;
        for (done, &index) in (1..).zip(&stale) {
            self.rewrite_text(index, &by_id)?;
            progress(PrepEvent::Rewriting { done, num_objects });
        }
        Ok(!stale.is_empty())
    }

    fn rewrite_text(&mut self, index: usize, by_id: &HashMap<SampleId, usize>) -> Result<()> {
        let stored = &self.store.objects[index];
        let dataset = self
            .store
            .dataset
            .as_ref()
            .expect("objects come from a data set");
        let mut records = dataset.object_records(
            stored
                .in_manifest
                .expect("texts of new objects are current"),
        )?;
        let mut journal = stored.journal.clone();
        for ((record, row), deleted) in records
            .iter_mut()
            .zip(&mut journal.rows)
            .zip(&stored.deleted)
        {
            let Some(accepted) = by_id.get(&record.id).map(|&i| &self.scan.accepted[i]) else {
                continue;
            };
            if *deleted || accepted.text == row.text {
                continue;
            }
            let found = &self.source.files[accepted.file];
            let text = self
                .source
                .text(found, &self.settings.quality_words)
                .0
                .unwrap_or_default();
            record.captions = text.captions;
            (record.tags, record.important_tags, record.quality) =
                (text.tags, text.important_tags, text.quality);
            (record.verbatim, record.source) = (text.verbatim, found.path.clone());
            *row = JournalRow::of(record);
            self.counts.rewritten += 1;
        }
        journal.text = text_name(&journal.stem, text_revision(&journal.text) + 1);
        let (text_bytes, blocks) = write_text(&self.store.root, &journal.text, &records)?;
        journal.text_bytes = text_bytes;
        for (block, text) in journal.blocks.iter_mut().zip(blocks) {
            *block = Block {
                latents_xxh3: block.latents_xxh3,
                ..text
            };
        }
        self.store.write_journal(&journal)?;
        self.store.objects[index].journal = journal;
        Ok(())
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
        let done: HashSet<&str> = resumed
            .iter()
            .map(|journal| journal.stem.as_str())
            .collect();
        let left: Vec<&PlannedObject> = plan
            .objects
            .iter()
            .filter(|o| !done.contains(o.stem.as_str()))
            .collect();
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
        encoding.run(&left, encode, progress, &mut |journal| {
            written.push(journal)
        })?;
        let has_rows = |journals: &[Journal]| {
            journals
                .iter()
                .map(|journal| journal.rows.len() as u64)
                .sum::<u64>()
        };
        (self.counts.resumed, self.counts.written) = (has_rows(&resumed), has_rows(&written));
        let copied = |journal: &Journal| {
            journal
                .rows
                .iter()
                .filter(|row| latents.contains_key(&row.id))
                .count() as u64
        };
        self.counts.copied = written.iter().map(copied).sum();
        for journal in resumed.into_iter().chain(written) {
            self.learn(&journal);
            if !journal.rows.is_empty() {
                self.store.objects.push(Stored::new(journal));
            }
        }
        Ok(!plan.objects.is_empty())
    }

    /// Object and row of the latents of each packed sample. Empty without `repack`.
    fn existing_latents(&self) -> HashMap<SampleId, (usize, u32)> {
        let mut latents = HashMap::new();
        if self.settings.repack {
            for stored in &self.store.objects {
                let Some(object) = stored.in_manifest else {
                    continue;
                };
                latents.extend(
                    (0..)
                        .zip(&stored.journal.rows)
                        .map(|(number, row)| (row.id, (object, number))),
                );
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

    /// Writes the lists of rejected files and of notes, and the facts for the next run.
    fn leave_lists(&mut self, out: &Path) -> Result<()> {
        reject::write(out, REJECTED_FILE, &self.scan.rejected)?;
        reject::write(out, NOTES_FILE, &self.scan.notes)?;
        self.scan.remember(&out.join(FACTS_FILE))
    }

    fn summary(&self, secs: f64) -> PrepSummary {
        let mut buckets = BTreeMap::<(u32, u32), BucketCount>::new();
        let (mut bytes, mut deleted_rows) = (0, 0);
        for stored in &self.store.objects {
            let Bucket {
                width_px,
                height_px,
            } = stored.journal.bucket;
            let empty = BucketCount {
                width_px,
                height_px,
                train: 0,
                test: 0,
            };
            let count = buckets.entry((width_px, height_px)).or_insert(empty);
            let live = stored.deleted.iter().filter(|&&deleted| !deleted).count() as u64;
            match stored.journal.split {
                Split::Train => count.train += live,
                Split::Test => count.test += live,
            }
            deleted_rows += stored.deleted.len() as u64 - live;
            let row_bytes = 2 * latent_shape(self.codec, stored.journal.bucket)
                .iter()
                .product::<usize>();
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
    [
        codec.channels as usize,
        side(bucket.height_px),
        side(bucket.width_px),
    ]
}
