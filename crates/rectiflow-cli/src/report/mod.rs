//! `rectiflow report`: a run as one self-contained page, pictures first.
//!
//! The page embeds its pictures, and the charts of the live page with their data; it follows the
//! reader's choice of light or dark, and reads well on a phone. [`RunRecord`] reads what was
//! measured, [`curves`] has the charts.

mod curves;
pub(crate) mod plot;
pub(crate) mod run_record;

use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use base64::{Engine, engine::general_purpose::STANDARD};
use rectiflow_sdxl::durable::write_bytes;
use rectiflow_train::{
    findings::{Finding, Table},
    metrics::tail,
    recipe::report::Destination,
    trackers::{self, About, Tracker},
};
use serde_json::json;

use crate::{
    report::{
        plot::escape,
        run_record::{RunRecord, Sampled},
    },
    terminal::{
        answer::{Answer, Misuse},
        numbers::{bytes, duration, flops, grouped, short},
    },
    watch::{page::CSS, run_log::RunLog},
};

/// Write RUN_DIR/report.html, a page with a run's pictures, curves and numbers.
///
/// The curves are those of `rectiflow watch`, with their data in the page. With `--to` a run of the
/// past is written as another program's files instead; `report.to` of the recipe does so while a
/// run goes on.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The run folder, `run.dir` of the recipe.
    run_dir: PathBuf,
    /// Write the run for another program instead, into the folder of this name in RUN_DIR.
    #[arg(long, value_name = "FORMAT")]
    to: Option<Format>,
}

/// Another program's format.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Format {
    /// TensorBoard's event files.
    #[value(name = "tensorboard")]
    TensorBoard,
    /// trackio's database.
    Trackio,
    /// A run of W&B's offline mode, for `wandb sync`.
    Wandb,
}

impl Format {
    fn destination(self) -> Destination {
        match self {
            Self::TensorBoard => Destination::TensorBoard,
            Self::Trackio => Destination::Trackio,
            Self::Wandb => Destination::Wandb,
        }
    }
}

/// Largest number of preview pictures shown: the first, the last, and others evenly between.
const MAX_PREVIEWS: usize = 6;
/// Largest number of buckets listed.
const MAX_BUCKETS: usize = 24;

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let record = RunRecord::read(&args.run_dir)
        .with_context(|| format!("reading the run {}", args.run_dir.display()))?;
    if let Some(format) = args.to {
        return tracker(format.destination(), &args.run_dir, record.recipe);
    }
    let log = curves::read(&args.run_dir)?;
    let page = page(&record, &log)?;
    let path = args.run_dir.join("report.html");
    write_bytes(&path, page.as_bytes())?;
    let text = format!("{} ({})", path.display(), bytes(page.len() as u64));
    Ok(Answer::done(
        text,
        json!({ "report": path, "bytes": page.len() }),
    ))
}

/// Writes the run as another program's files.
fn tracker(to: Destination, run_dir: &Path, recipe: Option<String>) -> anyhow::Result<Answer> {
    let name = trackers::folder(to);
    let folder = run_dir.join(name);
    let found = fs::read_dir(&folder).map_or(0, Iterator::count);
    if found > 0 {
        let reason = format!(
            "{}: expected no files, found {found}, so that steps would be there twice; remove the \
             folder first",
            folder.display()
        );
        return Err(Misuse(reason).into());
    }
    let about = About {
        run_dir: run_dir.to_owned(),
        recipe: recipe.unwrap_or_default(),
        is_past: true,
    };
    let mut tracker = Tracker::new(to, about);
    let events = tail::read(run_dir)?;
    for event in &events {
        tracker.write(event)?;
    }
    let text = format!(
        "{} ({} events)",
        folder.display(),
        grouped(events.len() as u64)
    );
    Ok(Answer::done(
        text,
        json!({ name: folder, "events": events.len() }),
    ))
}

