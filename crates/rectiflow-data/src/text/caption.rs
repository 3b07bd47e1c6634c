//! The text of an image: captions, tags and quality words, cleaned, from one source or several.
//!
//! `keys` parses JSON, `tag_list` lists of tags; the folder `source` says which files are sources,
//! and in which order.
//!
//! HTML entities are unescaped twice, as in CLIP's own text cleaning: captions from the web contain
//! `&amp;quot;`, and the fast tokenizer, unlike the slow one with ftfy, would tokenise its letters.
//! `\(` and `\)` become parentheses: prompt syntax escapes them, and what reaches the text encoder
//! has no backslash. Texts are also trimmed, and otherwise kept as they are.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::text::{
    encoding::decoded,
    tag_list::{self, TagSeparator},
};

/// Largest size of a caption source in bytes: a longer file is something else.
pub(crate) const MAX_SOURCE_BYTES: u64 = 1 << 20;

/// What a text file beside an image holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TxtFiles {
    /// A caption. If another source has a caption, a text that reads like a list of tags is one.
    #[default]
    Auto,
    /// A caption.
    Caption,
    /// A list of tags.
    Tags,
}

/// How caption sources are read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reading {
    /// Words that mark a caption as verbatim.
    pub quality_words: Vec<String>,
    /// What a text file holds.
    pub txt_files: TxtFiles,
    /// Each line of a text or caption file is a caption.
    pub caption_lines: bool,
    /// What separates the tags of a string.
    pub tag_separator: TagSeparator,
    /// `\(` and `\)` stay as they are.
    pub keep_escapes: bool,
}

/// The text of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Text {
    /// Captions and alt-texts.
    pub captions: Vec<String>,
    /// Where each caption comes from; empty if all are the source's own.
    pub caption_sources: Vec<String>,
    /// Tags.
    pub tags: Vec<String>,
    /// Tags that must be kept.
    pub important_tags: Vec<String>,
    /// Quality words.
    pub quality: Vec<String>,
    /// A caption is an alt-text or contains quality words: none must be added.
    pub verbatim: bool,
}

impl Text {
    /// Whether there is no caption and no tag.
    pub fn is_empty(&self) -> bool {
        self.captions.is_empty() && !self.has_tags()
    }

    fn has_tags(&self) -> bool {
        !self.tags.is_empty() || !self.important_tags.is_empty()
    }

    /// Parses a file that is one caption, or with [`Reading::caption_lines`] a caption a line. It
    /// is verbatim if it contains a quality word.
    ///
    /// # Errors
    /// A message if it is neither UTF-8 nor, by its first bytes, UTF-16.
    pub fn from_txt(bytes: &[u8], reading: &Reading) -> Result<Self, String> {
        let text = decoded(bytes)?;
        let captions = if reading.caption_lines {
            clean(text.lines().map(str::to_owned), reading)
        } else {
            clean([text.into_owned()], reading)
        };
        let mut all = Self {
            captions,
            ..Self::default()
        };
        all.mark(reading, false);
        Ok(all)
    }

    /// Parses a file that is a list of tags.
    ///
    /// # Errors
    /// As [`Text::from_txt`].
    pub fn from_tags(bytes: &[u8], reading: &Reading) -> Result<Self, String> {
        let tags = tag_list::split(&decoded(bytes)?, reading.tag_separator);
        Ok(Self {
            tags: clean(tags, reading),
            ..Self::default()
        })
    }

    /// Adds what another source of the same image has: captions if there are none yet, and
    /// likewise tags. Returns whether nothing of it is lost: all of it was added or was here.
    pub(crate) fn absorb(&mut self, other: Self, reading: &Reading) -> bool {
        let takes_captions = self.captions.is_empty();
        let takes_tags = !self.has_tags();
        let is_lost = |text: &String| !contains(&self.captions, text);
        let loses_caption = !takes_captions && other.captions.iter().any(is_lost);
        let is_lost =
            |tag: &String| !contains(&self.tags, tag) && !contains(&self.important_tags, tag);
        let mut other_tags = other.tags.iter().chain(&other.important_tags);
        let loses_tag = !takes_tags && other_tags.any(is_lost);

        let is_used =
            takes_captions && !other.captions.is_empty() || takes_tags && other.has_tags();
        if is_used && self.quality.is_empty() {
            self.quality = other.quality;
        }
        if takes_captions {
            self.captions = other.captions;
            self.verbatim |= other.verbatim;
        }
        if takes_tags {
            self.tags = other.tags;
            self.important_tags = other.important_tags;
        }
        self.mark(reading, self.verbatim);
        !loses_caption && !loses_tag
    }

    /// A hash of all texts and of `source`, the path of the image.
    pub fn fingerprint(&self, source: &str) -> u64 {
        let mut hasher = Xxh3::new();
        hash_text(&mut hasher, source);
        for list in [
            &self.captions,
            &self.tags,
            &self.important_tags,
            &self.quality,
        ] {
            hash_text(&mut hasher, &list.len().to_string());
            for text in list {
                hash_text(&mut hasher, text);
            }
        }
        hash_text(&mut hasher, if self.verbatim { "verbatim" } else { "" });
        // Texts without sources keep the hash that earlier versions wrote.
        for source in &self.caption_sources {
            hash_text(&mut hasher, source);
        }
        hasher.digest()
    }

    /// Marks the text as verbatim if `is_verbatim`, or if a caption contains a quality word.
    pub(crate) fn mark(&mut self, reading: &Reading, is_verbatim: bool) {
        self.verbatim = is_verbatim;
        for word in reading.quality_words.iter().chain(&self.quality) {
            self.verbatim |= self
                .captions
                .iter()
                .any(|caption| holds_word(caption, word));
        }
    }
}

