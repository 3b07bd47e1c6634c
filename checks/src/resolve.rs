//! From a path to what it stands for: through `crate`, `self`, `super`, imports, renames, globs and
//! re-exports of re-exports.

use crate::tree::{ANY, Entry, Module, Named, Space, Spaces, TYPES, Tree};

/// What a path stands for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Meaning {
    /// An item, by the file that defines it; also whatever belongs to it: a variant, a method, a
    /// constant.
    Item(usize),
    /// A module.
    Module(usize),
    /// Another crate's, by its path there.
    Outside(Vec<String>),
}

/// Imports and globs that are being resolved, by module, place in it, name and name spaces: one
/// that leads to itself leads nowhere.
type Open = Vec<(usize, usize, String, Spaces)>;

impl Tree {
    /// What `path` stands for in module `from`. Something for every path that compiles, but
    /// methods.
    pub(crate) fn resolve(&self, from: usize, path: &[String], spaces: Spaces) -> Vec<Meaning> {
        self.resolve_path(from, path, spaces, &mut Open::new())
    }

    fn resolve_path(
        &self,
        from: usize,
        path: &[String],
        spaces: Spaces,
        open: &mut Open,
    ) -> Vec<Meaning> {
        let (start, rest) = self.start(from, path, spaces, open);
        let mut meanings = start;
        for (at, name) in rest.iter().enumerate() {
            let spaces = if at + 1 == rest.len() { spaces } else { TYPES };
            let mut next = Vec::new();
            for meaning in meanings {
                match meaning {
                    Meaning::Module(module) => {
                        next.extend(self.look_up(module, from, name, spaces, open))
                    }
                    Meaning::Item(file) => next.push(Meaning::Item(file)),
                    Meaning::Outside(outside) => {
                        next.push(Meaning::Outside([outside, vec![name.clone()]].concat()))
                    }
                }
            }
            meanings = next;
        }
        meanings.sort();
        meanings.dedup();
        meanings
    }

    /// What a path's first segment stands for, and the segments behind it.
    fn start<'p>(
        &self,
        from: usize,
        path: &'p [String],
        spaces: Spaces,
        open: &mut Open,
    ) -> (Vec<Meaning>, &'p [String]) {
        let Some(first) = path.first() else {
            return (Vec::new(), path);
        };
        let rest = &path[1..];
        match first.as_str() {
            "crate" => (vec![Meaning::Module(0)], rest),
            "self" => (vec![Meaning::Module(self.real(from))], rest),
            "super" => self.climb(from, path),
            "Self" => (Vec::new(), rest),
            "" => (vec![Meaning::Outside(Vec::new())], rest),
            name => {
                let spaces = if rest.is_empty() { spaces } else { TYPES };
                (self.look_around(from, name, spaces, open), rest)
            }
        }
    }

    /// Follows every `super` at the path's start.
    fn climb<'p>(&self, from: usize, mut path: &'p [String]) -> (Vec<Meaning>, &'p [String]) {
        let mut module = self.real(from);
        while let [first, rest @ ..] = path
            && first == "super"
        {
            let Some(parent) = self.modules[module].parent else {
                return (Vec::new(), rest);
            };
            module = self.real(parent);
            path = rest;
        }
        (vec![Meaning::Module(module)], path)
    }

    /// The module around a block.
    fn real(&self, mut module: usize) -> usize {
        while let Module {
            is_block: true,
            parent: Some(parent),
            ..
        } = self.modules[module]
        {
            module = parent;
        }
        module
    }

    /// A name as a place in the code sees it: the blocks around it, the module, the other crates.
    fn look_around(
        &self,
        from: usize,
        name: &str,
        spaces: Spaces,
        open: &mut Open,
    ) -> Vec<Meaning> {
        let mut module = from;
        loop {
            let found = self.look_up(module, from, name, spaces, open);
            if !found.is_empty() {
                return found;
            }
            match self.modules[module] {
                Module {
                    is_block: true,
                    parent: Some(parent),
                    ..
                } => module = parent,
                _ => break,
            }
        }
        match self.macros.get(name) {
            Some(file) if spaces.contains(&Space::Macros) => vec![Meaning::Item(*file)],
            _ => vec![Meaning::Outside(vec![name.to_owned()])],
        }
    }

    /// A name of `module`, as module `asker` sees it.
    fn look_up(
        &self,
        module: usize,
        asker: usize,
        name: &str,
        spaces: Spaces,
        open: &mut Open,
    ) -> Vec<Meaning> {
        let mut found = Vec::new();
        let Module { names, globs, .. } = &self.modules[module];
        // Its own names, imports among them.
        for (at, named) in names.iter().enumerate() {
            let is_meant = named.spaces.iter().any(|space| spaces.contains(space));
            if named.name == name && is_meant && self.sees(asker, module, named) {
                found.extend(self.enter((module, at), named, spaces, open));
            }
        }
        if !found.is_empty() {
            return found;
        }
        // What globs bring stands behind those.
        for (at, glob) in globs.iter().enumerate() {
            let key = (module, names.len() + at, name.to_owned(), spaces);
            if open.contains(&key) {
                continue;
            }
            open.push(key);
            for meaning in self.resolve_path(module, glob, TYPES, open) {
                if let Meaning::Module(target) = meaning {
                    found.extend(self.look_up(target, module, name, spaces, open));
                }
            }
            open.pop();
        }
        found
    }

    /// What one name of a module stands for; `place` is the module and the name's place in it.
    fn enter(
        &self,
        place: (usize, usize),
        named: &Named,
        spaces: Spaces,
        open: &mut Open,
    ) -> Vec<Meaning> {
        let (module, at) = place;
        let path = match &named.entry {
            Entry::Item => return vec![Meaning::Item(self.modules[module].file)],
            Entry::Module(child) => return vec![Meaning::Module(*child)],
            Entry::Import(path) => path,
        };
        let spaces = if named.spaces == ANY {
            spaces
        } else {
            named.spaces
        };
        let key = (module, at, named.name.clone(), spaces);
        if open.contains(&key) {
            return Vec::new();
        }
        open.push(key);
        let found = self.resolve_path(module, path, spaces, open);
        open.pop();
        found
    }

    /// Whether `asker` may use this name of `module`: a private one belongs to the module and what
    /// is inside it.
    fn sees(&self, asker: usize, module: usize, named: &Named) -> bool {
        !named.is_private || self.is_inside(asker, module)
    }

    /// Whether `inner` is `outer` or a module in it.
    pub(crate) fn is_inside(&self, inner: usize, outer: usize) -> bool {
        let mut module = Some(inner);
        while let Some(at) = module {
            if at == outer {
                return true;
            }
            module = self.modules[at].parent;
        }
        false
    }

    /// How much of `path` asks the root, from outside of its file, for a name that the root only
    /// passes on: as far as that name.
    pub(crate) fn asks_face<'p>(&self, from: usize, path: &'p [String]) -> Option<&'p [String]> {
        let (start, rest) = match path.first().map(String::as_str) {
            Some("crate") => (vec![Meaning::Module(0)], &path[1..]),
            Some("super") => self.climb(from, path),
            _ => return None,
        };
        let root = &self.modules[0];
        let name = rest.first()?;
        let is_own = root
            .names
            .iter()
            .any(|named| named.name == *name && !matches!(named.entry, Entry::Import(_)));
        let is_asked = start == [Meaning::Module(0)] && self.modules[from].file != root.file;
        (is_asked && !is_own).then(|| &path[..=path.len() - rest.len()])
    }
}
