//! `rectiflow dedupe`: the near-copies of a data set, as a page to look at and as a list.
//!
//! The search is in `rectiflow_data::prep::near_copies`; this file writes the page.

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
    small_pictures::SmallPictures,
};
use rectiflow_sdxl::durable::write_bytes;
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

/// Name of the page inside a data set.
const PAGE_FILE: &str = "near-copies.html";
/// Largest number of clusters on the page: the first ones, and others evenly between.
const MAX_CLUSTERS: usize = 200;
/// Largest number of pictures of a cluster on the page.
const MAX_COPIES: usize = 12;
/// The longer side of a picture on the page in pixels.
const SIDE_PX: u32 = 160;

/// Find near-copies among the pictures of a data set: resized, mirrored, recompressed, with a
/// border or cropped a little.
///
/// Writes DATASET/near-copies.html, a page with the clusters as pictures, and changes nothing else.
/// With --drop, all but the best picture of each cluster are taken out of the data set: the one
/// with the most pixels stays, of equal ones that with the longest text. DATASET/near-copies.jsonl
/// lists them, and later preparations keep them out; without that file the next one brings them
/// back. No picture is encoded and no file deleted.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The data set, a folder that `rectiflow prep` made.
    dataset: PathBuf,
    /// Where the data set was prepared from; the page then shows the pictures themselves. Default:
    /// it shows the thumbnails that were compared.
    #[arg(long, value_name = "SOURCE")]
    pictures: Option<PathBuf>,
    /// Take all but the best of each cluster out of the data set.
    #[arg(long)]
    drop: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    check_is_dataset(&args.dataset)?;
    let mut live = Live::default();
    let found = find_near_copies(&args.dataset, &mut |event| live.show(event));
    live.finish();
    let found = found?;
    let page = args.dataset.join(PAGE_FILE);
    write_bytes(&page, page_of(args, &found)?.as_bytes())?;
    let num_dropped = match args.drop {
        true => Some(drop_near_copies(&args.dataset, &found)?),
        false => None,
    };
    let text = describe(args, &found, num_dropped, &page);
    let json = json!({
        "dataset": args.dataset,
        "near_copies": found,
        "dropped_rows": num_dropped,
        "page": page,
    });
    Ok(Answer::done(text, json))
}

/// Refuses what is no folder of a data set.
fn check_is_dataset(dataset: &Path) -> anyhow::Result<()> {
    let shown = dataset.display().to_string();
    if shown.contains("://") {
        let problem = format!(
            "{shown} is a URL: name the folder in which the data set was prepared (--work)"
        );
        return Err(Misuse(problem).into());
    }
    if !dataset.join(MANIFEST_FILE).exists() {
        let problem = format!(
            "{shown} is no data set, it has no {MANIFEST_FILE}: prepare it first, with rectiflow prep"
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

fn describe(args: &Args, found: &NearCopies, num_dropped: Option<u64>, page: &Path) -> String {
    let num_copies: usize = found.clusters.iter().map(|cluster| cluster.len() - 1).sum();
    let mut text = format!(
        "{} pictures: {} copies in {} clusters, {} of these in both splits; in {}\n{}",
        grouped(found.num_pictures),
        grouped(num_copies as u64),
        grouped(found.clusters.len() as u64),
        grouped(found.num_across_splits),
        duration(found.secs),
        page.display()
    );
    if found.num_unsigned > 0 {
        text += &format!(
            "\n{} pictures have no signature and were not compared: an earlier version prepared them, or \
             prep/signatures was deleted or damaged; prepare into a new folder to compare them",
            grouped(found.num_unsigned)
        );
    }
    let list = args.dataset.join(NEAR_COPIES_FILE);
    match num_dropped {
        Some(num_rows) => {
            text += &format!(
                "\n{} rows taken out of the data set; {} lists them",
                grouped(num_rows),
                list.display()
            );
        }
        None if num_copies > 0 => {
            text += "\nlook at the page; --drop takes all but the first of each cluster out";
        }
        None => {}
    }
    text
}

/// The page: a row for each cluster, the picture that stays first.
fn page_of(args: &Args, found: &NearCopies) -> anyhow::Result<String> {
    let shown = spread(&found.clusters);
    let pictures = pictures_of(args, &shown)?;
    let name = escape(&args.dataset.display().to_string());
    let mut body = format!(
        "<h1>Near-copies in {name}</h1>\n<p>{} clusters among {} pictures{}. The first picture of \
         each row stays; <code>rectiflow dedupe --drop</code> takes the others out of the data \
         set.</p>\n",
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
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>Near-copies in {name}</title>\n<style>{STYLE}</style>\n</head>\n\
         <body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    ))
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
        Split::Train => "train",
        Split::Test => "test",
    };
    format!(
        "<figure><img src=\"data:image/png;base64,{}\" width=\"{}\" height=\"{}\" alt=\"\">\
         <figcaption>{}<br>{}x{}, {} bytes of text, {split}</figcaption></figure>\n",
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

/// The pictures themselves, by hash, where `--pictures` names their source.
fn pictures_of(args: &Args, shown: &[&NearCopyCluster]) -> anyhow::Result<HashMap<u64, Picture>> {
    let mut pictures = HashMap::new();
    let Some(source) = &args.pictures else {
        return Ok(pictures);
    };
    // Not used to read captions.
    let manifest = Manifest::read(&args.dataset)?;
    let small = SmallPictures::open(source, &args.dataset, &manifest.geometry)?;
    let mut num_wanted = 0;
    for cluster in shown {
        for copy in cluster.iter().take(MAX_COPIES) {
            num_wanted += 1;
            if let Some(picture) = small.picture(&copy.address, SIDE_PX) {
                pictures.insert(copy.id.0, picture);
            }
        }
    }
    if pictures.len() < num_wanted {
        tracing::warn!(
            "{} of {num_wanted} pictures of the page are not in {}, or cannot be opened: what was \
             compared is shown instead",
            num_wanted - pictures.len(),
            source.display()
        );
    }
    Ok(pictures)
}
