//! The index beside a tar: JSON with the place of each member, as deepghs (hfutils, cheesechaser)
//! and webshart write it. A listing then reads no header.
//!
//! `{"filesize": 10240, "files": {"a/1.jpg": {"offset": 512, "size": 77, "sha256": "..."}}}`;
//! webshart writes `length` for `size`, or a list of entries that have a path, and width and
//! height, which are read from the picture itself. It can also hold the texts of a picture. The
//! index is compared with its tar: its length and a few headers when it is listed, and the header
//! of each picture when it is read.

use std::{collections::HashSet, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_json::{Value, json};

use crate::{
    error::Result,
    source::shards::{
        shard::Shard,
        tar_headers::{BLOCK_BYTES, Member, check},
    },
};

/// Largest index in bytes.
const MAX_INDEX_BYTES: u64 = 1 << 30;

#[derive(Deserialize)]
struct Index {
    #[serde(default, alias = "tar_size")]
    filesize: Option<u64>,
    files: Files,
}

/// The members in the order of the index; a name can come twice.
struct Files(Vec<(String, Entry)>);

#[derive(Deserialize)]
struct Entry {
    #[serde(default, alias = "fname", alias = "filename")]
    path: Option<String>,
    #[serde(default)]
    offset: Option<u64>,
    #[serde(default, alias = "length")]
    size: Option<u64>,
    #[serde(default)]
    sha256: Option<String>,
    /// For a listing alone: a preparation reads the size from the picture.
    #[serde(default, deserialize_with = "side_px")]
    width: Option<u32>,
    #[serde(default, deserialize_with = "side_px")]
    height: Option<u32>,
    /// The JSON about the picture, a member that need not have an entry.
    #[serde(default)]
    json_path: Option<String>,
    #[serde(default)]
    json_offset: Option<u64>,
    #[serde(default)]
    json_length: Option<u64>,
    /// The same JSON, or the captions in it.
    #[serde(default)]
    json_metadata: Option<Value>,
    #[serde(default, alias = "caption")]
    captions: Option<Value>,
}

impl<'de> Deserialize<'de> for Files {
    fn deserialize<D: Deserializer<'de>>(json: D) -> std::result::Result<Self, D::Error> {
        json.deserialize_any(FilesVisitor)
    }
}

struct FilesVisitor;

impl<'de> Visitor<'de> for FilesVisitor {
    type Value = Files;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or a list with an entry for each member")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Files, A::Error> {
        let mut files = Vec::new();
        while let Some(entry) = map.next_entry()? {
            files.push(entry);
        }
        Ok(Files(files))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Files, A::Error> {
        let mut files = Vec::new();
        while let Some(entry) = list.next_element::<Entry>()? {
            files.push((entry.path.clone().unwrap_or_default(), entry));
        }
        Ok(Files(files))
    }
}

/// The members of `tar` by its `index`, in the order of their places.
///
/// # Errors
/// [`crate::Error::Io`], [`crate::Error::Remote`]; what the index and the tar disagree about is the
/// inner error.
pub(crate) fn members(
    index: &Shard,
    tar: &Shard,
) -> Result<std::result::Result<Vec<Member>, String>> {
    if index.bytes > MAX_INDEX_BYTES {
        return Ok(Err(format!("it is longer than {MAX_INDEX_BYTES} bytes")));
    }
    let json = index.read(0..index.bytes)?;
    let members = match parse(&json, tar.bytes) {
        Ok(members) => members,
        Err(reason) => return Ok(Err(reason)),
    };
    if let Err(reason) = compare(&members, tar)? {
        return Ok(Err(reason));
    }
    Ok(Ok(members))
}

fn parse(json: &[u8], tar_bytes: u64) -> std::result::Result<Vec<Member>, String> {
    let index: Index = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    if let Some(expected) = index.filesize
        && expected != tar_bytes
    {
        return Err(format!(
            "it is about a tar of {expected} bytes, this one has {tar_bytes}"
        ));
    }
    let mut members = Vec::with_capacity(index.files.0.len());
    let mut linked = Vec::new();
    for (name, entry) in index.files.0 {
        linked.extend(linked_json(&entry));
        let member = entry.member(name)?;
        let end = member.offset.checked_add(member.bytes);
        if member.offset < BLOCK_BYTES || end.is_none_or(|end| end > tar_bytes) {
            return Err(format!(
                "{:?} has {} bytes from byte {} on, and the tar ends at {tar_bytes}",
                member.name, member.bytes, member.offset
            ));
        }
        members.push(member);
    }

    // JSON that only the entry of its picture names.
    let names: HashSet<String> = members.iter().map(|member| member.name.clone()).collect();
    for member in linked {
        let end = member.offset.checked_add(member.bytes);
        if !names.contains(&member.name) && end.is_some_and(|end| end <= tar_bytes) {
            members.push(member);
        }
    }
    members.sort_by_key(|member| member.offset);
    Ok(members)
}