fn page(record: &RunRecord, log: &RunLog) -> anyhow::Result<String> {
    let title = escape(&format!("rectiflow: {}", record.name));
    let mut body = format!(
        "<header><h1>{}</h1><p>{}</p></header>\n",
        escape(&record.name),
        summary(record)
    );
    body += &samples(record)?;
    for finding in &record.findings {
        body += &found(finding, &record.folder)?;
    }
    body += &previews(record)?;
    body += &curves::section(&record.name, &record.folder, log);
    body += &numbers(record);
    body += &buckets(record);
    body += &timeline(record);
    body += &settings(record);
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{}\">\n<title>{title}</title>\n\
         <style>{CSS}{STYLE}</style>\n</head>\n\
         <body>\n<main class=\"report\">\n{body}</main>\n</body>\n</html>\n",
        curves::policy()
    ))
}

const STYLE: &str = include_str!("report.css");

/// The run in one or two sentences.
fn summary(record: &RunRecord) -> String {
    let Some(start) = record.starts.first() else {
        return "Nothing has been trained yet.".to_owned();
    };
    let seen = record.steps.last().map_or(0, |step| step.samples);
    let state = if record.finished {
        "trained on"
    } else {
        "has so far trained on"
    };
    let mut text = format!(
        "An SDXL of {} trained parameters {state} {} samples from {} pictures in {} buckets, in {}",
        millions(start.num_parameters),
        grouped(seen),
        grouped(start.num_train),
        start.buckets.len(),
        duration(record.training_secs())
    );
    let _ = write!(text, " on {} CPU threads.", start.threads);
    if let (Some(first), Some(last)) = (record.tests.first(), record.tests.last())
        && first.step < last.step
    {
        let _ = write!(
            text,
            " The loss on {} held-out pictures went from {} to {}.",
            grouped(start.num_test),
            short(first.loss, 3),
            short(last.loss, 3)
        );
    }
    text
}

fn millions(count: u64) -> String {
    if count < 1_000_000 {
        grouped(count)
    } else {
        format!("{} million", short(count as f64 / 1e6, 3))
    }
}

fn samples(record: &RunRecord) -> anyhow::Result<String> {
    if record.samples.is_empty() {
        return Ok(String::new());
    }
    let mut section = "<section><h2>What it draws now</h2>\n<div class=\"samples\">\n".to_owned();
    for Sampled { prompt, images } in &record.samples {
        let _ = write!(
            section,
            "<figure><figcaption>{}</figcaption><div>",
            escape(prompt)
        );
        for (index, path) in images.iter().enumerate() {
            section += &embedded(path, &format!("{prompt}, sample {}", index + 1))?;
        }
        section += "</div></figure>\n";
    }
    Ok(section + "</div></section>\n")
}

/// A finding: its text, picture and numbers.
fn found(finding: &Finding, folder: &Path) -> anyhow::Result<String> {
    let mut section = format!("<section><h2>{}</h2>\n", escape(&finding.title));
    for paragraph in &finding.text {
        let _ = writeln!(section, "<p>{}</p>", escape(paragraph));
    }
    if let Some(picture) = &finding.picture {
        let picture = embedded(&folder.join(picture), &finding.title)?;
        let _ = writeln!(section, "<figure class=\"wide\">{picture}</figure>");
    }
    section += &finding.table.as_ref().map(wide_table).unwrap_or_default();
    Ok(section + "</section>\n")
}

/// A table of several columns; on a narrow screen it scrolls by itself.
fn wide_table(table: &Table) -> String {
    let cells = |tag: &str, cells: &[String]| -> String {
        cells
            .iter()
            .map(|cell| format!("<{tag}>{}</{tag}>", escape(cell)))
            .collect()
    };
    let mut html = format!(
        "<div class=\"wide\"><table class=\"many\">\n<tr>{}</tr>\n",
        cells("th", &table.columns)
    );
    for row in &table.rows {
        let (name, values) = row.split_at(row.len().min(1));
        let _ = writeln!(
            html,
            "<tr>{}{}</tr>",
            cells("th", name),
            cells("td", values)
        );
    }
    html + "</table></div>\n"
}

