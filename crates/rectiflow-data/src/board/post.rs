//! A row about a picture: its text, and its values for a filter.

use std::collections::HashSet;

use serde_json::Value as Json;

use crate::{
    board::{
        classes::{Place, TagSettings},
        scores::ScoreWords,
    },
    filter::columns::{Value, rating_letter, tag_key},
    posts::fields::{self, CAPTIONS, CLASSES, Class, Row},
    text::caption::{Reading, Text, clean},
};

/// A row about a picture.
#[derive(Debug, Clone)]
pub(crate) struct Post {
    pub(crate) row: Row,
    /// Its table and number, such as `posts.parquet:17`.
    pub(crate) address: String,
    /// The quality word of its score.
    pub(crate) score_word: Option<String>,
    /// No row of its tables is rated g.
    pub(crate) s_is_safe: bool,
}

/// What the tables of a folder say about all their rows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ranks {
    pub(crate) words: ScoreWords,
    pub(crate) s_is_safe: bool,
}

impl Post {
    /// The post of a row.
    pub(crate) fn new(row: Row, address: String, ranks: &Ranks) -> Self {
        let score_word = fields::score(&row).and_then(|score| ranks.words.of(score));
        Self {
            score_word: score_word.map(str::to_owned),
            s_is_safe: ranks.s_is_safe,
            row,
            address,
        }
    }

    /// Its text: each class where `settings` say.
    pub(crate) fn text(&self, settings: &TagSettings, reading: &Reading) -> Text {
        let mut text = Text::default();
        let mut caption = Vec::new();
        for class in CLASSES {
            let words = self.words(class, settings);
            put(words, settings.place(class), &mut text, &mut caption);
        }
        if let Some(letter) = fields::rating(&self.row) {
            let word = settings.rating_word(letter, self.s_is_safe).to_owned();
            put(vec![word], settings.rating, &mut text, &mut caption);
        }
        let score_word = self.score_word.iter().cloned().collect();
        put(score_word, settings.score, &mut text, &mut caption);

        text.captions = fields::texts(&self.row, &CAPTIONS);
        text.captions.push(caption.join(", "));
        let cleaned = |words: Vec<String>| clean(words, reading);
        let mut text = Text {
            captions: cleaned(text.captions),
            caption_sources: Vec::new(),
            tags: cleaned(text.tags),
            important_tags: cleaned(text.important_tags),
            quality: cleaned(text.quality),
            verbatim: false,
        };
        text.mark(reading, false);
        text
    }

    /// The tags of a class as they are written in texts.
    fn words(&self, class: Class, settings: &TagSettings) -> Vec<String> {
        let mut words = Vec::new();
        if settings.place(class) == Place::Nothing {
            return words;
        }
        for tag in class.tags(&self.row) {
            if !settings.drops(&tag) {
                words.push(settings.spelled(&tag, class));
            }
        }
        words
    }

    /// The value of a column for a filter.
    pub(crate) fn value(&self, column: &str) -> Option<Value> {
        Some(match fields::filter_value(&self.row, column)? {
            Json::Bool(flag) => Value::Flag(*flag),
            Json::Number(number) => Value::Number(number.as_f64()?),
            Json::String(text) if column == "rating" => {
                let letter = rating_letter(text).unwrap_or(text);
                Value::Text(letter.to_owned())
            }
            Json::String(text) => Value::Text(text.clone()),
            other => Value::Text(other.to_string()),
        })
    }

    /// All its tags, those that are in no text too, as [`tag_key`] spells them.
    pub(crate) fn tag_keys(&self) -> HashSet<String> {
        let mut keys = HashSet::new();
        for class in CLASSES {
            keys.extend(class.tags(&self.row).iter().map(|tag| tag_key(tag)));
        }
        keys
    }
}

/// Adds words to a part of a text, or to the words of its caption.
fn put(words: Vec<String>, place: Place, text: &mut Text, caption: &mut Vec<String>) {
    match place {
        Place::Tags => text.tags.extend(words),
        Place::Important => text.important_tags.extend(words),
        Place::Quality => text.quality.extend(words),
        Place::Caption => caption.extend(words),
        Place::Nothing => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::board::scores::Scores;

    fn post(row: Json) -> Post {
        let mut scores = Scores::default();
        for score in 0..10 {
            scores.add(f64::from(score));
        }
        let ranks = Ranks {
            words: scores.words(&TagSettings::default().score_words),
            s_is_safe: false,
        };
        Post::new(row.as_object().unwrap().clone(), "t:1".to_owned(), &ranks)
    }

    fn danbooru() -> Json {
        json!({
            "id": 1, "rating": "s", "score": 9, "is_deleted": false, "parent_id": null,
            "tag_string_general": "1girl long_hair ^_^ &lt;3",
            "tag_string_character": "saber_(fate)", "tag_string_copyright": "fate/stay_night",
            "tag_string_artist": "some_one banned_artist", "tag_string_meta": "highres",
        })
    }

    #[test]
    fn classes_go_where_a_fine_tuner_expects_them() {
        let text = post(danbooru()).text(&TagSettings::default(), &Reading::default());
        assert_eq!(text.tags, ["1girl", "long hair", "^_^", "<3"]);
        let important = ["saber (fate)", "fate/stay night", "some one", "sensitive"];
        assert_eq!(text.important_tags, important);
        assert_eq!(text.quality, ["best quality"]);
        assert!(text.captions.is_empty() && !text.verbatim);
    }

    #[test]
    fn every_class_can_go_elsewhere() {
        let settings = TagSettings {
            general: Place::Caption,
            rating: Place::Caption,
            character: Place::Tags,
            meta: Place::Quality,
            artist: Place::Nothing,
            score: Place::Nothing,
            ..TagSettings::default()
        };
        let mut row = danbooru();
        row["caption"] = json!("A knight.");
        let text = post(row).text(&settings, &Reading::default());
        assert_eq!(
            text.captions,
            ["A knight.", "1girl, long hair, ^_^, <3, sensitive"]
        );
        assert_eq!(text.tags, ["saber (fate)"]);
        assert_eq!(text.important_tags, ["fate/stay night"]);
        assert_eq!(text.quality, ["highres"]);
    }

    #[test]
    fn a_filter_sees_values_and_all_tags() {
        let post = post(danbooru());
        assert_eq!(post.value("rating"), Some(Value::Text("s".to_owned())));
        assert_eq!(post.value("is_deleted"), Some(Value::Flag(false)));
        assert_eq!(post.value("score"), Some(Value::Number(9.0)));
        assert_eq!((post.value("parent_id"), post.value("x")), (None, None));
        let tags = post.tag_keys();
        assert!(tags.contains("highres") && tags.contains("saber (fate)"));
        assert!(tags.contains("long hair"));
    }
}
