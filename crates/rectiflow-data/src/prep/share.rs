//! The facts that workers on one data set exchange: a file of each, in the folder `prep/workers`.
//!
//! Worker i of n reads its blocks of samples and writes what it found, a line a sample, to
//! `facts-i-of-n.part.jsonl`. When its last sample is there, the file is flushed and renamed to
//! `facts-i-of-n.jsonl`. A worker that was killed goes on after the last whole line. From the files
//! of all workers each worker comes to the same scan, and so to the same plan.
//!
//! The first line says what the facts are about: the listing of the source, the settings and the
//! worker. Facts about another listing or other settings are not used.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, BufWriter, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    lock_file::lock_alone,
    prep::{
        copies_list,
        events::PrepEvent,
        fact::{Remembered, read_facts},
        kept_pictures::KeptPictures,
        part::{BLOCK_SAMPLES, Part},
        scan::Scan,
        scanned::{Scanned, scan_files},
        settings::PrepSettings,
    },
    source::Source,
};

/// The folder of the workers' files.
const FOLDER: &str = "prep/workers";
/// How often a worker looks for the facts of the others.
const GLANCE: Duration = Duration::from_millis(500);
/// After this time a worker that runs, and whose facts are of another listing, does so for good.
const PATIENCE: Duration = Duration::from_secs(60);
const LOCK_TRIES: usize = 5;
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// What facts are about: the first line of their file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct About {
    part: Part,
    num_samples: u64,
    /// Hash of the addresses and lengths of all samples.
    listing: String,
    /// Hash of the settings.
    settings: String,
}

/// Why the facts of a worker cannot be used yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    NotThere,
    OtherListing { num_samples: u64 },
    OtherSettings,
}

/// The folder of the workers' files, locked by one of them.
#[derive(Debug)]
pub(crate) struct Share {
    /// The folder of the data set, and that of the files in it.
    root: PathBuf,
    folder: PathBuf,
    about: About,
    /// What the facts of each worker were about before this worker's were complete.
    before: Vec<Option<About>>,
    /// Locked as long as the worker lives. None for the call that joins.
    _lock: Option<File>,
}

impl Share {
    /// The share of a worker, which no other process may have.
    ///
    /// # Errors
    /// [`Error::NotReady`] if a process with the same number runs; [`Error::Io`].
    pub(crate) fn of_worker(
        out: &Path,
        source: &Source,
        settings: &PrepSettings,
        part: Part,
    ) -> Result<Self> {
        let folder = out.join(FOLDER);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let lock = take_lock(&lock_path(&folder, part), part)?;
        Ok(Self {
            root: out.to_owned(),
            folder,
            about: About::new(source, settings, part),
            before: Vec::new(),
            _lock: Some(lock),
        })
    }

    /// The share of the call that joins what the workers made. Their number is that of the files,
    /// of several numbers the one with all facts.
    ///
    /// # Errors
    /// [`Error::NotReady`] without any file of facts; [`Error::Io`].
    pub(crate) fn of_join(out: &Path, source: &Source, settings: &PrepSettings) -> Result<Self> {
        let folder = out.join(FOLDER);
        let mut parts = parts_in(&folder);
        parts.sort_by_key(|part| part.num_workers);
        parts.dedup_by_key(|part| part.num_workers);
        let Some(&last) = parts.last() else {
            return Err(Error::NotReady {
                what: out.display().to_string(),
                reason: "no worker has been here: run the workers first, with --worker I/N"
                    .to_owned(),
            });
        };
        let mut share = Self {
            root: out.to_owned(),
            folder,
            about: About::new(source, settings, last),
            before: Vec::new(),
            _lock: None,
        };
        for &part in &parts {
            share.about.part = part;
            if share.all_missing()?.is_empty() {
                break;
            }
        }
        Ok(share)
    }

    /// Number of workers.
    pub(crate) fn num_workers(&self) -> u32 {
        self.about.part.num_workers
    }

