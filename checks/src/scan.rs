//! Paths in tokens that have no syntax yet: the bodies of macros, the arguments of attributes.

use proc_macro2::{Delimiter, Spacing, TokenStream, TokenTree};

/// A path as it is written, and its line.
pub(crate) type Written = (Vec<String>, usize);

/// Keys of attributes whose value is a string that holds a path (serde, schemars).
const PATH_KEYS: [&str; 10] = [
    "default",
    "with",
    "serialize_with",
    "deserialize_with",
    "from",
    "into",
    "try_from",
    "remote",
    "schema_with",
    "skip_serializing_if",
];

/// Every path in `tokens`: `a`, `a::b`, `$crate::a`. Fields and methods are none, nor what follows
/// `>::` or a leading `::`.
pub(crate) fn paths(tokens: TokenStream) -> Vec<Written> {
    let mut found = Vec::new();
    scan(tokens, &[], &mut found);
    found
}

/// The paths in strings such as `with = "crate::guard::exact"`.
pub(crate) fn paths_in_strings(tokens: TokenStream) -> Vec<Written> {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let mut found = Vec::new();
    for at in 0..tokens.len() {
        if let TokenTree::Group(group) = &tokens[at] {
            found.extend(paths_in_strings(group.stream()));
        }
        let [
            TokenTree::Ident(key),
            TokenTree::Punct(sign),
            TokenTree::Literal(value),
        ] = &tokens[at..tokens.len().min(at + 3)]
        else {
            continue;
        };
        if sign.as_char() == '=' && PATH_KEYS.contains(&key.to_string().as_str()) {
            let text = value.to_string();
            let segments: Vec<String> = text
                .trim_matches('"')
                .split("::")
                .map(str::to_owned)
                .collect();
            found.push((segments, value.span().start().line));
        }
    }
    found
}

fn scan(tokens: TokenStream, prefix: &[String], found: &mut Vec<Written>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let mut at = 0;
    while at < tokens.len() {
        match &tokens[at] {
            TokenTree::Group(group) => {
                scan(group.stream(), &[], found);
                at += 1;
            }
            TokenTree::Ident(_) => at = take_path(&tokens, at, prefix, found),
            _ => at += 1,
        }
    }
}

/// Takes the path that begins at the identifier `at`; returns where it ends.
fn take_path(
    tokens: &[TokenTree],
    mut at: usize,
    prefix: &[String],
    found: &mut Vec<Written>,
) -> usize {
    let starts_path = may_start(tokens, at);
    let line = tokens[at].span().start().line;
    let mut segments = prefix.to_vec();
    segments.push(name(&tokens[at]));
    at += 1;
    while is_double_colon(tokens, at) {
        match tokens.get(at + 2) {
            Some(next @ TokenTree::Ident(_)) => segments.push(name(next)),
            // `use a::{b, c}` in a macro.
            Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                if starts_path {
                    scan(group.stream(), &segments, found);
                }
                return at + 3;
            }
            _ => break,
        }
        at += 3;
    }
    if starts_path {
        found.push((segments, line));
    }
    at
}

/// Whether the identifier `at` is a path's first: no field, method, lifetime, `$name` or part of a
/// path already begun.
fn may_start(tokens: &[TokenTree], at: usize) -> bool {
    if at == 0 {
        return true;
    }
    match sign(tokens, at - 1) {
        Some('.') => at >= 2 && sign(tokens, at - 2) == Some('.'), // a range
        Some('\'') => false,
        Some('$') => name(&tokens[at]) == "crate",
        Some(':') => !(at >= 2 && is_double_colon(tokens, at - 2)),
        _ => true,
    }
}

fn is_double_colon(tokens: &[TokenTree], at: usize) -> bool {
    let Some(TokenTree::Punct(first)) = tokens.get(at) else {
        return false;
    };
    first.as_char() == ':' && first.spacing() == Spacing::Joint && sign(tokens, at + 1) == Some(':')
}

fn sign(tokens: &[TokenTree], at: usize) -> Option<char> {
    match tokens.get(at) {
        Some(TokenTree::Punct(sign)) => Some(sign.as_char()),
        _ => None,
    }
}

fn name(token: &TokenTree) -> String {
    token.to_string().trim_start_matches("r#").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<String> {
        let tokens: TokenStream = text.parse().expect("the text has balanced brackets");
        paths(tokens)
            .into_iter()
            .map(|(segments, _)| segments.join("::"))
            .collect()
    }

    #[test]
    fn paths_are_seen_and_fields_are_not() {
        assert_eq!(
            found(r#""{}", crate::a::b(x.y, z.w())"#),
            ["crate::a::b", "x", "z"]
        );
        assert_eq!(
            found("0..a::b, $crate::c, $d, 'e, Vec::<super::f::G>::new()"),
            ["a::b", "crate::c", "Vec", "super::f::G"]
        );
        assert_eq!(
            found("::std::fs::read, <A as B>::c, x: ::d"),
            ["A", "as", "B", "x"]
        );
        assert_eq!(
            found("use crate::a::{b, c::d};"),
            ["use", "crate::a::b", "crate::a::c::d"]
        );
    }

    #[test]
    fn strings_of_attributes_hold_paths() {
        let tokens: TokenStream = r#"rename = "x", with = "crate::guard::exact", default = "one""#
            .parse()
            .expect("tokens");
        let found: Vec<String> = paths_in_strings(tokens)
            .into_iter()
            .map(|(segments, _)| segments.join("::"))
            .collect();
        assert_eq!(found, ["crate::guard::exact", "one"]);
    }
}
