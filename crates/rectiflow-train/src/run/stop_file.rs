//! The file `STOPPED`: a run that the guard has stopped stays stopped through every restart, until
//! the user acknowledges it.
//!
//! A launcher that restarts failed runs would otherwise spend money on a run that cannot recover by
//! itself. The file holds the reason; acknowledging renames it to `STOPPED.acknowledged`.

use std::{fs, io::ErrorKind, path::Path};

use crate::error::{Error, Result};

/// Name of the file.
pub(crate) const FILE: &str = "STOPPED";
/// Its name after the stop was acknowledged.
pub(crate) const ACKNOWLEDGED: &str = "STOPPED.acknowledged";

/// Writes the reason to the run folder.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn write(run_dir: &Path, reason: &str) -> Result<()> {
    let path = run_dir.join(FILE);
    fs::write(&path, format!("{reason}\n")).map_err(Error::io(&path))
}

/// Refuses to continue a stopped run, or acknowledges the stop and returns its reason.
///
/// # Errors
/// [`Error::Stopped`] if the run is stopped and `acknowledge` is false; [`Error::Io`].
pub(crate) fn check(run_dir: &Path, acknowledge: bool) -> Result<Option<String>> {
    let path = run_dir.join(FILE);
    let reason = match fs::read_to_string(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        read => read.map_err(Error::io(&path))?.trim().to_owned(),
    };
    if !acknowledge {
        return Err(Error::Stopped {
            run_dir: run_dir.to_owned(),
            reason,
        });
    }
    fs::rename(&path, run_dir.join(ACKNOWLEDGED)).map_err(Error::io(&path))?;
    Ok(Some(reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_stays_a_stop_until_it_is_acknowledged() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let dir = dir.path();
        assert_eq!(check(dir, false).expect("nothing has stopped"), None);
        write(dir, "the loss is NaN").expect("writes");
        for _ in 0..2 {
            let refused = check(dir, false).expect_err("it is stopped").to_string();
            assert!(
                refused.contains("the loss is NaN") && refused.contains("--acknowledge-stop"),
                "{refused}"
            );
        }
        assert_eq!(
            check(dir, true).expect("acknowledged"),
            Some("the loss is NaN".to_owned())
        );
        assert_eq!(check(dir, false).expect("it may continue"), None);
    }
}
