//! The source folder: its files in a fixed order, each image with its caption sources.
//!
//! Names that begin with a dot are skipped, and so is the data set itself if it is inside. Files
//! behind a symbolic link are read, folders behind one are not. `names` says what a file is;
//! whatever is no caption source can be an image: content decides.
//!
//! Sources of an image, in the order of precedence:
//! 1. JSON beside it: `name.json`, `name.png.json`;
//! 2. captions beside it: `name.caption`;
//! 3. text beside it: `name.txt`, the whole file is one caption;
//! 4. tags beside it: `name.tags`;
//! 5. rows of tables that name it, in its folder or one above it: the nearest folder first, in a
//!    folder `metadata.jsonl`, `metadata.csv` and `metadata.parquet` before other tables;
//! 6. the row of a table of an image board that has its number or hash (`boards`).
//!
//! Captions come from the first source with a caption, tags from the first with tags. What another
//! source says differently is listed in `rejected.jsonl`.

pub(crate) mod boards;
#[cfg(test)]
mod mutated;
pub(crate) mod named_path;
pub(crate) mod names;
pub mod no_folder;
pub(crate) mod parquet_rows;
pub(crate) mod rows;
pub(crate) mod table;
pub(crate) mod walk;

use std::{
    cmp::Reverse,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{
    board::post::Post,
    error::{Error, Result},
    reject::{Fault, Reason, Remark},
    source::{
        boards::{BoardSettings, Boards, Size, named_tables, take_tables},
        named_path::{Finder, Root},
        names::{Kind, Sidecar, TableKind, classify, stem_of},
        rows::{Contents, Row, RowFile, Rows, Span},
        walk::{TableFile, Walk, join},
    },
    text::{
        caption::{MAX_SOURCE_BYTES, Reading, Text, TxtFiles, clean},
        keys::{self, Description},
        tag_list,
    },
    text_file,
};

/// A file that can be an image, and its caption sources.
#[derive(Debug)]
pub(crate) struct Found {
    /// Relative to the source folder, with `/` between its parts.
    pub(crate) path: String,
    sidecars: Box<[Sidecar]>,
    lines: Vec<Line>,
}

/// A row of a table, in the order of precedence.
#[derive(Debug, Clone, Copy)]
struct Line {
    table: u32,
    number: u64,
    span: Span,
}

/// A table of metadata: its path, and the file with its rows as JSON.
#[derive(Debug)]
struct Table {
    path: String,
    file: Option<File>,
}

/// The files of a folder.
#[derive(Debug)]
pub(crate) struct Source {
    root: PathBuf,
    reading: Reading,
    /// In the order of the walk: by name in each folder, subfolders in their place among the files.
    pub(crate) files: Vec<Found>,
    /// Remarks about names, links and caption sources.
    pub(crate) remarks: Vec<Remark>,
    tables: Vec<Table>,
    /// The rows of tables that are not JSON lines.
    rows: File,
    /// Tables of image boards, and the filter.
    pub(crate) boards: Boards,
}

/// The text of an image, and what was found on the way.
#[derive(Debug, Default)]
pub(crate) struct Texts {
    /// None if no source has text.
    pub(crate) text: Option<Text>,
    /// Remarks about caption sources that are not used.
    pub(crate) remarks: Vec<Remark>,
    /// Keys with text that are not read.
    pub(crate) unread: Vec<String>,
    /// Notes about the image, which is used all the same.
    pub(crate) notes: Vec<Fault>,
    /// How a source says that the image lies, if not upright.
    pub(crate) orientation: Option<String>,
    /// The row of a table of an image board.
    pub(crate) post: Option<Post>,
}

/// A source of an image that was read.
struct Parsed {
    name: String,
    kind: Kind,
    description: Description,
}

impl Source {
    /// Lists the folder `root`, without the data set in `out`, where rows of tables are kept.
    ///
    /// # Errors
    /// [`Error::Io`] if `root` itself cannot be read; an error deeper down becomes a remark.
    /// [`Error::Invalid`] if a table that the settings name, or the filter, cannot be used.
    pub(crate) fn list(
        root: &Path,
        out: &Path,
        reading: Reading,
        settings: &BoardSettings<'_>,
    ) -> Result<Self> {
        fs::read_dir(root).map_err(Error::io(root))?;
        let mut walk = Walk::over(root, out);
        let mut board_tables = named_tables(root, settings)?;
        take_tables(&mut walk, &mut board_tables);
        let Walk {
            images,
            mut tables,
            mut remarks,
            ..
        } = walk;
        tables.sort_by_cached_key(precedence);
        let work = out.join("prep");
        let row_file = RowFile::create(&work).map_err(Error::io(&work))?;
        let mut reader = TableReader {
            root: Root::new(root),
            folder: root,
            finder: Finder::new(images.iter().map(|image| image.path.as_str()).collect()),
            row_file,
            lines: vec![Vec::new(); images.len()],
            tables: Vec::new(),
            remarks: Vec::new(),
        };
        for table in &tables {
            reader.read(table);
        }
        let TableReader {
            row_file,
            lines,
            tables,
            remarks: table_remarks,
            ..
        } = reader;
        let mut files = Vec::with_capacity(images.len());
        remarks.extend(table_remarks);
        for (image, lines) in images.into_iter().zip(lines) {
            files.push(Found {
                path: image.path,
                sidecars: image.sidecars.into(),
                lines,
            });
        }
        let names = files.iter().map(|found| found.path.as_str());
        let boards = Boards::open(board_tables, names, &work, settings, &mut remarks)?;
        Ok(Self {
            root: root.to_owned(),
            reading,
            files,
            remarks,
            tables,
            rows: row_file.finish().map_err(Error::io(&work))?,
            boards,
        })
    }

    /// The full path of a listed file.
    pub(crate) fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    /// The text of an image, if it has any, and remarks about its caption sources.
    pub(crate) fn text(&self, found: &Found) -> Texts {
        let mut texts = Texts::default();
        let mut parsed = self.parse_all(found, &mut texts.remarks);
        texts.post = self.boards.post(&found.path, &mut texts.remarks);
        if let Some(post) = &texts.post {
            parsed.extend(self.parse_post(post));
        }
        let is_list = self.lists_of_tags(&parsed);
        let mut all = Text::default();
        for (source, is_list) in parsed.into_iter().zip(is_list) {
            let Description {
                mut text,
                unread,
                unsplit_tags,
                orientation,
            } = source.description;
            texts.unread.extend(unread);
            texts.orientation = texts.orientation.or(orientation);
            if let Some(tags) = unsplit_tags {
                texts.notes.push(unsplit(&source.name, &tags));
            }
            if is_list {
                text = self.as_tags(&text);
            }
            if !all.absorb(text, &self.reading) {
                let detail = second_caption(&found.path);
                texts
                    .remarks
                    .push(Remark::new(source.name, Reason::SecondCaption, detail));
            }
        }
        texts.text = (!all.is_empty()).then_some(all);
        texts
    }

    /// The clause of the filter that removes an image of this size with these texts. None if it is
    /// kept.
    pub(crate) fn removed_by(&self, texts: &Texts, width_px: u32, height_px: u32) -> Option<usize> {
        let size = Size {
            width_px,
            height_px,
        };
        let post = texts.post.as_ref();
        self.boards.removed_by(size, texts.text.as_ref(), post)
    }

    /// Why an image has no text: what could have been there, and what is there.
    pub(crate) fn missing_text(&self, found: &Found) -> String {
        let stem = stem_of(&found.path);
        let name = stem.rsplit('/').next().unwrap_or(&stem);
        let mut detail = format!(
            "it has no text: there is no {name}.txt, .caption, .tags or .json with text beside it, \
             and no row of a metadata table names it"
        );
        detail += &self.boards.without_row();
        for ending in names::UNREAD_ENDINGS {
            let other = format!("{stem}{ending}");
            if self.path(&other).exists() {
                detail += &format!("; {other} is of a kind that is not read");
            }
        }
        detail
    }

    /// Which sources are text files whose caption is a list of tags: it reads like one, and another
    /// source has another caption. kohya's scripts and taggers write such pairs.
    fn lists_of_tags(&self, parsed: &[Parsed]) -> Vec<bool> {
        let separator = self.reading.tag_separator;
        let mut is_list = Vec::with_capacity(parsed.len());
        for (index, source) in parsed.iter().enumerate() {
            let captions = &source.description.text.captions;
            let could_be = source.kind == Kind::Txt && self.reading.txt_files == TxtFiles::Auto;
            is_list.push(
                could_be
                    && has_other_captions(parsed, index)
                    && captions
                        .iter()
                        .all(|caption| tag_list::reads_like_tags(caption, separator)),
            );
        }
        is_list
    }

    /// The captions of a text as tags.
    fn as_tags(&self, text: &Text) -> Text {
        let mut tags = Vec::new();
        for caption in &text.captions {
            tags.extend(tag_list::split(caption, self.reading.tag_separator));
        }
        Text {
            tags: clean(tags, &self.reading),
            ..Text::default()
        }
    }

    /// The sources of an image that have text, and remarks about those that cannot be used.
    fn parse_all(&self, found: &Found, remarks: &mut Vec<Remark>) -> Vec<Parsed> {
        let mut all = Vec::new();
        let folder = found.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        for sidecar in &found.sidecars {
            let name = join(folder, &sidecar.name);
            let bytes = text_file::bytes(&self.path(&name), MAX_SOURCE_BYTES);
            let bytes = bytes.map_err(|error| error.to_string());
            let parsed = bytes.and_then(|bytes| self.parse(sidecar.kind, &bytes));
            keep(parsed, name, sidecar.kind, &mut all, remarks);
        }
        for line in &found.lines {
            let table = &self.tables[line.table as usize];
            let file = table.file.as_ref().unwrap_or(&self.rows);
            let name = format!("{}:{}", table.path, line.number);
            let bytes = read_span(file, line.span);
            let parsed = bytes.and_then(|bytes| self.parse(Kind::Json, &bytes));
            keep(parsed, name, Kind::Json, &mut all, remarks);
        }
        all
    }

    /// The text of a row of an image board. None if its classes go nowhere.
    fn parse_post(&self, post: &Post) -> Option<Parsed> {
        let text = self.boards.text(post, &self.reading);
        let has_words = !text.is_empty() || !text.quality.is_empty();
        has_words.then(|| Parsed {
            name: post.address.clone(),
            kind: Kind::Json,
            description: Description {
                text,
                ..Description::default()
            },
        })
    }

    fn parse(&self, kind: Kind, bytes: &[u8]) -> std::result::Result<Description, String> {
        let text = match (kind, self.reading.txt_files) {
            (Kind::Json, _) => return keys::read(bytes, &self.reading),
            (Kind::Tags, _) | (Kind::Txt, TxtFiles::Tags) => Text::from_tags(bytes, &self.reading),
            _ => Text::from_txt(bytes, &self.reading),
        };
        Ok(Description {
            text: text?,
            ..Description::default()
        })
    }
}

/// Keeps a source that has text; any other becomes a remark.
fn keep(
    parsed: std::result::Result<Description, String>,
    name: String,
    kind: Kind,
    all: &mut Vec<Parsed>,
    remarks: &mut Vec<Remark>,
) {
    match parsed {
        Ok(description) if !description.text.is_empty() => all.push(Parsed {
            name,
            kind,
            description,
        }),
        Ok(description) => {
            let mut detail = "it has no caption and no tag".to_owned();
            if !description.unread.is_empty() {
                detail += "; it has text under keys that are not read: ";
                detail += &description.unread.join(", ");
            }
            remarks.push(Remark::new(name, Reason::BadCaption, detail));
        }
        Err(detail) => remarks.push(Remark::new(name, Reason::BadCaption, detail)),
    }
}

/// Whether sources other than `index` have captions, none of them one of its own.
fn has_other_captions(parsed: &[Parsed], index: usize) -> bool {
    let own = &parsed[index].description.text.captions;
    let mut num_others = 0;
    for (other, source) in parsed.iter().enumerate() {
        let captions = &source.description.text.captions;
        if other == index {
            continue;
        }
        if captions.iter().any(|caption| own.contains(caption)) {
            return false;
        }
        num_others += captions.len();
    }
    num_others > 0
}

/// The note about a string of tags that is read as one tag.
fn unsplit(name: &str, tags: &str) -> Fault {
    let shown: String = tags.chars().take(60).collect();
    let detail = format!(
        "{name}: {shown:?} is read as one tag, since it has no comma; tag_separator = \"space\" in \
         [prep] splits it"
    );
    Fault::new(Reason::UnsplitTags, detail)
}

/// The detail of a remark about a caption source that is not used for the image `path`.
fn second_caption(path: &str) -> String {
    format!("the text of {path} comes from a source with precedence, which says something else")
}

fn read_span(file: &File, span: Span) -> std::result::Result<Vec<u8>, String> {
    let mut bytes = vec![0; span.len as usize];
    file.read_exact_at(&mut bytes, span.offset)
        .map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// The place of a table among others: the deepest folder first, since it is the nearest of those
/// that can name the same image.
fn precedence(table: &TableFile) -> (Reverse<usize>, String, bool, TableKind, String) {
    let depth = table
        .folder
        .split('/')
        .filter(|part| !part.is_empty())
        .count();
    let (_, stem) = classify(&table.name);
    (
        Reverse(depth),
        table.folder.clone(),
        !stem.eq_ignore_ascii_case("metadata"),
        table.kind,
        table.name.clone(),
    )
}

/// Reads tables and finds the images of their rows.
struct TableReader<'a> {
    root: Root,
    folder: &'a Path,
    finder: Finder<'a>,
    row_file: RowFile,
    /// The rows of each image.
    lines: Vec<Vec<Line>>,
    tables: Vec<Table>,
    remarks: Vec<Remark>,
}

impl TableReader<'_> {
    /// Reads a table and enters its rows with their images.
    fn read(&mut self, table: &TableFile) {
        let path = join(&table.folder, &table.name);
        let index = self.tables.len() as u32;
        let mut lost = Vec::new();
        let mut num_rows = 0u64;
        let mut num_found = 0u64;
        let (root, finder, lines) = (&self.root, &mut self.finder, &mut self.lines);
        let mut take = |row: Row| {
            num_rows += 1;
            let image = row
                .image
                .and_then(|named| root.relative(&named, &table.folder));
            let line = Line {
                table: index,
                number: row.number,
                span: row.span,
            };
            match image {
                Ok(image) => match finder.find(&image) {
                    Some(file) => {
                        num_found += 1;
                        lines[file].push(line);
                    }
                    None => lost.push((row.number, orphan(&image))),
                },
                Err(detail) => lost.push((row.number, Fault::new(Reason::BadCaption, detail))),
            }
        };
        let mut rows = Rows {
            file: &mut self.row_file,
            take: &mut take,
        };
        let mut contents = Contents::default();
        let read = table::read(
            table.kind,
            &self.folder.join(&path),
            &mut rows,
            &mut contents,
        );

        let is_metadata = table.kind != TableKind::Json && !precedence(table).2;
        let is_table = num_found > 0 || (is_metadata && num_rows > 0);
        if is_table {
            for (number, fault) in lost {
                let path = format!("{path}:{number}");
                self.remarks.push(Remark { path, fault });
            }
        }
        match read {
            Ok(()) if is_table => {}
            Ok(()) => {
                let fault = no_table(table.kind, &contents, num_rows);
                self.remark(path.clone(), fault);
            }
            Err(fault) if is_table => self.remark(path.clone(), fault),
            Err(fault) => self.remark(path.clone(), broken_table(table.kind, fault)),
        }
        self.tables.push(Table {
            path,
            file: contents.own_file,
        });
    }

    fn remark(&mut self, path: String, fault: Fault) {
        self.remarks.push(Remark { path, fault });
    }
}

