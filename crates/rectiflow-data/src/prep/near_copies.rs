//! Near-copies among the pictures of a data set: finds them by their signatures, and takes all but
//! the best of each cluster out of the data set.
//!
//! The list of these, `copies_list`, is a file in the data set that preparations honour. Nothing is
//! encoded or deleted; without the list the next preparation brings the pictures back.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    path::Path,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use serde::Serialize;

pub use crate::prep::copies_list::NEAR_COPIES_FILE;

use crate::{
    dataset::Dataset,
    dedupe::{
        clusters::{Cluster, View, candidates, clusters, confirmed},
        signature::Signature,
        thumbnail::{Limits, Thumbnail},
    },
    error::{Error, Result},
    format::{
        manifest::Split,
        record::{Record, SampleId},
    },
    picture::Picture,
    prep::{
        copies_list::{self, Line, digits},
        journal::{Holders, Store, Stored},
        signatures::SignatureFile,
    },
};

/// Bits of 256 in which the keys of copies differ at most.
const MAX_DISTANCE: u32 = crate::dedupe::MAX_DISTANCE;

/// A picture of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NearCopy {
    /// Its hash.
    pub id: SampleId,
    /// Its address in the source.
    pub address: String,
    /// Its split.
    pub split: Split,
    /// Width of the picture as it was prepared.
    pub width_px: u32,
    /// Height of the picture as it was prepared.
    pub height_px: u32,
    /// Bytes of its captions and tags.
    pub text_bytes: u64,
    /// Its thumbnail.
    #[serde(skip)]
    pub signature: Signature,
}

impl NearCopy {
    /// The thumbnail that was compared, its longer side `side_px` long. It is blurred, since it has
    /// 32 x 32 cells of light and 8 x 8 of colour.
    pub fn thumbnail(&self, side_px: u32) -> Picture {
        let longer = self.width_px.max(self.height_px).max(1);
        let side = |px: u32| (px * side_px / longer).max(1);
        let (width, height) = (side(self.width_px), side(self.height_px));
        let mut pixels = Vec::with_capacity(3 * width as usize * height as usize);
        for y in 0..height {
            for x in 0..width {
                let at = [(x, width), (y, height)];
                let at = at.map(|(at, of)| (at as f32 + 0.5) / of as f32);
                pixels.extend_from_slice(&self.signature.colour_at(at[0], at[1]));
            }
        }
        Picture::new(width, height, pixels)
    }
}

/// Copies of one picture, the best first: the one that stays.
pub type NearCopyCluster = Vec<NearCopy>;

/// The near-copies of a data set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NearCopies {
    /// Pictures that were compared.
    pub num_pictures: u64,
    /// Pictures without a signature: they were prepared by an earlier version.
    pub num_unsigned: u64,
    /// Clusters in which pictures of both splits are.
    pub num_across_splits: u64,
    /// The clusters, by the rank of the picture that stays.
    pub clusters: Vec<NearCopyCluster>,
    /// Duration.
    pub secs: f64,
}

/// Progress of the search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum NearCopyEvent {
    /// Texts and signatures are read.
    Reading {
        /// Objects so far.
        done: u64,
        /// Objects of the data set.
        num_objects: u64,
    },
    /// The keys of all pictures are compared.
    Comparing {
        /// Pictures.
        num_pictures: u64,
    },
    /// The thumbnails of candidates are compared.
    Confirming {
        /// Pairs of pictures.
        num_pairs: u64,
    },
}

