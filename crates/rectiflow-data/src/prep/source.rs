//! The source folder: its files in a fixed order, each image with its caption sources.
//!
//! Names that begin with a dot are skipped, and so is the data set itself if it is inside. Files
//! behind a symbolic link are read, folders behind one are not. Every file that is not a caption
//! source is treated as an image: content decides. `caption` defines the sources and their
//! precedence.

use std::{
    collections::{BTreeMap, HashMap, HashSet, hash_map::Entry},
    ffi::OsStr,
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    error::{Error, Result},
    reject::{Reason, Remark},
    text::caption::{MAX_SOURCE_BYTES, Text},
};

const METADATA_FILE: &str = "metadata.jsonl";

/// A file that can be an image, and its caption sources.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// Relative to the source folder, with `/` between its parts.
    pub(crate) path: String,
    json: bool,
    txt: bool,
    line: Option<Line>,
}

/// A line of a `metadata.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Line {
    file: u32,
    number: u32,
    offset: u64,
    len: u32,
}

/// The files of a folder.
#[derive(Debug)]
pub(crate) struct Source {
    root: PathBuf,
    /// In the order of the walk: by name in each folder, subfolders in their place among the files.
    pub(crate) files: Vec<Found>,
    /// Remarks about names, links and caption sources.
    pub(crate) remarks: Vec<Remark>,
    metadata: Vec<(String, File)>,
}

impl Source {
    /// Lists the folder `root`, without the data set in `out`.
    ///
    /// # Errors
    /// [`Error::Io`] if `root` itself cannot be read; an error deeper down becomes a remark.
    pub(crate) fn list(root: &Path, out: &Path) -> Result<Self> {
        fs::read_dir(root).map_err(Error::io(root))?;
        let skip = fs::canonicalize(out).ok();
        let mut walk = Walk {
            root,
            skip,
            source: Self::empty(root),
            lines: HashMap::new(),
        };
        walk.folder("");
        let Walk {
            mut source,
            mut lines,
            ..
        } = walk;
        for found in &mut source.files {
            found.line = lines.remove(&found.path);
        }
        for (path, line) in lines.into_iter().collect::<BTreeMap<_, _>>() {
            let detail = format!("it names {path:?}, which does not exist");
            source.remarks.push(Remark::new(
                source.line_name(line),
                Reason::OrphanCaption,
                detail,
            ));
        }
        Ok(source)
    }

    fn empty(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            files: Vec::new(),
            remarks: Vec::new(),
            metadata: Vec::new(),
        }
    }

    /// The full path of a listed file.
    pub(crate) fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    /// The text of an image, if it has any, and remarks about its caption sources.
    pub(crate) fn text(
        &self,
        found: &Found,
        quality_words: &[String],
    ) -> (Option<Text>, Vec<Remark>) {
        let stem = Path::new(&found.path).with_extension("");
        let beside = |extension: &str| format!("{}.{extension}", stem.to_string_lossy());
        let (mut text, mut remarks) = (None, Vec::new());
        let mut offer = |name: String, read: &dyn Fn(&str) -> std::result::Result<Text, String>| {
            if text.is_some() {
                let detail = format!(
                    "the text of {} comes from a source with precedence",
                    found.path
                );
                return remarks.push(Remark::new(name, Reason::SecondCaption, detail));
            }
            match read(&name) {
                Ok(found) if found.is_empty() => {
                    remarks.push(Remark::new(
                        name,
                        Reason::BadCaption,
                        "it has no caption and no tag",
                    ));
                }
                Ok(found) => text = Some(found),
                Err(detail) => remarks.push(Remark::new(name, Reason::BadCaption, detail)),
            }
        };
        if found.json {
            offer(beside("json"), &|name| {
                Text::from_json(&self.read(name)?, quality_words)
            });
        }
        if found.txt {
            offer(beside("txt"), &|name| {
                Text::from_txt(&self.read(name)?, quality_words)
            });
        }
        if let Some(line) = found.line {
            offer(self.line_name(line), &|_| {
                Text::from_json(&self.read_line(line)?, quality_words)
            });
        }
        (text, remarks)
    }

    fn read(&self, relative: &str) -> std::result::Result<Vec<u8>, String> {
        let file = File::open(self.path(relative)).map_err(|error| error.to_string())?;
        let mut bytes = Vec::new();
        file.take(MAX_SOURCE_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| error.to_string())?;
        if bytes.len() as u64 > MAX_SOURCE_BYTES {
            return Err(format!("it is longer than {MAX_SOURCE_BYTES} bytes"));
        }
        Ok(bytes)
    }

    fn read_line(&self, line: Line) -> std::result::Result<Vec<u8>, String> {
        let mut bytes = vec![0; line.len as usize];
        let file = &self.metadata[line.file as usize].1;
        file.read_exact_at(&mut bytes, line.offset)
            .map_err(|error| error.to_string())?;
        Ok(bytes)
    }

    fn line_name(&self, line: Line) -> String {
        format!("{}:{}", self.metadata[line.file as usize].0, line.number)
    }
}

struct Walk<'a> {
    root: &'a Path,
    /// The data set's own folder.
    skip: Option<PathBuf>,
    source: Source,
    /// Lines of `metadata.jsonl` files, by the path of the image.
    lines: HashMap<String, Line>,
}

/// The names in one folder, by kind.
#[derive(Default)]
struct Names {
    /// Each name, and whether it is a folder.
    entries: Vec<(String, bool)>,
    captions: HashSet<String>,
    has_metadata: bool,
}

