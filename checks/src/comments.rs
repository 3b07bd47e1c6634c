//! The comments of a file, a line each: what stands in a line behind its last token.

use proc_macro2::{Span, TokenStream, TokenTree};

use crate::words::is_doc;

/// One line of comment, or the end of a line of code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comment {
    /// From 1.
    pub line: usize,
    /// Without the slashes.
    pub text: String,
    /// Columns of the whole line.
    pub width: usize,
}

/// Every comment that begins with `//`, `///` or `//!`. Blocks (`/* */`) are not looked for.
///
/// # Errors
///
/// A text with brackets that do not match.
pub fn comments(text: &str) -> Result<Vec<Comment>, String> {
    let tokens: TokenStream = text.parse().map_err(|error| format!("{error}"))?;
    let mut code = vec![0; text.lines().count() + 2];
    cover(tokens, &mut code);
    let mut comments = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let behind: String = line.chars().skip(code[at + 1]).collect();
        if let Some(comment) = behind.trim_start().strip_prefix("//") {
            let text = comment.trim_start_matches(['/', '!']).trim().to_owned();
            comments.push(Comment {
                line: at + 1,
                text,
                width: line.chars().count(),
            });
        }
    }
    Ok(comments)
}

/// Writes into `code`, by line, the column where the last token ends.
fn cover(tokens: TokenStream, code: &mut [usize]) {
    for token in tokens {
        match token {
            TokenTree::Group(group) if is_doc(group.stream()) => {}
            TokenTree::Group(group) => {
                cover_span(group.span_open(), code);
                cover(group.stream(), code);
                cover_span(group.span_close(), code);
            }
            // The `#` of a doc comment has the comment's place.
            TokenTree::Punct(sign) if sign.as_char() == '#' || sign.as_char() == '!' => {}
            token => cover_span(token.span(), code),
        }
    }
}

fn cover_span(span: Span, code: &mut [usize]) {
    let end = span.end();
    code[span.start().line..end.line].fill(usize::MAX);
    code[end.line] = code[end.line].max(end.column);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<(usize, String)> {
        let comments = comments(text).expect("the brackets match");
        comments
            .into_iter()
            .map(|comment| (comment.line, comment.text))
            .collect()
    }

    #[test]
    fn comments_are_told_from_strings() {
        let text = "//! head\n/// doc\nfn a() { // end\n    \"//no\";\n    // own\n    r#\"\n// no\n\"#; // last\n}\n//";
        let expected = [
            (1, "head"),
            (2, "doc"),
            (3, "end"),
            (5, "own"),
            (8, "last"),
            (10, ""),
        ];
        assert_eq!(
            found(text),
            expected.map(|(line, text)| (line, text.to_owned()))
        );
    }

    #[test]
    fn a_width_is_in_columns() {
        assert_eq!(comments("// \u{e9}\u{e9}").expect("it is Rust")[0].width, 5);
    }
}
