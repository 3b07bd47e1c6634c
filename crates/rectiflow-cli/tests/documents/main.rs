//! The documents: each relative link, repository path and command that they name exists.
//!
//! Read are the Markdown files of the repository's root and of `docs/`, and `llms.txt`.
//!
//! - A relative link leads to a file or folder, its `#anchor` to a heading. Other hosts are not
//!   asked.
//! - A path in code, inline or in a block, is the repository's if it begins with an entry of its
//!   root that git does not ignore, or with a crate's short name: `data/remote` is
//!   `crates/rectiflow-data/src/remote`, a folder or a file with or without `.rs`. It must exist.
//!   Within a part, `*` and `<...>` stand for any text. A file of Rust, C++, Python or shell must
//!   exist wherever its path begins: `order.rs`, `tests/order.rs`. All other paths are the reader's
//!   own (`runs/mine`, `my-pictures`).
//! - In a block, the first word of an indented line below a folder of the repository is an entry of
//!   that folder.
//! - `rectiflow VERB --flag`: the program's own help has both. A flag without a program before it
//!   belongs to some verb, or is written somewhere in the sources.
//! - `make TARGET`: the Makefile has it.
//! - `docs/log.md` and the change log describe the past: their links are followed, the names in
//!   them are not looked up.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod markdown;
mod repository;

use std::{fs, path::Path};

use markdown::{Document, headings, links};
use repository::{Repository, Verb};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Pages that describe the past.
const DATED: [&str; 2] = ["CHANGELOG.md", "docs/log.md"];

/// Words that end a command within a line.
const SEPARATORS: [&str; 8] = ["|", "||", "&&", ";", ">", ">>", "<", "&"];

#[test]
fn the_documents_name_nothing_that_is_not_there() {
    let repository = Repository::read(Path::new(ROOT), Verb::ask(&[]));
    let mut faults = Vec::new();
    for name in documents() {
        let text = fs::read_to_string(Path::new(ROOT).join(&name)).unwrap();
        let found = check(&repository, &name, &text);
        faults.extend(found.into_iter().map(|fault| format!("{name}: {fault}")));
    }
    assert!(
        faults.is_empty(),
        "{} faults:\n{}",
        faults.len(),
        faults.join("\n")
    );
}

/// Paths of all documents below the root.
fn documents() -> Vec<String> {
    let mut names = vec!["llms.txt".to_owned()];
    for folder in ["", "docs/"] {
        for entry in fs::read_dir(Path::new(ROOT).join(folder)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.ends_with(".md") {
                names.push(format!("{folder}{name}"));
            }
        }
    }
    names.sort();
    names
}

/// The names in a document that do not exist.
fn check(repository: &Repository, name: &str, text: &str) -> Vec<String> {
    let document = Document::parse(text);
    let mut faults = wrong_links(repository, name, &document);
    if DATED.contains(&name) {
        return faults;
    }
    for line in document.code_lines() {
        faults.extend(wrong_paths(repository, &line));
        faults.extend(wrong_commands(repository, &line));
    }
    for block in &document.blocks {
        faults.extend(wrong_entries(repository, block));
    }
    faults
}

fn wrong_links(repository: &Repository, name: &str, document: &Document) -> Vec<String> {
    let folder = Path::new(name).parent().unwrap();
    let mut faults = Vec::new();
    for link in links(&document.prose) {
        if link.contains("://") || link.starts_with("mailto:") {
            continue;
        }
        let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
        let target = repository.root.join(folder).join(path);
        if !target.exists() {
            faults.push(format!("the link {link} leads nowhere"));
            continue;
        }
        if anchor.is_empty() {
            continue;
        }
        let is_here = path.is_empty();
        let text = if is_here {
            document.prose.clone()
        } else {
            fs::read_to_string(target).unwrap()
        };
        if !headings(&text).iter().any(|heading| heading == anchor) {
            faults.push(format!("the link {link}: no heading has this anchor"));
        }
    }
    faults
}

