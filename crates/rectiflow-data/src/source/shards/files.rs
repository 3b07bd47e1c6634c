//! The files of a place that can hold shards: a folder or a file on a disk, a prefix or an object
//! at a URL.

use std::{
    collections::VecDeque,
    fs,
    path::{Path, PathBuf},
};

use crate::{
    error::{Error, Result},
    remote::{Location, Remote, listing::Listed, network::Network, runtime},
    source::{
        shards::shard::{Blocks, Shard},
        walk::join,
    },
};

/// The list of shards of MDS.
pub(crate) const INDEX: &str = "index.json";
/// Files that are looked for where nothing can be listed: they name what there is.
const KNOWN: [&str; 4] = [INDEX, "metadata.jsonl", "metadata.csv", "metadata.parquet"];
/// Endings of files that are named by a URL.
const FILE_ENDINGS: [&str; 7] = [
    ".tar", ".parquet", INDEX, ".jsonl", ".ndjson", ".csv", ".tsv",
];
/// Entries of a folder that are looked at to find out what kind of source it is.
const MOST_ENTRIES: usize = 100_000;

/// The files of a place.
#[derive(Debug)]
pub(crate) struct Files {
    root: Root,
    /// Relative to the root, in the order of their names.
    pub(crate) names: Vec<String>,
    /// Whether the place is one file, or files by name.
    pub(crate) is_named: bool,
}

#[derive(Debug)]
enum Root {
    Local(PathBuf),
    Far {
        remote: Remote,
        /// What the store said of each name that it was asked for.
        listed: Vec<Listed>,
        /// Whether there are no other objects.
        is_complete: bool,
        blocks: Blocks,
    },
}

impl Files {
    /// The files of `place`. Of a folder on a disk at most 100,000 entries are looked at unless
    /// `all` are wanted: one of pictures can have millions. `skip` is the data set's own folder.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Remote`] if it cannot be listed, [`Error::Invalid`] for a URL of
    /// another kind.
    pub(crate) fn of(place: &Path, skip: &Path, all: bool) -> Result<Self> {
        match Location::parse(place, &Network::default())? {
            Location::Folder(path) => Self::local(&path, skip, all),
            Location::Remote(remote) => Self::far(place, &remote),
        }
    }

