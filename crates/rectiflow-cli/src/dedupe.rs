//! `rectiflow dedupe`: the near-copies of a data set or a source, as a page to look at and as a
//! list.
//!
//! The search is in `rectiflow_data::prep`; this file writes the page.

use std::{
    collections::HashMap,
    fmt::Write,
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use rectiflow_data::{
    Split,
    manifest::{MANIFEST_FILE, Manifest},
    near_copies::{
        NEAR_COPIES_FILE, NearCopies, NearCopy, NearCopyCluster, NearCopyEvent, drop_near_copies,
        find_near_copies,
    },
    picture::Picture,
    prep::{PrepSettings, SignedAgain, find_near_copies_in_source, sign_again},
    small_pictures::SmallPictures,
};
use rectiflow_sdxl::durable::write_bytes;
use rectiflow_train::recipe::Recipe;
use serde_json::json;

use crate::{
    report::plot::escape,
    terminal::{
        answer::{Answer, Misuse},
        log,
        numbers::{duration, grouped},
        progress::Progress,
    },
};

/// Name of the page inside a data set or a work folder.
const PAGE_FILE: &str = "near-copies.html";
/// Largest number of clusters on the page: the first ones, and others evenly between.
const MAX_CLUSTERS: usize = 200;
/// Largest number of pictures of a cluster on the page.
const MAX_COPIES: usize = 12;
/// The longer side of a picture on the page in pixels.
const SIDE_PX: u32 = 160;

/// Find near-copies among the pictures of a data set or a source: resized, mirrored, recompressed,
/// with a border or cropped a little.
///
/// Writes DATASET/near-copies.html, a page with the clusters as pictures, and changes nothing else.
/// With --drop, all but the best picture of each cluster are taken out of the data set: the one
/// with the most pixels stays, of equal ones that with the highest score, then that with the
/// longest text. DATASET/near-copies.jsonl lists them, and later preparations keep them out;
/// without that file the next one brings them back. No picture is encoded and no file deleted.
///
/// With --work, a source that is not prepared is searched: each picture is decoded once, the page
/// and the list near-copies.jsonl are written to the work folder, and `rectiflow prep --without
/// FOLDER/near-copies.jsonl` leaves out what is listed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The data set, a folder that `rectiflow prep` made; with --work a source of pictures, as
    /// `rectiflow prep` takes it.
    place: PathBuf,
    /// Folder for what is found in a source, and for the signatures of its pictures: an interrupted
    /// search goes on where it was, and a later one reads only new pictures.
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["pictures", "drop"])]
    work: Option<PathBuf>,
    /// Where the data set was prepared from; the page then shows the pictures themselves, and those
    /// without a signature are read and signed. Default: the page shows the thumbnails that were
    /// compared.
    #[arg(long, value_name = "SOURCE")]
    pictures: Option<PathBuf>,
    /// Take all but the best of each cluster out of the data set.
    #[arg(long)]
    drop: bool,
    /// A recipe whose `[prep]` section says how a source is read: its kind, tables and filter.
    #[arg(long, requires = "work")]
    recipe: Option<PathBuf>,
    /// Override a key of the recipe, e.g. --set prep.source=webdataset. Repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE", requires = "work")]
    overrides: Vec<String>,
    /// A table of scores or texts, as `rectiflow score` writes it. Repeatable. A data set has its
    /// own.
    #[arg(long, value_name = "TABLE.parquet", requires = "work")]
    annotations: Vec<PathBuf>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    match &args.work {
        Some(work) => run_on_source(args, work),
        None => run_on_dataset(args),
    }
}

fn run_on_dataset(args: &Args) -> anyhow::Result<Answer> {
    check_is_dataset(&args.place)?;
    let mut live = Live::default();
    let mut show = |event| live.show(event);
    let signed = match &args.pictures {
        Some(pictures) => sign_again(&args.place, pictures, &mut show)?,
        None => SignedAgain::default(),
    };
    let found = find_near_copies(&args.place, &mut show);
    live.finish();
    let found = found?;
    let page = args.place.join(PAGE_FILE);
    let pictures = match &args.pictures {
        Some(source) => {
            // Not used to read captions.
            let geometry = Manifest::read(&args.place)?.geometry;
            Some(SmallPictures::open(source, &args.place, &geometry)?)
        }
        None => None,
    };
    let how = "<code>rectiflow dedupe --drop</code> takes the others out of the data set";
    write_bytes(
        &page,
        page_of(&args.place, &found, pictures.as_ref(), how).as_bytes(),
    )?;
    let num_dropped = match args.drop {
        true => Some(drop_near_copies(&args.place, &found)?),
        false => None,
    };
    let text = describe(&found, &page)
        + &describe_signatures(args, &found, signed)
        + &describe_drop(args, &found, num_dropped);
    let json = json!({
        "dataset": args.place,
        "near_copies": found,
        "signed_again": signed.signed,
        "dropped_rows": num_dropped,
        "page": page,
    });
    Ok(Answer::done(text, json))
}

