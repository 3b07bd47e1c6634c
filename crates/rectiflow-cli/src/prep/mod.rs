//! `rectiflow prep`: a source of captioned images to a packed data set.
//!
//! The work is in `rectiflow_data::prep`, which links no tensor library; this folder passes it a
//! VAE to encode with (here), starts several workers on one machine (`local_workers`), and shows
//! what happens (`live`) and what came of it (`describe`). A data set for a URL is prepared in a
//! folder and then sent (`rectiflow_data::publish`).

mod describe;
mod live;
mod local_workers;
mod timeline;

use std::path::{Path, PathBuf};

use anyhow::Context;
use half::f16;
use rectiflow_data::{
    manifest::Codec,
    no_folder,
    prep::{
        EncoderSecs, Part, PrepSettings, PrepSummary, RgbBatch, Stage as PartStage, Stretch,
        check_places, gather_facts, join_parts, list, prepare, prepare_part,
    },
    publish::{Published, publish},
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

use crate::{
    prep::{
        describe::{describe, describe_listing, describe_part, nothing_usable},
        live::Live,
    },
    terminal::{
        answer::{Answer, Misuse},
        base::BaseArg,
        cache_folder::cache_folder,
        numbers::{bytes, grouped},
    },
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
    /// Folder in which a data set for a URL is prepared. Texts and what was done stay there, so
    /// later runs encode and send only what changed; latents are sent and deleted while others are
    /// encoded. Default: a folder named after the URL in the user's cache folder.
    #[arg(long, value_name = "FOLDER")]
    work: Option<PathBuf>,
    /// Keep the latents of a data set for a URL in --work too, which needs room for the whole set
    /// and allows --repack.
    #[arg(long)]
    keep_latents: bool,
    /// The VAE that encodes the images: its folder or file, a diffusers model folder, a single-file
    /// checkpoint or a training checkpoint. Not needed to list and to find facts.
    #[arg(long, required_unless_present = "stage")]
    vae: Option<PathBuf>,
    #[command(flatten)]
    base: BaseArg,
    /// A recipe whose `[prep]` section sets area, bucket step, background, test split and more.
    #[arg(long)]
    recipe: Option<PathBuf>,
    /// Override a key of the recipe, e.g. --set prep.area_px=262144. Repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
    /// A table of captions, tags or scores, as `rectiflow caption`, `tag` and `score` write them,
    /// which is merged into the texts of the pictures. No picture is encoded again. Repeatable, and
    /// to be named in each later preparation, or as `prep.annotations` in the recipe.
    #[arg(long, value_name = "TABLE.parquet")]
    annotations: Vec<PathBuf>,
    /// A list of near-copies to leave out, as `rectiflow dedupe SOURCE --work FOLDER` writes it.
    /// Repeatable, and to be named in each later preparation, or as `prep.without` in the recipe.
    #[arg(long, value_name = "LIST.jsonl")]
    without: Vec<PathBuf>,
    /// Shuffle all rows again, so that pictures added later are spread among the others. Nothing is
    /// encoded twice.
    #[arg(long)]
    repack: bool,
    /// Device to encode on: cpu, cuda or cuda:N. With --workers and cuda, each worker takes the GPU
    /// of its number.
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    device: Device,
    /// Prepare with N processes on this machine, one for each GPU. Default: one process.
    #[arg(long, value_name = "N", conflicts_with = "worker", value_parser = clap::value_parser!(u32).range(1..=1024))]
    workers: Option<u32>,
    /// Do the part of one of several workers, which can run on many machines that share the
    /// folder: 0/8 to 7/8 are eight workers. A worker that is started again goes on where it was.
    /// When all have ended, `--stage join` makes the data set.
    #[arg(long, value_name = "I/N", value_parser = str::parse::<Part>)]
    worker: Option<Part>,
    /// Draw what each thread did and when, as SVG: the first thousands of pictures. The VAE's row
    /// shows whether it waits for pictures.
    #[arg(long, value_name = "FILE.svg", conflicts_with = "workers")]
    timeline: Option<PathBuf>,
    /// Do one stage alone. Default: all of them; a worker waits for the facts of the others.
    #[arg(long, value_enum)]
    stage: Option<Stage>,
}

/// A stage of a preparation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Stage {
    /// Say what the source holds and how --workers would share it, from tables and indexes alone:
    /// no picture is opened.
    List,
    /// Read the pictures of --worker once, for their hashes and sizes. Needs no VAE.
    Facts,
    /// Encode the share of --worker, once the facts of all workers are there.
    Objects,
    /// Make the data set of what all workers have written, or name what is missing.
    Join,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    no_folder::refuse(&args.source)?;
    check_combination(args)?;
    let url = args.out.to_str().filter(|out| out.contains("://"));
    let mut settings = PrepSettings {
        repack: args.repack,
        send_to: url.filter(|_| !args.keep_latents).map(str::to_owned),
        ..Recipe::load_prep(args.recipe.as_deref(), &args.overrides)?
    };
    settings.annotations.extend_from_slice(&args.annotations);
    settings.without.extend_from_slice(&args.without);
    if settings.repack && settings.send_to.is_some() {
        let problem = "--repack moves latents, which a data set at a URL has no copy of here: add \
                       --keep-latents, if they were kept from the first preparation on";
        return Err(Misuse(problem.to_owned()).into());
    }
    let folder = working_folder(args, url)?;
    match (args.stage, args.worker, local_workers::own_part()?) {
        (Some(Stage::List), ..) => listing(args, &folder, &settings),
        (Some(Stage::Facts), Some(part), _) => facts(args, &folder, &settings, part),
        (stage, Some(part), _) | (stage, None, Some(part)) if stage != Some(Stage::Join) => {
            one_part(args, &folder, &settings, part)
        }
        (Some(Stage::Join), ..) => {
            let (_, codec) = open_vae(args)?;
            joined(args, &folder, &settings, url, &codec)
        }
        _ => match args.workers {
            Some(num_workers) => {
                // What is wrong for all of them is said once.
                check_places(&args.source, &folder)?;
                let (_, codec) = open_vae(args)?;
                local_workers::run(num_workers, &folder)?;
                joined(args, &folder, &settings, url, &codec)
            }
            None => whole(args, &folder, &settings, url),
        },
    }
}

