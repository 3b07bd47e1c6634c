//! The files of one root as a graph: an arrow from each file to every file whose names it uses.
//!
//! `use a::b` is an arrow to the file that defines `b`, if `b` is an item; a module that is imported counts by what is
//! used of it, and `mod b;` not at all. A `pub use` of a child's item is an arrow as any other: a parent that passes on what
//! a child defines, and a child that uses the parent, are a circle. A glob is an arrow to its module's file.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

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
        let Mention { module, path, line, .. } = mention;
        let file = tree.modules[*module].file;
        let place = Place { file, line: *line, path: path.join("::") };
        let meanings = tree.resolve(*module, path, mention.spaces);
        if meanings.is_empty() && path[0] != "Self" {
            self.unresolved.insert(place.clone());
        }
        for meaning in meanings {
            match meaning {
                Meaning::Outside(path) => {
                    self.outside.insert(Place { path: path.join("::"), ..place.clone() });
                }
                Meaning::Item(used) => self.add(file, used, tree, mention),
                Meaning::Module(module) if is_use(tree, mention, module) => {
                    self.add(file, tree.modules[module].file, tree, mention);
                }
                Meaning::Module(_) => {}
            }
        }
        if let Some(asked) = tree.asks_face(*module, path) {
            let is_module = matches!(tree.resolve(*module, asked, TYPES).as_slice(), [Meaning::Module(_)]);
            let places = if is_module { &mut self.by_old_name } else { &mut self.through_face };
            places.insert(Place { path: asked.join("::"), ..place });
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
        let line = self.arrows.entry((from, to)).or_default().entry(name).or_insert(mention.line);
        *line = mention.line.min(*line);
    }

    /// The groups of files that reach each other, the largest first. The face is in none: it may name everything.
    pub fn knots(&self) -> Vec<Vec<usize>> {
        let reached: Vec<BTreeSet<usize>> = (0..self.files.len()).map(|file| self.reached(file)).collect();
        let mut knots: BTreeSet<Vec<usize>> = BTreeSet::new();
        for file in 1..self.files.len() {
            if reached[file].contains(&file) {
                knots.insert(reached[file].iter().copied().filter(|other| reached[*other].contains(&file)).collect());
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
        self.arrows.range((file, 0)..=(file, usize::MAX)).map(|((_, used), _)| *used).filter(|used| *used != 0)
    }

    /// Circles of a knot, the shortest first, so that every arrow of it is in one of them: for each arrow a shortest
    /// circle through it, without those whose arrows are all in shorter ones.
    pub fn circles(&self, knot: &[usize]) -> Vec<Vec<usize>> {
        let mut circles = BTreeSet::new();
        for &from in knot {
            for to in self.used(from).filter(|to| knot.contains(to)) {
                let mut circle = self.shortest_way(to, from, knot);
                // Begin with the smallest, so that a circle found twice is the same list.
                let smallest = circle.iter().enumerate().min_by_key(|(_, file)| **file).map_or(0, |(at, _)| at);
                circle.rotate_left(smallest);
                circles.insert((circle.len(), circle));
            }
        }
        let mut seen = BTreeSet::new();
        let mut shown = Vec::new();
        for (_, circle) in circles {
            let mut is_new = false;
            for at in 0..circle.len() {
                is_new |= seen.insert((circle[at], circle[(at + 1) % circle.len()]));
            }
            if is_new {
                shown.push(circle);
            }
        }
        shown
    }

    /// The files on a shortest way inside a knot, both ends included.
    fn shortest_way(&self, start: usize, end: usize, knot: &[usize]) -> Vec<usize> {
        let mut before = BTreeMap::from([(start, start)]);
        let mut left = VecDeque::from([start]);
        while let Some(at) = left.pop_front() {
            for next in self.used(at).filter(|next| knot.contains(next)) {
                before.entry(next).or_insert_with(|| {
                    left.push_back(next);
                    at
                });
            }
        }
        let mut way = vec![end];
        let mut at = end;
        while at != start {
            at = before[&at];
            way.push(at);
        }
        way.reverse();
        way
    }

    /// `a.rs -> b.rs (Name:12) -> a.rs (other:3, third:9)`.
    pub fn describe(&self, circle: &[usize]) -> String {
        let mut text = self.label(circle[0]).to_owned();
        for (at, &from) in circle.iter().enumerate() {
            let to = circle[(at + 1) % circle.len()];
            text += &format!(" -> {} ({})", self.label(to), names(&self.arrows[&(from, to)]));
        }
        text
    }

    /// A file's path without `src/` or `examples/`.
    pub fn label(&self, file: usize) -> &str {
        let path = &self.files[file];
        path.split_once('/').map_or(path, |(_, rest)| rest)
    }
}

/// Whether this mention of a module uses its file: a glob does; a re-export of one from elsewhere does, since nothing
/// else of that file need be named.
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
    let mut list: Vec<String> = names.iter().take(6).map(|(name, line)| format!("{name}:{line}")).collect();
    if names.len() > list.len() {
        list.push(format!("{} more", names.len() - list.len()));
    }
    list.join(", ")
}
