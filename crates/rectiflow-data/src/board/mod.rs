//! Tables of image boards, Danbooru's and e621's: Parquet, SQLite, JSON lines or CSV with a row for
//! each post, and pictures that are named after the post's number or hash.
//!
//! ```text
//! open   the keys of all rows (index, names)     32 bytes a row in memory
//! join   the pictures that are there -> the texts of their rows, in a file (kept)
//! post   the name of a picture -> its row -> text (classes, scores), values for a filter
//! ```
//!
//! Nothing here knows where pictures are: a source of any kind passes the names of its samples, as
//! paths with `/`. A table is good for the pictures of its folder and the folders in it; one that
//! the user names is good for all pictures. Of several tables the nearest folder counts first, and
//! of several rows with one key the first.

pub mod classes;
pub mod count;
pub(crate) mod index;
pub(crate) mod kept;
#[cfg(test)]
mod million;
pub(crate) mod names;
pub(crate) mod post;
pub(crate) mod scope;
pub(crate) mod scores;

use std::{
    cmp::Reverse,
    path::{Path, PathBuf},
};

use crate::{
    board::{
        classes::TagSettings,
        count::{BoardCount, Counted, TableCount},
        index::{Repeat, RowSet},
        kept::{Keeping, Kept},
        post::Post,
        scope::{Match, Scope, described},
    },
    error::{Error, Result},
    filter::columns::Columns,
    posts::{
        Format,
        fields::{self, Row, Shape},
        rows::{Rows, in_row, listed},
    },
    reject::{Reason, Remark},
    text::caption::{Reading, Text},
};

/// Why a reading ends before the table does.
const DONE: &str = "no more rows are needed";

/// A table and which pictures it is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TableFile {
    pub(crate) path: PathBuf,
    /// As messages name it.
    pub(crate) shown: String,
    /// The folder that names of files are relative to, relative to the source folder.
    pub(crate) folder: String,
    /// The folder of the pictures, relative to the source folder; empty for all.
    pub(crate) scope: String,
    /// The user names it: it must be usable.
    pub(crate) is_named: bool,
}

/// A table whose keys are read.
#[derive(Debug)]
struct Table {
    file: TableFile,
    format: Format,
    columns: Columns,
    /// Index of its scope.
    scope: usize,
    /// The number of its first row among the rows of all tables.
    first_row: u32,
    /// The end of its rows.
    end: u32,
    is_broken: bool,
    /// Rows that repeat a key, and have a picture by another.
    num_used_twice: u64,
    count: TableCount,
}

/// Tables of image boards.
#[derive(Debug)]
pub(crate) struct Board {
    tables: Vec<Table>,
    /// The deepest folder first.
    scopes: Vec<Scope>,
    settings: TagSettings,
    /// Rows that repeat a key.
    repeated: RowSet,
    kept: Option<Kept>,
    without_row: Counted,
    contradictory: Counted,
}

/// Whether the file at `path` is a table of an image board although its user does not say so. What
/// cannot be read is none.
pub(crate) fn is_board(path: &Path) -> bool {
    let Ok(Some(format)) = Format::of(path) else {
        return false;
    };
    let columns = format.columns(path);
    columns.is_ok_and(|columns| Shape::of(&columns).is_of_board())
}

impl Board {
    /// Reads the keys of tables. What is wrong with tables that the user does not name becomes
    /// remarks.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a table that the user names cannot be used.
    pub(crate) fn open(
        files: Vec<TableFile>,
        settings: &TagSettings,
        remarks: &mut Vec<Remark>,
    ) -> Result<Self> {
        let mut board = Self {
            tables: Vec::new(),
            scopes: scopes_of(&files),
            settings: settings.clone(),
            repeated: RowSet::default(),
            kept: None,
            without_row: Counted::default(),
            contradictory: Counted::default(),
        };
        for file in &files {
            let Err(reason) = board.add(file) else {
                continue;
            };
            if file.is_named {
                return Err(Error::Invalid {
                    what: format!("prep.tables, {}", file.shown),
                    reason,
                });
            }
            remarks.push(Remark::new(&file.shown, Reason::BadCaption, reason));
        }

        // Equal keys are found when all are there.
        board.repeated = RowSet::of(board.num_rows());
        for scope in 0..board.scopes.len() {
            let repeats = board.scopes[scope].finish(&board.settings.score_words);
            for repeat in repeats {
                board.count_repeat(repeat);
            }
        }
        for table in &mut board.tables {
            table.count.s_is_safe = board.scopes[table.scope].ranks.s_is_safe;
        }
        Ok(board)
    }

