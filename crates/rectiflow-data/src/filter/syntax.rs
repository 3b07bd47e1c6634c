//! The grammar of filters: tokens to clauses.
//!
//! ```text
//! either     = both { "or" both }
//! both       = negation { "and" negation }
//! negation   = "not" negation | comparison
//! comparison = sum [ sign sum | ["not"] "in" list | "is" ["not"] "missing" ]
//! sum        = product { ("+" | "-") product }
//! product    = unary { ("*" | "/") unary }
//! unary      = "-" unary | number | word | "text" | tag:name | "(" either ")"
//! list       = "[" value { "," value } "]"
//! ```

use std::ops::Range;

use crate::filter::lexer::{Placed, Token, place, tokens};

/// Most brackets and signs inside of each other: parsing is recursive.
const MOST_DEPTH: usize = 64;

/// Longest filter in bytes: a chain of sums is as deep as it is long.
const MOST_BYTES: usize = 4096;

/// An operator between numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sum {
    Plus,
    Minus,
    Times,
    Over,
}

/// A comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sign {
    Equal,
    Unequal,
    Less,
    AtMost,
    Greater,
    AtLeast,
}

/// A part of a filter, before columns and kinds are looked up.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Expression {
    pub(crate) node: Node,
    /// Its place in the text, in bytes.
    pub(crate) span: Range<usize>,
}

/// The kinds of parts.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Node {
    Number(f64),
    /// A column, or a value without quotation marks.
    Word(String),
    Quoted(String),
    Tag(String),
    Negative(Box<Expression>),
    Sum(Sum, Box<Expression>, Box<Expression>),
    Compare(Sign, Box<Expression>, Box<Expression>),
    In(Box<Expression>, Vec<Expression>),
    Missing(Box<Expression>),
    Not(Box<Expression>),
    And(Vec<Expression>),
    Or(Vec<Expression>),
}

/// Parses a filter to its clauses: the parts that `and` joins outside of brackets. A filter without
/// words has none.
///
/// # Errors
/// A message with the place, what was expected and what was found.
pub(crate) fn clauses(text: &str) -> Result<Vec<Expression>, String> {
    if text.len() > MOST_BYTES {
        return Err(format!(
            "it has {} bytes, and may have {MOST_BYTES}",
            text.len()
        ));
    }
    let tokens = tokens(text)?;
    if tokens.is_empty() {
        return Ok(Vec::new());
    }
    let mut parser = Parser {
        text,
        tokens,
        at: 0,
        depth: 0,
    };
    let all = parser.either()?;
    if parser.at < parser.tokens.len() {
        return Err(parser.expected("`and`, `or` or the end"));
    }
    match all.node {
        Node::And(clauses) => Ok(clauses),
        _ => Ok(vec![all]),
    }
}

struct Parser<'a> {
    text: &'a str,
    tokens: Vec<Placed>,
    at: usize,
    depth: usize,
}

type Parsed = Result<Expression, String>;

