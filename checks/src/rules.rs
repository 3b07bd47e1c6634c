//! ARCHITECTURE.md's invariants that can be seen in the syntax. Each rule returns what breaks it, a
//! line each.

use std::{collections::BTreeSet, fs, path::Path};

use crate::{
    files::Files,
    graph::{Graph, Names},
    source::Source,
    tree::Tree,
    words::Word,
};

/// One crate's own code, without tests and examples.
#[derive(Debug)]
pub struct Crate {
    /// Without the project's prefix.
    pub name: String,
    /// Who uses whom, and what of other crates.
    pub graph: Graph,
    /// By file: identifiers and literals outside tests.
    pub words: Vec<Vec<Word>>,
    /// What its `Cargo.toml` depends on outside tests and build scripts.
    pub dependencies: Vec<String>,
}

/// Paths that a crate may not mention, with the invariant: its number in ARCHITECTURE.md and its
/// words.
const FORBIDDEN: [(&str, &[&str], &str); 4] = [
    (
        "data",
        &["tch", "torch_sys", "rectiflow_sdxl", "rectiflow_train"],
        "1: `data` links no tensor library",
    ),
    (
        "annotate",
        &["tch", "torch_sys", "rectiflow_sdxl", "rectiflow_train"],
        "1: `annotate` links no tensor library and knows no trainer",
    ),
    (
        "sdxl",
        &[
            "std::net",
            "object_store",
            "reqwest",
            "tokio",
            "rectiflow_data",
            "rectiflow_train",
        ],
        "1: `sdxl` opens no socket and no data set",
    ),
    (
        "train",
        &["clap", "std::env::args", "std::env::args_os"],
        "1: `train` parses no arguments",
    ),
];

/// What a pure file may not mention.
const IMPURE: [&str; 6] = [
    "std::fs",
    "std::net",
    "std::env",
    "std::process",
    "std::time::Instant",
    "std::time::SystemTime",
];

/// The pure files; a name that ends in `/` is a folder.
const PURE: [(&str, &str); 19] = [
    ("data", "format/bucket.rs"),
    ("data", "order/"),
    ("data", "text/prompt.rs"),
    ("sdxl", "sample/schedule.rs"),
    ("sdxl", "weights/keys.rs"),
    ("sdxl", "cost/walk.rs"),
    ("sdxl", "cost/flops.rs"),
    ("train", "lr.rs"),
    ("train", "guard.rs"),
    ("train", "hardware.rs"),
    ("train", "state/partition.rs"),
    ("train", "ranks/launch.rs"),
    ("train", "ranks/straggler.rs"),
    ("train", "plan/mod.rs"),
    ("train", "plan/planner.rs"),
    ("train", "plan/search.rs"),
    ("train", "plan/setup.rs"),
    ("train", "plan/simulate.rs"),
    ("train", "plan/speed.rs"),
];

/// Where `async` is, and `.await`; a name that ends in `/` is a folder. The trainer sees an
/// iterator.
const ASYNC: [(&str, &str); 12] = [
    ("annotate", "caption/attempt.rs"),
    ("annotate", "caption/client.rs"),
    ("annotate", "caption/probe.rs"),
    ("annotate", "caption/run.rs"),
    ("annotate", "loopback/"),
    ("data", "remote/"),
    ("data", "dataset/fetch.rs"),
    ("data", "dataset/rows.rs"),
    ("data", "dataset/mod.rs"),
    ("data", "prep/publish.rs"),
    ("cli", "watch/mod.rs"),
    ("cli", "watch/server.rs"),
];

/// Where C and C++ are called.
const FOREIGN_CODE: [(&str, &str); 2] = [("sdxl", "torch/"), ("train", "ranks/c10d.rs")];

/// The file that makes process groups, and which of its names belong to whom: one opens a group,
/// one makes collectives.
const GROUPS: &str = "ranks/c10d.rs";
const GROUP_NAMES: [(&str, &[&str]); 3] = [
    ("Group", &["ranks/comm.rs", "ranks/rendezvous.rs"]),
    ("Work", &["ranks/comm.rs"]),
    ("*", &[]),
];

/// Where names of other layouts than diffusers' are, and of other models'.
const KEY_FILES: [(&str, &str); 2] = [("sdxl", "weights/keys.rs"), ("sdxl", "files/foreign.rs")];

