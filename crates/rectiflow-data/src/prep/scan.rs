//! The first pass over a folder: each file's hash and header, kept between runs, and whether the
//! file is accepted.
//!
//! Facts are also appended to `prep/files.part.jsonl` as they are found: hashing 13 million images
//! takes hours, and the run after a killed one continues from there.
//!
//! A file whose length and modification time are those of the last run is not read again. Facts
//! about its bytes (hash, size in pixels, damage) are kept; verdicts that depend on settings or
//! other files (too small, no bucket, duplicate) are computed in each run. Memory: about 500 bytes
//! per image, 6.5 GB for 13 million; pixels and captions are not kept.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io::Write,
    path::Path,
};

use crate::{
    durable::{self, DurableFile},
    error::Result,
    format::{
        bucket::{Bucket, aspect_error, nearest},
        record::SampleId,
    },
    prep::{
        copies_list::LeftOut,
        events::PrepEvent,
        fact::{Fact, Remembered, part_of, read_facts},
        filtered::Filtered,
        kept_pictures::KeptPictures,
        scanned::{Scanned, append, scan_files},
        settings::PrepSettings,
    },
    reject::{Fault, Reason, Remark},
    source::{
        Source,
        names::{Kind, classify},
    },
};

/// Files between two reports of progress.
const FILES_PER_CHUNK: usize = 512;
/// Most keys that are named as not read: JSON can have other keys for each image.
const MOST_UNREAD_KEYS: usize = 100;

/// An image that is accepted for the data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Accepted {
    /// Index in the source's files.
    pub(crate) file: usize,
    pub(crate) id: SampleId,
    pub(crate) width_px: u32,
    pub(crate) height_px: u32,
    pub(crate) bucket: Bucket,
    /// Fingerprint of its text.
    pub(crate) text: u64,
    /// Whether the first pass has read it.
    pub(crate) was_read: bool,
}

/// The result of the first pass.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub(crate) accepted: Vec<Accepted>,
    pub(crate) rejected: Vec<Remark>,
    pub(crate) notes: Vec<Remark>,
    pub(crate) filtered: Filtered,
    /// Notes about the texts of accepted samples.
    text_notes: Vec<(SampleId, Remark)>,
    /// Keys with text that are not read.
    unread_keys: BTreeMap<String, UnreadKey>,
    /// Facts of this run, in the order of the files.
    facts: Vec<Fact>,
    /// Index in `facts` of an accepted sample's file.
    by_id: HashMap<SampleId, usize>,
    /// Accepted samples that failed later.
    pub(crate) failed: HashSet<SampleId>,
    /// Faults by hash: a copy of a bad file has the same fault.
    faults: HashMap<u64, Fault>,
    /// Whether the facts differ from the stored ones.
    changed: bool,
}

/// A key with text that is not read.
#[derive(Debug)]
struct UnreadKey {
    num_images: u64,
    /// The first image whose source has it.
    example: String,
}

impl Scan {
    /// A scan of `source` that no sample has been added to. `remembered` are the facts of an
    /// earlier run.
    pub(crate) fn new(source: &Source, remembered: &Remembered) -> Self {
        Self {
            changed: true,
            faults: lasting_faults(remembered),
            filtered: Filtered::new(source.boards.clauses()),
            ..Self::default()
        }
    }

    /// Scans `source`; reads only files without a current fact, and offers them to `kept`. The file
    /// `memory` has the facts of an earlier run, to which `remembered` adds others.
    pub(crate) fn run(
        source: &Source,
        memory: &Path,
        remembered: Remembered,
        (kept, left_out): (&KeptPictures, &LeftOut),
        settings: &PrepSettings,
        progress: &mut dyn FnMut(PrepEvent),
    ) -> Result<Self> {
        // The facts of the last run, those of a killed one, and the others.
        let last = read_facts(memory);
        let num_last = last.len();
        let mut all = remembered;
        all.extend(last);
        all.extend(read_facts(&part_of(memory)));
        let mut scan = Self {
            changed: num_last == 0,
            ..Self::new(source, &all)
        };

        // Files are read in parallel and judged in order.
        let buckets = settings.geometry().buckets();
        let num_files = source.samples.len();
        let mut part = None;
        let mut num_known = 0;
        let mut done = 0;
        while done < num_files {
            let files = done..num_files.min(done + FILES_PER_CHUNK);
            let scanned = scan_files(source, files, &all, kept, settings);
            append(&part_of(memory), &mut part, &scanned)?;
            for scanned in scanned {
                num_known += usize::from(scanned.known);
                scan.decide(source, done, scanned, &buckets, settings);
                done += 1;
            }
            progress(PrepEvent::Scanning {
                done: done as u64,
                num_files: num_files as u64,
                rejected: scan.rejected.len() as u64 + scan.filtered.count(),
            });
        }

        // Facts of files that are gone are dropped.
        scan.changed |= num_known != num_last;
        scan.finish(source, left_out)?;
        scan.remember(memory)?;
        Ok(scan)
    }

