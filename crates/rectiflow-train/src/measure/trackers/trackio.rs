//! A run as a database of trackio: `RUN/trackio/PROJECT.db`, which trackio opens where
//! `TRACKIO_DIR` is `RUN/trackio`.
//!
//! `trackio.sql` has the tables as trackio makes them. Used are `metrics` (a row an event, its
//! numbers as one JSON object), `configs` (the recipe) and `alerts` (the guard's acts). Numbers
//! keep all their bits; one that is not finite is a text, `NaN`, `Infinity` or `-Infinity`, as
//! trackio writes it. Previews are copied to `media/`, where trackio looks for pictures.
//!
//! Project and run have the name of the run's folder, so that databases of several runs can be
//! copied into one folder. After a resume the rows of later steps are deleted.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use rusqlite::{Connection, OptionalExtension, params};
use serde_json::{Map, Value, json};

use crate::{
    error::{Error, Result},
    measure::{
        metrics::{Event, Start, curves::Curves},
        trackers::{
            about::{About, act_of, comes_again},
            clock::{self, Clock},
        },
    },
};

/// The folder below the run's.
pub(super) const FOLDER: &str = "trackio";

/// Time that a statement waits for another program that writes, as a dashboard that deletes a run.
const PATIENCE: Duration = Duration::from_secs(5);

/// Writes the database.
#[derive(Debug)]
pub(super) struct Trackio {
    about: About,
    curves: Curves,
    clock: Clock,
    database: Option<Database>,
    /// Steps done at the last event.
    step: u64,
}

impl Trackio {
    pub(super) fn new(about: About) -> Self {
        Self {
            clock: Clock::new(about.is_past),
            about,
            curves: Curves::default(),
            database: None,
            step: 0,
        }
    }

    /// Writes what an event says. Events before the first start are not written.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn write(&mut self, event: &Event) -> Result<()> {
        let now = self.clock.pass(event);
        self.step = event.step();
        let numbers = self.curves.of(event);
        if let Event::Start(start) = event {
            return self.begin(now, start);
        }
        let Some(database) = &mut self.database else {
            return Ok(());
        };
        if !numbers.is_empty() {
            let mut metrics = Map::new();
            for number in numbers {
                metrics.insert(number.name.into_owned(), number_json(number.value));
            }
            database.add_metrics(now, self.step, metrics)?;
        }
        if let Some((word, reason)) = act_of(event) {
            let level = if word == "stop" { "error" } else { "warn" };
            let title = format!("guard: {word}");
            database.add_alert(now, self.step, level, &title, &reason)?;
        }
        match event {
            Event::Preview { step, name, .. } => self.write_preview(now, *step, name),
            _ => Ok(()),
        }
    }

    /// Adds an alert.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn fail(&mut self, reason: &str) -> Result<()> {
        let now = self.clock.now();
        match &mut self.database {
            Some(database) => database.add_alert(now, self.step, "error", "failed", reason),
            None => Ok(()),
        }
    }

    /// Opens the database; forgets the steps that come again.
    fn begin(&mut self, now: f64, start: &Start) -> Result<()> {
        let mut database = match self.database.take() {
            Some(database) => database,
            None => Database::open(&self.about, start)?,
        };
        database.forget(start)?;
        let mut config = self.about.config();
        let created = clock::iso(now);
        // Keys of trackio's own.
        config.insert("_Username".to_owned(), Value::Null);
        config.insert("_Created".to_owned(), Value::String(created));
        config.insert("_Group".to_owned(), Value::Null);
        database.set_config(now, config)?;
        self.database = Some(database);
        Ok(())
    }

    /// A preview that cannot be read is left out.
    fn write_preview(&mut self, now: f64, step: u64, name: &str) -> Result<()> {
        let (Some(database), Some(preview)) = (&mut self.database, self.about.preview(name)) else {
            return Ok(());
        };
        let place = Path::new(&database.project)
            .join(&database.run)
            .join(step.to_string());
        let folder = database.folder.join("media").join(&place);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let path = folder.join(name);
        fs::write(&path, preview.png).map_err(Error::io(&path))?;
        let picture = json!({
            "_type": "trackio.image",
            "file_path": place.join(name),
            "caption": null,
        });
        let metrics = Map::from_iter([("previews/pictures".to_owned(), picture)]);
        database.add_metrics(now, step, metrics)
    }
}

/// A number as trackio writes it.
fn number_json(value: f64) -> Value {
    if value.is_nan() {
        Value::from("NaN")
    } else if value.is_infinite() {
        Value::from(if value > 0.0 { "Infinity" } else { "-Infinity" })
    } else {
        Value::from(value)
    }
}

/// A project's database with one run.
#[derive(Debug)]
struct Database {
    /// The folder of the database.
    folder: PathBuf,
    path: PathBuf,
    connection: Connection,
    project: String,
    run: String,
    run_id: String,
}

