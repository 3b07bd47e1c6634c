//! A text posted to an address once, with a deadline: for alerts.

use std::time::Duration;

use crate::{
    error::chain,
    remote::{runtime, store::install_tls},
};

/// Posts JSON to an address, once.
///
/// # Errors
/// What went wrong, in words, without the address, which may be a secret.
pub fn post_json(address: &str, body: String, deadline: Duration) -> Result<(), String> {
    install_tls();
    runtime().block_on(send(address, body, deadline))
}

async fn send(address: &str, body: String, deadline: Duration) -> Result<(), String> {
    let client = reqwest::Client::builder().timeout(deadline).build();
    let client = client.map_err(words)?;
    let request = client
        .post(address)
        .header("content-type", "application/json")
        .body(body);
    let answer = request.send().await.map_err(words)?;
    let status = answer.status();
    if status.is_success() {
        return Ok(());
    }
    Err(format!("the server answers {status}"))
}

fn words(error: reqwest::Error) -> String {
    chain(&error.without_url())
}
