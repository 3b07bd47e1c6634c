//! A JSON object about an image to its text: the keys that trainers, taggers and downloaders write.
//!
//! | keys | value |
//! |---|---|
//! | `caption`, `captions`, `alt_text` | captions, all of them |
//! | if there is none: the first of `text`, `texts`, `prompt`, ... | captions |
//! | `tags`, `important_tags`, `quality` | lists of words |
//! | if there are no tags: `tag_string`, `tag_string_general`, `tags_general`, ... | tags |
//! | if there is neither: `description`, `alt` | captions |
//!
//! A value is a string or a list of strings. `tags` can also be an object with a list for each kind
//! of tag, as e621 writes them. A string of words is split at commas, or as
//! [`Reading::tag_separator`] says; `tag_string` and its kin, and `tags` beside them, are split at
//! white space.
//! Letters of keys may be of any case. Other keys are not read, since other programs read these
//! files too; those with text are named.

use serde_json::{Map, Value};

use crate::text::{
    caption::{Reading, Text, clean},
    encoding::decoded,
    tag_list::{self, TagSeparator},
};

/// Keys with the name or path of an image, most telling first.
pub(crate) const FILE_KEYS: [&str; 11] = [
    "file_name",
    "filename",
    "image_path",
    "img_path",
    "image_file",
    "file_path",
    "filepath",
    "file",
    "path",
    "image",
    "img",
];
/// Keys of captions that count if the usual ones have none; the first with text wins.
const OTHER_CAPTIONS: [&str; 8] = [
    "text",
    "texts",
    "prompt",
    "prompts",
    "long_caption",
    "caption_long",
    "caption_short",
    "short_caption",
];
/// Keys of captions that count if there are neither captions nor tags: beside tags they are what an
/// uploader says.
const LAST_CAPTIONS: [&str; 2] = ["description", "alt"];
/// Keys of tags that count if `tags` has none, all of them.
const OTHER_TAGS: [&str; 18] = [
    "tag_list",
    "keywords",
    "tag_string_artist",
    "tag_string_character",
    "tag_string_copyright",
    "tag_string_general",
    "tag_string_meta",
    "tags_artist",
    "tags_character",
    "tags_copyright",
    "tags_species",
    "tags_general",
    "tags_lore",
    "tags_meta",
    "tags_metadata",
    "tags_style",
    "tags_circle",
    "tags_contributor",
];
/// Keys with text that is about the file, not the picture.
const FILE_FACTS: [&str; 9] = [
    "url",
    "key",
    "status",
    "error_message",
    "exif",
    "sha256",
    "sha512",
    "md5",
    "hash",
];

/// What a JSON object says about an image.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Description {
    pub(crate) text: Text,
    /// Keys with text that is not read.
    pub(crate) unread: Vec<String>,
    /// A string of tags that commas do not split, though it looks like several.
    pub(crate) unsplit_tags: Option<String>,
    /// How its EXIF says that the picture lies, if not upright.
    pub(crate) orientation: Option<String>,
}

/// Parses the JSON about an image.
///
/// # Errors
/// A message if it is not an object, or if a key has a value of another type.
pub(crate) fn read(bytes: &[u8], reading: &Reading) -> Result<Description, String> {
    let value = serde_json::from_str(&decoded(bytes)?).map_err(|error| error.to_string())?;
    let Value::Object(object) = value else {
        let expected = "expected a JSON object with keys such as caption and tags";
        return Err(format!("{expected}, found {}", type_of(&value)));
    };
    Keys {
        object: &object,
        reading,
        read: Vec::new(),
    }
    .describe()
}

/// The name of the image that an object is about. None if no key has one.
pub(crate) fn file_name(object: &Map<String, Value>) -> Option<&str> {
    for name in FILE_KEYS {
        let values = object
            .iter()
            .filter(|(key, _)| key.eq_ignore_ascii_case(name));
        for (_, value) in values {
            if let Value::String(path) = value {
                return Some(path);
            }
        }
    }
    None
}

/// Whether a key has the name or path of an image.
pub(crate) fn is_file_key(key: &str) -> bool {
    FILE_KEYS.iter().any(|name| key.eq_ignore_ascii_case(name))
}

