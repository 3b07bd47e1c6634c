//! A record and a stream of random numbers to the prompt of a pass.
//!
//! A prompt is one of the captions at random, or a string of shuffled tags: all important ones and
//! a random number of the others, most of the time with the picture's quality words in front. A few
//! prompts are dropped to the empty text or to the quality words alone, so that guidance has
//! something to guide away from. Preparation marks records verbatim whose captions are alt-texts or
//! contain quality words: no quality words are added to their prompts.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    format::record::Record,
    rng::Rng,
    text::token::Cut,
};

/// The source of captions that were in the prepared source itself.
pub const OWN_SOURCE: &str = "source";

/// `[data.prompt]`: how prompts are made from captions and tags. The defaults are the article's
/// rates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PromptSettings {
    /// Probability that a prompt is a caption if the picture has captions and tags, 0 to 1.
    pub captions: f64,
    /// Probability that quality words precede tags, 0 to 1.
    pub quality_before_tags: f64,
    /// Probability that quality words precede a caption, 0 to 1. The article's captions stand
    /// alone.
    pub quality_before_captions: f64,
    /// Probability that a prompt is dropped, 0 to 1.
    pub dropped: f64,
    /// Probability that a dropped prompt keeps the quality words (if there are any) instead of
    /// being empty, 0 to 1.
    pub dropped_to_quality: f64,
    /// Probability that underscores instead of spaces join the words of a tag, 0 to 1; one draw per
    /// prompt. Tags of up to three characters, such as `^_^`, are left alone.
    pub underscores: f64,
    /// Other names of a tag; the tag and its other names are equally likely. Underscores and spaces
    /// are equivalent here.
    pub aliases: BTreeMap<String, Vec<String>>,
    /// Where prompts of more than 75 tokens are cut: `plain` (every 75) or `comma`.
    pub cut: Cut,
}

impl Default for PromptSettings {
    fn default() -> Self {
        Self {
            captions: 0.8,
            quality_before_tags: 0.9,
            quality_before_captions: 0.0,
            dropped: 0.05,
            dropped_to_quality: 0.5,
            underscores: 0.5,
            aliases: BTreeMap::new(),
            cut: Cut::Plain,
        }
    }
}

impl PromptSettings {
    /// Checks that every rate is 0 to 1.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the key.
    pub fn check(&self) -> Result<()> {
        let rates = [
            ("captions", self.captions),
            ("quality_before_tags", self.quality_before_tags),
            ("quality_before_captions", self.quality_before_captions),
            ("dropped", self.dropped),
            ("dropped_to_quality", self.dropped_to_quality),
            ("underscores", self.underscores),
        ];
        for (key, rate) in rates {
            if !(0.0..=1.0).contains(&rate) {
                return Err(Error::Invalid {
                    what: format!("prompt.{key}"),
                    reason: format!("expected 0 to 1, found {rate}"),
                });
            }
        }
        Ok(())
    }
}

/// Draws the prompt of a record. Pure: it depends only on the record, the settings and the stream.
pub fn draw(record: &Record, settings: &PromptSettings, rng: &mut Rng) -> String {
    if chance(rng, settings.dropped) {
        return draw_dropped(record, settings, rng);
    }
    let has_tags = !record.tags.is_empty() || !record.important_tags.is_empty();
    if !record.captions.is_empty() && (chance(rng, settings.captions) || !has_tags) {
        return draw_caption(record, settings, rng);
    }
    let mut words: Vec<String> = Vec::new();
    if let Some(quality) = quality(record)
        && chance(rng, settings.quality_before_tags)
    {
        words.push(quality);
    }
    words.extend(draw_tags(record, settings, rng));
    words.join(", ")
}

fn draw_dropped(record: &Record, settings: &PromptSettings, rng: &mut Rng) -> String {
    if chance(rng, settings.dropped_to_quality) {
        quality(record).unwrap_or_default()
    } else {
        String::new()
    }
}