    /// Reads the keys of a table.
    ///
    /// # Errors
    /// Why it, or the rest of it, cannot be used.
    fn add(&mut self, file: &TableFile) -> std::result::Result<(), String> {
        let format = format_of(file)?;
        let columns = format.columns(&file.path)?;
        let shape = Shape::of(&columns);
        if format != Format::JsonLines && !shape.has_key && !shape.has_files {
            return Err(without_key(&columns));
        }

        // The keys of all rows.
        let in_scope = |scope: &Scope| scope.folder == file.scope;
        let scope = self.scopes.iter().position(in_scope);
        let scope = scope.expect("each table's folder has a scope");
        let first_row = self.num_rows();
        let mut reading = KeyRows {
            scope: &mut self.scopes[scope],
            folder: &file.folder,
            all_columns: (format == Format::JsonLines).then(Columns::default),
            first_row,
            end: first_row,
            count: TableCount {
                path: file.shown.clone(),
                ..TableCount::default()
            },
        };
        let wanted = fields::key_columns(&columns);
        let read = format.read(&file.path, &wanted, &mut reading);
        let KeyRows {
            end,
            count,
            all_columns,
            ..
        } = reading;
        let problem = match read {
            Err(reason) => Some(reason),
            Ok(()) if count.rows == 0 => Some("it has no rows".to_owned()),
            Ok(()) if count.rows == count.unusable.count => Some(all_unusable(&count)),
            Ok(()) => None,
        };
        self.tables.push(Table {
            file: file.clone(),
            format,
            columns: all_columns.unwrap_or(columns),
            scope,
            first_row,
            end,
            is_broken: problem.is_some(),
            num_used_twice: 0,
            count,
        });
        problem.map_or(Ok(()), Err)
    }

    /// Counts a row whose key a row before it has.
    fn count_repeat(&mut self, repeat: Repeat) {
        self.repeated.insert(repeat.row);
        let index = self.table_of(repeat.row);
        let has_room = self.tables[index].count.repeated.has_room();
        let example = if has_room {
            let first = self.address(repeat.first);
            format!("{} has the key of {first}", self.address(repeat.row))
        } else {
            String::new()
        };
        self.tables[index].count.repeated.add(|| example);
    }

    /// The number of rows of all tables.
    fn num_rows(&self) -> u32 {
        self.tables.last().map_or(0, |table| table.end)
    }

    /// The columns of all tables, and those that every sample has.
    pub(crate) fn columns(&self) -> Columns {
        let mut columns = Columns::own();
        for table in &self.tables {
            columns.extend(&table.columns);
        }
        fields::add_usual(&mut columns);
        columns
    }

