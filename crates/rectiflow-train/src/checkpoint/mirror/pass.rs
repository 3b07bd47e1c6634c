//! One pass: what the folder has and the mirror lacks is sent, what is old is removed.
//!
//! The order is that of the loss: the reason of a stop, what a branch froze, the newest checkpoint,
//! then older ones and the small files. After each checkpoint the pass looks again, since training
//! may have written a newer one.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime},
};

use rectiflow_data::Error as DataError;

use crate::{
    checkpoint::{
        SUMS,
        mirror::{
            index::{Index, object_of, sums_of_step},
            sides::{BASE, MOST_TEXT_BYTES, Sides},
        },
        step_of,
        sums::{Sums, collect_files},
    },
    error::{Error, Result},
};

/// Least time between two copies of an event file, which grows with every step.
const EVENTS_EVERY: Duration = Duration::from_secs(30);
/// Bytes of an event file for which that time grows by a second.
const EVENTS_BYTES_PER_SEC: u64 = 1 << 20;

/// Pauses before a list of objects is asked for again.
const LIST_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];

/// Length and time of the last change of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    bytes: u64,
    modified: Option<SystemTime>,
}

/// What the mirror has of the folder, as far as this process knows. Shared with the run's thread,
/// which asks for it at the end.
#[derive(Debug, Default)]
pub(crate) struct Known(Mutex<Facts>);

#[derive(Debug, Default)]
struct Facts {
    /// The list of hashes of each whole checkpoint.
    sums: BTreeMap<u64, String>,
    files: BTreeMap<String, (Version, Instant)>,
    /// Checkpoints of the folder that differ from their own hashes.
    damaged: BTreeSet<u64>,
    /// A checkpoint outside of the folder.
    spare: Option<PathBuf>,
    num_sent: u64,
}

impl Known {
    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a checkpoint outside of the folder, which is sent as if it was there.
    pub(crate) fn add_spare(&self, place: PathBuf) {
        self.facts().spare = Some(place);
    }

    /// Returns the number of files sent so far.
    pub(crate) fn num_sent(&self) -> u64 {
        self.facts().num_sent
    }

    /// Returns what the folder has and the mirror lacks, newest checkpoint first.
    pub(crate) fn missing(&self, sides: &Sides) -> Vec<String> {
        let mut missing = Vec::new();
        let here = here(sides, self).unwrap_or_default();
        let steps: Vec<u64> = here.iter().rev().map(|(step, _)| *step).collect();
        let old = sides.checkpoints.old_ones(&steps);
        for (step, place) in here {
            if old.contains(&step) {
                continue;
            }
            let sums = fs::read_to_string(place.join(SUMS)).ok();
            if sums.is_none() || self.facts().sums.get(&step) != sums.as_ref() {
                missing.push(object_of(step, ""));
            }
        }
        let mut names = other_files(sides).unwrap_or_default();
        if sides.run_dir.join(sides.others.stopped).is_file() {
            names.push(sides.others.stopped.to_owned());
        }
        for name in names {
            let sent = self.facts().files.get(&name).map(|(version, _)| *version);
            if version_of(&sides.run_dir.join(&name)) != sent {
                missing.push(name);
            }
        }
        missing
    }
}

/// A pass over both sides.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    pub(crate) sides: &'a Sides,
    pub(crate) known: &'a Known,
    /// Whether the run has ended, so that its event files grow no more.
    pub(crate) is_last: bool,
}

