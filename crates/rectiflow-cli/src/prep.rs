//! `rectiflow prep`: a source of captioned images to a packed data set.
//!
//! The work is in `rectiflow_data::prep`, which links no tensor library; this file passes it a VAE
//! to encode with. A data set for a URL is prepared in a folder and then sent
//! (`rectiflow_data::publish`).

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::Context;
use half::f16;
use rectiflow_data::{
    count::{BoardCount, ClauseCount, Counted, TableCount},
    manifest::Codec,
    no_folder,
    prep::{PrepEvent, PrepSettings, PrepSummary, RgbBatch, prepare},
    publish::{Published, publish},
    reject::{NOTES_FILE, REJECTED_FILE, Reason, Remark},
};
use rectiflow_sdxl::{
    model::{Component, OpenOptions},
    vae::Vae,
};
use rectiflow_train::{
    components::Components,
    recipe::{Recipe, parse_device},
    weights_hash::hash_weights,
};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::terminal::{
    answer::{Answer, Misuse},
    base::BaseArg,
    numbers::{bytes, duration, grouped, table},
    progress::Progress,
};

/// Turn captioned images of any shape into a packed data set to train on.
///
/// The source is a folder of images, or tars (WebDataset, with or without an index), Parquet files
/// that hold images, or MDS shards, on a disk or at a URL; it is read where it is.
///
/// Captions and tags come from files beside an image (NAME.txt, NAME.caption, NAME.tags, NAME.json)
/// or from a table (metadata.jsonl, .csv or .parquet, kohya's JSON, tables of image boards);
/// docs/preparation.md lists what is read. Images that cannot be used are skipped and listed, with
/// the reason, in the data set's rejected.jsonl. An interrupted preparation resumes. Repeated on a
/// changed folder, it encodes only the changes. Exits with 1 if no image can be used.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder, file or URL of the images; subfolders are read too. `prep.source` says what it
    /// is if its files do not.
    source: PathBuf,
    /// The data set, a folder to create or to bring up to date; or a URL, s3://bucket/prefix, gs://
    /// or az://, to which the finished files are sent, the manifest last.
    #[arg(long, value_name = "DATASET")]
    out: PathBuf,
    /// Folder in which a data set for a URL is prepared. It stays there, so later runs encode and
    /// send only what changed; it needs room for the whole set. Default: a folder named after the
    /// URL in the user's cache folder.
    #[arg(long, value_name = "FOLDER")]
    work: Option<PathBuf>,
    /// The VAE that encodes the images: its folder or file, a diffusers model folder, a single-file
    /// checkpoint or a training checkpoint.
    #[arg(long)]
    vae: PathBuf,
    #[command(flatten)]
    base: BaseArg,
    /// A recipe whose `[prep]` section sets area, bucket step, background, test split and more.
    #[arg(long)]
    recipe: Option<PathBuf>,
    /// Override a key of the recipe, e.g. --set prep.area_px=262144. Repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
    /// Shuffle all rows again, so that pictures added later are spread among the others. Nothing is
    /// encoded twice.
    #[arg(long)]
    repack: bool,
    /// Device to encode on: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    device: Device,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    no_folder::refuse(&args.source)?;
    let settings = PrepSettings {
        repack: args.repack,
        ..Recipe::load_prep(args.recipe.as_deref(), &args.overrides)?
    };
    let options = OpenOptions {
        device: args.device,
        ..OpenOptions::default()
    };
    let place = Components::find_one(Component::Vae, &args.vae, &args.base.bases())?;
    let vae = Vae::open(&place, &options)?;
    let codec = codec(&place, &vae)?;
    let mut live = Live::default();
    let url = args.out.to_str().filter(|out| out.contains("://"));
    let folder = working_folder(args, url)?;

    let summary = prepare(
        &args.source,
        &folder,
        &settings,
        &codec,
        &mut |batch| encode(&vae, batch).map_err(|error| error.to_string()),
        &mut |event| live.show(event),
    );
    live.finish();
    let summary = summary?;
    let mut json = json!({ "dataset": args.out, "codec": codec, "summary": summary });
    let mut text = describe(&folder, &summary);
    if summary.train_rows + summary.test_rows == 0 {
        text += &nothing_usable(&args.source, &summary);
        return Ok(Answer::done(text, json).failed());
    }

    if let Some(url) = url {
        let sent = send(&folder, url, &mut live)?;
        text += &format!(
            "\n{url}: {} files sent, {}; {} were there",
            sent.num_files,
            bytes(sent.num_bytes),
            sent.num_kept
        );
        json["published"] = json!({
            "files": sent.num_files,
            "bytes": sent.num_bytes,
            "kept": sent.num_kept,
        });
    }
    Ok(Answer::done(text, json))
}

/// The folder in which the data set is prepared: `--out`, or for a URL `--work` or a cache folder.
fn working_folder(args: &Args, url: Option<&str>) -> anyhow::Result<PathBuf> {
    match (url, &args.work) {
        (None, Some(_)) => {
            Err(Misuse("--work is for a data set that goes to a URL".to_owned()).into())
        }
        (None, None) => Ok(args.out.clone()),
        (Some(_), Some(work)) => Ok(work.clone()),
        (Some(url), None) => {
            cache_folder(url).context("--work is needed: neither XDG_CACHE_HOME nor HOME is set")
        }
    }
}

/// Sends the finished files to a URL.
fn send(folder: &Path, url: &str, live: &mut Live) -> anyhow::Result<Published> {
    let mut progress = |done: u64, total: u64| live.set("send", "bytes", (done, total), "");
    let published = publish(folder, url, &mut progress);
    live.finish();
    Ok(published?)
}

