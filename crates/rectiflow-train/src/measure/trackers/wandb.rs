//! A run of W&B as its offline mode writes it: `RUN/wandb/offline-run-DATE-ID`, which `wandb sync`
//! sends to a server.
//!
//! The folder has `run-ID.wandb`, a [`record_log`](super::record_log) of the messages in
//! [`wandb_records`](super::wandb_records), and pictures in `files/media`. Numbers are JSON texts
//! that keep all their bits. W&B's own step counts lines, and [`STEP`] is what charts are drawn
//! over. After a resume the log is cut off before the first line of a later step.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use rectiflow_data::text_file;
use sha2::{Digest, Sha256};

use crate::{
    error::{Error, Result},
    measure::{
        metrics::{Event, Start, curves::Curves},
        trackers::{
            about::{About, Preview, act_of, comes_again},
            clock::{self, Clock},
            protobuf::Message,
            record_log::RecordLog,
            wandb_records::{self as records, Item, Known, RunFacts, STEP, number_json},
        },
    },
};

/// The folder below the run's.
pub(super) const FOLDER: &str = "wandb";
/// The project that runs are sent to; `wandb sync --project` chooses another one.
const PROJECT: &str = "rectiflow";
/// Letters and digits of an id.
const ID_CHARS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// Writes the run's folder.
#[derive(Debug)]
pub(super) struct Wandb {
    about: About,
    curves: Curves,
    clock: Clock,
    run: Option<OfflineRun>,
}

impl Wandb {
    pub(super) fn new(about: About) -> Self {
        Self {
            clock: Clock::new(about.is_past),
            about,
            curves: Curves::default(),
            run: None,
        }
    }

    /// Writes what an event says. Events before the first start are not written.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn write(&mut self, event: &Event) -> Result<()> {
        let now = self.clock.pass(event);
        let step = event.step();
        let numbers = self.curves.of(event);
        if let Event::Start(start) = event {
            self.run = Some(OfflineRun::begin(&self.about, start)?);
            return Ok(());
        }
        let Some(run) = &mut self.run else {
            return Ok(());
        };
        if !numbers.is_empty() {
            let mut items = Vec::with_capacity(numbers.len());
            for number in numbers {
                items.push(Item::new(&number.name, number_json(number.value)));
            }
            run.add_line(now, step, items)?;
        }
        if let Some((word, reason)) = act_of(event) {
            let text = serde_json::Value::from(format!("{word}: {reason}"));
            run.add_line(now, step, vec![Item::new("guard", text.to_string())])?;
        }
        match event {
            Event::Preview { name, .. } => match self.about.preview(name) {
                Some(preview) => run.add_picture(now, step, &preview),
                // A preview that cannot be read is left out.
                None => Ok(()),
            },
            Event::Test(_) => run.add_summary(),
            Event::End { reason, .. } => run.end(now, u64::from(reason == "stopped")),
            _ => Ok(()),
        }
    }

    /// Writes the end of a run that has failed.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn fail(&mut self) -> Result<()> {
        let now = self.clock.now();
        match &mut self.run {
            Some(run) => run.end(now, 1),
            None => Ok(()),
        }
    }
}

/// The folder of a run, open for appending.
#[derive(Debug)]
struct OfflineRun {
    folder: PathBuf,
    log: RecordLog,
    num_records: u64,
    /// W&B's step of the next line.
    next_line: u64,
    /// When the run began, in seconds since 1970.
    unix_secs: u64,
    /// The last values, as JSON texts by name.
    summary: BTreeMap<String, String>,
}

impl OfflineRun {
    fn begin(about: &About, start: &Start) -> Result<Self> {
        let parent = about.run_dir.join(FOLDER);
        match find(&parent) {
            Some((folder, log)) => Self::resume(folder, &log, start),
            None => Self::create(about, &parent, start),
        }
    }

    fn create(about: &About, parent: &Path, start: &Start) -> Result<Self> {
        let name = about.name();
        let id = new_id(&name, start);
        let stamp = clock::stamp(start.unix_secs);
        let folder = parent.join(format!("offline-run-{stamp}-{id}"));
        let files = folder.join("files");
        fs::create_dir_all(&files).map_err(Error::io(&files))?;
        let mut run = Self {
            log: RecordLog::create(&folder.join(format!("run-{id}.wandb")))?,
            folder,
            num_records: 0,
            next_line: 0,
            unix_secs: start.unix_secs,
            summary: BTreeMap::new(),
        };
        let mut config = Vec::new();
        for (key, value) in about.config() {
            config.push((key, value.to_string()));
        }
        run.append(&records::header())?;
        run.append(&records::run(&RunFacts {
            id: &id,
            project: PROJECT,
            name: &name,
            unix_secs: start.unix_secs,
            config,
        }))?;
        for record in records::curves() {
            run.append(&record)?;
        }
        Ok(run)
    }

