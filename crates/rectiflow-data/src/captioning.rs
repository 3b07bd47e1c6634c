//! The `[caption]` section of a recipe: its checks, and which mode a picture has. Pure.
//!
//! The client that asks the servers is in the crate `rectiflow-annotate`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    format::record::SampleId,
    rng::{Purpose, Rng, key_u64},
    text::template::Template,
};

/// The `[caption]` section of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CaptionSettings {
    /// Servers that answer OpenAI's chat requests, each by the URL before `/chat/completions`, such
    /// as `http://127.0.0.1:8000/v1`. Requests go to the one with the fewest under way. Default
    /// that one: vLLM's own.
    pub servers: Vec<String>,
    /// The model, as the servers call it. Default "": the only one that each server lists.
    pub model: String,
    /// Name of the environment variable with the key of the servers. Default "": no key is sent.
    pub key_variable: String,
    /// Seed of the modes' draw and of the seeds that are sent to the servers. Any number. Default
    /// 0.
    pub seed: u64,
    /// Longest side of the pictures that are sent, in pixels; larger ones are resized. JPEGs that
    /// are not larger and stand upright are sent as they are. Range 64 to 8192. Default 1024.
    pub max_side_px: u32,
    /// JPEG quality of the pictures that are sent. Range 1 to 100. Default 90.
    pub jpeg_quality: u8,
    /// Requests under way at once, over all servers. More pictures than twice as many are never in
    /// memory. Range 1 to 4096. Default 64.
    pub requests: u32,
    /// Most requests a second, over all servers. Range 0 to 1e6. Default 0: no limit.
    pub requests_per_sec: f64,
    /// Seconds after which a request is given up and sent again. Range 1 to 86400. Default 300.
    pub answer_secs: f64,
    /// Seconds for which a picture is sent again after failures: no connection, status 429 or 5xx,
    /// an answer that is cut or no JSON. After that it is set aside if other pictures were
    /// answered, and the run ends if none was. Range 0 to 604800. Default 600.
    pub retry_secs: f64,
    /// Price of a million tokens of prompts, pictures included, in your currency. Any number from
    /// 0. Default 0.
    pub price_per_million_prompt_tokens: f64,
    /// Price of a million tokens of answers. Any number from 0. Default 0.
    pub price_per_million_answer_tokens: f64,
    /// Price of an hour of all servers together. Any number from 0. Default 0.
    pub price_per_hour: f64,
    /// Keys that are added to each request, as a JSON object, such as `{"top_p": 0.9}`. Default
    /// "": none.
    pub extra: String,
    /// Beginnings of answers that decline, in lower case; added to the built-in ones. Default none.
    pub refusals: Vec<String>,
    /// Ask about two generated pictures before the first of yours, and refuse servers that do not
    /// see them. Default true.
    pub probe: bool,
    /// The modes, of which each picture gets one by chance: several kinds of captions train a model
    /// that understands several kinds of prompts. Default three: descriptive, short, phrases.
    pub modes: Vec<CaptionMode>,
}

/// A kind of caption.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CaptionMode {
    /// Its name, which stands beside each caption.
    pub name: String,
    /// How often it is drawn, relative to the others. Any number above 0.
    #[serde(default = "one")]
    pub weight: f64,
    /// What the model is asked. `{tags}`, `{caption}` and `{quality}` stand for texts that the
    /// picture has already; a part in brackets is left out where one of its fields is empty, as in
    /// `Describe this picture.[ It has the tags {tags}.]`. `{{` and `[[` are the signs themselves.
    pub prompt: String,
    /// What the model is told before, its system prompt. Default "": nothing.
    #[serde(default)]
    pub system: String,
    /// How random the answers are. Range 0 to 2. Default 0.6, JoyCaption's.
    #[serde(default = "usual_temperature")]
    pub temperature: f64,
    /// Most tokens of an answer; one that reaches them is cut and not used. Range 1 to 65536.
    /// Default 300.
    #[serde(default = "usual_tokens")]
    pub max_tokens: u32,
}

fn one() -> f64 {
    1.0
}

fn usual_temperature() -> f64 {
    0.6
}

fn usual_tokens() -> u32 {
    300
}

impl Default for CaptionSettings {
    fn default() -> Self {
        Self {
            servers: vec!["http://127.0.0.1:8000/v1".to_owned()],
            model: String::new(),
            key_variable: String::new(),
            seed: 0,
            max_side_px: 1024,
            jpeg_quality: 90,
            requests: 64,
            requests_per_sec: 0.0,
            answer_secs: 300.0,
            retry_secs: 600.0,
            price_per_million_prompt_tokens: 0.0,
            price_per_million_answer_tokens: 0.0,
            price_per_hour: 0.0,
            extra: String::new(),
            refusals: Vec::new(),
            probe: true,
            modes: usual_modes(),
        }
    }
}