/// Whether a key has text of an image.
pub(crate) fn is_text_key(key: &str) -> bool {
    let usual = ["caption", "captions", "alt_text", "tags", "important_tags"];
    let mut names = usual.iter().chain(&OTHER_CAPTIONS).chain(&LAST_CAPTIONS);
    is_kind_of_tags(key) || names.any(|name| key.eq_ignore_ascii_case(name))
}

/// Whether a key has tags beside `tags`: all of them, or one kind.
fn is_kind_of_tags(key: &str) -> bool {
    let mut names = OTHER_TAGS.iter().chain(&["tag_string"]);
    names.any(|name| key.eq_ignore_ascii_case(name))
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// An object and which of its keys were read.
struct Keys<'a> {
    object: &'a Map<String, Value>,
    reading: &'a Reading,
    read: Vec<&'a str>,
}

impl<'a> Keys<'a> {
    fn describe(mut self) -> Result<Description, String> {
        let mut captions = self.texts("caption")?;
        captions.extend(self.texts("captions")?);
        let alt_texts = self.texts("alt_text")?;
        let has_alt_text = !alt_texts.is_empty();
        captions.extend(alt_texts);
        let mut text = Text {
            captions,
            caption_sources: Vec::new(),
            tags: self.words("tags")?,
            important_tags: self.words("important_tags")?,
            quality: self.words("quality")?,
            verbatim: false,
        };

        // Other tools' keys.
        if text.captions.is_empty() {
            text.captions = self.first_captions(&OTHER_CAPTIONS);
        }
        if text.tags.is_empty() {
            text.tags = self.other_tags();
        }
        if text.is_empty() {
            text.captions = self.first_captions(&LAST_CAPTIONS);
        }
        if !text.tags.is_empty() {
            // The kinds of tags that `tags` has all of.
            let kinds = self.object.keys().filter(|key| is_kind_of_tags(key));
            self.read.extend(kinds.map(String::as_str));
        }
        text.mark(self.reading, has_alt_text);
        Ok(Description {
            text,
            unread: self.unread(),
            unsplit_tags: self.unsplit_tags(),
            orientation: orientation(self.object),
        })
    }

    /// The value of a key in its own letters, else in letters of another case.
    fn value(&mut self, name: &str) -> Option<&'a Value> {
        let own = self.object.get_key_value(name);
        let (key, value) = own.or_else(|| {
            let mut entries = self.object.iter();
            entries.find(|(key, _)| key.eq_ignore_ascii_case(name))
        })?;
        self.read.push(key);
        Some(value)
    }

    /// Whole texts of a key.
    fn texts(&mut self, name: &str) -> Result<Vec<String>, String> {
        match self.value(name) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(clean([text.clone()], self.reading)),
            Some(value) => Ok(clean(strings(name, value)?, self.reading)),
        }
    }

    /// Words of a key: a string is split.
    fn words(&mut self, name: &str) -> Result<Vec<String>, String> {
        let separator = match name {
            "quality" => TagSeparator::Comma,
            _ => self.separator(),
        };
        match self.value(name) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(clean(tag_list::split(text, separator), self.reading)),
            Some(Value::Object(kinds)) if name == "tags" => {
                let mut words = Vec::new();
                for (kind, value) in kinds {
                    // e621's list of tags that are none.
                    if kind != "invalid" {
                        words.extend(strings(name, value)?);
                    }
                }
                Ok(clean(words, self.reading))
            }
            Some(value) => Ok(clean(strings(name, value)?, self.reading)),
        }
    }

    /// What separates tags in `tags`: spaces if other keys have kinds of tags, as image boards
    /// write them, and there is no comma.
    fn separator(&self) -> TagSeparator {
        let is_of_board = self.object.keys().any(|key| is_kind_of_tags(key));
        let has_comma = |value: &Value| value.as_str().is_some_and(|text| text.contains(','));
        if is_of_board && !self.object.get("tags").is_some_and(has_comma) {
            TagSeparator::Space
        } else {
            self.reading.tag_separator
        }
    }

    /// The captions of the first of `names` with text. A value of another type is no text.
    fn first_captions(&mut self, names: &[&str]) -> Vec<String> {
        for name in names {
            let num_read = self.read.len();
            if let Ok(captions) = self.texts(name)
                && !captions.is_empty()
            {
                return captions;
            }
            self.read.truncate(num_read);
        }
        Vec::new()
    }

    /// The tags of all other keys.
    fn other_tags(&mut self) -> Vec<String> {
        // Danbooru's `tag_string` is all of the strings that are named after it.
        let mut tags = self.space_separated("tag_string");
        if tags.is_empty() {
            for name in OTHER_TAGS {
                tags.extend(self.space_separated(name));
            }
        }
        tags
    }

    /// Tags of a key whose strings have spaces between tags, unless they have commas.
    fn space_separated(&mut self, name: &str) -> Vec<String> {
        let words = match self.value(name) {
            Some(Value::String(text)) if text.contains(',') => {
                tag_list::split(text, TagSeparator::Comma)
            }
            Some(Value::String(text)) => tag_list::split(text, TagSeparator::Space),
            Some(value) => strings(name, value).unwrap_or_default(),
            None => Vec::new(),
        };
        clean(words, self.reading)
    }

    /// Keys with text that were not read, without those about the file.
    fn unread(&self) -> Vec<String> {
        let mut unread = Vec::new();
        for (key, value) in self.object {
            let folded = key.to_ascii_lowercase();
            let is_known = is_file_key(key) || FILE_FACTS.contains(&folded.as_str());
            if !is_known && !self.read.contains(&key.as_str()) && has_letters(value) {
                unread.push(key.clone());
            }
        }
        unread
    }

    fn unsplit_tags(&self) -> Option<String> {
        match self.object.get("tags") {
            Some(Value::String(text))
                if self.separator() == TagSeparator::Comma
                    && tag_list::looks_space_separated(text) =>
            {
                Some(text.clone())
            }
            _ => None,
        }
    }
}

