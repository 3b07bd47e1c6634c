//! Signing again: pictures of a data set whose signatures are lost, or of another version, are read
//! from their source and signed.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use rayon::prelude::*;

use crate::{
    error::Result,
    format::record::{Record, SampleId},
    picture::decode::decode,
    prep::{
        journal::{Holders, Store},
        near_copy::NearCopyEvent,
        signatures::{self, OldRecords, SignatureFile},
    },
    source::{Source, choice::SourceKind},
    text::caption::Reading,
};

/// Most pixels of a picture that is signed again.
const MAX_PIXELS: u64 = 1 << 28;

/// What was signed again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SignedAgain {
    /// Pictures that have a signature now.
    pub signed: u64,
    /// Pictures that are not in the source, have changed, or cannot be read.
    pub missing: u64,
}

/// Signs the pictures of the data set in `root` that have no signature, from their `source`. An
/// interrupted call goes on where it was, object by object.
///
/// # Errors
/// [`NotReady`](crate::Error::NotReady) if a preparation is writing the data set; those of
/// [`Source::list`]; [`Io`](crate::Error::Io).
pub fn sign_again(
    root: &Path,
    source: &Path,
    progress: &mut dyn FnMut(NearCopyEvent),
) -> Result<SignedAgain> {
    let store = Store::open_packed(root, Holders::One)?;
    let mut left = Vec::new();
    let mut num_pictures = 0;
    for object in 0..store.objects.len() {
        let unsigned = unsigned_rows(&store, object)?;
        if !unsigned.is_empty() {
            num_pictures += unsigned.len() as u64;
            left.push((object, unsigned));
        }
    }
    if left.is_empty() {
        return Ok(SignedAgain::default());
    }
    let pictures = Pictures::open(source, &store)?;
    let mut counts = SignedAgain::default();
    for (object, unsigned) in left {
        let signed = pictures.sign(&store, object, &unsigned)?;
        counts.signed += signed;
        counts.missing += unsigned.len() as u64 - signed;
        progress(NearCopyEvent::Signing {
            done: counts.signed + counts.missing,
            num_pictures,
            num_faulty: counts.missing,
        });
    }
    Ok(counts)
}

/// The live rows of an object that have no signature.
fn unsigned_rows(store: &Store, object: usize) -> Result<HashSet<SampleId>> {
    let stored = &store.objects[object];
    let mut rows = HashSet::new();
    for (row, is_deleted) in stored.journal.rows.iter().zip(&stored.deleted) {
        if !is_deleted {
            rows.insert(row.id);
        }
    }
    if let Some(file) = SignatureFile::open(&store.root, &stored.journal.stem)? {
        for id in file.ids()? {
            rows.remove(&id);
        }
    }
    Ok(rows)
}

/// The pictures of a source by their addresses.
struct Pictures {
    source: Source,
    by_address: HashMap<String, usize>,
    background: [u8; 3],
}

impl Pictures {
    fn open(source: &Path, store: &Store) -> Result<Self> {
        let (kind, reading) = (SourceKind::Auto, Reading::default());
        let source = Source::list(source, &store.root, kind, reading)?;
        let mut by_address = HashMap::new();
        for (number, sample) in source.samples().iter().enumerate() {
            by_address.insert(sample.address().to_owned(), number);
        }
        let dataset = store.dataset.as_ref();
        let dataset = dataset.expect("the store has just been opened");
        Ok(Self {
            source,
            by_address,
            background: dataset.manifest().geometry.background,
        })
    }

    /// Writes the signatures of an object, those of `unsigned` rows from their pictures. Returns
    /// the number of pictures that were signed.
    fn sign(&self, store: &Store, object: usize, unsigned: &HashSet<SampleId>) -> Result<u64> {
        let stored = &store.objects[object];
        let dataset = store.dataset.as_ref();
        let dataset = dataset.expect("objects come from a data set");
        let in_manifest = stored.in_manifest;
        let in_manifest = in_manifest.expect("the store has just been opened");
        let records = dataset.object_records(in_manifest)?;
        let stem = &stored.journal.stem;
        let known = OldRecords::read(&store.root, std::iter::once(stem.as_str()))?;
        let signed: Vec<Vec<u8>> = self.source.on_threads(|| {
            let records = records.par_iter();
            let sign = |record: &Record| match unsigned.contains(&record.id) {
                true => self.signed(record).unwrap_or_default(),
                false => known.of(record.id),
            };
            records.map(sign).collect()
        });
        let mut journal = stored.journal.clone();
        journal.signatures_bytes = signatures::write(&store.root, stem, &signed.concat())?;
        store.write_journal(&journal)?;
        let both = records.iter().zip(&signed);
        let is_new = |(record, signed): &(&Record, &Vec<u8>)| {
            unsigned.contains(&record.id) && !signed.is_empty()
        };
        Ok(both.filter(is_new).count() as u64)
    }

    /// The signatures of a row's picture. None if it is not the picture that was packed.
    fn signed(&self, record: &Record) -> Option<Vec<u8>> {
        let sample = &self.source.samples()[*self.by_address.get(&record.source)?];
        let bytes = self.source.open(sample).ok()?;
        if SampleId::of(&bytes) != record.id {
            return None;
        }
        let decoded = decode(&bytes, MAX_PIXELS, self.background).ok()?;
        Some(signatures::records(record.id, &decoded.picture))
    }
}