    /// Adds what the listing of the source says, after the last sample, and leaves near-copies out.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a table of annotations that is about none of the pictures.
    pub(crate) fn finish(&mut self, source: &Source, left_out: &LeftOut) -> Result<()> {
        self.leave_out(left_out);
        self.rejected.extend_from_slice(&source.remarks);
        self.notes.extend_from_slice(&source.notes);
        let ids: HashSet<u64> = self.facts.iter().map(|fact| fact.id).collect();
        let is_here = |id: SampleId| ids.contains(&id.0);
        let remarks = source.annotations.check(&is_here, ids.len() as u64)?;
        self.rejected.extend(remarks);
        Ok(())
    }

    /// Rejects accepted samples that are on the list of near-copies, if the picture that stays
    /// instead is there.
    fn leave_out(&mut self, left_out: &LeftOut) {
        if left_out.is_empty() {
            return;
        }
        for accepted in std::mem::take(&mut self.accepted) {
            match left_out.get(&accepted.id) {
                Some(stays) if self.by_id.contains_key(&stays.id) => {
                    let detail = format!("a near-copy of {}", stays.address);
                    let path = self.facts[self.by_id[&accepted.id]].path.clone();
                    self.reject(path, Fault::new(Reason::NearCopy, detail));
                }
                _ => self.accepted.push(accepted),
            }
        }
    }

    /// Records a fault that decoding or encoding found in a sample's bytes.
    pub(crate) fn learn_fault(&mut self, id: SampleId, fault: &Fault) {
        // An interrupted run can have a fault of an image that is gone.
        let Some(&index) = self.by_id.get(&id) else {
            return;
        };
        let fact = &mut self.facts[index];
        // Unreadable is a passing state, not a property of the bytes.
        let is_lasting = fault.reason != Reason::Unreadable;
        fact.fault = is_lasting.then_some(fault.clone());
        if fact.note.is_some() {
            self.notes.retain(|remark| remark.path != fact.path);
        }
        let path = fact.path.clone();
        self.reject(path, fault.clone());
        self.failed.insert(id);
        self.changed = true;
    }

    /// Records a note that decoding found about a sample's bytes.
    pub(crate) fn learn_note(&mut self, id: SampleId, note: &Fault) {
        let Some(&index) = self.by_id.get(&id) else {
            return;
        };
        let fact = &mut self.facts[index];
        if fact.note.as_ref() != Some(note) {
            fact.note = Some(note.clone());
            self.notes.push(Remark {
                path: fact.path.clone(),
                fault: note.clone(),
            });
        }
        self.changed = true;
    }