impl Parser<'_> {
    fn either(&mut self) -> Parsed {
        let first = self.both()?;
        let mut parts = vec![first];
        while self.takes_word("or") {
            parts.push(self.both()?);
        }
        Ok(joined(parts, Node::Or))
    }

    fn both(&mut self) -> Parsed {
        let first = self.negation()?;
        let mut parts = vec![first];
        while self.takes_word("and") {
            parts.push(self.negation()?);
        }
        Ok(joined(parts, Node::And))
    }

    fn negation(&mut self) -> Parsed {
        let start = self.start();
        if !self.takes_word("not") {
            return self.comparison();
        }
        self.enter()?;
        let inner = self.negation()?;
        self.depth -= 1;
        let span = start..inner.span.end;
        let node = Node::Not(Box::new(inner));
        Ok(Expression { node, span })
    }

    fn comparison(&mut self) -> Parsed {
        let left = self.sum()?;
        let start = left.span.start;
        if let Some(sign) = self.sign() {
            self.at += 1;
            let right = self.sum()?;
            let span = start..right.span.end;
            let node = Node::Compare(sign, Box::new(left), Box::new(right));
            return Ok(Expression { node, span });
        }

        // The comparisons that are words.
        let node = if self.takes_word("is") {
            let is_not = self.takes_word("not");
            if !self.takes_word("missing") {
                return Err(self.expected("`missing` behind `is`"));
            }
            negated(is_not, Node::Missing(Box::new(left)), start..self.end())
        } else if self.is_not_in() || self.is_word("in") {
            let is_not = self.takes_word("not");
            self.at += 1;
            let list = self.list()?;
            negated(is_not, Node::In(Box::new(left), list), start..self.end())
        } else {
            return Ok(left);
        };
        let span = start..self.end();
        Ok(Expression { node, span })
    }

    fn sum(&mut self) -> Parsed {
        let mut left = self.product()?;
        while let Some(sum) = self.operator([("+", Sum::Plus), ("-", Sum::Minus)]) {
            let right = self.product()?;
            left = joined_by(sum, left, right);
        }
        Ok(left)
    }

    fn product(&mut self) -> Parsed {
        let mut left = self.unary()?;
        while let Some(sum) = self.operator([("*", Sum::Times), ("/", Sum::Over)]) {
            let right = self.unary()?;
            left = joined_by(sum, left, right);
        }
        Ok(left)
    }

    fn unary(&mut self) -> Parsed {
        let start = self.start();
        let Some(placed) = self.tokens.get(self.at).cloned() else {
            return Err(self.expected("a column, a number or a tag"));
        };
        let node = match placed.token {
            Token::Sign("-") => {
                self.at += 1;
                self.enter()?;
                let inner = self.unary()?;
                self.depth -= 1;
                let span = start..inner.span.end;
                let node = Node::Negative(Box::new(inner));
                return Ok(Expression { node, span });
            }
            Token::Sign("(") => {
                self.at += 1;
                self.enter()?;
                let inner = self.either()?;
                self.depth -= 1;
                self.take_sign(")")?;
                let span = start..self.end();
                return Ok(Expression { span, ..inner });
            }
            Token::Sign(_) => return Err(self.expected("a column, a number or a tag")),
            Token::Word(word) if is_keyword(&word) => {
                return Err(self.expected("a column, a number or a tag"));
            }
            Token::Number(number) => Node::Number(number),
            Token::Word(word) => Node::Word(word),
            Token::Quoted(text) => Node::Quoted(text),
            Token::Tag(tag) => Node::Tag(tag),
        };
        self.at += 1;
        Ok(Expression {
            node,
            span: placed.span,
        })
    }

    fn list(&mut self) -> Result<Vec<Expression>, String> {
        self.take_sign("[")?;
        let mut values = Vec::new();
        loop {
            values.push(self.unary()?);
            if self.is_sign("]") {
                self.at += 1;
                return Ok(values);
            }
            if !self.is_sign(",") {
                return Err(self.expected("`,` or `]` behind a value of a list"));
            }
            self.at += 1;
        }
    }

    /// Takes the next token if it is one of these operators.
    fn operator(&mut self, operators: [(&str, Sum); 2]) -> Option<Sum> {
        for (sign, sum) in operators {
            if self.is_sign(sign) {
                self.at += 1;
                return Some(sum);
            }
        }
        None
    }

    /// The comparison that the next token is.
    fn sign(&self) -> Option<Sign> {
        let Token::Sign(sign) = self.tokens.get(self.at)?.token else {
            return None;
        };
        match sign {
            "=" | "==" => Some(Sign::Equal),
            "!=" | "<>" => Some(Sign::Unequal),
            "<" => Some(Sign::Less),
            "<=" => Some(Sign::AtMost),
            ">" => Some(Sign::Greater),
            ">=" => Some(Sign::AtLeast),
            _ => None,
        }
    }

    fn is_sign(&self, sign: &str) -> bool {
        let next = self.tokens.get(self.at);
        next.is_some_and(|placed| matches!(placed.token, Token::Sign(other) if other == sign))
    }

    fn take_sign(&mut self, sign: &str) -> Result<(), String> {
        if !self.is_sign(sign) {
            return Err(self.expected(&format!("`{sign}`")));
        }
        self.at += 1;
        Ok(())
    }

    fn is_word(&self, word: &str) -> bool {
        self.is_word_at(self.at, word)
    }

    fn is_word_at(&self, at: usize, word: &str) -> bool {
        match self.tokens.get(at).map(|placed| &placed.token) {
            Some(Token::Word(other)) => other.eq_ignore_ascii_case(word),
            _ => false,
        }
    }

    fn is_not_in(&self) -> bool {
        self.is_word("not") && self.is_word_at(self.at + 1, "in")
    }

    fn takes_word(&mut self, word: &str) -> bool {
        let is_next = self.is_word(word);
        self.at += usize::from(is_next);
        is_next
    }

    fn enter(&mut self) -> Result<(), String> {
        self.depth += 1;
        if self.depth > MOST_DEPTH {
            let place = place(self.text, self.start());
            return Err(format!(
                "{place}: more than {MOST_DEPTH} brackets or signs inside of each other"
            ));
        }
        Ok(())
    }

    /// The first byte of the next token.
    fn start(&self) -> usize {
        let next = self.tokens.get(self.at);
        next.map_or(self.text.len(), |placed| placed.span.start)
    }

    /// The end of the last token that was taken.
    fn end(&self) -> usize {
        let last = self.at.checked_sub(1).and_then(|at| self.tokens.get(at));
        last.map_or(0, |placed| placed.span.end)
    }

    fn expected(&self, expected: &str) -> String {
        let found = match self.tokens.get(self.at) {
            Some(placed) => format!("{:?}", &self.text[placed.span.clone()]),
            None => "the end".to_owned(),
        };
        let place = place(self.text, self.start());
        format!("{place}: expected {expected}, found {found}")
    }
}

