//! The modules of one crate: what each defines and imports, and every path its code mentions, outside tests.
//!
//! A block with items of its own (a `use` in a function) is a module without a name, as in the compiler. Names are not
//! resolved here. What is not seen: methods and fields, whose file is known to the type checker only.

use std::{collections::HashMap, mem};

use proc_macro2::Ident;
use syn::{
    Attribute, Block, ForeignItem, Item, ItemMod, ItemUse, Lit, Macro, Meta, MetaNameValue, Stmt, UseTree, Visibility,
    spanned::Spanned,
    visit::{self, Visit},
};

use crate::{
    files::{Files, join},
    scan,
    source::Source,
};

/// The name spaces of the language. An item can be in two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Modules, types, traits.
    Types,
    /// Functions, constants, constructors.
    Values,
    /// Macros.
    Macros,
}

/// Which name spaces a path may name something of.
pub type Spaces = &'static [Space];

/// A path that could name anything, as an import's does.
pub const ANY: Spaces = &[Space::Types, Space::Values, Space::Macros];
/// A path before `::`.
pub const TYPES: Spaces = &[Space::Types];
const VALUES: Spaces = &[Space::Values];
const TYPES_AND_VALUES: Spaces = &[Space::Types, Space::Values];
const MACROS: Spaces = &[Space::Macros];

/// What a name of a module stands for.
#[derive(Debug, Clone)]
pub(crate) enum Entry {
    /// Something this module's file defines.
    Item,
    /// A child.
    Module(usize),
    /// What this path stands for.
    Import(Vec<String>),
}

/// A name of a module.
#[derive(Debug, Clone)]
pub(crate) struct Named {
    pub(crate) name: String,
    pub(crate) spaces: Spaces,
    pub(crate) entry: Entry,
    /// Without `pub`: a glob from elsewhere does not bring it.
    pub(crate) is_private: bool,
}

/// A module, or a block with items.
#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) file: usize,
    pub(crate) parent: Option<usize>,
    /// A block: `self` and `super` mean the module around it, whose names it sees.
    pub(crate) is_block: bool,
    pub(crate) names: Vec<Named>,
    /// Paths that a `::*` stands behind.
    pub(crate) globs: Vec<Vec<String>>,
}

/// How a path is mentioned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// In a `use` of the module's own.
    Import,
    /// In a `pub use` of any kind.
    Reexport,
    /// In a `use` that ends in `::*`.
    Glob,
    /// In code, a macro's tokens or an attribute.
    Code,
}

/// A path that a file mentions.
#[derive(Debug)]
pub(crate) struct Mention {
    pub(crate) module: usize,
    pub(crate) path: Vec<String>,
    pub(crate) spaces: Spaces,
    pub(crate) how: How,
    pub(crate) line: usize,
}

/// One root's modules. Module 0 is the root.
#[derive(Debug, Default)]
pub struct Tree {
    /// Paths of the files, relative to the crate's folder; file 0 is the root.
    pub files: Vec<String>,
    pub(crate) modules: Vec<Module>,
    pub(crate) mentions: Vec<Mention>,
    /// Files of `macro_rules!`, by name.
    pub(crate) macros: HashMap<String, usize>,
    /// By file: its syntax and test lines.
    pub sources: Vec<Source>,
}

impl Tree {
    /// Reads the root file and every module it declares outside tests.
    ///
    /// # Errors
    ///
    /// A file that is not there or no Rust.
    pub fn read(files: &Files, root: &str) -> Result<Self, String> {
        let mut tree = Self::default();
        let folder = root.rsplit_once('/').map_or("", |(folder, _)| folder);
        tree.read_file(files, root, folder, None)?;
        Ok(tree)
    }

    /// Reads one file as a module, and its children, whose files lie in `folder`. Returns the module.
    fn read_file(&mut self, files: &Files, path: &str, folder: &str, parent: Option<usize>) -> Result<usize, String> {
        let text = files.get(path).ok_or_else(|| format!("{path}: declared as a module, but not there"))?;
        let source = Source::parse(path, text)?;
        let file = self.files.len();
        self.files.push(path.to_owned());
        let module = self.add_module(file, parent, false);
        let mut reader =
            Reader { tree: self, source: &source, module, folder: folder.to_owned(), children: Vec::new() };
        reader.visit_file(&source.syntax);
        let children = reader.children;
        // In the place of this file, whatever children were read meanwhile.
        self.sources.push(source);
        for child in children {
            child.read(self, files)?;
        }
        Ok(module)
    }

    fn add_module(&mut self, file: usize, parent: Option<usize>, is_block: bool) -> usize {
        self.modules.push(Module { file, parent, is_block, names: Vec::new(), globs: Vec::new() });
        self.modules.len() - 1
    }
}

/// A `mod name;` that is still to be read.
struct Child {
    parent: usize,
    name: String,
    is_private: bool,
    /// From `#[path = ".."]`.
    path: Option<String>,
    folder: String,
}

