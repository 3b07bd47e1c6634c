//! What this repository's tree must be like: the floors of each crate, and the report of what is
//! not so.

use std::{collections::BTreeSet, path::Path};

use crate::{
    files::Files,
    graph::{Graph, Place, names},
    tree::Tree,
};

/// Each crate's folders and loose files from the top floor down: each uses only what stands below
/// it. The face, `lib.rs` or `main.rs`, stands above all of them.
pub const FLOORS: [(&str, &[&str]); 5] = [
    (
        "rectiflow-data",
        &[
            "load",
            "prep",
            "source",
            "board",
            "posts",
            "filter",
            "captioning",
            "order",
            "dataset",
            "text",
            "dedupe",
            "picture",
            "cache",
            "format",
            "remote",
            "reject",
            "durable",
            "lock_file",
            "nameless_file",
            "text_file",
            "rng",
            "error",
        ],
    ),
    (
        "rectiflow-annotate",
        &[
            "caption", "loopback", "tag", "score", "pass", "pictures", "table", "onnx", "error",
        ],
    ),
    (
        "rectiflow-sdxl",
        // `compare` opens whole models, so it stands above `files`.
        &[
            "compare",
            "files",
            "provenance",
            "sample",
            "nets",
            "weights",
            "cost",
            "torch",
            "config",
            "flow",
            "durable",
            "error",
        ],
    ),
    (
        "rectiflow-train",
        &[
            "run",
            "plan",
            "pictures",
            "measure",
            "checkpoint",
            "step",
            "recipe",
            "ranks",
            "state",
            "guard",
            "lr",
            "hardware",
            "error",
        ],
    ),
    (
        "rectiflow-cli",
        // `bench` measures what the other verbs do, with their arguments.
        &[
            "bench",
            "prep",
            "dedupe",
            "caption",
            "tag",
            "score",
            "annotating",
            "picture_model",
            "ranks_page",
            "inspect",
            "plan",
            "train",
            "train_line",
            "local_ranks",
            "eval",
            "replay",
            "sample",
            "export",
            "model_card",
            "picture_texts",
            "schedule",
            "tokens",
            "forward",
            "report",
            "watch",
            "terminal",
        ],
    ),
];

/// The graphs of one crate: its own, and those of its examples.
///
/// # Errors
///
/// A file that cannot be read or parsed.
pub fn graphs(crate_folder: &Path) -> Result<Vec<Graph>, String> {
    let files = Files::read(crate_folder)?;
    let mut graphs = Vec::new();
    for root in files.roots() {
        graphs.push(Graph::new(&Tree::read(&files, root)?));
    }
    Ok(graphs)
}

/// Every fault of the walls of the crates in `workspace`, a line each.
///
/// # Errors
///
/// A file that cannot be read or parsed.
pub fn faults(workspace: &Path) -> Result<Vec<String>, String> {
    let mut faults = Vec::new();
    for (name, floors) in FLOORS {
        let short = name.trim_start_matches("rectiflow-");
        for graph in graphs(&workspace.join("crates").join(name))? {
            faults.extend(circle_faults(short, &graph));
            if graph.files[0].starts_with("src/") {
                faults.extend(floor_faults(short, floors, &graph));
            }
            let face = "is defined elsewhere: import it from there";
            faults.extend(places("face", short, face, &graph, &graph.through_face));
            faults.extend(places(
                "nothing",
                short,
                "stands for nothing",
                &graph,
                &graph.unresolved,
            ));
        }
    }
    Ok(faults)
}

/// The files that name a module by the face's word for it, `crate::bucket` for
/// `crate::format::bucket`, a line each.
///
/// # Errors
///
/// A file that cannot be read or parsed.
pub fn old_names(workspace: &Path) -> Result<Vec<String>, String> {
    let mut lines = Vec::new();
    for (name, _) in FLOORS {
        let short = name.trim_start_matches("rectiflow-");
        for graph in graphs(&workspace.join("crates").join(name))? {
            let face = "is the face's word for a module";
            lines.extend(places("old name", short, face, &graph, &graph.by_old_name));
        }
    }
    Ok(lines)
}

/// The knots of a graph and the circles in them.
pub fn circle_faults(name: &str, graph: &Graph) -> Vec<String> {
    let mut faults = Vec::new();
    for knot in graph.knots() {
        let files: Vec<&str> = knot.iter().map(|file| graph.label(*file)).collect();
        if knot.len() > 2 {
            faults.push(format!(
                "knot     {name}: {} files: {}",
                knot.len(),
                files.join(" ")
            ));
        }
        for circle in graph.circles(&knot) {
            faults.push(format!("circle   {name}: {}", graph.describe(&circle)));
        }
    }
    faults
}

