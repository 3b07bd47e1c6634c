//! Why a file of the source folder is not in the data set, or is in it with a note: the lines of
//! `rejected.jsonl` and `notes.jsonl`. A bad file ends up here and never fails the run.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs,
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::{durable, error::Result};

/// Name of the list of rejected files inside a data set.
pub const REJECTED_FILE: &str = "rejected.jsonl";
/// Name of the list of accepted files with a note.
pub const NOTES_FILE: &str = "notes.jsonl";

/// Why a file is rejected, or has a note.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The operating system cannot read it.
    Unreadable,
    /// Its name is not UTF-8, so that neither a caption source nor these lists can name it.
    UnreadableName,
    /// A folder behind a symbolic link, which could form a cycle.
    LinkedFolder,
    /// It has no bytes.
    Empty,
    /// It is longer than `max_file_mib`.
    FileTooLarge,
    /// Its first bytes are not those of an image.
    NotAnImage,
    /// It is an image of an unsupported format.
    UnsupportedFormat,
    /// Its header announces more than `max_pixels` pixels: possibly a decompression bomb.
    TooManyPixels,
    /// Its shorter side is below `min_side_px`.
    TooSmall,
    /// The shape of every bucket is further off than `max_aspect_error`.
    AspectRatio,
    /// The decoder failed or panicked: the file is truncated or damaged.
    Broken,
    /// Another file has the same bytes.
    Duplicate,
    /// `near-copies.jsonl` leaves it out.
    NearCopy,
    /// Its latents are not finite in F16.
    NotFinite,
    /// A clause of `prep.filter` removes it; the first ones of each clause are listed.
    Filtered,
    /// No caption, tag or alt-text was found for it.
    NoCaption,
    /// A caption source that cannot be used.
    BadCaption,
    /// A caption source that is not used, because the image's text comes from one with precedence.
    SecondCaption,
    /// A caption source without an image.
    OrphanCaption,
    /// A caption file, or a table, of a kind that is not read.
    UnreadKind,
    /// An archive, which has to be unpacked.
    Archive,
    /// A shard that ends in the middle.
    Truncated,
    /// A shard that is damaged or of a kind that is not read.
    BadShard,
    /// An index that says something else than its shard.
    BadIndex,
    /// Members of a shard of which nothing says which belong together.
    AmbiguousKey,
    /// A row or a group of members without a picture.
    NoPicture,
    /// (Note) Its colour profile cannot be used: it is taken as sRGB.
    IgnoredProfile,
    /// (Note) A key with text in JSON or tables that is not read: one note a key.
    UnreadKey,
    /// (Note) A string of tags without commas is read as one tag.
    UnsplitTags,
    /// (Note) A caption, or all tags together, are beyond 225 tokens: the rest is not read.
    LongCaption,
    /// (Note) A caption has the word BREAK, which is read as a word.
    BreakWord,
    /// (Note) A folder's name has kohya's repeats, which a recipe sets.
    FolderRepeats,
    /// (Note) Its JSON says that the picture is turned, and the picture does not.
    LostOrientation,
}

impl Reason {
    /// The word in `rejected.jsonl`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unreadable => "unreadable",
            Self::UnreadableName => "unreadable_name",
            Self::LinkedFolder => "linked_folder",
            Self::Empty => "empty",
            Self::FileTooLarge => "file_too_large",
            Self::NotAnImage => "not_an_image",
            Self::UnsupportedFormat => "unsupported_format",
            Self::TooManyPixels => "too_many_pixels",
            Self::TooSmall => "too_small",
            Self::AspectRatio => "aspect_ratio",
            Self::Broken => "broken",
            Self::Duplicate => "duplicate",
            Self::NearCopy => "near_copy",
            Self::NotFinite => "not_finite",
            Self::Filtered => "filtered",
            Self::NoCaption => "no_caption",
            Self::BadCaption => "bad_caption",
            Self::SecondCaption => "second_caption",
            Self::OrphanCaption => "orphan_caption",
            Self::UnreadKind => "unread_kind",
            Self::Archive => "archive",
            Self::Truncated => "truncated",
            Self::BadShard => "bad_shard",
            Self::BadIndex => "bad_index",
            Self::AmbiguousKey => "ambiguous_key",
            Self::NoPicture => "no_picture",
            Self::IgnoredProfile => "ignored_profile",
            Self::UnreadKey => "unread_key",
            Self::UnsplitTags => "unsplit_tags",
            Self::LongCaption => "long_caption",
            Self::BreakWord => "break_word",
            Self::FolderRepeats => "folder_repeats",
            Self::LostOrientation => "lost_orientation",
        }
    }
}

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The kind of fault.
    pub reason: Reason,
    /// The details, for people.
    pub detail: String,
}

impl Fault {
    /// A fault with its details.
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
        }
    }
}

/// A line of `rejected.jsonl` or `notes.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remark {
    /// The file, relative to the source folder; bytes that are not UTF-8 are replaced.
    pub path: String,
    /// Reason and detail.
    #[serde(flatten)]
    pub fault: Fault,
}

impl Remark {
    /// A remark about the file at `path`.
    pub fn new(path: impl Into<String>, reason: Reason, detail: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            fault: Fault::new(reason, detail),
        }
    }

    fn sort_key(&self) -> (&str, Reason, &str) {
        (&self.path, self.fault.reason, &self.fault.detail)
    }
}

/// The number of remarks by reason.
pub(crate) fn count(remarks: &[Remark]) -> BTreeMap<Reason, u64> {
    let mut counts = BTreeMap::new();
    for remark in remarks {
        *counts.entry(remark.fault.reason).or_default() += 1;
    }
    counts
}

/// The first remark by path of each reason.
pub(crate) fn examples<'a>(remarks: impl Iterator<Item = &'a Remark>) -> BTreeMap<Reason, Remark> {
    let mut examples = BTreeMap::<Reason, Remark>::new();
    for remark in remarks {
        match examples.entry(remark.fault.reason) {
            Entry::Vacant(entry) => {
                entry.insert(remark.clone());
            }
            Entry::Occupied(mut entry) if remark.sort_key() < entry.get().sort_key() => {
                entry.insert(remark.clone());
            }
            Entry::Occupied(_) => {}
        }
    }
    examples
}

/// Writes `remarks`, sorted by path, as the list `name` in the data set at `root`, unless the file
/// is the same already.
pub(crate) fn write(root: &Path, name: &str, remarks: &[Remark]) -> Result<()> {
    let mut remarks: Vec<&Remark> = remarks.iter().collect();
    remarks.sort_by(|a, b| a.sort_key().cmp(&b.sort_key()));
    let mut bytes = Vec::new();
    for remark in remarks {
        serde_json::to_writer(&mut bytes, remark)
            .expect("a remark is strings, and a Vec takes all bytes");
        bytes.push(b'\n');
    }
    let path = root.join(name);
    if fs::read(&path).is_ok_and(|old| old == bytes) {
        Ok(())
    } else {
        durable::write(&path, &bytes)
    }
}