fn run_on_source(args: &Args, work: &Path) -> anyhow::Result<Answer> {
    let mut settings: PrepSettings = Recipe::load_prep(args.recipe.as_deref(), &args.overrides)?;
    settings.annotations.extend_from_slice(&args.annotations);
    let mut live = Live::default();
    let mut show = |event| live.show(event);
    let found = find_near_copies_in_source(&args.place, work, &settings, &mut show);
    live.finish();
    let found = found?;
    let (page, list) = (work.join(PAGE_FILE), work.join(NEAR_COPIES_FILE));
    let pictures = SmallPictures::open(&args.place, work, &settings.geometry())?;
    let how = "the others are in <code>near-copies.jsonl</code>";
    write_bytes(
        &page,
        page_of(&args.place, &found, Some(&pictures), how).as_bytes(),
    )?;
    let mut text = describe(&found, &page);
    if num_copies(&found) > 0 {
        text += &format!(
            "\n{}\nlook at the page, delete the lines of pictures to keep, and prepare with \
             --without {}",
            list.display(),
            list.display()
        );
    }
    let json = json!({
        "source": args.place,
        "near_copies": found,
        "page": page,
        "list": list,
    });
    Ok(Answer::done(text, json))
}

/// Refuses what is no folder of a data set.
fn check_is_dataset(dataset: &Path) -> anyhow::Result<()> {
    let shown = dataset.display().to_string();
    if shown.contains("://") {
        let problem = format!(
            "{shown} is a URL: name the folder in which the data set was prepared, or, to search a \
             source of pictures, a folder for what is found, --work FOLDER"
        );
        return Err(Misuse(problem).into());
    }
    if !dataset.join(MANIFEST_FILE).exists() {
        let problem = format!(
            "{shown} is no data set, it has no {MANIFEST_FILE}: to search a source of pictures name a \
             folder for what is found, --work FOLDER"
        );
        return Err(Misuse(problem).into());
    }
    Ok(())
}

/// Progress of the search.
#[derive(Debug, Default)]
struct Live(Option<Progress>);

impl Live {
    fn show(&mut self, event: NearCopyEvent) {
        match event {
            NearCopyEvent::Signing {
                done,
                num_pictures,
                num_faulty,
            } => {
                let faulty = match num_faulty {
                    0 => String::new(),
                    many => format!("{} cannot be read", grouped(many)),
                };
                self.0
                    .get_or_insert_with(|| Progress::new("sign", "pictures", 0, num_pictures))
                    .set(done, &faulty);
                if done == num_pictures {
                    self.finish();
                }
            }
            NearCopyEvent::Reading { done, num_objects } => self
                .0
                .get_or_insert_with(|| Progress::new("read", "objects", 0, num_objects))
                .set(done, ""),
            NearCopyEvent::Comparing { num_pictures } => {
                self.finish();
                log::line(&format!("comparing {} pictures", grouped(num_pictures)));
            }
            NearCopyEvent::Confirming { num_pairs } => {
                log::line(&format!("confirming {} candidates", grouped(num_pairs)));
            }
            _ => {}
        }
    }

    fn finish(&mut self) {
        if let Some(progress) = self.0.take() {
            progress.finish();
        }
    }
}

fn num_copies(found: &NearCopies) -> u64 {
    let copies = found
        .clusters
        .iter()
        .map(|cluster| cluster.len() as u64 - 1);
    copies.sum()
}

fn describe(found: &NearCopies, page: &Path) -> String {
    let across = match found.num_across_splits {
        0 => String::new(),
        many => format!(", {} of these in both splits", grouped(many)),
    };
    format!(
        "{} pictures: {} copies in {} clusters{across}; in {}\n{}",
        grouped(found.num_pictures),
        grouped(num_copies(found)),
        grouped(found.clusters.len() as u64),
        duration(found.secs),
        page.display()
    )
}

/// What is to be said of pictures that were not compared.
fn describe_signatures(args: &Args, found: &NearCopies, signed: SignedAgain) -> String {
    let mut text = String::new();
    if signed.signed > 0 {
        text += &format!("\n{} pictures were signed again", grouped(signed.signed));
    }
    if found.num_unsigned > 0 {
        let what = match &args.pictures {
            None => "--pictures SOURCE reads them again and signs them".to_owned(),
            Some(source) => format!(
                "they are not in {}, have changed, or cannot be read; rectiflow prep says more",
                source.display()
            ),
        };
        text += &format!(
            "\n{} pictures have no signature and were not compared: another version prepared them, or \
             prep/signatures was deleted or damaged; {what}",
            grouped(found.num_unsigned)
        );
    }
    text
}