impl Pass<'_> {
    /// Brings the mirror up to date.
    ///
    /// # Errors
    /// The first failure; what was sent until then counts.
    pub(crate) fn run(&self) -> Result<()> {
        let mut index = self.index()?;
        self.send_stop(&index)?;
        self.send_others(&index, true)?;
        let mut passed_over = BTreeSet::new();
        while let Some((step, place)) = self.next(&index, &passed_over)? {
            if index.has(step) && !index.has_besides(step) {
                // The only whole checkpoint stays until there is another.
                passed_over.insert(step);
                continue;
            }
            let pin = self.sides.checkpoints.pin();
            pin.hold(step);
            let sent = self.send_checkpoint(step, &place, &index);
            pin.release();
            if let Err(error) = sent {
                self.pass_over(step, &place, error)?;
            }
            // Each at most once a pass, so that it ends.
            passed_over.insert(step);
            index = self.index()?;
            self.rotate(&index)?;
            self.send_others(&index, false)?;
        }
        self.rotate(&index)?;
        self.send_others(&index, false)
    }

    fn index(&self) -> Result<Index> {
        Ok(Index::of(self.sides.bucket.list()?))
    }

    /// Returns the newest checkpoint of the folder that the mirror lacks or has with other hashes.
    fn next(&self, index: &Index, passed_over: &BTreeSet<u64>) -> Result<Option<(u64, PathBuf)>> {
        let here = here(self.sides, self.known)?;
        let steps: Vec<u64> = here.iter().map(|(step, _)| *step).collect();
        let old = index.old_with(&steps, &self.sides.checkpoints);
        for (step, place) in here {
            let is_damaged = self.known.facts().damaged.contains(&step);
            if is_damaged || old.contains(&step) || passed_over.contains(&step) {
                continue;
            }
            let Ok(sums) = fs::read_to_string(place.join(SUMS)) else {
                continue;
            };
            if !index.has(step) || self.sums_there(step)?.as_ref() != Some(&sums) {
                return Ok(Some((step, place)));
            }
        }
        Ok(None)
    }

    /// Returns the list of hashes of a whole checkpoint of the mirror.
    fn sums_there(&self, step: u64) -> Result<Option<String>> {
        if let Some(sums) = self.known.facts().sums.get(&step) {
            return Ok(Some(sums.clone()));
        }
        let read = self
            .sides
            .bucket
            .read(&sums_of_step(step), MOST_TEXT_BYTES)?;
        let sums = read.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        if let Some(sums) = &sums {
            self.known.facts().sums.insert(step, sums.clone());
        }
        Ok(sums)
    }

    /// Sends the files of a checkpoint, and its list of hashes when all of them are there.
    fn send_checkpoint(&self, step: u64, place: &Path, index: &Index) -> Result<()> {
        let bucket = &self.sides.bucket;
        let path = place.join(SUMS);
        let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let Some(sums) = Sums::read(place)? else {
            return Err(Error::checkpoint(place, format!("it has no {SUMS}")));
        };
        if index.has(step) {
            self.known.facts().sums.remove(&step);
            bucket.remove(&sums_of_step(step))?;
        }
        let began = Instant::now();
        let mut lengths = BTreeMap::new();
        for (name, hash) in sums.files() {
            let path = place.join(name);
            let facts = fs::metadata(&path).map_err(Error::io(&path))?;
            let object = object_of(step, name);
            bucket.put_file(&object, &path, Some(hash))?;
            self.known.facts().num_sent += 1;
            lengths.insert(object, facts.len());
        }
        self.check_lengths(&lengths)?;
        bucket.put(&sums_of_step(step), text.as_bytes())?;
        let mut facts = self.known.facts();
        facts.sums.insert(step, text);
        facts.num_sent += 1;
        let bytes: u64 = lengths.values().sum();
        tracing::info!(
            "the checkpoint of step {step} is whole in {} ({:.1} MB in {:.1} s)",
            bucket.url(),
            bytes as f64 / 1e6,
            began.elapsed().as_secs_f64()
        );
        Ok(())
    }

    /// Checks that the store has objects of these lengths. Some stores list what was written only
    /// after a while.
    fn check_lengths(&self, expected: &BTreeMap<String, u64>) -> Result<()> {
        let mut wrong = self.first_wrong(expected)?;
        for pause in LIST_AGAIN {
            if wrong.is_none() {
                break;
            }
            thread::sleep(pause);
            wrong = self.first_wrong(expected)?;
        }
        match wrong {
            None => Ok(()),
            Some((name, reason)) => {
                let url = format!("{}/{name}", self.sides.bucket.url());
                Err(Error::checkpoint(Path::new(&url), reason))
            }
        }
    }

    /// Returns the first object that the store does not list in its length, and what it lists.
    fn first_wrong(&self, expected: &BTreeMap<String, u64>) -> Result<Option<(String, String)>> {
        let index = self.index()?;
        for (name, len) in expected {
            let found = index.bytes.get(name).copied();
            if found != Some(*len) {
                let found = found.map_or("no object".to_owned(), |len| format!("{len} bytes"));
                let reason = format!("expected {len} bytes, found {found}");
                return Ok(Some((name.clone(), reason)));
            }
        }
        Ok(None)
    }

    /// Decides about a checkpoint that could not be sent: one that rotation has removed meanwhile,
    /// or that is damaged, is no error of the mirror.
    fn pass_over(&self, step: u64, place: &Path, error: Error) -> Result<()> {
        if !place.is_dir() {
            return Ok(());
        }
        let is_damaged = is_missing_file(&error)
            || matches!(&error, Error::Data(DataError::Invalid { .. }))
            || matches!(&error, Error::Checkpoint { path, .. } if path.starts_with(place));
        if !is_damaged {
            return Err(error);
        }
        tracing::warn!(
            "{} is damaged and is not copied to the mirror: {error}",
            place.display()
        );
        self.known.facts().damaged.insert(step);
        Ok(())
    }

    /// Removes checkpoints that are old by the rule of the folder, the list of hashes first.
    fn rotate(&self, index: &Index) -> Result<()> {
        let mut steps = Vec::new();
        let mut newest = None;
        for (step, place) in here(self.sides, self.known)? {
            steps.push(step);
            let sums = fs::read_to_string(place.join(SUMS)).ok();
            let facts = self.known.facts();
            if newest.is_none() && sums.is_some() && facts.sums.get(&step) == sums.as_ref() {
                newest = Some(step);
            }
        }
        let Some(newest) = newest else {
            return Ok(());
        };
        for step in index.to_remove(newest, &steps, &self.sides.checkpoints) {
            self.known.facts().sums.remove(&step);
            for name in index.objects(step) {
                self.sides.bucket.remove(name)?;
            }
        }
        Ok(())
    }

    /// Sends the reason of a stop, or takes back one that was acknowledged.
    fn send_stop(&self, index: &Index) -> Result<()> {
        let others = &self.sides.others;
        let stopped = self.sides.run_dir.join(others.stopped);
        let acknowledged = self.sides.run_dir.join(others.acknowledged);
        if stopped.is_file() {
            return self.send_if_changed(others.stopped, &Index::default());
        }
        let Ok(reason) = fs::read(&acknowledged) else {
            return Ok(());
        };
        self.send_if_changed(others.acknowledged, index)?;
        let bucket = &self.sides.bucket;
        if index.bytes.contains_key(others.stopped)
            && bucket.read(others.stopped, MOST_TEXT_BYTES)?.as_ref() == Some(&reason)
        {
            bucket.remove(others.stopped)?;
        }
        Ok(())
    }

    /// Sends changed files that are no checkpoint's: those of `base/`, or all others.
    fn send_others(&self, index: &Index, is_base: bool) -> Result<()> {
        for name in other_files(self.sides)? {
            if name.starts_with(BASE) == is_base && self.is_due(&name) {
                self.send_if_changed(&name, index)?;
            }
        }
        Ok(())
    }

    /// Whether a file may be sent again: an event file changes with every step.
    fn is_due(&self, name: &str) -> bool {
        if self.is_last || !self.sides.others.is_events(name) {
            return true;
        }
        let Some((version, sent)) = self.known.facts().files.get(name).copied() else {
            return true;
        };
        let more = Duration::from_secs(version.bytes / EVENTS_BYTES_PER_SEC);
        sent.elapsed() >= EVENTS_EVERY + more
    }

    /// Sends a file of the folder unless the mirror has it: as this process has sent it, or, before
    /// that, in the same length.
    fn send_if_changed(&self, name: &str, index: &Index) -> Result<()> {
        let path = self.sides.run_dir.join(name);
        let Some(version) = version_of(&path) else {
            return Ok(());
        };
        let known = self.known.facts().files.get(name).map(|(known, _)| *known);
        let is_there = match known {
            Some(known) => known == version,
            None => index.bytes.get(name) == Some(&version.bytes),
        };
        if !is_there {
            match self.sides.bucket.put_file(name, &path, None) {
                // It was a temporary name.
                Err(error) if is_missing(&error) => return Ok(()),
                sent => sent?,
            }
        }
        let mut facts = self.known.facts();
        facts.num_sent += u64::from(!is_there);
        let entry = (version, Instant::now());
        facts.files.insert(name.to_owned(), entry);
        Ok(())
    }
}

