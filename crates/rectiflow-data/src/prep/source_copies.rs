//! Near-copies among the pictures of a source that is not prepared: each is decoded once, and its
//! signature kept in a work folder.
//!
//! ```text
//! WORK/pictures.jsonl      a fact for each picture that was read: size, time, hash, damage
//! WORK/signatures.bin      the signatures of these
//! WORK/near-copies.jsonl   the result: the list that `prep.without` names
//! ```
//!
//! A killed pass goes on where it was: signatures are appended before the facts of their pictures,
//! and a picture counts as read if it has both.

use std::{
    cmp::Reverse,
    collections::HashSet,
    fs::{self, File},
    path::Path,
    time::Instant,
};

use rayon::prelude::*;

use crate::{
    dedupe::clusters::Cluster,
    error::{Error, Result},
    format::record::SampleId,
    lock_file::lock_alone,
    picture::decode::decode,
    prep::{
        compared::Compared,
        copies_list::{self, NEAR_COPIES_FILE},
        fact::{Fact, Remembered, read_facts},
        near_copies::searched,
        near_copy::{NearCopies, NearCopy, NearCopyCluster, NearCopyEvent, Rank, rank},
        places::{check_places, list_source_in},
        scanned::{append_facts, fact_of},
        scores::Scores,
        settings::PrepSettings,
        signatures::{self, GrowingFile, SignatureFile},
    },
    source::{Source, sample::Sample},
    text::caption::Text,
};

/// Pictures between two appends.
const CHUNK: usize = 256;
/// The files of the work folder.
const FACTS_FILE: &str = "pictures.jsonl";
const SIGNATURES_FILE: &str = "signatures.bin";
const LOCK_FILE: &str = "lock";

/// Finds the near-copies among the pictures of `source` and writes the list of all but the best of
/// each cluster, `near-copies.jsonl` in the folder `work`. Ranks are those of
/// [`find_near_copies`](crate::prep::near_copies::find_near_copies), with the scores of the
/// settings' tables of annotations.
///
/// # Errors
/// [`Error::NotReady`] if another pass uses `work`; [`Error::Invalid`] for settings that cannot
/// work; those of [`Source::list`]; [`Error::Io`].
pub fn find_near_copies_in_source(
    source: &Path,
    work: &Path,
    settings: &PrepSettings,
    progress: &mut dyn FnMut(NearCopyEvent),
) -> Result<NearCopies> {
    let start = Instant::now();
    settings.check(None)?;
    check_places(source, work)?;
    fs::create_dir_all(work).map_err(Error::io(work))?;
    let _lock = lock(work)?;
    let source = list_source_in(source, work, work, settings)?;
    let facts = sign_all(&source, work, settings, progress)?;
    let scores = Scores::read(&settings.annotations)?;
    let pictures = ranked(&source, facts, &scores);
    let ids: Vec<SampleId> = pictures.iter().map(|picture| picture.id).collect();
    let file = SignatureFile::open_path(&work.join(SIGNATURES_FILE))?;
    let compared = Compared::read(&ids, file.into_iter().collect())?;
    let found = searched(&compared, ids.len() as u64, progress)?;
    let clusters = named(&pictures, &compared, &found);
    let mut lines = Vec::new();
    copies_list::add(&mut lines, &clusters);
    copies_list::write(&work.join(NEAR_COPIES_FILE), &lines)?;
    Ok(NearCopies {
        num_pictures: ids.len() as u64,
        num_unsigned: compared.num_unsigned(),
        num_across_splits: 0,
        clusters,
        secs: start.elapsed().as_secs_f64(),
    })
}

/// Locks the work folder. The lock ends with the process.
fn lock(work: &Path) -> Result<File> {
    lock_alone(&work.join(LOCK_FILE))?.ok_or_else(|| Error::NotReady {
        what: work.display().to_string(),
        reason:
            "another search for near-copies uses it: wait until it ends, or name another folder"
                .to_owned(),
    })
}

