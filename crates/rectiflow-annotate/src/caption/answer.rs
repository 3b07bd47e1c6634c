//! The body of a server's answer, and what is wrong with one. Pure.

use serde::Deserialize;
use serde_json::Value;

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answer {
    /// Its text, trimmed.
    pub text: String,
    /// Why it ends.
    pub finish: String,
    /// The server's own word for a refusal.
    pub refusal: Option<String>,
    /// The model, as the server calls it.
    pub model: String,
    /// Tokens of the prompt, the picture included, if the server counts them.
    pub prompt_tokens: Option<u32>,
    /// Tokens of the answer, if the server counts them.
    pub answer_tokens: Option<u32>,
}

#[derive(Deserialize)]
struct Body {
    #[serde(default)]
    model: Option<String>,
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    message: Message,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    content: Value,
    #[serde(default)]
    refusal: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: Option<u32>,
    #[serde(default)]
    completion_tokens: Option<u32>,
}

/// Parses the body of a successful answer.
///
/// # Errors
/// What is wrong with it.
pub fn parse(body: &[u8]) -> Result<Answer, String> {
    let parsed: Body = serde_json::from_slice(body).map_err(|error| {
        format!(
            "the answer is no chat completion: {error}; it begins {}",
            beginning(body)
        )
    })?;
    let choice = parsed.choices.into_iter().next();
    let choice = choice.ok_or("the answer has no choices")?;
    let usage = parsed.usage.as_ref();
    Ok(Answer {
        text: text_of(&choice.message.content).trim().to_owned(),
        finish: choice.finish_reason.unwrap_or_default(),
        refusal: choice.message.refusal,
        model: parsed.model.unwrap_or_default(),
        prompt_tokens: usage.and_then(|usage| usage.prompt_tokens),
        answer_tokens: usage.and_then(|usage| usage.completion_tokens),
    })
}

/// The text of a message: a string, or parts of which some have text.
fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts = parts.iter().filter_map(|part| part.get("text")?.as_str());
            texts.collect::<Vec<_>>().join("")
        }
        _ => String::new(),
    }
}

/// What a server says in an error, as one line.
pub fn complaint(body: &[u8]) -> String {
    let parsed = serde_json::from_slice::<Value>(body).unwrap_or_default();
    // OpenAI's and vLLM's error.message, FastAPI's detail, others' message or error.
    let places = ["/error/message", "/detail", "/message", "/error"];
    let found = places.into_iter().filter_map(|place| parsed.pointer(place));
    let mut texts = found.filter_map(|value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Null => None,
        other => Some(other.to_string()),
    });
    match texts.next() {
        Some(text) => beginning(text.as_bytes()),
        None => beginning(body),
    }
}

/// The first words of a text, as one line.
pub fn beginning(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(1000)]);
    let words: Vec<&str> = text.split_whitespace().collect();
    let line: String = words.join(" ").chars().take(200).collect();
    match line.is_empty() {
        true => "with nothing".to_owned(),
        false => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_several_servers_are_read() {
        let answer = parse(
            br#"{"id": "x", "model": "m", "choices": [{"index": 0, "finish_reason": "stop",
            "message": {"role": "assistant", "content": " A cat. \n"}}],
            "usage": {"prompt_tokens": 600, "completion_tokens": 4, "total_tokens": 604}}"#,
        );
        let expected = Answer {
            text: "A cat.".to_owned(),
            finish: "stop".to_owned(),
            refusal: None,
            model: "m".to_owned(),
            prompt_tokens: Some(600),
            answer_tokens: Some(4),
        };
        assert_eq!(answer.unwrap(), expected);
        for (body, text) in [
            (r#"{"choices": [{"message": {"content": null}}]}"#, ""),
            (r#"{"choices": [{"message": {}}]}"#, ""),
            (
                r#"{"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {}]}}]}"#,
                "a",
            ),
        ] {
            assert_eq!(parse(body.as_bytes()).unwrap().text, text);
        }
    }

    #[test]
    fn other_bodies_are_refused_with_what_they_begin_with() {
        for (body, reason) in [
            ("<html>no", "it begins <html>no"),
            ("", "it begins with nothing"),
            ("{\"choices\": []}", "no choices"),
            ("{}", "missing field `choices`"),
            ("[1", "no chat completion"),
        ] {
            let found = parse(body.as_bytes()).unwrap_err();
            assert!(found.contains(reason), "{found}");
        }
    }

    #[test]
    fn complaints_are_one_line() {
        for (body, line) in [
            (
                r#"{"error": {"message": "no such\nmodel", "code": 404}}"#,
                "no such model",
            ),
            (r#"{"object": "error", "message": "too long"}"#, "too long"),
            (r#"{"detail": [{"loc": "x"}]}"#, r#"[{"loc":"x"}]"#),
            (r#"{"error": "wrong"}"#, "wrong"),
            ("502 Bad  Gateway", "502 Bad Gateway"),
        ] {
            assert_eq!(complaint(body.as_bytes()), line);
        }
    }
}
