//! The result of one picture in the first pass, before the comparison with others: its fact, its
//! text's fingerprint, and what is to be said about both.

use std::{fs::File, io::Write, ops::Range, path::Path};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    format::record::SampleId,
    picture::decode,
    prep::{
        fact::{Fact, Remembered},
        kept_pictures::KeptPictures,
        settings::PrepSettings,
        text_notes::text_notes,
    },
    reject::{Fault, Reason, Remark},
    source::{Source, sample::Sample},
    text::caption::Text,
};

/// The result of one file, before the comparison with others.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Scanned {
    pub(crate) fact: std::result::Result<Fact, Fault>,
    /// Whether the fact comes from an earlier run.
    #[serde(skip)]
    pub(crate) known: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) text: Option<u64>,
    /// The clause of the filter that removes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) removed_by: Option<usize>,
    /// Why there is no text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) missing_text: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) remarks: Vec<Remark>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) notes: Vec<Fault>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) unread: Vec<String>,
}

impl Scanned {
    /// Whether the picture cannot be used, whatever the others are.
    pub(crate) fn is_faulty(&self) -> bool {
        match &self.fact {
            Ok(fact) => fact.fault.is_some(),
            Err(_) => true,
        }
    }
}

/// Scans the samples `files` in parallel. Reads only pictures without a current fact, which are
/// offered to `kept`.
pub(crate) fn scan_files(
    source: &Source,
    files: Range<usize>,
    remembered: &Remembered,
    kept: &KeptPictures,
    settings: &PrepSettings,
) -> Vec<Scanned> {
    source.on_threads(|| {
        files
            .into_par_iter()
            .map(|file| scan_file(source, file, remembered, kept, settings))
            .collect()
    })
}

fn scan_file(
    source: &Source,
    file: usize,
    remembered: &Remembered,
    kept: &KeptPictures,
    settings: &PrepSettings,
) -> Scanned {
    let found = &source.samples[file];
    let (fact, content) = fact_of(source, found, remembered, settings);
    let known = content.is_none() && fact.is_ok();
    let mut scanned = Scanned {
        fact,
        known,
        text: None,
        removed_by: None,
        missing_text: String::new(),
        remarks: Vec::new(),
        notes: Vec::new(),
        unread: Vec::new(),
    };
    if matches!(&scanned.fact, Ok(fact) if fact.fault.is_none()) {
        scan_text(source, found, settings, &mut scanned);
    }
    if scanned.text.is_some()
        && let Some(content) = content
    {
        kept.offer(file, content);
    }
    scanned
}

/// Reads the text of an image.
fn scan_text(source: &Source, found: &Sample, settings: &PrepSettings, scanned: &mut Scanned) {
    let mut texts = match &scanned.fact {
        Ok(fact) => source.text_of(found, SampleId(fact.id)),
        Err(_) => source.text(found),
    };
    // A row of a table can be about a picture of which no text stays.
    texts.text = texts
        .text
        .filter(|text| !text.is_empty() || settings.keep_captionless);
    if let Ok(fact) = &scanned.fact {
        scanned.removed_by = source.removed_by(&texts, fact.width_px, fact.height_px);
        if scanned.removed_by.is_some() {
            return;
        }
    }
    scanned.remarks = texts.remarks;
    scanned.notes = texts.notes;
    scanned.unread = texts.unread;
    if let Some(orientation) = texts.orientation
        && lies_as_stored(source, found, settings)
    {
        let detail = format!(
            "its JSON says {orientation:?}, and the picture has no orientation: it may have been \
             written again without one; look at it, and turn it if it lies on its side"
        );
        scanned
            .notes
            .push(Fault::new(Reason::LostOrientation, detail));
    }
    let text = match texts.text {
        None if settings.keep_captionless => Text::default(),
        None => {
            scanned.missing_text = source.missing_text(found);
            return;
        }
        Some(text) => text,
    };
    scanned.notes.extend(text_notes(&text));
    scanned.text = Some(text.fingerprint(&found.path));
}

/// Whether an image has no EXIF orientation of its own.
fn lies_as_stored(source: &Source, found: &Sample, settings: &PrepSettings) -> bool {
    let bytes = source.open(found).unwrap_or_default();
    decode::is_upright(&bytes, settings.max_pixels)
}

/// The fact about a picture, and its bytes unless the fact comes from an earlier run.
pub(crate) fn fact_of(
    source: &Source,
    found: &Sample,
    remembered: &Remembered,
    settings: &PrepSettings,
) -> (std::result::Result<Fact, Fault>, Option<Vec<u8>>) {
    let stamp = match source.stamp(found) {
        Ok(stamp) => stamp,
        Err(fault) => return (Err(fault), None),
    };
    if let Err(fault) = check_length(stamp.bytes, settings) {
        return (Err(fault), None);
    }
    if let Some(fact) = remembered.get(&found.path)
        && fact.is_current(stamp)
    {
        return (Ok(fact.clone()), None);
    }
    let content = match source.open(found) {
        Ok(content) => content,
        Err(fault) => return (Err(fault), None),
    };
    if let Err(fault) = check_length(content.len() as u64, settings) {
        return (Err(fault), None);
    }
    let fact = Fact::new(&found.path, stamp, &content, settings);
    (Ok(fact), Some(content))
}

fn check_length(bytes: u64, settings: &PrepSettings) -> std::result::Result<(), Fault> {
    let max_file_mib = settings.max_file_mib;
    if bytes > u64::from(max_file_mib) << 20 {
        let detail = format!("{bytes} bytes, max_file_mib is {max_file_mib}");
        return Err(Fault::new(Reason::FileTooLarge, detail));
    }
    Ok(())
}

/// Appends new facts to the part file, which the first of them creates.
pub(crate) fn append(path: &Path, file: &mut Option<File>, scanned: &[Scanned]) -> Result<()> {
    let new = scanned.iter().filter(|scanned| !scanned.known);
    let facts: Vec<&Fact> = new
        .filter_map(|scanned| scanned.fact.as_ref().ok())
        .collect();
    append_facts(path, file, &facts)
}

/// Appends facts to a file, which the first of them creates. It is not flushed to the disk: a power
/// cut loses the last facts.
pub(crate) fn append_facts(path: &Path, file: &mut Option<File>, facts: &[&Fact]) -> Result<()> {
    if facts.is_empty() {
        return Ok(());
    }
    let mut lines = String::new();
    for fact in facts {
        // The newline before a line ends one that a killed run left half written.
        lines.push('\n');
        lines.push_str(&fact.to_line());
    }
    if file.is_none() {
        let options = File::options().append(true).create(true).open(path);
        *file = Some(options.map_err(Error::io(path))?);
    }
    let file = file.as_mut().expect("it was just opened");
    file.write_all(lines.as_bytes()).map_err(Error::io(path))
}