/// Parts of names that no diffusers folder has: sgm's, OpenCLIP's, CompVis', other models'.
const KEY_PARTS: [&str; 22] = [
    "model.diffusion_model",
    "conditioner.embedders",
    "first_stage_model",
    "cond_stage_model",
    "model_ema",
    "input_blocks.",
    "output_blocks.",
    "middle_block.",
    "label_emb",
    "time_embed.",
    "in_layers",
    "out_layers",
    "emb_layers",
    "skip_connection",
    "in_proj",
    "resblocks",
    "lora_down",
    "lora_up",
    "double_blocks",
    "joint_blocks",
    "control_model",
    "ln_final",
];

/// Where the names of metrics are.
const METRICS: [(&str, &str); 1] = [("train", "measure/metrics/")];

/// A rule: what breaks it in these crates, a line each.
pub type Rule = fn(&[Crate]) -> Vec<String>;

/// Everything that breaks a rule.
///
/// # Errors
///
/// A file that cannot be read or parsed.
pub fn faults(workspace: &Path) -> Result<Vec<String>, String> {
    const RULES: [Rule; 8] = [
        layers,
        printing,
        purity,
        asynchrony,
        foreign_code,
        groups,
        key_tables,
        metric_names,
    ];
    let crates = read(workspace)?;
    let mut faults = Vec::new();
    for rule in RULES {
        faults.extend(rule(&crates));
    }
    Ok(faults)
}

/// Reads the crates of `workspace`.
///
/// # Errors
///
/// A file that cannot be read or parsed.
pub fn read(workspace: &Path) -> Result<Vec<Crate>, String> {
    ["data", "annotate", "sdxl", "train", "cli"]
        .iter()
        .map(|name| Crate::read(workspace, name))
        .collect()
}

impl Crate {
    fn read(workspace: &Path, name: &str) -> Result<Self, String> {
        let folder = workspace.join("crates").join(format!("rectiflow-{name}"));
        let manifest = folder.join("Cargo.toml");
        let manifest = fs::read_to_string(&manifest)
            .map_err(|error| format!("{}: {error}", manifest.display()))?;
        Self::new(name, &Files::read(&folder)?, &manifest)
    }

    /// A crate from its files and its `Cargo.toml`.
    ///
    /// # Errors
    ///
    /// A file that cannot be parsed.
    pub fn new(name: &str, files: &Files, manifest: &str) -> Result<Self, String> {
        let roots = files.roots();
        let root = roots.iter().find(|root| root.starts_with("src/"));
        let tree = Tree::read(files, root.ok_or("no src/lib.rs and no src/main.rs")?)?;
        let words = tree.sources.iter().map(Source::words).collect();
        let graph = Graph::new(&tree);
        Ok(Self {
            name: name.to_owned(),
            graph,
            words,
            dependencies: dependencies(manifest),
        })
    }

    /// `data/order/mod.rs:12 what (invariant why)`.
    fn fault(&self, file: usize, line: usize, what: &str, why: &str) -> String {
        format!(
            "{}/{}:{line} {what} (invariant {why})",
            self.name,
            self.graph.label(file)
        )
    }

    /// Whether a file is one of `list`, or in a folder of it.
    fn is_in(&self, file: usize, list: &[(&str, &str)]) -> bool {
        let label = self.graph.label(file);
        list.iter()
            .any(|(name, path)| *name == self.name && covers(path, label))
    }

    /// The files that are not in `list`.
    fn files_outside(&self, list: &[(&str, &str)]) -> Vec<usize> {
        (0..self.words.len())
            .filter(|file| !self.is_in(*file, list))
            .collect()
    }
}

/// The names below `[dependencies]`.
fn dependencies(manifest: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut is_inside = false;
    for line in manifest.lines() {
        if line.starts_with('[') {
            is_inside = line == "[dependencies]";
        } else if is_inside && !line.is_empty() {
            let name = line.split(['.', ' ', '=']).next().unwrap_or(line);
            names.push(name.to_owned());
        }
    }
    names
}

fn covers(path: &str, label: &str) -> bool {
    if path.ends_with('/') {
        label.starts_with(path)
    } else {
        label == path
    }
}

/// Whether `path` is one of `list`, or something below one.
fn is_below(path: &str, list: &[&str]) -> bool {
    for above in list {
        match path.strip_prefix(above) {
            Some(rest) if rest.is_empty() || rest.starts_with("::") => return true,
            _ => {}
        }
    }
    false
}

