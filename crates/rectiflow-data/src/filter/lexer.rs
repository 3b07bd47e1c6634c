//! The words and signs of a filter.

use std::ops::Range;

/// A word or sign.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Token {
    /// A number.
    Number(f64),
    /// A column, a keyword or a value without quotation marks.
    Word(String),
    /// A value in quotation marks.
    Quoted(String),
    /// A tag behind `tag:`.
    Tag(String),
    /// An operator, a bracket or a comma.
    Sign(&'static str),
}

/// A token and its place in the text, in bytes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Placed {
    pub(crate) token: Token,
    pub(crate) span: Range<usize>,
}

/// Signs, longer ones first.
const SIGNS: [&str; 17] = [
    "<=", ">=", "==", "!=", "<>", "<", ">", "=", "+", "-", "*", "/", "(", ")", "[", "]", ",",
];

/// Splits a filter into tokens.
///
/// # Errors
/// A message with the place of what is no token.
pub(crate) fn tokens(text: &str) -> Result<Vec<Placed>, String> {
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(first) = text[at..].chars().next() {
        if first.is_whitespace() {
            at += first.len_utf8();
            continue;
        }
        let (token, len) = next(text, at)?;
        tokens.push(Placed {
            token,
            span: at..at + len,
        });
        at += len;
    }
    Ok(tokens)
}

/// The token at byte `at`, which is not white space, and its length.
fn next(text: &str, at: usize) -> Result<(Token, usize), String> {
    let rest = &text[at..];
    let first = rest.chars().next().unwrap_or_default();
    if first == '"' || first == '\'' {
        let (inside, len) = quoted(text, at)?;
        return Ok((Token::Quoted(inside), len));
    }
    if first.is_ascii_digit() || first == '.' {
        return number(text, at);
    }
    if is_of_word(first) {
        let len = length(rest, is_of_word);
        if rest[..len].eq_ignore_ascii_case("tag") && rest[len..].starts_with(':') {
            let (tag, tag_len) = tag(text, at + len + 1)?;
            return Ok((Token::Tag(tag), len + 1 + tag_len));
        }
        return Ok((Token::Word(rest[..len].to_owned()), len));
    }
    for sign in SIGNS {
        if rest.starts_with(sign) {
            return Ok((Token::Sign(sign), sign.len()));
        }
    }
    let hint = match first {
        '&' => "; write `and`",
        '|' => "; write `or`",
        '!' => "; write `not`",
        _ => "",
    };
    Err(format!(
        "{}: {first:?} has no meaning here{hint}",
        place(text, at)
    ))
}

/// Whether a letter is of a word. Dots join the names of nested columns.
fn is_of_word(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_' || letter == '.'
}

/// The length of the letters at the start of `text` that are as `is_part` says.
fn length(text: &str, is_part: impl Fn(char) -> bool) -> usize {
    let is_end = |letter: char| !is_part(letter);
    text.find(is_end).unwrap_or(text.len())
}

/// A number, or a word that begins with a digit, such as a date or a hash.
fn number(text: &str, at: usize) -> Result<(Token, usize), String> {
    let rest = &text[at..];
    let len = length(rest, is_of_word);
    let word = &rest[..len];
    if let Ok(number) = word.parse::<f64>() {
        return Ok((Token::Number(number), len));
    }
    if word.chars().any(char::is_alphabetic) {
        return Ok((Token::Word(word.to_owned()), len));
    }
    Err(format!("{}: {word:?} is no number", place(text, at)))
}

/// What is between the quotation mark at `at` and the next one, and the length with both.
fn quoted(text: &str, at: usize) -> Result<(String, usize), String> {
    let mark = &text[at..=at];
    let inside = &text[at + 1..];
    match inside.find(mark) {
        Some(len) => Ok((inside[..len].to_owned(), len + 2)),
        None => Err(format!(
            "{}: the quotation mark {mark} is not closed",
            place(text, at)
        )),
    }
}

/// The tag at `at`: in quotation marks, or up to white space, a comma or a bracket that closes
/// another one.
fn tag(text: &str, at: usize) -> Result<(String, usize), String> {
    let rest = &text[at..];
    if rest.starts_with(['"', '\'']) {
        return quoted(text, at);
    }
    let mut depth = 0_usize;
    let mut len = 0;
    for letter in rest.chars() {
        let is_end = match letter {
            '(' => {
                depth += 1;
                false
            }
            ')' if depth == 0 => true,
            ')' => {
                depth -= 1;
                false
            }
            letter => letter.is_whitespace() || letter == ',' || letter == ']',
        };
        if is_end {
            break;
        }
        len += letter.len_utf8();
    }
    if len == 0 {
        return Err(format!(
            "{}: `tag:` needs a tag behind it, such as tag:comic or tag:\"long hair\"",
            place(text, at)
        ));
    }
    Ok((rest[..len].to_owned(), len))
}

/// A place in a filter, for messages.
pub(crate) fn place(text: &str, at: usize) -> String {
    let letters = text[..at].chars().count();
    format!("character {}", letters + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Vec<Token> {
        let tokens = tokens(text).unwrap();
        tokens.into_iter().map(|placed| placed.token).collect()
    }

    #[test]
    fn a_filter_is_split_into_words_and_signs() {
        let word = |word: &str| Token::Word(word.to_owned());
        assert_eq!(
            of("score.total>=5.5"),
            [word("score.total"), Token::Sign(">="), Token::Number(5.5)]
        );
        assert_eq!(
            of("tag:saber_(fate) tag:\"long hair\")"),
            [
                Token::Tag("saber_(fate)".to_owned()),
                Token::Tag("long hair".to_owned()),
                Token::Sign(")")
            ]
        );
        assert_eq!(
            of("(tag:a) [g,'é x', 1girl]"),
            [
                Token::Sign("("),
                Token::Tag("a".to_owned()),
                Token::Sign(")"),
                Token::Sign("["),
                word("g"),
                Token::Sign(","),
                Token::Quoted("é x".to_owned()),
                Token::Sign(","),
                word("1girl"),
                Token::Sign("]"),
            ]
        );
    }

    #[test]
    fn what_is_no_token_is_named_with_its_place() {
        for (text, part) in [
            (
                "a && b",
                "character 3: '&' has no meaning here; write `and`",
            ),
            ("é = 'x", "character 5: the quotation mark ' is not closed"),
            ("1.2.3", "\"1.2.3\" is no number"),
            ("not tag: x", "`tag:` needs a tag"),
        ] {
            let message = tokens(text).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }
}
