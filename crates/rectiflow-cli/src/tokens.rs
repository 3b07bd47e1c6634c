//! `rectiflow tokens`: the ids that both text encoders read for a text.

use rectiflow_data::token::Tokenizer;
use serde_json::json;

use crate::terminal::answer::Answer;

/// Show the chunks and token ids that both text encoders read for a text.
///
/// A text is cut every 75 tokens; each chunk begins with 49406, ends with 49407 and is padded to 77
/// (CLIP-L with 49407, bigG with 0). At most three chunks are read.
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
    Answer::done(
        text.join("\n"),
        json!({ "clip_l": clip_l, "clip_g": clip_g }),
    )
}

fn describe(name: &str, chunks: &[Vec<i64>]) -> String {
    let describe_chunk = |(index, chunk): (usize, &Vec<i64>)| {
        let padding = chunk[76];
        let used = chunk
            .iter()
            .rposition(|&id| id != padding)
            .map_or(2, |last| last + 1);
        // CLIP-L pads with the end-of-text id, so the first one belongs to the text.
        let used = if padding == chunk[used.min(76)] && padding == END {
            used + 1
        } else {
            used
        };
        let ids: Vec<String> = chunk[..used.min(77)]
            .iter()
            .map(ToString::to_string)
            .collect();
        let rest = 77 - used.min(77);
        let padding = if rest == 0 {
            String::new()
        } else {
            format!(" + {rest} x {padding}")
        };
        format!(
            "{name}, chunk {} of {}: {}{padding}",
            index + 1,
            chunks.len(),
            ids.join(" ")
        )
    };
    chunks
        .iter()
        .enumerate()
        .map(describe_chunk)
        .collect::<Vec<_>>()
        .join("\n")
}

/// The id that ends a text.
const END: i64 = 49407;
