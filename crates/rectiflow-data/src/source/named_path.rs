//! The path of an image as a table spells it, to the file that it names.

use std::{
    collections::HashMap,
    path::{Component, Path, PathBuf},
};

use crate::source::names::{folded, stem_of};

/// The folder that paths are relative to, in the spellings of its own path.
#[derive(Debug)]
pub(crate) struct Root {
    spellings: Vec<PathBuf>,
    /// The folder's URL, with a slash at its end.
    url: Option<String>,
}

impl Root {
    /// The source folder `root`.
    pub(crate) fn new(root: &Path) -> Self {
        let mut spellings = vec![root.to_owned()];
        spellings.extend(std::path::absolute(root).ok());
        spellings.extend(root.canonicalize().ok());
        Self {
            spellings,
            url: None,
        }
    }

    /// The source folder at a URL, which ends with a slash.
    pub(crate) fn at_url(url: String) -> Self {
        Self {
            spellings: Vec::new(),
            url: Some(url),
        }
    }

    /// The path that `named`, written in a table of `folder`, has inside of the root, with `/`
    /// between its parts.
    ///
    /// # Errors
    /// A message if it is outside.
    pub(crate) fn relative(&self, named: &str, folder: &str) -> Result<String, String> {
        let named = named.trim();
        let named = named.strip_prefix("file://").unwrap_or(named);
        if let Some(url) = &self.url
            && let Some(inside) = named.strip_prefix(url.as_str())
        {
            return joined(inside, "");
        }
        if !named.starts_with('/') && !named.contains("://") {
            return joined(named, folder);
        }
        for root in &self.spellings {
            if let Ok(inside) = Path::new(named).strip_prefix(root)
                && inside.components().all(is_plain)
            {
                return joined(&inside.to_string_lossy(), "");
            }
        }
        Err(format!(
            "file_name {named:?} is outside of the source folder; write it relative to its folder"
        ))
    }
}

fn is_plain(part: Component<'_>) -> bool {
    matches!(part, Component::Normal(_))
}

/// `named` relative to `folder`, as a path relative to the root.
fn joined(named: &str, folder: &str) -> Result<String, String> {
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in named.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                let outer = parts.pop();
                outer
                    .ok_or_else(|| format!("file_name {named:?} leads out of the source folder"))?;
            }
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

/// Finds files by their paths, also in another spelling: `\` between folders, letters of another
/// case, accents composed in another way, the ending left out.
#[derive(Debug)]
pub(crate) struct Finder<'a> {
    paths: Vec<&'a str>,
    exact: HashMap<&'a str, usize>,
    /// Made when a path is not found as it is.
    loose: Option<HashMap<String, Loose>>,
}

/// The files of a spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loose {
    One(usize),
    Many,
}

impl<'a> Finder<'a> {
    /// A finder of `paths`.
    pub(crate) fn new(paths: Vec<&'a str>) -> Self {
        let mut exact = HashMap::with_capacity(paths.len());
        for (index, path) in paths.iter().enumerate() {
            exact.insert(*path, index);
        }
        Self {
            paths,
            exact,
            loose: None,
        }
    }

    /// The number of the file that `path` names. None if there is none, or more than one in this
    /// spelling.
    pub(crate) fn find(&mut self, path: &str) -> Option<usize> {
        if let Some(&index) = self.exact.get(path) {
            return Some(index);
        }
        let slashed = path.replace('\\', "/");
        let slashed = joined(&slashed, "").ok()?;
        if let Some(&index) = self.exact.get(slashed.as_str()) {
            return Some(index);
        }
        let loose = self.loose.get_or_insert_with(|| loose_names(&self.paths));
        match loose.get(&folded(&slashed)) {
            Some(Loose::One(index)) => Some(*index),
            _ => None,
        }
    }
}

/// The files by folded path, with and without their endings. A whole path wins.
fn loose_names(paths: &[&str]) -> HashMap<String, Loose> {
    let mut loose = HashMap::new();
    for (index, path) in paths.iter().enumerate() {
        enter(&mut loose, folded(path), index);
    }
    let mut stems = HashMap::new();
    for (index, path) in paths.iter().enumerate() {
        enter(&mut stems, folded(&stem_of(path)), index);
    }
    for (stem, file) in stems {
        loose.entry(stem).or_insert(file);
    }
    loose
}

fn enter(names: &mut HashMap<String, Loose>, name: String, index: usize) {
    names
        .entry(name)
        .and_modify(|file| *file = Loose::Many)
        .or_insert(Loose::One(index));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_a_url_whole_urls_name_files_too() {
        let root = Root::at_url("s3://bucket/set/".to_owned());
        for (named, path) in [
            ("a.png", "sub/a.png"),
            ("s3://bucket/set/sub/a.png", "sub/a.png"),
            ("../a.png", "a.png"),
        ] {
            assert_eq!(root.relative(named, "sub").as_deref(), Ok(path));
        }
        for named in [
            "s3://other/set/a.png",
            "https://host/a.png",
            "/set/a.png",
            "../../a",
        ] {
            assert!(root.relative(named, "sub").is_err(), "{named}");
        }
    }

    #[test]
    fn every_spelling_of_a_path_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::new(folder.path());
        let full = format!("{}/sub//b.png", folder.path().display());
        let url = format!("file://{full}");
        let paths = ["a.png", "sub/b.png", "sub/\u{e9}.jpg", "x/1.png", "x/1.jpg"];
        let mut finder = Finder::new(paths.to_vec());
        for (named, table, path) in [
            ("sub/b.png", "", "sub/b.png"),
            ("./sub//b.png", "", "sub/b.png"),
            ("sub/../sub/./b.png", "", "sub/b.png"),
            ("b.png", "sub", "sub/b.png"),
            ("../a.png", "sub", "a.png"),
            ("sub\\b.png", "", "sub/b.png"),
            (".\\sub\\b.png", "", "sub/b.png"),
            (" sub/b.png ", "", "sub/b.png"),
            ("SUB/B.PNG", "", "sub/b.png"),
            ("sub/b", "", "sub/b.png"),
            ("sub/e\u{301}.jpg", "", "sub/\u{e9}.jpg"),
            (full.as_str(), "", "sub/b.png"),
            (full.as_str(), "sub", "sub/b.png"),
            (url.as_str(), "", "sub/b.png"),
        ] {
            let relative = root.relative(named, table).unwrap();
            let found = finder.find(&relative).map(|index| paths[index]);
            assert_eq!(found, Some(path), "{named}");
        }
        for (named, table) in [
            ("gone.png", ""),
            ("sub", ""),
            ("x/1", ""),
            ("b.png", ""),
            ("", ""),
        ] {
            let relative = root.relative(named, table).unwrap();
            assert_eq!(finder.find(&relative), None, "{named}");
        }
        for outside in ["../a.png", "sub/../../a.png", "/etc/passwd", "/"] {
            assert!(root.relative(outside, "").is_err(), "{outside}");
        }
        assert_eq!(finder.find("..\\a.png"), None);
    }
}
