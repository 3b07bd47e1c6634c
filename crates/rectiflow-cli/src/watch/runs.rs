//! The runs that are watched: found in folders, read when they are looked at.
//!
//! A run's number is its place in a list that only grows, and a page asks by number: no request
//! names a path.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    time::{Instant, SystemTime},
};

use anyhow::Context;
use rectiflow_data::RemoteFolder;
use rectiflow_train::metrics::{self, Event};
use serde::Serialize;

use crate::{
    terminal::{answer::Misuse, log},
    watch::{
        reply::About,
        run_log::RunLog,
        source::{Follower, Source},
    },
};

/// The runs below the places that the user has named.
#[derive(Debug)]
pub(crate) struct Runs {
    folders: Vec<PathBuf>,
    runs: Vec<Run>,
    /// Numbers by folder.
    known: HashMap<PathBuf, usize>,
    scanned: Option<Instant>,
}

/// A run that need not have been read yet.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) name: String,
    pub(crate) source: Source,
    read: Option<Read>,
    /// What the list says, and of which file.
    listed: Option<(Version, Listed)>,
}

/// A run that is in memory.
#[derive(Debug)]
struct Read {
    log: RunLog,
    follower: Follower,
    asked: Instant,
}

/// Length and time of a file.
type Version = (u64, SystemTime);

/// A line of the list of runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Listed {
    /// The run's number.
    pub(crate) id: usize,
    pub(crate) name: String,
    /// "running", "silent", "finished", "interrupted" or "stopped".
    pub(crate) state: String,
    /// Seconds since 1970 of its last event.
    pub(crate) written: u64,
}

/// Folders below a named one in which runs are looked for.
const DEPTH: usize = 3;
/// The most folders that are looked into, and the most runs.
const MOST_FOLDERS: usize = 20_000;
const MOST_RUNS: usize = 5_000;
/// Seconds between two looks for new runs.
const SCAN_SECS: u64 = 3;
/// The most runs in memory.
const MOST_READ: usize = 24;
/// A run that has written nothing for so long is not called running in the list.
const SILENT_SECS: u64 = 120;

impl Runs {
    /// Finds the runs of `places`, folders and URLs.
    ///
    /// # Errors
    /// A place that is neither a folder nor a URL of an object store.
    pub(crate) fn open(places: &[String]) -> anyhow::Result<Self> {
        let mut runs = Self {
            folders: Vec::new(),
            runs: Vec::new(),
            known: HashMap::new(),
            scanned: None,
        };
        for place in places {
            if place.contains("://") && !place.starts_with("file://") {
                let remote = RemoteFolder::open(place)?;
                let name = place.trim_end_matches('/').to_owned();
                runs.add(name, Source::Remote(remote));
                continue;
            }
            let folder = PathBuf::from(place.strip_prefix("file://").unwrap_or(place));
            let full = folder
                .canonicalize()
                .with_context(|| format!("opening {}", folder.display()))?;
            if !full.is_dir() {
                let reason = format!(
                    "{}: expected a run folder, a folder of runs or a URL, found a file",
                    folder.display()
                );
                return Err(Misuse(reason).into());
            }
            runs.folders.push(full);
        }
        runs.scan();
        Ok(runs)
    }

    /// Returns a line for each run, the last written first.
    pub(crate) fn list(&mut self) -> Vec<Listed> {
        let scanned = self
            .scanned
            .is_some_and(|at| at.elapsed().as_secs() < SCAN_SECS);
        if !scanned {
            self.scan();
        }
        let mut list = Vec::with_capacity(self.runs.len());
        for (id, run) in self.runs.iter_mut().enumerate() {
            list.push(run.listed(id));
        }
        list.sort_by(|a, b| b.written.cmp(&a.written).then_with(|| a.name.cmp(&b.name)));
        list
    }

    /// Returns a run; `None` for a number that no run has.
    pub(crate) fn get(&self, id: usize) -> Option<&Run> {
        self.runs.get(id)
    }

    /// Reads what a run has written since it was last asked for.
    ///
    /// # Errors
    /// The run's file cannot be read.
    pub(crate) fn read(&mut self, id: usize) -> anyhow::Result<Option<&Run>> {
        if self.runs.get(id).is_none() {
            return Ok(None);
        }
        if self.runs[id].read.is_none() {
            self.make_room();
        }
        self.runs[id].look()?;
        Ok(Some(&self.runs[id]))
    }

