//! `[prep.tags]`: where each class of a post's tags, its rating and its score go, and how tags are
//! spelled.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::posts::fields::Class;

/// Where the words of a class go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// Tags, of which a prompt has some.
    Tags,
    /// Tags that every prompt of tags has.
    Important,
    /// Quality words, which precede tags.
    Quality,
    /// A caption: the words of all such classes, with commas between them.
    Caption,
    /// They are not read; a filter sees them all the same.
    Nothing,
}

/// The `[prep.tags]` table of a recipe: how rows of tables of image boards become text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TagSettings {
    /// Where character tags go: "tags", "important", "quality", "caption" or "nothing". Default
    /// "important".
    pub character: Place,
    /// Where copyright tags go, the names of series. Default "important".
    pub copyright: Place,
    /// Where artist tags go. Default "important".
    pub artist: Place,
    /// Where e621's species tags go. Default "tags".
    pub species: Place,
    /// Where general tags go, and the tags of tables that do not tell classes apart. Default
    /// "tags".
    pub general: Place,
    /// Where meta tags go. Default "nothing": most of them are about the file, such as
    /// `commentary_request`.
    pub meta: Place,
    /// Where e621's lore tags go. Default "nothing": they are about what a picture does not show.
    pub lore: Place,
    /// Where e621's contributor tags go. Default "nothing".
    pub contributor: Place,
    /// Where e621's invalid tags go. Default "nothing".
    pub invalid: Place,
    /// Where the word of the rating goes. Default "important".
    pub rating: Place,
    /// The word of rating g, general, and of rating s in tables in which no row is rated g: there
    /// it means safe, as on e621, and on Danbooru before 2022. Default "safe". The four defaults
    /// are those of Animagine XL and NoobAI-XL; Danbooru's own words are general, sensitive,
    /// questionable and explicit.
    pub rating_g: String,
    /// The word of rating s, sensitive. Default "sensitive".
    pub rating_s: String,
    /// The word of rating q, questionable. Default "nsfw".
    pub rating_q: String,
    /// The word of rating e, explicit. Default "explicit".
    pub rating_e: String,
    /// Where the word of the score goes. Default "quality".
    pub score: Place,
    /// The words of scores by rank: each with the percentage of rows, of all tables of a folder,
    /// that must have a lower score. Range 0 to 100; the highest that a score reaches counts.
    /// Default as for NoobAI-XL. An empty table: no words.
    pub score_words: BTreeMap<String, f64>,
    /// Keep the underscores of tags. Default false: they become spaces, except in emoticons such as
    /// `^_^`, and `data.prompt.underscores` brings them back in a share of the prompts.
    pub keep_underscores: bool,
    /// Tags that are not read, whatever their class. Spaces are underscores here. Default: words
    /// among the artists that name no artist.
    pub drop: Vec<String>,
}

impl Default for TagSettings {
    fn default() -> Self {
        let words = [
            ("masterpiece", 95.0),
            ("best quality", 85.0),
            ("good quality", 60.0),
            ("normal quality", 30.0),
            ("worst quality", 0.0),
        ];
        let mut score_words = BTreeMap::new();
        for (word, percent) in words {
            score_words.insert(word.to_owned(), percent);
        }
        let dropped = [
            "conditional_dnp",
            "avoid_posting",
            "banned_artist",
            "artist_request",
            "unknown_artist",
            "unknown_artist_signature",
            "sound_warning",
            "epilepsy_warning",
        ];
        Self {
            character: Place::Important,
            copyright: Place::Important,
            artist: Place::Important,
            species: Place::Tags,
            general: Place::Tags,
            meta: Place::Nothing,
            lore: Place::Nothing,
            contributor: Place::Nothing,
            invalid: Place::Nothing,
            rating: Place::Important,
            rating_g: "safe".to_owned(),
            rating_s: "sensitive".to_owned(),
            rating_q: "nsfw".to_owned(),
            rating_e: "explicit".to_owned(),
            score: Place::Quality,
            score_words,
            keep_underscores: false,
            drop: dropped.map(str::to_owned).to_vec(),
        }
    }
}

