//! The source and the data set of a preparation as places: checked, and listed.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    durable,
    error::{Error, Result},
    prep::settings::PrepSettings,
    remote::{Location, network::Network},
    source::{Source, annotations::Annotations, no_folder},
};

/// Lists a source as the settings say. Rows of tables are kept in the data set's folder.
///
/// # Errors
/// Also [`Error::Invalid`] if the data set was prepared with tables of annotations, and none is
/// named now.
pub(crate) fn list_source(source: &Path, out: &Path, settings: &PrepSettings) -> Result<Source> {
    check_annotations(out, settings)?;
    list_source_in(source, out, &out.join("prep"), settings)
}

/// Lists a source as the settings say, without the data set in `out`. Rows of tables are kept in
/// the folder `work`, in a file without a name.
///
/// # Errors
/// Those of [`Source::list`]; [`Error::Invalid`] for tables or a filter that cannot be used.
pub fn list_source_in(
    source: &Path,
    out: &Path,
    work: &Path,
    settings: &PrepSettings,
) -> Result<Source> {
    let (kind, boards) = (settings.source, settings.boards());
    let mut source = Source::with_tables(source, (out, work), kind, settings.reading(), &boards)?;
    let (tables, ranks) = (&settings.annotations, &settings.quality_ranks);
    source.annotations = Annotations::open(tables, work, &settings.tags, ranks)?;
    Ok(source)
}

/// The tables of annotations of the last preparation, a line each.
fn annotations_file(out: &Path) -> PathBuf {
    out.join("prep/annotations.txt")
}

/// The tables of annotations of the last preparation of the data set in `out` that can still be
/// read. The others are named in the log.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn usable_annotations(out: &Path) -> Result<Vec<PathBuf>> {
    let path = annotations_file(out);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let mut tables = Vec::new();
    for table in text.lines().map(PathBuf::from) {
        if table.exists() {
            tables.push(table);
        } else {
            tracing::warn!(
                "{}: a table of annotations of the last preparation, is not there from here: its \
                 scores do not count",
                table.display()
            );
        }
    }
    Ok(tables)
}

/// Refuses to take the captions of tables out of a data set because they were not named again.
fn check_annotations(out: &Path, settings: &PrepSettings) -> Result<()> {
    let path = annotations_file(out);
    if !settings.annotations.is_empty() || !path.exists() {
        return Ok(());
    }
    let tables = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let tables: Vec<&str> = tables.lines().collect();
    let reason = format!(
        "it was prepared with --annotations {}: name them again, or delete {} to take their texts \
         out",
        tables.join(" --annotations "),
        path.display()
    );
    Err(Error::Invalid {
        what: out.display().to_string(),
        reason,
    })
}

/// Remembers the tables of annotations of a preparation for the next one.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn remember_annotations(out: &Path, settings: &PrepSettings) -> Result<()> {
    let path = annotations_file(out);
    if settings.annotations.is_empty() {
        return match path.exists() {
            true => fs::remove_file(&path).map_err(Error::io(path)),
            false => Ok(()),
        };
    }
    let mut lines = String::new();
    for table in &settings.annotations {
        lines += &format!("{}\n", table.display());
    }
    durable::write(&path, lines.as_bytes())
}

/// Fails if `source` is no source, or if `out` is the same folder.
///
/// # Errors
/// [`Error::Invalid`]; [`Error::Io`] if `source` does not exist.
pub fn check_places(source: &Path, out: &Path) -> Result<()> {
    no_folder::refuse(source)?;
    // Before anything is written: what a failed call leaves could be part of the next one's source.
    if let Location::Folder(path) = Location::parse(source, &Network::default())? {
        fs::metadata(&path).map_err(Error::io(&path))?;
    }
    let (Ok(from), Ok(to)) = (fs::canonicalize(source), fs::canonicalize(out)) else {
        return Ok(());
    };
    if from == to {
        let reason = "the data set cannot be the source folder: name another folder".to_owned();
        return Err(Error::Invalid {
            what: out.display().to_string(),
            reason,
        });
    }
    Ok(())
}
