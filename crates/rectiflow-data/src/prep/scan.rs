//! The first pass over a folder: each file's hash and header, kept between runs, and whether the
//! file is accepted.
//!
//! Facts are also appended to `prep/files.part.jsonl` as they are found: hashing 13 million images
//! takes hours, and the run after a killed one continues from there.
//!
//! A file whose length and modification time are those of the last run is not read again. Facts
//! about its bytes (hash, size in pixels, damage) are kept; verdicts that depend on settings or
//! other files (too small, no bucket, duplicate) are computed in each run. Memory: about 400 bytes
//! per image, 5 GB for 13 million; pixels and captions are not kept.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io::{BufRead, BufReader, ErrorKind, Write},
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
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
    prep::{
        events::PrepEvent,
        settings::PrepSettings,
        source::{Found, Source},
    },
    reject::{Fault, Reason, Remark},
};

/// Files between two reports of progress.
const FILES_PER_CHUNK: usize = 512;

/// Facts about a file's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fact {
    path: String,
    bytes: u64,
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

/// The result of one file, before the comparison with others.
struct Scanned {
    fact: std::result::Result<Fact, Fault>,
    /// Whether the fact comes from an earlier run.
    known: bool,
    text: Option<u64>,
    remarks: Vec<Remark>,
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
        let mut remembered = read_facts(memory);
        let num_remembered = remembered.len();
        remembered.extend(read_facts(&part_of(memory)));
        let mut part = None;
        let mut scan = Self {
            changed: num_remembered == 0,
            ..Self::default()
        };
        let faulty = remembered
            .values()
            .filter_map(|fact| Some((fact.id, fact.fault.clone()?)));
        scan.faults = faulty
            .filter(|(_, fault)| fault.reason != Reason::TooManyPixels)
            .collect();
        let mut used = 0;
        let buckets = settings.geometry().buckets();
        for (chunk, files) in source.files.chunks(FILES_PER_CHUNK).enumerate() {
            let scanned: Vec<Scanned> = files
                .par_iter()
                .map(|found| scan_file(source, found, &remembered, settings))
                .collect();
            let new = scanned
                .iter()
                .filter(|scanned| !scanned.known)
                .filter_map(|scanned| scanned.fact.as_ref().ok());
            append(&part_of(memory), &mut part, new)?;
            for (i, scanned) in scanned.into_iter().enumerate() {
                used += usize::from(scanned.known);
                scan.changed |= !scanned.known;
                scan.decide(
                    source,
                    chunk * FILES_PER_CHUNK + i,
                    scanned,
                    &buckets,
                    settings,
                );
            }
            let num_files = source.files.len() as u64;
            let done = ((chunk * FILES_PER_CHUNK) + files.len()) as u64;
            progress(PrepEvent::Scanning {
                done,
                num_files,
                rejected: scan.rejected.len() as u64,
            });
        }
        scan.changed |= used != num_remembered;
        scan.rejected.extend_from_slice(&source.remarks);
        scan.remember(memory)?;
        Ok(scan)
    }

    /// Records a fault or a note that decoding or encoding found in a sample's bytes.
    pub(crate) fn learn(&mut self, id: SampleId, fault: Option<Fault>, note: Option<Fault>) {
        // An interrupted run can have a fault or note of an image that is gone.
        let Some(&index) = self.by_id.get(&id) else {
            return;
        };
        let fact = &mut self.facts[index];
        if let Some(fault) = fault {
            self.rejected.push(Remark {
                path: fact.path.clone(),
                fault: fault.clone(),
            });
            self.failed.insert(id);
            // Unreadable is a passing state, not a property of the bytes.
            fact.fault = (fault.reason != Reason::Unreadable).then_some(fault);
            if fact.note.is_some() {
                self.notes.retain(|remark| remark.path != fact.path);
            }
        }
        if let Some(note) = note.filter(|note| fact.note.as_ref() != Some(note)) {
            self.notes.push(Remark {
                path: fact.path.clone(),
                fault: note.clone(),
            });
            fact.note = Some(note);
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
        self.rejected.extend(scanned.remarks);
        let path = &source.files[file].path;
        let fact = match scanned.fact {
            Ok(fact) => fact,
            Err(fault) => {
                return self.rejected.push(Remark {
                    path: path.clone(),
                    fault,
                });
            }
        };
        let (id, index) = (SampleId(fact.id), self.facts.len());
        let fault = fact
            .fault
            .as_ref()
            .or_else(|| self.faults.get(&fact.id))
            .cloned();
        let verdict = fault.map_or_else(|| judge(&fact, scanned.text, buckets, settings), Err);
        let note = fact.note.clone();
        self.facts.push(fact);
        let fact = &self.facts[index];
        match verdict {
            Err(fault) => self.rejected.push(Remark {
                path: path.clone(),
                fault,
            }),
            Ok((bucket, text)) => {
                if let Some(&first) = self.by_id.get(&id) {
                    let detail = format!("it has the same bytes as {}", self.facts[first].path);
                    return self.rejected.push(Remark::new(
                        path.clone(),
                        Reason::Duplicate,
                        detail,
                    ));
                }
                let (width_px, height_px) = (fact.width_px, fact.height_px);
                self.by_id.insert(id, index);
                self.accepted.push(Accepted {
                    file,
                    id,
                    width_px,
                    height_px,
                    bucket,
                    text,
                });
                self.notes.extend(note.map(|fault| Remark {
                    path: path.clone(),
                    fault,
                }));
            }
        }
    }
}

