//! Statistics of captions as a text.

use std::collections::BTreeMap;

use rectiflow_annotate::caption::statistics::ModeStatistics;

use crate::terminal::numbers::{grouped, short, table};

/// A table of what captions are like by mode, and how they begin.
pub(crate) fn describe_modes(modes: &BTreeMap<String, ModeStatistics>) -> String {
    let head = [
        "mode", "captions", "tokens", "median", "95%", "most", "1 chunk", "2", "3", "cut",
        "refused",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let percent = |share: f64| format!("{}%", short(100.0 * share, 3));
    for (mode, numbers) in modes {
        let mut row = vec![
            mode.clone(),
            grouped(numbers.num_captions),
            short(numbers.mean_tokens, 3),
            numbers.median_tokens.to_string(),
            numbers.p95_tokens.to_string(),
            numbers.max_tokens.to_string(),
        ];
        row.extend(numbers.chunk_shares.map(percent));
        row.push(percent(numbers.cut_share));
        row.push(percent(numbers.refused_share));
        rows.push(row);
    }
    let mut text = table(&rows);
    for (mode, numbers) in modes {
        let mut openings = Vec::new();
        for (opening, share) in &numbers.openings {
            openings.push(format!("\"{opening}\" {}", percent(*share)));
        }
        if !openings.is_empty() {
            text += &format!("\n{mode} begins: {}", openings.join(", "));
        }
    }
    text
}