    /// Finds the rows of the pictures `names`, and keeps what they say in a file in `work`: their
    /// texts, and the columns `others`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written; [`Error::Invalid`] if a table changed since its
    /// keys were read.
    pub(crate) fn join<'a>(
        &mut self,
        names: impl Iterator<Item = &'a str>,
        others: &[String],
        work: &Path,
    ) -> Result<()> {
        let mut matched = RowSet::of(self.num_rows());
        for name in names {
            match self.find(name) {
                Match::Row(row) => {
                    if !matched.contains(row) {
                        matched.insert(row);
                        let index = self.table_of(row);
                        let table = &mut self.tables[index];
                        table.count.with_picture += 1;
                        table.num_used_twice += u64::from(self.repeated.contains(row));
                    }
                }
                Match::Nothing => self.without_row.add(|| name.to_owned()),
                Match::Contradiction => self.contradictory.add(|| name.to_owned()),
            }
        }

        // The second reading, of the texts.
        let mut keeping = Keeping::create(work).map_err(Error::io(work))?;
        for index in 0..self.tables.len() {
            let kept = self.keep_texts(index, others, &matched, &mut keeping);
            if let Some(error) = keeping.failure() {
                return Err(Error::io(work)(error));
            }
            kept?;
        }
        self.kept = Some(keeping.finish().map_err(Error::io(work))?);
        Ok(())
    }

    /// Keeps the rows of a table that are in `matched`, and counts the others.
    fn keep_texts(
        &mut self,
        index: usize,
        others: &[String],
        matched: &RowSet,
        keeping: &mut Keeping,
    ) -> Result<()> {
        let table = &mut self.tables[index];
        let wanted = fields::text_columns(&table.columns, others);
        let mut reading = TextRows {
            scope: &self.scopes[table.scope],
            file: &table.file,
            first_row: table.first_row,
            end: table.end,
            matched,
            repeated: &self.repeated,
            keeping,
            left: table.count.with_picture,
            lost: Counted::default(),
        };
        let read = table.format.read(&table.file.path, &wanted, &mut reading);
        let left = reading.left;
        let lost = reading.lost;
        let changed = match read {
            Err(reason) if reason != DONE && !table.is_broken => Some(reason),
            _ if left > 0 => Some(format!("{left} rows are gone")),
            _ => None,
        };
        if let Some(reason) = changed {
            return Err(Error::Invalid {
                what: table.file.shown.clone(),
                reason: format!(
                    "{reason}: it changed while it was read; prepare again when nothing writes to \
                     it"
                ),
            });
        }
        let count = &mut table.count;
        let used = count.with_picture + count.repeated.count + count.unusable.count;
        count.without_picture = Counted {
            count: count.rows + table.num_used_twice - used,
            ..lost
        };
        Ok(())
    }

    /// The row of the picture `name`.
    fn find(&self, name: &str) -> Match {
        for scope in self.scopes.iter().filter(|scope| scope.has(name)) {
            match scope.find(name) {
                Match::Nothing => {}
                found => return found,
            }
        }
        Match::Nothing
    }

    /// The post of the picture `name`, one of those that were joined. None if it has no row.
    ///
    /// # Errors
    /// Why it cannot be read.
    pub(crate) fn post(&self, name: &str) -> std::result::Result<Option<Post>, String> {
        let (Match::Row(row), Some(kept)) = (self.find(name), &self.kept) else {
            return Ok(None);
        };
        let values = kept.read(row).map_err(|error| error.to_string())?;
        let ranks = &self.scopes[self.tables[self.table_of(row)].scope].ranks;
        Ok(values.map(|values| Post::new(values, self.address(row), ranks)))
    }

    /// The text of a post.
    pub(crate) fn text(&self, post: &Post, reading: &Reading) -> Text {
        post.text(&self.settings, reading)
    }

    /// The names of the tables.
    pub(crate) fn tables(&self) -> Vec<&str> {
        let names = self.tables.iter().map(|table| table.file.shown.as_str());
        names.collect()
    }

    /// What is in the tables, and which pictures are in none.
    pub(crate) fn count(&self) -> BoardCount {
        BoardCount {
            tables: self
                .tables
                .iter()
                .map(|table| table.count.clone())
                .collect(),
            without_row: self.without_row.clone(),
            contradictory: self.contradictory.clone(),
        }
    }

    /// The index of a row's table.
    fn table_of(&self, row: u32) -> usize {
        self.tables.partition_point(|table| table.end <= row)
    }

    /// The table and number of a row, from 1: `posts.parquet:17`.
    fn address(&self, row: u32) -> String {
        let table = &self.tables[self.table_of(row)];
        address(&table.file, row - table.first_row)
    }
}

/// A scope for each folder, the deepest first.
fn scopes_of(files: &[TableFile]) -> Vec<Scope> {
    let mut folders: Vec<&str> = files.iter().map(|file| file.scope.as_str()).collect();
    folders.sort_by_key(|folder| (Reverse(depth(folder)), *folder));
    folders.dedup();
    folders.into_iter().map(Scope::new).collect()
}