fn previews(record: &RunRecord) -> anyhow::Result<String> {
    if record.previews.is_empty() {
        return Ok(String::new());
    }
    let mut section = "<section><h2>How it got there</h2>\n\
        <p>The same prompts from the same noise, as training went on.</p>\n"
        .to_owned();
    for index in spread(record.previews.len(), MAX_PREVIEWS) {
        let (step, path) = &record.previews[index];
        let when = match record.samples_at(*step) {
            0 => "before training".to_owned(),
            samples => format!(
                "after {} samples (step {})",
                grouped(samples),
                grouped(*step)
            ),
        };
        let picture = embedded(path, &format!("One picture for each prompt, {when}"))?;
        let _ = writeln!(
            section,
            "<figure class=\"wide\"><figcaption>{when}</figcaption>{picture}</figure>"
        );
    }
    Ok(section + "</section>\n")
}

/// At most `most` indices of `0..len`, both ends included.
fn spread(len: usize, most: usize) -> Vec<usize> {
    if len <= most {
        (0..len).collect()
    } else {
        (0..most).map(|i| i * (len - 1) / (most - 1)).collect()
    }
}

/// A PNG file embedded in the page.
fn embedded(path: &Path, alt: &str) -> anyhow::Result<String> {
    let png = fs::read(path).with_context(|| format!("{}", path.display()))?;
    let size = |at: usize| {
        png.get(at..at + 4)
            .map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
    };
    // The first chunk of a PNG starts with width and height. With them the page does not jump when
    // the picture is decoded.
    let (width, height) = (size(16), size(20));
    let data = STANDARD.encode(&png);
    Ok(format!(
        "<img src=\"data:image/png;base64,{data}\" width=\"{width}\" height=\"{height}\" alt=\"{}\">",
        escape(alt)
    ))
}

fn numbers(record: &RunRecord) -> String {
    let mut rows = training_numbers(record);
    let (count, secs) = record.checkpoints;
    let resumed = times(record.starts.len().saturating_sub(1));
    rows.push(row(
        "Checkpoints written",
        format!("{count} in {}", duration(secs)),
    ));
    rows.push(row("Resumed", resumed));
    if let Some((reporting, all)) = record.reporting {
        let share = short(100.0 * reporting / all.max(1e-9), 2);
        let name = "Time spent on other programs' files and alerts";
        rows.push(row(name, format!("{share} %")));
    }
    for (name, size) in &record.exports {
        rows.push((format!("Exported: {name}"), bytes(*size)));
    }
    format!("<section><h2>Numbers</h2>\n{}</section>\n", table(&rows))
}

fn row(name: &str, value: String) -> (String, String) {
    (name.to_owned(), value)
}

/// The numbers of the training steps; none if no step was made.
fn training_numbers(record: &RunRecord) -> Vec<(String, String)> {
    let Some(last) = record.steps.last() else {
        return Vec::new();
    };
    let secs = record.training_secs().max(1e-9);
    let recent = &record.steps[record.steps.len().saturating_sub(100)..];
    let mean = recent.iter().map(|step| step.loss).sum::<f64>() / recent.len() as f64;
    let waiting = record.steps.iter().map(|step| step.data_secs).sum::<f64>() / secs;
    let speed = record.flops() / secs;
    let rate = last.samples as f64 / secs;

    let mut rows = vec![
        row("Steps", grouped(last.step)),
        row("Samples", grouped(last.samples)),
        row("Epochs begun", grouped(last.epoch.saturating_add(1))),
        row("Training loss, mean of the last 100 steps", short(mean, 4)),
    ];
    if let Some(test) = record.tests.last() {
        rows.push(row("Test loss at the end", short(test.loss, 4)));
    }
    rows.push(row("Samples a second", short(rate, 3)));
    if speed > 0.0 {
        rows.push(row("Arithmetic of training", format!("{}/s", flops(speed))));
    }
    if let Some(peak) = record.starts.iter().find_map(|start| start.peak_flops) {
        let share = short(100.0 * speed / peak, 3);
        rows.push(row(
            "MFU, share of the GPU's bf16 peak",
            format!("{share} %"),
        ));
    }
    let waiting = short(100.0 * waiting, 2);
    rows.push(row("Time spent waiting for data", format!("{waiting} %")));
    rows
}

