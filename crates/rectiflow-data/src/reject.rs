//! Why a file of the prepared folder is not in the data set, or is with a remark: the lines of `rejected.jsonl` and
//! `notes.jsonl`. Whatever a file does, it ends here and not as an error of the run.

use std::{collections::BTreeMap, fs, path::Path};

use serde::{Deserialize, Serialize};

use crate::{durable, error::Result};

/// Name of the list of rejected files inside a data set.
pub const REJECTED_FILE: &str = "rejected.jsonl";
/// Name of the list of files that were kept with a remark.
pub const NOTES_FILE: &str = "notes.jsonl";

/// Why a file was rejected, or what was remarkable about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The operating system would not let it be read.
    Unreadable,
    /// Its name is not UTF-8, so no caption file and no line of ours could name it.
    UnreadableName,
    /// A folder reached through a symbolic link, which could lead round in a circle.
    LinkedFolder,
    /// It has no bytes.
    Empty,
    /// It is longer than `max_file_mib`.
    FileTooLarge,
    /// Its first bytes are not those of an image.
    NotAnImage,
    /// It is an image of a kind that is not read.
    UnsupportedFormat,
    /// Its header announces more than `max_pixels`: a decompression bomb, perhaps.
    TooManyPixels,
    /// Its shorter side is below `min_side_px`.
    TooSmall,
    /// No bucket has a similar enough shape: `max_aspect_error`.
    AspectRatio,
    /// The decoder refused it, gave up or crashed: truncated or damaged.
    Broken,
    /// Another file has the same bytes.
    Duplicate,
    /// The VAE made something of it that is not a finite number in F16.
    NotFinite,
    /// No caption, tag or alt-text was found for it.
    NoCaption,
    /// A caption source that cannot be used.
    BadCaption,
    /// A caption source that was not needed, because one that comes first has the image's text.
    SecondCaption,
    /// A caption source without an image.
    OrphanCaption,
    /// (Note) Its colour profile cannot be used: taken as sRGB.
    IgnoredProfile,
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
            Self::NotFinite => "not_finite",
            Self::NoCaption => "no_caption",
            Self::BadCaption => "bad_caption",
            Self::SecondCaption => "second_caption",
            Self::OrphanCaption => "orphan_caption",
            Self::IgnoredProfile => "ignored_profile",
        }
    }
}

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The kind of fault.
    pub reason: Reason,
    /// The particulars, for people.
    pub detail: String,
}

impl Fault {
    /// A fault.
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }
}

/// A line of `rejected.jsonl` or `notes.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remark {
    /// The file, relative to the prepared folder; bytes that are not UTF-8 are replaced.
    pub path: String,
    /// Reason and detail.
    #[serde(flatten)]
    pub fault: Fault,
}

impl Remark {
    /// A remark about the file at `path`.
    pub fn new(path: impl Into<String>, reason: Reason, detail: impl Into<String>) -> Self {
        Self { path: path.into(), fault: Fault::new(reason, detail) }
    }
}

/// Remarks by reason.
pub(crate) fn count(remarks: &[Remark]) -> BTreeMap<Reason, u64> {
    let mut counts = BTreeMap::new();
    for remark in remarks {
        *counts.entry(remark.fault.reason).or_default() += 1;
    }
    counts
}

/// Replaces the list `name` in the data set at `root` by `remarks`, in order of path; not if it is the same.
pub(crate) fn write(root: &Path, name: &str, remarks: &[Remark]) -> Result<()> {
    let mut remarks: Vec<&Remark> = remarks.iter().collect();
    remarks.sort_by(|a, b| (&a.path, a.fault.reason, &a.fault.detail).cmp(&(&b.path, b.fault.reason, &b.fault.detail)));
    let mut bytes = Vec::new();
    for remark in remarks {
        serde_json::to_writer(&mut bytes, remark).expect("a remark is strings, and memory takes all");
        bytes.push(b'\n');
    }
    let path = root.join(name);
    if fs::read(&path).is_ok_and(|old| old == bytes) { Ok(()) } else { durable::write(&path, &bytes) }
}
