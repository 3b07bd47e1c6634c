//! The text of an image: parses and cleans the caption sources, and finds quality words in
//! captions.
//!
//! Sources; the first that has text wins, and the others are listed in `rejected.jsonl`:
//! 1. `name.json` beside the image: one object with the keys below;
//! 2. `name.txt` beside the image: the whole file is one caption;
//! 3. `metadata.jsonl` in the image's folder or one above it (the nearest first): one object per
//!    line, whose `file_name` names the image, relative to the folder of the `metadata.jsonl`.
//!
//! Keys: `caption` or `captions`, `alt_text`, `tags`, `important_tags`, `quality`; each a string or
//! a list of strings. A string of tags or quality words is split at commas. Other keys are ignored,
//! since other programs read these files too.
//!
//! HTML entities are unescaped twice, as in CLIP's own text cleaning: captions from the web contain
//! `&amp;quot;`, and the fast tokenizer, unlike the slow one with ftfy, would tokenise its letters.
//! Texts are also trimmed, and otherwise kept as they are.

use serde::Deserialize;
use xxhash_rust::xxh3::Xxh3;

/// Largest size of a caption source in bytes: a longer file is something else.
pub(crate) const MAX_SOURCE_BYTES: u64 = 1 << 20;

/// The text of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Text {
    /// Captions and alt-texts.
    pub captions: Vec<String>,
    /// Tags.
    pub tags: Vec<String>,
    /// Tags that must be kept.
    pub important_tags: Vec<String>,
    /// Quality words.
    pub quality: Vec<String>,
    /// A caption is an alt-text or contains quality words: none must be added.
    pub verbatim: bool,
}

/// The keys of a JSON source, except `file_name`, which the reader of `metadata.jsonl` parses.
#[derive(Deserialize)]
struct Keys {
    caption: Option<Texts>,
    captions: Option<Texts>,
    alt_text: Option<Texts>,
    tags: Option<Texts>,
    important_tags: Option<Texts>,
    quality: Option<Texts>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a string or a list of strings")]
enum Texts {
    One(String),
    Many(Vec<String>),
}

impl Text {
    /// Whether there is no caption and no tag.
    pub fn is_empty(&self) -> bool {
        self.captions.is_empty() && self.tags.is_empty() && self.important_tags.is_empty()
    }

    /// Parses a `name.txt`: one caption, which is verbatim if it contains one of `quality_words`.
    ///
    /// # Errors
    /// A message if it is not UTF-8.
    pub fn from_txt(bytes: &[u8], quality_words: &[String]) -> Result<Self, String> {
        let text = utf8(bytes)?;
        let mut all = Self {
            captions: clean([text.to_owned()]),
            ..Self::default()
        };
        all.mark(quality_words, false);
        Ok(all)
    }

    /// Parses a `name.json` or a line of `metadata.jsonl`.
    ///
    /// # Errors
    /// A message if it is not a JSON object, or if a key has a value of another type.
    pub fn from_json(bytes: &[u8], quality_words: &[String]) -> Result<Self, String> {
        let keys: Keys = serde_json::from_str(utf8(bytes)?).map_err(|error| error.to_string())?;
        let mut captions = whole(keys.caption);
        captions.extend(whole(keys.captions));
        let alt_texts = whole(keys.alt_text);
        let has_alt_text = !alt_texts.is_empty();
        captions.extend(alt_texts);
        let mut all = Self {
            captions,
            tags: cut_at_commas(keys.tags),
            important_tags: cut_at_commas(keys.important_tags),
            quality: cut_at_commas(keys.quality),
            verbatim: false,
        };
        all.mark(quality_words, has_alt_text);
        Ok(all)
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
        hasher.digest()
    }

    fn mark(&mut self, quality_words: &[String], has_alt_text: bool) {
        self.verbatim = has_alt_text;
        for word in quality_words.iter().chain(&self.quality) {
            self.verbatim |= self
                .captions
                .iter()
                .any(|caption| holds_word(caption, word));
        }
    }
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

fn whole(texts: Option<Texts>) -> Vec<String> {
    match texts {
        None => Vec::new(),
        Some(Texts::One(text)) => clean([text]),
        Some(Texts::Many(texts)) => clean(texts),
    }
}

fn cut_at_commas(texts: Option<Texts>) -> Vec<String> {
    match texts {
        Some(Texts::One(text)) => clean(text.split(',').map(str::to_owned)),
        other => whole(other),
    }
}

fn hash_text(hasher: &mut Xxh3, text: &str) {
    hasher.update(&(text.len() as u64).to_le_bytes());
    hasher.update(text.as_bytes());
}

fn utf8(bytes: &[u8]) -> Result<&str, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| format!("not UTF-8: {error}"))?;
    // Windows editors write a byte order mark.
    Ok(text.strip_prefix('\u{feff}').unwrap_or(text))
}

