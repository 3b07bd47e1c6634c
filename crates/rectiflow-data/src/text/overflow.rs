//! What of a text is beyond the last chunk: no text encoder reads it, so the user is told where the
//! text is cut.

use serde::Serialize;

use crate::text::token::{CHUNK_TOKENS, Cut, MAX_CHUNKS, Tokenizer, pieces, words};

/// Letters shown of the text before and after a cut.
const SHOWN_LETTERS: usize = 40;

/// A text that is longer than three chunks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Overflow {
    /// Tokens of the whole text.
    pub num_tokens: usize,
    /// Tokens that are not read, at the end of the text.
    pub num_cut: usize,
    /// Byte of the text at which the unread part begins.
    pub at_byte: usize,
}

impl Overflow {
    /// What is cut off `text` where `cut` says; None if all of it is read.
    pub fn of(text: &str, cut: Cut) -> Option<Self> {
        // A chunk that is cut at a comma keeps 56 tokens or more, and a token of ASCII takes a byte
        // or more.
        if text.is_ascii() && text.len() <= MAX_CHUNKS * (CHUNK_TOKENS - 19) {
            return None;
        }
        let tokenizer = Tokenizer::shared();
        let ids = tokenizer.ids(text);
        let num_kept: usize = pieces(&ids, cut).iter().map(|piece| piece.len()).sum();
        (num_kept < ids.len()).then(|| Self {
            num_tokens: ids.len(),
            num_cut: ids.len() - num_kept,
            at_byte: byte_of_token(tokenizer, text, num_kept),
        })
    }

    /// Numbers and place of the cut in words: "360 tokens, of which the last 135 are not read, from
    /// "..." on".
    pub fn describe(&self, text: &str) -> String {
        let (read, unread) = text.split_at(self.at_byte);
        let num_skipped = read.chars().count().saturating_sub(SHOWN_LETTERS);
        let end: String = read.chars().skip(num_skipped).collect();
        let start: String = unread.trim_start().chars().take(SHOWN_LETTERS).collect();
        format!(
            "{} tokens, of which the last {} are not read: it is cut after {:?}, before {:?}",
            self.num_tokens,
            self.num_cut,
            end.trim(),
            start.trim()
        )
    }
}

/// The byte of `text` at which the token of this number begins, or, inside a word, one that is at
/// most a letter before it.
fn byte_of_token(tokenizer: &Tokenizer, text: &str, token: usize) -> usize {
    let mut ids = Vec::new();
    for (at_byte, word) in words(text) {
        let num_before = ids.len();
        tokenizer.append(word, &mut ids);
        if ids.len() > token {
            return at_byte + longest_start(tokenizer, word, token - num_before);
        }
    }
    text.len()
}

/// Bytes of the longest start of `word` that takes at most `num_tokens` tokens.
fn longest_start(tokenizer: &Tokenizer, word: &str, num_tokens: usize) -> usize {
    let ends: Vec<usize> = word.char_indices().map(|(at, _)| at).collect();
    let fits = |&end: &usize| tokenizer.ids(&word[..end]).len() <= num_tokens;
    let num_fitting = ends.partition_point(fits);
    ends[num_fitting.saturating_sub(1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caption_of_360_tokens_is_cut_after_225() {
        let text = vec!["fox"; 360].join(" ");
        let cut = Overflow::of(&text, Cut::Plain).unwrap();
        assert_eq!(
            (cut.num_tokens, cut.num_cut, cut.at_byte),
            (360, 135, 4 * 225)
        );
        let said = cut.describe(&text);
        for part in [
            "360 tokens",
            "last 135",
            "after \"",
            "fox fox\", before \"fox",
        ] {
            assert!(said.contains(part), "{said}");
        }
    }

    #[test]
    fn the_cut_is_where_the_chunks_end() {
        let sentence = "The red fox, one of Ælfrīc's 12 animals, isn't here. ";
        let tags = "long hair, blue_sky, ^_^, ";
        let japanese = "赤い狐が雪の中にいます。";
        for text in [sentence.repeat(30), tags.repeat(60), japanese.repeat(40)] {
            for cut in [Cut::Plain, Cut::Comma] {
                let found = Overflow::of(&text, cut).unwrap();
                let num_kept = found.num_tokens - found.num_cut;
                let read = &text[..found.at_byte];
                let num_read = Tokenizer::shared().ids(read).len();
                assert!(
                    num_read <= num_kept && num_read + 4 > num_kept,
                    "{num_read} {num_kept}"
                );
                assert!(num_kept <= 225);
            }
        }
    }

    #[test]
    fn texts_that_are_read_whole_have_none() {
        for text in [
            String::new(),
            "fox ".repeat(225),
            "a".repeat(150),
            "  ".repeat(300),
        ] {
            assert_eq!(Overflow::of(&text, Cut::Plain), None);
        }
    }
}
