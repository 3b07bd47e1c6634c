//! `rectiflow caption`: captions of pictures from served models, as a table of annotations.

use std::{
    path::{Path, PathBuf},
    thread,
};

use rectiflow_annotate::{
    caption::{
        probe::Probed,
        run::{CaptionEvent, Captioner, Job, run_lines},
        statistics::Statistics,
        tally::Tally,
    },
    pictures::{
        jpeg::JpegSettings,
        listed::{Pictures, is_dataset},
    },
    table::answers::Answers,
};
use rectiflow_data::{
    annotation::{STATUSES, Status},
    captioning::CaptionSettings,
    no_folder,
    prep::PrepSettings,
};
use rectiflow_train::recipe::Recipe;
use serde_json::json;

use crate::terminal::{
    answer::{Answer, Misuse},
    captions::describe_modes,
    log,
    numbers::{duration, grouped, short},
    progress::Progress,
    signals::StopSignal,
};

/// Ask served models for captions: any server that answers OpenAI's chat requests (vLLM, llama.cpp,
/// SGLang, `transformers serve`).
///
/// The answers go to a table, which `rectiflow prep --annotations` merges into a data set. The
/// `[caption]` section of a recipe names servers, model and modes; each picture gets the mode that
/// it gets in every run. Answers that are empty, cut, in a loop or refusals are asked for once more
/// with another seed, and then set aside with the reason. An interrupted run goes on where it was:
/// nothing that is answered is asked again. docs/captions.md
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A source as for `rectiflow prep`, or a packed data set (then with --pictures).
    place: PathBuf,
    /// The table, a Parquet file to create or to add to. Default for a data set:
    /// DATASET/annotations/captions.parquet.
    #[arg(long, value_name = "TABLE.parquet")]
    out: Option<PathBuf>,
    /// Where the pictures of a data set are: the source that it was prepared from, or a copy.
    #[arg(long, value_name = "SOURCE")]
    pictures: Option<PathBuf>,
    /// A recipe whose `[caption]` section says what is asked of whom, and whose `[prep]` section
    /// says how the source is read.
    #[arg(long)]
    recipe: Option<PathBuf>,
    /// Override a key of the recipe, e.g. --set caption.model=joycaption. Repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
    /// Ask for this mode of every picture instead of the one that is drawn. Repeatable: a picture
    /// can have a caption of each mode.
    #[arg(long = "mode", value_name = "NAME")]
    modes: Vec<String>,
    /// Ask again for answers with this status: empty, cut, refused, loop, failed or unreadable.
    /// Repeatable.
    #[arg(long, value_name = "STATUS", value_parser = parse_status)]
    again: Vec<Status>,
    /// Open pictures whose address has an answer too, in case their files have changed.
    #[arg(long)]
    reread: bool,
    /// Ask about at most N pictures, to see what the captions are like.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Write the table as JSON lines too.
    #[arg(long, value_name = "FILE")]
    jsonl: Option<PathBuf>,
    /// Threads that open and encode pictures. Default: as many as the processor has.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
}

fn parse_status(word: &str) -> Result<Status, String> {
    let found = Status::parse(word).filter(|status| *status != Status::Ok);
    found.ok_or_else(|| {
        let words: Vec<&str> = STATUSES[1..].iter().map(|status| status.as_str()).collect();
        format!("expected one of {}", words.join(", "))
    })
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let (settings, prep) = Recipe::load_caption(args.recipe.as_deref(), &args.overrides)?;
    check_modes(args, &settings)?;
    let out = table_of(args)?;
    let captioner = Captioner::open(&settings)?;
    let mut answers = Answers::open(&out, &run_lines(&settings, &captioner.models()))?;
    let pictures = open_pictures(args, answers.work(), &prep)?;
    if pictures.num_missing() > 0 {
        tracing::warn!(
            "{} pictures of the data set are not where they were: they get no caption",
            pictures.num_missing()
        );
    }
    let job = Job {
        pictures: &pictures,
        settings: &settings,
        jpeg: JpegSettings {
            max_side_px: settings.max_side_px,
            quality: settings.jpeg_quality,
            max_pixels: prep.max_pixels,
            background: prep.background,
        },
        modes: (!args.modes.is_empty()).then(|| args.modes.clone()),
        again: args.again.clone(),
        reread: args.reread,
        limit: args.limit,
        threads: num_threads(args),
    };
    let stop = StopSignal::listen()?;
    let mut live = Live::default();
    let models = captioner.models();
    let show = &mut |event: CaptionEvent<'_>| live.show(&event, &settings);
    let tally = captioner.run(&job, &mut answers, show, stop.flag());
    live.finish();
    let tally = tally?;
    if let Some(signal) = stop.signal() {
        let text = format!(
            "{}\nstopped; start it again to go on where it was",
            describe(&tally, &settings)
        );
        let json = json!({ "table": out, "captions": tally, "stopped": true });
        return Ok(Answer::done(text, json).stopped_by(signal));
    }
    let num_rows = answers.finish(args.jsonl.as_deref())?;
    finished(args, &out, num_rows, &tally, (&settings, &models))
}