impl Database {
    fn open(about: &About, start: &Start) -> Result<Self> {
        let folder = about.run_dir.join(FOLDER);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let run = about.name();
        let project = project_name(&run);
        let path = folder.join(format!("{project}.db"));
        let connection = connect(&path).map_err(|error| broken(&path, error))?;
        let known = known_run(&connection, &run).map_err(|error| broken(&path, error))?;
        let run_id = known.unwrap_or_else(|| new_id(&run, start));
        Ok(Self {
            folder,
            path,
            connection,
            project,
            run,
            run_id,
        })
    }

    /// Deletes what comes again after a start.
    fn forget(&mut self, start: &Start) -> Result<()> {
        let first = if comes_again(0, start) {
            0
        } else {
            start.step.saturating_add(1)
        };
        let (id, first) = (&self.run_id, as_signed(first));
        for statement in [
            "DELETE FROM metrics WHERE run_id = ?1 AND step >= ?2",
            "DELETE FROM alerts WHERE run_id = ?1 AND step >= ?2",
        ] {
            let deleted = self.connection.execute(statement, params![id, first]);
            deleted.map_err(|error| broken(&self.path, error))?;
        }
        Ok(())
    }

    fn set_config(&mut self, now: f64, config: Map<String, Value>) -> Result<()> {
        let config = Value::Object(config).to_string();
        let inserted = self.connection.execute(
            "INSERT OR REPLACE INTO configs (run_id, run_name, config, created_at)
             VALUES (?1, ?2, ?3, ?4)",
            params![self.run_id, self.run, config, clock::iso(now)],
        );
        inserted.map_err(|error| broken(&self.path, error))?;
        Ok(())
    }

    fn add_metrics(&mut self, now: f64, step: u64, metrics: Map<String, Value>) -> Result<()> {
        let metrics = Value::Object(metrics).to_string();
        let inserted = self.connection.execute(
            "INSERT INTO metrics (timestamp, run_id, run_name, step, metrics)
             VALUES (?1, ?2, ?3, ?4, ?5)",
            params![
                clock::iso(now),
                self.run_id,
                self.run,
                as_signed(step),
                metrics
            ],
        );
        inserted.map_err(|error| broken(&self.path, error))?;
        Ok(())
    }

    fn add_alert(
        &mut self,
        now: f64,
        step: u64,
        level: &str,
        title: &str,
        text: &str,
    ) -> Result<()> {
        let (time, step) = (clock::iso(now), as_signed(step));
        let inserted = self.connection.execute(
            "INSERT INTO alerts (run_id, timestamp, run_name, title, text, level, step)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            params![self.run_id, time, self.run, title, text, level, step],
        );
        inserted.map_err(|error| broken(&self.path, error))?;
        Ok(())
    }
}

/// Opens or makes a database. The journal is trackio's choice too: readers do not wait for the
/// writer, and a commit does not wait for the disk.
fn connect(path: &Path) -> rusqlite::Result<Connection> {
    const TABLES: &str = include_str!("trackio.sql");
    let connection = Connection::open(path)?;
    connection.busy_timeout(PATIENCE)?;
    connection.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;")?;
    let version: i64 = connection.query_row("PRAGMA user_version", (), |row| row.get(0))?;
    // A newer trackio may have changed the tables of a run that is resumed.
    if version == 0 {
        connection.execute_batch(TABLES)?;
    }
    Ok(connection)
}

/// The id of a run that an earlier process has begun.
fn known_run(connection: &Connection, run: &str) -> rusqlite::Result<Option<String>> {
    let select = "SELECT run_id FROM configs WHERE run_name = ?1";
    let found = connection.query_row(select, [run], |row| row.get(0));
    found.optional()
}

/// An id of 32 digits that other runs do not have.
fn new_id(run: &str, start: &Start) -> String {
    let what = format!("{run} {} {}", start.unix_secs, start.order_hash);
    let mut hex = blake3::hash(what.as_bytes()).to_hex().to_string();
    hex.truncate(32);
    hex
}

/// The project of a run: trackio's names of files have letters, digits, `-` and `_` only. It keeps
/// names that begin with `registry-` for itself.
fn project_name(run: &str) -> String {
    let mut name = String::new();
    for letter in run.chars() {
        if letter.is_alphanumeric() || letter == '-' || letter == '_' {
            name.push(letter);
        }
    }
    if name.is_empty() {
        return "default".to_owned();
    }
    if name.starts_with("registry-") {
        name.insert_str(0, "run-");
    }
    name
}

/// SQLite's integers have a sign.
fn as_signed(step: u64) -> i64 {
    i64::try_from(step).unwrap_or(i64::MAX)
}