    /// Writes the facts for the next run, if they changed.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub(crate) fn remember(&mut self, memory: &Path) -> Result<()> {
        if !self.changed {
            return Ok(());
        }
        self.changed = false;
        let mut file = DurableFile::create(memory)?;
        for fact in &self.facts {
            writeln!(file, "{}", fact.to_line()).map_err(file.error())?;
        }
        file.commit()?;
        durable::remove(&part_of(memory))
    }

    /// Adds the next sample, `file`.
    pub(crate) fn decide(
        &mut self,
        source: &Source,
        file: usize,
        scanned: Scanned,
        buckets: &[Bucket],
        settings: &PrepSettings,
    ) {
        self.changed |= !scanned.known;
        self.rejected.extend(scanned.remarks);
        self.count_unread(&source.samples[file].path, scanned.unread);
        let was_read = !scanned.known;
        let fact = match scanned.fact {
            Ok(fact) => fact,
            Err(fault) => return self.reject(source.samples[file].path.clone(), fault),
        };
        // A copy of a bad file has the same fault; settings judge the others.
        let fault = fact.fault.as_ref();
        let fault = fault.or_else(|| self.faults.get(&fact.id)).cloned();
        if let (None, Some(clause)) = (&fault, scanned.removed_by) {
            self.filtered.add(clause, &fact.path);
            return self.facts.push(fact);
        }
        let verdict = match fault {
            Some(fault) => Err(fault),
            None => judge(&fact, buckets, settings).and_then(|bucket| {
                let missing = || Fault::new(Reason::NoCaption, scanned.missing_text);
                Ok((bucket, scanned.text.ok_or_else(missing)?))
            }),
        };
        match verdict {
            Err(fault) => self.reject(fact.path.clone(), fault),
            Ok((bucket, text)) => {
                let id = SampleId(fact.id);
                for note in scanned.notes {
                    let path = fact.path.clone();
                    self.text_notes.push((id, Remark { path, fault: note }));
                }
                let accepted = Accepted {
                    file,
                    id,
                    width_px: fact.width_px,
                    height_px: fact.height_px,
                    bucket,
                    text,
                    was_read,
                };
                self.accept(accepted, &fact);
            }
        }
        self.facts.push(fact);
    }

    /// Accepts an image whose fact is the next one, unless another image has the same bytes.
    fn accept(&mut self, accepted: Accepted, fact: &Fact) {
        if let Some(&first) = self.by_id.get(&accepted.id) {
            let detail = format!("it has the same bytes as {}", self.facts[first].path);
            let fault = Fault::new(Reason::Duplicate, detail);
            return self.reject(fact.path.clone(), fault);
        }
        self.by_id.insert(accepted.id, self.facts.len());
        self.accepted.push(accepted);
        if let Some(note) = &fact.note {
            self.notes.push(Remark {
                path: fact.path.clone(),
                fault: note.clone(),
            });
        }
    }

    fn reject(&mut self, path: String, fault: Fault) {
        let fault = by_name(&path, fault);
        self.rejected.push(Remark { path, fault });
    }

    fn count_unread(&mut self, path: &str, keys: Vec<String>) {
        for key in keys {
            if self.unread_keys.len() >= MOST_UNREAD_KEYS && !self.unread_keys.contains_key(&key) {
                continue;
            }
            let counted = self.unread_keys.entry(key).or_insert_with(|| UnreadKey {
                num_images: 0,
                example: path.to_owned(),
            });
            counted.num_images += 1;
        }
    }

    /// Notes about accepted samples, and about keys that are not read.
    pub(crate) fn all_notes(&self) -> Vec<Remark> {
        let mut notes = self.notes.clone();
        for (id, note) in &self.text_notes {
            if !self.failed.contains(id) {
                notes.push(note.clone());
            }
        }
        for (key, unread) in &self.unread_keys {
            let have_it = match unread.num_images {
                1 => "1 picture has it".to_owned(),
                many => format!("{many} pictures have it"),
            };
            let detail = format!("the key {key:?} has text and is not read: {have_it}");
            notes.push(Remark::new(&unread.example, Reason::UnreadKey, detail));
        }
        notes
    }
}

/// The fault of a file as its name explains it: an archive is no image, and more than that.
fn by_name(path: &str, fault: Fault) -> Fault {
    let name = path.rsplit('/').next().unwrap_or(path);
    match (classify(name).0, fault.reason) {
        (Kind::Archive, Reason::NotAnImage | Reason::FileTooLarge | Reason::Empty) => {
            let detail = "an archive: unpack it into the folder and prepare again; a tar of pictures \
                          is a source of its own";
            Fault::new(Reason::Archive, detail)
        }
        (Kind::Latents, Reason::NotAnImage | Reason::Empty) => {
            let detail = "latents or texts that another trainer has encoded: the file does not say \
                          with which VAE, so they are encoded again from the picture";
            Fault::new(Reason::UnreadKind, detail)
        }
        (Kind::UnreadCaption, Reason::NotAnImage | Reason::Empty) => {
            let detail = "a caption file of a kind that is not read; docs/preparation.md lists \
                          those that are";
            Fault::new(Reason::UnreadKind, detail)
        }
        _ => fault,
    }
}

/// Applies the settings to a file. Returns its bucket.
fn judge(
    fact: &Fact,
    buckets: &[Bucket],
    settings: &PrepSettings,
) -> std::result::Result<Bucket, Fault> {
    let (width, height) = (fact.width_px, fact.height_px);
    let min_side_px = settings.min_side_px;
    if width.min(height) < min_side_px {
        let detail = format!("{width}x{height} px, min_side_px is {min_side_px}");
        return Err(Fault::new(Reason::TooSmall, detail));
    }
    let bucket = buckets[nearest(buckets, width, height)];
    let error = aspect_error(bucket, width, height);
    if error > settings.max_aspect_error {
        let detail = format!(
            "{width}x{height} px, the nearest bucket is {}x{}, {error:.3} off; \
             max_aspect_error is {}",
            bucket.width_px, bucket.height_px, settings.max_aspect_error
        );
        return Err(Fault::new(Reason::AspectRatio, detail));
    }
    Ok(bucket)
}

/// Faults of an earlier run by hash, except those that settings decide.
fn lasting_faults(remembered: &Remembered) -> HashMap<u64, Fault> {
    let mut faults = HashMap::new();
    for fact in remembered.values() {
        if let Some(fault) = &fact.fault
            && fault.reason != Reason::TooManyPixels
        {
            faults.insert(fact.id, fault.clone());
        }
    }
    faults
}