/// Whether a value is text with letters, or a list of such texts: numbers of a table are no text.
fn has_letters(value: &Value) -> bool {
    match value {
        Value::String(text) => text.chars().any(char::is_alphabetic),
        Value::Array(values) => !values.is_empty() && values.iter().all(has_letters),
        _ => false,
    }
}

/// The strings of a list of strings, or of a string.
fn strings(name: &str, value: &Value) -> Result<Vec<String>, String> {
    let expected =
        || format!("key {name:?}: expected a string or a list of strings, found {value}");
    match value {
        Value::String(text) => Ok(vec![text.clone()]),
        Value::Array(values) => {
            let mut texts = Vec::with_capacity(values.len());
            for value in values {
                texts.push(value.as_str().ok_or_else(expected)?.to_owned());
            }
            Ok(texts)
        }
        _ => Err(expected()),
    }
}

/// The orientation in an object's `exif`, as exifread words it, unless it is upright. img2dataset
/// writes `exif` as JSON inside of a string.
fn orientation(object: &Map<String, Value>) -> Option<String> {
    let exif = match object.get("exif")? {
        Value::String(text) => serde_json::from_str(text).ok()?,
        value => value.clone(),
    };
    let value = ["Image Orientation", "Orientation"]
        .iter()
        .find_map(|key| exif.get(key))?;
    let word = match value {
        Value::String(word) => word.trim().to_owned(),
        Value::Number(number) => number.to_string(),
        _ => return None,
    };
    let is_turned = word.contains("otated") || word.contains("irrored");
    let is_number = word.len() == 1 && ('2'..='8').contains(&word.chars().next()?);
    (is_turned || is_number).then_some(word)
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

    fn described(text: &str) -> Description {
        read(text.as_bytes(), &reading()).unwrap()
    }

    fn json(text: &str) -> Text {
        described(text).text
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
            assert!(read(bad.as_bytes(), &reading()).is_err(), "{bad}");
        }
        let deep = "[".repeat(100_000);
        assert!(read(deep.as_bytes(), &reading()).is_err());
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

    #[test]
    fn captions_have_the_keys_of_many_tools() {
        for object in [
            r#"{"text": "a red fox"}"#,
            r#"{"prompt": "a red fox", "width": 3}"#,
            r#"{"TEXT": ["a red fox"]}"#,
            r#"{"Caption": "a red fox", "text": "not this"}"#,
            r#"{"caption": "a red fox", "text": "not this"}"#,
            r#"{"caption": "", "text": "a red fox"}"#,
            r#"{"caption": null, "prompt": {"3": {"inputs": 1}}, "long_caption": "a red fox"}"#,
            r#"{"text": 5, "description": "a red fox"}"#,
        ] {
            assert_eq!(json(object).captions, ["a red fox"], "{object}");
        }
        // What an uploader says of a tagged picture is no caption.
        let tagged = described(r#"{"tags": ["fox"], "description": "my new pen"}"#);
        assert!(tagged.text.captions.is_empty() && tagged.unread == ["description"]);
    }

    #[test]
    fn tags_have_the_keys_of_many_tools() {
        for object in [
            r#"{"tag_string": "1girl long_hair", "tag_string_general": "1girl"}"#,
            r#"{"tag_string_artist": "1girl", "tag_string_general": "long_hair"}"#,
            r#"{"tags_general": ["1girl", "long_hair"]}"#,
            r#"{"tags_character": "1girl", "tags_general": "long_hair", "tags": []}"#,
            r#"{"tags": {"artist": ["1girl"], "general": ["long_hair"], "invalid": ["x"]}}"#,
            r#"{"Tags": "1girl, long_hair"}"#,
            r#"{"keywords": "1girl, long_hair"}"#,
            r#"{"tags": "1girl long_hair", "tags_general": "1girl", "rating": 3}"#,
            r#"{"tags": "1girl, long_hair", "tags_general": "1girl"}"#,
        ] {
            assert_eq!(json(object).tags, ["1girl", "long_hair"], "{object}");
        }
    }

    #[test]
    fn strings_of_tags_can_have_spaces_between_them() {
        let object = r#"{"tags": "1girl solo long_hair", "quality": "best quality"}"#;
        let found = described(object);
        assert_eq!(found.text.tags, ["1girl solo long_hair"]);
        assert_eq!(found.unsplit_tags.as_deref(), Some("1girl solo long_hair"));
        let spaces = Reading {
            tag_separator: TagSeparator::Space,
            ..reading()
        };
        let found = read(object.as_bytes(), &spaces).unwrap();
        assert_eq!(found.text.tags, ["1girl", "solo", "long_hair"]);
        assert_eq!(found.text.quality, ["best quality"]);
        assert_eq!(found.unsplit_tags, None);
    }

    #[test]
    fn keys_with_text_that_is_not_read_are_named() {
        for (object, unread) in [
            (
                r#"{"caption": "a", "title": "b", "n": 1, "e": "", "k": null}"#,
                vec!["title"],
            ),
            (r#"{"caption": "a", "": "0", "date": "2026-11-29"}"#, vec![]),
            (r#"{"caption": "a", "text": "b"}"#, vec!["text"]),
            (
                r#"{"text": "a", "labels": ["b"], "prompt": "c"}"#,
                vec!["labels", "prompt"],
            ),
            (r#"{"tag_string": "a", "tag_string_general": "a"}"#, vec![]),
            (
                r#"{"tags": ["a"], "tags_general": ["a"], "tag_string": "a"}"#,
                vec![],
            ),
            (
                r#"{"caption": "a", "url": "u", "key": "0", "status": "success", "exif": "{}",
                    "error_message": null, "sha256": "ff", "width": 1, "file_name": "x"}"#,
                vec![],
            ),
        ] {
            assert_eq!(described(object).unread, unread, "{object}");
        }
    }

    #[test]
    fn an_orientation_is_found_however_exif_is_written() {
        for (exif, word) in [
            (
                r#""{\"Image Orientation\": \"Rotated 90 CW\"}""#,
                Some("Rotated 90 CW"),
            ),
            (
                r#"{"Image Orientation": "Mirrored vertical"}"#,
                Some("Mirrored vertical"),
            ),
            (r#"{"Orientation": 6}"#, Some("6")),
            (
                r#""{\"Image Orientation\": \"Horizontal (normal)\"}""#,
                None,
            ),
            (r#"{"Orientation": 1}"#, None),
            (r#""{}""#, None),
            (r#""not json""#, None),
            ("null", None),
        ] {
            let object = format!(r#"{{"caption": "a", "exif": {exif}}}"#);
            assert_eq!(described(&object).orientation.as_deref(), word, "{exif}");
        }
    }

    #[test]
    fn the_image_has_a_name_under_many_keys() {
        for object in [
            r#"{"file_name": "a.png", "path": "b.png"}"#,
            r#"{"Image_Path": "a.png"}"#,
            r#"{"image": "a.png", "file": 3}"#,
        ] {
            let object = serde_json::from_str(object).unwrap();
            assert_eq!(file_name(&object), Some("a.png"));
        }
        assert_eq!(file_name(&Map::new()), None);
    }
}
