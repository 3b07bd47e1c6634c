//! A table that a run writes: opened, added to, and finished.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
};

use rectiflow_data::{
    annotation::{Annotation, Kind, Status},
    annotation_rows::AnnotationWriter,
    annotation_table,
    durable::{DurableFile, remove},
    error::Error as DataError,
    lock_file::lock_alone,
};

use crate::{
    error::{Error, Result},
    table::{journal::Journal, known::Claims, merge::Parts, run_lines},
};

/// Rows of a part; as many are kept in memory.
const PART_ROWS: usize = 1 << 14;
/// Key of the run's settings in the footer of a table.
pub const RUN_KEY: &str = "rectiflow.run";

/// The answers of a run.
#[derive(Debug)]
pub struct Answers {
    out: PathBuf,
    folder: PathBuf,
    /// Number of the next part, which is the journal's.
    next: u32,
    journal: Journal,
    known: Claims,
    /// The settings that decide the answers.
    run: String,
    /// Locked for the lifetime of the run.
    _lock: File,
}

/// Rows of a table by kind, mode and status.
pub type Counts = BTreeMap<(Kind, String, Status), u64>;

impl Answers {
    /// Opens the table `out`, or begins it. `run` has the settings that decide the answers, a line
    /// each; an unfinished run is resumed only with the same ones.
    ///
    /// # Errors
    /// [`Error::Invalid`] for other settings than the unfinished run's; [`Error::NotReady`] if
    /// another process writes the table; those of its files.
    pub fn open(out: &Path, run: &str) -> Result<Self> {
        let mut name = out.as_os_str().to_owned();
        name.push(".work");
        let folder = PathBuf::from(name);
        fs::create_dir_all(&folder).map_err(DataError::io(&folder))?;
        let lock = lock_alone(&folder.join("lock"))?.ok_or_else(|| Error::NotReady {
            what: out.display().to_string(),
            reason: "another process is writing it: wait until it ends, or end it".to_owned(),
        })?;
        run_lines::check(&folder.join("run.txt"), out, run)?;

        let known = Claims::default();
        let mut next = 1;
        let mut files = Vec::new();
        files.extend(
            fs::exists(out)
                .map_err(DataError::io(out))?
                .then(|| out.to_owned()),
        );
        while fs::exists(part(&folder, next)).map_err(DataError::io(&folder))? {
            files.push(part(&folder, next));
            next += 1;
        }
        for path in &files {
            annotation_table::read(path, &mut |row| {
                known.lock().add(&row);
                Ok(())
            })?;
        }
        // A death between a part and the end of its journal leaves both.
        for old in 1..next {
            remove(&journal(&folder, old))?;
        }
        let journal = Journal::open(journal(&folder, next))?;
        for row in &journal.rows {
            known.lock().add(row);
        }
        Ok(Self {
            out: out.to_owned(),
            folder,
            next,
            journal,
            known,
            run: run.to_owned(),
            _lock: lock,
        })
    }

    /// The folder of the run, where files can be kept until it is finished.
    pub fn work(&self) -> &Path {
        &self.folder
    }

    /// What the rows of all runs are about, for the threads that ask.
    pub fn claims(&self) -> Claims {
        self.known.clone()
    }

    /// Adds a row. It is in the journal when this returns.
    ///
    /// # Errors
    /// Those of the files.
    ///
    /// # Panics
    /// If the row breaks a rule of a table.
    pub fn add(&mut self, row: Annotation) -> Result<()> {
        if let Err(reason) = row.check() {
            panic!("a row about {} breaks a rule: {reason}", row.source);
        }
        self.known.lock().add(&row);
        self.journal.push(row)?;
        if self.journal.rows.len() < PART_ROWS {
            return Ok(());
        }
        self.cut()
    }

    /// Flushes all rows to the disk.
    ///
    /// # Errors
    /// Those of the journal.
    pub fn flush(&mut self) -> Result<()> {
        self.journal.flush()
    }

    /// Turns the journal into a part.
    fn cut(&mut self) -> Result<()> {
        let path = part(&self.folder, self.next);
        let file = DurableFile::create(&path)?;
        let mut table = AnnotationWriter::new(file, &[]).map_err(DataError::io(&path))?;
        for row in std::mem::take(&mut self.journal.rows) {
            table.push(row).map_err(DataError::io(&path))?;
        }
        table.finish().map_err(DataError::io(&path))?.commit()?;
        remove(self.journal.path())?;
        self.next += 1;
        self.journal = Journal::open(journal(&self.folder, self.next))?;
        Ok(())
    }