fn times(count: usize) -> String {
    match count {
        0 => "never".to_owned(),
        1 => "once".to_owned(),
        count => format!("{count} times"),
    }
}

fn table(rows: &[(String, String)]) -> String {
    let mut table = "<table>\n".to_owned();
    for (name, value) in rows {
        let _ = writeln!(
            table,
            "<tr><th scope=\"row\">{}</th><td>{}</td></tr>",
            escape(name),
            escape(value)
        );
    }
    table + "</table>\n"
}

/// Each bucket as its shape, a bar and its counts.
fn buckets(record: &RunRecord) -> String {
    let Some(start) = record
        .starts
        .last()
        .filter(|start| !start.buckets.is_empty())
    else {
        return String::new();
    };
    let mut longest = 0;
    let mut most = 1;
    for &(width, height, train, test) in &start.buckets {
        longest = longest.max(width).max(height);
        most = most.max(train.saturating_add(test));
    }
    let scale = BucketScale { longest, most };
    let mut section = format!(
        "<section><h2>Buckets</h2>\n\
         <p>{} pictures to train on and {} to test on, grouped by shape.</p>\n\
         <ul class=\"buckets\">\n",
        grouped(start.num_train),
        grouped(start.num_test)
    );
    for &(width, height, train, test) in start.buckets.iter().take(MAX_BUCKETS) {
        section += &scale.item(width, height, train, test);
    }
    section += "</ul>\n";
    let others = start.buckets.len().saturating_sub(MAX_BUCKETS);
    if others > 0 {
        let _ = writeln!(section, "<p>and {others} more buckets</p>");
    }
    section + "</section>\n"
}

/// What the shapes and the bars of buckets are drawn relative to.
struct BucketScale {
    /// The longest side of a bucket, in pixels.
    longest: u32,
    /// The pictures of the fullest bucket.
    most: u64,
}

impl BucketScale {
    /// A bucket as a list item.
    fn item(&self, width: u32, height: u32, train: u64, test: u64) -> String {
        let longest = f64::from(self.longest);
        let shape_width = f64::from(width) * 26.0 / longest;
        let shape_height = f64::from(height) * 26.0 / longest;
        let share = 100.0 * train.saturating_add(test) as f64 / self.most as f64;
        let mut count = grouped(train);
        if test > 0 {
            count += &format!(" + {}", grouped(test));
        }
        format!(
            "<li><span class=\"shape\">\
             <i style=\"width:{shape_width:.0}px;height:{shape_height:.0}px\"></i></span>\
             <b>{width}×{height}</b>\
             <span class=\"bar\"><i style=\"width:{share:.1}%\"></i></span>\
             <span class=\"count\">{count}</span></li>\n"
        )
    }
}

fn timeline(record: &RunRecord) -> String {
    if record.timeline.is_empty() {
        return String::new();
    }
    let mut rows: Vec<(String, String)> = record
        .timeline
        .iter()
        .map(|part| (part.part.clone(), duration(part.secs)))
        .collect();
    let total: f64 = record.timeline.iter().map(|part| part.secs).sum();
    rows.push(("all together".to_owned(), duration(total)));
    format!(
        "<section><h2>What was done</h2>\n{}</section>\n",
        table(&rows)
    )
}

fn settings(record: &RunRecord) -> String {
    let Some(recipe) = &record.recipe else {
        return String::new();
    };
    format!(
        "<section><h2>Settings</h2>\n<details><summary>The recipe, with every default</summary>\
         <pre>{}</pre></details></section>\n",
        escape(recipe)
    )
}

#[cfg(test)]
mod tests {
    use checks::mutation::cases;

    use super::*;