/// Unescapes and trims texts, and drops empty ones. NULs are removed, since other readers of the
/// text files could fail on them.
fn clean(texts: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut cleaned = Vec::new();
    for text in texts {
        let once = htmlize::unescape(text.as_str());
        let text = htmlize::unescape(once.as_ref()).replace('\0', "");
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

    fn words() -> Vec<String> {
        vec!["best quality".to_owned(), "masterpiece".to_owned()]
    }

    fn json(text: &str) -> Text {
        Text::from_json(text.as_bytes(), &words()).unwrap()
    }

    #[test]
    fn txt_is_one_caption() {
        let text = Text::from_txt("\u{feff}A cat\non a mat.\n".as_bytes(), &words()).unwrap();
        assert_eq!(
            (text.captions, text.verbatim),
            (vec!["A cat\non a mat.".to_owned()], false)
        );
        assert!(Text::from_txt(b" \n\t", &words()).unwrap().is_empty());
        assert!(
            Text::from_txt(b"caf\xe9", &words())
                .unwrap_err()
                .contains("not UTF-8")
        );
    }

    #[test]
    fn json_takes_strings_and_lists() {
        let text = json(
            r#"{"file_name": "x.png", "caption": "one", "captions": ["two", " ", "three"],
                "tags": "a, b,,c d", "important_tags": ["x, y"], "quality": "high quality",
                "score": 7, "rating": null}"#,
        );
        assert_eq!(text.captions, ["one", "two", "three"]);
        assert_eq!(text.tags, ["a", "b", "c d"]);
        assert_eq!(text.important_tags, ["x, y"]);
        assert_eq!(text.quality, ["high quality"]);
        assert!(!text.verbatim);
        assert!(json("{}").is_empty() && json(r#"{"caption": null}"#).is_empty());
    }

    #[test]
    fn values_of_another_kind_are_refused() {
        let cases = [
            r#"{"caption": 5}"#,
            r#"{"tags": [1]}"#,
            r#"{"captions": {"a": "b"}}"#,
            "[]",
            "",
            "{",
            "nul",
            "\u{1}",
        ];
        for bad in cases {
            assert!(Text::from_json(bad.as_bytes(), &words()).is_err(), "{bad}");
        }
        let deep = "[".repeat(100_000);
        assert!(Text::from_json(deep.as_bytes(), &words()).is_err());
    }

    #[test]
    fn entities_are_unescaped_also_when_escaped_twice() {
        let text = json(
            r#"{"caption": "Tom &amp; Jerry &#39;s &amp;quot;caf&eacute;&amp;quot; 1 &lt; 2"}"#,
        );
        assert_eq!(text.captions, ["Tom & Jerry 's \"café\" 1 < 2"]);
    }

    #[test]
    fn captions_that_speak_of_quality_and_alt_texts_are_verbatim() {
        for verbatim in [
            r#"{"caption": "A Masterpiece, oil on canvas"}"#,
            r#"{"captions": ["a cat", "best quality photo"]}"#,
            r#"{"caption": "worst quality scan", "quality": "worst quality"}"#,
            r#"{"alt_text": "cat.jpg"}"#,
        ] {
            assert!(json(verbatim).verbatim, "{verbatim}");
        }
        for plain in [
            r#"{"caption": "masterpieces of"}"#,
            r#"{"caption": "a cat", "quality": "best quality"}"#,
        ] {
            assert!(!json(plain).verbatim, "{plain}");
        }
        assert!(!holds_word("anything", "  "));
    }

    #[test]
    fn fingerprint_sees_every_field() {
        let base = json(r#"{"caption": "a", "tags": "b", "important_tags": "c", "quality": "d"}"#);
        let mut seen = vec![base.fingerprint("x"), base.fingerprint("y")];
        let edits: [fn(&mut Text); 5] = [
            |t| t.captions.push(String::new()),
            |t| t.tags[0].push('b'),
            |t| t.important_tags.clear(),
            |t| t.quality[0] = "e".to_owned(),
            |t| t.verbatim = true,
        ];
        for edit in edits {
            let mut text = base.clone();
            edit(&mut text);
            seen.push(text.fingerprint("x"));
        }
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 7);
    }
}