    /// Forgets the run that has not been asked for the longest, if there are many.
    fn make_room(&mut self) {
        let mut read: Vec<(Instant, usize)> = Vec::new();
        for (id, run) in self.runs.iter().enumerate() {
            if let Some(found) = &run.read {
                read.push((found.asked, id));
            }
        }
        if read.len() >= MOST_READ
            && let Some((_, oldest)) = read.into_iter().min()
        {
            self.runs[oldest].read = None;
        }
    }

    fn scan(&mut self) {
        let mut found = Vec::new();
        let mut left = MOST_FOLDERS;
        for folder in &self.folders {
            let before = found.len();
            look_into(folder, DEPTH, &mut left, &mut found);
            let named = &mut found[before..];
            named.sort();
        }
        let is_first = self.scanned.is_none();
        for folder in found {
            if self.runs.len() >= MOST_RUNS {
                if is_first {
                    log::line(&format!("only the first {MOST_RUNS} runs are shown"));
                }
                break;
            }
            if !self.known.contains_key(&folder) {
                self.known.insert(folder.clone(), self.runs.len());
                let name = self.name_of(&folder);
                self.add(name, Source::Folder(folder));
            }
        }
        self.scanned = Some(Instant::now());
    }

    fn add(&mut self, name: String, source: Source) {
        self.runs.push(Run {
            name,
            source,
            read: None,
            listed: None,
        });
    }

    /// The path below the named folder, or the folder's own name.
    fn name_of(&self, run: &Path) -> String {
        let below = self
            .folders
            .iter()
            .find_map(|folder| run.strip_prefix(folder).ok());
        let below = below.filter(|below| !below.as_os_str().is_empty());
        let name = below.unwrap_or_else(|| Path::new(run.file_name().unwrap_or_default()));
        name.to_string_lossy().into_owned()
    }
}

/// Adds the folders with events at `folder` and below it. A run has no runs in it.
fn look_into(folder: &Path, depth: usize, left: &mut usize, found: &mut Vec<PathBuf>) {
    if *left == 0 {
        return;
    }
    *left -= 1;
    if folder.join(metrics::FILE).is_file() {
        found.push(folder.to_owned());
        return;
    }
    if depth == 0 {
        return;
    }
    let mut below = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        // A link could lead in a circle.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            below.push(entry.path());
        }
    }
    below.sort();
    for folder in below {
        look_into(&folder, depth - 1, left, found);
    }
}

impl Run {
    /// Returns what has been read of the run.
    pub(crate) fn log(&self) -> Option<&RunLog> {
        self.read.as_ref().map(|read| &read.log)
    }

