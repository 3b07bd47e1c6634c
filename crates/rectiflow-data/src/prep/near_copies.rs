//! Near-copies among the pictures of a data set: finds them by their signatures, and takes all but
//! the best of each cluster out of the data set.
//!
//! The list of these, `copies_list`, is a file in the data set that preparations honour. Nothing is
//! encoded or deleted; without the list the next preparation brings the pictures back.

use std::{cmp::Reverse, collections::HashMap, path::Path, time::Instant};

pub use crate::prep::{
    copies_list::NEAR_COPIES_FILE,
    near_copy::{NearCopies, NearCopy, NearCopyCluster, NearCopyEvent},
};

use crate::{
    dedupe::clusters::Cluster,
    error::Result,
    format::record::{Record, SampleId},
    prep::{
        compared::Compared,
        copies_list,
        journal::{Holders, Store, Stored},
        near_copy::{Rank, rank},
        places::usable_annotations,
        scores::Scores,
        signatures::SignatureFile,
    },
};

/// Finds the near-copies among the live rows of the data set in the folder `root`.
///
/// Of a cluster the picture with the most pixels stays; of equal ones that with the highest score
/// in the tables of annotations that the data set was prepared with, where a score is more than
/// none; then that with the longest text, then that with the smaller hash.
///
/// # Errors
/// Those of [`Dataset::open`](crate::Dataset::open); [`Io`](crate::Error::Io) if signatures cannot
/// be read; [`Malformed`](crate::Error::Malformed) for a damaged table of annotations.
pub fn find_near_copies(
    root: &Path,
    progress: &mut dyn FnMut(NearCopyEvent),
) -> Result<NearCopies> {
    let start = Instant::now();
    let store = Store::open_packed(root, Holders::Workers)?;
    let scores = Scores::read(&usable_annotations(root)?)?;
    let rows = ranked_rows(&store, &scores, progress)?;
    let ids: Vec<SampleId> = rows.iter().map(|row| row.id).collect();
    let mut files = Vec::new();
    for stored in &store.objects {
        files.extend(SignatureFile::open(root, &stored.journal.stem)?);
    }
    let compared = Compared::read(&ids, files)?;
    let found = searched(&compared, rows.len() as u64, progress)?;
    let clusters = named(&store, &rows, (&compared, &scores), &found)?;
    let is_across =
        |cluster: &&NearCopyCluster| cluster.iter().any(|c| c.split != cluster[0].split);
    Ok(NearCopies {
        num_pictures: rows.len() as u64,
        num_unsigned: compared.num_unsigned(),
        num_across_splits: clusters.iter().filter(is_across).count() as u64,
        clusters,
        secs: start.elapsed().as_secs_f64(),
    })
}

/// The clusters, with their progress.
pub(crate) fn searched(
    compared: &Compared,
    num_pictures: u64,
    progress: &mut dyn FnMut(NearCopyEvent),
) -> Result<Vec<Cluster>> {
    progress(NearCopyEvent::Comparing { num_pictures });
    compared.clusters(&mut |num_pairs| progress(NearCopyEvent::Confirming { num_pairs }))
}

/// Takes all but the first picture of each cluster out of the data set in `root`, and adds them to
/// its list. Returns the number of rows that are marked deleted.
///
/// # Errors
/// [`NotReady`](crate::Error::NotReady) if a preparation is writing it; [`Io`](crate::Error::Io).
pub fn drop_near_copies(root: &Path, found: &NearCopies) -> Result<u64> {
    let mut store = Store::open_packed(root, Holders::One)?;
    let mut lines = copies_list::read(&root.join(NEAR_COPIES_FILE))?;
    copies_list::add(&mut lines, &found.clusters);
    copies_list::write(&root.join(NEAR_COPIES_FILE), &lines)?;
    let dropped = copies_list::left_out(root, &[])?;
    let mut num_rows = 0;
    for stored in &mut store.objects {
        for (row, is_deleted) in stored.journal.rows.iter().zip(&mut stored.deleted) {
            if dropped.contains_key(&row.id) && !*is_deleted {
                *is_deleted = true;
                num_rows += 1;
            }
        }
    }
    if num_rows > 0 {
        store.commit()?;
    }
    Ok(num_rows)
}

/// Bytes of the captions and tags of a row.
fn text_bytes(record: &Record) -> u64 {
    let tags = record.tags.iter().chain(&record.important_tags);
    let texts = record.captions.iter().chain(tags);
    texts.map(|text| text.len() as u64).sum()
}

/// The records of an object of the data set.
fn records(store: &Store, stored: &Stored) -> Result<Vec<Record>> {
    let dataset = store.dataset.as_ref();
    let dataset = dataset.expect("objects come from a data set");
    let object = stored.in_manifest;
    dataset.object_records(object.expect("the store has just been opened"))
}

/// A live row.
#[derive(Debug, Clone, Copy)]
struct Row {
    id: SampleId,
    object: u32,
    number: u32,
}

/// The live rows, the best first.
fn ranked_rows(
    store: &Store,
    scores: &Scores,
    progress: &mut dyn FnMut(NearCopyEvent),
) -> Result<Vec<Row>> {
    let mut ranked: Vec<(Rank, Row)> = Vec::new();
    for (object, stored) in store.objects.iter().enumerate() {
        let records = records(store, stored)?;
        for (number, (record, is_deleted)) in (0..).zip(records.iter().zip(&stored.deleted)) {
            if *is_deleted {
                continue;
            }
            let id = record.id;
            let pixels = u64::from(record.original_width_px) * u64::from(record.original_height_px);
            let rank = rank(pixels, scores.of(id), text_bytes(record), id);
            let object = object as u32;
            ranked.push((rank, Row { id, object, number }));
        }
        progress(NearCopyEvent::Reading {
            done: object as u64 + 1,
            num_objects: store.objects.len() as u64,
        });
    }
    ranked.sort_unstable_by_key(|(rank, _)| Reverse(*rank));
    Ok(ranked.into_iter().map(|(_, row)| row).collect())
}

/// The pictures of clusters with their addresses.
fn named(
    store: &Store,
    rows: &[Row],
    (compared, scores): (&Compared, &Scores),
    found: &[Cluster],
) -> Result<Vec<NearCopyCluster>> {
    // Each object's text is read once.
    let mut wanted: Vec<u32> = Vec::new();
    for cluster in found {
        wanted.push(cluster.kept);
        wanted.extend(&cluster.copies);
    }
    let object_of = |picture: u32| rows[picture as usize].object as usize;
    wanted.sort_by_key(|&picture| object_of(picture));
    let mut copies = HashMap::new();
    for same_object in wanted.chunk_by(|a, b| object_of(*a) == object_of(*b)) {
        let stored = &store.objects[object_of(same_object[0])];
        let records = records(store, stored)?;
        for &picture in same_object {
            let record = &records[rows[picture as usize].number as usize];
            copies.insert(
                picture,
                NearCopy {
                    id: record.id,
                    address: record.source.clone(),
                    split: Some(stored.journal.split),
                    width_px: record.original_width_px,
                    height_px: record.original_height_px,
                    score: scores.of(record.id),
                    text_bytes: text_bytes(record),
                    signature: compared.signature_of(picture),
                },
            );
        }
    }
    let mut all = Vec::new();
    for cluster in found {
        let mut named = vec![copies[&cluster.kept].clone()];
        named.extend(cluster.copies.iter().map(|copy| copies[copy].clone()));
        all.push(named);
    }
    Ok(all)
}