fn usual_modes() -> Vec<CaptionMode> {
    let modes = [
        (
            "descriptive",
            5.0,
            "Write a detailed description of this picture in one paragraph: what is shown and \
             where, the setting, light, colours, medium and style. Begin with the subject, not \
             with words such as \"this picture\".[ It has the tags: {tags}.]",
        ),
        (
            "short",
            3.0,
            "Describe this picture in one sentence of at most 25 words. Begin with the \
             subject.[ It has the tags: {tags}.]",
        ),
        (
            "phrases",
            2.0,
            "Describe this picture as short phrases with commas between them, the most important \
             first, as a prompt for a program that draws.[ It has the tags: {tags}.]",
        ),
    ];
    modes.map(CaptionMode::usual).to_vec()
}

impl CaptionMode {
    fn usual((name, weight, prompt): (&str, f64, &str)) -> Self {
        Self {
            name: name.to_owned(),
            weight,
            prompt: prompt.to_owned(),
            system: String::new(),
            temperature: usual_temperature(),
            max_tokens: usual_tokens(),
        }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let key = format!("caption.modes \"{}\"", self.name);
        if self.name.trim().is_empty() || self.name.len() > 100 {
            problems.push(format!("{key}: its name must have 1 to 100 bytes"));
        }
        if !(self.weight.is_finite() && self.weight > 0.0) {
            problems.push(format!("{key}: weight {}: must be above 0", self.weight));
        }
        if !(0.0..=2.0).contains(&self.temperature) {
            let found = self.temperature;
            problems.push(format!("{key}: temperature {found}: must be 0 to 2"));
        }
        if !(1..=65_536).contains(&self.max_tokens) {
            let found = self.max_tokens;
            problems.push(format!("{key}: max_tokens {found}: must be 1 to 65536"));
        }
        if self.prompt.trim().is_empty() {
            problems.push(format!("{key}: it has no prompt"));
        }
        for (name, text) in [("prompt", &self.prompt), ("system", &self.system)] {
            if let Err(reason) = Template::parse(text) {
                problems.push(format!("{key}: {name}: {reason}"));
            }
        }
        problems
    }
}

