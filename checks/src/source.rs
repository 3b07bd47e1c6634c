//! One parsed file, and which of its lines are for tests only.

use std::{fmt, ops::RangeInclusive};

use proc_macro2::Span;
use syn::{
    Arm, Attribute, Field, FieldValue, ForeignItem, ImplItem, Item, Local, Meta, Stmt, Token,
    TraitItem, Variant,
    punctuated::Punctuated,
    spanned::Spanned,
    visit::{self, Visit},
};

use crate::words::{self, Word};

/// A file's syntax and the lines of it that only a test build has.
pub struct Source {
    /// What was parsed.
    pub syntax: syn::File,
    words: Vec<Word>,
    tests: TestLines,
}

impl fmt::Debug for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Source")
            .field("tests", &self.tests)
            .finish_non_exhaustive()
    }
}

impl Source {
    /// Parses `text`; `path` is for the message.
    ///
    /// # Errors
    ///
    /// A text that is no Rust.
    pub fn parse(path: &str, text: &str) -> Result<Self, String> {
        let syntax = syn::parse_file(text)
            .map_err(|error| format!("{path}:{}: {error}", error.span().start().line))?;
        let mut tests = TestLines::default();
        if is_for_tests(&syntax.attrs) {
            tests.0.push(1..=usize::MAX);
        }
        tests.visit_file(&syntax);
        let words = words::words(text).map_err(|error| format!("{path}: {error}"))?;
        Ok(Self {
            syntax,
            words,
            tests,
        })
    }

    /// Identifiers and literals outside tests.
    pub fn words(&self) -> Vec<Word> {
        self.words
            .iter()
            .filter(|word| !self.is_test(word.line))
            .cloned()
            .collect()
    }

    /// Whether line `line`, from 1, belongs to an item under `#[cfg(test)]` or `#[test]`.
    pub fn is_test(&self, line: usize) -> bool {
        self.tests.0.iter().any(|lines| lines.contains(&line))
    }
}

/// Whether these attributes leave an item out of every build but a test's.
pub(crate) fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(list) if list.path.is_ident("cfg") => {
            list.parse_args().is_ok_and(|meta| needs_test(&meta))
        }
        _ => false,
    })
}

/// Whether a `cfg` predicate holds in test builds only.
fn needs_test(meta: &Meta) -> bool {
    match meta {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(list) => {
            let Ok(inner) = list.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated)
            else {
                return false;
            };
            (list.path.is_ident("all") && inner.iter().any(needs_test))
                || (list.path.is_ident("any") && !inner.is_empty() && inner.iter().all(needs_test))
        }
        Meta::NameValue(_) => false,
    }
}

#[derive(Debug, Default)]
struct TestLines(Vec<RangeInclusive<usize>>);

impl TestLines {
    /// Takes the lines of a node with these attributes if it is for tests; returns whether it is.
    fn take(&mut self, attributes: &[Attribute], span: Span) -> bool {
        let is_test = is_for_tests(attributes);
        if is_test {
            self.0.push(span.start().line..=span.end().line);
        }
        is_test
    }
}

/// Visits nodes of one kind and does not look inside of those that are for tests.
macro_rules! take_nodes {
    ($($method:ident: $node:ty),* $(,)?) => {$(
        fn $method(&mut self, node: &'ast $node) {
            if !self.take(&node.attrs, node.span()) {
                visit::$method(self, node);
            }
        }
    )*};
}

impl<'ast> Visit<'ast> for TestLines {
    take_nodes! {
        visit_field: Field, visit_field_value: FieldValue, visit_variant: Variant, visit_arm: Arm, visit_local: Local,
    }

    fn visit_item(&mut self, item: &'ast Item) {
        if !self.take(item_attributes(item), item.span()) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item(&mut self, item: &'ast ImplItem) {
        let attributes: &[Attribute] = match item {
            ImplItem::Const(item) => &item.attrs,
            ImplItem::Fn(item) => &item.attrs,
            ImplItem::Type(item) => &item.attrs,
            ImplItem::Macro(item) => &item.attrs,
            _ => &[],
        };
        if !self.take(attributes, item.span()) {
            visit::visit_impl_item(self, item);
        }
    }

    fn visit_trait_item(&mut self, item: &'ast TraitItem) {
        let attributes: &[Attribute] = match item {
            TraitItem::Const(item) => &item.attrs,
            TraitItem::Fn(item) => &item.attrs,
            TraitItem::Type(item) => &item.attrs,
            TraitItem::Macro(item) => &item.attrs,
            _ => &[],
        };
        if !self.take(attributes, item.span()) {
            visit::visit_trait_item(self, item);
        }
    }

    fn visit_foreign_item(&mut self, item: &'ast ForeignItem) {
        let attributes: &[Attribute] = match item {
            ForeignItem::Fn(item) => &item.attrs,
            ForeignItem::Static(item) => &item.attrs,
            ForeignItem::Type(item) => &item.attrs,
            ForeignItem::Macro(item) => &item.attrs,
            _ => &[],
        };
        if !self.take(attributes, item.span()) {
            visit::visit_foreign_item(self, item);
        }
    }

    fn visit_stmt(&mut self, statement: &'ast Stmt) {
        let attributes: &[Attribute] = match statement {
            Stmt::Macro(call) => &call.attrs,
            Stmt::Expr(syn::Expr::Block(block), _) => &block.attrs,
            Stmt::Expr(syn::Expr::Call(call), _) => &call.attrs,
            Stmt::Expr(syn::Expr::MethodCall(call), _) => &call.attrs,
            Stmt::Expr(syn::Expr::If(branch), _) => &branch.attrs,
            _ => &[],
        };
        if !self.take(attributes, statement.span()) {
            visit::visit_stmt(self, statement);
        }
    }
}

pub(crate) fn item_attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::ExternCrate(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::ForeignMod(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::TraitAlias(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test_lines(text: &str) -> Vec<usize> {
        let source = Source::parse("x.rs", text).expect("the text is Rust");
        (1..=text.lines().count())
            .filter(|line| source.is_test(*line))
            .collect()
    }

    #[test]
    fn only_what_needs_the_test_build_is_for_tests() {
        assert_eq!(
            test_lines("fn a() {}\n#[cfg(test)]\nmod tests {\n}\nfn b() {}"),
            [2, 3, 4]
        );
        assert_eq!(
            test_lines("#[cfg(all(test, unix))]\nfn a() {}\n#[cfg(not(test))]\nfn b() {}"),
            [1, 2]
        );
        assert_eq!(
            test_lines("#[cfg(any(test, unix))]\nfn a() {}\n#[cfg(any(test))]\nfn b() {}"),
            [3, 4]
        );
        assert_eq!(
            test_lines("#[test]\nfn a() {}\n#[cfg(unix)]\nfn b() {}"),
            [1, 2]
        );
        assert_eq!(test_lines("#![cfg(test)]\nfn a() {}"), [1, 2]);
    }

    #[test]
    fn parts_of_items_can_be_for_tests() {
        assert_eq!(
            test_lines("struct A {\n#[cfg(test)]\na: u8,\nb: u8 }"),
            [2, 3]
        );
        assert_eq!(
            test_lines("impl A {\n#[cfg(test)]\nfn a() {}\nfn b() {} }"),
            [2, 3]
        );
        assert_eq!(
            test_lines(
                "fn a() {\n#[cfg(test)]\nlet a = 1;\n#[cfg(test)]\nb();\n#[cfg(test)]\nc!();\nd() }"
            ),
            [2, 3, 4, 5, 6, 7]
        );
    }
}
