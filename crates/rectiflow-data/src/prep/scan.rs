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
    fs::{self, File},
    io::{BufRead, BufReader, ErrorKind, Write},
    path::{Path, PathBuf},
};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    durable::DurableFile,
    error::{Error, Result},
    format::{
        bucket::{Bucket, aspect_error, nearest},
        record::SampleId,
    },
    picture::decode,
    prep::{events::PrepEvent, filtered::Filtered, settings::PrepSettings, text_notes::text_notes},
    reject::{Fault, Reason, Remark},
    source::{
        Source, Stamp,
        names::{Kind, classify},
        sample::Sample,
    },
    text::caption::Text,
};

/// Files between two reports of progress.
const FILES_PER_CHUNK: usize = 512;
/// Most keys that are named as not read: JSON can have other keys for each image.
const MOST_UNREAD_KEYS: usize = 100;

/// Facts about a file's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fact {
    path: String,
    bytes: u64,
    /// The version of its file, which is the modification time on a disk.
    mtime_ns: u128,
    id: u64,
    width_px: u32,
    height_px: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fault: Option<Fault>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    note: Option<Fault>,
}

impl Fact {
    /// The fact about the bytes `content` of the file `path`.
    fn new(path: &str, stamp: Stamp, content: &[u8], settings: &PrepSettings) -> Self {
        let mut fact = Self {
            path: path.to_owned(),
            bytes: stamp.bytes,
            mtime_ns: stamp.version,
            id: SampleId::of(content).0,
            width_px: 0,
            height_px: 0,
            fault: None,
            note: None,
        };
        match decode::inspect(content, settings.max_pixels) {
            Ok(header) => {
                fact.width_px = header.width_px;
                fact.height_px = header.height_px;
            }
            Err(fault) => fact.fault = Some(fault),
        }
        fact
    }

    /// Whether a file with this stamp has this fact under every setting.
    fn is_current(&self, stamp: Stamp) -> bool {
        let is_too_large =
            matches!(&self.fault, Some(fault) if fault.reason == Reason::TooManyPixels);
        (self.bytes, self.mtime_ns) == (stamp.bytes, stamp.version) && !is_too_large
    }

    fn to_line(&self) -> String {
        serde_json::to_string(self).expect("a fact is strings and numbers")
    }
}

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

/// The result of one file, before the comparison with others.
struct Scanned {
    fact: std::result::Result<Fact, Fault>,
    /// Whether the fact comes from an earlier run.
    known: bool,
    text: Option<u64>,
    /// The clause of the filter that removes it.
    removed_by: Option<usize>,
    /// Why there is no text.
    missing_text: String,
    remarks: Vec<Remark>,
    notes: Vec<Fault>,
    unread: Vec<String>,
}

