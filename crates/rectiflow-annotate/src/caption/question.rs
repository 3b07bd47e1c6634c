//! A picture and a mode to the body of a request.

use base64::{Engine, engine::general_purpose::STANDARD};
use rectiflow_data::{
    caption::Text,
    captioning::{CaptionMode, CaptionSettings},
    template::{Template, Values},
};
use serde_json::{Map, Value, json};

/// Stands for the picture while the rest of a body is written: a sign that no prompt has.
const PICTURE_MARK: &str = "\u{1}";
/// Most tags that a prompt names.
const MAX_TAGS: usize = 100;

/// A mode with its templates parsed.
#[derive(Debug)]
pub struct Asking {
    /// Its name.
    pub name: String,
    prompt: Template,
    system: Template,
    temperature: f64,
    max_tokens: u32,
    extra: Map<String, Value>,
}

impl Asking {
    /// The mode, with the keys that the settings add to each request.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(mode: &CaptionMode, settings: &CaptionSettings) -> Result<Self, String> {
        Ok(Self {
            name: mode.name.clone(),
            prompt: Template::parse(&mode.prompt)?,
            system: Template::parse(&mode.system)?,
            temperature: mode.temperature,
            max_tokens: mode.max_tokens,
            extra: settings.extra_keys()?,
        })
    }

    /// Whether its prompt has a field, for which the texts of a picture are read.
    pub fn needs_text(&self) -> bool {
        let has = |name| self.prompt.has(name) || self.system.has(name);
        has("tags") || has("caption") || has("quality")
    }

    /// The question about a picture with the text `text`, as a JPEG.
    pub fn about(&self, jpeg: Option<&[u8]>, text: &Text) -> Question {
        let mut tags: Vec<&str> = Vec::new();
        for tag in text.important_tags.iter().chain(&text.tags).take(MAX_TAGS) {
            tags.push(tag);
        }
        let tags = tags.join(", ");
        let caption = text.captions.first().map_or("", String::as_str);
        let quality = text.quality.join(", ");
        let values: Values<'_> = [&tags, caption, &quality];
        let mut messages = Vec::new();
        let system = self.system.fill(&values);
        if !system.trim().is_empty() {
            messages.push(json!({ "role": "system", "content": system }));
        }
        let prompt = self.prompt.fill(&values);
        let content = match jpeg {
            None => json!(prompt),
            Some(_) => json!([
                { "type": "image_url", "image_url": { "url": PICTURE_MARK } },
                { "type": "text", "text": prompt },
            ]),
        };
        messages.push(json!({ "role": "user", "content": content }));
        let mut rest = self.extra.clone();
        rest.insert("temperature".to_owned(), json!(self.temperature));
        rest.insert("max_tokens".to_owned(), json!(self.max_tokens));
        rest.insert("stream".to_owned(), json!(false));
        let rest = Value::Object(rest).to_string();
        Question {
            tail: tail(&rest, &Value::Array(messages).to_string(), jpeg),
        }
    }
}

/// Everything of a body but the model and the seed: `"key":...,"messages":[...]}`.
fn tail(rest: &str, messages: &str, jpeg: Option<&[u8]>) -> String {
    let len = rest.len() + messages.len() + jpeg.map_or(0, |jpeg| jpeg.len().div_ceil(3) * 4);
    let mut tail = String::with_capacity(len + 64);
    tail += &rest[1..rest.len() - 1];
    tail += ",\"messages\":";
    let mark = Value::from(PICTURE_MARK).to_string();
    match (messages.split_once(&mark), jpeg) {
        (Some((before, after)), Some(jpeg)) => {
            tail += before;
            tail += "\"data:image/jpeg;base64,";
            STANDARD.encode_string(jpeg, &mut tail);
            tail += "\"";
            tail += after;
        }
        _ => tail += messages,
    }
    tail.push('}');
    tail
}

/// A question that can be asked of any server, with any seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    tail: String,
}

impl Question {
    /// The body of a request.
    pub fn body(&self, model: &str, seed: u32) -> Vec<u8> {
        let model = Value::from(model);
        let head = format!("{{\"model\":{model},\"seed\":{seed},");
        let mut body = Vec::with_capacity(head.len() + self.tail.len());
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(self.tail.as_bytes());
        body
    }

    /// Bytes of a body, about.
    pub fn num_bytes(&self) -> usize {
        self.tail.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking(prompt: &str, system: &str, extra: &str) -> Asking {
        let mut settings = CaptionSettings {
            extra: extra.to_owned(),
            ..CaptionSettings::default()
        };
        settings.modes[0].prompt = prompt.to_owned();
        settings.modes[0].system = system.to_owned();
        Asking::new(&settings.modes[0], &settings).unwrap()
    }

    fn text() -> Text {
        Text {
            captions: vec!["old \"words\"".to_owned()],
            caption_sources: Vec::new(),
            tags: vec!["b".to_owned(), "c".to_owned()],
            important_tags: vec!["a".to_owned()],
            quality: vec!["best".to_owned()],
            verbatim: false,
        }
    }

    #[test]
    fn a_body_is_the_json_that_servers_expect() {
        let prompt = "Say {tags}; {caption}; {quality}. \"x\"";
        let asking = asking(prompt, "Be \"very\" brief.", r#"{"top_p": 0.5}"#);
        assert!(asking.needs_text());
        let question = asking.about(Some(b"\xff\xd8jpeg"), &text());
        let body: Value = serde_json::from_slice(&question.body("m\"1", 7)).unwrap();
        let prompt = "Say a, b, c; old \"words\"; best. \"x\"";
        let expected = json!({
            "model": "m\"1", "seed": 7, "temperature": 0.6, "max_tokens": 300, "stream": false,
            "top_p": 0.5,
            "messages": [
                { "role": "system", "content": "Be \"very\" brief." },
                { "role": "user", "content": [
                    { "type": "image_url",
                      "image_url": { "url": "data:image/jpeg;base64,/9hqcGVn" } },
                    { "type": "text", "text": prompt },
                ] },
            ],
        });
        assert_eq!(body, expected);
    }

    #[test]
    fn a_question_without_a_picture_is_text_alone() {
        let asking = asking("Describe.", "", "");
        assert!(!asking.needs_text());
        let body = asking.about(None, &Text::default()).body("m", 1);
        let body: Value = serde_json::from_slice(&body).unwrap();
        let messages = json!([{ "role": "user", "content": "Describe." }]);
        assert_eq!(body["messages"], messages);
    }
}
