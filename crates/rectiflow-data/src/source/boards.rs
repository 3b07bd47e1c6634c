//! The tables of image boards of a source, and its filter: which files are such tables, and what a
//! picture's row and the filter say.

use std::{
    cell::OnceCell,
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use crate::{
    board::{
        Board, TableFile,
        classes::TagSettings,
        count::{BoardCount, ClauseCount, Counted},
        is_board,
        post::Post,
    },
    error::{Error, Result},
    filter::{
        Filter,
        columns::{Columns, Sample, Value, tag_key},
    },
    posts::Format,
    reject::{Reason, Remark},
    source::{
        names::TableKind,
        tree::Tree,
        walk::{Walk, join},
    },
    text::caption::{Reading, Text},
};

/// Endings of SQLite files.
const SQLITE_ENDINGS: [&str; 3] = [".sqlite", ".sqlite3", ".db"];

/// Which tables are read and how, and which pictures are kept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BoardSettings<'a> {
    pub(crate) tables: &'a [String],
    pub(crate) tags: &'a TagSettings,
    pub(crate) filter: &'a str,
}

/// The tables of image boards of a source, and its filter.
#[derive(Debug)]
pub(crate) struct Boards {
    /// None without tables.
    board: Option<Board>,
    filter: Filter,
}

/// The size of a picture in pixels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) width_px: u32,
    pub(crate) height_px: u32,
}

/// The tables that the settings name, for a source of any kind in `tree`.
///
/// # Errors
/// [`Error::Invalid`] if one does not exist; [`Error::Remote`] if one at a URL cannot be read.
pub(crate) fn named_tables(
    tree: &mut Tree,
    settings: &BoardSettings<'_>,
) -> Result<Vec<TableFile>> {
    let mut files: Vec<TableFile> = Vec::new();
    for name in settings.tables {
        let is_far = tree.is_far() && !Path::new(name).is_absolute();
        let file = match is_far {
            true => far_table(tree, name)?,
            false => named_table(tree.local().unwrap_or(Path::new("/")), name)?,
        };
        if !files.iter().any(|other| other.path == file.path) {
            files.push(file);
        }
    }
    Ok(files)
}

/// Takes the tables of image boards out of a walk over `tree`: those of `files`, which are named,
/// and those that are found, which are added to `files`.
///
/// # Errors
/// [`Error::Remote`] if a table at a URL cannot be read.
pub(crate) fn take_tables(
    tree: &mut Tree,
    walk: &mut Walk,
    files: &mut Vec<TableFile>,
) -> Result<()> {
    if !files.is_empty() {
        let root = tree.local().map(Path::to_owned);
        let is_named = |path: &str| match &root {
            None => files.iter().any(|file| file.shown == path),
            Some(root) => {
                let path = fs::canonicalize(root.join(path));
                path.is_ok_and(|path| files.iter().any(|file| file.path == path))
            }
        };
        walk.images.retain(|image| !is_named(&image.path));
        let tables = &mut walk.tables;
        tables.retain(|table| !is_named(&join(&table.folder, &table.name)));
    }
    found_tables(tree, walk, files)?;
    found_sqlite(tree, walk, files)
}

/// The table at a URL that the user calls `name`.
fn far_table(tree: &mut Tree, name: &str) -> Result<TableFile> {
    let path = tree.on_disk(name)?;
    let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
    Ok(TableFile {
        path,
        folder: folder.to_owned(),
        shown: name.to_owned(),
        scope: String::new(),
        is_named: true,
    })
}

/// The table that the user calls `name`.
fn named_table(root: &Path, name: &str) -> Result<TableFile> {
    let path = root.join(name);
    let Ok(path) = fs::canonicalize(&path) else {
        return Err(Error::Invalid {
            what: format!("prep.tables, {name}"),
            reason: format!(
                "{} does not exist; a table is named relative to the source folder, or with its \
                 whole path",
                path.display()
            ),
        });
    };
    let inside = fs::canonicalize(root)
        .ok()
        .and_then(|root| path.strip_prefix(root).map(Path::to_owned).ok());
    let folder = inside.as_deref().and_then(Path::parent);
    let folder = folder.map_or_else(String::new, |folder| folder.to_string_lossy().into_owned());
    Ok(TableFile {
        path,
        shown: name.to_owned(),
        folder,
        scope: String::new(),
        is_named: true,
    })
}

/// The table `shown`, a copy of which can be at `path`, for the pictures of its folder.
fn found_table(path: PathBuf, shown: String) -> TableFile {
    let folder = shown.rsplit_once('/').map_or("", |(folder, _)| folder);
    TableFile {
        path,
        folder: folder.to_owned(),
        scope: folder.to_owned(),
        shown,
        is_named: false,
    }
}

/// Takes tables that are of an image board by their columns.
fn found_tables(tree: &mut Tree, walk: &mut Walk, files: &mut Vec<TableFile>) -> Result<()> {
    let mut others = Vec::new();
    for table in std::mem::take(&mut walk.tables) {
        let shown = join(&table.folder, &table.name);
        if table.kind != TableKind::Json {
            let path = tree.on_disk(&shown)?;
            if is_board(&path) {
                files.push(found_table(path, shown));
                continue;
            }
        }
        others.push(table);
    }
    walk.tables = others;
    Ok(())
}