/// Invariant 1: what each crate may not know.
pub fn layers(crates: &[Crate]) -> Vec<String> {
    let mut faults = Vec::new();
    for of in crates {
        for (name, forbidden, why) in FORBIDDEN {
            if of.name == name {
                faults.extend(forbidden_paths(of, forbidden, why));
                faults.extend(forbidden_dependencies(of, forbidden, why));
            }
        }
    }
    faults
}

fn forbidden_paths(of: &Crate, forbidden: &[&str], why: &str) -> Vec<String> {
    let mut faults = Vec::new();
    for place in &of.graph.outside {
        if is_below(&place.path, forbidden) {
            faults.push(of.fault(place.file, place.line, &place.path, why));
        }
    }
    faults
}

fn forbidden_dependencies(of: &Crate, forbidden: &[&str], why: &str) -> Vec<String> {
    let mut faults = Vec::new();
    for dependency in &of.dependencies {
        if forbidden.contains(&dependency.replace('-', "_").as_str()) {
            faults.push(format!(
                "{}/Cargo.toml: {dependency} (invariant {why})",
                of.name
            ));
        }
    }
    faults
}

/// Invariant 1: libraries never print.
pub fn printing(crates: &[Crate]) -> Vec<String> {
    let why = "1: libraries never print";
    let mut faults = Vec::new();
    for of in crates.iter().filter(|of| of.name != "cli") {
        faults.extend(words_outside(of, &[], is_print, why));
        faults.extend(forbidden_paths(
            of,
            &["std::io::stdout", "std::io::stderr"],
            why,
        ));
    }
    faults
}

fn is_print(word: &Word) -> bool {
    const MACROS: [&str; 5] = ["print", "println", "eprint", "eprintln", "dbg"];
    word.sign == Some('!') && MACROS.contains(&word.text.as_str())
}

/// Invariant 2: pure files do no I/O, read no clock and no environment.
pub fn purity(crates: &[Crate]) -> Vec<String> {
    let mut faults = Vec::new();
    for of in crates {
        for place in &of.graph.outside {
            if of.is_in(place.file, &PURE) && is_below(&place.path, &IMPURE) {
                faults.push(of.fault(place.file, place.line, &place.path, "2: the file is pure"));
            }
        }
        for (_, path) in PURE.iter().filter(|(name, _)| *name == of.name) {
            let mut labels = (0..of.words.len()).map(|file| of.graph.label(file));
            if !labels.any(|label| covers(path, label)) {
                faults.push(format!(
                    "{}/{path}: listed as pure (invariant 2), not there",
                    of.name
                ));
            }
        }
    }
    faults
}

/// Invariant 2: where `async` is.
pub fn asynchrony(crates: &[Crate]) -> Vec<String> {
    words_of_all(crates, &ASYNC, is_async, "2: async is elsewhere")
}

fn is_async(word: &Word) -> bool {
    word.text == "async" || word.text == "await"
}

/// Invariant 6: C and C++ are called from their two places.
pub fn foreign_code(crates: &[Crate]) -> Vec<String> {
    words_of_all(
        crates,
        &FOREIGN_CODE,
        is_extern,
        "6: C++ is called elsewhere",
    )
}

fn is_extern(word: &Word) -> bool {
    word.text == "extern"
}

/// Invariant 6: other layouts' and other models' tensor names.
pub fn key_tables(crates: &[Crate]) -> Vec<String> {
    words_of_all(crates, &KEY_FILES, is_key, "6: a name of another layout")
}

fn is_key(word: &Word) -> bool {
    word.is_string() && KEY_PARTS.iter().any(|part| word.text.contains(part))
}

/// Invariant 6: names of metrics. Seen are strings of `train` that are the name of a field of two
/// words or more.
pub fn metric_names(crates: &[Crate]) -> Vec<String> {
    let mut faults = Vec::new();
    for of in crates.iter().filter(|of| of.name == "train") {
        let others = of.files_outside(&METRICS);
        let mut names = BTreeSet::new();
        for file in 0..of.words.len() {
            if !others.contains(&file) {
                names.extend(field_names(&of.words[file]));
            }
        }
        if names.is_empty() {
            return vec![format!("{METRICS:?}: not there")];
        }
        for file in others {
            for word in &of.words[file] {
                if word.is_string() && names.contains(word.inside()) {
                    faults.push(of.fault(file, word.line, &word.text, "6: the name of a metric"));
                }
            }
        }
    }
    faults
}

