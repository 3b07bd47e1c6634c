//! The sums of a checkpoint's files, one BLAKE3 each, and their verification.

use std::{
    fs::{self, File},
    path::Path,
};

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
use walkdir::WalkDir;

use crate::{
    checkpoint::{EMA, SUMS, Saved},
    error::{Error, Result},
};

/// Returns one line for each file below `folder`, sorted by name: hash, two spaces, name.
fn sums(folder: &Path) -> Result<String> {
    let mut names = Vec::new();
    collect_files(folder, &mut names)?;
    names.retain(|name| name != SUMS);
    names.sort();
    sums_of(folder, &names)
}

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

/// Verifies the files of a checkpoint against its list of hashes. A checkpoint of format 1 has no
/// list and is accepted unverified.
///
/// # Errors
/// [`Error::Checkpoint`] that names the first missing or different file; [`Error::Io`].
pub fn verify(checkpoint: &Path) -> Result<()> {
    // The averaged weights are covered by the list of the checkpoint that contains them.
    let checkpoint = if checkpoint.ends_with(EMA) {
        checkpoint.parent().unwrap_or(checkpoint)
    } else {
        checkpoint
    };
    let saved = Saved::read(checkpoint)?;
    if saved.format == 1 {
        return Ok(());
    }
    let path = checkpoint.join(SUMS);
    let expected = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let found = sums(checkpoint)?;
    if expected == found {
        return Ok(());
    }
    let names = expected.lines().chain(found.lines());
    for (_, name) in names.filter_map(|line| line.split_once("  ")) {
        let expected = hash_in(&expected, name);
        let found = hash_in(&found, name);
        if expected != found {
            let expected = hash_or_none(expected);
            let found = hash_or_none(found);
            return Err(Error::Checkpoint {
                path: checkpoint.join(name),
                reason: format!("damaged: expected {expected}, found {found}"),
            });
        }
    }
    Err(Error::Checkpoint {
        path,
        reason: "not a list of hashes and names".to_owned(),
    })
}

/// Returns the hash of a file in a list of hashes and names.
fn hash_in<'a>(lines: &'a str, name: &str) -> Option<&'a str> {
    let mut files = lines.lines().filter_map(|line| line.split_once("  "));
    let (hash, _) = files.find(|file| file.1 == name)?;
    Some(hash)
}

fn hash_or_none(hash: Option<&str>) -> String {
    match hash {
        Some(hash) => format!("BLAKE3 {hash}"),
        None => "no such file".to_owned(),
    }
}