    /// Reads the worker's own samples and writes their facts, unless they are there already.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn gather(
        &mut self,
        source: &Source,
        memory: &Path,
        settings: &PrepSettings,
        progress: &mut dyn FnMut(PrepEvent),
    ) -> Result<()> {
        let part = self.about.part;
        if self.missing(part.worker)?.is_none() {
            self.before = self.all_found()?;
            return Ok(());
        }
        let remembered = read_facts(memory);
        let unkept = KeptPictures::new(0);
        let num_own = part.num_own(source.samples.len()) as u64;
        let (mut writer, mut left) = Writer::resume(&self.folder, &self.about)?;
        let mut done = 0;
        let mut rejected = 0;
        for block in part.blocks(source.samples.len()) {
            let num_known = left.min(block.len());
            left -= num_known;
            done += num_known as u64;
            let rest = block.start + num_known..block.end;
            if !rest.is_empty() {
                let scanned = scan_files(source, rest, &remembered, &unkept, settings);
                rejected += scanned.iter().filter(|scanned| scanned.is_faulty()).count() as u64;
                done += scanned.len() as u64;
                writer.append(&scanned)?;
            }
            progress(PrepEvent::Scanning {
                done,
                num_files: num_own,
                rejected,
            });
        }
        self.before = self.all_found()?;
        writer.finish()
    }

    /// Waits until the facts of all workers are there.
    ///
    /// Facts about another listing that were there before this worker's are old: their worker ends
    /// when it sees this worker's, and lists the source again when it is started again. Those that
    /// came later say that this worker's are old.
    ///
    /// # Errors
    /// [`Error::NotReady`] if the facts of another worker are about a newer listing.
    pub(crate) fn wait(&self, progress: &mut dyn FnMut(PrepEvent)) -> Result<()> {
        let since = Instant::now();
        loop {
            let found = self.all_found()?;
            let missing = self.missing_of(&found);
            if missing.is_empty() {
                return Ok(());
            }
            for &(worker, why) in &missing {
                let before = self.before.get(worker as usize).and_then(Option::as_ref);
                let is_newer = found[worker as usize].as_ref() != before;
                let lasts = since.elapsed() > PATIENCE && self.is_running(worker);
                if why != Missing::NotThere && (is_newer || lasts) {
                    return Err(self.refuse(&missing));
                }
            }
            progress(PrepEvent::Waiting {
                missing: missing.len() as u64,
                num_workers: self.num_workers().into(),
                secs: since.elapsed().as_secs(),
            });
            thread::sleep(GLANCE);
        }
    }

    /// Checks that the facts of all workers are there.
    ///
    /// # Errors
    /// [`Error::NotReady`] with the workers whose facts are missing.
    pub(crate) fn check(&self) -> Result<()> {
        let missing = self.all_missing()?;
        if missing.is_empty() {
            return Ok(());
        }
        Err(self.refuse(&missing))
    }

    /// The scan of all samples, from the facts of all workers. Reads no picture.
    ///
    /// # Errors
    /// [`Error::Malformed`] if a file of facts is damaged; [`Error::Io`].
    pub(crate) fn scan(
        &self,
        source: &Source,
        memory: &Path,
        settings: &PrepSettings,
        progress: &mut dyn FnMut(PrepEvent),
    ) -> Result<Scan> {
        let mut scan = Scan::new(source, &read_facts(memory));
        let mut readers = Vec::new();
        for worker in 0..self.num_workers() {
            readers.push(Reader::open(&self.folder, self.part(worker))?);
        }
        let num_samples = source.samples.len();
        let buckets = settings.geometry().buckets();
        for (block, start) in (0..num_samples).step_by(BLOCK_SAMPLES).enumerate() {
            let reader = &mut readers[block % self.num_workers() as usize];
            let end = num_samples.min(start + BLOCK_SAMPLES);
            for file in start..end {
                scan.decide(source, file, reader.next()?, &buckets, settings);
            }
            progress(PrepEvent::Joining {
                done: end as u64,
                num_files: num_samples as u64,
            });
        }
        scan.finish(
            source,
            &copies_list::left_out(&self.root, &settings.without)?,
        )?;
        Ok(scan)
    }

    fn part(&self, worker: u32) -> Part {
        Part {
            worker,
            num_workers: self.num_workers(),
        }
    }

    /// The workers whose facts cannot be used, and why.
    fn all_missing(&self) -> Result<Vec<(u32, Missing)>> {
        Ok(self.missing_of(&self.all_found()?))
    }

    fn missing_of(&self, found: &[Option<About>]) -> Vec<(u32, Missing)> {
        let mut all = Vec::new();
        for (worker, found) in (0..).zip(found) {
            if let Some(why) = self.why_missing(found.as_ref()) {
                all.push((worker, why));
            }
        }
        all
    }

    /// Why the facts of a worker cannot be used. None if they can.
    fn missing(&self, worker: u32) -> Result<Option<Missing>> {
        Ok(self.why_missing(self.found(worker)?.as_ref()))
    }

    /// Why facts that are about `found` cannot be used. None if they can.
    fn why_missing(&self, found: Option<&About>) -> Option<Missing> {
        let Some(found) = found else {
            return Some(Missing::NotThere);
        };
        if found.listing != self.about.listing {
            let num_samples = found.num_samples;
            return Some(Missing::OtherListing { num_samples });
        }
        (found.settings != self.about.settings).then_some(Missing::OtherSettings)
    }

    /// What the facts of each worker are about. None without any.
    fn all_found(&self) -> Result<Vec<Option<About>>> {
        (0..self.num_workers())
            .map(|worker| self.found(worker))
            .collect()
    }

    fn found(&self, worker: u32) -> Result<Option<About>> {
        let path = facts_path(&self.folder, self.part(worker));
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::Io { path, source }),
        };
        let mut line = String::new();
        // A line that cannot be read is of no use either.
        let _ = BufReader::new(file).read_line(&mut line);
        Ok(serde_json::from_str(&line).ok())
    }

    /// Whether a process holds the number of a worker.
    fn is_running(&self, worker: u32) -> bool {
        let lock = lock_alone(&lock_path(&self.folder, self.part(worker)));
        matches!(lock, Ok(None))
    }

    fn refuse(&self, missing: &[(u32, Missing)]) -> Error {
        let mut named = Vec::new();
        for &(worker, why) in missing.iter().take(8) {
            named.push(match why {
                Missing::NotThere => format!("{} has none yet", self.part(worker)),
                Missing::OtherListing { num_samples } => format!(
                    "{} has those of another listing of the source ({num_samples} samples, here \
                     {})",
                    self.part(worker),
                    self.about.num_samples
                ),
                Missing::OtherSettings => {
                    format!("{} has those of other settings", self.part(worker))
                }
            });
        }
        let others = missing.len() - named.len();
        let and_others = match others {
            0 => String::new(),
            many => format!("; and {many} more"),
        };
        Error::NotReady {
            what: "the facts of all workers are needed".to_owned(),
            reason: format!(
                "{}{and_others}: run these workers with the same source and settings",
                named.join("; ")
            ),
        }
    }
}