/// Refuses options that do not go together.
fn check_combination(args: &Args) -> anyhow::Result<()> {
    let problem = match args.stage {
        Some(Stage::Facts | Stage::Objects) if args.worker.is_none() => {
            "--stage facts and --stage objects are for one worker: say which, as --worker 0/8"
        }
        Some(Stage::List | Stage::Join) if args.worker.is_some() => {
            "--stage list and --stage join are for all workers: leave --worker out"
        }
        Some(Stage::Join) if args.workers.is_some() => {
            "--stage join finds the number of workers itself: leave --workers out"
        }
        Some(Stage::Objects | Stage::Join) if args.vae.is_none() => {
            "--vae is needed: the data set names the VAE of its latents"
        }
        _ => return Ok(()),
    };
    Err(Misuse(problem.to_owned()).into())
}

/// The VAE and how a data set names it.
fn open_vae(args: &Args) -> anyhow::Result<(Vae, Codec)> {
    let options = OpenOptions {
        device: local_workers::own_device(args.device)?,
        ..OpenOptions::default()
    };
    let vae = args.vae.as_ref().context("--vae is needed")?;
    let place = Components::find_one(Component::Vae, vae, &args.base.bases())?;
    let vae = Vae::open(&place, &options)?;
    let codec = codec(&place, &vae)?;
    Ok((vae, codec))
}

/// `--stage list`.
fn listing(args: &Args, folder: &Path, settings: &PrepSettings) -> anyhow::Result<Answer> {
    let mut live = Live::default();
    let num_workers = args.workers.unwrap_or(1);
    let summary = list(&args.source, folder, settings, num_workers, &mut |event| {
        live.show(event);
    });
    live.finish();
    let summary = summary?;
    let text = describe_listing(&args.source, &summary);
    let answer = Answer::done(text, json!({ "source": args.source, "listing": summary }));
    Ok(match summary.usable {
        0 => answer.failed(),
        _ => answer,
    })
}