    /// Opens what an earlier process has written, up to the steps that come again. What W&B has
    /// noted of an earlier sync is removed, so that the next one sends the run again.
    fn resume(folder: PathBuf, path: &Path, start: &Start) -> Result<Self> {
        let mut num_records = 0;
        let mut next_line = 0;
        let mut began = start.unix_secs;
        let keep = &mut |record: &[u8]| {
            match Known::of(record) {
                Known::Exit => return false,
                Known::Line { line, step } => {
                    if step.is_some_and(|step| comes_again(step, start)) {
                        return false;
                    }
                    next_line = line.saturating_add(1);
                }
                Known::Run { unix_secs } => began = unix_secs,
                Known::Other => {}
            }
            num_records += 1;
            true
        };
        let log = RecordLog::reopen(path, keep)?;
        for extension in ["synced", "syncstate"] {
            let _ = fs::remove_file(path.with_added_extension(extension));
        }
        Ok(Self {
            folder,
            log,
            num_records,
            next_line,
            unix_secs: began,
            summary: BTreeMap::new(),
        })
    }

    /// Adds a line to the history.
    fn add_line(&mut self, now: f64, step: u64, mut items: Vec<Item>) -> Result<()> {
        items.push(Item::new(STEP, step.to_string()));
        for item in &items {
            if let [name] = item.path.as_slice() {
                self.summary.insert(name.clone(), item.json.clone());
            }
        }
        let runtime = (now - self.unix_secs as f64).max(0.0);
        items.push(Item::new("_step", self.next_line.to_string()));
        items.push(Item::new("_timestamp", number_json(now)));
        items.push(Item::new("_runtime", number_json(runtime)));
        self.append(&records::history(self.next_line, &items))?;
        self.next_line += 1;
        Ok(())
    }

    /// Adds a picture as wandb does: a copy whose name has its hash, the record of the file, and a
    /// line that names both.
    fn add_picture(&mut self, now: f64, step: u64, preview: &Preview) -> Result<()> {
        const NAME: &str = "previews/pictures";
        let mut sha256 = String::new();
        for byte in Sha256::digest(&preview.png) {
            sha256 += &format!("{byte:02x}");
        }
        let path = format!(
            "media/images/{NAME}_{}_{}.png",
            self.next_line,
            &sha256[..20]
        );
        let copy = self.folder.join("files").join(&path);
        if let Some(folder) = copy.parent() {
            fs::create_dir_all(folder).map_err(Error::io(folder))?;
        }
        fs::write(&copy, &preview.png).map_err(Error::io(&copy))?;
        self.append(&records::file(&path))?;

        let facts = serde_json::json!({
            "_type": "image-file",
            "format": "png",
            "height": preview.height,
            "path": path,
            "sha256": sha256,
            "size": preview.png.len(),
            "width": preview.width,
        });
        let mut items = Vec::new();
        for (key, value) in facts.as_object().into_iter().flatten() {
            items.push(Item {
                path: vec![NAME.to_owned(), key.clone()],
                json: value.to_string(),
            });
        }
        self.add_line(now, step, items)
    }

    fn add_summary(&mut self) -> Result<()> {
        let mut items = Vec::with_capacity(self.summary.len());
        for (name, json) in &self.summary {
            items.push(Item::new(name, json.clone()));
        }
        self.append(&records::summary(&items))
    }

    fn end(&mut self, now: f64, code: u64) -> Result<()> {
        self.add_summary()?;
        let runtime = (now - self.unix_secs as f64).max(0.0);
        self.append(&records::exit(code, runtime as u64))
    }

    /// Appends a record with its number.
    fn append(&mut self, message: &Message) -> Result<()> {
        let mut record = Message::default();
        record.varint(1, self.num_records + 1);
        record.0.extend_from_slice(&message.0);
        self.log.append(&record.0)?;
        self.num_records += 1;
        Ok(())
    }
}

/// The folder and the log that an earlier process has begun; the last one of several.
fn find(parent: &Path) -> Option<(PathBuf, PathBuf)> {
    let mut found = None;
    for entry in fs::read_dir(parent).ok()?.flatten() {
        let folder = entry.path();
        let name = entry.file_name();
        let Some((_, id)) = name.to_str().and_then(|name| name.rsplit_once('-')) else {
            continue;
        };
        let log = folder.join(format!("run-{id}.wandb"));
        if text_file::open(&log).is_ok() {
            found = found.max(Some((folder, log)));
        }
    }
    found
}

