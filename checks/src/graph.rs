//! The files of one root as a graph: an arrow from each file to every file whose names it uses.
//!
//! `use a::b` is an arrow to the file that defines `b`, if `b` is an item; a module that is
//! imported counts by what is used of it, and `mod b;` not at all. A `pub use` of a child's item is
//! an arrow as any other: a parent that passes on what a child defines, and a child that uses the
//! parent, are a circle. A glob is an arrow to its module's file.

use std::collections::{BTreeMap, BTreeSet, VecDeque, btree_map::Entry};

use crate::{
    resolve::Meaning,
    tree::{How, Mention, TYPES, Tree},
};

/// The names a file uses of another one, each with the first line that mentions it.
pub type Names = BTreeMap<String, usize>;

/// Something one place mentions.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// By its index in [`Graph::files`].
    pub file: usize,
    /// From 1.
    pub line: usize,
    /// What is mentioned, as a path.
    pub path: String,
}

impl Place {
    fn new(file: usize, line: usize, path: &[String]) -> Self {
        Self {
            file,
            line,
            path: path.join("::"),
        }
    }
}

/// Who uses whom. File 0 is the root, the crate's face.
#[derive(Debug)]
pub struct Graph {
    /// Paths relative to the crate's folder.
    pub files: Vec<String>,
    /// By (user, used).
    pub arrows: BTreeMap<(usize, usize), Names>,
    /// Items that are imported from the face and defined elsewhere.
    pub through_face: BTreeSet<Place>,
    /// Modules that are named by the face's word for them and not by their own path.
    pub by_old_name: BTreeSet<Place>,
    /// What is mentioned of other crates.
    pub outside: BTreeSet<Place>,
    /// Names that stand for nothing: a hole in the resolution, or a tree that does not compile.
    pub unresolved: BTreeSet<Place>,
}

impl Graph {
    /// Resolves every mention.
    pub fn new(tree: &Tree) -> Self {
        let mut graph = Self {
            files: tree.files.clone(),
            arrows: BTreeMap::new(),
            through_face: BTreeSet::new(),
            by_old_name: BTreeSet::new(),
            outside: BTreeSet::new(),
            unresolved: BTreeSet::new(),
        };
        for mention in &tree.mentions {
            graph.take(tree, mention);
        }
        graph
    }

    fn take(&mut self, tree: &Tree, mention: &Mention) {
        let file = tree.modules[mention.module].file;
        let meanings = tree.resolve(mention.module, &mention.path, mention.spaces);
        if meanings.is_empty() && mention.path[0] != "Self" {
            self.unresolved
                .insert(Place::new(file, mention.line, &mention.path));
        }
        for meaning in meanings {
            match meaning {
                Meaning::Outside(path) => {
                    self.outside.insert(Place::new(file, mention.line, &path));
                }
                Meaning::Item(used) => self.add(file, used, tree, mention),
                Meaning::Module(module) if is_use(tree, mention, module) => {
                    self.add(file, tree.modules[module].file, tree, mention);
                }
                Meaning::Module(_) => {}
            }
        }
        if let Some(asked) = tree.asks_face(mention.module, &mention.path) {
            self.take_face(tree, mention, asked);
        }
    }

    /// A mention that asks the face for `asked`.
    fn take_face(&mut self, tree: &Tree, mention: &Mention, asked: &[String]) {
        let meanings = tree.resolve(mention.module, asked, TYPES);
        let place = Place::new(tree.modules[mention.module].file, mention.line, asked);
        if let [Meaning::Module(_)] = meanings.as_slice() {
            self.by_old_name.insert(place);
        } else {
            self.through_face.insert(place);
        }
    }

    fn add(&mut self, from: usize, to: usize, tree: &Tree, mention: &Mention) {
        if from == to {
            return;
        }
        let name = match mention.how {
            How::Glob => "*".to_owned(),
            _ => used_name(tree, mention),
        };
        let line = self
            .arrows
            .entry((from, to))
            .or_default()
            .entry(name)
            .or_insert(mention.line);
        *line = mention.line.min(*line);
    }

    /// The groups of files that reach each other, the largest first. The face is in none: it may
    /// name everything.
    pub fn knots(&self) -> Vec<Vec<usize>> {
        let reached: Vec<BTreeSet<usize>> = (0..self.files.len())
            .map(|file| self.reached(file))
            .collect();
        let mut knots: BTreeSet<Vec<usize>> = BTreeSet::new();
        for file in 1..self.files.len() {
            if reached[file].contains(&file) {
                knots.insert(
                    reached[file]
                        .iter()
                        .copied()
                        .filter(|other| reached[*other].contains(&file))
                        .collect(),
                );
            }
        }
        let mut knots: Vec<Vec<usize>> = knots.into_iter().collect();
        knots.sort_by_key(|knot| std::cmp::Reverse(knot.len()));
        knots
    }