    /// Returns what has been read of the run, for a reply.
    pub(crate) fn about(&self) -> Option<About<'_>> {
        let read = self.read.as_ref()?;
        Some(About {
            name: &self.name,
            source: &self.source,
            log: &read.log,
            num_passed_over: read.follower.num_passed_over(),
        })
    }

    fn look(&mut self) -> anyhow::Result<()> {
        let source = &self.source;
        let read = self.read.get_or_insert_with(|| Read {
            log: RunLog::default(),
            follower: source.follow(),
            asked: Instant::now(),
        });
        read.asked = Instant::now();
        loop {
            let found = read.follower.look()?;
            if found.is_anew {
                let generation = read.log.generation + 1;
                read.log = RunLog::default();
                read.log.generation = generation;
            }
            for event in found.events {
                read.log.take(event);
            }
            if found.is_at_end {
                return Ok(());
            }
        }
    }

    fn listed(&mut self, id: usize) -> Listed {
        let version = self.version();
        if let (Some(version), Some((known, listed))) = (version, &self.listed)
            && *known == version
            && listed.state != "running"
        {
            return listed.clone();
        }
        let listed = self.fresh_line(id, version);
        self.listed = version.map(|version| (version, listed.clone()));
        listed
    }

    fn fresh_line(&self, id: usize, version: Option<Version>) -> Listed {
        /// Enough for the last event of most runs.
        const END_BYTES: u64 = 8 << 10;
        let mut state = "";
        let mut written = 0;
        if let Some((_, time)) = version {
            let quiet = SystemTime::now().duration_since(time).unwrap_or_default();
            let since = time
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default();
            written = since.as_secs();
            state = if quiet.as_secs() < SILENT_SECS {
                "running"
            } else {
                "silent"
            };
        }
        let mut listed = Listed {
            id,
            name: self.name.clone(),
            state: state.to_owned(),
            written,
        };
        if version.is_some()
            && let Some(Event::End { reason, .. }) = self.source.last_events(0, END_BYTES).pop()
        {
            listed.state = reason;
        }
        listed
    }

    /// Length and time of the event file in a folder.
    fn version(&self) -> Option<Version> {
        let Source::Folder(folder) = &self.source else {
            return None;
        };
        let found = folder.join(metrics::FILE).metadata().ok()?;
        Some((found.len(), found.modified().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::OpenOptions, io::Write};

    use super::*;
    use crate::watch::run_log::tests::{start, step};

    fn write(folder: &Path, lines: &[serde_json::Value]) {
        fs::create_dir_all(folder).expect("a folder");
        let path = folder.join("metrics.jsonl");
        let file = OpenOptions::new().create(true).append(true).open(path);
        let mut file = file.expect("opens");
        for line in lines {
            writeln!(file, "{line}").expect("writes");
        }
    }

    fn open(folder: &Path) -> Runs {
        Runs::open(&[folder.display().to_string()]).expect("opens")
    }

    #[test]
    fn runs_are_found_below_a_folder_and_new_ones_come() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let mut runs = open(root.path());
        assert_eq!(runs.list(), []);
        write(&root.path().join("a"), &[start(0)]);
        write(&root.path().join("group/b"), &[start(0)]);
        runs.scanned = None;
        let end = serde_json::json!({"event": "end", "step": 1, "reason": "finished", "secs": 1.0});
        write(&root.path().join("group/b"), &[end]);
        let mut found: Vec<_> = runs.list();
        found.sort_by_key(|listed| listed.id);
        let names: Vec<_> = found
            .iter()
            .map(|run| (run.name.as_str(), run.state.as_str()))
            .collect();
        assert_eq!(names, [("a", "running"), ("group/b", "finished")]);
        assert!(Runs::open(&[root.path().join("none").display().to_string()]).is_err());
        let file = root.path().join("a/metrics.jsonl").display().to_string();
        assert!(Runs::open(&[file]).is_err());
        assert!(Runs::open(&["ftp://host/run".to_owned()]).is_err());
    }

    #[test]
    fn a_run_is_followed_and_one_that_begins_again_has_another_generation() {
        let root = tempfile::tempdir().expect("a temporary folder");
        write(root.path(), &[start(0), step(1, 8, 0.5)]);
        let mut runs = open(root.path());
        let mut seen = |count: usize| {
            let run = runs.read(0).expect("reads").expect("there is one");
            let log = run.log().expect("it was read");
            assert_eq!(log.moments.len(), count);
            log.generation
        };
        let generation = seen(1);
        write(root.path(), &[step(2, 16, 0.5)]);
        assert_eq!(seen(2), generation);
        fs::remove_file(root.path().join("metrics.jsonl")).expect("removes");
        assert!(seen(0) > generation);
        assert!(runs.read(1).expect("reads").is_none());
    }

    #[test]
    fn a_thousand_runs_are_listed_and_few_are_kept_in_memory() {
        let root = tempfile::tempdir().expect("a temporary folder");
        for number in 0..1000 {
            write(&root.path().join(format!("run-{number:04}")), &[start(0)]);
        }
        let mut runs = open(root.path());
        let began = Instant::now();
        assert_eq!(runs.list().len(), 1000);
        assert!(began.elapsed().as_secs() < 10);
        for id in 0..100 {
            runs.read(id).expect("reads");
        }
        let kept = runs.runs.iter().filter(|run| run.read.is_some()).count();
        assert_eq!(kept, MOST_READ);
    }

    #[test]
    fn a_file_of_another_version_is_no_crash() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let other = serde_json::json!({"event": "of_the_future", "step": 1});
        write(root.path(), &[other.clone(), start(0), other]);
        let mut runs = open(root.path());
        let run = runs.read(0).expect("reads").expect("there is one");
        let about = run.about().expect("it was read");
        assert_eq!((about.num_passed_over, about.log.num_starts), (2, 1));
    }
}