impl Entry {
    fn member(self, name: String) -> std::result::Result<Member, String> {
        let (Some(offset), Some(bytes)) = (self.offset, self.size) else {
            return Err(format!("{name:?} has no offset, or no size"));
        };
        let captions = self.captions.filter(|captions| !captions.is_null());
        let captions = captions.map(|captions| json!({ "captions": captions }));
        let text = self.json_metadata.filter(Value::is_object).or(captions);
        Ok(Member {
            name: name.trim_start_matches("./").to_owned(),
            offset,
            bytes,
            sha256: self.sha256.as_deref().and_then(digest).map(Box::new),
            listed_px: [self.width, self.height].map(|side| side.unwrap_or(0)),
            text: text.map(|text| text.to_string().into()),
        })
    }
}

/// A side in pixels. None for what is no such number.
fn side_px<'de, D: Deserializer<'de>>(json: D) -> std::result::Result<Option<u32>, D::Error> {
    let side = Value::deserialize(json)?.as_u64();
    Ok(side.and_then(|side| u32::try_from(side).ok()))
}

/// The JSON about a picture as a member.
fn linked_json(entry: &Entry) -> Option<Member> {
    Some(Member {
        name: entry
            .json_path
            .as_ref()?
            .trim_start_matches("./")
            .to_owned(),
        offset: entry.json_offset?,
        bytes: entry.json_length?,
        sha256: None,
        listed_px: [0; 2],
        text: None,
    })
}

/// Compares the first, the middle and the last member with their headers.
fn compare(members: &[Member], tar: &Shard) -> Result<std::result::Result<(), String>> {
    let last = members.len().saturating_sub(1);
    for at in [0, last / 2, last] {
        let Some(member) = members.get(at) else {
            break;
        };
        let header = tar.read(member.offset - BLOCK_BYTES..member.offset)?;
        if let Err(reason) = check(&header, &member.name, member.bytes) {
            let Member { name, offset, .. } = member;
            return Ok(Err(format!("{name:?} at byte {offset}: {reason}")));
        }
    }
    Ok(Ok(()))
}

/// The bytes of a SHA-256 in hexadecimal.
fn digest(hex: &str) -> Option<[u8; 32]> {
    let digits = hex.as_bytes();
    let mut digest = [0; 32];
    if digits.len() != 64 {
        return None;
    }
    for (byte, pair) in digest.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = (high * 16 + low) as u8;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_tools_write_places_that_are_read() {
        let sha = "ab".repeat(32);
        let json = format!(
            r#"{{"filesize": 4096, "hash": "x", "files": {{
                "b.jpg": {{"offset": 1536, "size": 5, "sha256": "{sha}"}},
                "./a.jpg": {{"offset": 512, "length": 9, "width": 3, "aspect": 1.5}}}}}}"#
        );
        let members = parse(json.as_bytes(), 4096).unwrap();
        let found: Vec<_> = members
            .iter()
            .map(|member| (member.name.as_str(), member.offset, member.bytes))
            .collect();
        assert_eq!(found, [("a.jpg", 512, 9), ("b.jpg", 1536, 5)]);
        assert_eq!(members[1].sha256.as_deref(), Some(&[0xab; 32]));
        assert!(members[0].sha256.is_none());
        assert_eq!(
            [members[0].listed_px, members[1].listed_px],
            [[3, 0], [0, 0]]
        );
        let list = br#"{"files": [{"fname": "c.jpg", "offset": 512, "size": 3, "captions": "a fox",
            "json_path": "c.json", "json_offset": 2048, "json_length": 7}]}"#;
        let members = parse(list, 4096).unwrap();
        assert_eq!(members[0].text.as_deref(), Some(r#"{"captions":"a fox"}"#));
        assert_eq!(
            (members[1].name.as_str(), members[1].offset),
            ("c.json", 2048)
        );
    }

    #[test]
    fn what_an_index_gets_wrong_is_named() {
        for (json, part) in [
            (r#"{"filesize": 99, "files": {}}"#, "a tar of 99 bytes"),
            (
                r#"{"files": {"a": {"offset": 512}}}"#,
                "no offset, or no size",
            ),
            (
                r#"{"files": {"a": {"offset": 0, "size": 1}}}"#,
                "from byte 0 on",
            ),
            (
                r#"{"files": {"a": {"offset": 512, "size": 9000}}}"#,
                "ends at 4096",
            ),
            (
                r#"{"files": {"a": {"offset": 18446744073709551615, "size": 9}}}"#,
                "ends at 4096",
            ),
            (r#"{"files": [1]}"#, "invalid type"),
            (r#"{"files": 1}"#, "invalid type"),
            ("{", "EOF"),
        ] {
            let reason = parse(json.as_bytes(), 4096).unwrap_err();
            assert!(reason.contains(part), "{json}: {reason}");
        }
    }
}