    /// The files that `file` uses, itself or through others, but for the face.
    fn reached(&self, file: usize) -> BTreeSet<usize> {
        let mut reached = BTreeSet::new();
        let mut left = vec![file];
        while let Some(at) = left.pop() {
            for used in self.used(at) {
                if reached.insert(used) {
                    left.push(used);
                }
            }
        }
        reached
    }

    fn used(&self, file: usize) -> impl Iterator<Item = usize> {
        self.arrows
            .range((file, 0)..=(file, usize::MAX))
            .map(|((_, used), _)| *used)
            .filter(|used| *used != 0)
    }

    /// Circles of a knot, as many as arrows have to be cut: the shortest one, then the shortest
    /// that is left without that one's arrow of the fewest names, and so on.
    pub fn circles(&self, knot: &[usize]) -> Vec<Vec<usize>> {
        let is_inside = |(from, to): &(usize, usize)| knot.contains(from) && knot.contains(to);
        let mut left: BTreeSet<(usize, usize)> =
            self.arrows.keys().copied().filter(is_inside).collect();
        let mut circles = Vec::new();
        while let Some(circle) = shortest_circle(&left) {
            let weakest = arrows_of(&circle).min_by_key(|arrow| self.arrows[arrow].len());
            left.remove(&weakest.expect("a circle has an arrow"));
            circles.push(circle);
        }
        circles
    }

    /// `a.rs -> b.rs (Name:12) -> a.rs (other:3, third:9)`.
    pub fn describe(&self, circle: &[usize]) -> String {
        let mut text = self.label(circle[0]).to_owned();
        for (from, to) in arrows_of(circle) {
            text += &format!(
                " -> {} ({})",
                self.label(to),
                names(&self.arrows[&(from, to)])
            );
        }
        text
    }

    /// A file's path without `src/` or `examples/`.
    pub fn label(&self, file: usize) -> &str {
        let path = &self.files[file];
        path.split_once('/').map_or(path, |(_, rest)| rest)
    }
}

/// A circle of the fewest files, from its first file in the order of the files on.
fn shortest_circle(arrows: &BTreeSet<(usize, usize)>) -> Option<Vec<usize>> {
    let mut shortest: Option<Vec<usize>> = None;
    for (from, to) in arrows {
        let Some(circle) = shortest_way(arrows, *to, *from) else {
            continue;
        };
        if shortest
            .as_ref()
            .is_none_or(|other| circle.len() < other.len())
        {
            shortest = Some(circle);
        }
    }
    let mut circle = shortest?;
    // The way began behind the first arrow found.
    circle.rotate_right(1);
    Some(circle)
}

/// The files on a shortest way, both ends included.
fn shortest_way(arrows: &BTreeSet<(usize, usize)>, start: usize, end: usize) -> Option<Vec<usize>> {
    let mut before = BTreeMap::from([(start, start)]);
    let mut left = VecDeque::from([start]);
    while let Some(at) = left.pop_front() {
        for (_, next) in arrows.range((at, 0)..=(at, usize::MAX)) {
            if let Entry::Vacant(place) = before.entry(*next) {
                place.insert(at);
                left.push_back(*next);
            }
        }
    }
    let mut way = vec![end];
    while way.last() != Some(&start) {
        way.push(*before.get(way.last()?)?);
    }
    way.reverse();
    Some(way)
}

fn arrows_of(circle: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    let next = circle.iter().cycle().skip(1);
    circle.iter().copied().zip(next.copied())
}

/// Whether this mention of a module uses its file: a glob does; a re-export of one from elsewhere
/// does, since nothing else of that file need be named.
fn is_use(tree: &Tree, mention: &Mention, module: usize) -> bool {
    match mention.how {
        How::Glob => true,
        How::Reexport => !tree.is_inside(module, mention.module),
        How::Import | How::Code => false,
    }
}