fn draw_caption(record: &Record, settings: &PromptSettings, rng: &mut Rng) -> String {
    let caption = pick(&record.captions, rng);
    match quality(record) {
        Some(quality) if chance(rng, settings.quality_before_captions) => {
            format!("{quality}, {caption}")
        }
        _ => caption.clone(),
    }
}

/// Whether a prompt is one that dropping produces: the empty text, or the quality words alone. Many
/// records share these.
pub fn is_dropped(record: &Record, prompt: &str) -> bool {
    prompt.is_empty() || quality(record).is_some_and(|quality| quality == prompt)
}

/// Where a prompt that was drawn from a record comes from: the source of its caption, "source" for
/// one that was prepared, "tags" or "dropped".
pub fn origin<'a>(record: &'a Record, prompt: &str) -> &'a str {
    if is_dropped(record, prompt) {
        return "dropped";
    }
    for (number, caption) in record.captions.iter().enumerate() {
        let before = prompt.strip_suffix(caption.as_str());
        // Quality words can precede a caption.
        if before.is_some_and(|before| before.is_empty() || before.ends_with(", ")) {
            let source = record.caption_sources.get(number);
            return source.map_or(OWN_SOURCE, String::as_str);
        }
    }
    "tags"
}

/// The quality words as one string. None if there are none or the record is verbatim.
fn quality(record: &Record) -> Option<String> {
    (!record.verbatim && !record.quality.is_empty()).then(|| record.quality.join(", "))
}

fn draw_tags(record: &Record, settings: &PromptSettings, rng: &mut Rng) -> Vec<String> {
    let mut tags: Vec<&String> = record.important_tags.iter().collect();
    let mut others: Vec<&String> = record.tags.iter().collect();
    others.retain(|tag| !record.important_tags.contains(tag));
    // A prompt of tags has at least one.
    let at_least = usize::from(tags.is_empty() && !others.is_empty());
    let num_others = at_least + rng.below((others.len() - at_least) as u64 + 1) as usize;
    rng.shuffle(&mut others);
    tags.extend(others.into_iter().take(num_others));
    rng.shuffle(&mut tags);
    let separator = if chance(rng, settings.underscores) {
        "_"
    } else {
        " "
    };
    let mut spelled = Vec::with_capacity(tags.len());
    for tag in tags {
        spelled.push(spell(alias(tag, settings, rng), separator));
    }
    spelled
}

/// The tag or one of its other names.
fn alias<'a>(tag: &'a str, settings: &'a PromptSettings, rng: &mut Rng) -> &'a str {
    let spellings = [tag.to_owned(), tag.replace('_', " "), tag.replace(' ', "_")];
    let Some(names) = spellings
        .iter()
        .find_map(|spelling| settings.aliases.get(spelling))
    else {
        return tag;
    };
    match rng.below(names.len() as u64 + 1) as usize {
        0 => tag,
        other => &names[other - 1],
    }
}

fn spell(tag: &str, separator: &str) -> String {
    if tag.chars().count() <= 3 {
        tag.to_owned()
    } else {
        tag.replace(['_', ' '], separator)
    }
}

fn pick<'a>(items: &'a [String], rng: &mut Rng) -> &'a String {
    &items[rng.below(items.len() as u64) as usize]
}

