//! A folder of pictures: each with the caption files beside it and the rows of tables that name it.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use crate::{
    board::TableFile as BoardTable,
    error::{Error, Result},
    reject::{Fault, Reason, Remark},
    source::{
        boards::take_tables,
        listing::Listing,
        named_path::{Finder, Root},
        names::{Kind, TableKind, classify},
        rows::{Contents, Row, RowFile, Rows},
        sample::{Line, Sample, Table},
        shards::members::is_picture,
        table,
        tree::Tree,
        walk::{TableFile, Walk, join},
    },
};

/// Lists the files of `walk`, which are those of `tree`. Tables of image boards are added to
/// `boards`.
///
/// # Errors
/// [`Error::Remote`] if a table at a URL cannot be read.
pub(crate) fn list(
    tree: &mut Tree,
    mut walk: Walk,
    boards: &mut Vec<BoardTable>,
    row_file: RowFile,
) -> Result<Listing> {
    take_tables(tree, &mut walk, boards)?;
    let Walk {
        images,
        mut tables,
        mut remarks,
    } = walk;
    tables.sort_by_cached_key(precedence);
    let mut reader = TableReader {
        root: root_of(tree),
        tree: &mut *tree,
        finder: Finder::new(images.iter().map(|image| image.path.as_str()).collect()),
        row_file,
        lines: vec![Vec::new(); images.len()],
        tables: Vec::new(),
        remarks: Vec::new(),
    };
    for table in &tables {
        reader.read(table)?;
    }
    let TableReader {
        row_file,
        lines,
        tables,
        remarks: table_remarks,
        ..
    } = reader;
    let mut samples = Vec::with_capacity(images.len());
    remarks.extend(table_remarks);
    for (image, lines) in images.into_iter().zip(lines) {
        samples.push(Sample {
            place: tree.place_of(&image.path),
            path: image.path,
            sidecars: image.sidecars.into(),
            lines: lines.into(),
            sha256: None,
            listed_px: [0; 2],
        });
    }
    Ok(Listing {
        notes: repeats(&samples),
        samples,
        remarks,
        tables,
        ..Listing::new(row_file)
    })
}

/// The pictures that `tables` name, for a place that lists no files.
///
/// # Errors
/// [`Error::Invalid`] if they name none; [`Error::Io`] if `work` cannot be written.
pub(crate) fn named(tree: &mut Tree, tables: &[String], work: &Path) -> Result<Walk> {
    let root = root_of(tree);
    let mut paths: BTreeSet<String> = tables.iter().cloned().collect();
    let mut problems = Vec::new();
    for table in tables {
        let Kind::Table(kind) = classify(table).0 else {
            continue;
        };
        let mut first_bad = None;
        let mut take = |row: Row| {
            let image = row.image.and_then(|named| root.relative(&named, ""));
            match image {
                Ok(image) => {
                    paths.insert(image);
                }
                Err(reason) => {
                    first_bad.get_or_insert((row.number, reason));
                }
            }
        };
        // These rows are read again, and kept then.
        let mut file = RowFile::create(work).map_err(Error::io(work))?;
        let mut rows = Rows {
            file: &mut file,
            take: &mut take,
        };
        let path = tree.on_disk(table)?;
        let read = table::read(kind, &path, &mut rows, &mut Contents::default());
        let problem = match (read, first_bad) {
            (Err(fault), _) => fault.detail,
            (_, Some((number, reason))) => format!("row {number}: {reason}"),
            _ => "it has no rows".to_owned(),
        };
        problems.push(format!("{table}: {problem}"));
    }
    if paths.len() == tables.len() {
        return Err(Error::Invalid {
            what: tree.url().unwrap_or_default(),
            reason: format!(
                "its files cannot be listed, and no table names a picture ({}); expected a column \
                 file_name with paths relative to the table",
                problems.join("; ")
            ),
        });
    }
    Ok(Walk::over_names(paths.iter().map(String::as_str)))
}

/// The spellings of the folder's own path.
fn root_of(tree: &Tree) -> Root {
    match (tree.local(), tree.url()) {
        (Some(path), _) => Root::new(path),
        (None, url) => Root::at_url(url.unwrap_or_default()),
    }
}

/// Notes about folders that are called as kohya's scripts want them, `10_name`: each picture ten
/// times an epoch. Here a recipe says so, for a whole data set.
fn repeats(samples: &[Sample]) -> Vec<Remark> {
    let mut counts = BTreeMap::<&str, (u64, u64)>::new();
    for sample in samples {
        if !is_picture(&sample.path) {
            continue;
        }
        let folder = sample
            .path
            .rsplit_once('/')
            .map_or("", |(folder, _)| folder);
        if let Some(repeats) = kohya_repeats(folder) {
            counts.entry(folder).or_insert((repeats, 0)).1 += 1;
        }
    }
    let mut notes = Vec::new();
    for (folder, (repeats, num_pictures)) in counts {
        let detail = format!(
            "its name says {repeats} repeats to kohya's scripts, of {num_pictures} pictures; here \
             each counts once: prepare the folder on its own and set data.repeats = {repeats} for \
             it, if that is meant"
        );
        notes.push(Remark::new(folder, Reason::FolderRepeats, detail));
    }
    notes
}

/// The number in the name of a folder such as `10_name`, from 2 on.
fn kohya_repeats(folder: &str) -> Option<u64> {
    let name = folder.rsplit('/').next()?;
    let (number, rest) = name.split_once('_')?;
    let repeats: u64 = number.parse().ok()?;
    (!rest.is_empty() && (2..1000).contains(&repeats)).then_some(repeats)
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
    tree: &'a mut Tree,
    finder: Finder<'a>,
    row_file: RowFile,
    /// The rows of each image.
    lines: Vec<Vec<Line>>,
    tables: Vec<Table>,
    remarks: Vec<Remark>,
}

impl TableReader<'_> {
    /// Reads a table and enters its rows with their images.
    fn read(&mut self, table: &TableFile) -> Result<()> {
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
        let file = self.tree.on_disk(&path)?;
        let read = table::read(table.kind, &file, &mut rows, &mut contents);

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
        Ok(())
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