fn broken(path: &Path, error: rusqlite::Error) -> Error {
    Error::io(path)(io::Error::other(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::trackers::made_up::{event, start, step};

    fn guard(step: u64, action: &str) -> Event {
        event(&format!(
            r#"{{"event":"guard","step":{step},"action":"{action}","reason":"why","update":1}}"#
        ))
    }

    fn writer(run_dir: &Path) -> Trackio {
        Trackio::new(About {
            run_dir: run_dir.to_owned(),
            recipe: "[lr]\npeak = 1e-4\n".to_owned(),
            is_past: true,
        })
    }

    /// A run's folder below a temporary one.
    fn run_in(folder: &tempfile::TempDir) -> PathBuf {
        let run = folder.path().join("my run.2");
        fs::create_dir_all(run.join("previews")).expect("a folder");
        run
    }

    fn open(run: &Path) -> Connection {
        Connection::open(run.join("trackio/myrun2.db")).expect("a database")
    }

    /// Steps and numbers of the database, in trackio's order.
    fn rows(run: &Path) -> Vec<(u64, Value)> {
        let connection = open(run);
        let mut select = connection
            .prepare("SELECT step, metrics FROM metrics ORDER BY timestamp, id")
            .expect("a statement");
        let mut found = Vec::new();
        let mut rows = select.query(()).expect("rows");
        while let Some(row) = rows.next().expect("a row") {
            let step: i64 = row.get(0).expect("a step");
            let metrics: String = row.get(1).expect("a text");
            let metrics = serde_json::from_str(&metrics).expect("JSON");
            found.push((step as u64, metrics));
        }
        found
    }

    #[test]
    fn numbers_keep_their_bits_and_those_not_finite_are_texts() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let run = run_in(&folder);
        let mut trackio = writer(&run);
        trackio.write(&step(9, 1.0)).expect("writes");
        for event in [start(0), step(1, 0.1 + 0.2)] {
            trackio.write(&event).expect("writes");
        }
        drop(trackio);
        let rows = rows(&run);
        assert_eq!(rows.len(), 1, "events before the first start are not there");
        assert_eq!(rows[0].0, 1);
        assert_eq!(rows[0].1["loss/training"], json!(0.1 + 0.2));
        assert_eq!(rows[0].1["gradient_norm/all"], json!("NaN"));
        assert_eq!(number_json(f64::NEG_INFINITY), json!("-Infinity"));
        assert_eq!(number_json(f64::INFINITY), json!("Infinity"));
    }

    #[test]
    fn a_resume_replaces_the_steps_that_come_again() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let run = run_in(&folder);
        let events = [start(0), step(1, 0.5), step(2, 0.4), guard(2, "skip")];
        let mut trackio = writer(&run);
        for event in &events {
            trackio.write(event).expect("writes");
        }
        drop(trackio);
        // Another process.
        let mut trackio = writer(&run);
        for event in [start(1), step(2, 0.25), step(3, 0.2), guard(3, "rewind")] {
            trackio.write(&event).expect("writes");
        }
        trackio.fail("the disk is full").expect("writes");
        drop(trackio);

        let mut losses = Vec::new();
        for (step, metrics) in rows(&run) {
            losses.push((step, metrics["loss/training"].as_f64().expect("a number")));
        }
        assert_eq!(losses, [(1, 0.5), (2, 0.25), (3, 0.2)]);
        let connection = open(&run);
        let count = |select: &str| -> i64 {
            let found = connection.query_row(select, (), |row| row.get(0));
            found.expect("a number")
        };
        assert_eq!(count("SELECT COUNT(DISTINCT run_id) FROM metrics"), 1);
        assert_eq!(count("SELECT COUNT(*) FROM alerts"), 2);
        assert_eq!(count("SELECT COUNT(*) FROM alerts WHERE step = 3"), 2);
        let select = "SELECT config FROM configs";
        let config: String = connection
            .query_row(select, (), |row| row.get(0))
            .expect("one config");
        let config: Value = serde_json::from_str(&config).expect("JSON");
        assert_eq!(config["lr"]["peak"], json!(1e-4));
    }

    #[test]
    fn previews_are_copied_to_where_trackio_looks() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let run = run_in(&folder);
        let png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x80\0\0\0\x60";
        fs::write(run.join("previews/a.png"), png).expect("writes");
        let mut trackio = writer(&run);
        trackio.write(&start(0)).expect("writes");
        for name in ["a.png", "none.png"] {
            let preview = format!(r#"{{"event":"preview","step":7,"name":"{name}","secs":1.0}}"#);
            trackio.write(&event(&preview)).expect("writes");
        }
        drop(trackio);
        let rows = rows(&run);
        assert_eq!(rows.len(), 1);
        let picture = &rows[0].1["previews/pictures"];
        assert_eq!(picture["file_path"], json!("myrun2/my run.2/7/a.png"));
        let copy = run.join("trackio/media/myrun2/my run.2/7/a.png");
        assert_eq!(fs::read(copy).expect("a copy"), png);
    }

    #[test]
    fn projects_have_names_that_trackio_takes() {
        assert_eq!(project_name("a b.c_d-1"), "abc_d-1");
        assert_eq!(project_name("..."), "default");
        assert_eq!(project_name("registry-1"), "run-registry-1");
    }
}
