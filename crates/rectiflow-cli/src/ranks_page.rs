//! The page of `rectiflow score`: ten pictures of each quality word to look at.

use std::collections::{HashMap, HashSet};

use base64::{Engine, engine::general_purpose::STANDARD};
use rectiflow_annotate::{
    pass::Subject,
    pictures::listed::{Listed, Pictures},
    score::by_word::{Example, WordGroup},
};
use rectiflow_data::small_pictures::small;

use crate::{
    report::plot::escape,
    terminal::numbers::{grouped, short},
};

/// The longer side of a picture on the page in pixels.
const SIDE_PX: u32 = 160;
/// Behind transparent pixels.
const BACKGROUND: [u8; 3] = [255; 3];

/// The page: a section for each word, the best first.
pub(crate) fn page(subject: &Subject, groups: &[WordGroup], pictures: &Pictures) -> String {
    let listed = shown(groups, pictures);
    let total: u64 = groups.iter().map(|group| group.count).sum();
    let name = escape(&subject.mode);
    let mut body = format!(
        "<h1>Scores of {name}</h1>\n<p>{} pictures by <code>{}</code>, ranked over the whole set. \
         A rank is the share of the set that scores lower; <code>prep.quality_ranks</code> turns \
         ranks into words. Of each word up to ten pictures, drawn by their hashes.</p>\n",
        grouped(total),
        escape(&subject.model)
    );
    for group in groups {
        body += &section(group, &listed, pictures);
    }
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>Scores of {name}</title>\n<style>{STYLE}</style>\n</head>\n\
         <body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )
}

/// The pictures of the page by their addresses.
fn shown<'a>(groups: &'a [WordGroup], pictures: &'a Pictures) -> HashMap<&'a str, &'a Listed> {
    let mut wanted = HashSet::new();
    for group in groups {
        wanted.extend(group.examples.iter().map(|example| example.source.as_str()));
    }
    let mut found = HashMap::new();
    for listed in pictures.listed() {
        if wanted.contains(listed.address.as_str()) {
            found.insert(listed.address.as_str(), listed);
        }
    }
    found
}

fn section(group: &WordGroup, listed: &HashMap<&str, &Listed>, pictures: &Pictures) -> String {
    let mut text = format!(
        "<h2>{}</h2>\n<p>{} pictures, scores {} to {}</p>\n<section>\n",
        escape(group.word.as_deref().unwrap_or("no word")),
        grouped(group.count),
        short(group.lowest, 4),
        short(group.highest, 4)
    );
    for example in &group.examples {
        let listed = listed.get(example.source.as_str()).copied();
        text += &figure(example, listed, pictures);
    }
    text + "</section>\n"
}

const STYLE: &str = "\
:root{color-scheme:light dark;font:15px/1.4 system-ui,sans-serif}\
main{max-width:1100px;margin:auto;padding:1rem}\
h2{margin:1.2rem 0 0;padding-top:.6rem;border-top:1px solid #8886}\
section{display:flex;flex-wrap:wrap;gap:.8rem}\
figure{margin:0;width:160px}\
img{display:block;max-width:100%;height:auto}\
figcaption{font-size:12px;overflow-wrap:anywhere}";

fn figure(example: &Example, listed: Option<&Listed>, pictures: &Pictures) -> String {
    let opened = listed.and_then(|listed| pictures.open(listed).ok());
    let picture = opened.and_then(|opened| small(&opened.bytes, SIDE_PX, BACKGROUND));
    let image = match picture {
        Some(picture) => format!(
            "<img src=\"data:image/png;base64,{}\" width=\"{}\" height=\"{}\" alt=\"\">",
            STANDARD.encode(picture.to_png()),
            picture.width_px(),
            picture.height_px()
        ),
        None => "<p>not among the pictures of this run</p>".to_owned(),
    };
    format!(
        "<figure>{image}<figcaption>{}<br>score {}, rank {}</figcaption></figure>\n",
        escape(&example.source),
        short(example.score, 4),
        short(example.rank, 3)
    )
}