/// An id of 8 letters and digits that other runs do not have.
fn new_id(name: &str, start: &Start) -> String {
    let what = format!("{name} {} {}", start.unix_secs, start.order_hash);
    let hash = blake3::hash(what.as_bytes());
    let mut id = String::new();
    for &byte in &hash.as_bytes()[..8] {
        id.push(char::from(ID_CHARS[usize::from(byte) % ID_CHARS.len()]));
    }
    id
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::trackers::{
        made_up::{event, start, step},
        record_log::tests::records,
        wandb_records::tests::items,
    };

    fn end(step: u64) -> Event {
        event(&format!(
            r#"{{"event":"end","step":{step},"reason":"interrupted","secs":5.0}}"#
        ))
    }

    fn writer(run_dir: &Path) -> Wandb {
        Wandb::new(About {
            run_dir: run_dir.to_owned(),
            recipe: "[lr]\npeak = 1e-4\n".to_owned(),
            is_past: true,
        })
    }

    /// The records of a run's only log.
    fn records_of(run_dir: &Path) -> Vec<Vec<u8>> {
        let (_, log) = find(&run_dir.join(FOLDER)).expect("a run");
        records(&log)
    }

    /// The value of a line.
    fn value<'a>(line: &'a [(String, String)], name: &str) -> Option<&'a str> {
        let found = line.iter().find(|(path, _)| path == name);
        found.map(|(_, json)| json.as_str())
    }

    #[test]
    fn a_run_is_a_header_facts_lines_and_an_end() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let mut wandb = writer(run.path());
        for event in [
            step(9, 1.0),
            start(0),
            step(1, 0.1 + 0.2),
            step(2, 0.5),
            end(2),
        ] {
            wandb.write(&event).expect("writes");
        }
        let records = records_of(run.path());
        let mut known = Vec::new();
        for record in &records {
            known.push(Known::of(record));
        }
        let line = |line, step| Known::Line {
            line,
            step: Some(step),
        };
        let unix_secs = 1_795_639_471;
        let expected = [
            Known::Other,
            Known::Run { unix_secs },
            Known::Other,
            Known::Other,
            line(0, 1),
            line(1, 2),
            Known::Other,
            Known::Exit,
        ];
        assert_eq!(known, expected);
        let first = items(&records[4]);
        assert_eq!(value(&first, "loss/training"), Some("0.30000000000000004"));
        assert_eq!(value(&first, "gradient_norm/all"), Some("NaN"));
        assert_eq!(value(&first, "_runtime"), Some("1.0"));
        let config = b"{\"peak\":0.0001}";
        assert!(records[1].windows(config.len()).any(|part| part == config));
    }

    #[test]
    fn a_resume_replaces_the_steps_that_come_again() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let mut wandb = writer(run.path());
        for event in [start(0), step(1, 0.5), step(2, 0.4), step(3, 0.3), end(3)] {
            wandb.write(&event).expect("writes");
        }
        let (_, log) = find(&run.path().join(FOLDER)).expect("a run");
        let synced = log.with_added_extension("synced");
        fs::write(&synced, "").expect("writes");
        // Another process.
        let mut wandb = writer(run.path());
        for event in [start(1), step(2, 0.25), step(3, 0.125)] {
            wandb.write(&event).expect("writes");
        }
        wandb.fail().expect("writes");

        let records = records_of(run.path());
        let mut lines = Vec::new();
        for record in &records {
            let line = items(record);
            if let Some(loss) = value(&line, "loss/training") {
                let step = value(&line, STEP).expect("a step");
                let own = value(&line, "_step").expect("a step");
                lines.push(format!("{own} {step} {loss}"));
            }
        }
        assert_eq!(lines, ["0 1 0.5", "1 2 0.25", "2 3 0.125"]);
        assert_eq!(records.last().map(|end| Known::of(end)), Some(Known::Exit));
        assert!(!synced.exists());
    }

    #[test]
    fn previews_are_files_of_the_run() {
        let run = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(run.path().join("previews")).expect("a folder");
        let png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x80\0\0\0\x60";
        fs::write(run.path().join("previews/a.png"), png).expect("writes");
        let mut wandb = writer(run.path());
        wandb.write(&start(5)).expect("writes");
        for name in ["a.png", "none.png"] {
            let preview = format!(r#"{{"event":"preview","step":7,"name":"{name}","secs":1.0}}"#);
            wandb.write(&event(&preview)).expect("writes");
        }
        let records = records_of(run.path());
        let line = items(records.last().expect("a line"));
        let path = value(&line, "previews/pictures.path").expect("a path");
        let path: String = serde_json::from_str(path).expect("a text");
        assert!(path.starts_with("media/images/previews/pictures_0_"));
        assert_eq!(value(&line, "previews/pictures.width"), Some("128"));
        assert_eq!(value(&line, STEP), Some("7"));
        let (folder, _) = find(&run.path().join(FOLDER)).expect("a run");
        let copy = fs::read(folder.join("files").join(path)).expect("a copy");
        assert_eq!(copy, png);
    }
}