fn describe_drop(args: &Args, found: &NearCopies, num_dropped: Option<u64>) -> String {
    match num_dropped {
        Some(num_rows) => format!(
            "\n{} rows taken out of the data set; {} lists them",
            grouped(num_rows),
            args.place.join(NEAR_COPIES_FILE).display()
        ),
        None if num_copies(found) > 0 => {
            "\nlook at the page; --drop takes all but the first of each cluster out".to_owned()
        }
        None => String::new(),
    }
}

/// The page: a row for each cluster, the picture that stays first. `how` says what becomes of the
/// others.
fn page_of(place: &Path, found: &NearCopies, source: Option<&SmallPictures>, how: &str) -> String {
    let shown = spread(&found.clusters);
    let pictures = match source {
        Some(source) => pictures_of(source, &shown),
        None => HashMap::new(),
    };
    let name = escape(&place.display().to_string());
    let mut body = format!(
        "<h1>Near-copies in {name}</h1>\n<p>{} clusters among {} pictures{}. The first picture of \
         each row stays; {how}.</p>\n",
        grouped(found.clusters.len() as u64),
        grouped(found.num_pictures),
        match found.clusters.len() > shown.len() {
            true => format!(", of which {} are shown", grouped(shown.len() as u64)),
            false => String::new(),
        }
    );
    for cluster in shown {
        body += "<section>\n";
        for copy in cluster.iter().take(MAX_COPIES) {
            body += &figure(copy, pictures.get(&copy.id.0));
        }
        if cluster.len() > MAX_COPIES {
            let others = grouped((cluster.len() - MAX_COPIES) as u64);
            let _ = writeln!(body, "<p>and {others} more</p>");
        }
        body += "</section>\n";
    }
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>Near-copies in {name}</title>\n<style>{STYLE}</style>\n</head>\n\
         <body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )
}

const STYLE: &str = "\
:root{color-scheme:light dark;font:15px/1.4 system-ui,sans-serif}\
main{max-width:1100px;margin:auto;padding:1rem}\
section{display:flex;flex-wrap:wrap;gap:.8rem;padding:.8rem 0;border-top:1px solid #8886}\
figure{margin:0;width:160px}\
figure:first-child img{outline:3px solid #2a8}\
img{display:block;max-width:100%;height:auto}\
figcaption{font-size:12px;overflow-wrap:anywhere}";

fn figure(copy: &NearCopy, picture: Option<&Picture>) -> String {
    let drawn = picture.cloned().unwrap_or_else(|| copy.thumbnail(SIDE_PX));
    let split = match copy.split {
        Some(Split::Train) => ", train",
        Some(Split::Test) => ", test",
        None => "",
    };
    let score = match copy.score {
        Some(score) => format!(", score {score:.3}"),
        None => String::new(),
    };
    format!(
        "<figure><img src=\"data:image/png;base64,{}\" width=\"{}\" height=\"{}\" alt=\"\">\
         <figcaption>{}<br>{}x{}{score}, {} bytes of text{split}</figcaption></figure>\n",
        STANDARD.encode(drawn.to_png()),
        drawn.width_px(),
        drawn.height_px(),
        escape(&copy.address),
        copy.width_px,
        copy.height_px,
        grouped(copy.text_bytes)
    )
}

/// The clusters that are shown: all, or as many evenly from the first to the last.
fn spread(clusters: &[NearCopyCluster]) -> Vec<&NearCopyCluster> {
    let num_shown = clusters.len().min(MAX_CLUSTERS);
    let at = |number: usize| &clusters[number * clusters.len() / num_shown];
    (0..num_shown).map(at).collect()
}

/// The pictures themselves, by hash.
fn pictures_of(source: &SmallPictures, shown: &[&NearCopyCluster]) -> HashMap<u64, Picture> {
    let mut pictures = HashMap::new();
    let mut num_wanted = 0;
    for cluster in shown {
        for copy in cluster.iter().take(MAX_COPIES) {
            num_wanted += 1;
            if let Some(picture) = source.picture(&copy.address, SIDE_PX) {
                pictures.insert(copy.id.0, picture);
            }
        }
    }
    if pictures.len() < num_wanted {
        tracing::warn!(
            "{} of {num_wanted} pictures of the page are not in the source, or cannot be opened: what \
             was compared is shown instead",
            num_wanted - pictures.len()
        );
    }
    pictures
}
