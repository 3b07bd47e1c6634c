//! The files of a folder of pictures, on a disk or at a URL.
//!
//! At a URL each picture and each caption file is a request. Tables are read more than once and at
//! any place, so they are copied to this machine while the source is listed.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use tempfile::TempDir;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    error::{Error, Result},
    reject::{Fault, Reason},
    remote::{Location, Remote, listing::Listed, network::Network, runtime},
    source::{sample::Place, shards::files::split_file},
    text_file,
};

/// Bytes of a request for a part of a table.
const PART_BYTES: u64 = 16 << 20;
/// Bytes of the longest picture that a preparation can allow.
const MOST_BYTES: u64 = 1 << 36;

/// A folder of files.
#[derive(Debug)]
pub(crate) struct Tree {
    root: Root,
}

#[derive(Debug)]
enum Root {
    Local(PathBuf),
    Far {
        remote: Remote,
        /// What the store said when it listed the objects, by name. Empty if it lists none.
        listed: Vec<Listed>,
        /// A folder on this machine for copies of tables, and their names.
        copies: Option<(TempDir, HashMap<String, PathBuf>)>,
    },
}

impl Tree {
    /// The folder at `place`, or at a URL of a file the one that it is in. Copies of tables are
    /// kept in a folder in `work`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a URL of another kind; [`Error::Io`] if `work` cannot be written.
    pub(crate) fn at(place: &Path, work: &Path) -> Result<Self> {
        let url = place.to_string_lossy();
        let folder = split_file(&url).map_or(place, |(folder, _)| Path::new(folder));
        let root = match Location::parse(place, &Network::default())? {
            Location::Folder(path) => Root::Local(path),
            Location::Remote(_) => {
                let Location::Remote(remote) = Location::parse(folder, &Network::default())? else {
                    unreachable!("the folder of a URL is a URL");
                };
                let copies = tempfile::tempdir_in(work).map_err(Error::io(work))?;
                Root::Far {
                    remote,
                    listed: Vec::new(),
                    copies: Some((copies, HashMap::new())),
                }
            }
        };
        Ok(Self { root })
    }

    /// Whether each file is a request.
    pub(crate) fn is_far(&self) -> bool {
        matches!(self.root, Root::Far { .. })
    }

    /// The folder, if it is on this machine.
    pub(crate) fn local(&self) -> Option<&Path> {
        match &self.root {
            Root::Local(root) => Some(root),
            Root::Far { .. } => None,
        }
    }

    /// The URL of the folder, if it is at one.
    pub(crate) fn url(&self) -> Option<String> {
        match &self.root {
            Root::Local(_) => None,
            Root::Far { remote, .. } => Some(remote.url_of("")),
        }
    }

    /// Remembers what the store said about its objects, which are in the order of their names.
    pub(crate) fn remember(&mut self, objects: Vec<Listed>) {
        if let Root::Far { listed, .. } = &mut self.root {
            *listed = objects;
        }
    }

    /// Forgets what only a listing needs, copies of tables too.
    pub(crate) fn forget(&mut self) {
        if let Root::Far { listed, copies, .. } = &mut self.root {
            *listed = Vec::new();
            *copies = None;
        }
    }

    /// The place of a picture.
    pub(crate) fn place_of(&self, path: &str) -> Place {
        let Root::Far { listed, .. } = &self.root else {
            return Place::File;
        };
        let at = listed.binary_search_by(|object| object.name.as_str().cmp(path));
        let (bytes, version) = at.map_or((0, 0), |at| {
            let object = &listed[at];
            (object.bytes, short(object.version))
        });
        Place::Object { bytes, version }
    }

    /// The path on this machine of a table: its own, or that of a copy.
    ///
    /// # Errors
    /// [`Error::Remote`] if it cannot be read, [`Error::Io`] if the copy cannot be written.
    pub(crate) fn on_disk(&mut self, path: &str) -> Result<PathBuf> {
        let (remote, copies) = match &mut self.root {
            Root::Local(root) => return Ok(root.join(path)),
            Root::Far { remote, copies, .. } => (remote, copies),
        };
        let (folder, known) = copies.as_mut().expect("tables are read during the listing");
        if let Some(copy) = known.get(path) {
            return Ok(copy.clone());
        }
        let copy = folder.path().join(known.len().to_string());
        copy_object(remote, path, &copy)?;
        known.insert(path.to_owned(), copy.clone());
        Ok(copy)
    }

    /// Reads a picture.
    ///
    /// # Errors
    /// Why it cannot be read.
    pub(crate) fn read(&self, path: &str) -> std::result::Result<Vec<u8>, Fault> {
        let bytes = match &self.root {
            Root::Local(root) => fs::read(root.join(path)).map_err(|error| error.to_string()),
            Root::Far { remote, .. } => match runtime().block_on(remote.read_all(path, MOST_BYTES))
            {
                Ok(bytes) => Ok(bytes.into()),
                Err(error) => Err(error.to_string()),
            },
        };
        bytes.map_err(|reason| Fault::new(Reason::Unreadable, reason))
    }

    /// Reads a text of at most `limit` bytes.
    ///
    /// # Errors
    /// Why it cannot be read.
    pub(crate) fn text(&self, path: &str, limit: u64) -> std::result::Result<Vec<u8>, String> {
        match &self.root {
            Root::Local(root) => {
                text_file::bytes(&root.join(path), limit).map_err(|error| error.to_string())
            }
            Root::Far { remote, .. } => match runtime().block_on(remote.read_all(path, limit)) {
                Ok(bytes) => Ok(bytes.into()),
                Err(error) => Err(error.to_string()),
            },
        }
    }

    /// Length and version of an object that no listing has.
    ///
    /// # Errors
    /// Why the store does not say.
    pub(crate) fn ask(&self, path: &str) -> std::result::Result<(u64, u64), Fault> {
        let Root::Far { remote, .. } = &self.root else {
            unreachable!("objects are at a URL");
        };
        match runtime().block_on(remote.facts(path)) {
            Ok(object) => Ok((object.bytes, short(object.version))),
            Err(error) => Err(Fault::new(Reason::Unreadable, error.to_string())),
        }
    }
}

/// A version in 64 bits; 0 stands for one that is not known.
fn short(version: u128) -> u64 {
    xxh3_64(&version.to_le_bytes()) | 1
}

/// Copies an object to a file, part by part.
fn copy_object(remote: &Remote, name: &str, path: &Path) -> Result<()> {
    let bytes = runtime().block_on(remote.len(name))?;
    let mut file = File::create(path).map_err(Error::io(path))?;
    let mut at = 0;
    while at < bytes {
        let end = bytes.min(at + PART_BYTES);
        let part = runtime().block_on(remote.read_range(name, at..end, Ok))?;
        file.write_all(&part).map_err(Error::io(path))?;
        at = end;
    }
    Ok(())
}