/// Adds the facts that workers left to those of an earlier run.
pub(crate) fn remember(out: &Path, remembered: &mut Remembered) {
    let folder = out.join(FOLDER);
    for part in parts_in(&folder) {
        for path in [facts_path(&folder, part), part_path(&folder, part)] {
            let Ok(file) = File::open(path) else {
                continue;
            };
            let lines = BufReader::new(file)
                .lines()
                .map_while(std::result::Result::ok);
            for line in lines {
                if let Ok(scanned) = serde_json::from_str::<Scanned>(&line)
                    && let Ok(fact) = scanned.fact
                {
                    remembered.insert(fact.path.clone(), fact);
                }
            }
        }
    }
}

/// Deletes the files of the workers, once the data set is committed.
pub(crate) fn forget(out: &Path) -> Result<()> {
    let folder = out.join(FOLDER);
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(folder)(error)),
        _ => Ok(()),
    }
}

impl About {
    fn new(source: &Source, settings: &PrepSettings, part: Part) -> Self {
        let mut listing = blake3::Hasher::new();
        for sample in &source.samples {
            listing.update(sample.path.as_bytes());
            listing.update(&sample.size_bytes().unwrap_or_default().to_le_bytes());
            // No address has this byte.
            listing.update(&[0]);
        }
        let settings = serde_json::to_vec(settings).expect("settings are strings and numbers");
        Self {
            part,
            num_samples: source.samples.len() as u64,
            listing: listing.finalize().to_hex().to_string(),
            settings: blake3::hash(&settings).to_hex().to_string(),
        }
    }

    fn to_line(&self) -> String {
        serde_json::to_string(self).expect("it is strings and numbers")
    }
}

/// Appends facts to the part file of a worker.
struct Writer {
    path: PathBuf,
    end: PathBuf,
    file: BufWriter<File>,
}