impl Scan {
    /// Scans `source`; reads only files without a current fact. `memory` is the file with the facts
    /// of an earlier run.
    pub(crate) fn run(
        source: &Source,
        memory: &Path,
        settings: &PrepSettings,
        progress: &mut dyn FnMut(PrepEvent),
    ) -> Result<Self> {
        // The facts of the last run, and those of a killed one.
        let mut remembered = read_facts(memory);
        let num_remembered = remembered.len();
        remembered.extend(read_facts(&part_of(memory)));
        let mut scan = Self {
            changed: num_remembered == 0,
            faults: lasting_faults(&remembered),
            filtered: Filtered::new(source.boards.clauses()),
            ..Self::default()
        };

        // Files are read in parallel and judged in order.
        let buckets = settings.geometry().buckets();
        let mut part = None;
        let mut num_known = 0;
        let mut done = 0;
        for files in source.samples.chunks(FILES_PER_CHUNK) {
            let scanned = scan_files(source, files, &remembered, settings);
            append(&part_of(memory), &mut part, &scanned)?;
            for scanned in scanned {
                num_known += usize::from(scanned.known);
                scan.decide(source, done, scanned, &buckets, settings);
                done += 1;
            }
            progress(PrepEvent::Scanning {
                done: done as u64,
                num_files: source.samples.len() as u64,
                rejected: scan.rejected.len() as u64 + scan.filtered.count(),
            });
        }

        // Facts of files that are gone are dropped.
        scan.changed |= num_known != num_remembered;
        scan.rejected.extend_from_slice(&source.remarks);
        scan.notes.extend_from_slice(&source.notes);
        scan.remember(memory)?;
        Ok(scan)
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
        let part = part_of(memory);
        match fs::remove_file(&part) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(part)(error)),
            _ => Ok(()),
        }
    }

    fn decide(
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
fn lasting_faults(remembered: &HashMap<String, Fact>) -> HashMap<u64, Fault> {
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

fn scan_files(
    source: &Source,
    files: &[Sample],
    remembered: &HashMap<String, Fact>,
    settings: &PrepSettings,
) -> Vec<Scanned> {
    source.on_threads(|| {
        files
            .par_iter()
            .map(|found| scan_file(source, found, remembered, settings))
            .collect()
    })
}

fn scan_file(
    source: &Source,
    found: &Sample,
    remembered: &HashMap<String, Fact>,
    settings: &PrepSettings,
) -> Scanned {
    let (fact, known) = fact_of(source, found, remembered, settings);
    let mut scanned = Scanned {
        fact,
        known,
        text: None,
        removed_by: None,
        missing_text: String::new(),
        remarks: Vec::new(),
        notes: Vec::new(),
        unread: Vec::new(),
    };
    if matches!(&scanned.fact, Ok(fact) if fact.fault.is_none()) {
        scan_text(source, found, settings, &mut scanned);
    }
    scanned
}

/// Reads the text of an image.
fn scan_text(source: &Source, found: &Sample, settings: &PrepSettings, scanned: &mut Scanned) {
    let texts = source.text(found);
    if let Ok(fact) = &scanned.fact {
        scanned.removed_by = source.removed_by(&texts, fact.width_px, fact.height_px);
        if scanned.removed_by.is_some() {
            return;
        }
    }
    scanned.remarks = texts.remarks;
    scanned.notes = texts.notes;
    scanned.unread = texts.unread;
    if let Some(orientation) = texts.orientation
        && lies_as_stored(source, found, settings)
    {
        let detail = format!(
            "its JSON says {orientation:?}, and the picture has no orientation: it may have been \
             written again without one; look at it, and turn it if it lies on its side"
        );
        scanned
            .notes
            .push(Fault::new(Reason::LostOrientation, detail));
    }
    let text = match texts.text {
        None if settings.keep_captionless => Text::default(),
        None => {
            scanned.missing_text = source.missing_text(found);
            return;
        }
        Some(text) => text,
    };
    scanned.notes.extend(text_notes(&text));
    scanned.text = Some(text.fingerprint(&found.path));
}

/// Whether an image has no EXIF orientation of its own.
fn lies_as_stored(source: &Source, found: &Sample, settings: &PrepSettings) -> bool {
    let bytes = source.open(found).unwrap_or_default();
    decode::is_upright(&bytes, settings.max_pixels)
}

/// The fact about a picture, and whether it comes from an earlier run.
fn fact_of(
    source: &Source,
    found: &Sample,
    remembered: &HashMap<String, Fact>,
    settings: &PrepSettings,
) -> (std::result::Result<Fact, Fault>, bool) {
    let stamp = match source.stamp(found) {
        Ok(stamp) => stamp,
        Err(fault) => return (Err(fault), false),
    };
    if let Err(fault) = check_length(stamp.bytes, settings) {
        return (Err(fault), false);
    }
    if let Some(fact) = remembered.get(&found.path)
        && fact.is_current(stamp)
    {
        return (Ok(fact.clone()), true);
    }
    let content = source.open(found);
    let fact = content.and_then(|content| {
        check_length(content.len() as u64, settings)?;
        Ok(Fact::new(&found.path, stamp, &content, settings))
    });
    (fact, false)
}

fn check_length(bytes: u64, settings: &PrepSettings) -> std::result::Result<(), Fault> {
    let max_file_mib = settings.max_file_mib;
    if bytes > u64::from(max_file_mib) << 20 {
        let detail = format!("{bytes} bytes, max_file_mib is {max_file_mib}");
        return Err(Fault::new(Reason::FileTooLarge, detail));
    }
    Ok(())
}

/// The file with the facts of an unfinished pass.
fn part_of(memory: &Path) -> PathBuf {
    memory.with_extension("part.jsonl")
}

/// Appends new facts to the part file, which the first of them creates. It is not flushed to the
/// disk: a power cut loses the last facts.
fn append(path: &Path, file: &mut Option<File>, scanned: &[Scanned]) -> Result<()> {
    let lines = new_lines(scanned);
    if lines.is_empty() {
        return Ok(());
    }
    if file.is_none() {
        let options = File::options().append(true).create(true).open(path);
        *file = Some(options.map_err(Error::io(path))?);
    }
    let file = file.as_mut().expect("it was just opened");
    file.write_all(lines.as_bytes()).map_err(Error::io(path))
}

/// The lines of new facts.
fn new_lines(scanned: &[Scanned]) -> String {
    let mut lines = String::new();
    for scanned in scanned.iter().filter(|scanned| !scanned.known) {
        if let Ok(fact) = &scanned.fact {
            // The newline before a line ends one that a killed run left half written.
            lines.push('\n');
            lines.push_str(&fact.to_line());
        }
    }
    lines
}

/// The facts of an earlier run, by path. Files with unreadable facts are read again.
fn read_facts(memory: &Path) -> HashMap<String, Fact> {
    let mut facts = HashMap::new();
    let Ok(file) = File::open(memory) else {
        return facts;
    };
    let lines = BufReader::new(file).lines();
    for line in lines.map_while(std::result::Result::ok) {
        if let Ok(fact) = serde_json::from_str::<Fact>(&line) {
            facts.insert(fact.path.clone(), fact);
        }
    }
    facts
}
