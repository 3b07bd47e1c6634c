//! The server of the page: GET alone, nothing of it from elsewhere, runs and previews by number.

use std::sync::{Arc, Mutex, PoisonError};

use axum::{
    Router,
    body::Body,
    extract::{Path, Query, Request, State},
    http::{HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::json;
use tokio::{net::TcpListener, task::spawn_blocking};

use crate::watch::{
    access::{Access, Verdict},
    page,
    reply::{Question, Reply, charts},
    runs::Runs,
};

/// What all requests share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) runs: Mutex<Runs>,
    pub(crate) access: Access,
}

/// The page may load its own files and nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Answers requests until the process ends.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>) -> std::io::Result<()> {
    axum::serve(listener, router(shared)).await
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/", get(|| file("text/html; charset=utf-8", page::HTML)))
        .route(
            "/page.css",
            get(|| file("text/css; charset=utf-8", page::CSS)),
        )
        .route("/charts.js", get(|| file(SCRIPT, page::CHARTS_JS)))
        .route("/page.js", get(|| file(SCRIPT, page::JS)))
        .route("/favicon.svg", get(|| file("image/svg+xml", page::ICON)))
        .route(
            "/api/charts",
            get(|| async { json_text(charts().to_string()) }),
        )
        .route("/api/runs", get(list))
        .route("/api/runs/{id}", get(run))
        .route("/api/runs/{id}/previews/{index}", get(preview))
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), guard))
        .with_state(shared)
}

/// Refuses requests of those who may not look, and adds the headers of every answer.
async fn guard(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let mut answer = match shared.access.check(request.uri(), request.headers()) {
        Verdict::Granted => next.run(request).await,
        Verdict::WithCookie(cookie) => with_cookie(&cookie),
        Verdict::Denied(reason) => (StatusCode::FORBIDDEN, reason).into_response(),
    };
    let headers = answer.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    let same_origin = HeaderValue::from_static("same-origin");
    headers.insert("cross-origin-resource-policy", same_origin);
    answer
}

/// Sends the browser to the address without the token, which then stays in no history.
fn with_cookie(cookie: &str) -> Response {
    let headers = [(header::SET_COOKIE, cookie), (header::LOCATION, "/")];
    (StatusCode::SEE_OTHER, headers).into_response()
}

async fn file(kind: &'static str, text: &'static str) -> Response {
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

async fn list(State(shared): State<Arc<Shared>>) -> Response {
    on_disk(move || {
        let mut runs = shared.runs.lock().unwrap_or_else(PoisonError::into_inner);
        json_text(json!({ "runs": runs.list() }).to_string())
    })
    .await
}

async fn run(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<usize>,
    Query(question): Query<Question>,
) -> Response {
    on_disk(move || {
        let mut runs = shared.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let run = match runs.read(id) {
            Ok(Some(run)) => run,
            Ok(None) => return no_such("run"),
            Err(error) => return failed(&error),
        };
        match run.about().and_then(|about| Reply::of(about, &question)) {
            Some(reply) => {
                let reply = serde_json::to_string(&reply).expect("plain data that JSON can hold");
                json_text(reply)
            }
            None => (
                StatusCode::BAD_REQUEST,
                "expected axis=step, samples or time",
            )
                .into_response(),
        }
    })
    .await
}

async fn preview(
    State(shared): State<Arc<Shared>>,
    Path((id, index)): Path<(usize, usize)>,
) -> Response {
    on_disk(move || {
        let found = {
            let runs = shared.runs.lock().unwrap_or_else(PoisonError::into_inner);
            let run = runs.get(id);
            let preview = run.and_then(|run| run.log()?.previews.get(index));
            run.zip(preview)
                .map(|(run, preview)| (run.source.clone(), preview.name.clone()))
        };
        let Some((source, name)) = found else {
            return no_such("preview");
        };
        match source.preview(&name) {
            Some(png) => ([(header::CONTENT_TYPE, "image/png")], Body::from(png)).into_response(),
            None => no_such("preview"),
        }
    })
    .await
}

/// Runs work that reads files where it delays no other request.
async fn on_disk(work: impl FnOnce() -> Response + Send + 'static) -> Response {
    match spawn_blocking(work).await {
        Ok(answer) => answer,
        Err(error) => failed(&error.into()),
    }
}

fn json_text(json: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], json).into_response()
}

fn no_such(what: &str) -> Response {
    (StatusCode::NOT_FOUND, format!("there is no such {what}")).into_response()
}

fn failed(error: &anyhow::Error) -> Response {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")).into_response()
}