    /// Merges everything into the table, and into `lines` as JSON lines, and deletes the folder of
    /// the run. Returns the number of rows.
    ///
    /// # Errors
    /// Those of the files.
    pub fn finish(mut self, lines: Option<&Path>) -> Result<u64> {
        self.journal.flush()?;
        let mut files = Vec::new();
        let exists = fs::exists(&self.out).map_err(DataError::io(&self.out))?;
        files.extend(exists.then(|| self.out.clone()));
        for number in 1..self.next {
            files.push(part(&self.folder, number));
        }
        let parts = Parts {
            files: &files,
            rows: &self.journal.rows,
        };
        let num_rows = parts.write(&self.out, lines, &[(RUN_KEY, &self.run)])?;
        fs::remove_dir_all(&self.folder).map_err(DataError::io(&self.folder))?;
        Ok(num_rows)
    }
}

/// Counts the rows of a table by kind, mode and status.
///
/// # Errors
/// Those of [`annotation_table::read`].
pub fn count(table: &Path) -> Result<Counts> {
    let mut counts = Counts::new();
    annotation_table::read(table, &mut |row| {
        *counts.entry((row.kind, row.mode, row.status)).or_default() += 1;
        Ok(())
    })?;
    Ok(counts)
}

fn part(folder: &Path, number: u32) -> PathBuf {
    folder.join(format!("part-{number:06}.parquet"))
}

fn journal(folder: &Path, number: u32) -> PathBuf {
    folder.join(format!("journal-{number:06}.jsonl"))
}

#[cfg(test)]
mod tests {
    use rectiflow_data::SampleId;

    use super::*;

    fn row(id: u64, text: &str) -> Annotation {
        Annotation {
            text: Some(text.to_owned()),
            ..Annotation::new(SampleId(id), &format!("{id}.png"), Kind::Caption, "m")
        }
    }

    fn texts(table: &Path) -> BTreeMap<u64, String> {
        let mut texts = BTreeMap::new();
        annotation_table::read(table, &mut |row| {
            let old = texts.insert(row.id.0, row.text.unwrap_or_default());
            assert_eq!(old, None, "a picture has one row");
            Ok(())
        })
        .unwrap();
        texts
    }

    #[test]
    fn a_run_that_dies_anywhere_goes_on_where_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("t.parquet");
        let num_rows = PART_ROWS as u64 + 100;
        // The first run dies with a part and a journal; dropping saves nothing.
        let mut answers = Answers::open(&out, "a").unwrap();
        for id in 0..num_rows {
            answers.add(row(id, "one")).unwrap();
        }
        drop(answers);
        // As if it had died before the journal of the part was deleted.
        let work = folder.path().join("t.parquet.work");
        fs::write(journal(&work, 1), row(3, "old").to_line()).unwrap();

        let mut answers = Answers::open(&out, "a").unwrap();
        assert_eq!(answers.claims().lock().len() as u64, num_rows);
        let status = answers
            .claims()
            .lock()
            .status(SampleId(num_rows - 1), Kind::Caption, "m");
        assert_eq!(status, Some(Status::Ok));
        answers.add(row(num_rows, "two")).unwrap();
        answers.add(row(5, "again")).unwrap();
        let lines = folder.path().join("t.jsonl");
        assert_eq!(answers.finish(Some(&lines)).unwrap(), num_rows + 1);
        assert!(!work.exists());
        let found = texts(&out);
        assert_eq!(found.len() as u64, num_rows + 1);
        assert_eq!((found[&3].as_str(), found[&5].as_str()), ("one", "again"));
        assert_eq!(texts(&lines), found);

        // A later run adds to the finished table, with other settings if it likes.
        let mut answers = Answers::open(&out, "b").unwrap();
        assert_eq!(answers.claims().lock().len() as u64, num_rows + 1);
        answers.add(row(3, "three")).unwrap();
        assert_eq!(answers.finish(None).unwrap(), num_rows + 1);
        assert_eq!(texts(&out)[&3], "three");
        let count = count(&out).unwrap();
        assert_eq!(
            count[&(Kind::Caption, "m".to_owned(), Status::Ok)],
            num_rows + 1
        );
    }

    #[test]
    fn a_table_has_one_writer_and_one_run() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("t.parquet");
        let first = Answers::open(&out, "seed = 1").unwrap();
        let error = Answers::open(&out, "seed = 1").unwrap_err();
        assert!(matches!(error, Error::NotReady { .. }), "{error}");
        drop(first);
        let error = Answers::open(&out, "seed = 2").unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
        fs::write(&out, "no table").unwrap();
        let error = Answers::open(&out, "seed = 1").unwrap_err().to_string();
        assert!(
            error.contains("not a valid table of annotations"),
            "{error}"
        );
    }
}
