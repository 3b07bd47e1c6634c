//! What a path is that is no source of pictures, and what to do with it.

use std::{fs, path::Path};

use crate::{
    error::{Error, Result},
    remote::{Location, network::Network},
    source::{
        choice::{compressed, is_compressed_tar},
        names::{Kind, classify},
    },
};

/// Refuses a file that is no source, and a URL of a kind that is not read. A path that does not
/// exist is left to the caller.
///
/// # Errors
/// [`Error::Invalid`] with what to do.
pub fn refuse(source: &Path) -> Result<()> {
    let shown = source.display().to_string();
    if shown.contains("://") && !source.exists() {
        return Location::parse(source, &Network::default()).map(drop);
    }
    let name = source.file_name().unwrap_or_default().to_string_lossy();
    let lower = name.to_ascii_lowercase();
    let endings = [".tar", ".parquet"];
    if lower == "index.json" || endings.iter().any(|ending| lower.ends_with(ending)) {
        return Ok(());
    }
    refuse_shards(source)
}

/// Refuses what is no folder, also files that other kinds of sources have.
///
/// # Errors
/// As [`refuse`].
pub(crate) fn refuse_shards(source: &Path) -> Result<()> {
    let name = source.file_name().unwrap_or_default().to_string_lossy();
    let is_file = fs::metadata(source).is_ok_and(|metadata| !metadata.is_dir());
    if !is_file {
        return Ok(());
    }
    Err(Error::Invalid {
        what: source.display().to_string(),
        reason: what_to_do(&name, source),
    })
}

/// What to do with a file instead of naming it.
fn what_to_do(name: &str, source: &Path) -> String {
    match classify(name).0 {
        Kind::Archive if is_compressed_tar(name) => compressed(name),
        Kind::Archive => format!(
            "an archive; expected a folder of pictures. Unpack it, e.g. {}, and name the folder",
            unpack(name, source)
        ),
        Kind::Table(_) | Kind::Json => {
            "a table; expected the folder of the pictures that it describes. Put it into that \
             folder, where it is found, and name the folder"
                .to_owned()
        }
        _ => "a file; expected a folder of pictures. Name the folder that it is in".to_owned(),
    }
}

/// A command that unpacks an archive.
fn unpack(name: &str, source: &Path) -> String {
    let path = source.display();
    let folder = name.split('.').next().unwrap_or("pictures");
    let lower = name.to_ascii_lowercase();
    let has = |endings: &[&str]| endings.iter().any(|ending| lower.ends_with(ending));
    if has(&[".zip", ".cbz"]) {
        format!("`unzip {path} -d {folder}`")
    } else if has(&[".7z", ".rar", ".cbr"]) {
        format!("`7z x {path} -o{folder}`")
    } else {
        format!("`mkdir {folder} && tar -xf {path} -C {folder}`")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_urls_are_refused_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        for (name, part) in [
            ("set.zip", "unzip"),
            ("SET.ZIP", "unzip"),
            ("set.tar.gz", "gunzip"),
            ("a.rar", "7z x"),
            ("set.7z", "7z x"),
            ("metadata.csv", "Put it into that folder"),
            ("a.png", "Name the folder that it is in"),
            ("a", "Name the folder that it is in"),
        ] {
            let path = folder.path().join(name);
            fs::write(&path, "x").unwrap();
            let error = refuse(&path).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(name), "{error}");
        }
        let error = refuse(Path::new("hf://datasets/a/b"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("expected s3://"), "{error}");
        assert!(refuse(folder.path()).is_ok() && refuse(&folder.path().join("gone")).is_ok());
    }
}
