//! `rectiflow tokens`: the ids that both text encoders read for a text.

use rectiflow_data::{
    overflow::Overflow,
    token::{Cut, Tokenizer},
};
use serde_json::json;

use crate::terminal::answer::Answer;

/// Show the chunks and token ids that both text encoders read for a text.
///
/// A text is cut every 75 tokens; each chunk begins with 49406, ends with 49407 and is padded to 77
/// (CLIP-L with 49407, bigG with 0). At most three chunks are read; of a longer text it says how
/// many tokens are not, and where it is cut. The text is taken as it is: a data set has no
/// backslash before parentheses (`prep.unescape_parentheses`).
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The text, as one quoted argument.
    text: String,
}

pub(crate) fn run(args: &Args) -> Answer {
    let chunks = Tokenizer::new().chunks(&args.text);
    let lists = |chunks: &[[i64; 77]]| {
        chunks
            .iter()
            .map(|chunk| chunk.to_vec())
            .collect::<Vec<_>>()
    };
    let (clip_l, clip_g) = (lists(&chunks.clip_l), lists(&chunks.clip_g));
    let text =
        [("CLIP-L", &clip_l), ("bigG", &clip_g)].map(|(name, chunks)| describe(name, chunks));
    let mut text = text.join("\n");
    let mut json = json!({ "clip_l": clip_l, "clip_g": clip_g });
    if let Some(overflow) = Overflow::of(&args.text, Cut::Plain) {
        text += &format!("\n{}", overflow.describe(&args.text));
        json["overflow"] = json!(overflow);
    }
    Answer::done(text, json)
}

fn describe(name: &str, chunks: &[Vec<i64>]) -> String {
    let mut lines = Vec::new();
    for (index, chunk) in chunks.iter().enumerate() {
        let number = index + 1;
        let ids = ids(chunk);
        lines.push(format!("{name}, chunk {number} of {}: {ids}", chunks.len()));
    }
    lines.join("\n")
}

/// The ids of a chunk, its padding as a count.
fn ids(chunk: &[i64]) -> String {
    let padding = chunk[76];
    let last = chunk.iter().rposition(|&id| id != padding);
    let mut used = last.map_or(2, |last| last + 1).min(77);
    // CLIP-L pads with the end-of-text id, so the first one belongs to the text.
    if padding == chunk[used.min(76)] && padding == END {
        used = (used + 1).min(77);
    }
    let ids: Vec<String> = chunk[..used].iter().map(ToString::to_string).collect();
    let ids = ids.join(" ");
    match 77 - used {
        0 => ids,
        rest => format!("{ids} + {rest} x {padding}"),
    }
}

/// The id that ends a text.
const END: i64 = 49407;