impl Writer {
    /// Opens the part file of a worker. Returns the number of samples whose facts it has; what is
    /// after the last whole line, and facts about something else, are cut off.
    fn resume(folder: &Path, about: &About) -> Result<(Self, usize)> {
        let path = part_path(folder, about.part);
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io(&path))?;
        let (num_lines, len) = whole_lines(&mut file, about);
        file.set_len(len).map_err(Error::io(&path))?;
        file.seek(SeekFrom::End(0)).map_err(Error::io(&path))?;
        let mut writer = Self {
            end: facts_path(folder, about.part),
            file: BufWriter::new(file),
            path,
        };
        if len == 0 {
            writer.line(&about.to_line())?;
        }
        Ok((writer, num_lines))
    }

    fn append(&mut self, scanned: &[Scanned]) -> Result<()> {
        for scanned in scanned {
            let line = serde_json::to_string(scanned).expect("facts are strings and numbers");
            self.line(&line)?;
        }
        self.file.flush().map_err(Error::io(&self.path))
    }

    fn line(&mut self, line: &str) -> Result<()> {
        writeln!(self.file, "{line}").map_err(Error::io(&self.path))
    }

    /// Gives the file its final name, once it is on the disk.
    fn finish(self) -> Result<()> {
        let file = self
            .file
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error);
        let synced = file.and_then(|file| file.sync_all());
        synced.map_err(Error::io(&self.path))?;
        fs::rename(&self.path, &self.end).map_err(Error::io(&self.end))
    }
}

/// The number of samples and the bytes of the whole lines of a part file that is about `about`.
fn whole_lines(file: &mut File, about: &About) -> (usize, u64) {
    let mut reader = BufReader::new(&mut *file);
    let mut line = String::new();
    // Bytes that are no text are another version's, or damaged: they are written again.
    let is_text = reader.read_line(&mut line).is_ok();
    if !is_text || serde_json::from_str::<About>(&line).ok().as_ref() != Some(about) {
        return (0, 0);
    }
    let mut len = line.len() as u64;
    let mut num_lines = 0;
    loop {
        line.clear();
        let is_text = reader.read_line(&mut line).is_ok();
        if !is_text || !line.ends_with('\n') || serde_json::from_str::<Scanned>(&line).is_err() {
            return (num_lines, len);
        }
        len += line.len() as u64;
        num_lines += 1;
    }
}

/// Reads the facts of a worker, sample after sample.
struct Reader {
    path: PathBuf,
    lines: BufReader<File>,
    line: String,
    /// Number of the line, from 1.
    number: u64,
}

impl Reader {
    fn open(folder: &Path, part: Part) -> Result<Self> {
        let path = facts_path(folder, part);
        let file = File::open(&path).map_err(Error::io(&path))?;
        let mut reader = Self {
            path,
            lines: BufReader::with_capacity(1 << 18, file),
            line: String::new(),
            number: 1,
        };
        reader.advance()?; // the line that says what it is about
        Ok(reader)
    }

    fn advance(&mut self) -> Result<()> {
        self.line.clear();
        let read = self.lines.read_line(&mut self.line);
        read.map_err(Error::io(&self.path)).map(|_| ())
    }

    fn next(&mut self) -> Result<Scanned> {
        self.advance()?;
        self.number += 1;
        serde_json::from_str(&self.line).map_err(|_| Error::Malformed {
            path: self.path.clone(),
            kind: "file of facts",
            reason: format!(
                "line {} is damaged: delete the file and run its worker again",
                self.number
            ),
        })
    }
}

/// The workers that have a file in the folder.
fn parts_in(folder: &Path) -> Vec<Part> {
    let mut parts = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(rest) = name.strip_prefix("facts-") else {
            continue;
        };
        let rest = rest.trim_end_matches(".jsonl").trim_end_matches(".part");
        if let Ok(part) = rest.replacen("-of-", "/", 1).parse()
            && !parts.contains(&part)
        {
            parts.push(part);
        }
    }
    parts
}

fn facts_path(folder: &Path, part: Part) -> PathBuf {
    folder.join(format!(
        "facts-{}-of-{}.jsonl",
        part.worker, part.num_workers
    ))
}

fn part_path(folder: &Path, part: Part) -> PathBuf {
    facts_path(folder, part).with_extension("part.jsonl")
}

fn lock_path(folder: &Path, part: Part) -> PathBuf {
    folder.join(format!("lock-{}-of-{}", part.worker, part.num_workers))
}

/// Takes the lock of a worker. Another worker can hold it for a moment, to see whether it is free.
fn take_lock(path: &Path, part: Part) -> Result<File> {
    for _ in 0..LOCK_TRIES {
        match lock_alone(path)? {
            Some(file) => return Ok(file),
            None => thread::sleep(LOCK_PAUSE),
        }
    }
    Err(Error::NotReady {
        what: format!("worker {part}"),
        reason: "a process with this number is at work on the data set: give each worker a number \
                 of its own"
            .to_owned(),
    })
}