fn orphan(image: &str) -> Fault {
    let detail = format!("it names {image:?}, which does not exist");
    Fault::new(Reason::OrphanCaption, detail)
}

/// The fault of a file that could be a table, none of whose rows names an image.
fn no_table(kind: TableKind, contents: &Contents, num_rows: u64) -> Fault {
    if contents.is_of_one_image {
        return Fault::new(Reason::OrphanCaption, "no image has this name");
    }
    let detail = match (kind, num_rows) {
        (TableKind::Json, 0) => {
            "a JSON file of a kind that is not read: no image has its name, and \
             it has no entries that name images"
                .to_owned()
        }
        (_, 0) => "it has no rows".to_owned(),
        (TableKind::Json, rows) => format!(
            "a JSON file of a kind that is not read: none of its {rows} rows names an image of \
             this folder"
        ),
        (_, rows) => format!("none of its {rows} rows names an image of this folder"),
    };
    Fault::new(Reason::UnreadKind, detail)
}

/// The fault of a table that cannot be read. JSON that no image has the name of is an orphan.
fn broken_table(kind: TableKind, fault: Fault) -> Fault {
    if kind == TableKind::Json && fault.reason == Reason::BadCaption {
        let detail = format!(
            "no image has this name; nor is it a table: {}",
            fault.detail
        );
        return Fault::new(Reason::OrphanCaption, detail);
    }
    fault
}