/// `--stage facts`.
fn facts(
    args: &Args,
    folder: &Path,
    settings: &PrepSettings,
    part: Part,
) -> anyhow::Result<Answer> {
    let mut live = Live::default();
    let num_own = gather_facts(&args.source, folder, settings, part, &mut |event| {
        live.show(event);
    });
    live.finish();
    let num_own = num_own?;
    let text = format!(
        "worker {part}: the facts of {} samples are there",
        grouped(num_own)
    );
    Ok(Answer::done(
        text,
        json!({ "part": part, "samples": num_own }),
    ))
}

/// The part of a worker.
fn one_part(
    args: &Args,
    folder: &Path,
    settings: &PrepSettings,
    part: Part,
) -> anyhow::Result<Answer> {
    let (vae, codec) = open_vae(args)?;
    let stage = match args.stage {
        Some(Stage::Objects) => PartStage::Objects,
        _ => PartStage::Both,
    };
    let mut live = Live::default();
    let summary = prepare_part(
        &args.source,
        folder,
        settings,
        &codec,
        (part, stage),
        &mut |batch| encode(&vae, batch).map_err(|error| error.to_string()),
        &mut |event| live.show(event),
    );
    live.finish();
    let summary = summary?;
    draw(args, &summary.timeline, &summary.encoder_secs)?;
    let text = describe_part(&summary);
    Ok(Answer::done(
        text,
        json!({ "dataset": args.out, "part": summary }),
    ))
}

/// A whole preparation.
fn whole(
    args: &Args,
    folder: &Path,
    settings: &PrepSettings,
    url: Option<&str>,
) -> anyhow::Result<Answer> {
    let (vae, codec) = open_vae(args)?;
    let mut live = Live::default();
    let summary = prepare(
        &args.source,
        folder,
        settings,
        &codec,
        &mut |batch| encode(&vae, batch).map_err(|error| error.to_string()),
        &mut |event| live.show(event),
    );
    live.finish();
    let summary = summary?;
    draw(args, &summary.timeline, &summary.encoder_secs)?;
    answer(args, folder, url, &codec, &summary)
}

/// `--timeline`.
fn draw(args: &Args, stretches: &[Stretch], encoder: &EncoderSecs) -> anyhow::Result<()> {
    match &args.timeline {
        Some(path) => timeline::write(path, stretches, encoder),
        None => Ok(()),
    }
}

/// The join of what workers have written.
fn joined(
    args: &Args,
    folder: &Path,
    settings: &PrepSettings,
    url: Option<&str>,
    codec: &Codec,
) -> anyhow::Result<Answer> {
    let mut live = Live::default();
    let summary = join_parts(&args.source, folder, settings, codec, &mut |event| {
        live.show(event);
    });
    live.finish();
    answer(args, folder, url, codec, &summary?)
}

/// The answer about a data set, which is sent to its URL if it has one.
fn answer(
    args: &Args,
    folder: &Path,
    url: Option<&str>,
    codec: &Codec,
    summary: &PrepSummary,
) -> anyhow::Result<Answer> {
    let mut json = json!({ "dataset": args.out, "codec": codec, "summary": summary });
    let mut text = describe(folder, summary);
    if summary.train_rows + summary.test_rows == 0 {
        text += &nothing_usable(&args.source, summary);
        return Ok(Answer::done(text, json).failed());
    }
    if let Some(url) = url {
        let sent = send(folder, url, &mut Live::default())?;
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
            folder_of_url(url).context("--work is needed: neither XDG_CACHE_HOME nor HOME is set")
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
fn folder_of_url(url: &str) -> Option<PathBuf> {
    let parts = url.split(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '_' | '.'));
    let name = parts
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("-");
    Some(cache_folder()?.join("prep").join(name))
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