/// The working folder of a URL: `~/.cache/rectiflow/prep/s3-bucket-prefix`.
fn cache_folder(url: &str) -> Option<PathBuf> {
    let home = || {
        env::var_os("HOME")
            .filter(|home| !home.is_empty())
            .map(|home| PathBuf::from(home).join(".cache"))
    };
    let cache = env::var_os("XDG_CACHE_HOME")
        .filter(|cache| !cache.is_empty())
        .map(PathBuf::from)
        .or_else(home)?;
    let parts = url.split(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '_' | '.'));
    let name = parts
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("-");
    Some(cache.join("rectiflow/prep").join(name))
}

/// The VAE at `place`, its folder or a single file, as a data set names it.
fn codec(place: &Path, vae: &Vae) -> anyhow::Result<Codec> {
    Ok(Codec {
        vae: name(place),
        hash: hash_weights(Component::Vae, place)?,
        scaling_factor: vae.config.scaling_factor,
        down_factor: vae.config.down_factor(),
        channels: u32::try_from(vae.config.latent_channels)
            .expect("the VAE's configuration has been checked"),
        dtype: "F16".to_owned(),
    })
}

/// The name of a folder or a file; for a folder called "vae", with the model's name before it.
fn name(folder: &Path) -> String {
    let full = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let names: Vec<_> = full
        .iter()
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    let own = names.last().cloned().unwrap_or_default();
    match names.len().checked_sub(2).map(|parent| &names[parent]) {
        Some(parent) if own == "vae" => format!("{parent}/vae"),
        _ => own,
    }
}

/// The posterior means of a batch, unscaled. `[n, C, h/f, w/f]`
fn encode(vae: &Vae, batch: &RgbBatch) -> rectiflow_sdxl::error::Result<Vec<f16>> {
    let shape = [
        batch.num_images as i64,
        i64::from(batch.height_px),
        i64::from(batch.width_px),
        3,
    ];
    tch::no_grad(|| {
        let pixels = Tensor::from_slice(&batch.pixels)
            .view(shape)
            .permute([0, 3, 1, 2])
            .to_device(vae.device());
        let pixels = pixels.to_kind(Kind::Float) / 127.5 - 1.0; // [n, 3, h, w]
        let (mean, _) = vae.encode(&pixels.to_kind(vae.kind()))?;
        let mean = mean
            .to_kind(Kind::Half)
            .to_device(Device::Cpu)
            .contiguous()
            .flatten(0, -1);
        Ok(Vec::try_from(mean).expect("a flat tensor of halves on the CPU"))
    })
}

/// Progress of a preparation, one bar per stage.
#[derive(Debug, Default)]
struct Live {
    stage: &'static str,
    progress: Option<Progress>,
}

impl Live {
    fn show(&mut self, event: PrepEvent) {
        match event {
            PrepEvent::Scanning {
                done,
                num_files,
                rejected,
            } => {
                self.set("scan", "files", (done, num_files), &rejected_note(rejected));
            }
            PrepEvent::Encoding {
                width_px,
                height_px,
                done,
                num_samples,
                rejected,
            } => {
                let rejected = rejected_note(rejected);
                let note = [format!("{width_px}x{height_px}"), rejected].join(" ");
                self.set("encode", "images", (done, num_samples), note.trim_end());
            }
            PrepEvent::Rewriting { done, num_objects } => {
                self.set("rewrite text", "objects", (done, num_objects), "")
            }
            _ => {}
        }
    }

    fn set(
        &mut self,
        stage: &'static str,
        unit: &'static str,
        (done, total): (u64, u64),
        note: &str,
    ) {
        if self.stage != stage {
            self.finish();
            self.stage = stage;
        }
        self.progress
            .get_or_insert_with(|| Progress::new(stage, unit, 0, total))
            .set(done, note);
    }

    fn finish(&mut self) {
        if let Some(progress) = self.progress.take() {
            progress.finish();
        }
    }
}

fn rejected_note(rejected: u64) -> String {
    if rejected == 0 {
        String::new()
    } else {
        format!("({} rejected)", grouped(rejected))
    }
}

fn describe(out: &Path, summary: &PrepSummary) -> String {
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
    for (title, counts, file) in [
        ("not in the data set", &summary.rejected, REJECTED_FILE),
        ("with a remark", &summary.notes, NOTES_FILE),
    ] {
        if !counts.is_empty() {
            text += &format!("\n{title} (named in {}):", out.join(file).display());
            for (&reason, &count) in counts {
                text += &format!("\n  {}", with_example(reason, count, summary));
            }
        }
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
fn with_example(reason: Reason, count: u64, summary: &PrepSummary) -> String {
    let mut text = format!("{} {}", grouped(count), reason.as_str().replace('_', " "));
    if let Some(Remark { path, fault }) = summary.examples.get(&reason) {
        let such_as = if count == 1 { "" } else { "such as " };
        text += &format!(", {such_as}{path}: {}", fault.detail);
    }
    text
}

/// Number of reasons that are named if no picture can be used.
const NUM_REASONS: usize = 3;

/// Why no picture can be used: the commonest reasons.
fn nothing_usable(source: &Path, summary: &PrepSummary) -> String {
    let reasons = summary.commonest_reasons(NUM_REASONS);
    let source = source.display();
    if reasons.is_empty() {
        return format!("\n\nno picture can be used: {source} has no files");
    }
    let mut text = format!("\n\nno picture of {source} can be used; the commonest reasons:");
    for (reason, count) in reasons {
        text += &format!("\n  {}", with_example(reason, count, summary));
    }
    text
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