impl Child {
    fn read(self, tree: &mut Tree, files: &Files) -> Result<(), String> {
        let folder = join(&self.folder, &self.name);
        let (path, folder) = match self.path {
            Some(path) => {
                let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder).to_owned();
                (path, folder)
            }
            None if files.get(&format!("{folder}.rs")).is_some() => (format!("{folder}.rs"), folder),
            None => (format!("{folder}/mod.rs"), folder),
        };
        // An example's `#[path]` may lead out of this crate.
        if files.get(&path).is_none() && !path.starts_with("src") {
            return Ok(());
        }
        let module = tree.read_file(files, &path, &folder, Some(self.parent))?;
        let entry = Entry::Module(module);
        tree.modules[self.parent].names.push(Named {
            name: self.name,
            spaces: TYPES,
            entry,
            is_private: self.is_private,
        });
        Ok(())
    }
}

/// Walks through one file.
struct Reader<'a> {
    tree: &'a mut Tree,
    source: &'a Source,
    /// The module or block of the place.
    module: usize,
    /// Where a `mod name;` of this place has its file.
    folder: String,
    children: Vec<Child>,
}

impl Reader<'_> {
    fn define(&mut self, name: &Ident, visibility: &Visibility, spaces: Spaces) {
        let named = Named {
            name: plain(name),
            spaces,
            entry: Entry::Item,
            is_private: matches!(visibility, Visibility::Inherited),
        };
        self.tree.modules[self.module].names.push(named);
    }

    fn mention(&mut self, path: Vec<String>, spaces: Spaces, how: How, line: usize) {
        if !self.source.is_test(line) {
            self.tree.mentions.push(Mention { module: self.module, path, spaces, how, line });
        }
    }

    fn define_item(&mut self, item: &Item) {
        match item {
            Item::Const(item) => self.define(&item.ident, &item.vis, VALUES),
            Item::Static(item) => self.define(&item.ident, &item.vis, VALUES),
            Item::Fn(item) => self.define(&item.sig.ident, &item.vis, VALUES),
            Item::Enum(item) => self.define(&item.ident, &item.vis, TYPES),
            Item::Struct(item) => self.define(&item.ident, &item.vis, TYPES_AND_VALUES),
            Item::Union(item) => self.define(&item.ident, &item.vis, TYPES),
            Item::Trait(item) => self.define(&item.ident, &item.vis, TYPES),
            Item::TraitAlias(item) => self.define(&item.ident, &item.vis, TYPES),
            Item::Type(item) => self.define(&item.ident, &item.vis, TYPES),
            Item::ForeignMod(block) => block.items.iter().for_each(|item| self.define_foreign(item)),
            Item::Macro(item) => {
                if let Some(name) = &item.ident {
                    let file = self.tree.modules[self.module].file;
                    self.tree.macros.insert(plain(name), file);
                }
            }
            _ => {}
        }
    }

    fn define_foreign(&mut self, item: &ForeignItem) {
        match item {
            ForeignItem::Fn(item) => self.define(&item.sig.ident, &item.vis, VALUES),
            ForeignItem::Static(item) => self.define(&item.ident, &item.vis, VALUES),
            ForeignItem::Type(item) => self.define(&item.ident, &item.vis, TYPES),
            _ => {}
        }
    }

    /// Takes one branch of a `use` after the other; `path` is what stands before `tree`.
    fn import(&mut self, tree: &UseTree, path: &[String], how: How) {
        let with = |name: &Ident| [path, &[plain(name)]].concat();
        let line = tree.span().start().line;
        match tree {
            UseTree::Path(branch) => self.import(&branch.tree, &with(&branch.ident), how),
            UseTree::Group(group) => group.items.iter().for_each(|branch| self.import(branch, path, how)),
            UseTree::Name(leaf) if leaf.ident == "self" => {
                let name = path.last().cloned().unwrap_or_default();
                self.bind(&name, path.to_vec(), TYPES, how, line);
            }
            UseTree::Name(leaf) => self.bind(&plain(&leaf.ident), with(&leaf.ident), ANY, how, line),
            UseTree::Rename(leaf) if leaf.ident == "self" => {
                self.bind(&plain(&leaf.rename), path.to_vec(), TYPES, how, line);
            }
            UseTree::Rename(leaf) => self.bind(&plain(&leaf.rename), with(&leaf.ident), ANY, how, line),
            UseTree::Glob(_) => {
                self.tree.modules[self.module].globs.push(path.to_vec());
                self.mention(path.to_vec(), TYPES, How::Glob, line);
            }
        }
    }

    fn bind(&mut self, name: &str, path: Vec<String>, spaces: Spaces, how: How, line: usize) {
        if name != "_" {
            let named = Named {
                name: name.to_owned(),
                spaces,
                entry: Entry::Import(path.clone()),
                is_private: how == How::Import,
            };
            self.tree.modules[self.module].names.push(named);
        }
        self.mention(path, spaces, how, line);
    }

    fn take_path(&mut self, path: &syn::Path, spaces: Spaces) {
        let mut segments: Vec<String> = path.segments.iter().map(|segment| plain(&segment.ident)).collect();
        if path.leading_colon.is_some() {
            segments.insert(0, String::new());
        }
        self.mention(segments, spaces, How::Code, path.span().start().line);
    }

    fn take_written(&mut self, written: Vec<scan::Written>) {
        for (path, line) in written {
            self.mention(path, ANY, How::Code, line);
        }
    }

    /// `<T>::name`: `name` stands for nothing of a module.
    fn visit_associated(&mut self, of: &syn::QSelf, path: &syn::Path) {
        self.visit_type(&of.ty);
        path.segments.iter().for_each(|segment| self.visit_path_arguments(&segment.arguments));
    }

    /// A `mod name { .. }`: a module of the same file.
    fn enter(&mut self, item: &ItemMod, items: &[Item]) {
        let outer = self.module;
        let file = self.tree.modules[outer].file;
        let module = self.tree.add_module(file, Some(outer), false);
        let inner_folder = join(&self.folder, &plain(&item.ident));
        let folder = mem::replace(&mut self.folder, inner_folder);
        self.tree.modules[outer].names.push(Named {
            name: plain(&item.ident),
            spaces: TYPES,
            entry: Entry::Module(module),
            is_private: matches!(item.vis, Visibility::Inherited),
        });
        self.module = module;
        items.iter().for_each(|item| self.visit_item(item));
        (self.module, self.folder) = (outer, folder);
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        if self.source.is_test(item.span().start().line) {
            return;
        }
        self.define_item(item);
        visit::visit_item(self, item);
    }

    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        item.attrs.iter().for_each(|attribute| self.visit_attribute(attribute));
        match &item.content {
            Some((_, items)) => self.enter(item, items),
            None => {
                let own_folder = self.tree.files[self.tree.modules[self.module].file]
                    .rsplit_once('/')
                    .map_or(String::new(), |(folder, _)| folder.to_owned());
                self.children.push(Child {
                    parent: self.module,
                    name: plain(&item.ident),
                    is_private: matches!(item.vis, Visibility::Inherited),
                    path: path_attribute(&item.attrs).map(|path| join(&own_folder, &path)),
                    folder: self.folder.clone(),
                });
            }
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let how = if matches!(item.vis, Visibility::Inherited) { How::Import } else { How::Reexport };
        let start = if item.leading_colon.is_some() { vec![String::new()] } else { Vec::new() };
        self.import(&item.tree, &start, how);
    }

    fn visit_block(&mut self, block: &'ast Block) {
        let outer = self.module;
        if block.stmts.iter().any(|statement| matches!(statement, Stmt::Item(_))) {
            let file = self.tree.modules[outer].file;
            self.module = self.tree.add_module(file, Some(outer), true);
        }
        visit::visit_block(self, block);
        self.module = outer;
    }

    fn visit_expr_path(&mut self, path: &'ast syn::ExprPath) {
        match &path.qself {
            Some(of) if of.position == 0 => self.visit_associated(of, &path.path),
            _ => visit::visit_expr_path(self, path),
        }
    }

    fn visit_type_path(&mut self, path: &'ast syn::TypePath) {
        match &path.qself {
            Some(of) if of.position == 0 => self.visit_associated(of, &path.path),
            _ => visit::visit_type_path(self, path),
        }
    }

    /// In types, expressions, patterns, struct literals, bounds, `impl`s.
    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.take_path(path, TYPES_AND_VALUES);
        visit::visit_path(self, path);
    }

    fn visit_vis_restricted(&mut self, _: &'ast syn::VisRestricted) {}

    fn visit_macro(&mut self, call: &'ast Macro) {
        self.take_path(&call.path, MACROS);
        self.take_written(scan::paths(call.tokens.clone()));
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        match &attribute.meta {
            Meta::List(list) if !["cfg", "doc", "allow", "expect"].iter().any(|name| list.path.is_ident(name)) => {
                self.take_written(scan::paths(list.tokens.clone()));
                self.take_written(scan::paths_in_strings(list.tokens.clone()));
            }
            _ => {}
        }
    }
}

fn path_attribute(attributes: &[Attribute]) -> Option<String> {
    attributes.iter().find_map(|attribute| match &attribute.meta {
        Meta::NameValue(MetaNameValue { path, value: syn::Expr::Lit(value), .. }) if path.is_ident("path") => {
            match &value.lit {
                Lit::Str(text) => Some(text.value()),
                _ => None,
            }
        }
        _ => None,
    })
}

/// A name without `r#`.
fn plain(name: &Ident) -> String {
    name.to_string().trim_start_matches("r#").to_owned()
}