fn wrong_paths(repository: &Repository, line: &str) -> Vec<String> {
    let words = line.split_whitespace().map(trimmed);
    let missing = words.filter(|word| repository.lacks(word));
    missing
        .map(|path| format!("no such file or folder: {path}"))
        .collect()
}

/// A word without the brackets and stops around it.
fn trimmed(word: &str) -> &str {
    let word = word.trim_matches(['(', ')', '[', ']', '"', '\'', ',', ';', ':']);
    word.strip_suffix('.').unwrap_or(word)
}

/// Lines of a block below a folder of the repository that name no entry of it.
fn wrong_entries(repository: &Repository, block: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let mut folder = None;
    for line in block.lines() {
        let Some(word) = line.split_whitespace().next() else {
            continue;
        };
        if line.starts_with(word) {
            folder = repository.folder(word);
        } else if let Some(folder) = &folder
            && !repository.has_entry(folder, word)
        {
            faults.push(format!("{folder} has no {word}"));
        }
    }
    faults
}

fn wrong_commands(repository: &Repository, line: &str) -> Vec<String> {
    let words: Vec<&str> = line
        .split_whitespace()
        .take_while(|word| !word.starts_with('#'))
        .collect();
    let mut faults = Vec::new();
    for command in words.split(|word| SEPARATORS.contains(word)) {
        let is_assignment = |word: &&&str| word.contains('=') && !word.starts_with('-');
        let start = command.iter().take_while(is_assignment).count();
        let command = &command[start..];
        let is_program = |word: &&str| *word == "rectiflow" || word.ends_with("release/rectiflow");
        match (command, command.iter().position(is_program)) {
            (_, Some(at)) => faults.extend(wrong_arguments(repository, &command[at + 1..])),
            (["make", target, ..], _) => faults.extend(wrong_target(repository, target)),
            ([flag, ..], _) if flag.starts_with("--") => {
                faults.extend(
                    command
                        .iter()
                        .filter_map(|word| unknown_flag(repository, word)),
                );
            }
            _ => {}
        }
    }
    faults
}

/// Whether a word can be the name of a verb or target, not a placeholder or a number.
fn is_name(word: &str) -> bool {
    word.starts_with(|first: char| first.is_ascii_lowercase())
}

fn wrong_target(repository: &Repository, target: &str) -> Option<String> {
    let target = trimmed(target);
    let is_wrong = is_name(target) && !target.contains('=') && !repository.targets.contains(target);
    is_wrong.then(|| format!("the Makefile has no target {target}"))
}

/// The faults of the words after `rectiflow`.
fn wrong_arguments(repository: &Repository, words: &[&str]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut verb = &repository.program;
    let mut words = words.iter().map(|word| trimmed(word)).peekable();
    while let Some(word) = words.next_if(|word| is_name(word) && !verb.verbs.is_empty()) {
        // `bench loader|step`: one word that names several.
        for name in word.split('|') {
            let Some(found) = verb.verbs.get(name) else {
                faults.push(format!("{} has no verb {name}", verb.name));
                return faults;
            };
            faults.extend(words.clone().filter_map(|word| wrong_flag(found, word)));
        }
        verb = &verb.verbs[word.split('|').next().unwrap()];
        if !verb.verbs.is_empty() {
            faults.clear();
        }
    }
    faults
}

fn wrong_flag(verb: &Verb, word: &str) -> Option<String> {
    let flag = flag(word)?;
    (!verb.flags.contains(flag)).then(|| format!("{} has no flag {flag}", verb.name))
}

fn unknown_flag(repository: &Repository, word: &str) -> Option<String> {
    let flag = flag(trimmed(word))?;
    let is_known = repository.flags().contains(flag) || repository.is_written(flag);
    (!is_known).then(|| format!("no verb has a flag {flag}, and no source writes it"))
}

/// `--flag` of `--flag=value`.
fn flag(word: &str) -> Option<&str> {
    let name = word.split(['=', '|', ',']).next()?;
    name.strip_prefix("--").filter(|rest| is_name(rest))?;
    Some(name)
}

mod tests {
    use super::*;

