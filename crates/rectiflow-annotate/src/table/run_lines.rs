//! The settings that decide a run's answers, a line each, and what two runs differ in.

use std::{fs, io::ErrorKind, path::Path};

use rectiflow_data::{durable, error::Error as DataError};

use crate::error::{Error, Result};

/// Writes the settings of a new run to `path`, or compares them with those of the run that is
/// resumed.
pub(crate) fn check(path: &Path, out: &Path, lines: &str) -> Result<()> {
    let old = match fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Ok(durable::write(path, lines.as_bytes())?);
        }
        old => old.map_err(DataError::io(path))?,
    };
    let difference = first_difference(&old, lines);
    let Some((before, now)) = difference else {
        return Ok(());
    };
    let reason = format!(
        "it was begun with other settings: {before:?} then, {now:?} now; resume with the settings \
         of then, name another table with --out, or delete {} to mix both",
        path.display()
    );
    Err(Error::invalid(out.display().to_string(), reason))
}

/// The first line that differs, in both.
fn first_difference<'a>(old: &'a str, new: &'a str) -> Option<(&'a str, &'a str)> {
    let mut old = old.lines();
    let mut new = new.lines();
    loop {
        match (old.next(), new.next()) {
            (None, None) => return None,
            (before, now) if before != now => {
                return Some((before.unwrap_or(""), now.unwrap_or("")));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_that_differs_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.txt");
        let check = |lines| super::check(&path, Path::new("t.parquet"), lines);
        check("model = a\nseed = 1\n").unwrap();
        check("model = a\nseed = 1\n").unwrap();
        let error = check("model = a\nseed = 2\n").unwrap_err().to_string();
        assert!(error.starts_with("t.parquet: "), "{error}");
        assert!(
            error.contains("\"seed = 1\" then, \"seed = 2\" now"),
            "{error}"
        );
        assert!(check("model = a\n").is_err());
    }
}