impl Walk<'_> {
    fn folder(&mut self, relative: &str) {
        let path = self.root.join(relative);
        if self.skip.is_some() && fs::canonicalize(&path).ok() == self.skip {
            return;
        }
        let entries =
            match fs::read_dir(&path).and_then(Iterator::collect::<std::io::Result<Vec<_>>>) {
                Ok(entries) => entries,
                Err(error) => {
                    return self.remark(relative.to_owned(), Reason::Unreadable, error.to_string());
                }
            };
        let mut names = Names::default();
        for entry in entries {
            self.sort_in(relative, &entry, &mut names);
        }
        names.entries.sort_unstable();
        if names.has_metadata {
            self.metadata(relative);
        }
        let mut used = HashSet::new();
        for (name, is_folder) in names.entries {
            let path = join(relative, &name);
            if is_folder {
                self.folder(&path);
                continue;
            }
            let stem = Path::new(&name)
                .with_extension("")
                .to_string_lossy()
                .into_owned();
            let mut has = |extension: &str| {
                let caption = format!("{stem}.{extension}");
                let has = names.captions.contains(&caption);
                if has {
                    used.insert(caption);
                }
                has
            };
            let (json, txt) = (has("json"), has("txt"));
            self.source.files.push(Found {
                path,
                json,
                txt,
                line: None,
            });
        }
        let mut orphans: Vec<String> = names.captions.difference(&used).cloned().collect();
        orphans.sort_unstable();
        for orphan in orphans {
            self.remark(
                join(relative, &orphan),
                Reason::OrphanCaption,
                "no image has this name".to_owned(),
            );
        }
    }

    fn sort_in(&mut self, relative: &str, entry: &fs::DirEntry, names: &mut Names) {
        let name = match entry.file_name().into_string() {
            Ok(name) => name,
            Err(name) => {
                let path = join(relative, &name.to_string_lossy());
                return self.remark(
                    path,
                    Reason::UnreadableName,
                    format!("its name is not UTF-8: {name:?}"),
                );
            }
        };
        if name.starts_with('.') {
            return;
        }
        // A dangling link counts as a file, which the scan finds unreadable.
        let is_folder = fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_dir());
        if is_folder && entry.file_type().is_ok_and(|kind| kind.is_symlink()) {
            let detail = "folders behind symbolic links are not entered".to_owned();
            return self.remark(join(relative, &name), Reason::LinkedFolder, detail);
        }
        match Path::new(&name).extension().and_then(OsStr::to_str) {
            _ if is_folder => names.entries.push((name, true)),
            Some("txt" | "json") => {
                names.captions.insert(name);
            }
            _ if name == METADATA_FILE => names.has_metadata = true,
            _ => names.entries.push((name, false)),
        }
    }

    fn remark(&mut self, path: String, reason: Reason, detail: String) {
        self.source.remarks.push(Remark::new(path, reason, detail));
    }

    /// Records every line of a folder's `metadata.jsonl`.
    fn metadata(&mut self, folder: &str) {
        let name = join(folder, METADATA_FILE);
        let file = match File::open(self.root.join(&name)) {
            Ok(file) => file,
            Err(error) => return self.remark(name, Reason::Unreadable, error.to_string()),
        };
        let index = self.source.metadata.len() as u32;
        let mut reader = match file.try_clone() {
            Ok(clone) => BufReader::new(clone),
            Err(error) => return self.remark(name, Reason::Unreadable, error.to_string()),
        };
        self.source.metadata.push((name.clone(), file));
        let (mut offset, mut number) = (0, 0);
        loop {
            let mut bytes = Vec::new();
            let read = (&mut reader)
                .take(MAX_SOURCE_BYTES + 1)
                .read_until(b'\n', &mut bytes);
            number += 1;
            match read {
                Ok(0) => return,
                Err(error) => return self.remark(name, Reason::Unreadable, error.to_string()),
                Ok(len) if len as u64 > MAX_SOURCE_BYTES => {
                    let detail = format!(
                        "line {number} is longer than {MAX_SOURCE_BYTES} bytes: the rest is ignored"
                    );
                    return self.remark(name, Reason::BadCaption, detail);
                }
                Ok(_) if bytes.trim_ascii().is_empty() => {}
                Ok(len) => {
                    let line = Line {
                        file: index,
                        number,
                        offset,
                        len: len as u32,
                    };
                    match named_file(&bytes, folder) {
                        Ok(path) => self.add_line(path, line),
                        Err(detail) => {
                            self.remark(format!("{name}:{number}"), Reason::BadCaption, detail)
                        }
                    }
                }
            }
            offset += bytes.len() as u64;
        }
    }

    /// Adds a line. The line of the nearest folder wins, and within a file the first.
    fn add_line(&mut self, path: String, line: Line) {
        let loser = match self.lines.entry(path.clone()) {
            Entry::Vacant(entry) => {
                entry.insert(line);
                return;
            }
            // A folder is read before its subfolders: a later file is deeper, hence nearer.
            Entry::Occupied(mut entry) if entry.get().file != line.file => entry.insert(line),
            Entry::Occupied(_) => line,
        };
        let name = self.source.line_name(loser);
        self.remark(
            name,
            Reason::SecondCaption,
            format!("the text of {path} comes from a source with precedence"),
        );
    }
}

fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() {
        name.to_owned()
    } else {
        format!("{folder}/{name}")
    }
}

/// The path of the image that a line names, relative to the source folder.
fn named_file(line: &[u8], folder: &str) -> std::result::Result<String, String> {
    #[derive(Deserialize)]
    struct Name {
        file_name: String,
    }
    let name: Name = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    if name.file_name.starts_with('/') {
        return Err(format!(
            "file_name {:?} is not relative to its folder",
            name.file_name
        ));
    }
    for part in name.file_name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                return Err(format!(
                    "file_name {:?} leads out of its folder",
                    name.file_name
                ));
            }
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}