/// Whether a word is one of the language, and so no column.
fn is_keyword(word: &str) -> bool {
    let keywords = ["and", "or", "not", "in", "is", "missing"];
    keywords
        .iter()
        .any(|other| word.eq_ignore_ascii_case(other))
}

fn negated(is_not: bool, node: Node, span: Range<usize>) -> Node {
    if is_not {
        Node::Not(Box::new(Expression { node, span }))
    } else {
        node
    }
}

/// One part as it is, several joined by `join`.
fn joined(mut parts: Vec<Expression>, join: fn(Vec<Expression>) -> Node) -> Expression {
    if parts.len() == 1 {
        return parts.swap_remove(0);
    }
    let start = parts.first().map_or(0, |part| part.span.start);
    let end = parts.last().map_or(0, |part| part.span.end);
    Expression {
        node: join(parts),
        span: start..end,
    }
}

fn joined_by(sum: Sum, left: Expression, right: Expression) -> Expression {
    let span = left.span.start..right.span.end;
    let node = Node::Sum(sum, Box::new(left), Box::new(right));
    Expression { node, span }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_parts_that_and_joins_are_clauses() {
        let text = "rating in [g, s] and score >= 5 and width*height >= 65536 and not tag:comic";
        let clauses = clauses(text).unwrap();
        let parts: Vec<&str> = clauses
            .iter()
            .map(|part| &text[part.span.clone()])
            .collect();
        let expected = [
            "rating in [g, s]",
            "score >= 5",
            "width*height >= 65536",
            "not tag:comic",
        ];
        assert_eq!(parts, expected);
        assert_eq!(super::clauses(" \n").unwrap(), []);
    }

    #[test]
    fn or_binds_less_than_and_and_not_most() {
        let [first] = &clauses("not a and b or c").unwrap()[..] else {
            panic!("`or` joins all of it");
        };
        let Node::Or(parts) = &first.node else {
            panic!("{first:?}");
        };
        assert!(matches!(&parts[0].node, Node::And(both) if matches!(both[0].node, Node::Not(_))));
        let [sum] = &clauses("1 + 2 * 3 = 7").unwrap()[..] else {
            panic!("one clause");
        };
        let Node::Compare(Sign::Equal, left, _) = &sum.node else {
            panic!("{sum:?}");
        };
        assert!(matches!(&left.node, Node::Sum(Sum::Plus, _, _)));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let deep = "(".repeat(100);
        for (text, part) in [
            (
                "score >=",
                "character 9: expected a column, a number or a tag, found the end",
            ),
            (
                "score >= 5 rating",
                "character 12: expected `and`, `or` or the end, found \"rating\"",
            ),
            ("rating in g", "character 11: expected `[`, found \"g\""),
            (
                "rating in [g s]",
                "expected `,` or `]` behind a value of a list",
            ),
            ("rating in []", "expected a column, a number or a tag"),
            ("(score > 5", "expected `)`, found the end"),
            ("score is 5", "expected `missing` behind `is`"),
            ("and", "expected a column, a number or a tag, found \"and\""),
            (deep.as_str(), "more than 64 brackets"),
        ] {
            let message = clauses(text).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,60}") {
            let _ = clauses(&text);
        }

        #[test]
        fn no_row_of_words_panics(words in proptest::collection::vec(
            prop_oneof![
                Just("("), Just(")"), Just("["), Just("]"), Just(","), Just("not"), Just("and"),
                Just("or"), Just("in"), Just("is"), Just("missing"), Just("score"), Just("é"),
                Just("tag:x_(y)"), Just("tag:"), Just("'a b'"), Just("-"), Just("*"), Just(">="),
                Just("5"), Just("1e9"), Just("\""),
            ],
            0..40,
        )) {
            let text = words.join(" ");
            if let Ok(clauses) = clauses(&text) {
                for clause in clauses {
                    prop_assert!(text.get(clause.span).is_some());
                }
            }
        }
    }
}
