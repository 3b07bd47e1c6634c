//! The events of a run: all of them, or what has been appended since the last look.
//!
//! A viewer remembers how many bytes it has read. A line without its end is kept until the rest is
//! there; a line that is no event is passed over, as after a crash. A file that has become shorter,
//! or that another one has replaced, is read again from its beginning.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rectiflow_data::text_file;

use crate::{
    error::{Error, Result},
    measure::metrics::{Event, FILE, file_name},
};

/// The longest line that can be an event, 16 MiB: the vital signs of a model have some hundred
/// parts.
const MAX_LINE_BYTES: usize = 16 << 20;

/// Takes bytes in parts of any length and returns the events of whole lines.
#[derive(Debug, Default)]
pub struct Lines {
    /// The beginning of a line.
    begun: Vec<u8>,
    /// Whether the line is too long and its bytes are not kept.
    is_too_long: bool,
    /// Lines that are whole and no events.
    num_passed_over: u64,
}

impl Lines {
    /// Takes the next bytes and appends the events of the lines that they complete.
    pub fn take(&mut self, bytes: &[u8], events: &mut Vec<Event>) {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            if self.begun.is_empty() && !self.is_too_long {
                self.add_line(&rest[..end], events);
            } else {
                self.keep(&rest[..end]);
                self.end(events);
            }
            rest = &rest[end + 1..];
        }
        self.keep(rest);
    }

    /// Takes the end of the file for the end of a line.
    pub fn end(&mut self, events: &mut Vec<Event>) {
        let line = std::mem::take(&mut self.begun);
        if std::mem::take(&mut self.is_too_long) {
            self.num_passed_over += 1;
        } else {
            self.add_line(&line, events);
        }
    }

    /// Returns the number of lines that are whole and no events.
    pub fn num_passed_over(&self) -> u64 {
        self.num_passed_over
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.begun.len() + bytes.len() > MAX_LINE_BYTES {
            self.begun = Vec::new();
            self.is_too_long = true;
        }
        if !self.is_too_long {
            self.begun.extend_from_slice(bytes);
        }
    }

    fn add_line(&mut self, line: &[u8], events: &mut Vec<Event>) {
        if line.trim_ascii().is_empty() {
            return;
        }
        match serde_json::from_slice(line) {
            Ok(event) => events.push(event),
            Err(_) => self.num_passed_over += 1,
        }
    }
}

/// Returns all events of a run, in the order of writing. Lines that are not events, as after a
/// crash, are skipped.
///
/// # Errors
/// [`Error::Data`] if the run has no `metrics.jsonl` that is a regular file; [`Error::Io`].
pub fn read(run_dir: &Path) -> Result<Vec<Event>> {
    let path = run_dir.join(FILE);
    let mut file = text_file::open(&path)?;
    let mut lines = Lines::default();
    let mut events = Vec::new();
    let mut part = vec![0; PART_BYTES];
    loop {
        let num_read = file.read(&mut part).map_err(Error::io(&path))?;
        if num_read == 0 {
            break;
        }
        lines.take(&part[..num_read], &mut events);
    }
    lines.end(&mut events);
    Ok(events)
}

/// Bytes that are read at once.
const PART_BYTES: usize = 1 << 18;

/// The event file of a rank that may still be written.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    lines: Lines,
    /// Bytes read so far.
    offset: u64,
    /// Device and inode of the file read so far.
    identity: Option<(u64, u64)>,
}

/// What a look at an event file has found.
#[derive(Debug, Default)]
pub struct Found {
    /// The file has been replaced or shortened: the events are those from its beginning.
    pub is_anew: bool,
    /// The events since the last look.
    pub events: Vec<Event>,
    /// Whether the end of the file was reached.
    pub is_at_end: bool,
}

/// Bytes of a look, so that a large file is read in several.
const MAX_LOOK_BYTES: u64 = 64 << 20;

impl Tail {
    /// An event file that need not exist yet.
    pub fn new(run_dir: &Path, rank: usize) -> Self {
        Self {
            path: run_dir.join(file_name(rank)),
            lines: Lines::default(),
            offset: 0,
            identity: None,
        }
    }

    /// Begins `bytes` before the end of the file; the first line may be cut.
    pub fn skip_to_last(&mut self, bytes: u64) {
        let len = self.path.metadata().map_or(0, |found| found.len());
        self.offset = len.saturating_sub(bytes);
    }

