//! The repository's files, its Makefile's targets, and the program's verbs and flags by its own
//! help.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Crates by their short names.
const CRATES: [&str; 5] = ["data", "annotate", "sdxl", "train", "cli"];

/// Files that must exist wherever a path to them begins.
const SOURCES: [&str; 4] = [".rs", ".cpp", ".py", ".sh"];

#[derive(Debug)]
pub(crate) struct Repository {
    pub(crate) root: PathBuf,
    /// Entries of the root that git does not ignore.
    entries: BTreeSet<String>,
    /// Paths of all files.
    files: BTreeSet<String>,
    pub(crate) targets: BTreeSet<String>,
    pub(crate) program: Verb,
}

/// A verb, or the program itself.
#[derive(Debug)]
pub(crate) struct Verb {
    /// With all words before it.
    pub(crate) name: String,
    pub(crate) flags: BTreeSet<String>,
    pub(crate) verbs: BTreeMap<String, Self>,
}

impl Repository {
    /// The repository at `root`, whose program is this one.
    pub(crate) fn read(root: &Path, program: Verb) -> Self {
        let ignored = fs::read_to_string(root.join(".gitignore")).unwrap();
        let ignored: Vec<&str> = ignored.lines().chain(["/.git"]).collect();
        let mut files = BTreeSet::new();
        collect(root, "", &ignored, &mut files);
        let entries = files
            .iter()
            .map(|file| first_part(file).to_owned())
            .collect();
        let makefile = fs::read_to_string(root.join("Makefile")).unwrap();
        let rules = makefile
            .lines()
            .filter_map(|line| Some(line.split_once(':')?.0));
        let targets = rules
            .filter(|name| !name.is_empty() && name.chars().all(is_of_target))
            .map(str::to_owned);
        Self {
            root: root.to_owned(),
            entries,
            targets: targets.collect(),
            files,
            program,
        }
    }

    /// Whether a word is a path of the repository to something that does not exist.
    pub(crate) fn lacks(&self, word: &str) -> bool {
        let path = word.trim_end_matches('/').trim_start_matches("./");
        if path.contains("://") || path.starts_with(['/', '~', '$', '-']) || path.contains("..") {
            return false;
        }
        let Some((first, rest)) = path.split_once('/') else {
            return self.lacks_source(path);
        };
        if self.entries.contains(first) {
            return !self.has(path);
        }
        if CRATES.contains(&first) {
            let places =
                ["", "src/"].map(|folder| format!("crates/rectiflow-{first}/{folder}{rest}"));
            return !places
                .iter()
                .any(|place| self.has(place) || self.has(&format!("{place}.rs")));
        }
        self.lacks_source(path)
    }

    /// Whether a path is that of a source file, wherever it begins, and there is none.
    fn lacks_source(&self, path: &str) -> bool {
        if !SOURCES
            .iter()
            .any(|ending| path.len() > ending.len() && path.ends_with(ending))
        {
            return false;
        }
        let parts: Vec<&str> = path.split('/').collect();
        !self.files.iter().any(|file| {
            let found: Vec<&str> = file.split('/').collect();
            let start = found.len().checked_sub(parts.len());
            start.is_some_and(|start| {
                found[start..]
                    .iter()
                    .zip(&parts)
                    .all(|(found, part)| matches(found, part))
            })
        })
    }

    /// Whether a file or folder exists at a path, in which `*` and `<...>` stand for any text.
    fn has(&self, path: &str) -> bool {
        let parts: Vec<&str> = path.split('/').collect();
        self.files.iter().any(|file| {
            let found: Vec<&str> = file.split('/').collect();
            found.len() >= parts.len()
                && found
                    .iter()
                    .zip(&parts)
                    .all(|(found, part)| matches(found, part))
        })
    }

    /// The path of a folder of the repository that a word names.
    pub(crate) fn folder(&self, word: &str) -> Option<String> {
        let path = word.trim_end_matches('/');
        let is_folder = self.entries.contains(first_part(path)) && self.root.join(path).is_dir();
        is_folder.then(|| path.to_owned())
    }

    /// Whether a folder has an entry of this name, a file with or without `.rs`.
    pub(crate) fn has_entry(&self, folder: &str, name: &str) -> bool {
        let path = format!("{folder}/{}", name.trim_end_matches('/'));
        self.has(&path) || self.has(&format!("{path}.rs"))
    }

    /// The flags of all verbs.
    pub(crate) fn flags(&self) -> BTreeSet<&str> {
        self.program.all_flags()
    }

