//! What kind of source a place is: by `prep.source`, or by the files that are there.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    source::{
        names::{Kind, classify},
        shards::{
            files::{Files, INDEX},
            mds,
            members::is_picture,
            parquet_listing,
            tar_headers::{self, BLOCK_BYTES},
        },
    },
};

/// Files of a kind that are looked into until one is what its name says.
const NUM_TRIED: usize = 3;
/// Endings of compressed tars.
const COMPRESSED: [&str; 7] = [
    ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz",
];

/// Where pictures and their texts are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    /// What the files that are there say.
    #[default]
    Auto,
    /// Files of a folder.
    Folder,
    /// Tars, by their headers.
    WebDataset,
    /// Tars, by the index beside each, if there is one.
    Tar,
    /// Parquet files that hold the pictures.
    Parquet,
    /// Shards of MosaicML Streaming.
    Mds,
}

impl SourceKind {
    /// The value of `prep.source`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Folder => "folder",
            Self::WebDataset => "webdataset",
            Self::Tar => "tar",
            Self::Parquet => "parquet",
            Self::Mds => "mds",
        }
    }
}

/// The files of each kind in a place.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    pictures: Vec<String>,
    pub(crate) tars: Vec<String>,
    pub(crate) compressed: Vec<String>,
    pub(crate) parquets: Vec<String>,
    /// Files that can be the index of MDS.
    pub(crate) indexes: Vec<String>,
    /// Tables, which can name pictures.
    pub(crate) tables: Vec<String>,
}

impl Survey {
    /// Sorts files by their names.
    pub(crate) fn of(files: &Files) -> Self {
        let mut survey = Self::default();
        for name in &files.names {
            let lower = name.to_ascii_lowercase();
            let list = if lower.ends_with(".tar") {
                &mut survey.tars
            } else if is_compressed_tar(name) {
                &mut survey.compressed
            } else if lower.ends_with(".parquet") {
                &mut survey.parquets
            } else if lower == INDEX || lower.ends_with("/index.json") {
                &mut survey.indexes
            } else if is_picture(name) {
                &mut survey.pictures
            } else if matches!(classify(name).0, Kind::Table(_)) {
                &mut survey.tables
            } else {
                continue;
            };
            list.push(name.clone());
        }
        survey
    }

    /// The kind of the source at `place`, whose files these are.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are several kinds, or none.
    pub(crate) fn kind(&self, files: &Files, place: &Path) -> Result<SourceKind> {
        let mut kinds = Vec::new();
        if !self.pictures.is_empty() {
            kinds.push((SourceKind::Folder, &self.pictures));
        }
        if any(files, &self.tars, is_tar)? {
            kinds.push((SourceKind::Tar, &self.tars));
        }
        if any(files, &self.parquets, is_parquet)? {
            kinds.push((SourceKind::Parquet, &self.parquets));
        }
        if any(files, &self.indexes, is_mds)? {
            kinds.push((SourceKind::Mds, &self.indexes));
        }
        let wrong = |reason: String| Error::Invalid {
            what: place.display().to_string(),
            reason,
        };
        match kinds[..] {
            [(kind, _)] => Ok(kind),
            [] if !self.compressed.is_empty() => Err(wrong(compressed(&self.compressed[0]))),
            [] if files.is_far() && !(self.tables.is_empty() && self.parquets.is_empty()) => {
                Ok(SourceKind::Folder)
            }
            [] if files.is_far() || files.is_named => Err(wrong(
                "it has no pictures, no tar, no Parquet file with pictures and no index.json of \
                 MDS; docs/preparation.md lists what is read"
                    .to_owned(),
            )),
            [] => Ok(SourceKind::Folder),
            _ => Err(wrong(several(&kinds))),
        }
    }
}

/// Whether a file's name is that of a compressed tar.
pub(crate) fn is_compressed_tar(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    COMPRESSED.iter().any(|ending| lower.ends_with(ending))
}

/// What to do with a compressed tar.
pub(crate) fn compressed(name: &str) -> String {
    let command = if name.ends_with("gz") {
        "gunzip"
    } else {
        "zstd -d, bunzip2 or unxz"
    };
    format!(
        "{name} is a compressed tar, of which no member can be read without all before it: \
         decompress it once ({command}); pictures are compressed already, and it grows little"
    )
}

fn several(kinds: &[(SourceKind, &Vec<String>)]) -> String {
    let mut found = Vec::new();
    for (kind, names) in kinds {
        let (kind, num, first) = (kind.as_str(), names.len(), &names[0]);
        found.push(format!("\"{kind}\" ({num}, such as {first})"));
    }
    format!(
        "it has sources of several kinds: set prep.source to one of {}",
        found.join(", ")
    )
}

/// Whether one of the first files is what its name says.
fn any(files: &Files, names: &[String], is_it: fn(&Files, &str) -> Result<bool>) -> Result<bool> {
    for name in names.iter().take(NUM_TRIED) {
        if is_it(files, name)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_parquet(files: &Files, name: &str) -> Result<bool> {
    match files.shard(name) {
        Ok(shard) => parquet_listing::has_pictures(shard),
        Err(error @ Error::Remote { .. }) => Err(error),
        Err(_) => Ok(false),
    }
}

fn is_mds(files: &Files, name: &str) -> Result<bool> {
    match files.shard(name).and_then(|shard| mds::is_index(&shard)) {
        Err(error @ Error::Remote { .. }) => Err(error),
        answer => Ok(answer.unwrap_or(false)),
    }
}

fn is_tar(files: &Files, name: &str) -> Result<bool> {
    let first = files
        .shard(name)
        .and_then(|shard| shard.read(0..BLOCK_BYTES));
    match first {
        Ok(block) => Ok(tar_headers::is_header(&block)),
        Err(error @ Error::Remote { .. }) => Err(error),
        Err(_) => Ok(false),
    }
}
