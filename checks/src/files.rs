//! The Rust files of one crate, by their path in it. A map in memory, so that tests can make up a
//! crate.

use std::{
    collections::BTreeMap,
    fs,
    path::{Component, Path, PathBuf},
};

/// Texts by path relative to the crate's folder, `src/lib.rs`.
#[derive(Debug, Default, Clone)]
pub struct Files(BTreeMap<String, String>);

impl Files {
    /// Reads every `.rs` file of the crate in `folder` under `src`, `examples` and `tests`.
    ///
    /// # Errors
    ///
    /// A folder or file that cannot be read.
    pub fn read(folder: &Path) -> Result<Self, String> {
        let mut files = Self::default();
        for part in ["src", "examples", "tests"] {
            if folder.join(part).is_dir() {
                files.read_folder(folder, &folder.join(part))?;
            }
        }
        Ok(files)
    }

    fn read_folder(&mut self, root: &Path, folder: &Path) -> Result<(), String> {
        let failed = |error| format!("{}: {error}", folder.display());
        for entry in fs::read_dir(folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.is_dir() {
                self.read_folder(root, &path)?;
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let text = fs::read_to_string(&path)
                    .map_err(|error| format!("{}: {error}", path.display()))?;
                let name = path
                    .strip_prefix(root)
                    .expect("a file lies below its crate");
                self.insert(&name.to_string_lossy(), &text);
            }
        }
        Ok(())
    }

    /// Adds a file, or replaces it.
    pub fn insert(&mut self, path: &str, text: &str) {
        self.0.insert(path.to_owned(), text.to_owned());
    }

    /// The text of a file.
    pub fn get(&self, path: &str) -> Option<&str> {
        self.0.get(path).map(String::as_str)
    }

    /// All paths and texts, in the order of the paths.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(path, text)| (path.as_str(), text.as_str()))
    }

    /// The roots of this crate's module trees: the library or the command, and the examples.
    pub fn roots(&self) -> Vec<&str> {
        self.0
            .keys()
            .map(String::as_str)
            .filter(|path| is_root(path))
            .collect()
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Files {
    fn from(texts: [(&str, &str); N]) -> Self {
        let mut files = Self::default();
        for (path, text) in texts {
            files.insert(path, text);
        }
        files
    }
}

fn is_root(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    matches!(
        parts.as_slice(),
        ["src", "lib.rs" | "main.rs"] | ["examples", _] | ["examples", _, "main.rs"]
    )
}

/// `folder/relative` without `..`.
pub(crate) fn join(folder: &str, relative: &str) -> String {
    let mut path = PathBuf::new();
    for part in Path::new(folder).join(relative).components() {
        match part {
            Component::ParentDir => {
                path.pop();
            }
            part => path.push(part),
        }
    }
    path.to_string_lossy().into_owned()
}