/// The public fields whose names are two words or more: those of one word are words of other
/// things, too.
fn field_names(words: &[Word]) -> BTreeSet<&str> {
    let mut names = BTreeSet::new();
    for pair in words.windows(2) {
        if pair[0].text == "pub" && pair[1].sign == Some(':') && pair[1].text.contains('_') {
            names.insert(pair[1].text.as_str());
        }
    }
    names
}

/// Invariant 11: process groups are `c10d`'s, collectives `comm`'s.
pub fn groups(crates: &[Crate]) -> Vec<String> {
    let mut faults = words_of_all(
        crates,
        &[("train", GROUPS)],
        is_group_function,
        "11: only c10d knows groups",
    );
    for of in crates {
        for ((from, to), names) in &of.graph.arrows {
            if of.graph.label(*to) == GROUPS {
                faults.extend(group_names(of, *from, names));
            }
        }
    }
    faults
}

fn is_group_function(word: &Word) -> bool {
    word.text.starts_with("rf_")
}

/// What a file uses of `c10d` that is not for it.
fn group_names(of: &Crate, file: usize, used: &Names) -> Vec<String> {
    let mut faults = Vec::new();
    for (name, users) in GROUP_NAMES {
        if let Some(line) = used.get(name)
            && !users.contains(&of.graph.label(file))
        {
            faults.push(of.fault(file, *line, name, "11: only comm makes collectives"));
        }
    }
    faults
}

/// The words of all crates that are faults, but for those of the files in `list`.
fn words_of_all(
    crates: &[Crate],
    list: &[(&str, &str)],
    is_fault: fn(&Word) -> bool,
    why: &str,
) -> Vec<String> {
    let mut faults = Vec::new();
    for of in crates {
        faults.extend(words_outside(of, list, is_fault, why));
    }
    faults
}