/// The first name of a path that is an item's: `Part` of `fetch::Part::Latents`.
fn used_name(tree: &Tree, mention: &Mention) -> String {
    let path = &mention.path;
    let is_item = |length: &usize| {
        let meanings = tree.resolve(mention.module, &path[..*length], TYPES);
        matches!(meanings.as_slice(), [Meaning::Item(_)])
    };
    let length = (1..path.len()).find(is_item).unwrap_or(path.len());
    path[length - 1].clone()
}

/// `Name:12, other:20`, at most six of them.
pub fn names(names: &Names) -> String {
    let mut list: Vec<String> = names
        .iter()
        .take(6)
        .map(|(name, line)| format!("{name}:{line}"))
        .collect();
    if names.len() > list.len() {
        list.push(format!("{} more", names.len() - list.len()));
    }
    list.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::Files;

    fn graph<const N: usize>(texts: [(&str, &str); N]) -> Graph {
        let tree = Tree::read(&Files::from(texts), "src/lib.rs").expect("the files are Rust");
        let graph = Graph::new(&tree);
        assert_eq!(graph.unresolved, BTreeSet::new());
        graph
    }

    /// Every arrow as `from.rs -> to.rs (names)`, without those of the face.
    fn arrows<const N: usize>(texts: [(&str, &str); N]) -> Vec<String> {
        let graph = graph(texts);
        let inner = graph.arrows.iter().filter(|((from, _), _)| *from != 0);
        inner
            .map(|((from, to), names)| {
                let names: Vec<&str> = names.keys().map(String::as_str).collect();
                format!(
                    "{} -> {} ({})",
                    graph.label(*from),
                    graph.label(*to),
                    names.join(" ")
                )
            })
            .collect()
    }

    /// The arrows of `src/a.rs` with this text, beside a module `b` and a folder `c` with a file
    /// `d`.
    fn arrows_of(text: &str) -> Vec<String> {
        arrows([
            ("src/lib.rs", "mod a; mod b; mod c;"),
            ("src/a.rs", text),
            (
                "src/b.rs",
                "pub struct B; pub fn make() {} pub mod inner { pub struct Inner; }",
            ),
            ("src/c/mod.rs", "pub mod d; pub fn parent() {}"),
            (
                "src/c/d.rs",
                "pub struct D; pub enum Kind { One, Two } pub const LIMIT: usize = 1;",
            ),
        ])
    }

    #[test]
    fn every_form_of_use_is_followed_to_the_file_that_defines_the_name() {
        assert_eq!(arrows_of("use crate::b::B;"), ["a.rs -> b.rs (B)"]);
        assert_eq!(
            arrows_of("use crate::{b::{self, B as Other}, c::d::D};"),
            ["a.rs -> b.rs (B)", "a.rs -> c/d.rs (D)"]
        );
        assert_eq!(
            arrows_of("use super::c::{parent, d::LIMIT};"),
            ["a.rs -> c/mod.rs (parent)", "a.rs -> c/d.rs (LIMIT)"]
        );
        assert_eq!(
            arrows_of("use crate::b::inner::Inner as _;"),
            ["a.rs -> b.rs (Inner)"]
        );
        assert_eq!(
            arrows_of("fn f() { use crate::c::d::D; }"),
            ["a.rs -> c/d.rs (D)"]
        );
        assert_eq!(
            arrows_of("mod nested { use super::super::b::B; }"),
            ["a.rs -> b.rs (B)"]
        );
        assert_eq!(
            arrows_of("use crate::c::d::Kind::*;"),
            ["a.rs -> c/d.rs (*)"]
        );
    }

    #[test]
    fn an_imported_module_counts_by_what_is_used_of_it() {
        assert_eq!(arrows_of("use crate::{b, c};"), [""; 0]);
        assert_eq!(
            arrows_of("use crate::{b, c}; fn f() { b::make(); c::d::LIMIT; }"),
            ["a.rs -> b.rs (make)", "a.rs -> c/d.rs (LIMIT)"]
        );
        assert_eq!(
            arrows_of("fn f() { use crate::b as other; other::make(); }"),
            ["a.rs -> b.rs (make)"]
        );
        assert_eq!(arrows_of("pub use crate::c::d;"), ["a.rs -> c/d.rs (d)"]);
    }

    #[test]
    fn paths_inside_of_code_are_arrows() {
        assert_eq!(
            arrows_of("fn f() { crate::b::make() }"),
            ["a.rs -> b.rs (make)"]
        );
        assert_eq!(
            arrows_of("struct A(Vec<crate::b::B>);"),
            ["a.rs -> b.rs (B)"]
        );
        assert_eq!(
            arrows_of(
                "fn f<T: Into<super::b::B>>(x: T) { match x { crate::c::d::Kind::One => {} } }"
            ),
            ["a.rs -> b.rs (B)", "a.rs -> c/d.rs (Kind)"]
        );
        assert_eq!(
            arrows_of("impl Default for crate::b::B { fn default() -> Self { Self } }"),
            ["a.rs -> b.rs (B)"]
        );
        assert_eq!(
            arrows_of("fn f() { <crate::b::B as Clone>::clone(&x); <[crate::c::d::D]>::len(&y); }"),
            ["a.rs -> b.rs (B)", "a.rs -> c/d.rs (D)"]
        );
    }

    #[test]
    fn tokens_of_macros_and_attributes_hold_arrows() {
        assert_eq!(
            arrows_of(r#"fn f() { println!("{}", crate::c::d::LIMIT) }"#),
            ["a.rs -> c/d.rs (LIMIT)"]
        );
        assert_eq!(
            arrows_of("use crate::b; fn f() { vec![b::make(), x.make()]; }"),
            ["a.rs -> b.rs (make)"]
        );
        assert_eq!(
            arrows_of("macro_rules! m { ($x:expr) => { $crate::b::make($x) }; }"),
            ["a.rs -> b.rs (make)"]
        );
        assert_eq!(
            arrows_of(
                r#"#[serde(with = "crate::b::inner")] struct A { #[serde(default = "crate::b::make")] x: u8 }"#
            ),
            ["a.rs -> b.rs (make)"]
        );
        assert_eq!(
            arrows_of("#[arg(value_parser = crate::b::make)] struct A;"),
            ["a.rs -> b.rs (make)"]
        );
    }

    #[test]
    fn a_glob_is_an_arrow_to_its_module_and_to_what_is_used_through_it() {
        let texts = |text| {
            [
                ("src/lib.rs", "mod a; mod b; mod c;"),
                ("src/a.rs", text),
                (
                    "src/b.rs",
                    "pub use crate::c::far; use crate::c::hidden; pub fn near() {}",
                ),
                ("src/c.rs", "pub fn far() {} pub fn hidden() {}"),
            ]
        };
        let of_a = |text| -> Vec<String> {
            arrows(texts(text))
                .into_iter()
                .filter(|arrow| arrow.starts_with("a.rs"))
                .collect()
        };
        assert_eq!(
            of_a("use crate::b::*; fn f() { near() }"),
            ["a.rs -> b.rs (* near)"]
        );
        assert_eq!(
            of_a("use crate::b::*; fn f() { far() }"),
            ["a.rs -> b.rs (*)", "a.rs -> c.rs (far)"]
        );
        // A private import is not what a glob brings.
        assert_eq!(
            of_a("use crate::b::*; fn f() { hidden() }"),
            ["a.rs -> b.rs (*)"]
        );
    }

    #[test]
    fn a_circle_through_re_exports_is_found_and_named() {
        let graph = graph([
            ("src/lib.rs", "mod a; mod b; mod c; pub use b::Name;"),
            ("src/a.rs", "use crate::Name;\npub struct A;"),
            (
                "src/b/mod.rs",
                "mod inner; pub use self::middle::Name; mod middle { pub use super::inner::Name; }",
            ),
            (
                "src/b/inner.rs",
                "\n\nuse crate::c::Renamed; pub struct Name;",
            ),
            ("src/c.rs", "pub use crate::a::A as Renamed;"),
        ]);
        let knots = graph.knots();
        assert_eq!(knots.len(), 1);
        let circles: Vec<String> = graph
            .circles(&knots[0])
            .iter()
            .map(|circle| graph.describe(circle))
            .collect();
        assert_eq!(circles, ["a.rs -> b/inner.rs (Name:1) -> a.rs (Renamed:3)"]);
        let faces: Vec<&str> = graph
            .through_face
            .iter()
            .map(|place| place.path.as_str())
            .collect();
        assert_eq!(faces, ["crate::Name"]);
    }

    #[test]
    fn a_parent_that_passes_on_a_child_that_uses_it_is_a_circle() {
        let with_parent = |text| {
            let graph = graph([
                ("src/lib.rs", "mod a;"),
                ("src/a/mod.rs", text),
                ("src/a/child.rs", "use super::Shared; pub struct Child;"),
            ]);
            graph.knots().len()
        };
        assert_eq!(with_parent("mod child; pub struct Shared;"), 0);
        assert_eq!(
            with_parent("mod child; pub use child::Child; pub struct Shared;"),
            1
        );
        assert_eq!(
            with_parent("mod child; pub struct Shared; fn f(_: child::Child) {}"),
            1
        );
    }

    #[test]
    fn a_knot_is_told_by_the_circles_that_have_to_be_cut() {
        let graph = graph([
            ("src/lib.rs", "mod a; mod b; mod c; mod d;"),
            ("src/a.rs", "use crate::b::{B, Other}; pub struct A;"),
            (
                "src/b.rs",
                "use crate::{a::A, c::C}; pub struct B; pub struct Other;",
            ),
            ("src/c.rs", "use crate::a::A; pub struct C;"),
            ("src/d.rs", "use crate::a::A;"),
        ]);
        let knots = graph.knots();
        assert_eq!(knots, [[1, 2, 3]]);
        let circles: Vec<String> = graph
            .circles(&knots[0])
            .iter()
            .map(|circle| graph.describe(circle))
            .collect();
        // The first is cut at its arrow of one name; the second is left.
        assert_eq!(
            circles,
            [
                "a.rs -> b.rs (B:1, Other:1) -> a.rs (A:1)",
                "a.rs -> b.rs (B:1, Other:1) -> c.rs (C:1) -> a.rs (A:1)"
            ]
        );
    }

    #[test]
    fn tests_are_skipped_in_files_and_as_files() {
        assert_eq!(
            arrows_of("#[cfg(test)] mod tests {\n use crate::b::B;\n }\n"),
            [""; 0]
        );
        assert_eq!(
            arrows_of("#[cfg(test)]\nuse crate::b::B;\nuse crate::c::d::D;"),
            ["a.rs -> c/d.rs (D)"]
        );
        assert_eq!(
            arrows_of("fn f() {\n#[cfg(test)]\ncrate::b::make();\n}"),
            [""; 0]
        );
        assert_eq!(
            arrows_of("#[cfg(not(test))]\nuse crate::b::B;"),
            ["a.rs -> b.rs (B)"]
        );
        let graph = graph([
            ("src/lib.rs", "#[cfg(test)]\nmod fixture;\nmod a;"),
            ("src/a.rs", "#[cfg(test)]\nmod tests;\npub struct A;"),
            ("src/a/tests.rs", "use crate::fixture::Fixture;"),
            ("src/fixture.rs", "use crate::a::A; pub struct Fixture;"),
        ]);
        assert_eq!(graph.files, ["src/lib.rs", "src/a.rs"]);
    }

    #[test]
    fn a_module_and_a_function_of_one_name_are_two() {
        let graph = graph([
            ("src/lib.rs", "mod a; pub mod b; pub use b::b;"),
            ("src/a.rs", "use crate::b::Other; fn f() { crate::b(); }"),
            ("src/b.rs", "pub fn b() {} pub struct Other;"),
        ]);
        let names = &graph.arrows[&(1, 2)];
        assert_eq!(names.keys().collect::<Vec<_>>(), ["Other", "b"]);
    }

    #[test]
    fn the_face_s_words_for_modules_are_told_from_its_words_for_items() {
        let graph = graph([
            (
                "src/lib.rs",
                "mod folder; mod a; pub use folder::file; pub use folder::file::Item;",
            ),
            (
                "src/a.rs",
                "use crate::{Item, file::Item as Same, folder::file::Item as Right};",
            ),
            ("src/folder/mod.rs", "pub mod file;"),
            ("src/folder/file.rs", "pub struct Item;"),
        ]);
        let words = |places: &BTreeSet<Place>| -> Vec<String> {
            places.iter().map(|place| place.path.clone()).collect()
        };
        assert_eq!(words(&graph.through_face), ["crate::Item"]);
        assert_eq!(words(&graph.by_old_name), ["crate::file"]);
    }

    #[test]
    fn names_of_other_crates_are_followed_to_their_full_paths() {
        let graph = graph([
            ("src/lib.rs", "mod a;"),
            (
                "src/a.rs",
                "use std::{fs, time as clock}; fn f() { fs::read(x); clock::Instant::now(); ::libc::exit(1) }",
            ),
        ]);
        let paths: Vec<&str> = graph
            .outside
            .iter()
            .map(|place| place.path.as_str())
            .collect();
        for path in [
            "std::fs",
            "std::fs::read",
            "std::time",
            "std::time::Instant::now",
            "libc::exit",
        ] {
            assert!(paths.contains(&path), "{path} is not among {paths:?}");
        }
    }
}