/// Whether `texts` has `text`, however their white space differs.
fn contains(texts: &[String], text: &str) -> bool {
    let has_words_of_text = |other: &String| other.split_whitespace().eq(text.split_whitespace());
    texts.iter().any(has_words_of_text)
}

/// Whether `text` contains `word`, which can be several words, in any case and with no letter or
/// digit before or after it.
fn holds_word(text: &str, word: &str) -> bool {
    let (text, word) = (text.to_lowercase(), word.trim().to_lowercase());
    if word.is_empty() {
        return false;
    }
    for (start, _) in text.match_indices(&word) {
        let before = text[..start].chars().next_back();
        let after = text[start + word.len()..].chars().next();
        if !before.is_some_and(char::is_alphanumeric) && !after.is_some_and(char::is_alphanumeric) {
            return true;
        }
    }
    false
}

fn hash_text(hasher: &mut Xxh3, text: &str) {
    hasher.update(&(text.len() as u64).to_le_bytes());
    hasher.update(text.as_bytes());
}

/// Unescapes and trims texts, and drops empty ones. NULs are removed, since other readers of the
/// text files could fail on them.
pub(crate) fn clean(texts: impl IntoIterator<Item = String>, reading: &Reading) -> Vec<String> {
    let mut cleaned = Vec::new();
    for text in texts {
        let once = htmlize::unescape(text.as_str());
        let mut text = htmlize::unescape(once.as_ref()).replace('\0', "");
        if !reading.keep_escapes && text.contains('\\') {
            text = text.replace("\\(", "(").replace("\\)", ")");
        }
        let text = text.trim();
        if !text.is_empty() {
            cleaned.push(text.to_owned());
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading() -> Reading {
        Reading {
            quality_words: vec!["best quality".to_owned(), "masterpiece".to_owned()],
            ..Reading::default()
        }
    }

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    fn text(captions: &[&str], tags: &[&str]) -> Text {
        Text {
            captions: strings(captions),
            tags: strings(tags),
            ..Text::default()
        }
    }

    #[test]
    fn txt_is_one_caption() {
        let text = Text::from_txt("\u{feff}A cat\non a mat.\n".as_bytes(), &reading()).unwrap();
        assert_eq!(
            (text.captions, text.verbatim),
            (vec!["A cat\non a mat.".to_owned()], false)
        );
        assert!(Text::from_txt(b" \n\t", &reading()).unwrap().is_empty());
        assert!(
            Text::from_txt(b"caf\xe9", &reading())
                .unwrap_err()
                .contains("not UTF-8")
        );
    }

    #[test]
    fn each_line_can_be_a_caption() {
        let reading = Reading {
            caption_lines: true,
            ..reading()
        };
        for (file, captions) in [
            ("one\ntwo", vec!["one", "two"]),
            ("one\r\n\r\n  two \r\n", vec!["one", "two"]),
            ("one", vec!["one"]),
            ("\n \n", vec![]),
        ] {
            let text = Text::from_txt(file.as_bytes(), &reading).unwrap();
            assert_eq!(text.captions, captions, "{file:?}");
        }
    }

    #[test]
    fn escaped_parentheses_lose_their_backslash() {
        for (written, read) in [
            (r"saber \(fate\)", "saber (fate)"),
            (r"saber_\(fate\), \(x\)", "saber_(fate), (x)"),
            (r"\\(", r"\("),
            ("saber (fate)", "saber (fate)"),
            (r"C:\a \[b\] \n", r"C:\a \[b\] \n"),
        ] {
            assert_eq!(clean([written.to_owned()], &reading()), [read]);
            let keep = Reading {
                keep_escapes: true,
                ..reading()
            };
            assert_eq!(clean([written.to_owned()], &keep), [written]);
        }
        let tags = Text::from_tags(br"1girl, saber_\(fate\)", &reading()).unwrap();
        assert_eq!(tags.tags, ["1girl", "saber_(fate)"]);
    }

    #[test]
    fn sources_complement_each_other() {
        for (first, second, all, nothing_is_lost) in [
            (
                text(&["a"], &[]),
                text(&[], &["x"]),
                text(&["a"], &["x"]),
                true,
            ),
            (
                text(&[], &["x"]),
                text(&["a"], &[]),
                text(&["a"], &["x"]),
                true,
            ),
            (
                text(&["a  b"], &[]),
                text(&["a b"], &[]),
                text(&["a  b"], &[]),
                true,
            ),
            (
                text(&["a"], &["x", "y"]),
                text(&["a"], &["y"]),
                text(&["a"], &["x", "y"]),
                true,
            ),
            (
                text(&["a"], &[]),
                text(&["b"], &[]),
                text(&["a"], &[]),
                false,
            ),
            (
                text(&["a"], &["x"]),
                text(&[], &["y"]),
                text(&["a"], &["x"]),
                false,
            ),
            (
                text(&["a"], &[]),
                text(&["b"], &["x"]),
                text(&["a"], &["x"]),
                false,
            ),
        ] {
            let mut merged = first.clone();
            assert_eq!(
                merged.absorb(second, &reading()),
                nothing_is_lost,
                "{all:?}"
            );
            assert_eq!(merged, all);
        }
        let mut quiet = text(&[], &["x"]);
        let loud = Text {
            quality: strings(&["scan"]),
            ..text(&["a scan"], &[])
        };
        assert!(quiet.absorb(loud, &reading()) && quiet.verbatim);
        assert_eq!(quiet.quality, ["scan"]);
    }

    #[test]
    fn words_are_held_whole() {
        assert!(!holds_word("anything", "  "));
        assert!(holds_word("A Masterpiece, oil", "masterpiece"));
        assert!(!holds_word("masterpieces of", "masterpiece"));
    }
}
