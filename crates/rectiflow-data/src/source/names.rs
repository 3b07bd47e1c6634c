//! What a file of the source folder is, by its name: endings of any case, and the conventions of
//! trainers, taggers and downloaders (`docs/preparation.md`).
//!
//! What holds no captions is a candidate for an image, whatever its ending: content decides.

use std::{collections::HashMap, path::Path};

use icu_normalizer::ComposingNormalizerBorrowed;

use crate::source::rows::Span;

/// The kind of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    /// JSON about an image, or if no image has its name, perhaps about many.
    Json,
    /// Captions of an image.
    Caption,
    /// Captions of an image, or its tags.
    Txt,
    /// Tags of an image.
    Tags,
    /// A table with a row for each image.
    Table(TableKind),
    /// A caption file of a kind that is not read.
    UnreadCaption,
    /// What another trainer has encoded.
    Latents,
    /// An archive, which has to be unpacked.
    Archive,
    /// Anything else: perhaps an image.
    Candidate,
}

/// The format of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum TableKind {
    /// A JSON object a line.
    JsonLines,
    /// Comma-separated values, or separated by semicolons or tabs, with a line of names.
    Csv,
    /// Parquet.
    Parquet,
    /// One JSON document: an object with an entry for each image, or a list of objects.
    Json,
}

/// Kinds of caption files by ending. Longer endings come first.
const ENDINGS: [(&str, Kind); 16] = [
    (".caption.txt", Kind::Caption),
    (".captions.txt", Kind::Caption),
    (".tags.txt", Kind::Tags),
    (".caption", Kind::Caption),
    (".captions", Kind::Caption),
    (".cap", Kind::Caption),
    (".json", Kind::Json),
    (".txt", Kind::Txt),
    (".text", Kind::Txt),
    (".tags", Kind::Tags),
    (".tag", Kind::Tags),
    (".jsonl", Kind::Table(TableKind::JsonLines)),
    (".ndjson", Kind::Table(TableKind::JsonLines)),
    (".csv", Kind::Table(TableKind::Csv)),
    (".tsv", Kind::Table(TableKind::Csv)),
    (".parquet", Kind::Table(TableKind::Parquet)),
];
/// Endings of caption files that are not read.
pub(crate) const UNREAD_ENDINGS: [&str; 12] = [
    ".yaml", ".yml", ".xml", ".xmp", ".arrow", ".xlsx", ".docx", ".nfo", ".json5", ".rtf", ".srt",
    ".vtt",
];
/// Endings of what other trainers encode: kohya's scripts, SimpleTuner.
const LATENTS_ENDINGS: [&str; 3] = [".npz", ".npy", ".pt"];
/// Endings of archives.
const ARCHIVE_ENDINGS: [&str; 13] = [
    ".zip", ".tar", ".tgz", ".gz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar", ".cbz",
    ".cbr",
];

/// The kind of a file, and its name without the ending of that kind.
pub(crate) fn classify(name: &str) -> (Kind, &str) {
    for (ending, kind) in ENDINGS {
        if let Some(stem) = without_ending(name, ending) {
            return (kind, stem);
        }
    }
    for (endings, kind) in [
        (&UNREAD_ENDINGS[..], Kind::UnreadCaption),
        (&LATENTS_ENDINGS[..], Kind::Latents),
        (&ARCHIVE_ENDINGS[..], Kind::Archive),
    ] {
        for ending in endings {
            if let Some(stem) = without_ending(name, ending) {
                return (kind, stem);
            }
        }
    }
    (Kind::Candidate, name)
}

/// `name` without `ending`, which can have letters of any case. None if nothing is left.
fn without_ending<'a>(name: &'a str, ending: &str) -> Option<&'a str> {
    let len = name.len().checked_sub(ending.len())?;
    let (stem, end) = name.split_at_checked(len)?;
    (!stem.is_empty() && end.eq_ignore_ascii_case(ending)).then_some(stem)
}

