//! What the sources of a picture's text say together: captions from the first with captions, tags
//! from the first with tags. Pure.

use crate::{
    board::post::Post,
    reject::{Fault, Reason, Remark},
    source::names::Kind,
    text::{
        caption::{Reading, Text, TxtFiles, clean},
        keys::{self, Description},
        tag_list,
    },
};

/// The text of an image, and what was found on the way.
#[derive(Debug, Default)]
pub struct Texts {
    /// None if no source has text.
    pub text: Option<Text>,
    /// Remarks about caption sources that are not used.
    pub remarks: Vec<Remark>,
    /// Keys with text that are not read.
    pub unread: Vec<String>,
    /// Notes about the image, which is used all the same.
    pub notes: Vec<Fault>,
    /// How a source says that the image lies, if not upright.
    pub orientation: Option<String>,
    /// The row of a table of an image board.
    pub(crate) post: Option<Post>,
}

/// A source of an image that was read.
#[derive(Debug)]
struct Parsed {
    name: String,
    kind: Kind,
    description: Description,
}

/// The sources of one image, in the order of precedence.
#[derive(Debug)]
pub(crate) struct TextReader<'a> {
    reading: &'a Reading,
    parsed: Vec<Parsed>,
    remarks: Vec<Remark>,
}

impl<'a> TextReader<'a> {
    /// No source yet.
    pub(crate) fn new(reading: &'a Reading) -> Self {
        Self {
            reading,
            parsed: Vec::new(),
            remarks: Vec::new(),
        }
    }

    /// Adds the source `name` with its bytes. One without text becomes a remark.
    pub(crate) fn add(&mut self, name: String, kind: Kind, bytes: Result<Vec<u8>, String>) {
        match bytes.and_then(|bytes| self.parse(kind, &bytes)) {
            Ok(description) if !description.text.is_empty() => self.parsed.push(Parsed {
                name,
                kind,
                description,
            }),
            Ok(description) => {
                let mut detail = "it has no caption and no tag".to_owned();
                if !description.unread.is_empty() {
                    detail += "; it has text under keys that are not read: ";
                    detail += &description.unread.join(", ");
                }
                self.remark(name, Reason::BadCaption, detail);
            }
            Err(detail) => self.remark(name, Reason::BadCaption, detail),
        }
    }

    /// Adds a source whose text is known.
    pub(crate) fn add_text(&mut self, name: String, text: Text) {
        self.parsed.push(Parsed {
            name,
            kind: Kind::Json,
            description: Description {
                text,
                ..Description::default()
            },
        });
    }

    fn remark(&mut self, name: String, reason: Reason, detail: String) {
        self.remarks.push(Remark::new(name, reason, detail));
    }

    fn parse(&self, kind: Kind, bytes: &[u8]) -> Result<Description, String> {
        let text = match (kind, self.reading.txt_files) {
            (Kind::Json, _) => return keys::read(bytes, self.reading),
            (Kind::Tags, _) | (Kind::Txt, TxtFiles::Tags) => Text::from_tags(bytes, self.reading),
            _ => Text::from_txt(bytes, self.reading),
        };
        Ok(Description {
            text: text?,
            ..Description::default()
        })
    }

    /// The text of the image at the address `path`.
    pub(crate) fn finish(self, path: &str) -> Texts {
        let is_list = self.lists_of_tags();
        let mut texts = Texts {
            remarks: self.remarks,
            ..Texts::default()
        };
        let mut all = Text::default();
        for (source, is_list) in self.parsed.into_iter().zip(is_list) {
            let Description {
                mut text,
                unread,
                unsplit_tags,
                orientation,
            } = source.description;
            texts.unread.extend(unread);
            texts.orientation = texts.orientation.or(orientation);
            if let Some(tags) = unsplit_tags {
                texts.notes.push(unsplit(&source.name, &tags));
            }
            if is_list {
                text = as_tags(&text, self.reading);
            }
            if !all.absorb(text, self.reading) {
                let detail = second_caption(path);
                texts
                    .remarks
                    .push(Remark::new(source.name, Reason::SecondCaption, detail));
            }
        }
        texts.text = (!all.is_empty()).then_some(all);
        texts
    }

    /// Which sources are text files whose caption is a list of tags: it reads like one, and another
    /// source has another caption. kohya's scripts and taggers write such pairs.
    fn lists_of_tags(&self) -> Vec<bool> {
        let separator = self.reading.tag_separator;
        let mut is_list = Vec::with_capacity(self.parsed.len());
        for (index, source) in self.parsed.iter().enumerate() {
            let captions = &source.description.text.captions;
            let could_be = source.kind == Kind::Txt && self.reading.txt_files == TxtFiles::Auto;
            is_list.push(
                could_be
                    && has_other_captions(&self.parsed, index)
                    && captions
                        .iter()
                        .all(|caption| tag_list::reads_like_tags(caption, separator)),
            );
        }
        is_list
    }
}

/// The captions of a text as tags.
fn as_tags(text: &Text, reading: &Reading) -> Text {
    let mut tags = Vec::new();
    for caption in &text.captions {
        tags.extend(tag_list::split(caption, reading.tag_separator));
    }
    Text {
        tags: clean(tags, reading),
        ..Text::default()
    }
}

/// Whether sources other than `index` have captions, none of them one of its own.
fn has_other_captions(parsed: &[Parsed], index: usize) -> bool {
    let own = &parsed[index].description.text.captions;
    let mut num_others = 0;
    for (other, source) in parsed.iter().enumerate() {
        let captions = &source.description.text.captions;
        if other == index {
            continue;
        }
        if captions.iter().any(|caption| own.contains(caption)) {
            return false;
        }
        num_others += captions.len();
    }
    num_others > 0
}

/// The note about a string of tags that is read as one tag.
fn unsplit(name: &str, tags: &str) -> Fault {
    let shown: String = tags.chars().take(60).collect();
    let detail = format!(
        "{name}: {shown:?} is read as one tag, since it has no comma; tag_separator = \"space\" in \
         [prep] splits it"
    );
    Fault::new(Reason::UnsplitTags, detail)
}

/// The detail of a remark about a caption source that is not used for the image `path`.
fn second_caption(path: &str) -> String {
    format!("the text of {path} comes from a source with precedence, which says something else")
}