/// Applies the settings to a file. Returns its bucket and the fingerprint of its text.
fn judge(
    fact: &Fact,
    text: Option<u64>,
    buckets: &[Bucket],
    settings: &PrepSettings,
) -> std::result::Result<(Bucket, u64), Fault> {
    let (width, height) = (fact.width_px, fact.height_px);
    if width.min(height) < settings.min_side_px {
        let detail = format!(
            "{width}x{height} px, min_side_px is {}",
            settings.min_side_px
        );
        return Err(Fault::new(Reason::TooSmall, detail));
    }
    let bucket = buckets[nearest(buckets, width, height)];
    let error = aspect_error(bucket, width, height);
    if error > settings.max_aspect_error {
        let nearest = format!(
            "the nearest bucket is {}x{}",
            bucket.width_px, bucket.height_px
        );
        let detail = format!("{width}x{height} px, {nearest}, {error:.3} off; max_aspect_error is");
        return Err(Fault::new(
            Reason::AspectRatio,
            format!("{detail} {}", settings.max_aspect_error),
        ));
    }
    text.map(|text| (bucket, text)).ok_or_else(|| {
        Fault::new(
            Reason::NoCaption,
            "neither name.json nor name.txt nor metadata.jsonl has text for it",
        )
    })
}

fn scan_file(
    source: &Source,
    found: &Found,
    remembered: &HashMap<String, Fact>,
    settings: &PrepSettings,
) -> Scanned {
    let (fact, known) = facts_of(source, found, remembered, settings);
    if !fact.as_ref().is_ok_and(|fact| fact.fault.is_none()) {
        return Scanned {
            fact,
            known,
            text: None,
            remarks: Vec::new(),
        };
    }
    let (text, remarks) = source.text(found, &settings.quality_words);
    let text = if settings.keep_captionless {
        Some(text.unwrap_or_default())
    } else {
        text
    };
    Scanned {
        fact,
        known,
        text: text.map(|text| text.fingerprint(&found.path)),
        remarks,
    }
}

fn facts_of(
    source: &Source,
    found: &Found,
    remembered: &HashMap<String, Fact>,
    settings: &PrepSettings,
) -> (std::result::Result<Fact, Fault>, bool) {
    let path = source.path(&found.path);
    let unreadable = |error: std::io::Error| Fault::new(Reason::Unreadable, error.to_string());
    let stamp = fs::metadata(&path).and_then(|metadata| {
        // Reading a pipe or a device could block or never end.
        if !metadata.is_file() {
            return Err(std::io::Error::other("it is not a regular file"));
        }
        let since = metadata
            .modified()?
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Ok((metadata.len(), since.as_nanos()))
    });
    let (bytes, mtime_ns) = match stamp {
        Ok(stamp) => stamp,
        Err(error) => return (Err(unreadable(error)), false),
    };
    let limit = u64::from(settings.max_file_mib) << 20;
    if bytes > limit {
        let detail = format!("{bytes} bytes, max_file_mib is {}", settings.max_file_mib);
        return (Err(Fault::new(Reason::FileTooLarge, detail)), false);
    }
    if let Some(fact) = remembered.get(&found.path)
        && (fact.bytes, fact.mtime_ns) == (bytes, mtime_ns)
        && fact
            .fault
            .as_ref()
            .is_none_or(|fault| fault.reason != Reason::TooManyPixels)
    {
        return (Ok(fact.clone()), true);
    }
    let content = match fs::read(&path) {
        Ok(content) => content,
        Err(error) => return (Err(unreadable(error)), false),
    };
    let header = decode::inspect(&content, settings.max_pixels);
    let (width_px, height_px) = header
        .as_ref()
        .map_or((0, 0), |header| (header.width_px, header.height_px));
    let (id, fault) = (SampleId::of(&content).0, header.err());
    let path = found.path.clone();
    (
        Ok(Fact {
            path,
            bytes,
            mtime_ns,
            id,
            width_px,
            height_px,
            fault,
            note: None,
        }),
        false,
    )
}

/// The file with the facts of an unfinished pass.
fn part_of(memory: &Path) -> PathBuf {
    memory.with_extension("part.jsonl")
}

/// Appends facts to the part file, which the first of them creates. It is not flushed to the disk:
/// a power cut loses the last facts.
fn append<'a>(
    path: &Path,
    file: &mut Option<File>,
    facts: impl Iterator<Item = &'a Fact>,
) -> Result<()> {
    // The newline before a line ends one that a killed run left half written.
    let lines: String = facts.map(|fact| format!("\n{}", fact.to_line())).collect();
    if lines.is_empty() {
        return Ok(());
    }
    if file.is_none() {
        *file = Some(
            File::options()
                .append(true)
                .create(true)
                .open(path)
                .map_err(Error::io(path))?,
        );
    }
    let file = file.as_mut().expect("it was just opened");
    file.write_all(lines.as_bytes()).map_err(Error::io(path))
}

/// The facts of an earlier run, by path. Files with unreadable facts are read again.
fn read_facts(memory: &Path) -> HashMap<String, Fact> {
    let Ok(file) = File::open(memory) else {
        return HashMap::new();
    };
    let lines = BufReader::new(file)
        .lines()
        .map_while(std::result::Result::ok);
    let facts = lines.filter_map(|line| serde_json::from_str::<Fact>(&line).ok());
    facts.map(|fact| (fact.path.clone(), fact)).collect()
}
