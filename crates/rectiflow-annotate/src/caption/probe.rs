//! Whether a server sees pictures, before the first of the user's is paid for.
//!
//! A server of a text-only model may drop a picture silently and describe one that it made up.
//! Three requests with two generated pictures and one without a picture, at temperature 0 and with
//! one seed, tell. A server is refused
//!
//! 1. if it does not take the requests;
//! 2. if an answer says that there is no picture;
//! 3. if the answers about the two pictures are the same, whatever their case and spaces;
//! 4. if the first picture, sent again, has another answer, so that differences prove nothing, and
//!    the server counts as many tokens for the prompt with a picture as for the one without.
//!
//! A server whose answers are not repeatable and which counts no tokens cannot be told: it is used,
//! with a warning. `caption.probe = false` skips all this.

use rectiflow_data::{
    caption::Text,
    captioning::{CaptionMode, CaptionSettings},
    picture::Picture,
};

use crate::{
    caption::{
        answer::{Answer, beginning},
        client::Client,
        judge::sees_nothing,
        question::Asking,
        servers::Server,
    },
    error::{Error, Result},
    pictures::jpeg::encoded,
};

/// Sides of the generated pictures.
const SIDE_PX: u32 = 336;
/// What is asked about them.
const PROMPT: &str = "What does this picture show, and in which colours? Answer in one sentence.";

/// What the probe says about a server that is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probed {
    /// The server.
    pub server: String,
    /// Its answers about the two pictures.
    pub answers: [String; 2],
    /// Why it could not be told whether it sees, if so.
    pub doubt: Option<String>,
}

/// Probes all servers.
///
/// # Errors
/// [`Error::Blind`] for the first that does not see pictures, with what it said.
pub async fn probe(client: &Client, settings: &CaptionSettings) -> Result<Vec<Probed>> {
    let mode = CaptionMode {
        name: "probe".to_owned(),
        weight: 1.0,
        prompt: PROMPT.to_owned(),
        system: String::new(),
        temperature: 0.0,
        max_tokens: 60,
    };
    let asking = Asking::new(&mode, settings).map_err(|reason| Error::invalid("probe", reason))?;
    let mut probed = Vec::new();
    for server in &client.servers.list {
        probed.push(probe_one(client, server, &asking).await?);
    }
    Ok(probed)
}

async fn probe_one(client: &Client, server: &Server, asking: &Asking) -> Result<Probed> {
    let question = |picture: &Picture| {
        let jpeg = encoded(picture, 95).expect("a small picture has a JPEG");
        asking.about(Some(&jpeg), &Text::default())
    };
    let disc = question(&disc());
    let stripes = question(&stripes());
    let fault = |reason: String| Error::Server {
        server: server.name.clone(),
        reason: format!("it does not take pictures of the probe: {reason}"),
    };
    let first = client.send_to(server, &disc).await.map_err(fault)?;
    let second = client.send_to(server, &stripes).await.map_err(fault)?;
    let repeated = client.send_to(server, &disc).await.map_err(fault)?;
    // Some servers take no question without a picture.
    let without = client
        .send_to(server, &asking.about(None, &Text::default()))
        .await
        .ok();
    let probed = verdict(&first, &second, &repeated, without.as_ref());
    let blind = |reason| Error::Blind {
        server: server.name.clone(),
        model: server.model.clone(),
        reason,
    };
    Ok(Probed {
        server: server.name.clone(),
        doubt: probed.map_err(blind)?,
        answers: [first.text, second.text],
    })
}

/// What the four answers say: why it is in doubt whether the server sees, or that it does not.
fn verdict(
    first: &Answer,
    second: &Answer,
    repeated: &Answer,
    without: Option<&Answer>,
) -> std::result::Result<Option<String>, String> {
    for answer in [first, second] {
        if sees_nothing(&answer.text) {
            return Err(format!("it says \"{}\"", beginning(answer.text.as_bytes())));
        }
    }
    if plain(&first.text) == plain(&second.text) {
        return Err(format!(
            "a yellow disc on blue and red stripes on white have the same answer, \"{}\"",
            beginning(first.text.as_bytes())
        ));
    }
    if plain(&first.text) == plain(&repeated.text) {
        return Ok(None);
    }
    let without = without.and_then(|answer| answer.prompt_tokens);
    match (first.prompt_tokens, without) {
        (Some(with), Some(without)) if with <= without => Err(format!(
            "it counts {with} tokens for a prompt with a picture and {without} without, and \
             answers differently each time"
        )),
        (Some(_), Some(_)) => Ok(None),
        _ => Ok(Some(
            "it answers differently each time and counts no tokens, so that two answers prove \
             nothing: look at the first captions"
                .to_owned(),
        )),
    }
}

fn plain(text: &str) -> String {
    text.to_lowercase()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// A yellow disc on blue.
fn disc() -> Picture {
    draw(|x, y| {
        let (x, y) = (f64::from(x) - 168.0, f64::from(y) - 168.0);
        if x.hypot(y) < 110.0 {
            [250, 210, 30]
        } else {
            [20, 50, 160]
        }
    })
}

/// Red stripes on white.
fn stripes() -> Picture {
    draw(|x, _| {
        if (x / 28) % 2 == 0 {
            [200, 20, 30]
        } else {
            [250, 250, 250]
        }
    })
}

fn draw(colour: impl Fn(u32, u32) -> [u8; 3]) -> Picture {
    let mut pixels = Vec::new();
    for y in 0..SIDE_PX {
        for x in 0..SIDE_PX {
            pixels.extend(colour(x, y));
        }
    }
    Picture::new(SIDE_PX, SIDE_PX, pixels)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str, prompt_tokens: Option<u32>) -> Answer {
        Answer {
            text: text.to_owned(),
            prompt_tokens,
            ..Answer::default()
        }
    }

    #[test]
    fn what_is_refused_is_what_the_head_of_this_file_says() {
        let a = |tokens| answer("A disc.", tokens);
        let b = |tokens| answer("Stripes.", tokens);
        let c = |tokens| answer("Discs!", tokens);
        // It sees: the same picture has the same answer, another has another.
        assert_eq!(verdict(&a(None), &b(None), &a(None), None), Ok(None));
        let same = answer(" a  DISC. ", None);
        assert!(
            verdict(&a(None), &same, &a(None), None)
                .unwrap_err()
                .contains("the same answer")
        );
        let blind = answer("Please provide the image.", None);
        assert!(
            verdict(&a(None), &blind, &a(None), None)
                .unwrap_err()
                .contains("it says")
        );
        // Answers by chance: the tokens decide, and without them it stays in doubt.
        let by_chance = verdict(&a(Some(30)), &b(Some(30)), &c(Some(30)), Some(&a(Some(30))));
        assert!(by_chance.unwrap_err().contains("counts 30 tokens"));
        let sees = verdict(
            &a(Some(300)),
            &b(Some(300)),
            &c(Some(300)),
            Some(&a(Some(30))),
        );
        assert_eq!(sees, Ok(None));
        for without in [None, Some(a(None))] {
            let doubt = verdict(&a(None), &b(None), &c(None), without.as_ref()).unwrap();
            assert!(doubt.unwrap().contains("prove nothing"));
        }
    }
}
