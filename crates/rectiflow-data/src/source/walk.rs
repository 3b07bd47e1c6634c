//! The walk over the source folder: names sorted by kind, folder by folder.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use crate::{
    reject::{Reason, Remark},
    source::names::{Kind, Sidecar, Sidecars, TableKind, classify},
};

/// A file that can be an image, and the caption files beside it.
#[derive(Debug)]
pub(crate) struct Image {
    /// Relative to the source folder, with `/` between its parts.
    pub(crate) path: String,
    pub(crate) sidecars: Vec<Sidecar>,
}

/// A file that can be a table of metadata.
#[derive(Debug)]
pub(crate) struct TableFile {
    /// Relative to the source folder; empty for itself.
    pub(crate) folder: String,
    pub(crate) name: String,
    pub(crate) kind: TableKind,
}

/// What a folder and its subfolders have.
#[derive(Debug, Default)]
pub(crate) struct Walk {
    pub(crate) images: Vec<Image>,
    pub(crate) tables: Vec<TableFile>,
    pub(crate) remarks: Vec<Remark>,
}

/// The names in one folder, by kind.
#[derive(Debug, Default)]
struct Names {
    /// Each name that can be an image's or is a folder's, and whether it is a folder.
    entries: Vec<(String, bool)>,
    sidecars: Sidecars,
    tables: Vec<(TableKind, String)>,
}

impl Names {
    fn add(&mut self, name: String, is_folder: bool) {
        match classify(&name) {
            _ if is_folder => self.entries.push((name, true)),
            (kind @ (Kind::Json | Kind::Caption | Kind::Txt | Kind::Tags), stem) => {
                self.sidecars.add(kind, stem, &name);
            }
            (Kind::Table(kind), _) => self.tables.push((kind, name)),
            (Kind::UnreadCaption | Kind::Latents | Kind::Archive | Kind::Candidate, _) => {
                self.entries.push((name, false));
            }
        }
    }
}

/// Where the names in folders come from.
enum Folders<'a> {
    /// A folder on a disk, without the data set's own.
    Disk {
        root: &'a Path,
        skip: Option<PathBuf>,
    },
    /// A list of all files.
    Listed(HashMap<String, Names>),
}

/// The names in the folders of `paths`, with and without files of their own. As on a disk, what
/// begins with a dot is left out.
fn folders_of<'a>(paths: impl Iterator<Item = &'a str>) -> HashMap<String, Names> {
    let mut folders = HashMap::from([(String::new(), Names::default())]);
    for path in paths {
        if path
            .split('/')
            .any(|part| part.is_empty() || part.starts_with('.'))
        {
            continue;
        }
        // Folders are entered from the innermost outwards, until one is known.
        let mut rest = path;
        let mut is_folder = false;
        loop {
            let (folder, name) = rest.rsplit_once('/').unwrap_or(("", rest));
            let is_known = folders.contains_key(folder);
            let names = folders.entry(folder.to_owned()).or_default();
            names.add(name.to_owned(), is_folder);
            if is_known {
                break;
            }
            (rest, is_folder) = (folder, true);
        }
    }
    folders
}

impl Walk {
    /// Walks over the folder `root`, without the data set in `out`.
    pub(crate) fn over(root: &Path, out: &Path) -> Self {
        let mut walk = Self::default();
        walk.folder(
            "",
            &mut Folders::Disk {
                root,
                skip: fs::canonicalize(out).ok(),
            },
        );
        walk
    }

    /// Walks over files that are known by name, as over a folder that has them: paths with `/`.
    pub(crate) fn over_names<'a>(paths: impl Iterator<Item = &'a str>) -> Self {
        let mut walk = Self::default();
        walk.folder("", &mut Folders::Listed(folders_of(paths)));
        walk
    }

    fn folder(&mut self, relative: &str, folders: &mut Folders<'_>) {
        let Some(mut names) = self.names(relative, folders) else {
            return;
        };
        names.entries.sort_unstable();
        let is_file = |entry: &&(String, bool)| !entry.1;
        let files = names.entries.iter().filter(is_file);
        let files: Vec<&str> = files.map(|(name, _)| name.as_str()).collect();
        let mut sidecars = names.sidecars.assign(&files).into_iter();
        for (name, is_folder) in &names.entries {
            let path = join(relative, name);
            if *is_folder {
                self.folder(&path, folders);
            } else {
                let sidecars = sidecars.next().expect("each file has its caption files");
                self.images.push(Image { path, sidecars });
            }
        }

        // Files that belong to no image of this folder.
        for (kind, name) in names.tables {
            self.add_table(relative, name, kind);
        }
        for Sidecar { kind, name, .. } in names.sidecars.unused() {
            if kind == Kind::Json {
                self.add_table(relative, name, TableKind::Json);
            } else {
                let detail = "no image has this name".to_owned();
                self.remark(join(relative, &name), Reason::OrphanCaption, detail);
            }
        }
    }

    fn add_table(&mut self, folder: &str, name: String, kind: TableKind) {
        self.tables.push(TableFile {
            folder: folder.to_owned(),
            name,
            kind,
        });
    }

    /// The names in a folder. None if it is the data set, or, with a remark, cannot be read.
    fn names(&mut self, relative: &str, folders: &mut Folders<'_>) -> Option<Names> {
        let (root, skip) = match folders {
            Folders::Disk { root, skip } => (*root, skip),
            Folders::Listed(folders) => return folders.remove(relative),
        };
        let path = root.join(relative);
        if skip.is_some() && fs::canonicalize(&path).ok() == *skip {
            return None;
        }
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
        self.remarks.push(Remark::new(path, reason, detail));
    }
}

/// The path of `name` in `folder`, which is empty for the source folder itself.
pub(crate) fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() {
        name.to_owned()
    } else {
        format!("{folder}/{name}")
    }
}
