//! Limits of files, functions, comments and words. `scripts/density.py` measures what is below
//! them.

use std::path::Path;

use syn::{
    Block, ImplItemFn, ItemFn, Signature, TraitItemFn,
    spanned::Spanned,
    visit::{self, Visit},
};

use crate::{
    comments::{self, Comment},
    files::Files,
    source::Source,
};

/// Lines of a file outside tests.
const FILE_LINES: usize = 600;
/// Lines of a function outside tests, from its `fn` to its closing brace.
const FUNCTION_LINES: usize = 80;
/// Columns of a line with a comment, which rustfmt does not wrap.
const COMMENT_COLUMNS: usize = 100;

/// Phrases of a translator, in small letters, and how often a thousand comment lines may have them.
const WORDS: [(&[&str], usize); 4] = [
    (&["so many", "so much"], 0),
    (&["whoever", "nobody", "somebody"], 1),
    (&["gives"], 2),
    (&["anew"], 0),
];

/// A file of the workspace.
#[derive(Debug)]
pub struct Text {
    path: String,
    num_lines: usize,
    comments: Vec<Comment>,
    source: Source,
}

impl Text {
    /// Parses a file; `path` is for the report.
    ///
    /// # Errors
    ///
    /// A text that is no Rust.
    pub fn new(path: &str, text: &str) -> Result<Self, String> {
        Ok(Self {
            path: path.to_owned(),
            num_lines: text.lines().count(),
            comments: comments::comments(text)?,
            source: Source::parse(path, text)?,
        })
    }

    /// Whether the file is of `tests/`: all of it is for tests.
    fn is_test(&self) -> bool {
        self.path.contains("/tests/")
    }
}

/// Reads every Rust file of the crates and of this one.
///
/// # Errors
///
/// A file that cannot be read or parsed.
pub fn read(workspace: &Path) -> Result<Vec<Text>, String> {
    let crates = ["data", "annotate", "sdxl", "train", "cli"];
    let crates = crates.map(|name| format!("crates/rectiflow-{name}"));
    let mut texts = Vec::new();
    for folder in crates.iter().map(String::as_str).chain(["checks"]) {
        for (path, text) in Files::read(&workspace.join(folder))?.iter() {
            texts.push(Text::new(&format!("{folder}/{path}"), text)?);
        }
    }
    Ok(texts)
}

/// A limit: what is beyond it in these texts, a line each.
pub type Limit = fn(&[Text]) -> Vec<String>;

/// Everything beyond a limit.
///
/// # Errors
///
/// A file that cannot be read or parsed.
pub fn faults(workspace: &Path) -> Result<Vec<String>, String> {
    const LIMITS: [Limit; 4] = [files, functions, widths, words];
    let texts = read(workspace)?;
    let mut faults = Vec::new();
    for limit in LIMITS {
        faults.extend(limit(&texts));
    }
    Ok(faults)
}

/// Files that are too long.
pub fn files(texts: &[Text]) -> Vec<String> {
    let mut faults = Vec::new();
    for text in texts.iter().filter(|text| !text.is_test()) {
        let lines = (1..=text.num_lines)
            .filter(|line| !text.source.is_test(*line))
            .count();
        if lines > FILE_LINES {
            faults.push(format!(
                "{}: {lines} lines outside tests, at most {FILE_LINES}",
                text.path
            ));
        }
    }
    faults
}

/// Functions that are too long.
pub fn functions(texts: &[Text]) -> Vec<String> {
    let mut faults = Vec::new();
    for text in texts.iter().filter(|text| !text.is_test()) {
        let mut functions = Functions(Vec::new());
        functions.visit_file(&text.source.syntax);
        for Function { name, line, lines } in functions.0 {
            if lines > FUNCTION_LINES && !text.source.is_test(line) {
                let path = &text.path;
                faults.push(format!(
                    "{path}:{line} {name}: {lines} lines, at most {FUNCTION_LINES}"
                ));
            }
        }
    }
    faults
}

struct Function {
    name: String,
    line: usize,
    lines: usize,
}

struct Functions(Vec<Function>);

impl Functions {
    fn take(&mut self, signature: &Signature, block: &Block) {
        let line = signature.span().start().line;
        let lines = block.span().end().line - line + 1;
        self.0.push(Function {
            name: signature.ident.to_string(),
            line,
            lines,
        });
    }
}

