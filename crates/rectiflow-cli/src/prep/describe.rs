//! What `rectiflow prep` says at its end, in words.

use std::{collections::BTreeMap, path::Path};

use rectiflow_data::{
    count::{BoardCount, ClauseCount, Counted, TableCount},
    prep::{ListSummary, PartSummary, PrepSummary, WorkShare},
    reject::{NOTES_FILE, REJECTED_FILE, Reason, Remark},
};

use crate::prep::timeline;
use crate::terminal::numbers::{bytes, duration, grouped, table};

/// The data set and what was done, in words.
pub(super) fn describe(out: &Path, summary: &PrepSummary) -> String {
    let mut buckets = vec![["bucket", "train", "test"].map(str::to_owned).to_vec()];
    buckets.extend(summary.buckets.iter().map(|bucket| {
        vec![
            format!("{}x{}", bucket.width_px, bucket.height_px),
            grouped(bucket.train),
            grouped(bucket.test),
        ]
    }));
    let mut text = format!(
        "{}\n\n{}: {} training and {} test pictures in {} buckets, {}; {} in {}",
        table(&buckets),
        out.display(),
        grouped(summary.train_rows),
        grouped(summary.test_rows),
        summary.buckets.len(),
        bytes(summary.bytes),
        work_done(summary),
        duration(summary.secs)
    );
    let encoder = timeline::describe(&summary.encoder_secs);
    if !encoder.is_empty() {
        text += &format!("\n{encoder}");
    }
    for (title, counts, file) in [
        ("not in the data set", &summary.rejected, REJECTED_FILE),
        ("with a remark", &summary.notes, NOTES_FILE),
    ] {
        if !counts.is_empty() {
            text += &format!("\n{title} (named in {}):", out.join(file).display());
            for (&reason, &count) in counts {
                text += &format!("\n  {}", with_example(reason, count, &summary.examples));
            }
        }
    }
    if summary.reread_pictures > 0 {
        text += &format!(
            "\n{} pictures were read twice: prep.keep_gib is the memory for pictures that are kept \
             until they are encoded",
            grouped(summary.reread_pictures)
        );
    }
    text + &describe_filter(&summary.filter) + &describe_boards(summary.boards.as_ref())
}

/// What each clause of `prep.filter` removed, of which `rejected.jsonl` has the first pictures.
fn describe_filter(clauses: &[ClauseCount]) -> String {
    let mut text = String::new();
    for ClauseCount { clause, removed } in clauses {
        text += &format!(
            "\nremoved by the clause {clause}: {}",
            with_examples(removed)
        );
    }
    text
}

/// The rows of tables of image boards, and the pictures without one.
fn describe_boards(boards: Option<&BoardCount>) -> String {
    let Some(boards) = boards else {
        return String::new();
    };
    let mut text = String::new();
    for table in &boards.tables {
        text += &format!("\n{}", describe_table(table));
    }
    for (what, counted) in [
        ("pictures without a row", &boards.without_row),
        (
            "pictures with the id of one row and the hash of another",
            &boards.contradictory,
        ),
    ] {
        if counted.count > 0 {
            text += &format!("\n{what}: {}", with_examples(counted));
        }
    }
    text
}

fn describe_table(table: &TableCount) -> String {
    let mut text = format!(
        "{}: {} rows, {} with a picture",
        table.path,
        grouped(table.rows),
        grouped(table.with_picture)
    );
    for (what, counted) in [
        ("without a picture", &table.without_picture),
        ("with the key of another row", &table.repeated),
        ("that cannot be used", &table.unusable),
    ] {
        if counted.count > 0 {
            text += &format!("\n  {what}: {}", with_examples(counted));
        }
    }
    if table.s_is_safe {
        text += "\n  rating s is read as safe: no row is rated g";
    }
    text
}

/// A count with its first examples: "3, such as a.png, b.png".
fn with_examples(counted: &Counted) -> String {
    let mut text = grouped(counted.count);
    if !counted.examples.is_empty() {
        text += &format!(", such as {}", counted.examples.join(", "));
    }
    text
}

