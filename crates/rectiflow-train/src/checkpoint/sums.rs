//! The list of hashes of a checkpoint's files, `BLAKE3SUMS`: one BLAKE3 each, in the format of
//! b3sum.
//!
//! Which files a reader verifies is decided in `found`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::ErrorKind,
    path::{Path, PathBuf},
};

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
use walkdir::WalkDir;

use crate::{
    checkpoint::SUMS,
    error::{Error, Result},
};

/// The first word of the reason of every error about a damaged checkpoint.
pub(crate) const DAMAGED: &str = "damaged: ";

/// Returns an error about a damaged file of a checkpoint.
pub(crate) fn damaged(path: &Path, reason: &str) -> Error {
    Error::checkpoint(path, format!("{DAMAGED}{reason}"))
}

/// The hashes of a checkpoint's files by their names, as its list has them.
#[derive(Debug, Clone)]
pub(crate) struct Sums {
    folder: PathBuf,
    hashes: BTreeMap<String, String>,
}

impl Sums {
    /// Reads the list in the folder of a checkpoint; `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is empty or not a list of hashes and names; [`Error::Io`].
    pub(crate) fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(SUMS);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(&path)(error)),
        };
        let text = String::from_utf8_lossy(&bytes);
        let mut hashes = BTreeMap::new();
        for (index, line) in text.lines().enumerate() {
            let Some((hash, name)) = hash_and_name(line) else {
                let reason = format!("line {} is not a BLAKE3 and a name", index + 1);
                return Err(damaged(&path, &reason));
            };
            if hashes.insert(name.to_owned(), hash.to_owned()).is_some() {
                return Err(damaged(&path, &format!("it has {name} twice")));
            }
        }
        if hashes.is_empty() {
            return Err(damaged(
                &path,
                "expected the hash of every file, found none",
            ));
        }
        Ok(Some(Self {
            folder: folder.to_owned(),
            hashes,
        }))
    }

    /// Returns the files of the list, each as (name, hash), by name.
    pub(crate) fn files(&self) -> impl Iterator<Item = (&str, &str)> {
        let files = self.hashes.iter();
        files.map(|(name, hash)| (name.as_str(), hash.as_str()))
    }

    /// Verifies the files whose names `is_read` selects: those of the list, and those in the
    /// folder.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] that names the first missing or different file; [`Error::Io`].
    pub(crate) fn verify(&self, is_read: impl Fn(&str) -> bool) -> Result<()> {
        let mut there = Vec::new();
        collect_files(&self.folder, &mut there)?;
        let mut names: BTreeSet<&str> = there.iter().map(String::as_str).collect();
        names.remove(SUMS);
        names.extend(self.hashes.keys().map(String::as_str));
        names.retain(|name| is_read(name));
        let names: Vec<&str> = names.into_iter().collect();
        // The large files side by side; the first by name is reported.
        let found: Vec<Result<()>> = names.par_iter().map(|name| self.check(name)).collect();
        found.into_iter().collect()
    }

    fn check(&self, name: &str) -> Result<()> {
        let path = self.folder.join(name);
        let found = match hash_file(&path) {
            Ok(hash) => Some(hash),
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let expected = self.hashes.get(name);
        if expected == found.as_ref() {
            return Ok(());
        }
        let (expected, found) = (hash_or_none(expected), hash_or_none(found.as_ref()));
        Err(damaged(
            &path,
            &format!("expected {expected}, found {found}"),
        ))
    }
}

/// Returns the two parts of a line of the list; `None` if it is not one.
fn hash_and_name(line: &str) -> Option<(&str, &str)> {
    let (hash, name) = line.split_once("  ")?;
    let is_hash = hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
    (is_hash && !name.is_empty()).then_some((hash, name))
}

fn hash_or_none(hash: Option<&String>) -> String {
    match hash {
        Some(hash) => format!("BLAKE3 {hash}"),
        None => "no such file".to_owned(),
    }
}

/// Returns the lines of the list for these files of `folder`.
pub(crate) fn sums_of(folder: &Path, names: &[String]) -> Result<String> {
    let line = |name: &String| Ok(format!("{}  {name}\n", hash_file(&folder.join(name))?));
    names.par_iter().map(line).collect()
}

/// Appends the names of all files in `folder`, relative to it and with `/` between the parts.
pub(crate) fn collect_files(folder: &Path, names: &mut Vec<String>) -> Result<()> {
    for entry in WalkDir::new(folder).follow_links(true) {
        let entry = entry.map_err(|error| Error::io(folder)(error.into()))?;
        if !entry.file_type().is_dir() {
            let name = entry.path().strip_prefix(folder);
            let name = name.expect("the walk stays inside the folder");
            names.push(name.to_string_lossy().into_owned());
        }
    }
    Ok(())
}

/// Returns the BLAKE3 of a file, hexadecimal.
pub(crate) fn hash_file(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut file = File::open(path).map_err(Error::io(path))?;
    hasher.update_reader(&mut file).map_err(Error::io(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}