fn words_outside(
    of: &Crate,
    list: &[(&str, &str)],
    is_fault: fn(&Word) -> bool,
    why: &str,
) -> Vec<String> {
    let mut faults = Vec::new();
    for file in of.files_outside(list) {
        for word in of.words[file].iter().filter(|word| is_fault(word)) {
            faults.push(of.fault(file, word.line, &word.text, why));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One crate with one file beside its face; what the rule says of it.
    fn faults(rule: Rule, name: &str, path: &str, text: &str) -> Vec<String> {
        let (folder, file) = path.split_once('/').expect("the file lies in a folder");
        let mut files = Files::default();
        files.insert("src/lib.rs", &format!("mod {folder};"));
        files.insert(
            &format!("src/{folder}/mod.rs"),
            &format!("pub mod {};", file.trim_end_matches(".rs")),
        );
        files.insert(&format!("src/{path}"), text);
        let of = Crate::new(name, &files, "[dependencies]\nserde.workspace = true\n")
            .expect("the file is Rust");
        rule(&[of])
    }

    #[test]
    fn forbidden_crates_are_found_in_code_macros_and_dependencies() {
        let of_data = |text| faults(layers, "data", "a/b.rs", text).len();
        assert_eq!(of_data("use tch::Tensor;"), 1);
        assert_eq!(of_data("fn f() { vec![tch::no_grad()]; }"), 1);
        assert_eq!(
            of_data("use serde::Serialize; // tch::Tensor\n#[cfg(test)]\nuse tch::Tensor;"),
            0
        );
        assert_eq!(
            faults(
                layers,
                "sdxl",
                "a/b.rs",
                "use std::{net as n};\nfn f() { n::TcpStream::connect(x) }"
            )
            .len(),
            2
        );
        let files = Files::from([("src/lib.rs", "")]);
        let of = Crate::new(
            "data",
            &files,
            "[dependencies]\ntch.workspace = true\n[dev-dependencies]\ntorch-sys = \"1\"\n",
        );
        assert_eq!(
            layers(&[of.expect("the file is Rust")]),
            ["data/Cargo.toml: tch (invariant 1: `data` links no tensor library)"]
        );
    }

    #[test]
    fn libraries_that_print_are_found() {
        let of_data = |text| faults(printing, "data", "a/b.rs", text).len();
        assert_eq!(of_data("fn f() { println!() }"), 1);
        assert_eq!(of_data("fn f() { vec![eprint!()]; }"), 1);
        assert_eq!(of_data("use std::io; fn f() { io::stderr() }"), 1);
        assert_eq!(of_data("fn f(print: u8) { print }"), 0);
    }

    #[test]
    fn impure_names_are_found_in_pure_files_only() {
        let of_data = |path, text| {
            let found = faults(purity, "data", path, text);
            found
                .iter()
                .filter(|fault| !fault.contains("not there"))
                .count()
        };
        assert_eq!(
            of_data("order/lanes.rs", "use std::time::{Duration, Instant};"),
            1
        );
        assert_eq!(
            of_data(
                "order/lanes.rs",
                "use std::time; fn f() { time::SystemTime::now() }"
            ),
            1
        );
        assert_eq!(of_data("order/lanes.rs", "fn f() { std::env::var(x) }"), 1);
        assert_eq!(
            of_data(
                "order/lanes.rs",
                "use std::time::Duration; fn f() { env!(\"X\") }"
            ),
            0
        );
        assert_eq!(of_data("load/feed.rs", "use std::time::Instant;"), 0);
        assert!(
            faults(purity, "data", "order/lanes.rs", "")
                .iter()
                .any(|fault| fault.contains("text/prompt.rs: listed"))
        );
    }

    #[test]
    fn words_are_found_outside_of_their_files() {
        assert_eq!(
            faults(
                asynchrony,
                "data",
                "load/feed.rs",
                "async fn f() { x.await }"
            )
            .len(),
            2
        );
        assert_eq!(
            faults(asynchrony, "data", "remote/fetch.rs", "async fn f() {}"),
            [""; 0]
        );
        assert_eq!(
            faults(
                foreign_code,
                "sdxl",
                "weights/a.rs",
                "unsafe extern \"C\" { fn a(); }"
            )
            .len(),
            1
        );
        assert_eq!(
            faults(
                foreign_code,
                "sdxl",
                "torch/a.rs",
                "unsafe extern \"C\" { fn a(); }"
            ),
            [""; 0]
        );
        assert_eq!(
            faults(
                key_tables,
                "sdxl",
                "files/a.rs",
                "const A: &str = \"first_stage_model.x\";"
            )
            .len(),
            1
        );
        assert_eq!(
            faults(
                key_tables,
                "sdxl",
                "files/a.rs",
                "/// first_stage_model\nconst A: u8 = 1;"
            ),
            [""; 0]
        );
        assert_eq!(
            faults(
                key_tables,
                "sdxl",
                "weights/keys.rs",
                "const A: &str = \"first_stage_model.x\";"
            ),
            [""; 0]
        );
    }

    #[test]
    fn groups_belong_to_the_collectives() {
        let of_user = |user: &str, text: &str| {
            let files = Files::from([
                ("src/lib.rs", "mod ranks;"),
                ("src/ranks/mod.rs", &format!("mod c10d; mod {user};")),
                (
                    "src/ranks/c10d.rs",
                    "pub struct Group; pub struct Store; unsafe extern \"C\" { fn rf_free(); }",
                ),
                (&format!("src/ranks/{user}.rs"), text),
            ]);
            groups(&[Crate::new("train", &files, "").expect("the files are Rust")]).len()
        };
        assert_eq!(of_user("comm", "use super::c10d::{Group, Store};"), 0);
        assert_eq!(of_user("rendezvous", "use super::c10d::Group;"), 0);
        assert_eq!(of_user("pulse", "use super::c10d::Store;"), 0);
        assert_eq!(of_user("pulse", "use super::c10d::{Group, Store};"), 1);
        assert_eq!(of_user("pulse", "fn f() { rf_free() }"), 1);
    }

    #[test]
    fn names_of_metrics_are_found_in_strings() {
        let files = Files::from([
            ("src/lib.rs", "mod measure; mod a;"),
            ("src/measure/mod.rs", "mod metrics;"),
            (
                "src/measure/metrics/mod.rs",
                "pub struct Step { pub data_secs: f64, pub loss: f64 }",
            ),
            (
                "src/a.rs",
                "const A: [&str; 3] = [\"data_secs\", \"loss\", \"other_secs\"];",
            ),
        ]);
        let found = metric_names(&[Crate::new("train", &files, "").expect("the files are Rust")]);
        assert_eq!(
            found,
            ["train/a.rs:1 \"data_secs\" (invariant 6: the name of a metric)"]
        );
    }
}
