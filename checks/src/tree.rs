//! The modules of one crate: what each defines and imports, and every path its code mentions,
//! outside tests.
//!
//! A block with items of its own (a `use` in a function) is a module without a name, as in the
//! compiler. Names are not resolved here. What is not seen: methods and fields, whose file is known
//! to the type checker only.

use std::{collections::HashMap, mem};

use proc_macro2::Ident;
use syn::{
    Attribute, Block, ForeignItem, Item, ItemMacro, ItemMod, ItemUse, Lit, Macro, Meta,
    MetaNameValue, Stmt, UseTree, Visibility,
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

    /// Reads one file as a module, and its children, whose files lie in `folder`. Returns the
    /// module.
    fn read_file(
        &mut self,
        files: &Files,
        path: &str,
        folder: &str,
        parent: Option<usize>,
    ) -> Result<usize, String> {
        let Some(text) = files.get(path) else {
            return Err(format!("{path}: declared as a module, but not there"));
        };
        let source = Source::parse(path, text)?;
        let file = self.files.len();
        self.files.push(path.to_owned());
        let module = self.add_module(file, parent, false);
        let mut reader = Reader {
            tree: self,
            source: &source,
            module,
            folder: folder.to_owned(),
            children: Vec::new(),
        };
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
        self.modules.push(Module {
            file,
            parent,
            is_block,
            names: Vec::new(),
            globs: Vec::new(),
        });
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
        let below = join(&self.folder, &self.name);
        let beside = format!("{below}.rs");
        let (path, folder) = match self.path {
            Some(path) => {
                let folder = path
                    .rsplit_once('/')
                    .map_or("", |(folder, _)| folder)
                    .to_owned();
                (path, folder)
            }
            None if files.get(&beside).is_some() => (beside, below),
            None => (format!("{below}/mod.rs"), below),
        };
        // An example's `#[path]` may lead out of this crate.
        if files.get(&path).is_none() && !path.starts_with("src") {
            return Ok(());
        }
        let entry = Entry::Module(tree.read_file(files, &path, &folder, Some(self.parent))?);
        let named = Named {
            name: self.name,
            spaces: TYPES,
            entry,
            is_private: self.is_private,
        };
        tree.modules[self.parent].names.push(named);
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
        self.add_name(plain(name), spaces, Entry::Item, is_private(visibility));
    }

    fn add_name(&mut self, name: String, spaces: Spaces, entry: Entry, is_private: bool) {
        let named = Named {
            name,
            spaces,
            entry,
            is_private,
        };
        self.tree.modules[self.module].names.push(named);
    }

    /// The file of the place.
    fn file(&self) -> usize {
        self.tree.modules[self.module].file
    }

    fn mention(&mut self, path: Vec<String>, spaces: Spaces, how: How, line: usize) {
        if !self.source.is_test(line) {
            self.tree.mentions.push(Mention {
                module: self.module,
                path,
                spaces,
                how,
                line,
            });
        }
    }

    fn define_item(&mut self, item: &Item) {
        let (name, visibility, spaces) = match item {
            Item::Const(item) => (&item.ident, &item.vis, VALUES),
            Item::Static(item) => (&item.ident, &item.vis, VALUES),
            Item::Fn(item) => (&item.sig.ident, &item.vis, VALUES),
            Item::Enum(item) => (&item.ident, &item.vis, TYPES),
            Item::Struct(item) => (&item.ident, &item.vis, TYPES_AND_VALUES),
            Item::Union(item) => (&item.ident, &item.vis, TYPES),
            Item::Trait(item) => (&item.ident, &item.vis, TYPES),
            Item::TraitAlias(item) => (&item.ident, &item.vis, TYPES),
            Item::Type(item) => (&item.ident, &item.vis, TYPES),
            Item::ForeignMod(block) => return self.define_foreign_items(&block.items),
            Item::Macro(item) => return self.define_macro(item),
            _ => return,
        };
        self.define(name, visibility, spaces);
    }

    fn define_macro(&mut self, item: &ItemMacro) {
        if let Some(name) = &item.ident {
            self.tree.macros.insert(plain(name), self.file());
        }
    }

    fn define_foreign_items(&mut self, items: &[ForeignItem]) {
        for item in items {
            self.define_foreign(item);
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
        let line = tree.span().start().line;
        match tree {
            UseTree::Path(branch) => self.import(&branch.tree, &below(path, &branch.ident), how),
            UseTree::Group(group) => {
                for branch in &group.items {
                    self.import(branch, path, how);
                }
            }
            UseTree::Name(leaf) => self.bind(&leaf.ident, leaf_path(path, &leaf.ident), how, line),
            UseTree::Rename(leaf) => {
                self.bind(&leaf.rename, leaf_path(path, &leaf.ident), how, line);
            }
            UseTree::Glob(_) => {
                self.tree.modules[self.module].globs.push(path.to_vec());
                self.mention(path.to_vec(), TYPES, How::Glob, line);
            }
        }
    }

    fn bind(&mut self, leaf: &Ident, imported: Imported, how: How, line: usize) {
        let Imported { path, spaces } = imported;
        // `use a::{self}` binds the name `a`.
        let name = if leaf == "self" {
            path.last().cloned()
        } else {
            Some(plain(leaf))
        };
        if let Some(name) = name.filter(|name| name != "_") {
            self.add_name(
                name,
                spaces,
                Entry::Import(path.clone()),
                how == How::Import,
            );
        }
        self.mention(path, spaces, how, line);
    }

    fn take_path(&mut self, path: &syn::Path, spaces: Spaces) {
        let mut segments: Vec<String> = path
            .segments
            .iter()
            .map(|segment| plain(&segment.ident))
            .collect();
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
        for segment in &path.segments {
            self.visit_path_arguments(&segment.arguments);
        }
    }

    /// A `mod name { .. }`: a module of the same file.
    fn enter(&mut self, item: &ItemMod, items: &[Item]) {
        let name = plain(&item.ident);
        let inner_folder = join(&self.folder, &name);
        let inner = self.tree.add_module(self.file(), Some(self.module), false);
        self.add_name(name, TYPES, Entry::Module(inner), is_private(&item.vis));
        let outer = mem::replace(&mut self.module, inner);
        let folder = mem::replace(&mut self.folder, inner_folder);
        for item in items {
            self.visit_item(item);
        }
        self.module = outer;
        self.folder = folder;
    }

    /// A `mod name;`: its file is read when this one is done.
    fn declare(&mut self, item: &ItemMod) {
        let file = &self.tree.files[self.file()];
        let own_folder = file.rsplit_once('/').map_or("", |(folder, _)| folder);
        let path = path_attribute(&item.attrs).map(|path| join(own_folder, &path));
        self.children.push(Child {
            parent: self.module,
            name: plain(&item.ident),
            is_private: is_private(&item.vis),
            path,
            folder: self.folder.clone(),
        });
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
        match &item.content {
            Some((_, items)) => self.enter(item, items),
            None => self.declare(item),
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let how = if is_private(&item.vis) {
            How::Import
        } else {
            How::Reexport
        };
        let start = if item.leading_colon.is_some() {
            vec![String::new()]
        } else {
            Vec::new()
        };
        self.import(&item.tree, &start, how);
    }

    fn visit_block(&mut self, block: &'ast Block) {
        let outer = self.module;
        if block
            .stmts
            .iter()
            .any(|statement| matches!(statement, Stmt::Item(_)))
        {
            self.module = self.tree.add_module(self.file(), Some(outer), true);
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
            Meta::List(list)
                if !["cfg", "doc", "allow", "expect"]
                    .iter()
                    .any(|name| list.path.is_ident(name)) =>
            {
                self.take_written(scan::paths(list.tokens.clone()));
                self.take_written(scan::paths_in_strings(list.tokens.clone()));
            }
            _ => {}
        }
    }
}

fn path_attribute(attributes: &[Attribute]) -> Option<String> {
    attributes
        .iter()
        .find_map(|attribute| match &attribute.meta {
            Meta::NameValue(MetaNameValue {
                path,
                value: syn::Expr::Lit(value),
                ..
            }) if path.is_ident("path") => match &value.lit {
                Lit::Str(text) => Some(text.value()),
                _ => None,
            },
            _ => None,
        })
}

/// What a `use` names, and as what.
struct Imported {
    path: Vec<String>,
    spaces: Spaces,
}

/// The path of a `use`'s last part: `self` is the module before it.
fn leaf_path(path: &[String], name: &Ident) -> Imported {
    if name == "self" {
        return Imported {
            path: path.to_vec(),
            spaces: TYPES,
        };
    }
    Imported {
        path: below(path, name),
        spaces: ANY,
    }
}

fn below(path: &[String], name: &Ident) -> Vec<String> {
    [path, &[plain(name)]].concat()
}

fn is_private(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Inherited)
}

/// A name without `r#`.
fn plain(name: &Ident) -> String {
    name.to_string().trim_start_matches("r#").to_owned()
}