/// Reads and signs the pictures that are not signed yet. Returns the facts of all, in the order of
/// the source's samples; none of pictures that cannot be read.
fn sign_all(
    source: &Source,
    work: &Path,
    settings: &PrepSettings,
    progress: &mut dyn FnMut(NearCopyEvent),
) -> Result<Vec<Option<Fact>>> {
    let (facts_path, signatures_path) = (work.join(FACTS_FILE), work.join(SIGNATURES_FILE));
    let mut growing = GrowingFile::open(&signatures_path)?;
    let signed: HashSet<SampleId> = match SignatureFile::open_path(&signatures_path)? {
        Some(file) => file.ids()?.into_iter().collect(),
        None => HashSet::new(),
    };
    let mut known = read_facts(&facts_path);
    known.retain(|_, fact| fact.fault.is_some() || signed.contains(&SampleId(fact.id)));
    let mut facts_file = None;
    let mut all = Vec::with_capacity(source.samples().len());
    let mut num_faulty = 0;
    for samples in source.samples().chunks(CHUNK) {
        let read: Vec<Read> = source.on_threads(|| {
            let samples = samples.par_iter();
            samples
                .map(|sample| Read::new(source, sample, &known, settings))
                .collect()
        });
        let mut new = Vec::new();
        for read in &read {
            growing.append(&read.signatures)?;
            new.extend(read.fact.as_ref().filter(|_| !read.is_known));
        }
        append_facts(&facts_path, &mut facts_file, &new)?;
        for read in read {
            let usable = read.fact.filter(|fact| fact.fault.is_none());
            num_faulty += u64::from(usable.is_none());
            all.push(usable);
        }
        progress(NearCopyEvent::Signing {
            done: all.len() as u64,
            num_pictures: source.samples().len() as u64,
            num_faulty,
        });
    }
    Ok(all)
}

/// A picture that was read, or one that an earlier pass has read.
struct Read {
    fact: Option<Fact>,
    is_known: bool,
    /// Its records; none of a known or a faulty one.
    signatures: Vec<u8>,
}

impl Read {
    fn new(source: &Source, sample: &Sample, known: &Remembered, settings: &PrepSettings) -> Self {
        let (fact, content) = fact_of(source, sample, known, settings);
        let mut read = Self {
            is_known: content.is_none(),
            fact: fact.ok(),
            signatures: Vec::new(),
        };
        if let (Some(fact), Some(content)) = (&mut read.fact, content)
            && fact.fault.is_none()
        {
            match decode(&content, settings.max_pixels, settings.background) {
                Ok(decoded) => {
                    read.signatures = signatures::records(SampleId(fact.id), &decoded.picture);
                }
                Err(fault) => fact.fault = Some(fault),
            }
        }
        read
    }
}

/// A picture that is compared.
struct Picture {
    id: SampleId,
    address: String,
    size_px: [u32; 2],
    score: Option<f64>,
    text_bytes: u64,
}

impl Picture {
    fn rank(&self) -> Rank {
        let [width, height] = self.size_px.map(u64::from);
        rank(width * height, self.score, self.text_bytes, self.id)
    }
}

/// The pictures that a preparation would keep, the best first; of equal files the first.
fn ranked(source: &Source, facts: Vec<Option<Fact>>, scores: &Scores) -> Vec<Picture> {
    let both: Vec<(&Sample, Fact)> = source
        .samples()
        .iter()
        .zip(facts)
        .filter_map(|(sample, fact)| Some((sample, fact?)))
        .collect();
    let mut pictures: Vec<Picture> = source.on_threads(|| {
        let both = both.into_par_iter();
        both.filter_map(|(sample, fact)| picture(source, sample, &fact, scores))
            .collect()
    });
    let mut seen = HashSet::new();
    pictures.retain(|picture| seen.insert(picture.id));
    pictures.sort_by_cached_key(|picture| Reverse(picture.rank()));
    pictures
}

/// None for a picture that the filter removes.
fn picture(source: &Source, sample: &Sample, fact: &Fact, scores: &Scores) -> Option<Picture> {
    let id = SampleId(fact.id);
    let texts = source.text_of(sample, id);
    if source
        .removed_by(&texts, fact.width_px, fact.height_px)
        .is_some()
    {
        return None;
    }
    Some(Picture {
        id,
        address: fact.path.clone(),
        size_px: [fact.width_px, fact.height_px],
        score: scores.of(id),
        text_bytes: texts.text.as_ref().map_or(0, text_bytes),
    })
}

/// Bytes of captions and tags.
fn text_bytes(text: &Text) -> u64 {
    let tags = text.tags.iter().chain(&text.important_tags);
    let texts = text.captions.iter().chain(tags);
    texts.map(|text| text.len() as u64).sum()
}

fn named(pictures: &[Picture], compared: &Compared, found: &[Cluster]) -> Vec<NearCopyCluster> {
    let copy = |number: u32| {
        let picture = &pictures[number as usize];
        NearCopy {
            id: picture.id,
            address: picture.address.clone(),
            split: None,
            width_px: picture.size_px[0],
            height_px: picture.size_px[1],
            score: picture.score,
            text_bytes: picture.text_bytes,
            signature: compared.signature_of(number),
        }
    };
    let mut all = Vec::new();
    for cluster in found {
        let mut named = vec![copy(cluster.kept)];
        named.extend(cluster.copies.iter().map(|&number| copy(number)));
        all.push(named);
    }
    all
}