/// Finds the near-copies among the live rows of the data set in the folder `root`.
///
/// Of a cluster the picture with the most pixels stays; of equal ones that with the longest text,
/// then that with the smaller hash.
///
/// # Errors
/// Those of [`Dataset::open`]; [`Error::Io`] if signatures cannot be read.
pub fn find_near_copies(
    root: &Path,
    progress: &mut dyn FnMut(NearCopyEvent),
) -> Result<NearCopies> {
    let start = Instant::now();
    let store = open(root, Holders::Workers)?;
    let pictures = Pictures::read(&store, progress)?;
    let found = pictures.clusters(progress)?;
    let mut all = Vec::new();
    let mut num_across_splits = 0;
    for cluster in pictures.named(&store, &found)? {
        let first = cluster[0].split;
        num_across_splits += u64::from(cluster.iter().any(|copy| copy.split != first));
        all.push(cluster);
    }
    Ok(NearCopies {
        num_pictures: pictures.rows.len() as u64,
        num_unsigned: pictures.num_unsigned,
        num_across_splits,
        clusters: all,
        secs: start.elapsed().as_secs_f64(),
    })
}

/// Takes all but the first picture of each cluster out of the data set in `root`, and adds them to
/// its list. Returns the number of rows that are marked deleted.
///
/// # Errors
/// [`Error::NotReady`] if a preparation is writing it; [`Error::Io`].
pub fn drop_near_copies(root: &Path, found: &NearCopies) -> Result<u64> {
    let mut store = open(root, Holders::One)?;
    let mut lines = copies_list::read(root)?;
    let known: HashSet<String> = lines.iter().map(|line| line.drop.clone()).collect();
    for cluster in &found.clusters {
        let kept = &cluster[0];
        for copy in &cluster[1..] {
            if !known.contains(&digits(copy.id)) {
                lines.push(Line {
                    drop: digits(copy.id),
                    address: copy.address.clone(),
                    keep: digits(kept.id),
                    kept_address: kept.address.clone(),
                });
            }
        }
    }
    copies_list::write(root, &lines)?;
    let dropped = copies_list::left_out(root)?;
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

/// The data set in `root` with its journals.
fn open(root: &Path, holders: Holders) -> Result<Store> {
    let dataset = Dataset::open(root)?;
    let manifest = dataset.manifest();
    Store::open(root, &manifest.codec, &manifest.geometry, holders)
}

/// What decides which picture of a cluster stays: the greatest.
type Rank = (u64, u64, Reverse<u64>);

fn rank(record: &Record) -> Rank {
    let pixels = u64::from(record.original_width_px) * u64::from(record.original_height_px);
    (pixels, text_bytes(record), Reverse(record.id.0))
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

/// A row with a signature, by rank.
#[derive(Debug, Clone, Copy)]
struct Row {
    id: SampleId,
    object: u32,
    number: u32,
}

/// The place of a view's signature.
#[derive(Debug, Clone, Copy)]
struct Place {
    file: u32,
    record: u32,
}

/// The pictures of a data set, the best first.
struct Pictures {
    rows: Vec<Row>,
    views: Vec<View>,
    places: Vec<Place>,
    files: Vec<SignatureFile>,
    num_unsigned: u64,
    /// The first error of reading a thumbnail.
    failed: Mutex<Option<Error>>,
}

impl Pictures {
    fn read(store: &Store, progress: &mut dyn FnMut(NearCopyEvent)) -> Result<Self> {
        let mut ranked: Vec<(Rank, Row)> = Vec::new();
        for (object, stored) in store.objects.iter().enumerate() {
            let records = records(store, stored)?;
            for (number, (record, is_deleted)) in (0..).zip(records.iter().zip(&stored.deleted)) {
                if *is_deleted {
                    continue;
                }
                let row = Row {
                    id: record.id,
                    object: object as u32,
                    number,
                };
                ranked.push((rank(record), row));
            }
            progress(NearCopyEvent::Reading {
                done: object as u64 + 1,
                num_objects: store.objects.len() as u64,
            });
        }
        ranked.sort_unstable_by_key(|(rank, _)| Reverse(*rank));
        let mut pictures = Self {
            rows: ranked.into_iter().map(|(_, row)| row).collect(),
            views: Vec::new(),
            places: Vec::new(),
            files: Vec::new(),
            num_unsigned: 0,
            failed: Mutex::new(None),
        };
        pictures.read_views(store)?;
        Ok(pictures)
    }

    /// Reads the keys of all signatures, in the order of their pictures' rank.
    fn read_views(&mut self, store: &Store) -> Result<()> {
        let mut numbers = HashMap::new();
        for (number, row) in (0..).zip(&self.rows) {
            numbers.insert(row.id, number);
        }
        let mut all: Vec<(View, Place)> = Vec::new();
        for stored in &store.objects {
            let Some(file) = SignatureFile::open(&store.root, &stored.journal.stem)? else {
                continue;
            };
            let number = self.files.len() as u32;
            file.each(|record, entry| {
                let Some(&picture) = numbers.get(&entry.id) else {
                    return;
                };
                let view = View {
                    picture,
                    keys: entry.signature.keys,
                };
                let file = number;
                all.push((view, Place { file, record }));
            })?;
            self.files.push(file);
        }
        all.sort_by_key(|(view, place)| (view.picture, place.file, place.record));
        let mut signed = HashSet::new();
        for (view, place) in all {
            signed.insert(view.picture);
            self.views.push(view);
            self.places.push(place);
        }
        self.num_unsigned = (self.rows.len() - signed.len()) as u64;
        Ok(())
    }

    fn clusters(&self, progress: &mut dyn FnMut(NearCopyEvent)) -> Result<Vec<Cluster>> {
        let num_pictures = self.rows.len() as u64;
        progress(NearCopyEvent::Comparing { num_pictures });
        let limits = Limits::default();
        let thumbnail = |view: u32| Thumbnail::new(&self.signature(view));
        let candidates = candidates(&self.views, MAX_DISTANCE, &thumbnail, &limits);
        progress(NearCopyEvent::Confirming {
            num_pairs: candidates.len() as u64,
        });
        let pairs = confirmed(&self.views, &candidates, &thumbnail, &limits);
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        match failed.as_ref() {
            None => Ok(clusters(self.rows.len(), &pairs)),
            Some(error) => Err(Error::Invalid {
                what: "signatures".to_owned(),
                reason: error.to_string(),
            }),
        }
    }

    /// The signature of a view. An error is kept for the end, and a signature without detail stands
    /// in for it.
    fn signature(&self, view: u32) -> Signature {
        let Place { file, record } = self.places[view as usize];
        match self.files[file as usize].signature(record) {
            Ok(signature) => signature,
            Err(error) => {
                let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
                failed.get_or_insert(error);
                Signature::from_bytes(&[0; Signature::BYTES])
            }
        }
    }

    /// The pictures of clusters with their addresses.
    fn named(&self, store: &Store, found: &[Cluster]) -> Result<Vec<NearCopyCluster>> {
        let mut first_view = HashMap::new();
        for (number, view) in (0..).zip(&self.views) {
            first_view.entry(view.picture).or_insert(number);
        }
        // Each object's text is read once.
        let mut wanted: Vec<u32> = Vec::new();
        for cluster in found {
            wanted.push(cluster.kept);
            wanted.extend(&cluster.copies);
        }
        wanted.sort_by_key(|&picture| self.rows[picture as usize].object);
        let mut copies = HashMap::new();
        for same_object in wanted.chunk_by(|a, b| self.object_of(*a) == self.object_of(*b)) {
            let stored = &store.objects[self.object_of(same_object[0])];
            let records = records(store, stored)?;
            for &picture in same_object {
                let record = &records[self.rows[picture as usize].number as usize];
                copies.insert(
                    picture,
                    NearCopy {
                        id: record.id,
                        address: record.source.clone(),
                        split: stored.journal.split,
                        width_px: record.original_width_px,
                        height_px: record.original_height_px,
                        text_bytes: text_bytes(record),
                        signature: self.signature(first_view[&picture]),
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

    fn object_of(&self, picture: u32) -> usize {
        self.rows[picture as usize].object as usize
    }
}
