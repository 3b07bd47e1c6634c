//! The signatures of an object's pictures, for near-copies: `prep/signatures/STEM.bin`.
//!
//! A picture has one record, or two if it has borders, of the whole and of the part inside: its id
//! (8 bytes, little-endian) and the signature. Pictures stand in the order of the object's rows.
//! The file is derived from the pictures; without it near-copies among them are not found.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{BufReader, ErrorKind, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{
    dedupe::signature::Signature,
    durable,
    error::{Error, Result},
    format::record::SampleId,
    picture::Picture,
};

/// The folder of the files.
pub(crate) const SIGNATURES_FOLDER: &str = "prep/signatures";
/// Bytes of a record.
pub(crate) const RECORD_BYTES: usize = 8 + Signature::BYTES;

/// The file of an object.
pub(crate) fn signatures_name(stem: &str) -> String {
    format!("{SIGNATURES_FOLDER}/{stem}.bin")
}

/// The records of a decoded picture.
pub(crate) fn records(id: SampleId, picture: &Picture) -> Vec<u8> {
    let (width, height) = (picture.width_px() as usize, picture.height_px() as usize);
    let (whole, inside) = Signature::of(picture.pixels(), width, height);
    let mut bytes = Vec::with_capacity(2 * RECORD_BYTES);
    push(&mut bytes, id, &whole);
    if let Some(inside) = inside {
        push(&mut bytes, id, &inside);
    }
    bytes
}

fn push(bytes: &mut Vec<u8>, id: SampleId, signature: &Signature) {
    bytes.extend_from_slice(&id.0.to_le_bytes());
    bytes.extend_from_slice(&signature.to_bytes());
}

/// Writes the file of an object.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn write(root: &Path, stem: &str, bytes: &[u8]) -> Result<()> {
    let folder = root.join(SIGNATURES_FOLDER);
    fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    durable::write(&root.join(signatures_name(stem)), bytes)
}

/// A record.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) id: SampleId,
    pub(crate) signature: Signature,
}

/// The file of signatures of an object, open.
#[derive(Debug)]
pub(crate) struct SignatureFile {
    path: PathBuf,
    file: File,
}

impl SignatureFile {
    /// Opens the file of an object. None if it has none.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn open(root: &Path, stem: &str) -> Result<Option<Self>> {
        let path = root.join(signatures_name(stem));
        match File::open(&path) {
            Ok(file) => Ok(Some(Self { path, file })),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::Io { path, source }),
        }
    }

    /// Passes each record to `take`, with its number. A torn last record is left out.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn each(&self, mut take: impl FnMut(u32, Entry)) -> Result<()> {
        let mut reader = BufReader::with_capacity(1 << 18, &self.file);
        let mut bytes = [0; RECORD_BYTES];
        for number in 0.. {
            match reader.read_exact(&mut bytes) {
                Ok(()) => take(number, entry(&bytes)),
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(Error::io(&self.path)(error)),
            }
        }
        Ok(())
    }

    /// The signature of record `number`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn signature(&self, number: u32) -> Result<Signature> {
        let mut bytes = [0; RECORD_BYTES];
        let offset = u64::from(number) * RECORD_BYTES as u64;
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(Error::io(&self.path))?;
        Ok(entry(&bytes).signature)
    }
}

fn entry(bytes: &[u8; RECORD_BYTES]) -> Entry {
    let (id, rest) = bytes.split_at(8);
    let id = u64::from_le_bytes(id.try_into().expect("eight bytes were split off"));
    let signature = rest.try_into().expect("the rest is a signature");
    Entry {
        id: SampleId(id),
        signature: Signature::from_bytes(signature),
    }
}

/// The records of pictures that are packed again without being decoded.
#[derive(Debug, Default)]
pub(crate) struct OldRecords(HashMap<SampleId, Vec<u8>>);

impl OldRecords {
    /// Reads the files of these objects.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn read<'a>(root: &Path, stems: impl Iterator<Item = &'a str>) -> Result<Self> {
        let mut all = HashMap::<SampleId, Vec<u8>>::new();
        for stem in stems {
            let Some(file) = SignatureFile::open(root, stem)? else {
                continue;
            };
            file.each(|_, entry| {
                let bytes = all.entry(entry.id).or_default();
                push(bytes, entry.id, &entry.signature);
            })?;
        }
        Ok(Self(all))
    }

    /// The records of a picture; empty if there are none.
    pub(crate) fn of(&self, id: SampleId) -> Vec<u8> {
        self.0.get(&id).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_as_they_were_written_and_a_torn_one_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = Vec::new();
        for number in 0..3u8 {
            let mut picture = Picture::filled(64, 48, [255; 3]);
            // Inside of a border, so that there are two records.
            picture.fill(10, 10, 44, 28, [90 * number, 40, 200]);
            bytes.extend(records(SampleId(number.into()), &picture));
        }
        assert_eq!(bytes.len(), 6 * RECORD_BYTES);
        write(folder.path(), "64x48-00000", &bytes[..bytes.len() - 1]).unwrap();
        let file = SignatureFile::open(folder.path(), "64x48-00000")
            .unwrap()
            .unwrap();
        let mut found = Vec::new();
        file.each(|number, entry| {
            assert_eq!(file.signature(number).unwrap(), entry.signature);
            found.push(entry.id.0);
        })
        .unwrap();
        assert_eq!(found, [0, 0, 1, 1, 2]);
        let old = OldRecords::read(folder.path(), ["64x48-00000", "none"].into_iter()).unwrap();
        assert_eq!(
            old.of(SampleId(1)),
            bytes[2 * RECORD_BYTES..4 * RECORD_BYTES]
        );
        assert!(old.of(SampleId(9)).is_empty());
    }
}