    /// Whether a flag is written in the sources, the scripts, the files for launchers or the
    /// Makefile.
    pub(crate) fn is_written(&self, flag: &str) -> bool {
        let folders = ["crates/", "scripts/", "launch/", "Makefile"];
        let is_source = |file: &&String| {
            let is_this_test = file.contains("tests/documents/");
            folders.iter().any(|folder| file.starts_with(folder)) && !is_this_test
        };
        self.files.iter().filter(is_source).any(|file| {
            let Ok(text) = fs::read_to_string(self.root.join(file)) else {
                return false;
            };
            text.match_indices(flag)
                .any(|(at, _)| !text[at + flag.len()..].starts_with(is_of_target))
        })
    }
}

impl Verb {
    /// A verb by the program's own help; the program itself without words.
    pub(crate) fn ask(words: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rectiflow"));
        let output = command.args(words).arg("--help").output().unwrap();
        assert!(
            output.status.success(),
            "rectiflow {words:?} --help: {output:?}"
        );
        let help = String::from_utf8(output.stdout).unwrap();
        let mut verbs = Vec::new();
        for name in verbs_of(&help) {
            let words: Vec<&str> = words.iter().copied().chain([name]).collect();
            verbs.push(Self::ask(&words));
        }
        let name = ["rectiflow"]
            .iter()
            .chain(words)
            .copied()
            .collect::<Vec<_>>()
            .join(" ");
        Self::new(&name, &help, verbs)
    }

    /// A verb of this help, and the verbs below it.
    pub(crate) fn new(name: &str, help: &str, verbs: Vec<Self>) -> Self {
        let last_word = |verb: &Self| verb.name.split(' ').next_back().unwrap().to_owned();
        let verbs = verbs
            .into_iter()
            .map(|verb| (last_word(&verb), verb))
            .collect();
        Self {
            name: name.to_owned(),
            flags: flags_of(help),
            verbs,
        }
    }

    fn all_flags(&self) -> BTreeSet<&str> {
        let mut flags: BTreeSet<&str> = self.flags.iter().map(String::as_str).collect();
        flags.extend(self.verbs.values().flat_map(Self::all_flags));
        flags
    }
}

/// The names in the section of commands.
fn verbs_of(help: &str) -> Vec<&str> {
    let section = help.split("Commands:\n").nth(1).unwrap_or_default();
    let lines = section.lines().take_while(|line| !line.is_empty());
    let names = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect()
}

/// The flags that lines of a help text begin with: `-h, --help`, `--set <KEY=VALUE>`.
fn flags_of(help: &str) -> BTreeSet<String> {
    let lines = help
        .lines()
        .map(str::trim_start)
        .filter(|line| line.starts_with('-'));
    let first_two = lines.flat_map(|line| line.split_whitespace().take(2));
    first_two
        .filter(|word| word.starts_with("--"))
        .map(str::to_owned)
        .collect()
}

/// Paths of all files below a folder of the root, but for what git ignores: a name, of the root
/// alone where a slash precedes it.
fn collect(root: &Path, folder: &str, ignored: &[&str], files: &mut BTreeSet<String>) {
    for entry in fs::read_dir(root.join(folder)).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let path = format!("{folder}{name}");
        if ignored
            .iter()
            .any(|line| *line == format!("/{path}") || line.trim_end_matches('/') == name)
        {
            continue;
        }
        if entry.file_type().unwrap().is_dir() {
            collect(root, &format!("{path}/"), ignored, files);
        } else {
            files.insert(path);
        }
    }
}

fn first_part(path: &str) -> &str {
    path.split('/').next().unwrap_or(path)
}

fn is_of_target(sign: char) -> bool {
    sign.is_ascii_alphanumeric() || sign == '-' || sign == '_'
}

/// Whether a name fits a pattern in which `*` and `<...>` stand for any text.
fn matches(name: &str, pattern: &str) -> bool {
    let Some(start) = pattern.find(['*', '<']) else {
        return name == pattern;
    };
    let Some(rest) = name.strip_prefix(&pattern[..start]) else {
        return false;
    };
    let behind = match pattern[start..].find('>') {
        Some(end) if pattern[start..].starts_with('<') => &pattern[start + end + 1..],
        _ => &pattern[start + 1..],
    };
    (0..=rest.len())
        .filter(|&at| rest.is_char_boundary(at))
        .any(|at| matches(&rest[at..], behind))
}

#[test]
fn help_is_read() {
    let help = "Does it.\n\nUsage: x\n\nCommands:\n  one   First\n        and more\n  help  Print\n\nOptions:\n      \
                --set <K=V>  Sets --this\n  -h, --help\n";
    assert_eq!(verbs_of(help), ["one"]);
    assert_eq!(
        flags_of(help).into_iter().collect::<Vec<_>>(),
        ["--help", "--set"]
    );
}

#[test]
fn patterns_stand_for_any_text() {
    assert!(
        matches("engine_mosaic.py", "engine_*.py") && matches("2026-11-26-step", "<date>-step")
    );
    assert!(matches("a", "*") && !matches("engine_mosaic.rs", "engine_*.py") && !matches("b", "a"));
}
