//! The facts about a picture's bytes, and the files that keep them between runs.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    format::record::SampleId,
    picture::decode,
    prep::settings::PrepSettings,
    reject::{Fault, Reason},
    source::Stamp,
};

/// Facts by the address of the picture.
pub(crate) type Remembered = HashMap<String, Fact>;

/// Facts about a file's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fact {
    pub(crate) path: String,
    pub(crate) bytes: u64,
    /// The version of its file, which is the modification time on a disk.
    pub(crate) mtime_ns: u128,
    pub(crate) id: u64,
    pub(crate) width_px: u32,
    pub(crate) height_px: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) fault: Option<Fault>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<Fault>,
}

impl Fact {
    /// The fact about the bytes `content` of the file `path`.
    pub(crate) fn new(path: &str, stamp: Stamp, content: &[u8], settings: &PrepSettings) -> Self {
        let mut fact = Self {
            path: path.to_owned(),
            bytes: stamp.bytes,
            mtime_ns: stamp.version,
            id: SampleId::of(content).0,
            width_px: 0,
            height_px: 0,
            fault: None,
            note: None,
        };
        match decode::inspect(content, settings.max_pixels) {
            Ok(header) => {
                fact.width_px = header.width_px;
                fact.height_px = header.height_px;
            }
            Err(fault) => fact.fault = Some(fault),
        }
        fact
    }

    /// Whether a file with this stamp has this fact under every setting.
    pub(crate) fn is_current(&self, stamp: Stamp) -> bool {
        let is_too_large =
            matches!(&self.fault, Some(fault) if fault.reason == Reason::TooManyPixels);
        (self.bytes, self.mtime_ns) == (stamp.bytes, stamp.version) && !is_too_large
    }

    pub(crate) fn to_line(&self) -> String {
        serde_json::to_string(self).expect("a fact is strings and numbers")
    }
}

/// The file with the facts of an unfinished pass.
pub(crate) fn part_of(memory: &Path) -> PathBuf {
    memory.with_extension("part.jsonl")
}

/// The facts of an earlier run, by path. Files with unreadable facts are read again.
pub(crate) fn read_facts(memory: &Path) -> Remembered {
    let mut facts = HashMap::new();
    let Ok(file) = File::open(memory) else {
        return facts;
    };
    let lines = BufReader::new(file).lines();
    for line in lines.map_while(std::result::Result::ok) {
        if let Ok(fact) = serde_json::from_str::<Fact>(&line) {
            facts.insert(fact.path.clone(), fact);
        }
    }
    facts
}