fn chance(rng: &mut Rng, rate: f64) -> bool {
    rng.f64() < rate
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{format::record::SampleId, rng::Purpose};

    const DRAWS: u64 = 100_000;

    fn strings(text: &[&str]) -> Vec<String> {
        text.iter().map(|&text| text.to_owned()).collect()
    }

    fn record() -> Record {
        Record {
            id: SampleId(1),
            caption_sources: Vec::new(),
            captions: strings(&["A caption.", "Another.", "A third."]),
            tags: strings(&["solo", "long_hair", "blue sky", "cat", "^_^"]),
            important_tags: strings(&["cat"]),
            quality: strings(&["masterpiece", "best quality"]),
            verbatim: false,
            original_width_px: 640,
            original_height_px: 480,
            crop_left_px: 0,
            crop_top_px: 0,
            target_width_px: 64,
            target_height_px: 48,
            source: "a.png".to_owned(),
        }
    }

    fn draws(record: &Record, settings: &PromptSettings) -> Vec<String> {
        (0..DRAWS)
            .map(|pass| {
                draw(
                    record,
                    settings,
                    &mut Rng::keyed(5, Purpose::Prompt, &[record.id.0, pass]),
                )
            })
            .collect()
    }

    /// Five standard deviations of a binomial.
    fn assert_rate(what: &str, count: usize, of: usize, rate: f64) {
        let slack = 5.0 * (rate * (1.0 - rate) / of as f64).sqrt();
        let found = count as f64 / of as f64;
        assert!(
            (found - rate).abs() <= slack,
            "{what}: expected {rate}, found {found}"
        );
    }

    fn count(prompts: &[String], test: impl Fn(&str) -> bool) -> usize {
        prompts.iter().filter(|prompt| test(prompt)).count()
    }

    #[test]
    fn prompts_have_an_origin() {
        let sourced = Record {
            caption_sources: strings(&["source", "short by m", "long by m"]),
            ..record()
        };
        let front = PromptSettings {
            quality_before_captions: 0.5,
            ..PromptSettings::default()
        };
        let mut origins = BTreeMap::<&str, u32>::new();
        for prompt in draws(&sourced, &front) {
            let origin = origin(&sourced, &prompt);
            *origins.entry(origin).or_default() += 1;
            let expected = match prompt.rsplit(", ").next().unwrap_or("") {
                "A caption." => "source",
                "Another." => "short by m",
                "A third." => "long by m",
                "" | "best quality" => "dropped",
                _ => "tags",
            };
            assert_eq!(origin, expected, "{prompt}");
        }
        assert_eq!(origins.len(), 5, "{origins:?}");
        assert_eq!(origin(&record(), "Another."), "source");
    }

    #[test]
    fn rates_are_the_articles() {
        let prompts = draws(&record(), &PromptSettings::default());
        let all = prompts.len();
        let (empty, quality) = (
            count(&prompts, str::is_empty),
            count(&prompts, |p| p == "masterpiece, best quality"),
        );
        assert_eq!(
            count(&prompts, |prompt| is_dropped(&record(), prompt)),
            empty + quality
        );
        assert_rate("dropped to nothing", empty, all, 0.025);
        assert_rate("dropped to quality words", quality, all, 0.025);
        // All captions are equally likely.
        let captions = count(&prompts, |p| p.ends_with('.'));
        assert_rate("captions", captions, all, 0.95 * 0.8);
        for caption in record().captions {
            assert_rate(
                "each caption",
                count(&prompts, |p| p == caption),
                captions,
                1.0 / 3.0,
            );
        }
        // The others are tags.
        let tags: Vec<String> = prompts
            .into_iter()
            .filter(|p| p.contains("cat") && !p.contains("caption"))
            .collect();
        assert_eq!(
            all - empty - quality - captions,
            tags.len(),
            "every string of tags keeps the important one"
        );
        assert_rate(
            "quality before tags",
            count(&tags, |p| p.starts_with("masterpiece, best quality, ")),
            tags.len(),
            0.9,
        );
    }

    #[test]
    fn tags_are_shuffled_and_a_random_number_is_kept() {
        let settings = PromptSettings {
            dropped: 0.0,
            captions: 0.0,
            quality_before_tags: 0.0,
            ..Default::default()
        };
        let prompts = draws(&record(), &settings);
        let lists: Vec<Vec<&str>> = prompts
            .iter()
            .map(|prompt| prompt.split(", ").collect())
            .collect();
        let all = lists.len();
        for num_tags in 1..=5 {
            assert_rate(
                "number of tags",
                lists.iter().filter(|tags| tags.len() == num_tags).count(),
                all,
                0.2,
            );
        }
        let full: Vec<_> = lists.iter().filter(|tags| tags.len() == 5).collect();
        for place in 0..5 {
            assert_rate(
                "place of a tag",
                full.iter().filter(|tags| tags[place] == "cat").count(),
                full.len(),
                0.2,
            );
        }
        let with = |tag| lists.iter().filter(|tags| tags.contains(&tag)).count();
        assert_eq!(with("cat"), all);
        // Each of the four others is kept half the time; underscores or spaces is one draw per
        // prompt.
        assert_rate("solo", with("solo"), all, 0.5);
        for tag in ["long_hair", "long hair", "blue_sky", "blue sky"] {
            assert_rate(tag, with(tag), all, 0.25);
        }
        assert_rate("a face keeps its underscore", with("^_^"), all, 0.5);
        assert_eq!(
            lists
                .iter()
                .filter(|tags| tags.contains(&"long_hair") && tags.contains(&"blue sky"))
                .count(),
            0
        );
    }

    #[test]
    fn verbatim_records_get_no_quality_words() {
        let verbatim = Record {
            verbatim: true,
            ..record()
        };
        let settings = PromptSettings {
            quality_before_captions: 1.0,
            dropped: 0.5,
            ..Default::default()
        };
        assert!(
            draws(&verbatim, &settings)
                .iter()
                .all(|prompt| !prompt.contains("masterpiece"))
        );
        let prompts = draws(
            &record(),
            &PromptSettings {
                dropped: 0.0,
                ..settings
            },
        );
        assert!(
            prompts
                .iter()
                .filter(|p| p.ends_with('.'))
                .all(|p| p.starts_with("masterpiece, best quality, "))
        );
    }

    #[test]
    fn what_is_missing_changes_what_can_be_drawn() {
        let settings = PromptSettings {
            dropped: 0.0,
            quality_before_tags: 0.0,
            ..Default::default()
        };
        let no_tags = Record {
            tags: Vec::new(),
            important_tags: Vec::new(),
            ..record()
        };
        assert_eq!(
            count(&draws(&no_tags, &settings), |p| p.ends_with('.')),
            DRAWS as usize
        );
        let no_captions = Record {
            captions: Vec::new(),
            ..record()
        };
        assert_eq!(
            count(&draws(&no_captions, &settings), |p| p.contains("cat")),
            DRAWS as usize
        );
        let plain_tags = Record {
            important_tags: Vec::new(),
            ..no_captions.clone()
        };
        assert_eq!(
            count(&draws(&plain_tags, &settings), str::is_empty),
            0,
            "a string of tags has at least one"
        );
        // Without captions, tags and quality words every prompt is empty.
        let nothing = Record {
            tags: Vec::new(),
            important_tags: Vec::new(),
            quality: Vec::new(),
            ..no_captions
        };
        assert_eq!(
            count(&draws(&nothing, &PromptSettings::default()), str::is_empty),
            DRAWS as usize
        );
    }

    #[test]
    fn aliases_are_as_likely_as_the_tag() {
        let aliases = BTreeMap::from([(
            "long hair".to_owned(),
            strings(&["longhair", "flowing_hair"]),
        )]);
        let settings = PromptSettings {
            dropped: 0.0,
            captions: 0.0,
            underscores: 0.0,
            aliases,
            ..Default::default()
        };
        let hairy = Record {
            tags: Vec::new(),
            important_tags: strings(&["long_hair"]),
            ..record()
        };
        let prompts = draws(&hairy, &settings);
        for name in ["long hair", "longhair", "flowing hair"] {
            assert_rate(
                name,
                count(&prompts, |p| p.ends_with(name)),
                prompts.len(),
                1.0 / 3.0,
            );
        }
    }

    #[test]
    fn rates_are_checked_by_name() {
        assert!(PromptSettings::default().check().is_ok());
        for rate in [-0.1, 1.1, f64::NAN] {
            let error = PromptSettings {
                dropped: rate,
                ..Default::default()
            }
            .check()
            .unwrap_err();
            assert!(error.to_string().starts_with("prompt.dropped: "), "{error}");
        }
        assert!(serde_json::from_str::<PromptSettings>("{\"drop\": 0.1}").is_err());
        let parsed: PromptSettings = serde_json::from_str("{\"cut\": \"comma\"}").unwrap();
        assert_eq!(
            parsed,
            PromptSettings {
                cut: Cut::Comma,
                ..Default::default()
            }
        );
    }
}
