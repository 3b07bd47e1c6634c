//! Notes about texts that are used, though the text encoders do not read them as a user may expect.

use crate::{
    reject::{Fault, Reason},
    text::{caption::Text, overflow::Overflow, token::Cut},
};

/// A1111's word for the end of a chunk.
const BREAK: &str = "BREAK";

/// Notes about texts that the text encoders do not read as the user may expect.
pub(crate) fn text_notes(text: &Text) -> Vec<Fault> {
    let mut notes = Vec::new();
    for caption in &text.captions {
        if let Some(overflow) = Overflow::of(caption, Cut::Plain) {
            let detail = format!("a caption of {}", overflow.describe(caption));
            notes.push(Fault::new(Reason::LongCaption, detail));
        }
        if caption.split_whitespace().any(|word| word == BREAK) {
            let detail = "a caption has the word BREAK, which begins no new chunk here: it is \
                          taught as a word, which is how ComfyUI reads it";
            notes.push(Fault::new(Reason::BreakWord, detail));
        }
    }
    let mut tags = text.important_tags.clone();
    tags.extend_from_slice(&text.tags);
    let tags = tags.join(", ");
    if let Some(overflow) = Overflow::of(&tags, Cut::Plain) {
        let detail = format!("all tags together are {}", overflow.describe(&tags));
        notes.push(Fault::new(Reason::LongCaption, detail));
    }
    notes
}
