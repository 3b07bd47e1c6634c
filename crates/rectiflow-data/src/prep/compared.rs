//! The signatures of many pictures, compared: keys in memory, thumbnails read when they are needed.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use rayon::prelude::*;

use crate::{
    dedupe::{
        MAX_DISTANCE,
        clusters::{Cluster, View, candidates, clusters, confirmed},
        key::Keys,
        signature::Signature,
        thumbnail::{Limits, Thumbnail},
    },
    error::{Error, Result},
    format::record::SampleId,
    prep::signatures::SignatureFile,
};

/// The place of a view's signature.
#[derive(Debug, Clone, Copy)]
struct Place {
    file: u32,
    record: u32,
}

/// The signatures of pictures, which are numbered by rank, the best first.
pub(crate) struct Compared {
    num_pictures: usize,
    views: Vec<View>,
    places: Vec<Place>,
    files: Vec<SignatureFile>,
    /// The first error of reading a thumbnail.
    failed: Mutex<Option<Error>>,
}

impl Compared {
    /// Reads the keys of pictures, `ranked` by their ids, from files. Other pictures' signatures
    /// are left out.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn read(ranked: &[SampleId], files: Vec<SignatureFile>) -> Result<Self> {
        let mut numbers = HashMap::new();
        for (number, id) in (0..).zip(ranked) {
            numbers.insert(*id, number);
        }
        let read = |(number, file): (usize, &SignatureFile)| {
            let mut found = Vec::new();
            file.each(|record, entry| {
                if let Some(&picture) = numbers.get(&entry.id) {
                    let keys = Keys::new(&entry.signature);
                    let file = number as u32;
                    found.push((View { picture, keys }, Place { file, record }));
                }
            })?;
            Ok(found)
        };
        let all: Result<Vec<Vec<(View, Place)>>> = files.par_iter().enumerate().map(read).collect();
        let mut all: Vec<(View, Place)> = all?.into_iter().flatten().collect();
        all.sort_by_key(|(view, place)| (view.picture, place.file, place.record));
        let (views, places) = all.into_iter().unzip();
        Ok(Self {
            num_pictures: ranked.len(),
            views,
            places,
            files,
            failed: Mutex::new(None),
        })
    }

    /// Number of pictures without a signature.
    pub(crate) fn num_unsigned(&self) -> u64 {
        let signed = self.views.chunk_by(|a, b| a.picture == b.picture).count();
        (self.num_pictures - signed) as u64
    }

    /// The clusters of near-copies. `confirming` is called with the number of candidates.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a signature cannot be read.
    pub(crate) fn clusters(&self, confirming: &mut dyn FnMut(u64)) -> Result<Vec<Cluster>> {
        let limits = Limits::default();
        let thumbnail = |view: u32| Thumbnail::new(&self.signature(view));
        let candidates = candidates(&self.views, MAX_DISTANCE, &thumbnail, &limits);
        confirming(candidates.len() as u64);
        let pairs = confirmed(&self.views, &candidates, &thumbnail, &limits);
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        match failed.as_ref() {
            None => Ok(clusters(self.num_pictures, &pairs)),
            Some(error) => Err(Error::Invalid {
                what: "signatures".to_owned(),
                reason: error.to_string(),
            }),
        }
    }

    /// The first signature of a picture, of the whole of it.
    pub(crate) fn signature_of(&self, picture: u32) -> Signature {
        let first = self.views.partition_point(|view| view.picture < picture);
        self.signature(first as u32)
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
}
