//! One preparation: what is new, deleted or rewritten, from the scan and the data set as it is;
//! then the objects, and the commit.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    time::Instant,
};

use half::f16;

use crate::{
    error::Result,
    format::{
        block_table::Block,
        bucket::Bucket,
        manifest::{Codec, Split},
        record::{Record, SampleId},
        shard::write_text,
    },
    prep::{
        copies_list,
        encode::{Encode, Encoding},
        events::{PrepEvent, PrepSummary, RgbBatch},
        fact::Remembered,
        journal::{Holders, Journal, JournalRow, Store, Stored, text_name, text_revision},
        kept_pictures::KeptPictures,
        objects::{Cut, Item, ObjectPlan, PlannedObject},
        outlet::Outlet,
        places::{check_places, list_source, remember_annotations},
        scan::{Accepted, Scan},
        settings::PrepSettings,
        share,
        signatures::OldRecords,
        split::sides,
        timeline::{Timeline, Work},
    },
    reject::{self, NOTES_FILE, REJECTED_FILE},
    source::Source,
};

/// The facts of a preparation, for the next one.
pub(crate) const FACTS_FILE: &str = "prep/files.jsonl";

/// Packs the images in `source` into the data set `out`. If `out` exists already, only changes are
/// encoded.
///
/// `encode` takes images of one bucket and returns the posterior means of their latents, `[n, C,
/// h/f, w/f]`, unscaled. Two preparations of the same folder with the same settings, codec and
/// encoder write the same bytes, interrupted or not.
///
/// # Errors
/// [`Invalid`](crate::Error::Invalid) for settings that cannot work, or that differ from the data
/// set's; [`NotReady`](crate::Error::NotReady) if another preparation is writing `out`;
/// [`Encode`](crate::Error::Encode) if the encoder fails; [`Io`](crate::Error::Io) if `source`
/// cannot be listed or `out` cannot be written; [`Malformed`](crate::Error::Malformed) if `out` is
/// not a data set. A bad file in `source` is not an error.
pub fn prepare(
    source: &Path,
    out: &Path,
    settings: &PrepSettings,
    codec: &Codec,
    encode: &mut dyn FnMut(&RgbBatch) -> std::result::Result<Vec<f16>, String>,
    progress: &mut dyn FnMut(PrepEvent),
) -> Result<PrepSummary> {
    let start = Instant::now();
    settings.check(Some(codec))?;
    check_places(source, out)?;
    let store = Store::open(out, codec, &settings.geometry(), Holders::One)?;
    let source = list_source(source, out, settings)?;
    let kept = KeptPictures::new(settings.keep_bytes());
    // Workers may have left facts and objects.
    let mut remembered = Remembered::new();
    share::remember(out, &mut remembered);
    let memory = out.join(FACTS_FILE);
    let left_out = copies_list::left_out(out, &settings.without)?;
    let carried = (&kept, &left_out);
    let timeline = Timeline::new();
    let scan = || Scan::run(&source, &memory, remembered, carried, settings, progress);
    let scan = timeline.time(Work::Facts, scan)?;
    let mut preparation = Preparation::new(store, source, scan, kept, (settings, codec))?;
    preparation.timeline = timeline;
    preparation.run(encode, progress)?;
    preparation.leave_lists(out)?;
    share::forget(out)?;
    Ok(preparation.summary(start.elapsed().as_secs_f64()))
}

/// One run of [`prepare`].
pub(crate) struct Preparation<'a> {
    pub(crate) source: Source,
    pub(crate) scan: Scan,
    pub(crate) store: Store,
    pub(crate) settings: &'a PrepSettings,
    pub(crate) codec: &'a Codec,
    pub(crate) kept: KeptPictures,
    /// Where latents are sent, if they do not stay.
    pub(crate) outlet: Option<Outlet>,
    pub(crate) counts: Counts,
    pub(crate) timeline: Timeline,
}

/// What was done, in rows.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) written: u64,
    pub(crate) copied: u64,
    pub(crate) resumed: u64,
    pub(crate) rewritten: u64,
    /// Pictures that both passes have read.
    pub(crate) reread: u64,
}

impl<'a> Preparation<'a> {
    pub(crate) fn new(
        store: Store,
        source: Source,
        scan: Scan,
        kept: KeptPictures,
        (settings, codec): (&'a PrepSettings, &'a Codec),
    ) -> Result<Self> {
        let outlet = settings.send_to.as_deref().map(Outlet::new).transpose()?;
        Ok(Self {
            source,
            scan,
            store,
            settings,
            codec,
            kept,
            outlet,
            counts: Counts::default(),
            timeline: Timeline::new(),
        })
    }

