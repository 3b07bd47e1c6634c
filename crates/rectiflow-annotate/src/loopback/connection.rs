//! A connection of the loopback server: HTTP/1.1 as clients of chat completions speak it.

use std::{io, time::Duration};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::sleep,
};

use crate::loopback::manner::{Asked, Misdeed, Shared};

/// Longest head of a request.
const MAX_HEAD_BYTES: usize = 1 << 16;
/// Tokens that the server counts for a picture.
const PICTURE_TOKENS: u64 = 256;

/// A request's head.
struct Head {
    is_chat: bool,
    key: Option<String>,
    num_body_bytes: usize,
}

/// What the next bytes of a connection are.
enum Sent {
    /// The whole answer.
    Answer,
    /// An answer with a fault, after which the connection may go on.
    Fault,
    /// Nothing more.
    Close,
}

/// Answers the requests of a connection until either side closes it.
pub(crate) async fn serve(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(1 << 17);
    loop {
        let Some((head, num_head_bytes)) = read_head(&mut stream, &mut buffer).await? else {
            return Ok(());
        };
        let end = num_head_bytes + head.num_body_bytes;
        while buffer.len() < end {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
        let wanted = shared.manner.key.as_ref();
        let has_key = wanted.is_none() || head.key.as_ref() == wanted;
        if !has_key {
            let body = json!({ "error": { "message": "Incorrect API key provided" } });
            write(&mut stream, 401, "", body.to_string().as_bytes()).await?;
        } else if !head.is_chat {
            let models = json!({ "object": "list", "data": [{ "id": shared.manner.model }] });
            write(&mut stream, 200, "", models.to_string().as_bytes()).await?;
        } else if shared.manner.looks && !names(&buffer[num_head_bytes..end], &shared.manner.model)
        {
            let body = json!({ "error": { "message": "The model does not exist." } });
            write(&mut stream, 404, "", body.to_string().as_bytes()).await?;
        } else {
            let asked = shared.ask(&buffer[num_head_bytes..end]);
            let sent = answer(&mut stream, shared, &asked).await;
            shared.end(&asked, matches!(sent, Ok(Sent::Answer)));
            if matches!(sent?, Sent::Close) {
                return Ok(());
            }
        }
        buffer.drain(..end);
    }
}

/// Whether a body asks for the model, which clients of this repository name first.
fn names(body: &[u8], model: &str) -> bool {
    body.starts_with(format!("{{\"model\":{},", json!(model)).as_bytes())
}

/// Reads a head into the buffer. Returns it with its length. None at the end of the connection.
async fn read_head(
    stream: &mut TcpStream,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<(Head, usize)>> {
    loop {
        let end = buffer
            .windows(4)
            .take(MAX_HEAD_BYTES)
            .position(|window| window == b"\r\n\r\n");
        if let Some(end) = end {
            return Ok(Some((head_of(&buffer[..end]), end + 4)));
        }
        if buffer.len() > MAX_HEAD_BYTES || stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

fn head_of(bytes: &[u8]) -> Head {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let mut head = Head {
        is_chat: first.starts_with("POST") && first.contains("/chat/completions"),
        key: None,
        num_body_bytes: 0,
    };
    for line in lines {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => head.num_body_bytes = value.trim().parse().unwrap_or_default(),
            "authorization" => {
                head.key = value.trim().strip_prefix("Bearer ").map(str::to_owned);
            }
            _ => {}
        }
    }
    head
}

/// Answers a chat request, or does something else.
async fn answer(stream: &mut TcpStream, shared: &Shared, asked: &Asked) -> io::Result<Sent> {
    let misdeed = (shared.manner.misdeeds)(asked);
    let mut delay = shared.manner.delay;
    if let Some(Misdeed::Slow(more)) = misdeed {
        delay += more;
    }
    if delay > Duration::ZERO {
        sleep(delay).await;
    }
    let mut model = shared.manner.model.as_str();
    let mut text = match asked.picture {
        Some(picture) => format!("A picture with the number {picture:016x}."),
        None => "No picture to speak of.".to_owned(),
    };
    let mut finish = "stop";
    match &misdeed {
        Some(Misdeed::Status(status, wait)) => {
            let head = match wait {
                0 => String::new(),
                wait => format!("retry-after: {wait}\r\n"),
            };
            let body = json!({ "error": { "message": "as the test wants" } }).to_string();
            write(stream, *status, &head, body.as_bytes()).await?;
            return Ok(Sent::Fault);
        }
        Some(Misdeed::Hangup) => return Ok(Sent::Close),
        Some(Misdeed::Stall) => {
            // The client leaves, which ends the reading.
            while stream.read_buf(&mut Vec::with_capacity(64)).await? > 0 {}
            return Ok(Sent::Close);
        }
        Some(Misdeed::NoJson) => {
            write(stream, 200, "", b"<html>all is well").await?;
            return Ok(Sent::Fault);
        }
        Some(Misdeed::OtherModel) => model = "another-model",
        Some(Misdeed::Says(other, reason)) => {
            text.clone_from(other);
            finish = reason;
        }
        Some(Misdeed::CutBody(_) | Misdeed::Slow(_)) | None => {}
    }
    // A server that does not look takes every request for one with a picture.
    let has_picture = asked.picture.is_some() || !shared.manner.looks;
    let picture_tokens = if has_picture { PICTURE_TOKENS } else { 0 };
    let reply = json!({
        "id": "loopback", "object": "chat.completion", "model": model,
        "choices": [{
            "index": 0, "finish_reason": finish,
            "message": { "role": "assistant", "content": text },
        }],
        "usage": { "prompt_tokens": 20 + picture_tokens, "completion_tokens": 7 },
    });
    let reply = reply.to_string();
    if let Some(Misdeed::CutBody(len)) = misdeed {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", reply.len());
        stream.write_all(head.as_bytes()).await?;
        stream
            .write_all(&reply.as_bytes()[..len.min(reply.len())])
            .await?;
        return Ok(Sent::Close);
    }
    write(stream, 200, "", reply.as_bytes()).await?;
    Ok(match misdeed {
        None | Some(Misdeed::Slow(_)) => Sent::Answer,
        Some(_) => Sent::Fault,
    })
}

async fn write(stream: &mut TcpStream, status: u16, head: &str, body: &[u8]) -> io::Result<()> {
    let mut answer = format!(
        "HTTP/1.1 {status} As It Is\r\ncontent-type: application/json\r\n{head}content-length: \
         {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    answer.extend_from_slice(body);
    stream.write_all(&answer).await
}
