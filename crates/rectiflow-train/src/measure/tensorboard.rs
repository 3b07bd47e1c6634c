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
    time::{SystemTime, UNIX_EPOCH},
};

use rectiflow_data::text_file;

use crate::{
    error::{Error, Result},
    measure::{
        event_file::{self, Value, png_size},
        metrics::{Event, GuardEvent, Start, curves::Curves},
    },
};

/// The folder below the run's.
pub const FOLDER: &str = "tensorboard";

/// Texts that stand beside the curves from the beginning.
#[derive(Debug, Clone, Default)]
pub struct Texts {
    /// The prompts of the previews.
    pub prompts: Vec<String>,
    /// The recipe, as TOML.
    pub recipe: String,
}

impl Texts {
    /// The texts of a recipe.
    pub fn of(recipe: String) -> Self {
        let table = recipe.parse::<toml::Table>().unwrap_or_default();
        let prompts = table
            .get("preview")
            .and_then(|preview| preview.get("prompts"));
        let mut texts = Self {
            prompts: Vec::new(),
            recipe,
        };
        for prompt in prompts
            .and_then(toml::Value::as_array)
            .into_iter()
            .flatten()
        {
            texts.prompts.extend(prompt.as_str().map(str::to_owned));
        }
        texts
    }
}

/// Writes event files.
#[derive(Debug)]
pub struct TensorBoard {
    run_dir: PathBuf,
    texts: Texts,
    curves: Curves,
    /// The file of the process that is running, and its path.
    file: Option<(File, PathBuf)>,
    /// The time of the next events, if it is not the time of day.
    clock: Option<f64>,
}

/// Largest preview that is copied, 64 MiB.
const MAX_PREVIEW_BYTES: u64 = 64 << 20;

impl TensorBoard {
    /// A writer for the run that is running.
    pub fn live(run_dir: &Path, texts: Texts) -> Self {
        Self {
            run_dir: run_dir.to_owned(),
            texts,
            curves: Curves::default(),
            file: None,
            clock: None,
        }
    }

    /// A writer for a run of the past: times follow from its events.
    pub fn past(run_dir: &Path, texts: Texts) -> Self {
        Self {
            clock: Some(0.0),
            ..Self::live(run_dir, texts)
        }
    }

    /// Writes what an event says. Events before the first start are not written.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&mut self, event: &Event) -> Result<()> {
        self.pass(event);
        if let Event::Start(start) = event {
            self.begin(start)?;
        }
        let numbers = self.curves.of(event);
        if let Some(step) = step_of(event)
            && !numbers.is_empty()
        {
            let pairs = numbers
                .iter()
                .map(|number| (number.name.as_ref(), Value::Scalar(number.value)));
            self.append(&event_file::values(self.now(), step, pairs))?;
        }
        match event {
            Event::Guard(act) => self.write_act(act),
            Event::Preview { step, name, .. } => self.write_preview(*step, name),
            _ => Ok(()),
        }
    }

    /// Begins a file: its version, the start, and the texts if the run begins.
    fn begin(&mut self, start: &Start) -> Result<()> {
        let folder = self.run_dir.join(FOLDER);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        self.file = Some(create(&folder, self.now() as u64)?);
        let now = self.now();
        self.append(&event_file::version(now))?;
        let next = start.step.saturating_add(1);
        self.append(&event_file::session_start(now, next))?;
        if start.step > 0 {
            return Ok(());
        }
        let mut prompts = String::new();
        for (index, prompt) in self.texts.prompts.iter().enumerate() {
            prompts += &format!("{}. {prompt}\n", index + 1);
        }
        let mut recipe = String::new();
        for line in self.texts.recipe.lines() {
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

    fn write_act(&mut self, act: &GuardEvent) -> Result<()> {
        // Clipping is routine.
        if act.action == "clip" {
            return Ok(());
        }
        let mut text = format!("**{}**: {}", act.action, act.reason);
        if let Some(name) = &act.black_box {
            text += &format!(" (`blackbox/{name}`)");
        }
        let values = [("guard", Value::Text(&text))];
        let record = event_file::values(self.now(), act.step, values);
        self.append(&record)
    }

    /// A preview that cannot be read is left out.
    fn write_preview(&mut self, step: u64, name: &str) -> Result<()> {
        let path = self.run_dir.join("previews").join(name);
        let Ok(png) = text_file::bytes(&path, MAX_PREVIEW_BYTES) else {
            return Ok(());
        };
        let Some((width, height)) = png_size(&png) else {
            return Ok(());
        };
        let picture = Value::Picture {
            png: &png,
            width,
            height,
        };
        let record = event_file::values(self.now(), step, [("previews/pictures", picture)]);
        self.append(&record)
    }

    fn append(&mut self, record: &[u8]) -> Result<()> {
        let Some((file, path)) = &mut self.file else {
            return Ok(());
        };
        file.write_all(record).map_err(Error::io(&*path))
    }

    fn now(&self) -> f64 {
        match self.clock {
            Some(clock) => clock,
            None => match SystemTime::now().duration_since(UNIX_EPOCH) {
                Ok(time) => time.as_secs_f64(),
                Err(_) => 0.0,
            },
        }
    }

    /// Moves the clock of a run of the past.
    fn pass(&mut self, event: &Event) {
        let Some(clock) = &mut self.clock else {
            return;
        };
        match event {
            Event::Start(start) => *clock = clock.max(start.unix_secs as f64),
            Event::Step(step) => *clock += step.secs.max(0.0),
            Event::Test(test) => *clock += test.secs.max(0.0),
            Event::Preview { secs, .. } => *clock += secs.max(0.0),
            _ => {}
        }
    }
}

fn step_of(event: &Event) -> Option<u64> {
    match event {
        Event::Step(step) => Some(step.step),
        Event::Test(test) => Some(test.step),
        Event::Vitals(vitals) => Some(vitals.step),
        _ => None,
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
    use crate::measure::event_file::tests::records;

    fn event(text: &str) -> Event {
        serde_json::from_str(text).expect("an event")
    }

    fn start(step: u64) -> Event {
        event(&format!(
            r#"{{"event":"start","step":{step},"unix_secs":1795639471,"order_hash":"7","num_parameters":1,
            "num_train":1,"num_test":1,"buckets":[],"threads":1}}"#
        ))
    }

    fn step(step: u64) -> Event {
        event(&format!(
            r#"{{"event":"step","step":{step},"samples":8,"epoch":0,"loss":0.5,"gradient_norm":"NaN",
            "lr":1e-4,"secs":1.0,"data_secs":0.1}}"#
        ))
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
        let mut board = TensorBoard::past(run.path(), Texts::default());
        for event in [step(0), start(0), step(1), step(2), start(1), step(2)] {
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
        let mut board = TensorBoard::live(run.path(), Texts::default());
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

    #[test]
    fn the_prompts_of_a_recipe_are_texts() {
        let recipe = "[preview]\nprompts = [\"a fox\", \"tea\"]\n";
        assert_eq!(Texts::of(recipe.to_owned()).prompts, ["a fox", "tea"]);
        assert!(Texts::of("no toml [".to_owned()).prompts.is_empty());
    }
}
