//! What `rectiflow tag` and `rectiflow score` share: which pictures, which table, and what came of
//! it.

use std::path::{Path, PathBuf};

use rectiflow_annotate::{
    pass::{Passed, Subject},
    pictures::listed::{Pictures, is_dataset},
    table::answers::Answers,
};
use rectiflow_data::{annotation::Kind, no_folder, prep::PrepSettings};
use rectiflow_train::recipe::Recipe;
use serde_json::{Value, json};

use crate::terminal::{answer::Misuse, numbers::grouped, progress::Progress};

/// Which pictures, and which table.
#[derive(Debug, clap::Args)]
pub(crate) struct TableArgs {
    /// The pictures: a source as for `rectiflow prep` (a folder, tars, Parquet, MDS, on a disk or
    /// at a URL), or a data set that it made.
    place: PathBuf,
    /// Where a data set was prepared from: its pictures are opened there.
    #[arg(long, value_name = "SOURCE")]
    pictures: Option<PathBuf>,
    /// The table of annotations to create or to add to, Parquet. `rectiflow prep --annotations`
    /// reads it.
    #[arg(long, value_name = "TABLE")]
    pub(crate) out: PathBuf,
    /// Write the table as JSON lines too.
    #[arg(long, value_name = "FILE")]
    pub(crate) jsonl: Option<PathBuf>,
    /// Name under which the answers stand in the table. Default: the name of the file, or of its
    /// folder if that is called model.
    #[arg(long)]
    name: Option<String>,
    /// A recipe whose `[prep]` section says how the source is read.
    #[arg(long)]
    recipe: Option<PathBuf>,
    /// Override a key of the recipe, e.g. --set prep.source=tar. Repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
}

impl TableArgs {
    /// The `[prep]` section.
    ///
    /// # Errors
    /// Those of the recipe.
    pub(crate) fn settings(&self) -> anyhow::Result<PrepSettings> {
        let settings = Recipe::load_prep(self.recipe.as_deref(), &self.overrides)?;
        match settings.validate().first() {
            Some(problem) => Err(Misuse(problem.clone()).into()),
            None => Ok(settings),
        }
    }

    /// Lists the pictures. Rows of their tables are kept beside the answers.
    ///
    /// # Errors
    /// Those of the source or of the data set.
    pub(crate) fn pictures(&self, settings: &PrepSettings) -> anyhow::Result<Pictures> {
        let mut work = self.out.clone().into_os_string();
        work.push(".work");
        let work = PathBuf::from(work);
        std::fs::create_dir_all(&work).map_err(rectiflow_data::Error::io(&work))?;
        if !is_dataset(&self.place) {
            no_folder::refuse(&self.place)?;
            return Ok(Pictures::of_source(&self.place, &work, settings)?);
        }
        let Some(root) = &self.pictures else {
            let problem = format!(
                "{} is a data set, which keeps no pictures: name the source that it was prepared \
                 from with --pictures",
                self.place.display()
            );
            return Err(Misuse(problem).into());
        };
        Ok(Pictures::of_dataset(&self.place, root, &work, settings)?)
    }

    /// Opens the table for a run with these settings.
    ///
    /// # Errors
    /// Those of [`Answers::open`].
    pub(crate) fn answers(&self, run: &str) -> anyhow::Result<Answers> {
        Ok(Answers::open(&self.out, run)?)
    }

    /// The name of the answers of a file.
    pub(crate) fn name(&self, file: &Path) -> String {
        let text = |name: Option<&std::ffi::OsStr>| {
            name.map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default()
        };
        if let Some(name) = &self.name {
            return name.clone();
        }
        let full = file.canonicalize().unwrap_or_else(|_| file.to_owned());
        match text(full.file_stem()).as_str() {
            "model" | "" => text(full.parent().and_then(Path::file_name)),
            stem => stem.to_owned(),
        }
    }
}

/// Name of a file without its folders.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// A bar for the pictures of a pass; the first that is known says where it begins.
pub(crate) fn shown(what: &'static str) -> impl FnMut(u64, u64) {
    let mut bar: Option<Progress> = None;
    move |done, total| {
        let bar = bar.get_or_insert_with(|| Progress::new(what, "pictures", done - 1, total));
        bar.set(done, "");
    }
}

/// What came of a pass, for people.
pub(crate) fn describe(subject: &Subject, passed: &Passed, table: &TableArgs) -> String {
    let what = match subject.kind {
        Kind::Score => "a score",
        _ => "tags",
    };
    let mut text = format!(
        "{} pictures have {what} by {:?}, {} of them from an earlier run; {}",
        grouped(passed.num_answered + passed.num_known),
        subject.mode,
        grouped(passed.num_known),
        table.out.display()
    );
    if passed.num_copies > 0 {
        text += &format!(
            "\n{} pictures are copies of others, byte by byte: they share a row",
            grouped(passed.num_copies)
        );
    }
    if let Some(first) = &passed.first_failed {
        text += &format!(
            "\n{} pictures have none, such as {first}; a later run tries them again",
            grouped(passed.num_failed)
        );
    }
    text
}

/// What came of a pass, for machines.
pub(crate) fn as_json(subject: &Subject, passed: &Passed, table: &TableArgs) -> Value {
    json!({
        "table": table.out,
        "kind": subject.kind,
        "name": subject.mode,
        "model": subject.model,
        "answered": passed.num_answered,
        "known": passed.num_known,
        "copies": passed.num_copies,
        "failed": passed.num_failed,
        "first_failed": passed.first_failed,
    })
}