impl CaptionSettings {
    /// Returns all problems of the settings, one message each, with keys as in a recipe.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = self.range_problems();
        if self.servers.is_empty() {
            problems.push("caption.servers: name at least one".to_owned());
        }
        for server in &self.servers {
            let is_http = server.starts_with("http://") || server.starts_with("https://");
            if !is_http || url::Url::parse(server).is_err() {
                problems.push(format!(
                    "caption.servers \"{server}\": must be a URL such as http://127.0.0.1:8000/v1"
                ));
            }
        }
        if let Err(reason) = self.extra_keys() {
            problems.push(format!("caption.extra: {reason}"));
        }
        if self.modes.is_empty() {
            problems.push("caption.modes: name at least one".to_owned());
        }
        for (number, mode) in self.modes.iter().enumerate() {
            problems.extend(mode.problems());
            if self.modes[..number]
                .iter()
                .any(|other| other.name == mode.name)
            {
                problems.push(format!("caption.modes: two are called \"{}\"", mode.name));
            }
        }
        problems
    }

    /// The numbers that are out of range.
    fn range_problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (key, value, range) in [
            ("max_side_px", f64::from(self.max_side_px), 64.0..=8192.0),
            ("jpeg_quality", f64::from(self.jpeg_quality), 1.0..=100.0),
            ("requests", f64::from(self.requests), 1.0..=4096.0),
            ("requests_per_sec", self.requests_per_sec, 0.0..=1e6),
            ("answer_secs", self.answer_secs, 1.0..=86_400.0),
            ("retry_secs", self.retry_secs, 0.0..=604_800.0),
        ] {
            if !range.contains(&value) {
                let (from, to) = range.into_inner();
                problems.push(format!("caption.{key} = {value}: must be {from} to {to}"));
            }
        }
        for (key, value) in [
            (
                "price_per_million_prompt_tokens",
                self.price_per_million_prompt_tokens,
            ),
            (
                "price_per_million_answer_tokens",
                self.price_per_million_answer_tokens,
            ),
            ("price_per_hour", self.price_per_hour),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                problems.push(format!("caption.{key} = {value}: must be at least 0"));
            }
        }
        problems
    }

    /// The keys that are added to each request.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn extra_keys(&self) -> Result<serde_json::Map<String, Value>, String> {
        const OWN: [&str; 6] = [
            "model",
            "messages",
            "seed",
            "temperature",
            "max_tokens",
            "stream",
        ];
        if self.extra.trim().is_empty() {
            return Ok(serde_json::Map::new());
        }
        let parsed = serde_json::from_str::<serde_json::Map<String, Value>>(&self.extra);
        let keys = parsed.map_err(|error| format!("must be a JSON object: {error}"))?;
        match OWN.into_iter().find(|key| keys.contains_key(*key)) {
            Some(key) => Err(format!("{key} has a key of its own in the recipe")),
            None => Ok(keys),
        }
    }

    /// The mode of a picture: the same in every run with this seed and these modes.
    ///
    /// # Panics
    /// If there is no mode.
    pub fn mode_of(&self, id: SampleId) -> &CaptionMode {
        let total: f64 = self.modes.iter().map(|mode| mode.weight).sum();
        let drawn = Rng::keyed(self.seed, Purpose::CaptionMode, &[id.0]).f64() * total;
        let mut sum = 0.0;
        for mode in &self.modes {
            sum += mode.weight;
            if drawn < sum {
                return mode;
            }
        }
        self.modes.last().expect("the settings have a mode")
    }

    /// The seed that is sent with an attempt at a picture: 31 bits, which every server takes.
    pub fn seed_of(&self, id: SampleId, attempt: u32) -> u32 {
        let words = [id.0, u64::from(attempt)];
        (key_u64(self.seed, Purpose::CaptionSeed, &words) >> 33) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_drawn_by_weight_seed_and_picture() {
        let settings = CaptionSettings::default();
        let mut counts = [0_u32; 3];
        for id in 0..10_000 {
            let mode = settings.mode_of(SampleId(id));
            let at = settings
                .modes
                .iter()
                .position(|other| other.name == mode.name);
            counts[at.unwrap()] += 1;
        }
        // Five standard deviations of a binomial with p = 0.5, 0.3 and 0.2.
        for (count, expected) in counts.into_iter().zip([5000, 3000, 2000]) {
            assert!(count.abs_diff(expected) < 250, "{counts:?}");
        }
        let other = CaptionSettings {
            seed: 1,
            ..settings.clone()
        };
        let differ = |id| settings.mode_of(SampleId(id)).name != other.mode_of(SampleId(id)).name;
        assert!((0..100).any(differ));
        assert_ne!(
            settings.seed_of(SampleId(1), 1),
            settings.seed_of(SampleId(1), 2)
        );
        assert!((0..100).all(|id| settings.seed_of(SampleId(id), 1) < 1 << 31));
    }

    /// Frozen: a change draws other modes for every picture.
    #[test]
    fn the_draw_is_frozen() {
        let settings = CaptionSettings::default();
        let names: Vec<&str> = (0..8)
            .map(|id| settings.mode_of(SampleId(id)).name.as_str())
            .collect();
        let frozen = [
            "short",
            "descriptive",
            "descriptive",
            "descriptive",
            "phrases",
            "descriptive",
            "short",
            "short",
        ];
        assert_eq!(names, frozen);
    }

    #[test]
    fn mistakes_are_named_by_key() {
        assert_eq!(CaptionSettings::default().problems(), [""; 0]);
        let mut settings = CaptionSettings {
            servers: vec!["localhost:8000".to_owned()],
            requests: 0,
            answer_secs: f64::NAN,
            price_per_hour: -1.0,
            extra: r#"{"seed": 1}"#.to_owned(),
            ..CaptionSettings::default()
        };
        settings.modes[0].prompt = "{tag}".to_owned();
        settings.modes[1].weight = 0.0;
        settings.modes[2].name = "short".to_owned();
        settings.modes[2].temperature = 3.0;
        let problems = settings.problems().join("\n");
        for part in [
            "caption.servers \"localhost:8000\": must be a URL",
            "caption.requests = 0: must be 1 to 4096",
            "caption.answer_secs = NaN",
            "caption.price_per_hour = -1",
            "caption.extra: seed has a key of its own",
            "\"descriptive\": prompt: unknown field {tag}",
            "\"short\": weight 0",
            "two are called \"short\"",
            "temperature 3",
        ] {
            assert!(problems.contains(part), "{part}: {problems}");
        }
        let none = CaptionSettings {
            servers: Vec::new(),
            modes: Vec::new(),
            ..settings
        };
        assert!(
            none.problems()
                .join("\n")
                .contains("caption.modes: name at least one")
        );
    }
}