/// Takes SQLite files. One without posts becomes a remark.
fn found_sqlite(tree: &mut Tree, walk: &mut Walk, files: &mut Vec<TableFile>) -> Result<()> {
    let mut others = Vec::new();
    for image in std::mem::take(&mut walk.images) {
        let name = image.path.to_lowercase();
        if !SQLITE_ENDINGS.iter().any(|ending| name.ends_with(ending)) {
            others.push(image);
            continue;
        }
        let path = tree.on_disk(&image.path)?;
        if !matches!(Format::of(&path), Ok(Some(Format::Sqlite))) {
            others.push(image);
            continue;
        }
        match Format::Sqlite.columns(&path) {
            Ok(_) => files.push(found_table(path, image.path)),
            Err(detail) => {
                let remark = Remark::new(image.path, Reason::UnreadKind, detail);
                walk.remarks.push(remark);
            }
        }
    }
    walk.images = others;
    Ok(())
}

impl Boards {
    /// Reads the tables `files` for the pictures `names`, and checks the filter. The rows of
    /// pictures are kept in `work`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a table that the user names, or the filter, cannot be used;
    /// [`Error::Io`] if `work` cannot be written.
    pub(crate) fn open<'a>(
        files: Vec<TableFile>,
        names: impl Iterator<Item = &'a str>,
        work: &Path,
        settings: &BoardSettings<'_>,
        remarks: &mut Vec<Remark>,
    ) -> Result<Self> {
        let mut board = match files.is_empty() {
            true => None,
            false => Some(Board::open(files, settings.tags, remarks)?),
        };
        let columns = board.as_ref().map_or_else(Columns::own, Board::columns);
        let filter = Filter::new(settings.filter, &columns);
        let filter = filter.map_err(|reason| Error::Invalid {
            what: "prep.filter".to_owned(),
            reason,
        })?;
        if let Some(board) = &mut board {
            board.join(names, &filter.columns(), work)?;
        }
        Ok(Self { board, filter })
    }

    /// The row of the picture at `path`. One that cannot be read becomes a remark.
    pub(crate) fn post(&self, path: &str, remarks: &mut Vec<Remark>) -> Option<Post> {
        match self.board.as_ref()?.post(path) {
            Ok(post) => post,
            Err(detail) => {
                remarks.push(Remark::new(path, Reason::BadCaption, detail));
                None
            }
        }
    }

    /// The text of a row.
    pub(crate) fn text(&self, post: &Post, reading: &Reading) -> Text {
        let board = self.board.as_ref();
        board.map_or_else(Text::default, |board| board.text(post, reading))
    }

    /// What a picture without text is told about tables.
    pub(crate) fn without_row(&self) -> String {
        match &self.board {
            Some(board) => format!(
                "; no row of {} has its id or hash",
                board.tables().join(", ")
            ),
            None => String::new(),
        }
    }

    /// The clause of the filter that removes a picture of `size` with this text and row. None if it
    /// is kept.
    pub(crate) fn removed_by(
        &self,
        size: Size,
        text: Option<&Text>,
        post: Option<&Post>,
    ) -> Option<usize> {
        if self.filter.is_empty() {
            return None;
        }
        self.filter.removed_by(&Picture {
            size,
            text,
            post,
            tags: OnceCell::new(),
        })
    }

    /// Whether the filter asks for the size of a picture.
    pub(crate) fn filter_needs_size(&self) -> bool {
        let columns = self.filter.columns();
        columns
            .iter()
            .any(|column| *column == "width" || *column == "height")
    }

    /// The clauses of the filter, none of which has removed a picture yet.
    pub(crate) fn clauses(&self) -> Vec<ClauseCount> {
        let mut clauses = Vec::new();
        for clause in self.filter.clauses() {
            clauses.push(ClauseCount {
                clause: clause.to_owned(),
                removed: Counted::default(),
            });
        }
        clauses
    }

    /// What is in the tables. None without tables.
    pub(crate) fn count(&self) -> Option<BoardCount> {
        self.board.as_ref().map(Board::count)
    }
}

/// A picture as a filter sees it.
struct Picture<'a> {
    size: Size,
    text: Option<&'a Text>,
    post: Option<&'a Post>,
    /// All tags, found when the first is asked for.
    tags: OnceCell<HashSet<String>>,
}

impl Picture<'_> {
    /// The tags of its text, and of its row those that are in no text too.
    fn all_tags(&self) -> HashSet<String> {
        let mut tags = self.post.map_or_else(HashSet::new, Post::tag_keys);
        if let Some(text) = self.text {
            let own = text.tags.iter().chain(&text.important_tags);
            tags.extend(own.map(|tag| tag_key(tag)));
        }
        tags
    }
}

impl Sample for Picture<'_> {
    fn value(&self, column: &str) -> Option<Value> {
        let num_tags = |text: &Text| text.tags.len() + text.important_tags.len();
        let number = match column {
            "width" => f64::from(self.size.width_px),
            "height" => f64::from(self.size.height_px),
            "num_tags" => self.text.map_or(0, num_tags) as f64,
            column => return self.post?.value(column),
        };
        Some(Value::Number(number))
    }

    fn has_tag(&self, tag: &str) -> bool {
        self.tags.get_or_init(|| self.all_tags()).contains(tag)
    }
}
