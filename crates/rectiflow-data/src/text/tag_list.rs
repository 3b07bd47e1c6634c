//! Strings of tags: how they are split, and how they are told from sentences.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What separates the tags of a string.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TagSeparator {
    /// Commas.
    #[default]
    Comma,
    /// White space, as in Danbooru's own strings.
    Space,
}

/// Most words of a tag.
const MOST_WORDS: usize = 5;
/// Most words of two tags on average: sentences with commas have longer parts.
const WORDS_OF_TWO: usize = 5;
/// Words that begin or join parts of a sentence.
const SENTENCE_WORDS: [&str; 10] = [
    "a", "an", "the", "is", "are", "was", "and", "his", "her", "their",
];

/// The tags of a string: its parts between commas and line ends, or between white space.
pub(crate) fn split(text: &str, separator: TagSeparator) -> Vec<String> {
    let parts: Vec<&str> = match separator {
        TagSeparator::Space => text
            .split(|c: char| c == ',' || c.is_whitespace())
            .collect(),
        TagSeparator::Comma => text.split([',', '\n']).collect(),
    };
    let mut tags = Vec::new();
    for part in parts {
        if !part.trim().is_empty() {
            tags.push(part.to_owned());
        }
    }
    tags
}

/// Whether a text reads like a list of tags: several short parts without a full stop and without
/// the words that join a sentence.
pub(crate) fn reads_like_tags(text: &str, separator: TagSeparator) -> bool {
    let tags = split(text, separator);
    let mut num_words = 0;
    for tag in &tags {
        let words: Vec<&str> = tag.split_whitespace().collect();
        num_words += words.len();
        if words.len() > MOST_WORDS || tag.trim_end().ends_with(['.', '!', ';']) {
            return false;
        }
        let joins = |word: &&str| SENTENCE_WORDS.contains(&word.to_lowercase().as_str());
        if words.len() > 1 && words.iter().any(joins) {
            return false;
        }
    }
    let is_one_word_with_underscore = tags.len() == 1 && num_words == 1 && text.contains('_');
    tags.len() > 1 && 2 * num_words <= WORDS_OF_TWO * tags.len() || is_one_word_with_underscore
}

/// Whether a text that commas do not split looks like several tags between spaces.
pub(crate) fn looks_space_separated(text: &str) -> bool {
    !text.contains(',') && text.contains('_') && text.split_whitespace().count() > 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_split_at_commas_lines_or_spaces() {
        let comma = TagSeparator::Comma;
        assert_eq!(split("a, b c,,\nd", comma), ["a", " b c", "d"]);
        assert_eq!(split("a\nb_c\n", comma), ["a", "b_c"]);
        let space = TagSeparator::Space;
        assert_eq!(split("a  b_c\n d,e", space), ["a", "b_c", "d", "e"]);
    }

    #[test]
    fn lists_of_tags_are_told_from_sentences() {
        let comma = TagSeparator::Comma;
        for tags in [
            "1girl, solo, long hair, blue sky",
            "1girl\nsolo\nlong_hair",
            "masterpiece, looking at viewer, hand on own hip, smile",
            "long_hair",
        ] {
            assert!(reads_like_tags(tags, comma), "{tags}");
        }
        for sentence in [
            "A red fox, sitting in snow",
            "a fox, a hare, a bear",
            "Fox.",
            "fox",
            "A fox sits in the snow, and looks to the left.",
            "portrait of a woman, oil on canvas, by candle light",
            "Two dogs run along the beach at dusk, tails up",
            "",
        ] {
            assert!(!reads_like_tags(sentence, comma), "{sentence}");
        }
        assert!(reads_like_tags("1girl solo long_hair", TagSeparator::Space));
    }

    #[test]
    fn a_row_of_tags_without_commas_is_noticed() {
        assert!(looks_space_separated("1girl solo long_hair"));
        for text in [
            "long hair",
            "1girl, long_hair, solo",
            "long_hair solo",
            "a b c",
        ] {
            assert!(!looks_space_separated(text), "{text}");
        }
    }
}