/// One spelling for names that differ in case or in how accents are composed (macOS composes
/// nothing).
pub(crate) fn folded(name: &str) -> String {
    let composed = ComposingNormalizerBorrowed::new_nfc().normalize(name);
    composed.to_lowercase()
}

/// A name or path without its last ending.
pub(crate) fn stem_of(path: &str) -> String {
    let stem = Path::new(path).with_extension("");
    stem.to_string_lossy().into_owned()
}

/// A caption file beside images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sidecar {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    /// Where it is in a shard. None for a file of its own.
    pub(crate) span: Option<Span>,
}

/// The caption files of a folder, by the name of the image that they belong to.
#[derive(Debug, Default)]
pub(crate) struct Sidecars {
    files: Vec<Sidecar>,
    is_used: Vec<bool>,
    by_stem: HashMap<String, Vec<usize>>,
}

impl Sidecars {
    /// Adds a file whose name without the ending of its kind is `stem`.
    pub(crate) fn add(&mut self, kind: Kind, stem: &str, name: &str) {
        let index = self.files.len();
        self.files.push(Sidecar {
            kind,
            name: name.to_owned(),
            span: None,
        });
        self.is_used.push(false);
        self.by_stem.entry(stem.to_owned()).or_default().push(index);
    }

    /// The caption files of each image of `images`, in the order of precedence. A file belongs to
    /// the images with its stem, and to those with its stem in other letters if there are none.
    pub(crate) fn assign(&mut self, images: &[&str]) -> Vec<Vec<Sidecar>> {
        let mut found = Vec::with_capacity(images.len());
        for image in images {
            let mut own = Vec::new();
            for stem in stems_of(image) {
                own.extend_from_slice(self.by_stem.get(&stem).map_or(&[], Vec::as_slice));
            }
            found.push(own);
        }
        for &index in found.iter().flatten() {
            self.is_used[index] = true;
        }

        // The rest, by names in other letters.
        let left = self.unused_by_folded_stem();
        if !left.is_empty() {
            for (image, own) in images.iter().zip(&mut found) {
                for stem in stems_of(image) {
                    own.extend_from_slice(left.get(&folded(&stem)).map_or(&[], Vec::as_slice));
                }
                own.sort_unstable();
                own.dedup();
            }
            for &index in found.iter().flatten() {
                self.is_used[index] = true;
            }
        }
        found.iter().map(|own| self.in_order(own)).collect()
    }

    fn unused_by_folded_stem(&self) -> HashMap<String, Vec<usize>> {
        let mut left = HashMap::<String, Vec<usize>>::new();
        for (stem, files) in &self.by_stem {
            for &index in files {
                if !self.is_used[index] {
                    left.entry(folded(stem)).or_default().push(index);
                }
            }
        }
        left
    }

    /// Files in the order of precedence: by kind, and in a kind the shorter name first.
    fn in_order(&self, indices: &[usize]) -> Vec<Sidecar> {
        let mut files: Vec<Sidecar> = Vec::with_capacity(indices.len());
        for &index in indices {
            files.push(self.files[index].clone());
        }
        files.sort_by(|a, b| (a.kind, a.name.len(), &a.name).cmp(&(b.kind, b.name.len(), &b.name)));
        files
    }

    /// Files that no image uses, by name.
    pub(crate) fn unused(self) -> Vec<Sidecar> {
        let mut unused = Vec::new();
        for (file, is_used) in self.files.into_iter().zip(self.is_used) {
            if !is_used {
                unused.push(file);
            }
        }
        unused.sort_by(|a, b| a.name.cmp(&b.name));
        unused
    }
}

