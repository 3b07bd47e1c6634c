//! A run's events as TensorBoard's event files in `RUN/tensorboard/`.
//!
//! Each process begins a file with a start at its first step: after a resume the steps since the
//! checkpoint come again, and readers then drop what they have of them. (The `tensorboard` package
//! does so at the start; its data server, written in Rust, when a step comes that is not above the
//! last one.) Step numbers never go back otherwise: a rewind of the guard passes over steps.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    process,
};

use crate::{
    error::{Error, Result},
    measure::{
        metrics::{Event, Start, curves::Curves},
        trackers::{
            about::{About, act_of},
            clock::Clock,
            event_file::{self, Value},
        },
    },
};

/// The folder below the run's.
pub(super) const FOLDER: &str = "tensorboard";

/// Writes event files.
#[derive(Debug)]
pub(super) struct TensorBoard {
    about: About,
    curves: Curves,
    clock: Clock,
    /// The file of the process that is running, and its path.
    file: Option<(File, PathBuf)>,
}

impl TensorBoard {
    pub(super) fn new(about: About) -> Self {
        Self {
            clock: Clock::new(about.is_past),
            about,
            curves: Curves::default(),
            file: None,
        }
    }

    /// Writes what an event says. Events before the first start are not written.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn write(&mut self, event: &Event) -> Result<()> {
        let now = self.clock.pass(event);
        if let Event::Start(start) = event {
            self.begin(now, start)?;
        }
        let numbers = self.curves.of(event);
        if !numbers.is_empty() {
            let pairs = numbers
                .iter()
                .map(|number| (number.name.as_ref(), Value::Scalar(number.value)));
            self.append(&event_file::values(now, event.step(), pairs))?;
        }
        if let Some((word, reason)) = act_of(event) {
            let text = format!("**{word}**: {reason}");
            let values = [("guard", Value::Text(&text))];
            self.append(&event_file::values(now, event.step(), values))?;
        }
        match event {
            Event::Preview { step, name, .. } => self.write_preview(now, *step, name),
            _ => Ok(()),
        }
    }

    /// Begins a file: its version, the start, and the texts if the run begins.
    fn begin(&mut self, now: f64, start: &Start) -> Result<()> {
        let folder = self.about.run_dir.join(FOLDER);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        self.file = Some(create(&folder, now as u64)?);
        self.append(&event_file::version(now))?;
        let next = start.step.saturating_add(1);
        self.append(&event_file::session_start(now, next))?;
        if start.step > 0 {
            return Ok(());
        }
        let mut prompts = String::new();
        for (index, prompt) in self.about.prompts().iter().enumerate() {
            prompts += &format!("{}. {prompt}\n", index + 1);
        }
        let mut recipe = String::new();
        for line in self.about.recipe.lines() {
            recipe += &format!("    {line}\n");
        }
        let mut texts = Vec::new();
        if !prompts.is_empty() {
            texts.push(("previews/prompts", Value::Text(&prompts)));
        }
        if !recipe.is_empty() {
            texts.push(("recipe", Value::Text(&recipe)));
        }
        let record = event_file::values(now, 0, texts);
        self.append(&record)
    }

    /// A preview that cannot be read is left out.
    fn write_preview(&mut self, now: f64, step: u64, name: &str) -> Result<()> {
        let Some(preview) = self.about.preview(name) else {
            return Ok(());
        };
        let picture = Value::Picture {
            png: &preview.png,
            width: preview.width,
            height: preview.height,
        };
        let values = [("previews/pictures", picture)];
        self.append(&event_file::values(now, step, values))
    }

    fn append(&mut self, record: &[u8]) -> Result<()> {
        let Some((file, path)) = &mut self.file else {
            return Ok(());
        };
        file.write_all(record).map_err(Error::io(&*path))
    }
}

/// Creates the file of a process. Readers take files in the order of their names.
fn create(folder: &Path, unix_secs: u64) -> Result<(File, PathBuf)> {
    let process = process::id();
    for number in 0_u32.. {
        let name = format!("events.out.tfevents.{unix_secs:010}.{number:03}.rectiflow.{process}");
        let path = folder.join(name);
        match OpenOptions::new().create_new(true).append(true).open(&path) {
            Ok(file) => return Ok((file, path)),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io(&path)(error)),
        }
    }
    unreachable!("no folder holds all files")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::trackers::{
        event_file::tests::records,
        made_up::{event, start, step},
    };

    fn board(run_dir: &Path, is_past: bool) -> TensorBoard {
        TensorBoard::new(About {
            run_dir: run_dir.to_owned(),
            recipe: String::new(),
            is_past,
        })
    }

    /// The files of a run in the order of their names, as records.
    fn files(run_dir: &Path) -> Vec<Vec<Vec<u8>>> {
        let mut paths = Vec::new();
        for entry in fs::read_dir(run_dir.join(FOLDER)).expect("a folder") {
            paths.push(entry.expect("an entry").path());
        }
        paths.sort();
        let mut found = Vec::new();
        for path in paths {
            found.push(records(&fs::read(path).expect("reads")));
        }
        found
    }

    #[test]
    fn each_process_begins_a_file_with_its_first_step() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let mut board = board(run.path(), true);
        for event in [
            step(0, 0.5),
            start(0),
            step(1, 0.5),
            step(2, 0.5),
            start(1),
            step(2, 0.5),
        ] {
            board.write(&event).expect("writes");
        }
        let files = files(run.path());
        assert_eq!(files.len(), 2, "events before the first start have no file");
        assert_eq!((files[0].len(), files[1].len()), (5, 3));
        // The step, 2, then a session log with the status START.
        let begin = &files[1][1];
        assert_eq!(begin[9..], [16, 2, 58, 2, 8, 1]);
        assert_eq!(files[1][2][9..11], [16, 2]);
    }

    #[test]
    fn previews_are_copied_and_those_that_are_none_are_left_out() {
        let run = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(run.path().join("previews")).expect("a folder");
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x80\0\0\0\x60".to_vec();
        png.extend(*b"the rest");
        fs::write(run.path().join("previews/a.png"), &png).expect("writes");
        fs::write(run.path().join("previews/b.png"), "no picture").expect("writes");
        let mut board = board(run.path(), false);
        board.write(&start(5)).expect("writes");
        for name in ["a.png", "b.png", "none.png"] {
            let preview = format!(r#"{{"event":"preview","step":7,"name":"{name}","secs":1.0}}"#);
            board.write(&event(&preview)).expect("writes");
        }
        let files = files(run.path());
        assert_eq!(files[0].len(), 3);
        let record = &files[0][2];
        assert!(record.windows(png.len()).any(|window| window == png));
    }
}
