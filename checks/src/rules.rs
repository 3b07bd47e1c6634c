//! ARCHITECTURE.md's invariants that can be seen in the syntax. Each rule returns what breaks it, a line each.

use std::{collections::BTreeSet, fs, path::Path};

use crate::{files::Files, graph::Graph, tree::Tree, words::Word};

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

/// Paths that a crate may not mention, with the invariant: its number in ARCHITECTURE.md and its words.
const FORBIDDEN: [(&str, &[&str], &str); 3] = [
    ("data", &["tch", "torch_sys", "rectiflow_sdxl", "rectiflow_train"], "1: `data` links no tensor library"),
    (
        "sdxl",
        &["std::net", "object_store", "reqwest", "tokio", "rectiflow_data", "rectiflow_train"],
        "1: `sdxl` opens no socket and no data set",
    ),
    ("train", &["clap", "std::env::args", "std::env::args_os"], "1: `train` parses no arguments"),
];

/// What a pure file may not mention.
const IMPURE: [&str; 6] =
    ["std::fs", "std::net", "std::env", "std::process", "std::time::Instant", "std::time::SystemTime"];

/// The pure files; a name that ends in `/` is a folder.
const PURE: [(&str, &[&str]); 3] = [
    ("data", &["format/bucket.rs", "order/", "text/prompt.rs"]),
    ("sdxl", &["sample/schedule.rs", "weights/keys.rs", "cost/walk.rs", "cost/flops.rs"]),
    (
        "train",
        &[
            "lr.rs",
            "guard.rs",
            "hardware.rs",
            "state/partition.rs",
            "ranks/launch.rs",
            "ranks/straggler.rs",
            "plan/mod.rs",
            "plan/simulate.rs",
        ],
    ),
];

/// Where `async` is, and `.await`; a name that ends in `/` is a folder. The trainer sees an iterator.
const ASYNC: [(&str, &str); 5] = [
    ("data", "remote/"),
    ("data", "dataset/fetch.rs"),
    ("data", "dataset/rows.rs"),
    ("data", "dataset/mod.rs"),
    ("data", "prep/publish.rs"),
];

/// Where C and C++ are called.
const FOREIGN_CODE: [(&str, &str); 2] = [("sdxl", "torch/"), ("train", "ranks/c10d.rs")];

/// The file that makes process groups, and the one that makes collectives with them.
const GROUPS: &str = "ranks/c10d.rs";
const COLLECTIVES: &str = "ranks/comm.rs";

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

const METRICS: &str = "measure/metrics.rs";

/// Reads the four crates of `workspace`.
///
/// # Errors
///
/// A file that cannot be read or parsed.
pub fn read(workspace: &Path) -> Result<Vec<Crate>, String> {
    ["data", "sdxl", "train", "cli"].iter().map(|name| Crate::read(workspace, name)).collect()
}

/// Everything that breaks a rule.
///
/// # Errors
///
/// A file that cannot be read or parsed.
pub fn faults(workspace: &Path) -> Result<Vec<String>, String> {
    let crates = read(workspace)?;
    let rules = [layers, printing, purity, asynchrony, foreign_code, groups, key_tables, metric_names];
    Ok(rules.iter().flat_map(|rule| rule(&crates)).collect())
}

impl Crate {
    fn read(workspace: &Path, name: &str) -> Result<Self, String> {
        let folder = workspace.join("crates").join(format!("rectiflow-{name}"));
        let manifest = folder.join("Cargo.toml");
        let manifest = fs::read_to_string(&manifest).map_err(|error| format!("{}: {error}", manifest.display()))?;
        Self::new(name, &Files::read(&folder)?, &manifest)
    }

    /// A crate from its files and its `Cargo.toml`.
    ///
    /// # Errors
    ///
    /// A file that cannot be parsed.
    pub fn new(name: &str, files: &Files, manifest: &str) -> Result<Self, String> {
        let root = files.roots().into_iter().find(|root| root.starts_with("src/"));
        let tree = Tree::read(files, root.ok_or("no src/lib.rs and no src/main.rs")?)?;
        let words = tree.sources.iter().map(|source| source.words().cloned().collect()).collect();
        let graph = Graph::new(&tree);
        Ok(Self { name: name.to_owned(), graph, words, dependencies: dependencies(manifest) })
    }