/// The stems that caption files of an image have: its name without its ending, and its whole name.
fn stems_of(image: &str) -> [String; 2] {
    [stem_of(image), image.to_owned()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endings_of_any_case_say_what_a_file_is() {
        for (name, kind, stem) in [
            ("a.json", Kind::Json, "a"),
            ("IMG_1.JSON", Kind::Json, "IMG_1"),
            ("a.jpg.json", Kind::Json, "a.jpg"),
            ("a.caption", Kind::Caption, "a"),
            ("a.Caption.TXT", Kind::Caption, "a"),
            ("a.jpg.caption", Kind::Caption, "a.jpg"),
            ("a.txt", Kind::Txt, "a"),
            ("a.b.TXT", Kind::Txt, "a.b"),
            ("a.tags", Kind::Tags, "a"),
            ("a.jpg.tags.txt", Kind::Tags, "a.jpg"),
            (
                "metadata.jsonl",
                Kind::Table(TableKind::JsonLines),
                "metadata",
            ),
            ("Metadata.CSV", Kind::Table(TableKind::Csv), "Metadata"),
            ("train.parquet", Kind::Table(TableKind::Parquet), "train"),
            ("a.yaml", Kind::UnreadCaption, "a"),
            ("a_1024x1024_sdxl.npz", Kind::Latents, "a_1024x1024_sdxl"),
            ("set.tar.gz", Kind::Archive, "set.tar"),
            ("a.ZIP", Kind::Archive, "a"),
            ("a.png", Kind::Candidate, "a.png"),
            ("txt", Kind::Candidate, "txt"),
            ("é", Kind::Candidate, "é"),
            ("日本.txt", Kind::Txt, "日本"),
            (".json", Kind::Candidate, ".json"),
        ] {
            assert_eq!(classify(name), (kind, stem), "{name}");
        }
    }

    /// The names of the caption files of each image.
    fn assigned(files: &[&str], images: &[&str]) -> (Vec<Vec<String>>, Vec<String>) {
        let mut sidecars = Sidecars::default();
        for name in files {
            let (kind, stem) = classify(name);
            sidecars.add(kind, stem, name);
        }
        let names = |files: Vec<Sidecar>| files.into_iter().map(|file| file.name).collect();
        let found = sidecars.assign(images).into_iter().map(names).collect();
        (found, names(sidecars.unused()))
    }

    #[test]
    fn caption_files_find_their_image() {
        for (files, images, expected, unused) in [
            (
                vec!["a.txt", "a.json"],
                vec!["a.png"],
                vec![vec!["a.json", "a.txt"]],
                vec![],
            ),
            (
                vec!["a.tags", "a.txt", "a.caption"],
                vec!["a.png"],
                vec![vec!["a.caption", "a.txt", "a.tags"]],
                vec![],
            ),
            (
                vec!["a.jpg.txt", "a.txt"],
                vec!["a.jpg"],
                vec![vec!["a.txt", "a.jpg.txt"]],
                vec![],
            ),
            (
                vec!["IMG_1.TXT"],
                vec!["IMG_1.JPG"],
                vec![vec!["IMG_1.TXT"]],
                vec![],
            ),
            (
                vec!["img_1.txt"],
                vec!["IMG_1.JPG"],
                vec![vec!["img_1.txt"]],
                vec![],
            ),
            // Names in the same letters come first.
            (
                vec!["a.txt", "A.txt"],
                vec!["A.png", "a.png"],
                vec![vec!["A.txt"], vec!["a.txt"]],
                vec![],
            ),
            (
                vec!["a.txt"],
                vec!["A.png", "a.png"],
                vec![vec![], vec!["a.txt"]],
                vec![],
            ),
            (
                vec!["a.txt"],
                vec!["a.png", "a.jpg"],
                vec![vec!["a.txt"], vec!["a.txt"]],
                vec![],
            ),
            (
                vec!["b.txt", "a.b.txt"],
                vec!["a.png"],
                vec![vec![]],
                vec!["a.b.txt", "b.txt"],
            ),
            // "é" in one letter and in two.
            (
                vec!["\u{e9}.txt"],
                vec!["e\u{301}.png"],
                vec![vec!["\u{e9}.txt"]],
                vec![],
            ),
        ] {
            let (found, left) = assigned(&files, &images);
            assert_eq!(found, expected, "{files:?}");
            assert_eq!(left, unused, "{files:?}");
        }
    }
}
