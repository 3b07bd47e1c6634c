//! Which pictures have a row, by picture, kind and mode, and which picture an address has.
//!
//! Only hashes are kept: about 40 bytes a row, half a gigabyte for 13 million. Two rows share a
//! hash with probability 5e-6 among as many; the second picture then gets no answer.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rectiflow_data::{
    SampleId,
    annotation::{Annotation, Kind, Status},
};
use xxhash_rust::xxh3::Xxh3;

/// What is known of pictures.
#[derive(Debug, Default)]
pub struct Known {
    rows: HashMap<u64, Status>,
    addresses: HashMap<u64, SampleId>,
    /// Rows that this run is about to write.
    claimed: HashSet<u64>,
}

/// What is known of pictures, shared by the threads of a run.
#[derive(Debug, Clone, Default)]
pub struct Claims(Arc<Mutex<Known>>);

impl Claims {
    /// Claims a picture for this run. False if it has a row, except with a status in `again`, or if
    /// it is claimed already, as a copy at another address is.
    pub fn claim(&self, id: SampleId, kind: Kind, mode: &str, again: &[Status]) -> bool {
        let key = key(id, kind, mode);
        let mut known = self.lock();
        let is_done = known
            .rows
            .get(&key)
            .is_some_and(|status| !again.contains(status));
        !is_done && known.claimed.insert(key)
    }

    /// What is known now.
    pub fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// Adds a row; a later one about the same picture, kind and mode replaces it.
    pub(crate) fn add(&mut self, row: &Annotation) {
        self.rows.insert(key_of(row), row.status);
        self.addresses
            .insert(hash(&[row.source.as_bytes()]), row.id);
    }

    /// What became of a picture.
    pub fn status(&self, id: SampleId, kind: Kind, mode: &str) -> Option<Status> {
        self.rows.get(&key(id, kind, mode)).copied()
    }

    /// The picture that an earlier run found at an address.
    pub fn picture_at(&self, address: &str) -> Option<SampleId> {
        self.addresses.get(&hash(&[address.as_bytes()])).copied()
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// What rows of the same picture, kind and mode share.
pub(crate) fn key_of(row: &Annotation) -> u64 {
    key(row.id, row.kind, &row.mode)
}

fn key(id: SampleId, kind: Kind, mode: &str) -> u64 {
    hash(&[
        &id.0.to_le_bytes(),
        kind.as_str().as_bytes(),
        mode.as_bytes(),
    ])
}

fn hash(parts: &[&[u8]]) -> u64 {
    let mut hasher = Xxh3::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.digest()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_known_by_picture_kind_and_mode() {
        let mut known = Known::default();
        let row = Annotation::new(SampleId(1), "a.png", Kind::Caption, "short");
        known.add(&row);
        assert_eq!(
            known.status(SampleId(1), Kind::Caption, "short"),
            Some(Status::Ok)
        );
        assert_eq!(known.status(SampleId(2), Kind::Caption, "short"), None);
        assert_eq!(known.status(SampleId(1), Kind::Tags, "short"), None);
        assert_eq!(known.status(SampleId(1), Kind::Caption, "long"), None);
        known.add(&Annotation {
            status: Status::Loop,
            ..row
        });
        assert_eq!(
            known.status(SampleId(1), Kind::Caption, "short"),
            Some(Status::Loop)
        );
        assert_eq!((known.len(), known.is_empty()), (1, false));
        assert_eq!(known.picture_at("a.png"), Some(SampleId(1)));
        assert_eq!(known.picture_at("b.png"), None);
    }

    #[test]
    fn a_picture_is_claimed_once() {
        let claims = Claims::default();
        let row = Annotation::new(SampleId(1), "a.png", Kind::Caption, "m");
        let claim = |id, again: &[Status]| claims.claim(SampleId(id), Kind::Caption, "m", again);
        claims.lock().add(&Annotation {
            status: Status::Failed,
            ..row
        });
        assert!(!claim(1, &[]) && !claim(1, &[Status::Loop]));
        assert!(claim(1, &[Status::Failed]));
        assert!(!claim(1, &[Status::Failed]));
        assert!(claim(2, &[]) && !claims.clone().claim(SampleId(2), Kind::Caption, "m", &[]));
    }
}
