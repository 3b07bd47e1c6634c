//! The temporary folder that an export is written to, `OUT.tmp-PID`, and what killed exports left.
//!
//! A kill can leave three things beside `OUT`: an unfinished folder; the export that was replaced,
//! under its temporary name; and, on file systems that cannot exchange two names, `OUT.old-PID`
//! without `OUT`. The next export to `OUT` removes the first two and renames the third.
//! It leaves alone what belongs to a process that is alive: that process holds a lock on a file in
//! the folder, which the system releases when it ends, however it ends.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use crate::{
    durable::{exchange_folders, rename_folder},
    error::{Error, Result},
};

/// The file whose lock says that the export is being written.
const LOCK: &str = ".exporting";
const UNFINISHED: &str = "tmp";
const REPLACED: &str = "old";

/// A folder that becomes `OUT` when it is complete, and is removed if it does not.
#[derive(Debug)]
pub(crate) struct Staging {
    folder: PathBuf,
    /// Held until the folder has its name.
    lock: File,
}

impl Staging {
    /// Creates an empty folder beside `out`, whose own folder must exist. Removes what killed
    /// exports to `out` left.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn beside(out: &Path) -> Result<Self> {
        restore(out)?;
        for left in leftovers(out, UNFINISHED)?
            .into_iter()
            .chain(leftovers(out, REPLACED)?)
        {
            tracing::warn!(
                "{} is left of a killed export and is removed",
                left.display()
            );
            fs::remove_dir_all(&left).map_err(Error::io(&left))?;
        }
        let folder = own_name(out, UNFINISHED);
        fs::create_dir(&folder).map_err(Error::io(&folder))?;
        let path = folder.join(LOCK);
        let lock = File::create(&path).map_err(Error::io(&path))?;
        // Without locks, as on some network shares, the number of the process has to do.
        let _ = lock.try_lock();
        Ok(Self { folder, lock })
    }

    /// The folder to write to.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Renames the complete folder to `out` and removes an earlier export of that name. There is an
    /// `out` at every moment if there was one before, where the file system can exchange names.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn publish(self, out: &Path) -> Result<()> {
        let path = self.folder.join(LOCK);
        fs::remove_file(&path).map_err(Error::io(&path))?;
        if !out.exists() {
            return rename_folder(&self.folder, out);
        }
        if exchange_folders(&self.folder, out)? {
            return fs::remove_dir_all(&self.folder).map_err(Error::io(&self.folder));
        }
        let old = own_name(out, REPLACED);
        fs::rename(out, &old).map_err(Error::io(out))?;
        rename_folder(&self.folder, out)?;
        fs::remove_dir_all(&old).map_err(Error::io(old))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = self.lock.unlock();
        // The first failure is the one to report; what is left, the next export removes.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Renames an earlier export to `out`, if a kill took its name.
fn restore(out: &Path) -> Result<()> {
    if out.exists() {
        return Ok(());
    }
    match leftovers(out, REPLACED)?.pop() {
        Some(old) => rename_folder(&old, out),
        None => Ok(()),
    }
}

/// Returns `OUT.WHAT-PID`, in the same folder as `OUT`.
fn own_name(out: &Path, what: &str) -> PathBuf {
    let mut name = prefix(out, what);
    name.push(std::process::id().to_string());
    out.with_file_name(name)
}

fn prefix(out: &Path, what: &str) -> OsString {
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{what}-"));
    name
}

/// Returns the folders `OUT.WHAT-PID` of processes that have ended.
fn leftovers(out: &Path, what: &str) -> Result<Vec<PathBuf>> {
    let parent = match out.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let prefix = prefix(out, what);
    let mut found = Vec::new();
    for entry in fs::read_dir(parent).map_err(Error::io(parent))? {
        let entry = entry.map_err(Error::io(parent))?;
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let process = process_of(&entry.file_name(), &prefix);
        if is_folder && process.is_some_and(|process| has_ended(process, &entry.path())) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Returns the number at the end of a name that begins with `prefix`.
fn process_of(name: &OsStr, prefix: &OsStr) -> Option<u32> {
    let number = name
        .as_encoded_bytes()
        .strip_prefix(prefix.as_encoded_bytes())?;
    if !number.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(number).ok()?.parse().ok()
}

/// Whether the process that writes a folder has ended.
fn has_ended(process: u32, folder: &Path) -> bool {
    if let Ok(file) = File::options().write(true).open(folder.join(LOCK)) {
        match file.try_lock() {
            Ok(()) => return true,
            Err(TryLockError::WouldBlock) => return false,
            Err(TryLockError::Error(_)) => {}
        }
    }
    // In each container the first process has the same number, this one too.
    process == std::process::id() || !Path::new("/proc").join(process.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No process has this number.
    const ENDED: u32 = 4_200_000_000;

    fn make(path: &Path, text: &str) {
        fs::create_dir_all(path).unwrap();
        fs::write(path.join("model_index.json"), text).unwrap();
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names = Vec::new();
        for entry in fs::read_dir(folder).unwrap() {
            names.push(entry.unwrap().file_name().into_string().unwrap());
        }
        names.sort();
        names
    }

    fn text(out: &Path) -> String {
        fs::read_to_string(out.join("model_index.json")).unwrap()
    }

    #[test]
    fn what_a_killed_export_left_is_removed_and_what_is_not_its_own_stays() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let alive = std::os::unix::process::parent_id();
        let foreign = [
            "out.tmp-x".to_owned(),
            format!("out.tmp-{ENDED}.bak"),
            "out.tmp-".to_owned(),
            format!("other.tmp-{ENDED}"),
            format!("out.new-{ENDED}"),
            // The lock of one is held, the process of the other is alive.
            "out.tmp-4200000001".to_owned(),
            format!("out.tmp-{alive}"),
        ];
        for name in &foreign {
            make(&folder.path().join(name), "foreign");
        }
        let held = File::create(folder.path().join("out.tmp-4200000001").join(LOCK)).unwrap();
        held.lock().unwrap();
        let own = own_name(&out, UNFINISHED);
        for left in [
            folder.path().join(format!("out.tmp-{ENDED}")),
            folder.path().join(format!("out.old-{ENDED}")),
            own,
        ] {
            make(&left, "left");
            fs::write(left.join(LOCK), "").unwrap();
        }
        make(&out, "earlier");
        let staging = Staging::beside(&out).unwrap();
        make(staging.folder(), "new");
        staging.publish(&out).unwrap();
        let mut expected = foreign.to_vec();
        expected.push("out".to_owned());
        expected.sort();
        assert_eq!(names(folder.path()), expected);
        assert_eq!(text(&out), "new");
        assert_eq!(names(&out), ["model_index.json"]);
    }

    #[test]
    fn an_export_that_lost_its_name_to_a_kill_gets_it_back() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        make(&folder.path().join(format!("out.old-{ENDED}")), "earlier");
        make(
            &folder.path().join(format!("out.tmp-{ENDED}")),
            "unfinished",
        );
        // This export fails: the earlier one is there all the same.
        drop(Staging::beside(&out).unwrap());
        assert_eq!(
            (text(&out).as_str(), names(folder.path())),
            ("earlier", vec!["out".into()])
        );
    }

    #[test]
    fn an_export_that_is_not_published_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let staging = Staging::beside(&folder.path().join("out")).unwrap();
        make(staging.folder(), "unfinished");
        drop(staging);
        assert_eq!(names(folder.path()), [""; 0]);
    }
}
