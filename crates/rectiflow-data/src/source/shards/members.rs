//! The members of a tar to samples: which text belongs to which picture. Pure, and independent of
//! the order of the members.
//!
//! WebDataset's convention: the key of a member is its path up to the first dot of its file name,
//! and members with one key are one sample. It merges `a_0.5.jpg` and `a_0.7.jpg`. So a text
//! belongs to a picture only where its whole name says so too: `a_0.5.txt` to `a_0.5.jpg`. What the
//! convention joins and the names do not, or the other way round, is named and not used.

use std::collections::HashMap;

use crate::{
    reject::{Reason, Remark},
    source::{
        names::{Kind, Sidecar, classify, stem_of},
        rows::Span,
        sample::{Place, Sample},
        shards::tar_headers::Member,
    },
    text::caption::MAX_SOURCE_BYTES,
};

/// Endings of pictures. Other members of a tar are no pictures: their contents would have to be
/// read to know.
const PICTURE_ENDINGS: [&str; 15] = [
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "avif", "jxl", "bmp", "tif", "tiff",
    "heic", "heif", "ppm",
];

/// Whether a file's name is that of a picture.
pub(crate) fn is_picture(name: &str) -> bool {
    let ending = name
        .rsplit('/')
        .next()
        .and_then(|name| name.rsplit_once('.'));
    ending.is_some_and(|(_, ending)| {
        PICTURE_ENDINGS
            .iter()
            .any(|known| ending.eq_ignore_ascii_case(known))
    })
}

/// A tar whose members are put together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tar<'a> {
    /// The number of the shard, and its name.
    pub(crate) number: u32,
    pub(crate) name: &'a str,
    /// Whether an index says where the members are.
    pub(crate) by_index: bool,
}

/// The members with one key.
#[derive(Debug, Default)]
struct Group {
    pictures: Vec<usize>,
    texts: Vec<(usize, Kind)>,
}

impl Tar<'_> {
    /// Puts `members` together. Returns the samples in the order of their pictures, each with the
    /// JSON that an index has about it.
    pub(crate) fn samples(
        &self,
        members: &[Member],
        remarks: &mut Vec<Remark>,
    ) -> Vec<(Sample, Option<Box<str>>)> {
        let mut groups = HashMap::<&str, Group>::with_capacity(members.len() / 2);
        for (index, member) in members.iter().enumerate() {
            let Some(key) = key_of(&member.name) else {
                continue;
            };
            let group = groups.entry(key).or_default();
            match classify(&member.name).0 {
                Kind::Table(_) => remarks.push(self.table_inside(member)),
                kind @ (Kind::Json | Kind::Caption | Kind::Txt | Kind::Tags) => {
                    group.texts.push((index, kind));
                }
                _ if is_picture(&member.name) => group.pictures.push(index),
                _ => {}
            }
        }
        let mut found: Vec<(usize, Vec<Sidecar>)> = Vec::new();
        let mut groups: Vec<(&str, Group)> = groups.into_iter().collect();
        groups.sort_unstable_by_key(|(key, _)| *key);
        for (key, group) in groups {
            found.extend(self.sample_of(key, group, members, remarks));
        }
        found.sort_unstable_by_key(|(picture, _)| *picture);
        let mut samples = Vec::with_capacity(found.len());
        for (picture, sidecars) in found {
            let member = &members[picture];
            samples.push((self.sample(member, sidecars), member.text.clone()));
        }
        samples
    }

    fn sample(&self, member: &Member, sidecars: Vec<Sidecar>) -> Sample {
        Sample {
            path: self.address(&member.name),
            place: Place::Bytes {
                shard: self.number,
                offset: member.offset,
                bytes: member.bytes,
                by_index: self.by_index,
            },
            sidecars: sidecars.into(),
            lines: Box::default(),
            sha256: member.sha256.clone(),
            listed_px: member.listed_px,
        }
    }

    fn table_inside(&self, member: &Member) -> Remark {
        let detail = "a table in a tar is not read: write its texts as members beside the pictures";
        Remark::new(self.address(&member.name), Reason::UnreadKind, detail)
    }

    fn address(&self, member: &str) -> String {
        format!("{}/{member}", self.name)
    }

    /// The picture of a key and its texts. None, and remarks, without one or with several.
    fn sample_of(
        &self,
        key: &str,
        group: Group,
        members: &[Member],
        remarks: &mut Vec<Remark>,
    ) -> Option<(usize, Vec<Sidecar>)> {
        let mut remark = |index: usize, reason, detail: String| {
            let path = self.address(&members[index].name);
            remarks.push(Remark::new(path, reason, detail));
        };
        if let Some(twice) = first_twice(&group, members) {
            let detail = format!(
                "the tar has members called {twice:?} more than once: nothing of the key {key:?} \
                 is used"
            );
            for index in group.all() {
                remark(index, Reason::AmbiguousKey, detail.clone());
            }
            return None;
        }
        let Some(picture) = only_picture(key, &group, members) else {
            let (reason, detail) = without_one_picture(key, &group, members);
            for index in group
                .pictures
                .iter()
                .chain(group.texts.iter().map(|text| &text.0))
            {
                remark(*index, reason, detail.clone());
            }
            return None;
        };
        for &other in group.pictures.iter().filter(|&&other| other != picture) {
            let detail = format!(
                "the key {key:?}, which ends at the first dot of the name, has the picture {:?}: \
                 rename one",
                members[picture].name
            );
            remark(other, Reason::AmbiguousKey, detail);
        }

        // Texts whose whole name is that of the picture.
        let name = &members[picture].name;
        let stem = stem_of(name);
        let mut sidecars = Vec::with_capacity(group.texts.len());
        for &(index, kind) in &group.texts {
            let text = &members[index];
            let (_, text_stem) = classify(&text.name);
            if text_stem == stem || text_stem == name {
                sidecars.push(sidecar(text, kind));
            } else {
                let detail = format!(
                    "by its key {key:?} it belongs to {name:?}, by the rest of its name it does \
                     not: rename one"
                );
                remark(index, Reason::AmbiguousKey, detail);
            }
        }
        sidecars
            .sort_by(|a, b| (a.kind, a.name.len(), &a.name).cmp(&(b.kind, b.name.len(), &b.name)));
        Some((picture, sidecars))
    }
}