impl TagSettings {
    /// All problems, one message each, with keys as in a recipe.
    pub(crate) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (word, percent) in &self.score_words {
            if !(0.0..=100.0).contains(percent) {
                problems.push(format!(
                    "prep.tags.score_words: {word:?} = {percent}: must be 0 to 100"
                ));
            }
            if word.trim().is_empty() {
                problems.push(format!(
                    "prep.tags.score_words: the word from {percent}% on is empty: remove it, or \
                     write a word"
                ));
            }
        }
        problems
    }

    /// Where the tags of a class go.
    pub(crate) fn place(&self, class: Class) -> Place {
        match class {
            Class::Character => self.character,
            Class::Copyright => self.copyright,
            Class::Artist => self.artist,
            Class::Species => self.species,
            Class::General => self.general,
            Class::Meta => self.meta,
            Class::Lore => self.lore,
            Class::Contributor => self.contributor,
            Class::Invalid => self.invalid,
        }
    }

    /// The word of a rating's letter. With `s_is_safe` s is the lowest.
    pub(crate) fn rating_word(&self, letter: &str, s_is_safe: bool) -> &str {
        match letter {
            "s" if !s_is_safe => &self.rating_s,
            "g" | "s" => &self.rating_g,
            "q" => &self.rating_q,
            _ => &self.rating_e,
        }
    }

    /// Whether a tag is not read.
    pub(crate) fn drops(&self, tag: &str) -> bool {
        let is_same = |dropped: &String| {
            let same = |(a, b): (char, char)| a == b || (a == ' ' && b == '_');
            dropped.chars().count() == tag.chars().count()
                && dropped.chars().zip(tag.chars()).all(same)
        };
        self.drop.iter().any(is_same)
    }

    /// A tag as it is written in texts.
    pub(crate) fn spelled(&self, tag: &str, class: Class) -> String {
        match class {
            _ if self.keep_underscores => tag.to_owned(),
            Class::General => spaced(tag),
            _ => tag.replace('_', " "),
        }
    }
}

/// A general tag as it is written in texts: spaces for underscores, except in emoticons.
pub fn spaced(tag: &str) -> String {
    match is_emoticon(tag) {
        true => tag.to_owned(),
        false => tag.replace('_', " "),
    }
}

/// Longest side of an emoticon in letters.
const MOST_LETTERS: usize = 3;

/// Whether an underscore is the mouth of a face: on both sides of the only one there are up to
/// three signs, at most one of them a letter or digit. Names of artists can look like one.
fn is_emoticon(tag: &str) -> bool {
    let Some((left, right)) = tag.split_once('_') else {
        return false;
    };
    [left, right].iter().all(|side| {
        let num_letters = side.chars().count();
        let num_plain = side.chars().filter(|sign| sign.is_alphanumeric()).count();
        (1..=MOST_LETTERS).contains(&num_letters) && num_plain <= 1 && !side.contains('_')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn underscores_stay_in_faces_alone() {
        let settings = TagSettings::default();
        for face in [
            "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3",
            "6_9", ">_o", "@_@", "^_^", "o_o", "u_u", "x_x", "|_|", "||_||", ";_;",
        ] {
            assert_eq!(settings.spelled(face, Class::General), face);
        }
        for (tag, spelled) in [
            ("long_hair", "long hair"),
            ("hatsune_miku", "hatsune miku"),
            ("k-on!_(series)", "k-on! (series)"),
            ("1girl", "1girl"),
            ("a__b", "a  b"),
            ("_x", " x"),
        ] {
            assert_eq!(settings.spelled(tag, Class::General), spelled);
        }
        assert_eq!(settings.spelled("m_k", Class::Artist), "m k");
        let keep = TagSettings {
            keep_underscores: true,
            ..settings
        };
        assert_eq!(keep.spelled("long_hair", Class::General), "long_hair");
    }

    #[test]
    fn tags_that_name_no_artist_are_dropped() {
        let settings = TagSettings {
            drop: vec!["avoid posting".to_owned(), "x_y".to_owned()],
            ..TagSettings::default()
        };
        assert!(settings.drops("avoid_posting") && settings.drops("x_y"));
        assert!(!settings.drops("avoid_posting_") && !settings.drops("x"));
    }

    #[test]
    fn score_words_are_checked() {
        let mut settings = TagSettings::default();
        assert!(settings.problems().is_empty());
        settings.score_words.insert("top".to_owned(), 101.0);
        settings.score_words.insert(" ".to_owned(), 85.0);
        let problems = settings.problems().join("\n");
        assert!(problems.contains("\"top\" = 101: must be 0 to 100"));
        assert!(problems.contains("from 85% on is empty"));
    }
}
