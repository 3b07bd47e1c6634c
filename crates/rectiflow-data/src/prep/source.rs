//! The source folder: its files in a fixed order, each image with its caption sources.
//!
//! Names that begin with a dot are skipped, and so is the data set itself if it is inside. Files
//! behind a symbolic link are read, folders behind one are not. Every file that is not a caption
//! source is treated as an image: content decides. `caption` defines the sources and their
//! precedence.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
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
        let mut text = None;
        let mut remarks = Vec::new();
        for source in caption_sources(found) {
            let (reason, detail) = if text.is_some() {
                (Reason::SecondCaption, second_caption(&found.path))
            } else {
                match self.parse(&source, quality_words) {
                    Ok(parsed) => {
                        text = Some(parsed);
                        continue;
                    }
                    Err(detail) => (Reason::BadCaption, detail),
                }
            };
            remarks.push(Remark::new(self.name_of(&source), reason, detail));
        }
        (text, remarks)
    }

    /// The text of a source, which must have some.
    fn parse(
        &self,
        source: &CaptionSource,
        quality_words: &[String],
    ) -> std::result::Result<Text, String> {
        let text = match source {
            CaptionSource::Json(name) => Text::from_json(&self.read(name)?, quality_words)?,
            CaptionSource::Txt(name) => Text::from_txt(&self.read(name)?, quality_words)?,
            CaptionSource::Line(line) => Text::from_json(&self.read_line(*line)?, quality_words)?,
        };
        if text.is_empty() {
            return Err("it has no caption and no tag".to_owned());
        }
        Ok(text)
    }

    fn name_of(&self, source: &CaptionSource) -> String {
        match source {
            CaptionSource::Json(name) | CaptionSource::Txt(name) => name.clone(),
            CaptionSource::Line(line) => self.line_name(*line),
        }
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

/// A caption source of an image: a file beside it, or a line of a `metadata.jsonl`.
enum CaptionSource {
    Json(String),
    Txt(String),
    Line(Line),
}

/// The caption sources of an image in the order of their precedence.
fn caption_sources(found: &Found) -> Vec<CaptionSource> {
    let stem = stem_of(&found.path);
    let mut sources = Vec::new();
    if found.json {
        sources.push(CaptionSource::Json(format!("{stem}.json")));
    }
    if found.txt {
        sources.push(CaptionSource::Txt(format!("{stem}.txt")));
    }
    if let Some(line) = found.line {
        sources.push(CaptionSource::Line(line));
    }
    sources
}

/// The detail of a remark about a caption source that is not used for the image `path`.
fn second_caption(path: &str) -> String {
    format!("the text of {path} comes from a source with precedence")
}

fn stem_of(path: &str) -> String {
    let stem = Path::new(path).with_extension("");
    stem.to_string_lossy().into_owned()
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
    /// Names of caption files, and whether an image uses each.
    captions: BTreeMap<String, bool>,
    has_metadata: bool,
}

impl Names {
    fn add(&mut self, name: String, is_folder: bool) {
        match Path::new(&name).extension().and_then(OsStr::to_str) {
            _ if is_folder => self.entries.push((name, true)),
            Some("txt" | "json") => {
                self.captions.insert(name, false);
            }
            _ if name == METADATA_FILE => self.has_metadata = true,
            _ => self.entries.push((name, false)),
        }
    }

    /// Marks the caption file `name` as used. Returns whether it exists.
    fn use_caption(&mut self, name: &str) -> bool {
        match self.captions.get_mut(name) {
            Some(is_used) => {
                *is_used = true;
                true
            }
            None => false,
        }
    }

    /// The file `name` with the caption files beside it, which it uses.
    fn found(&mut self, name: &str, path: String) -> Found {
        let stem = stem_of(name);
        Found {
            path,
            json: self.use_caption(&format!("{stem}.json")),
            txt: self.use_caption(&format!("{stem}.txt")),
            line: None,
        }
    }
}

impl Walk<'_> {
    fn folder(&mut self, relative: &str) {
        let path = self.root.join(relative);
        if self.skip.is_some() && fs::canonicalize(&path).ok() == self.skip {
            return;
        }
        let Some(mut names) = self.names(relative, &path) else {
            return;
        };
        if names.has_metadata {
            self.metadata(relative);
        }
        for (name, is_folder) in std::mem::take(&mut names.entries) {
            let path = join(relative, &name);
            if is_folder {
                self.folder(&path);
            } else {
                let found = names.found(&name, path);
                self.source.files.push(found);
            }
        }
        for (caption, is_used) in names.captions {
            if !is_used {
                let detail = "no image has this name".to_owned();
                self.remark(join(relative, &caption), Reason::OrphanCaption, detail);
            }
        }
    }

    /// The names in a folder, sorted. None, and a remark, if it cannot be read.
    fn names(&mut self, relative: &str, path: &Path) -> Option<Names> {
        let entries = fs::read_dir(path).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
        let entries = match entries {
            Ok(entries) => entries,
            Err(error) => {
                self.remark(relative.to_owned(), Reason::Unreadable, error.to_string());
                return None;
            }
        };
        let mut names = Names::default();
        for entry in entries {
            self.sort_in(relative, &entry, &mut names);
        }
        names.entries.sort_unstable();
        Some(names)
    }

    fn sort_in(&mut self, relative: &str, entry: &fs::DirEntry, names: &mut Names) {
        let name = match entry.file_name().into_string() {
            Ok(name) => name,
            Err(name) => {
                let path = join(relative, &name.to_string_lossy());
                let detail = format!("its name is not UTF-8: {name:?}");
                return self.remark(path, Reason::UnreadableName, detail);
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
        names.add(name, is_folder);
    }

    fn remark(&mut self, path: String, reason: Reason, detail: String) {
        self.source.remarks.push(Remark::new(path, reason, detail));
    }

    /// Records every line of a folder's `metadata.jsonl`.
    fn metadata(&mut self, folder: &str) {
        let name = join(folder, METADATA_FILE);
        let (file, mut reader) = match open_twice(&self.root.join(&name)) {
            Ok(opened) => opened,
            Err(error) => return self.remark(name, Reason::Unreadable, error.to_string()),
        };
        let file_index = self.source.metadata.len() as u32;
        self.source.metadata.push((name.clone(), file));
        let mut offset = 0;
        for number in 1.. {
            // A line without an end would fill the memory.
            let mut bytes = Vec::new();
            let mut line_reader = (&mut reader).take(MAX_SOURCE_BYTES + 1);
            let len = match line_reader.read_until(b'\n', &mut bytes) {
                Ok(0) => return,
                Ok(len) => len as u64,
                Err(error) => return self.remark(name, Reason::Unreadable, error.to_string()),
            };
            if len > MAX_SOURCE_BYTES {
                let detail = format!(
                    "line {number} is longer than {MAX_SOURCE_BYTES} bytes: the rest is ignored"
                );
                return self.remark(name, Reason::BadCaption, detail);
            }
            let line = Line {
                file: file_index,
                number,
                offset,
                len: len as u32,
            };
            self.metadata_line(folder, line, &bytes);
            offset += len;
        }
    }

    /// Records a line of a folder's `metadata.jsonl`, unless it is blank.
    fn metadata_line(&mut self, folder: &str, line: Line, bytes: &[u8]) {
        if bytes.trim_ascii().is_empty() {
            return;
        }
        match named_file(bytes, folder) {
            Ok(path) => self.add_line(path, line),
            Err(detail) => self.remark(self.source.line_name(line), Reason::BadCaption, detail),
        }
    }

    /// Adds a line. The line of the nearest folder wins, and within a file the first.
    fn add_line(&mut self, path: String, line: Line) {
        let detail = second_caption(&path);
        let loser = match self.lines.entry(path) {
            Entry::Vacant(entry) => {
                entry.insert(line);
                return;
            }
            // A folder is read before its subfolders: a later file is deeper, hence nearer.
            Entry::Occupied(mut entry) if entry.get().file != line.file => entry.insert(line),
            Entry::Occupied(_) => line,
        };
        let name = self.source.line_name(loser);
        self.remark(name, Reason::SecondCaption, detail);
    }
}

fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() {
        name.to_owned()
    } else {
        format!("{folder}/{name}")
    }
}

/// A file to read from any place, and its reader.
fn open_twice(path: &Path) -> std::io::Result<(File, BufReader<File>)> {
    let file = File::open(path)?;
    let reader = BufReader::new(file.try_clone()?);
    Ok((file, reader))
}

/// The path of the image that a line names, relative to the source folder.
fn named_file(line: &[u8], folder: &str) -> std::result::Result<String, String> {
    #[derive(Deserialize)]
    struct Name {
        file_name: String,
    }
    let Name { file_name } = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    if file_name.starts_with('/') {
        return Err(format!(
            "file_name {file_name:?} is not relative to its folder"
        ));
    }
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in file_name.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err(format!("file_name {file_name:?} leads out of its folder")),
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}
