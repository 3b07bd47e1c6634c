//! The identifiers and literals of a file in their order, without doc comments: for rules about
//! words, not about names.

use proc_macro2::{TokenStream, TokenTree};

/// An identifier or literal, as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    /// With its quotes, if it is a string.
    pub text: String,
    /// From 1.
    pub line: usize,
    /// The sign behind it, if it is a punctuation mark.
    pub sign: Option<char>,
}

impl Word {
    /// Whether it is a string, of any kind.
    pub fn is_string(&self) -> bool {
        self.text.contains('"')
    }

    /// The inside of a string without escapes.
    pub fn inside(&self) -> &str {
        let inner = self
            .text
            .trim_start_matches(['b', 'c', 'r', '#'])
            .trim_end_matches('#');
        inner.trim_matches('"')
    }
}

/// All words of `text`.
///
/// # Errors
///
/// A text with brackets that do not match.
pub(crate) fn words(text: &str) -> Result<Vec<Word>, String> {
    let tokens: TokenStream = text.parse().map_err(|error| format!("{error}"))?;
    let mut words = Vec::new();
    collect(tokens, &mut words);
    Ok(words)
}

fn collect(tokens: TokenStream, words: &mut Vec<Word>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    for (at, token) in tokens.iter().enumerate() {
        match token {
            TokenTree::Group(group) if is_doc(group.stream()) => {}
            TokenTree::Group(group) => collect(group.stream(), words),
            TokenTree::Punct(_) => {}
            token => {
                let sign = match tokens.get(at + 1) {
                    Some(TokenTree::Punct(sign)) => Some(sign.as_char()),
                    _ => None,
                };
                words.push(Word {
                    text: token.to_string(),
                    line: token.span().start().line,
                    sign,
                });
            }
        }
    }
}

/// The group of `#[doc = ".."]`, which is what a doc comment is to the compiler.
pub(crate) fn is_doc(tokens: TokenStream) -> bool {
    let mut tokens = tokens.into_iter();
    let is_named_doc = matches!(tokens.next(), Some(TokenTree::Ident(name)) if name == "doc");
    is_named_doc && matches!(tokens.next(), Some(TokenTree::Punct(sign)) if sign.as_char() == '=')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doc_comments_are_no_words_and_strings_keep_their_quotes() {
        let words = words("/// gives\n//! anew\nfn a() { println!(\"x\", r#\"y\"#) } // so many")
            .expect("it is Rust");
        let texts: Vec<&str> = words.iter().map(|word| word.text.as_str()).collect();
        assert_eq!(texts, ["fn", "a", "println", "\"x\"", "r#\"y\"#"]);
        assert_eq!((words[2].sign, words[2].line), (Some('!'), 3));
        assert_eq!((words[3].inside(), words[4].inside()), ("x", "y"));
        assert!(words[4].is_string() && !words[1].is_string());
    }
}