/// A reason with its count and an example: "3 no caption, such as a.png: it has no text".
fn with_example(reason: Reason, count: u64, examples: &BTreeMap<Reason, Remark>) -> String {
    let mut text = format!("{} {}", grouped(count), reason.as_str().replace('_', " "));
    if let Some(Remark { path, fault }) = examples.get(&reason) {
        let such_as = if count == 1 { "" } else { "such as " };
        text += &format!(", {such_as}{path}: {}", fault.detail);
    }
    text
}

/// Number of reasons that are named if no picture can be used.
const NUM_REASONS: usize = 3;

/// Why no picture can be used: the commonest reasons.
pub(super) fn nothing_usable(source: &Path, summary: &PrepSummary) -> String {
    let reasons = summary.commonest_reasons(NUM_REASONS);
    let source = source.display();
    if reasons.is_empty() {
        return format!("\n\nno picture can be used: {source} has no files");
    }
    let mut text = format!("\n\nno picture of {source} can be used; the commonest reasons:");
    for (reason, count) in reasons {
        text += &format!("\n  {}", with_example(reason, count, &summary.examples));
    }
    text
}

/// The part of a worker, in words.
pub(super) fn describe_part(summary: &PartSummary) -> String {
    let mut text = format!(
        "worker {}: {} of {} objects, {} rows written in {}",
        summary.part,
        grouped(summary.own_objects),
        grouped(summary.all_objects),
        grouped(summary.written_rows),
        duration(summary.secs)
    );
    if summary.resumed_objects > 0 {
        text += &format!("; {} objects were there", grouped(summary.resumed_objects));
    }
    if summary.failed > 0 {
        text += &format!("; {} pictures failed", grouped(summary.failed));
    }
    text + "\nwhen all workers have ended, the same command with --stage join instead of --worker \
            makes the data set"
}

/// What a source holds, in words.
pub(super) fn describe_listing(source: &Path, summary: &ListSummary) -> String {
    let mut text = String::new();
    if !summary.buckets.is_empty() {
        let mut buckets = vec![["bucket", "samples"].map(str::to_owned).to_vec()];
        for bucket in &summary.buckets {
            let size = format!("{}x{}", bucket.width_px, bucket.height_px);
            buckets.push(vec![size, grouped(bucket.samples)]);
        }
        text = table(&buckets) + "\n\n";
    }
    text += &format!(
        "{}: {} samples, {} with a size in a table or an index, {} usable by what is listed; in {}",
        source.display(),
        grouped(summary.samples),
        grouped(summary.with_size),
        grouped(summary.usable),
        duration(summary.secs)
    );
    for (what, counted) in [
        ("smaller than prep.min_side_px", &summary.too_small),
        ("beyond prep.max_aspect_error", &summary.aspect_ratio),
    ] {
        if counted.count > 0 {
            text += &format!("\n{what}: {}", with_examples(counted));
        }
    }
    for (&reason, &count) in &summary.rejected {
        text += &format!("\n{}", with_example(reason, count, &summary.examples));
    }
    text += &describe_filter(&summary.filter);
    text += &describe_boards(summary.boards.as_ref());
    text + &describe_shares(&summary.workers)
}

/// A number that is 0 where the source does not say it.
fn known(number: u64, shown: fn(u64) -> String) -> String {
    match number {
        0 => "-".to_owned(),
        number => shown(number),
    }
}

/// The shares of several workers.
fn describe_shares(workers: &[WorkShare]) -> String {
    if workers.len() < 2 {
        return String::new();
    }
    let titles = ["worker", "samples", "usable", "bytes", "megapixels"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    for (worker, share) in workers.iter().enumerate() {
        rows.push(vec![
            format!("{worker}/{}", workers.len()),
            grouped(share.samples),
            grouped(share.usable),
            known(share.bytes, bytes),
            known(share.pixels / 1_000_000, grouped),
        ]);
    }
    format!("\n\n{}", table(&rows))
}

/// The work of this preparation, in words.
fn work_done(summary: &PrepSummary) -> String {
    let encoded = summary.written_rows - summary.copied_rows.min(summary.written_rows);
    let parts = [
        (encoded, "encoded"),
        (summary.copied_rows, "moved"),
        (summary.resumed_rows, "taken over from an interrupted run"),
        (summary.rewritten_rows, "with new text"),
    ];
    let said: Vec<String> = parts
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{} {what}", grouped(*count)))
        .collect();
    if said.is_empty() {
        "nothing to do".to_owned()
    } else {
        said.join(", ")
    }
}