impl Group {
    fn all(&self) -> impl Iterator<Item = usize> {
        let texts = self.texts.iter().map(|text| text.0);
        self.pictures.iter().copied().chain(texts)
    }
}

fn sidecar(text: &Member, kind: Kind) -> Sidecar {
    Sidecar {
        kind,
        name: text.name.clone(),
        span: Some(Span {
            offset: text.offset,
            // A longer one is refused when it is read.
            len: text.bytes.min(MAX_SOURCE_BYTES + 1) as u32,
        }),
    }
}

/// WebDataset's key: the path up to the first dot of the file name. None without a dot, and for
/// hidden files.
fn key_of(path: &str) -> Option<&str> {
    let start = path.rfind('/').map_or(0, |slash| slash + 1);
    let dot = path[start..].find('.')?;
    (dot > 0).then(|| &path[..start + dot])
}

/// A name that two members of a group have.
fn first_twice<'a>(group: &Group, members: &'a [Member]) -> Option<&'a str> {
    let mut names: Vec<&str> = Vec::new();
    for index in group.all() {
        names.push(&members[index].name);
    }
    names.sort_unstable();
    let pair = names.windows(2).find(|pair| pair[0] == pair[1])?;
    Some(pair[0])
}

/// The picture of a group: its only one, or the only one whose name is the key and an ending.
fn only_picture(key: &str, group: &Group, members: &[Member]) -> Option<usize> {
    if let [picture] = group.pictures[..] {
        return Some(picture);
    }
    let mut plain = None;
    for &picture in &group.pictures {
        if stem_of(&members[picture].name) == key && plain.replace(picture).is_some() {
            return None;
        }
    }
    plain
}

fn without_one_picture(key: &str, group: &Group, members: &[Member]) -> (Reason, String) {
    let mut names: Vec<&str> = Vec::new();
    for &picture in group.pictures.iter().take(4) {
        names.push(&members[picture].name);
    }
    if names.is_empty() {
        let detail = format!("the key {key:?} has text and no picture");
        return (Reason::NoPicture, detail);
    }
    let detail = format!(
        "the key {key:?}, which ends at the first dot of the name, has {} pictures ({}): nothing \
         says which text is whose; rename them without the dot",
        group.pictures.len(),
        names.join(", ")
    );
    (Reason::AmbiguousKey, detail)
}