    fn local(path: &Path, skip: &Path, all: bool) -> Result<Self> {
        let metadata = fs::metadata(path).map_err(Error::io(path))?;
        if metadata.is_dir() {
            fs::read_dir(path).map_err(Error::io(path))?;
            let most = if all { usize::MAX } else { MOST_ENTRIES };
            return Ok(Self {
                names: names_below(path, skip, most),
                root: Root::Local(path.to_owned()),
                is_named: false,
            });
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let folder = path.parent().unwrap_or(Path::new(""));
        Ok(Self {
            names: vec![name.into_owned()],
            root: Root::Local(folder.to_owned()),
            is_named: true,
        })
    }

    fn far(place: &Path, remote: &Remote) -> Result<Self> {
        let url = place.to_string_lossy();
        if let Some((folder, name)) = split_file(&url) {
            let Location::Remote(remote) = Location::parse(Path::new(folder), &Network::default())?
            else {
                unreachable!("the folder of a URL is a URL");
            };
            return Ok(Self {
                names: expanded(name),
                root: Root::Far {
                    remote,
                    listed: Vec::new(),
                    is_complete: false,
                    blocks: Blocks::default(),
                },
                is_named: true,
            });
        }
        let (listed, is_complete) = match runtime().block_on(remote.list()) {
            Ok(listed) if !listed.is_empty() => (listed, true),
            Ok(_) => (known(remote, "nothing is below it")?, false),
            Err(error) => (known(remote, &error.to_string())?, false),
        };
        Ok(Self {
            names: listed.iter().map(|object| object.name.clone()).collect(),
            root: Root::Far {
                remote: remote.clone(),
                listed,
                is_complete,
                blocks: Blocks::default(),
            },
            is_named: false,
        })
    }

    /// The objects at a URL, if the store has listed them all.
    pub(crate) fn into_listed(self) -> Option<Vec<Listed>> {
        match self.root {
            Root::Far {
                listed,
                is_complete: true,
                ..
            } => Some(listed),
            _ => None,
        }
    }

    /// Opens one of the files, or one beside them.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Remote`].
    pub(crate) fn shard(&self, name: &str) -> Result<Shard> {
        match &self.root {
            Root::Local(folder) => {
                let path = folder.join(name);
                Shard::local(name.to_owned(), path.clone()).map_err(Error::io(path))
            }
            Root::Far {
                remote,
                listed,
                blocks,
                ..
            } => {
                let at = listed.binary_search_by(|object| object.name.as_str().cmp(name));
                let object = match at {
                    Ok(at) => listed[at].clone(),
                    Err(_) => runtime().block_on(remote.facts(name))?,
                };
                let Listed {
                    name,
                    bytes,
                    version,
                } = object;
                Ok(Shard::far(
                    name,
                    bytes,
                    version,
                    remote.clone(),
                    blocks.clone(),
                ))
            }
        }
    }

    /// Opens a file that need not be there. None if it is not.
    ///
    /// # Errors
    /// As [`Files::shard`].
    pub(crate) fn shard_if_any(&self, name: &str) -> Result<Option<Shard>> {
        match &self.root {
            Root::Local(folder) if !folder.join(name).is_file() => return Ok(None),
            Root::Far {
                listed,
                is_complete: true,
                ..
            } => {
                let at = listed.binary_search_by(|object| object.name.as_str().cmp(name));
                if at.is_err() {
                    return Ok(None);
                }
            }
            _ => {}
        }
        match self.shard(name) {
            Ok(shard) => Ok(Some(shard)),
            Err(error) if error.is_missing_object() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the files are at a URL.
    pub(crate) fn is_far(&self) -> bool {
        matches!(self.root, Root::Far { .. })
    }
}

/// The folder and the name in the URL of a file; the name can stand for several. None for a URL
/// that is not of a file.
pub(crate) fn split_file(url: &str) -> Option<(&str, &str)> {
    let (folder, name) = url.trim_end_matches('/').rsplit_once('/')?;
    let is_file = url.contains("://") && FILE_ENDINGS.iter().any(|ending| name.ends_with(ending));
    is_file.then_some((folder, name))
}

/// The files that name others, below a prefix that cannot be listed for this `reason`.
fn known(remote: &Remote, reason: &str) -> Result<Vec<Listed>> {
    let mut found = Vec::new();
    for name in KNOWN {
        match runtime().block_on(remote.facts(name)) {
            Err(error) if error.is_missing_object() => {}
            answer => found.push(answer?),
        }
    }
    if found.is_empty() {
        return Err(Error::Invalid {
            what: remote.url_of(""),
            reason: format!(
                "it cannot be listed, as servers of plain HTTP cannot, and has none of {}: name a \
                 file (.tar, .parquet, .jsonl or .csv with names of pictures) or several, as \
                 shard-{{0000..0099}}.tar ({reason})",
                KNOWN.join(", ")
            ),
        });
    }
    Ok(found)
}

/// The names below a folder, folder by folder, sorted; at most `most`.
fn names_below(root: &Path, skip: &Path, most: usize) -> Vec<String> {
    let skip = fs::canonicalize(skip).ok();
    let mut names = Vec::new();
    let mut folders = VecDeque::from([String::new()]);
    while let Some(folder) = folders.pop_front() {
        let path = root.join(&folder);
        if skip.is_some() && fs::canonicalize(&path).ok() == skip {
            continue;
        }
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            if names.len() >= most {
                break;
            }
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            if name.starts_with('.') {
                continue;
            }
            let path = join(&folder, &name);
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push_back(path);
            } else {
                names.push(path);
            }
        }
    }
    names.sort_unstable();
    names
}

/// `a-{000..012}.tar` as its names; any other name is itself.
fn expanded(name: &str) -> Vec<String> {
    let braces = name.split_once('{').and_then(|(before, rest)| {
        let (range, after) = rest.split_once('}')?;
        let (first, last) = range.split_once("..")?;
        Some((before, first, last, after))
    });
    let Some((before, first, last, after)) = braces else {
        return vec![name.to_owned()];
    };
    match (first.parse::<u32>(), last.parse::<u32>()) {
        (Ok(from), Ok(to)) if from <= to && to - from < 1_000_000 => {
            let width = first.len();
            let name = |number| format!("{before}{number:0width$}{after}");
            (from..=to).map(name).collect()
        }
        _ => vec![name.to_owned()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_stand_for_names() {
        assert_eq!(
            expanded("a-{08..10}.tar"),
            ["a-08.tar", "a-09.tar", "a-10.tar"]
        );
        for other in ["a.tar", "a-{1..}.tar", "a-{3..1}.tar", "a-{0..9"] {
            assert_eq!(expanded(other), [other]);
        }
    }
}