    pub(crate) fn run(
        &mut self,
        encode: &mut Encode<'_>,
        progress: &mut dyn FnMut(PrepEvent),
    ) -> Result<()> {
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
    pub(crate) fn plan(&self) -> ObjectPlan {
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
    pub(crate) fn adopt_pending(&mut self) -> Result<()> {
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
        let text = self
            .source
            .text_of(found, accepted.id)
            .text
            .unwrap_or_default();
        record.captions = text.captions;
        record.caption_sources = text.caption_sources;
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
        let written = self.encode_objects((&left, &resumed), plan, &latents, encode, progress)?;
        self.counts.resumed = num_rows(&resumed);
        self.counts.written = num_rows(&written);
        self.counts.copied = num_copied(&written, &latents);
        self.counts.reread = self.num_reread(&left, &latents);
        for journal in resumed.into_iter().chain(written) {
            self.learn(&journal);
            if !journal.rows.is_empty() {
                self.store.objects.push(Stored::new(journal));
            }
        }
        Ok(!plan.objects.is_empty())
    }

    /// Pictures of `objects` that the first pass has read, and the second again.
    fn num_reread(
        &self,
        objects: &[&PlannedObject],
        latents: &HashMap<SampleId, (usize, u32)>,
    ) -> u64 {
        let items = objects.iter().flat_map(|object| &object.items);
        let was_read = |item: &&Item| self.scan.accepted[item.index].was_read;
        let is_encoded = |item: &&Item| !latents.contains_key(&item.id);
        let num_needed = items.filter(was_read).filter(is_encoded).count() as u64;
        num_needed.saturating_sub(self.kept.num_taken())
    }

    /// Writes objects of `plan` and returns their journals. If latents do not stay, those of the
    /// objects that were `finished` before are sent as well.
    pub(crate) fn encode_objects(
        &self,
        (objects, finished): (&[&PlannedObject], &[Journal]),
        plan: &ObjectPlan,
        latents: &HashMap<SampleId, (usize, u32)>,
        encode: &mut Encode<'_>,
        progress: &mut dyn FnMut(PrepEvent),
    ) -> Result<Vec<Journal>> {
        let signatures = self.old_signatures(latents)?;
        let encoding = Encoding {
            store: &self.store,
            source: &self.source,
            settings: self.settings,
            accepted: &self.scan.accepted,
            kept: &self.kept,
            latents,
            signatures: &signatures,
            shape: &|bucket| latent_shape(self.codec, bucket),
            plan: &plan.id,
            timeline: &self.timeline,
        };
        let mut written = Vec::new();
        let Some(outlet) = &self.outlet else {
            encoding.run(objects, encode, progress, &mut |journal| {
                written.push(journal);
                Ok(())
            })?;
            return Ok(written);
        };
        outlet.while_sending(&self.store, |send| {
            for journal in finished {
                send(journal)?;
            }
            encoding.run(objects, encode, progress, &mut |journal| {
                send(&journal)?;
                written.push(journal);
                Ok(())
            })
        })?;
        Ok(written)
    }

    /// The signatures of samples whose latents exist already.
    fn old_signatures(&self, latents: &HashMap<SampleId, (usize, u32)>) -> Result<OldRecords> {
        if latents.is_empty() {
            return Ok(OldRecords::default());
        }
        let stored = self.store.objects.iter();
        OldRecords::read(
            &self.store.root,
            stored.map(|stored| stored.journal.stem.as_str()),
        )
    }

    /// Object and row of the latents of each packed sample. Empty without `repack`.
    pub(crate) fn existing_latents(&self) -> HashMap<SampleId, (usize, u32)> {
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
    pub(crate) fn leave_lists(&mut self, out: &Path) -> Result<()> {
        reject::write(out, REJECTED_FILE, &self.rejected())?;
        reject::write(out, NOTES_FILE, &self.scan.all_notes())?;
        remember_annotations(out, self.settings)?;
        self.scan.remember(&out.join(FACTS_FILE))
    }
}

/// The objects that have no journal.
pub(crate) fn without<'a>(
    objects: &'a [PlannedObject],
    done: &[Journal],
) -> Vec<&'a PlannedObject> {
    let done: HashSet<&str> = done.iter().map(|journal| journal.stem.as_str()).collect();
    let mut left: Vec<&PlannedObject> = objects.iter().collect();
    left.retain(|planned| !done.contains(planned.stem.as_str()));
    left
}

pub(crate) fn num_rows(journals: &[Journal]) -> u64 {
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

pub(crate) fn latent_shape(codec: &Codec, bucket: Bucket) -> [usize; 3] {
    [
        codec.channels as usize,
        (bucket.height_px / codec.down_factor) as usize,
        (bucket.width_px / codec.down_factor) as usize,
    ]
}
