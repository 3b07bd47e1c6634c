//! One request: sent, read up to a limit of bytes and of time, and what its failure means.

use std::time::{Duration, SystemTime};

use rectiflow_data::error::chain;
use reqwest::{Client, RequestBuilder, Response, StatusCode, header::RETRY_AFTER};

use crate::caption::{
    answer::{self, Answer},
    servers::Server,
};

/// Largest body of an answer.
const MAX_BODY_BYTES: usize = 4 << 20;

/// Why a request has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// It may work later. With `rests` the server is left alone for a while.
    Passing {
        reason: String,
        rests: bool,
        wait: Option<Duration>,
    },
    /// The server does not take this picture or this prompt.
    Picture { reason: String },
    /// No request can work until the user does something.
    Lasting { reason: String },
}

impl Trouble {
    fn passing(reason: impl Into<String>) -> Self {
        Self::Passing {
            reason: reason.into(),
            rests: false,
            wait: None,
        }
    }
}

/// Sends a chat request and reads the answer.
pub(crate) async fn send(
    client: &Client,
    server: &Server,
    key: Option<&str>,
    body: Vec<u8>,
    deadline: Duration,
) -> Result<Answer, Trouble> {
    let request = client
        .post(server.chat_url.as_str())
        .header("content-type", "application/json")
        .body(body);
    let exchanged = tokio::time::timeout(deadline, exchange(with_key(request, key), server)).await;
    exchanged.unwrap_or_else(|_| {
        let secs = deadline.as_secs_f64();
        Err(Trouble::passing(format!(
            "no answer in {secs} s (caption.answer_secs)"
        )))
    })
}

/// Sends a request without a limit of time.
async fn exchange(request: RequestBuilder, server: &Server) -> Result<Answer, Trouble> {
    let response = request.send().await.map_err(|error| unsent(&error))?;
    let status = response.status();
    let asked = retry_after(&response);
    let body = read(response).await.map_err(Trouble::passing)?;
    if !status.is_success() {
        return Err(refused(status, asked, &body, server));
    }
    answer::parse(&body).map_err(Trouble::passing)
}

fn with_key(request: RequestBuilder, key: Option<&str>) -> RequestBuilder {
    match key {
        Some(key) => request.bearer_auth(key),
        None => request,
    }
}

/// Reads a JSON document, such as the list of models.
pub(crate) async fn get(
    client: &Client,
    url: &str,
    key: Option<&str>,
    deadline: Duration,
) -> Result<(StatusCode, Vec<u8>), String> {
    let fetched = fetch(with_key(client.get(url), key));
    let ended = tokio::time::timeout(deadline, fetched).await;
    ended.unwrap_or_else(|_| Err(format!("no answer in {} s", deadline.as_secs_f64())))
}

async fn fetch(request: RequestBuilder) -> Result<(StatusCode, Vec<u8>), String> {
    let response = request.send().await.map_err(|error| chain(&error))?;
    let status = response.status();
    Ok((status, read(response).await?))
}

/// The body of an answer, up to [`MAX_BODY_BYTES`].
async fn read(mut response: Response) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    loop {
        match response.chunk().await {
            Ok(None) => return Ok(body),
            Ok(Some(chunk)) if body.len() + chunk.len() > MAX_BODY_BYTES => {
                return Err(format!("an answer of more than {MAX_BODY_BYTES} bytes"));
            }
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Err(error) => return Err(format!("the answer was cut: {}", chain(&error))),
        }
    }
}

/// The trouble of a request that got no answer.
fn unsent(error: &reqwest::Error) -> Trouble {
    if error.is_builder() {
        return Trouble::Lasting {
            reason: chain(error),
        };
    }
    Trouble::Passing {
        reason: chain(error),
        rests: error.is_connect(),
        wait: None,
    }
}

/// The trouble that a status other than success means.
fn refused(status: StatusCode, asked: Option<Duration>, body: &[u8], server: &Server) -> Trouble {
    let said = answer::complaint(body);
    let reason = format!("status {}: {said}", status.as_u16());
    match status.as_u16() {
        401 | 403 => Trouble::Lasting {
            reason: format!(
                "{reason}: the key is wrong or missing; caption.key_variable names the environment \
                 variable that holds it"
            ),
        },
        402 => Trouble::Lasting {
            reason: format!("{reason}: the account cannot pay"),
        },
        404 => Trouble::Lasting {
            reason: format!(
                "{reason}: the server has no model \"{}\" (caption.model), or its URL is another \
                 one (caption.servers): it is what stands before /chat/completions",
                server.model
            ),
        },
        429 | 503 => Trouble::Passing {
            reason,
            rests: true,
            wait: asked,
        },
        408 | 425 | 500..=599 => Trouble::Passing {
            reason,
            rests: false,
            wait: asked,
        },
        _ => Trouble::Picture { reason },
    }
}

/// What `Retry-After` asks for: seconds, or a date.
fn retry_after(response: &Response) -> Option<Duration> {
    let text = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    wait_of(text, SystemTime::now())
}

/// The wait that `text` asks for at the time `now`; none for a date that has passed.
fn wait_of(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if let Ok(secs) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(secs).ok();
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_seconds_or_dates() {
        // Sun, 06 Nov 1994 08:49:37 GMT
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        for (text, secs) in [
            ("0", Some(0.0)),
            (" 20 ", Some(20.0)),
            ("1.5", Some(1.5)),
            ("Sun, 06 Nov 1994 08:49:47 GMT", Some(10.0)),
            ("Sun, 06 Nov 1994 08:49:27 GMT", Some(0.0)),
            ("Thu, 01 Jan 1970 00:00:00 GMT", Some(0.0)),
            ("Sunday, 06-Nov-94 08:49:40 GMT", Some(3.0)),
            (
                "Fri, 01 Mar 2024 00:00:00 GMT",
                Some(1_709_251_200.0 - 784_111_777.0),
            ),
            ("-1", None),
            ("soon", None),
            ("Sun, 00 Nov 1994 08:49:37 GMT", None),
            ("Sun, 06 Nov 0001 08:49:37 GMT", None),
            ("", None),
        ] {
            let wait = wait_of(text, now).map(|wait| wait.as_secs_f64());
            assert_eq!(wait, secs, "{text}");
        }
    }

    #[test]
    fn statuses_mean_what_the_user_can_do() {
        let server = Server::new("http://a/v1", "m");
        let refused = |status: u16, asked| {
            let status = StatusCode::from_u16(status).unwrap();
            refused(status, asked, br#"{"error": {"message": "no"}}"#, &server)
        };
        let wait = Some(Duration::from_secs(3));
        for status in [429, 503] {
            let reason = format!("status {status}: no");
            assert_eq!(
                refused(status, wait),
                Trouble::Passing {
                    reason,
                    rests: true,
                    wait
                }
            );
        }
        for status in [408, 500, 502, 504, 529] {
            assert!(matches!(
                refused(status, None),
                Trouble::Passing { rests: false, .. }
            ));
        }
        for (status, part) in [(401, "key_variable"), (403, "key"), (404, "no model \"m\"")] {
            let Trouble::Lasting { reason } = refused(status, None) else {
                panic!("{status} lasts");
            };
            assert!(reason.contains(part), "{reason}");
        }
        for status in [400, 413, 422] {
            assert!(matches!(refused(status, None), Trouble::Picture { .. }));
        }
    }
}