/// The answer about a table that is complete.
fn finished(
    args: &Args,
    out: &Path,
    num_rows: u64,
    tally: &Tally,
    (settings, models): (&CaptionSettings, &[String]),
) -> anyhow::Result<Answer> {
    let modes = Statistics::of_table(out)?.modes();
    let mut text = format!(
        "{}\n{}: {} rows\n\n{}",
        describe(tally, settings),
        out.display(),
        grouped(num_rows),
        describe_modes(&modes)
    );
    if !is_dataset(&args.place) {
        text += &format!(
            "\n\nto merge them: rectiflow prep {} --annotations {} ...",
            args.place.display(),
            out.display()
        );
    }
    let json = json!({
        "table": out,
        "rows": num_rows,
        "models": models,
        "captions": tally,
        "price": tally.price(settings),
        "modes": modes,
    });
    Ok(Answer::done(text, json))
}

/// Refuses modes that the recipe does not have.
fn check_modes(args: &Args, settings: &CaptionSettings) -> anyhow::Result<()> {
    let names: Vec<&str> = settings
        .modes
        .iter()
        .map(|mode| mode.name.as_str())
        .collect();
    match args
        .modes
        .iter()
        .find(|name| !names.contains(&name.as_str()))
    {
        None => Ok(()),
        Some(name) => {
            let known = names.join(", ");
            Err(Misuse(format!(
                "--mode {name}: the recipe has no such mode, but {known}"
            ))
            .into())
        }
    }
}

/// The table, in a folder that exists.
fn table_of(args: &Args) -> anyhow::Result<PathBuf> {
    let out = match &args.out {
        Some(out) => out.clone(),
        None if is_dataset(&args.place) => args.place.join("annotations/captions.parquet"),
        None => {
            let problem = "--out is needed: name the table, such as --out captions.parquet";
            return Err(Misuse(problem.to_owned()).into());
        }
    };
    if out.to_string_lossy().contains("://") {
        let problem = format!("--out {}: a table is written to a disk", out.display());
        return Err(Misuse(problem).into());
    }
    if out.is_dir() {
        let problem = format!("--out {}: it is a folder, expected a file", out.display());
        return Err(Misuse(problem).into());
    }
    if let Some(folder) = out.parent() {
        std::fs::create_dir_all(folder).map_err(rectiflow_data::Error::io(folder))?;
    }
    Ok(out)
}

fn open_pictures(args: &Args, work: &Path, prep: &PrepSettings) -> anyhow::Result<Pictures> {
    if !is_dataset(&args.place) {
        if args.pictures.is_some() {
            let problem = "--pictures is for a packed data set, and this is a source";
            return Err(Misuse(problem.to_owned()).into());
        }
        no_folder::refuse(&args.place)?;
        return Ok(Pictures::of_source(&args.place, work, prep)?);
    }
    let Some(root) = &args.pictures else {
        let problem = "--pictures is needed: a data set has latents, and captions need the \
                       pictures; name what it was prepared from";
        return Err(Misuse(problem.to_owned()).into());
    };
    Ok(Pictures::of_dataset(&args.place, root, work, prep)?)
}

fn num_threads(args: &Args) -> usize {
    let own = args.threads.map(|threads| threads as usize);
    own.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from))
}

fn describe(tally: &Tally, settings: &CaptionSettings) -> String {
    let mut text = format!(
        "{} captions, {} answers set aside; {} pictures had theirs before, in {}",
        grouped(tally.num(Status::Ok)),
        grouped(tally.num_set_aside()),
        grouped(tally.known + tally.copies),
        duration(tally.secs)
    );
    let mut aside = Vec::new();
    for (status, count) in &tally.statuses {
        if *status != "ok" {
            aside.push(format!("{count} {status}"));
        }
    }
    if !aside.is_empty() {
        text += &format!("\nset aside: {}", aside.join(", "));
    }
    if let Some(example) = &tally.unreadable_example {
        let count = grouped(tally.unreadable);
        text += &format!("\n{count} pictures cannot be read, such as {example}");
    }
    if tally.retries > 0 {
        let last = tally.last_failure.as_deref().unwrap_or("unknown");
        let count = grouped(tally.retries);
        text += &format!("\n{count} requests were sent again after failures, the last one: {last}");
    }
    if let Some(price) = tally.price(settings) {
        text += &format!("\nprice: {}", short(price, 4));
    }
    text
}

/// Progress of a run.
#[derive(Debug, Default)]
struct Live(Option<Progress>);

impl Live {
    fn show(&mut self, event: &CaptionEvent<'_>, settings: &CaptionSettings) {
        match event {
            CaptionEvent::Probed(probed) => probed.iter().for_each(show_probe),
            CaptionEvent::Progress(tally) => {
                let mut notes = Vec::new();
                if tally.num_set_aside() > 0 {
                    notes.push(format!("{} set aside", grouped(tally.num_set_aside())));
                }
                if let (Some(price), Some(whole)) =
                    (tally.price(settings), tally.whole_price(settings))
                {
                    notes.push(format!("price {} of {}", short(price, 4), short(whole, 4)));
                }
                if let (0, Some(failure)) = (tally.done, &tally.last_failure) {
                    notes.push(failure.clone());
                }
                let progress = self
                    .0
                    .get_or_insert_with(|| Progress::new("caption", "captions", 0, tally.total));
                progress.set(tally.done, &notes.join(", "));
            }
        }
    }

    fn finish(&mut self) {
        if let Some(progress) = self.0.take() {
            progress.finish();
        }
    }
}

fn show_probe(probed: &Probed) {
    match &probed.doubt {
        Some(doubt) => tracing::warn!("{}: {doubt}", probed.server),
        None => log::line(&format!(
            "{} sees pictures: \"{}\", \"{}\"",
            probed.server, probed.answers[0], probed.answers[1]
        )),
    }
}