    /// `data/order/mod.rs:12`.
    fn place(&self, file: usize, line: usize) -> String {
        format!("{}/{}:{line}", self.name, self.graph.label(file))
    }

    /// Whether a file is one of `list`, or in a folder of it.
    fn is_in(&self, file: usize, list: &[(&str, &str)]) -> bool {
        list.iter().any(|(name, path)| *name == self.name && covers(path, self.graph.label(file)))
    }
}

/// The names below `[dependencies]`.
fn dependencies(manifest: &str) -> Vec<String> {
    let lines = manifest.lines().skip_while(|line| *line != "[dependencies]").skip(1);
    let own = lines.take_while(|line| !line.starts_with('['));
    own.filter_map(|line| line.split(['.', ' ', '=']).next())
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

fn covers(path: &str, label: &str) -> bool {
    if path.ends_with('/') { label.starts_with(path) } else { label == path }
}

fn begins(path: &str, with: &str) -> bool {
    path.strip_prefix(with).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// Invariant 1: what each crate may not know.
pub fn layers(crates: &[Crate]) -> Vec<String> {
    let mut faults = Vec::new();
    for (name, forbidden, invariant) in FORBIDDEN {
        for of in crates.iter().filter(|of| of.name == name) {
            for place in &of.graph.outside {
                if forbidden.iter().any(|path| begins(&place.path, path)) {
                    faults.push(format!("{} {} (invariant {invariant})", of.place(place.file, place.line), place.path));
                }
            }
            for dependency in &of.dependencies {
                if forbidden.contains(&dependency.replace('-', "_").as_str()) {
                    faults.push(format!("{name}/Cargo.toml: {dependency} (invariant {invariant})"));
                }
            }
        }
    }
    faults
}

/// Invariant 1: libraries never print.
pub fn printing(crates: &[Crate]) -> Vec<String> {
    const MACROS: [&str; 5] = ["print", "println", "eprint", "eprintln", "dbg"];
    let is_print = |word: &Word| word.sign == Some('!') && MACROS.contains(&word.text.as_str());
    let mut faults = Vec::new();
    for of in crates.iter().filter(|of| of.name != "cli") {
        faults.extend(words_that(of, "prints (invariant 1)", is_print));
        for place in &of.graph.outside {
            if begins(&place.path, "std::io::stdout") || begins(&place.path, "std::io::stderr") {
                faults.push(format!(
                    "{} {} (invariant 1: libraries never print)",
                    of.place(place.file, place.line),
                    place.path
                ));
            }
        }
    }
    faults
}

/// Invariant 2: pure files do no I/O, read no clock and no environment.
pub fn purity(crates: &[Crate]) -> Vec<String> {
    let mut faults = Vec::new();
    for (name, pure) in PURE {
        for of in crates.iter().filter(|of| of.name == name) {
            for path in pure {
                if !(0..of.graph.files.len()).any(|file| covers(path, of.graph.label(file))) {
                    faults.push(format!("{name}/{path}: not there, but in the list of pure files"));
                }
            }
            for place in &of.graph.outside {
                let is_pure = pure.iter().any(|path| covers(path, of.graph.label(place.file)));
                if is_pure && IMPURE.iter().any(|path| begins(&place.path, path)) {
                    faults.push(format!(
                        "{} {} (invariant 2: the file is pure)",
                        of.place(place.file, place.line),
                        place.path
                    ));
                }
            }
        }
    }
    faults
}

/// Invariant 2: where `async` is.
pub fn asynchrony(crates: &[Crate]) -> Vec<String> {
    let mut faults = Vec::new();
    for of in crates {
        for file in (0..of.words.len()).filter(|file| !of.is_in(*file, &ASYNC)) {
            faults.extend(words_of_file(of, file, "(invariant 2)", |word| {
                ["async", "await"].contains(&word.text.as_str())
            }));
        }
    }
    faults
}

/// Invariant 6: C and C++ are called from their two places.
pub fn foreign_code(crates: &[Crate]) -> Vec<String> {
    let mut faults = Vec::new();
    for of in crates {
        for file in (0..of.words.len()).filter(|file| !of.is_in(*file, &FOREIGN_CODE)) {
            faults.extend(words_of_file(of, file, "(invariant 6: C++ is behind these)", |word| word.text == "extern"));
        }
    }
    faults
}

/// Invariant 11: process groups are `c10d`'s, collectives `comm`'s.
pub fn groups(crates: &[Crate]) -> Vec<String> {
    let mut faults = Vec::new();
    for of in crates {
        for file in (0..of.words.len()).filter(|file| of.name != "train" || of.graph.label(*file) != GROUPS) {
            faults.extend(words_of_file(of, file, "(invariant 11)", |word| word.text.starts_with("rf_")));
        }
        for ((from, to), names) in &of.graph.arrows {
            if of.graph.label(*to) != GROUPS || of.graph.label(*from) == COLLECTIVES {
                continue;
            }
            for (name, line) in names.iter().filter(|(name, _)| ["Group", "Work", "*"].contains(&name.as_str())) {
                faults.push(format!(
                    "{} {name} of {GROUPS} (invariant 11: only `comm` makes collectives)",
                    of.place(*from, *line)
                ));
            }
        }
    }
    faults
}

/// Invariant 6: other layouts' and other models' tensor names.
pub fn key_tables(crates: &[Crate]) -> Vec<String> {
    let is_key = |word: &Word| word.is_string() && KEY_PARTS.iter().any(|part| word.text.contains(part));
    let mut faults = Vec::new();
    for of in crates {
        for file in (0..of.words.len()).filter(|file| !of.is_in(*file, &KEY_FILES)) {
            faults.extend(words_of_file(of, file, "(invariant 6: another layout's name)", is_key));
        }
    }
    faults
}

/// Invariant 6: names of metrics. Seen are strings of `train` that are the name of a field of two words, and the file's name.
pub fn metric_names(crates: &[Crate]) -> Vec<String> {
    let mut faults = Vec::new();
    for of in crates.iter().filter(|of| of.name == "train") {
        let Some(metrics) = (0..of.words.len()).find(|file| of.graph.label(*file) == METRICS) else {
            return vec![format!("train/{METRICS}: not there")];
        };
        let names = field_names(&of.words[metrics]);
        let is_name = |word: &Word| word.is_string() && names.contains(word.inside());
        for file in (0..of.words.len()).filter(|file| *file != metrics) {
            faults.extend(words_of_file(of, file, "(invariant 6: the name of a metric)", is_name));
        }
    }
    faults
}

/// The public fields whose names are two words or more: those of one word are words of other things, too.
fn field_names(words: &[Word]) -> BTreeSet<&str> {
    let pairs = words.windows(2);
    let fields = pairs.filter(|pair| pair[0].text == "pub" && pair[1].sign == Some(':'));
    fields.map(|pair| pair[1].text.as_str()).filter(|name| name.contains('_')).collect()
}

fn words_that(of: &Crate, why: &str, is_fault: impl Fn(&Word) -> bool) -> Vec<String> {
    (0..of.words.len()).flat_map(|file| words_of_file(of, file, why, &is_fault)).collect()
}

fn words_of_file(of: &Crate, file: usize, why: &str, is_fault: impl Fn(&Word) -> bool) -> Vec<String> {
    let faults = of.words[file].iter().filter(|word| is_fault(word));
    faults.map(|word| format!("{} {} {why}", of.place(file, word.line), word.text)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One crate with one file beside its face; what the rule says of it.
    fn faults(rule: fn(&[Crate]) -> Vec<String>, name: &str, path: &str, text: &str) -> Vec<String> {
        let (folder, file) = path.split_once('/').expect("the file lies in a folder");
        let mut files = Files::default();
        files.insert("src/lib.rs", &format!("mod {folder};"));
        files.insert(&format!("src/{folder}/mod.rs"), &format!("pub mod {};", file.trim_end_matches(".rs")));
        files.insert(&format!("src/{path}"), text);
        let of = Crate::new(name, &files, "[dependencies]\nserde.workspace = true\n").expect("the file is Rust");
        rule(&[of])
    }

    #[test]
    fn forbidden_crates_are_found_in_code_macros_and_dependencies() {
        let of_data = |text| faults(layers, "data", "a/b.rs", text).len();
        assert_eq!(of_data("use tch::Tensor;"), 1);
        assert_eq!(of_data("fn f() { vec![tch::no_grad()]; }"), 1);
        assert_eq!(of_data("use serde::Serialize; // tch::Tensor\n#[cfg(test)]\nuse tch::Tensor;"), 0);
        assert_eq!(
            faults(layers, "sdxl", "a/b.rs", "use std::{net as n};\nfn f() { n::TcpStream::connect(x) }").len(),
            2
        );
        let files = Files::from([("src/lib.rs", "")]);
        let of =
            Crate::new("data", &files, "[dependencies]\ntch.workspace = true\n[dev-dependencies]\ntorch-sys = \"1\"\n");
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
            found.into_iter().filter(|fault| !fault.contains("not there")).count()
        };
        assert_eq!(of_data("order/lanes.rs", "use std::time::{Duration, Instant};"), 1);
        assert_eq!(of_data("order/lanes.rs", "use std::time; fn f() { time::SystemTime::now() }"), 1);
        assert_eq!(of_data("order/lanes.rs", "fn f() { std::env::var(x) }"), 1);
        assert_eq!(of_data("order/lanes.rs", "use std::time::Duration; fn f() { env!(\"X\") }"), 0);
        assert_eq!(of_data("load/feed.rs", "use std::time::Instant;"), 0);
        assert!(
            faults(purity, "data", "order/lanes.rs", "")
                .iter()
                .any(|fault| fault.contains("text/prompt.rs: not there"))
        );
    }

    #[test]
    fn words_are_found_outside_of_their_files() {
        assert_eq!(faults(asynchrony, "data", "load/feed.rs", "async fn f() { x.await }").len(), 2);
        assert_eq!(faults(asynchrony, "data", "remote/fetch.rs", "async fn f() {}"), [""; 0]);
        assert_eq!(faults(foreign_code, "sdxl", "weights/a.rs", "unsafe extern \"C\" { fn a(); }").len(), 1);
        assert_eq!(faults(foreign_code, "sdxl", "torch/a.rs", "unsafe extern \"C\" { fn a(); }"), [""; 0]);
        assert_eq!(faults(key_tables, "sdxl", "files/a.rs", "const A: &str = \"first_stage_model.x\";").len(), 1);
        assert_eq!(faults(key_tables, "sdxl", "files/a.rs", "/// first_stage_model\nconst A: u8 = 1;"), [""; 0]);
        assert_eq!(faults(key_tables, "sdxl", "weights/keys.rs", "const A: &str = \"first_stage_model.x\";"), [""; 0]);
    }

    #[test]
    fn groups_belong_to_the_collectives() {
        let of_user = |user: &str, text: &str| {
            let files = Files::from([
                ("src/lib.rs", "mod ranks;"),
                ("src/ranks/mod.rs", &format!("mod c10d; mod {user};")),
                ("src/ranks/c10d.rs", "pub struct Group; pub struct Store; unsafe extern \"C\" { fn rf_free(); }"),
                (&format!("src/ranks/{user}.rs"), text),
            ]);
            groups(&[Crate::new("train", &files, "").expect("the files are Rust")]).len()
        };
        assert_eq!(of_user("comm", "use super::c10d::{Group, Store};"), 0);
        assert_eq!(of_user("pulse", "use super::c10d::Store;"), 0);
        assert_eq!(of_user("pulse", "use super::c10d::{Group, Store};"), 1);
        assert_eq!(of_user("pulse", "fn f() { rf_free() }"), 1);
    }

    #[test]
    fn names_of_metrics_are_found_in_strings() {
        let files = Files::from([
            ("src/lib.rs", "mod measure; mod a;"),
            ("src/measure/mod.rs", "mod metrics;"),
            ("src/measure/metrics.rs", "pub struct Step { pub data_secs: f64, pub loss: f64 }"),
            ("src/a.rs", "const A: [&str; 3] = [\"data_secs\", \"loss\", \"other_secs\"];"),
        ]);
        let found = metric_names(&[Crate::new("train", &files, "").expect("the files are Rust")]);
        assert_eq!(found, ["train/a.rs:1 \"data_secs\" (invariant 6: the name of a metric)"]);
    }
}
