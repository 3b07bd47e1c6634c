//! The curves of a report: those of the live page with their data in the page itself.

use std::{fmt::Write, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};
use rectiflow_train::metrics::{Event, tail};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::watch::{
    page,
    reply::{About, Question, Reply, charts, for_script},
    run_log::RunLog,
    source::Source,
};

/// Points of a curve: a report is looked at more closely than a screen of the live page.
const BINS: usize = 1000;

/// The run as the live page shows it.
///
/// # Errors
/// The run has no `metrics.jsonl`.
pub(crate) fn read(run_dir: &Path) -> rectiflow_train::Result<RunLog> {
    Ok(log_of(tail::read(run_dir)?))
}

fn log_of(events: Vec<Event>) -> RunLog {
    let mut log = RunLog::default();
    for event in events {
        log.take(event);
    }
    log
}

/// The charts and the acts of the guard, as a section of the page with its data.
pub(crate) fn section(name: &str, run_dir: &Path, log: &RunLog) -> String {
    if log.moments.is_empty() {
        return String::new();
    }
    let source = Source::Folder(run_dir.to_owned());
    let about = About {
        name,
        source: &source,
        log,
        num_passed_over: 0,
    };
    let reply = Reply::of(about, &Question::whole(BINS));
    let mut data = charts();
    data["replies"] = json!([reply]);
    let mut section = "<section><h2>Curves</h2>\n<div id=\"live-charts\"></div></section>\n\
        <section id=\"acts\" hidden><h2>Acts of the guard</h2><p id=\"acts-counts\"></p>\
        <ol id=\"acts-list\"></ol></section>\n<div id=\"tip\" hidden></div>\n"
        .to_owned();
    let _ = writeln!(
        section,
        "<script type=\"application/json\" id=\"frozen\">{}</script>",
        for_script(&data)
    );
    let _ = writeln!(section, "<script>{}</script>", script());
    section
}

/// The rule for browsers: the page's own script and nothing else runs.
pub(crate) fn policy() -> String {
    let hash = STANDARD.encode(Sha256::digest(script()));
    format!(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hash}'; \
         base-uri 'none'; form-action 'none'"
    )
}

fn script() -> String {
    format!("{}\n{}", page::CHARTS_JS, page::JS)
}