/// Returns the checkpoints of the folder and one outside of it, newest first.
fn here(sides: &Sides, known: &Known) -> Result<Vec<(u64, PathBuf)>> {
    let mut places = sides.checkpoints.list()?;
    places.extend(known.facts().spare.clone());
    let mut found = Vec::with_capacity(places.len());
    for place in places {
        if let Some(step) = step_of(&place) {
            found.push((step, place));
        }
    }
    found.sort_by_key(|(step, _)| Reverse(*step));
    Ok(found)
}

/// Returns the names of the files that are copied besides checkpoints and the reason of a stop.
fn other_files(sides: &Sides) -> Result<Vec<String>> {
    let run_dir = &sides.run_dir;
    let mut found = Vec::new();
    for entry in fs::read_dir(run_dir).map_err(Error::io(run_dir))? {
        let entry = entry.map_err(Error::io(run_dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if sides.others.is_events(&name) {
            found.push(name);
        }
    }
    for folder in sides.others.folders {
        let path = run_dir.join(folder);
        if !path.is_dir() {
            continue;
        }
        let mut names = Vec::new();
        collect_files(&path, &mut names)?;
        // A name that begins with a dot is temporary.
        names.retain(|name| !name.split('/').any(|part| part.starts_with('.')));
        found.extend(names.iter().map(|name| format!("{folder}/{name}")));
    }
    found.sort();
    Ok(found)
}

/// Returns the version of a file; `None` if it is none.
fn version_of(path: &Path) -> Option<Version> {
    let facts = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    Some(Version {
        bytes: facts.len(),
        modified: facts.modified().ok(),
    })
}

fn is_missing(error: &DataError) -> bool {
    matches!(error, DataError::Io { source, .. } if source.kind() == ErrorKind::NotFound)
}

/// Whether a file of this machine is not there.
fn is_missing_file(error: &Error) -> bool {
    match error {
        Error::Data(error) => is_missing(error),
        Error::Io { source, .. } => source.kind() == ErrorKind::NotFound,
        _ => false,
    }
}