    /// A program of four verbs.
    fn program() -> Verb {
        let verb = |name, help| Verb::new(name, help, Vec::new());
        let benches = ["rectiflow bench loader", "rectiflow bench step"];
        let verbs = vec![
            verb("rectiflow prep", "  --out <DIR>\n  --vae <DIR>"),
            verb(
                "rectiflow plan",
                "  --gpus <N>\n  --network <NAME>\n  -h, --help",
            ),
            verb(
                "rectiflow train",
                "  --ranks <N>\n  --set <KEY=VALUE>\n  --json",
            ),
            Verb::new(
                "rectiflow bench",
                "  --json",
                benches.map(|name| verb(name, "  --json")).into(),
            ),
        ];
        Verb::new("rectiflow", "  --json", verbs)
    }

    /// The faults of a page in `docs/` with this text.
    fn faults(text: &str) -> Vec<String> {
        check(
            &Repository::read(Path::new(ROOT), program()),
            "docs/page.md",
            text,
        )
    }

    fn is_one_fault(text: &str, expected: &str) {
        let found = faults(text);
        assert!(
            found.len() == 1 && found[0].contains(expected),
            "{text}: {found:?}"
        );
    }

    #[test]
    fn a_broken_link_is_found() {
        is_one_fault("See [there](nowhere.md).", "nowhere.md");
        is_one_fault("![A picture](../docs/nowhere.png \"title\")", "nowhere.png");
        is_one_fault("# Here\n\n[up](#there)", "#there");
        is_one_fault("[what](../README.md#no-such-heading)", "no-such-heading");
        assert_eq!(
            faults("# Here it is\n\n[up](#here-it-is) [home](../README.md) [far](https://a.b/c)"),
            Vec::<String>::new()
        );
        assert!(faults("`[code](is-no-link.md)`").is_empty());
    }

    #[test]
    fn a_missing_path_is_found() {
        is_one_fault("`crates/rectiflow-data/src/nowhere.rs`", "nowhere.rs");
        is_one_fault("`docs/nowhere`", "docs/nowhere");
        is_one_fault("`data/nowhere`", "data/nowhere");
        is_one_fault("Lines in `nowhere.rs` say so.", "nowhere.rs");
        is_one_fault("```\nsh scripts/nowhere/*.sh\n```", "scripts/nowhere");
        is_one_fault(
            "```\ncrates/rectiflow-cli/src    the command\n  nowhere   nothing\n```",
            "nowhere",
        );
        assert!(
            faults(
                "`data/order`, `data/lib`, `scripts/*.sh`, `tests/order.rs`, `crates/<crate>/src`"
            )
            .is_empty()
        );
        assert!(
            faults("`runs/mine`, `datasets/mine`, `my-pictures`, `target/x`, `s3://docs/x`")
                .is_empty()
        );
    }

    #[test]
    fn an_unknown_verb_or_flag_is_found() {
        is_one_fault("`rectiflow trian recipe.toml`", "trian");
        is_one_fault("`rectiflow train RECIPE --rank 8`", "--rank");
        is_one_fault(
            "```\nrectiflow prep a --out b \\\n    --vea c\n```",
            "--vea",
        );
        is_one_fault(
            "    rectiflow bench loader D --nothing=1\n",
            "rectiflow bench loader has no flag --nothing",
        );
        is_one_fault("`--no-such-flag`", "--no-such-flag");
        assert!(
            faults("`torchrun --no-python rectiflow train RECIPE --set a.b=c --json`").is_empty()
        );
        assert!(
            faults("`rectiflow plan RECIPE [--gpus N] [--network ib-400|eth-100] | less --raw`")
                .is_empty()
        );
        assert!(
            faults(
                "`--gpus`, `--low-memory`, `rectiflow`, `rectiflow VERB`, `rectiflow bench step`"
            )
            .is_empty()
        );
    }

    #[test]
    fn an_unknown_target_is_found() {
        is_one_fault("`make deom`", "deom");
        is_one_fault("```\nLIBTORCH=/a make tset   # all\n```", "tset");
        assert!(faults("`make demo`, `make`, `make TARGET`, `LIBTORCH=/a make ...`").is_empty());
    }
}