/// Arrows from a lower floor to a higher one, floors that the list does not have, and names of the
/// list without a floor.
pub fn floor_faults(name: &str, floors: &[&str], graph: &Graph) -> Vec<String> {
    let mut faults = Vec::new();
    for (&(from, to), used) in &graph.arrows {
        if from != 0 && climbs(graph, floors, from, to) {
            let (user, used) = (graph.label(from), names(used));
            faults.push(format!(
                "up       {name}: {user} -> {} ({used})",
                graph.label(to)
            ));
        }
    }
    let mut seen = Vec::new();
    for file in 1..graph.files.len() {
        match floor_of(graph, floors, file) {
            Some(floor) => seen.push(floor),
            None => faults.push(format!("no floor {name}: {}", graph.label(file))),
        }
    }
    for (at, floor) in floors.iter().enumerate() {
        if !seen.contains(&at) {
            faults.push(format!("no file  {name}: {floor}"));
        }
    }
    faults
}

/// Whether an arrow goes up: to the face, or from a floor to one that stands above it.
fn climbs(graph: &Graph, floors: &[&str], from: usize, to: usize) -> bool {
    let user = floor_of(graph, floors, from);
    let used = floor_of(graph, floors, to);
    to == 0 || matches!((user, used), (Some(user), Some(used)) if user > used)
}

/// Which floor a file is on: the first part of its path below `src`, without `.rs`, in the list.
fn floor_of(graph: &Graph, floors: &[&str], file: usize) -> Option<usize> {
    let label = graph.label(file);
    let first = label.split('/').next().unwrap_or(label);
    let name = first.trim_end_matches(".rs");
    floors.iter().position(|floor| *floor == name)
}

fn places(
    kind: &str,
    name: &str,
    what: &str,
    graph: &Graph,
    places: &BTreeSet<Place>,
) -> Vec<String> {
    let mut lines = Vec::new();
    for Place { file, line, path } in places {
        let label = graph.label(*file);
        lines.push(format!("{kind:8} {name}: {label}:{line} {path} {what}"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults_of(a: &str) -> Vec<String> {
        let files = Files::from([
            (
                "src/lib.rs",
                "mod top; mod bottom; pub struct Own; pub use bottom::Low;",
            ),
            ("src/top/mod.rs", "pub mod a; pub struct High;"),
            ("src/top/a.rs", ""),
            ("src/bottom.rs", a),
        ]);
        let graph = Graph::new(&Tree::read(&files, "src/lib.rs").expect("the files are Rust"));
        floor_faults("made-up", &["top", "bottom"], &graph)
    }

    #[test]
    fn an_arrow_up_is_a_fault_and_one_down_is_none() {
        assert_eq!(faults_of("pub struct Low;"), [""; 0]);
        assert_eq!(
            faults_of("pub struct Low; fn f(_: crate::top::High) {}"),
            ["up       made-up: bottom.rs -> top/mod.rs (High:1)"]
        );
        assert_eq!(
            faults_of("pub struct Low; use crate::Own;"),
            ["up       made-up: bottom.rs -> lib.rs (Own:1)"]
        );
    }

    #[test]
    fn the_list_and_the_tree_name_the_same_floors() {
        let files = Files::from([
            ("src/lib.rs", "mod a; mod c;"),
            ("src/a.rs", ""),
            ("src/c/mod.rs", ""),
        ]);
        let graph = Graph::new(&Tree::read(&files, "src/lib.rs").expect("the files are Rust"));
        assert_eq!(
            floor_faults("made-up", &["a", "b"], &graph),
            ["no floor made-up: c/mod.rs", "no file  made-up: b"]
        );
    }

    #[test]
    fn circles_are_told_with_names_and_lines() {
        let files = Files::from([
            ("src/lib.rs", "mod a; mod b;"),
            ("src/a.rs", "\nuse crate::b::B;\npub struct A;"),
            ("src/b.rs", "use crate::a::A;\npub struct B;"),
        ]);
        let graph = Graph::new(&Tree::read(&files, "src/lib.rs").expect("the files are Rust"));
        assert_eq!(
            circle_faults("made-up", &graph),
            ["circle   made-up: a.rs -> b.rs (B:2) -> a.rs (A:1)"]
        );
    }
}