    /// Reads what has been appended, at most 64 MiB at a time. A file that is not there has no
    /// events.
    ///
    /// # Errors
    /// [`Error::Data`] for anything but a regular file; [`Error::Io`].
    pub fn look(&mut self) -> Result<Found> {
        if !self.path.exists() {
            let is_anew = self.identity.take().is_some();
            self.begin_again();
            return Ok(Found {
                is_anew,
                is_at_end: true,
                ..Found::default()
            });
        }
        let mut file = text_file::open(&self.path)?;
        let found = file.metadata().map_err(Error::io(&self.path))?;
        let identity = Some((found.dev(), found.ino()));
        let is_other = self.identity.is_some() && self.identity != identity;
        let is_anew = is_other || found.len() < self.offset;
        if is_anew {
            self.begin_again();
        }
        self.identity = identity;
        let bytes = read_at(&mut file, self.offset).map_err(Error::io(&self.path))?;
        self.offset += bytes.len() as u64;
        let mut events = Vec::new();
        self.lines.take(&bytes, &mut events);
        Ok(Found {
            is_anew,
            events,
            is_at_end: (bytes.len() as u64) < MAX_LOOK_BYTES,
        })
    }

    /// Returns the number of lines read so far that are whole and no events.
    pub fn num_passed_over(&self) -> u64 {
        self.lines.num_passed_over()
    }

    fn begin_again(&mut self) {
        self.offset = 0;
        self.lines = Lines::default();
    }
}

fn read_at(file: &mut File, offset: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(offset))?;
    file.take(MAX_LOOK_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, OpenOptions},
        io::Write,
    };

    use super::*;

    fn end(step: u64) -> String {
        format!("{{\"event\":\"end\",\"step\":{step},\"reason\":\"finished\",\"secs\":1.5}}\n")
    }

    fn steps(events: &[Event]) -> Vec<u64> {
        let mut steps = Vec::new();
        for event in events {
            let Event::End { step, .. } = event else {
                panic!("{event:?}")
            };
            steps.push(*step);
        }
        steps
    }

    fn append(path: &Path, text: &str) {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
        written.expect("writes");
    }

    #[test]
    fn any_division_into_parts_has_the_same_events() {
        let text = end(1) + "no event\n\n" + &end(2) + "{\"event\":\"end\",\"st";
        for len in 1..text.len() {
            let mut lines = Lines::default();
            let mut events = Vec::new();
            for part in text.as_bytes().chunks(len) {
                lines.take(part, &mut events);
            }
            assert_eq!(steps(&events), [1, 2], "parts of {len}");
            assert_eq!(lines.num_passed_over(), 1);
        }
    }

    #[test]
    fn a_line_longer_than_any_event_is_passed_over() {
        let mut lines = Lines::default();
        let mut events = Vec::new();
        for _ in 0..3 {
            lines.take(&vec![b' '; MAX_LINE_BYTES / 2], &mut events);
        }
        assert!(lines.begun.len() <= MAX_LINE_BYTES);
        lines.take(format!("\n{}", end(7)).as_bytes(), &mut events);
        assert_eq!(steps(&events), [7]);
    }

    #[test]
    fn a_look_returns_what_is_new_and_waits_for_the_end_of_a_line() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("metrics.jsonl");
        let mut tail = Tail::new(folder.path(), 0);
        let mut look = || tail.look().expect("reads");
        assert!(look().events.is_empty());
        let text = end(1) + &end(2);
        append(&path, &text[..text.len() - 9]);
        assert_eq!(steps(&look().events), [1]);
        assert!(look().events.is_empty());
        append(&path, &text[text.len() - 9..]);
        let found = look();
        assert_eq!((steps(&found.events), found.is_anew), (vec![2], false));

        fs::write(&path, end(3)).expect("writes");
        let found = look();
        assert_eq!((steps(&found.events), found.is_anew), (vec![3], true));

        let other = folder.path().join("other");
        fs::write(&other, end(4) + &end(5)).expect("writes");
        fs::rename(&other, &path).expect("renames");
        let found = look();
        assert_eq!((steps(&found.events), found.is_anew), (vec![4, 5], true));
    }
}