fn depth(folder: &str) -> usize {
    folder.split('/').filter(|part| !part.is_empty()).count()
}

fn address(file: &TableFile, number: u32) -> String {
    format!("{}:{}", file.shown, u64::from(number) + 1)
}

fn format_of(file: &TableFile) -> std::result::Result<Format, String> {
    match Format::of(&file.path) {
        Ok(Some(format)) => Ok(format),
        Ok(None) => Err(
            "expected Parquet, SQLite, JSON lines (an object a line) or CSV with a column id or \
             md5, and its first bytes are of none of them"
                .to_owned(),
        ),
        Err(error) => Err(error.to_string()),
    }
}

fn without_key(columns: &Columns) -> String {
    format!(
        "no column says which picture a row is about: expected id, md5 or file_name; its columns: \
         {}",
        listed(columns.names())
    )
}

fn all_unusable(count: &TableCount) -> String {
    format!(
        "none of its {} rows can be used: {}",
        count.rows,
        count.unusable.examples.join("; ")
    )
}

/// Takes the keys of a table's rows.
struct KeyRows<'a> {
    scope: &'a mut Scope,
    folder: &'a str,
    /// The columns of all rows, if the table has no schema.
    all_columns: Option<Columns>,
    first_row: u32,
    end: u32,
    count: TableCount,
}

impl Rows for KeyRows<'_> {
    fn take(
        &mut self,
        number: u32,
        row: std::result::Result<Row, String>,
    ) -> std::result::Result<(), String> {
        let Some(end) = self
            .first_row
            .checked_add(number)
            .and_then(|row| row.checked_add(1))
        else {
            return Err(format!(
                "all tables together have more than {} rows",
                u32::MAX
            ));
        };
        self.end = end;
        self.count.rows += 1;
        let problem = match row {
            Ok(row) => {
                if let Some(columns) = &mut self.all_columns {
                    fields::observe(columns, &row);
                }
                let has_key = self.scope.add(end - 1, &row, self.folder);
                (!has_key).then(|| "it has no id, md5 or file name".to_owned())
            }
            Err(reason) => Some(reason),
        };
        if let Some(reason) = problem {
            let unusable = &mut self.count.unusable;
            unusable.add(|| in_row(number, &reason));
        }
        Ok(())
    }
}

/// Takes the texts of rows with a picture, and the keys of the first rows without one.
struct TextRows<'a> {
    scope: &'a Scope,
    file: &'a TableFile,
    first_row: u32,
    end: u32,
    matched: &'a RowSet,
    repeated: &'a RowSet,
    keeping: &'a mut Keeping,
    /// Rows with a picture that are still to come.
    left: u64,
    lost: Counted,
}

impl Rows for TextRows<'_> {
    fn wants(&self, number: u32) -> bool {
        let row = self.first_row.saturating_add(number);
        row < self.end
            && (self.matched.contains(row) || self.lost.has_room() && !self.repeated.contains(row))
    }

    fn take(
        &mut self,
        number: u32,
        row: std::result::Result<Row, String>,
    ) -> std::result::Result<(), String> {
        let index = self.first_row + number;
        match row {
            Ok(row) if self.matched.contains(index) => {
                if !self.scope.owns(index, &row, &self.file.folder) {
                    return Err(format!("row {} is another one", u64::from(number) + 1));
                }
                let kept = self.keeping.push(index, &row);
                kept.map_err(|error| error.to_string())?;
                self.left -= 1;
            }
            Ok(row) => {
                let keys = described(&row);
                if !keys.is_empty() {
                    let address = address(self.file, number);
                    self.lost.add_example(|| format!("{address} ({keys})"));
                }
            }
            Err(reason) if self.matched.contains(index) => return Err(reason),
            Err(_) => {}
        }
        if self.left == 0 && !self.lost.has_room() {
            return Err(DONE.to_owned());
        }
        Ok(())
    }
}