impl<'ast> Visit<'ast> for Functions {
    fn visit_item_fn(&mut self, item: &'ast ItemFn) {
        self.take(&item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast ImplItemFn) {
        self.take(&item.sig, &item.block);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast TraitItemFn) {
        if let Some(block) = &item.default {
            self.take(&item.sig, block);
        }
        visit::visit_trait_item_fn(self, item);
    }
}

/// Lines with comments that are too wide, of tests as well.
pub fn widths(texts: &[Text]) -> Vec<String> {
    let mut faults = Vec::new();
    for text in texts {
        for Comment { line, width, .. } in &text.comments {
            if *width > COMMENT_COLUMNS {
                faults.push(format!(
                    "{}:{line} {width} columns, at most {COMMENT_COLUMNS}",
                    text.path
                ));
            }
        }
    }
    faults
}

/// Words that comments have too often, of all texts together, each place a line.
pub fn words(texts: &[Text]) -> Vec<String> {
    let lines: usize = texts.iter().map(|text| text.comments.len()).sum();
    let mut faults = Vec::new();
    for (phrases, limit) in WORDS {
        let mut places = Vec::new();
        for phrase in phrases {
            places.extend(places_of(texts, phrase));
        }
        let found = places.len();
        if found * 1000 > limit * lines {
            faults.append(&mut places);
            let phrases = phrases.join(", ");
            faults.push(format!(
                "\"{phrases}\": {found} in {lines} lines, at most {limit} a thousand"
            ));
        }
    }
    faults
}

/// Where comments have a phrase. It may begin in one line and end in the next.
fn places_of(texts: &[Text], phrase: &str) -> Vec<String> {
    let phrase = words_of(phrase);
    let mut places = Vec::new();
    for text in texts {
        for (at, comment) in text.comments.iter().enumerate() {
            let mut words = words_of(&comment.text);
            let own = words.len();
            if let Some(next) = text.comments.get(at + 1)
                && next.line == comment.line + 1
            {
                words.extend(words_of(&next.text));
            }
            let found = (0..own)
                .filter(|at| words[*at..].starts_with(&phrase))
                .count();
            let place = format!("{}:{} \"{}\"", text.path, comment.line, phrase.join(" "));
            places.extend(vec![place; found]);
        }
    }
    places
}

fn words_of(text: &str) -> Vec<String> {
    let text = text.to_lowercase();
    let words = text
        .split(|sign: char| !sign.is_alphanumeric())
        .filter(|word| !word.is_empty());
    words.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(path: &str, text: &str) -> [Text; 1] {
        [Text::new(path, text).expect("the text is Rust")]
    }

    #[test]
    fn long_files_are_found_by_their_lines_outside_tests() {
        let long = "fn a() {}\n".repeat(FILE_LINES);
        assert_eq!(
            files(&texts(
                "a/src/b.rs",
                &format!("{long}#[cfg(test)]\nmod tests {{\n}}\n")
            )),
            [""; 0]
        );
        assert_eq!(files(&texts("a/src/b.rs", &format!("{long}\n"))).len(), 1);
        assert_eq!(files(&texts("a/tests/b.rs", &format!("{long}\n"))), [""; 0]);
    }

    #[test]
    fn long_functions_are_found_without_their_comments_above() {
        let of_lines = |lines: usize| {
            format!(
                "/// A\n#[inline]\nfn a() {{\n{}}}",
                "f();\n".repeat(lines - 2)
            )
        };
        assert_eq!(
            functions(&texts("a/src/b.rs", &of_lines(FUNCTION_LINES))),
            [""; 0]
        );
        assert_eq!(
            functions(&texts("a/src/b.rs", &of_lines(FUNCTION_LINES + 1))),
            ["a/src/b.rs:3 a: 81 lines, at most 80"]
        );
        let method = format!("impl A {{\n{}\n}}", of_lines(FUNCTION_LINES + 1));
        assert_eq!(functions(&texts("a/src/b.rs", &method)).len(), 1);
        let in_test = format!(
            "#[cfg(test)]\nmod tests {{\n{}\n}}",
            of_lines(FUNCTION_LINES + 1)
        );
        assert_eq!(functions(&texts("a/src/b.rs", &in_test)), [""; 0]);
    }

    #[test]
    fn wide_comments_are_found_and_wide_code_is_not() {
        let wide = "x".repeat(COMMENT_COLUMNS);
        assert_eq!(
            widths(&texts(
                "a/src/b.rs",
                &format!("const A: &str = \"// {wide}\";")
            )),
            [""; 0]
        );
        assert_eq!(
            widths(&texts("a/tests/b.rs", &format!("\n// {wide}"))),
            ["a/tests/b.rs:2 103 columns, at most 100"]
        );
        assert_eq!(
            widths(&texts("a/src/b.rs", &format!("fn a() {{}} // {wide}"))).len(),
            1
        );
    }

    #[test]
    fn words_are_counted_a_thousand_lines() {
        let with = |comments: &str| {
            texts(
                "a/src/b.rs",
                &format!("{}{comments}\n", "// x\n".repeat(998)),
            )
        };
        assert_eq!(words(&with("// He returns.")), [""; 0]);
        assert_eq!(
            words(&with("// So\n// many.")),
            [
                "a/src/b.rs:999 \"so many\"",
                "\"so many, so much\": 1 in 1000 lines, at most 0 a thousand"
            ]
        );
        assert_eq!(words(&with("// It gives\n// and gives.")), [""; 0]);
        assert_eq!(words(&with("// It gives\n// gives\n// gives.")).len(), 4);
        assert_eq!(words(&with("// forgives anewly")), [""; 0]);
    }
}
