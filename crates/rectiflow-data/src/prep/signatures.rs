//! The signatures of an object's pictures, for near-copies: `prep/signatures/STEM.bin`.
//!
//! The file begins with [`HEAD`], whose last byte is the version of the signatures. A picture has
//! one record, or two if it has borders, of the whole and of the part inside: its id (8 bytes,
//! little-endian) and the signature. Pictures stand in the order of the object's rows. The file is
//! derived from the pictures; without it, or with a file of another version, near-copies among them
//! are not found until they are signed again (`prep/sign`). Version 1 had no head.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{BufReader, ErrorKind, Read, Seek, SeekFrom, Write},
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
/// The first bytes of a file.
const HEAD: [u8; 8] = *b"RFSIGN\0\x02";
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

/// Writes the file of an object with these records. Returns its length.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn write(root: &Path, stem: &str, records: &[u8]) -> Result<u64> {
    let folder = root.join(SIGNATURES_FOLDER);
    fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    let bytes = [&HEAD, records].concat();
    durable::write(&root.join(signatures_name(stem)), &bytes)?;
    Ok(bytes.len() as u64)
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
    /// Opens the file of an object. None if it has none, or one of another version.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn open(root: &Path, stem: &str) -> Result<Option<Self>> {
        Self::open_path(&root.join(signatures_name(stem)))
    }

    /// Opens a file. None if it is not there, or of another version.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn open_path(path: &Path) -> Result<Option<Self>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(path)(error)),
        };
        let path = path.to_owned();
        let mut head = [0; HEAD.len()];
        match file.read_exact_at(&mut head, 0) {
            Ok(()) => Ok((head == HEAD).then_some(Self { path, file })),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(Error::io(path)(error)),
        }
    }

    /// The number of whole records.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn num_records(&self) -> Result<u64> {
        let metadata = self.file.metadata().map_err(Error::io(&self.path))?;
        let bytes = metadata.len().saturating_sub(HEAD.len() as u64);
        Ok(bytes / RECORD_BYTES as u64)
    }

    /// The ids of all records, in their order.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn ids(&self) -> Result<Vec<SampleId>> {
        let mut ids = Vec::new();
        for number in 0..self.num_records()? {
            let mut id = [0; 8];
            let read = self.file.read_exact_at(&mut id, offset(number));
            read.map_err(Error::io(&self.path))?;
            ids.push(SampleId(u64::from_le_bytes(id)));
        }
        Ok(ids)
    }

    /// Passes each record to `take`, with its number. A torn last record is left out.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn each(&self, mut take: impl FnMut(u32, Entry)) -> Result<()> {
        let mut bytes = [0; RECORD_BYTES];
        let mut reader = BufReader::with_capacity(1 << 18, &self.file);
        let start = reader.seek(SeekFrom::Start(offset(0)));
        start.map_err(Error::io(&self.path))?;
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
        self.file
            .read_exact_at(&mut bytes, offset(number.into()))
            .map_err(Error::io(&self.path))?;
        Ok(entry(&bytes).signature)
    }
}

/// Where a record begins.
fn offset(number: u64) -> u64 {
    HEAD.len() as u64 + number * RECORD_BYTES as u64
}

/// A file of signatures that grows, picture by picture.
#[derive(Debug)]
pub(crate) struct GrowingFile {
    path: PathBuf,
    file: File,
}

impl GrowingFile {
    /// Opens the file at `path` behind its last whole record, or begins a new one. One of another
    /// version is replaced.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let end = match SignatureFile::open_path(path)? {
            Some(file) => offset(file.num_records()?),
            None => 0,
        };
        let mut options = File::options();
        let file = options.create(true).write(true).truncate(false).open(path);
        let mut file = file.map_err(Error::io(path))?;
        file.set_len(end).map_err(Error::io(path))?;
        file.seek(SeekFrom::End(0)).map_err(Error::io(path))?;
        if end == 0 {
            file.write_all(&HEAD).map_err(Error::io(path))?;
        }
        let path = path.to_owned();
        Ok(Self { path, file })
    }

    /// Appends records.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn append(&mut self, records: &[u8]) -> Result<()> {
        self.file.write_all(records).map_err(Error::io(&self.path))
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
    fn a_file_of_another_version_is_none() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "a", &[7; RECORD_BYTES]).unwrap();
        let path = folder.path().join(signatures_name("a"));
        let good = fs::read(&path).unwrap();
        assert!(SignatureFile::open(folder.path(), "a").unwrap().is_some());
        let newer = [&good[..7], &[3], &good[8..]].concat();
        // Version 1 began with the first record.
        for bytes in [&newer[..], &good[8..], &good[..5], b""] {
            fs::write(&path, bytes).unwrap();
            assert!(SignatureFile::open(folder.path(), "a").unwrap().is_none());
        }
    }

    #[test]
    fn a_growing_file_goes_on_behind_its_last_whole_record() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("signatures.bin");
        let record = |id: u64| records(SampleId(id), &Picture::filled(40, 30, [9; 3]));
        let mut file = GrowingFile::open(&path).unwrap();
        file.append(&record(1)).unwrap();
        file.append(&record(2)[..100]).unwrap();
        let mut file = GrowingFile::open(&path).unwrap();
        file.append(&record(3)).unwrap();
        let ids = SignatureFile::open_path(&path)
            .unwrap()
            .unwrap()
            .ids()
            .unwrap();
        assert_eq!(ids, [SampleId(1), SampleId(3)]);
        fs::write(&path, b"of another version").unwrap();
        GrowingFile::open(&path)
            .unwrap()
            .append(&record(4))
            .unwrap();
        let ids = SignatureFile::open_path(&path)
            .unwrap()
            .unwrap()
            .ids()
            .unwrap();
        assert_eq!(ids, [SampleId(4)]);
    }

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