    /// The events of a run of 24 steps that was resumed after 16.
    fn events() -> String {
        let mut text = start(0) + &test(0);
        for step in 1..=18 {
            text += &self::step(step);
        }
        text += r#"{"event":"checkpoint","step":16,"name":"step-00000016","secs":0.25}"#;
        text += "\n";
        text += &start(16);
        for step in 17..=24 {
            text += &self::step(step);
        }
        let end = json!({
            "event": "end", "step": 24, "reason": "finished", "secs": 12.5,
            "reporting_secs": 0.005,
        });
        text + &test(24) + &format!("{end}\n")
    }

    fn start(step: u64) -> String {
        let start = json!({
            "event": "start", "step": step, "unix_secs": 1_795_639_471_u64, "order_hash": "74",
            "num_parameters": 2_624_772, "num_train": 5680, "num_test": 200, "threads": 2,
            "buckets": [[128, 128, 4727, 157], [64, 192, 24, 4]], "peak_flops": 9.89e14,
        });
        format!("{start}\n")
    }

    fn step(step: u64) -> String {
        let step = json!({
            "event": "step", "step": step, "samples": 8 * step, "epoch": step / 10,
            "loss": 1.0 / step as f64, "gradient_norm": "inf", "lr": 1e-4, "secs": 0.5,
            "data_secs": 0.01, "flops": 1_u64 << 40,
        });
        format!("{step}\n")
    }

    fn test(step: u64) -> String {
        let bin = |from: f64| json!({"from": from, "to": from + 0.5, "loss": 0.5, "standard_error": 0.1, "count": 7});
        let test = json!({
            "event": "test", "step": step, "samples": 8 * step, "loss": 0.75, "secs": 0.1,
            "bins": [bin(0.0), bin(0.5)],
        });
        format!("{test}\n")
    }

    #[test]
    fn mutated_runs_are_reported() {
        let run = tempfile::tempdir().unwrap();
        let path = run.path().join("metrics.jsonl");
        let good = events();
        fs::write(&path, &good).unwrap();
        let record = RunRecord::read(run.path()).unwrap();
        let found = (record.starts.len(), record.steps.len(), record.tests.len());
        assert_eq!(found, (2, 24, 2));
        let log = curves::read(run.path()).unwrap();
        let share = "files and alerts</th><td>0.04 %</td>";
        assert!(page(&record, &log).unwrap().contains(share));
        for case in cases() {
            let bytes = case.mutation.of(good.as_bytes(), &mut case.random());
            fs::write(&path, bytes).unwrap();
            case.run("metrics.jsonl", || {
                let record = RunRecord::read(run.path()).unwrap();
                let log = curves::read(run.path()).unwrap();
                assert!(page(&record, &log).unwrap().ends_with("</html>\n"));
            });
        }
    }

    #[test]
    fn numbers_at_the_edges_of_their_ranges_are_drawn() {
        let run = tempfile::tempdir().unwrap();
        let path = run.path().join("metrics.jsonl");
        for (name, values) in [
            ("samples", &["18446744073709551615", "0"][..]),
            ("step", &["18446744073709551615", "0"]),
            ("epoch", &["18446744073709551615"]),
            (
                "loss",
                &["5e-324", "1.7976931348623157e308", "\"-inf\"", "-0.0", "0"],
            ),
            ("lr", &["5e-324", "-1e308", "1e308"]),
            ("secs", &["5e-324", "1e308", "-1"]),
            ("flops", &["18446744073709551615"]),
        ] {
            for value in values {
                let lines: String = (1..=3).map(step).collect();
                let with = |line: &str| {
                    let (before, after) = line.split_once(&format!("\"{name}\":")).unwrap();
                    let end = after.find([',', '}']).unwrap();
                    format!("{before}\"{name}\":{value}{}\n", &after[end..])
                };
                let changed: String = lines.lines().map(with).collect();
                fs::write(&path, start(0) + &changed).unwrap();
                let record = RunRecord::read(run.path()).unwrap();
                assert!(!record.steps.is_empty(), "{name} {value}");
                let log = curves::read(run.path()).unwrap();
                assert!(
                    page(&record, &log).unwrap().ends_with("</html>\n"),
                    "{name} {value}"
                );
            }
        }
    }
}
