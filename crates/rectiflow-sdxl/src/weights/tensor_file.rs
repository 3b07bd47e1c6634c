//! safetensors files: read through a memory map, and written as a stream with one tensor in memory
//! at a time.
//!
//! The `safetensors` crate parses and validates the header (sizes, offsets, no gaps, no overlaps).
//! A tensor's bytes are read on request and their pages released after the copy, so that reading a
//! model of any size needs memory for its largest tensor only. Files are not written by that crate,
//! because its metadata is a hash map, whose order differs between runs: the bytes written here
//! depend only on the tensors. A file appears under its name only when it is complete and on disk.
//!
//! Not here: the meaning of the names (`weights`, `keys`).

use std::{
    cmp::{Ordering, Reverse},
    collections::BTreeMap,
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::{Mmap, UncheckedAdvice};
use safetensors::{Dtype, SafeTensors, tensor::TensorInfo};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, TchError, Tensor};

use crate::{
    durable::write_atomically,
    error::{Error, Result},
    torch::ffi::tensor_over,
    weights::header_problem::{check_name, explained, something_else},
};

/// The format's name in messages.
const KIND: &str = "safetensors file";

/// Largest number of dimensions of a tensor; weights have 4.
const MAX_DIMENSIONS: usize = 8;

/// An open safetensors file.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
    /// The number of bytes before the tensors.
    data_start: usize,
}

#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<i64>,
    start: usize,
    end: usize,
}

/// The contents of a file's header.
struct Header {
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
    data_start: usize,
}

impl Header {
    /// Reads the header of a file with these bytes; an error is the reason why it has none.
    fn read(bytes: &[u8]) -> std::result::Result<Self, String> {
        if let Some(what) = something_else(bytes) {
            return Err(what.into());
        }
        let header = SafeTensors::read_metadata(bytes);
        let (header_bytes, header) = header.map_err(|error| explained(&error, bytes))?;
        let data_start = header_bytes + size_of::<u64>();
        let mut entries = BTreeMap::new();
        for (name, info) in header.tensors() {
            check_name(&name)?;
            let Some(entry) = Entry::new(info, data_start) else {
                return Err(format!("tensor {name} has an impossible shape"));
            };
            entries.insert(name, entry);
        }
        let metadata = header.metadata().clone().unwrap_or_default();
        Ok(Self {
            entries,
            metadata: metadata.into_iter().collect(),
            data_start,
        })
    }
}

impl Entry {
    /// Returns `None` for a shape that no tensor has.
    fn new(info: &TensorInfo, data_start: usize) -> Option<Self> {
        if info.shape.len() > MAX_DIMENSIONS {
            return None;
        }
        let mut shape = Vec::new();
        for &n in &info.shape {
            shape.push(i64::try_from(n).ok()?);
        }
        let (start, end) = info.data_offsets;
        Some(Self {
            dtype: info.dtype,
            shape,
            start: data_start + start,
            end: data_start + end,
        })
    }
}

/// Returns a constructor of [`Error::Malformed`] for `path`, for `map_err`.
fn malformed(path: &Path) -> impl FnOnce(String) -> Error {
    let path = path.to_owned();
    move |reason| Error::Malformed {
        path,
        kind: KIND,
        reason,
    }
}

impl TensorFile {
    /// Opens a file and validates its header. The file must not change while it is open, because it
    /// is memory-mapped.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::Malformed`] if it is not a safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is read-only and private to this value. If another process truncated the
        // file, SIGBUS would end this one, as every program that maps its input.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let Header {
            entries,
            metadata,
            data_start,
        } = Header::read(&map).map_err(malformed(path))?;
        Ok(Self {
            path: path.to_owned(),
            map,
            entries,
            metadata,
            data_start,
        })
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Returns the `__metadata__` of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Returns the shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        Some(&self.entries.get(name)?.shape)
    }

    /// Returns the dtype of a tensor; `None` if there is no such tensor or libtorch lacks the
    /// dtype.
    pub fn kind(&self, name: &str) -> Option<Kind> {
        kind_of(self.entries.get(name)?.dtype)
    }

    /// Returns the format's name of a tensor's dtype, for messages; empty if there is no such
    /// tensor.
    pub fn dtype_name(&self, name: &str) -> String {
        self.entries
            .get(name)
            .map_or_else(String::new, |entry| format!("{:?}", entry.dtype))
    }

    /// Returns the raw little-endian bytes of a tensor.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        let entry = self.entries.get(name)?;
        Some(&self.map[entry.start..entry.end])
    }

    /// Returns the SHA-256 of all tensors' bytes, as "0x" and 64 hexadecimal digits. Reads the
    /// whole file.
    pub(crate) fn sha256(&self) -> String {
        const PIECE_BYTES: usize = 64 << 20;
        let mut hash = Sha256::new();
        let mut start = self.data_start;
        for piece in self.map[self.data_start..].chunks(PIECE_BYTES) {
            hash.update(piece);
            self.release(start, piece.len());
            start += piece.len();
        }
        hash_text(hash)
    }

    /// Returns a copy of a tensor in CPU memory, in the dtype of the file.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no such tensor, [`Error::Malformed`] if libtorch lacks its
    /// dtype.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let (entry, kind) = self.entry(name)?;
        let tensor =
            Tensor::f_from_data_size(&self.map[entry.start..entry.end], &entry.shape, kind)
                .map_err(Error::torch(format!(
                    "{}: reading tensor {name}",
                    self.path.display()
                )))?;
        self.release_pages(name);
        Ok(tensor)
    }

    /// Returns a tensor of floating-point numbers or bytes that is a view of the file; it must not
    /// be written. The file stays open while any view of it exists.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    ///
    /// # Panics
    /// If the tensor has another dtype.
    pub fn mapped(self: &Arc<Self>, name: &str) -> Result<Tensor> {
        let (entry, kind) = self.entry(name)?;
        tensor_over(
            &self.map[entry.start..entry.end],
            &entry.shape,
            kind,
            self.clone(),
        )
        .map_err(Error::torch(format!(
            "{}: mapping tensor {name}",
            self.path.display()
        )))
    }

    fn entry(&self, name: &str) -> Result<(&Entry, Kind)> {
        let Some(entry) = self.entries.get(name) else {
            let names: Vec<_> = self.names().take(20).collect();
            return Err(Error::Missing {
                path: self.path.clone(),
                what: format!("tensor {name}"),
                hint: format!("the file has {}", names.join(", ")),
            });
        };
        if let Some(kind) = kind_of(entry.dtype) {
            return Ok((entry, kind));
        }
        let dtype = entry.dtype;
        let reason = format!("tensor {name} has dtype {dtype:?}, which is not supported");
        Err(malformed(&self.path)(reason))
    }

    /// Releases a tensor's pages from this process's memory, after a copy or while it is not in
    /// use. They stay in the system's cache.
    pub fn release_pages(&self, name: &str) {
        let Some(entry) = self.entries.get(name) else {
            return;
        };
        self.release(entry.start, entry.end - entry.start);
    }

    /// Releases the pages of a range of the file.
    fn release(&self, start: usize, length: usize) {
        // SAFETY: the map is a read-only file map: the next access reads the same bytes from the
        // file.
        let advised = unsafe {
            self.map
                .unchecked_advise_range(UncheckedAdvice::DontNeed, start, length)
        };
        // This is advice: if the system ignores it, the bytes only stay resident longer.
        drop(advised);
    }
}

/// Returns libtorch's dtype for a dtype of the format.
fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::BOOL => Kind::Bool,
        Dtype::U8 => Kind::Uint8,
        Dtype::I8 => Kind::Int8,
        Dtype::I16 => Kind::Int16,
        Dtype::I32 => Kind::Int,
        Dtype::I64 => Kind::Int64,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        Dtype::F8_E4M3 => Kind::Float8e4m3fn,
        Dtype::F8_E5M2 => Kind::Float8e5m2,
        Dtype::F8_E4M3FNUZ => Kind::Float8e4m3fnuz,
        Dtype::F8_E5M2FNUZ => Kind::Float8e5m2fnuz,
        _ => return None,
    })
}

/// Returns the format's name of libtorch's dtype.
fn dtype_name(kind: Kind) -> Option<&'static str> {
    Some(match kind {
        Kind::Bool => "BOOL",
        Kind::Uint8 => "U8",
        Kind::Int8 => "I8",
        Kind::Int16 => "I16",
        Kind::Int => "I32",
        Kind::Int64 => "I64",
        Kind::Half => "F16",
        Kind::BFloat16 => "BF16",
        Kind::Float => "F32",
        Kind::Double => "F64",
        _ => return None,
    })
}

/// Writes tensors as a safetensors file, atomically. The same tensors and metadata result in the
/// same bytes, in any order of the input. `kind` converts floating-point tensors; others keep their
/// dtype.
///
/// # Errors
/// [`Error::Io`] if writing fails (`path` is then unchanged), [`Error::Invalid`] for a dtype that
/// the format lacks or a name that occurs twice.
pub fn write_tensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    kind: Option<Kind>,
    metadata: &[(&str, &str)],
) -> Result<()> {
    let tensors: Vec<(&str, &Tensor)> = tensors.into_iter().collect();
    let mut planned = Vec::new();
    for (name, tensor) in &tensors {
        planned.push(Planned {
            name: (*name).to_owned(),
            kind: stored_kind(tensor.kind(), kind),
            shape: tensor.size(),
        });
    }
    let tensors: BTreeMap<&str, &Tensor> = tensors.into_iter().collect();
    let metadata = Metadata {
        entries: metadata,
        hash: None,
    };
    write_streamed(path, planned, metadata, &mut |name| {
        Ok(tensors[name].shallow_clone())
    })
}

/// The `__metadata__` of a file to be written.
#[derive(Debug, Clone, Copy)]
pub struct Metadata<'a> {
    /// Keys and values.
    pub entries: &'a [(&'a str, &'a str)],
    /// The key of an additional entry: the SHA-256 of all bytes after the header, as "0x" and 64
    /// hexadecimal digits.
    pub hash: Option<&'a str>,
}

/// The value in the header until the hash is known.
const NO_HASH: &str = "0x0000000000000000000000000000000000000000000000000000000000000000";

/// A tensor to be written to a file, before it is loaded.
#[derive(Debug, Clone)]
pub struct Planned {
    /// Its name in the file.
    pub name: String,
    /// Its dtype in the file.
    pub kind: Kind,
    /// Its shape in the file.
    pub shape: Vec<i64>,
}

/// As [`write_tensors`], for tensors that exceed the memory: each is loaded, converted, written and
/// dropped in turn. `load` is called once per name, widest dtype first, then in the order of the
/// names. The hash is inserted into the header after the last tensor.
///
/// # Errors
/// As [`write_tensors`], and the errors of `load`.
///
/// # Panics
/// If `load` returns a tensor of another shape than planned.
pub fn write_streamed(
    path: &Path,
    mut planned: Vec<Planned>,
    metadata: Metadata<'_>,
    load: &mut dyn FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    planned.sort_by(in_file_order);
    let header = header(path, &planned, metadata)?;
    write_atomically(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())
            .map_err(Error::io(path))?;
        file.write_all(&header).map_err(Error::io(path))?;
        let mut data = Hashed {
            file,
            hash: metadata.hash.map(|_| Sha256::new()),
        };
        for planned in &planned {
            write_planned(&mut data, planned, load, path)?;
        }
        // The hash is known now: it replaces the placeholder in the header.
        let (Some(key), Some(hash)) = (metadata.hash, data.hash) else {
            return Ok(());
        };
        let hash = hash_text(hash);
        file.seek(SeekFrom::Start(hash_place(&header, key)))
            .map_err(Error::io(path))?;
        file.write_all(hash.as_bytes()).map_err(Error::io(path))
    })
}

fn hash_text(hash: Sha256) -> String {
    format!("0x{:x}", hash.finalize())
}

/// Loads a tensor and writes it to the file at `path`.
fn write_planned(
    file: &mut impl Write,
    Planned { name, kind, shape }: &Planned,
    load: &mut dyn FnMut(&str) -> Result<Tensor>,
    path: &Path,
) -> Result<()> {
    let tensor = load(name)?;
    assert_eq!(&tensor.size(), shape, "tensor {name} has the planned shape");
    write_tensor(file, &tensor, *kind).map_err(|error| error.about(path, name))
}

/// Orders tensors as the reference writer does, wider elements first, so that each tensor is
/// aligned to its elements.
fn in_file_order(a: &Planned, b: &Planned) -> Ordering {
    let width = |planned: &Planned| Reverse(planned.kind.elt_size_in_bytes());
    width(a).cmp(&width(b)).then_with(|| a.name.cmp(&b.name))
}

/// Returns the position in the file of the hash under `key`.
fn hash_place(header: &[u8], key: &str) -> u64 {
    let entry = serde_json::json!({ key: NO_HASH }).to_string();
    let entry = entry.trim_matches(['{', '}']).as_bytes();
    let start = header
        .windows(entry.len())
        .position(|window| window == entry);
    let start = start.expect("the header was written with this entry");
    (size_of::<u64>() + start + entry.len() - NO_HASH.len() - 1) as u64
}

/// A writer that hashes the bytes it writes.
struct Hashed<'a, W> {
    file: &'a mut W,
    hash: Option<Sha256>,
}

impl<W: Write> Write for Hashed<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        if let Some(hash) = &mut self.hash {
            hash.update(&bytes[..written]);
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Returns the dtype of a tensor in the file: `kind` if present and both are floating-point,
/// otherwise its own.
pub(crate) fn stored_kind(own: Kind, kind: Option<Kind>) -> Kind {
    let floating = matches!(
        own,
        Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double
    );
    kind.filter(|_| floating).unwrap_or(own)
}

/// Returns the JSON header, padded with spaces so that the data starts at a multiple of 8.
fn header(path: &Path, planned: &[Planned], metadata: Metadata<'_>) -> Result<Vec<u8>> {
    let mut header = serde_json::Map::new();
    let mut texts: BTreeMap<_, _> = metadata.entries.iter().copied().collect();
    if let Some(key) = metadata.hash {
        texts.insert(key, NO_HASH);
    }
    if !texts.is_empty() {
        header.insert("__metadata__".into(), serde_json::json!(texts));
    }
    add_entries(&mut header, planned).map_err(|reason| Error::Invalid {
        what: path.display().to_string(),
        reason,
    })?;
    let mut bytes = serde_json::to_vec(&header).expect("a map of strings and numbers serialises");
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    Ok(bytes)
}

/// Adds the tensors to a header; an error is the reason why one cannot be stored.
fn add_entries(
    header: &mut serde_json::Map<String, serde_json::Value>,
    planned: &[Planned],
) -> std::result::Result<(), String> {
    let mut offset = 0;
    for Planned { name, kind, shape } in planned {
        let Some(dtype) = dtype_name(*kind) else {
            return Err(format!(
                "tensor {name} has dtype {kind:?}, which cannot be stored"
            ));
        };
        let end = offset + shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes();
        let entry =
            serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, end]});
        if header.insert(name.clone(), entry).is_some() {
            return Err(format!("tensor {name} is given twice"));
        }
        offset = end;
    }
    Ok(())
}

enum WriteError {
    Io(io::Error),
    Torch(TchError),
}

impl WriteError {
    fn about(self, path: &Path, name: &str) -> Error {
        match self {
            Self::Io(source) => Error::Io {
                path: path.to_owned(),
                source,
            },
            Self::Torch(source) => Error::Torch {
                doing: format!("{}: writing tensor {name}", path.display()),
                source,
            },
        }
    }
}

fn write_tensor(
    file: &mut impl Write,
    tensor: &Tensor,
    kind: Kind,
) -> std::result::Result<(), WriteError> {
    let tensor = contiguous(tensor, kind).map_err(WriteError::Torch)?;
    file.write_all(bytes_in(&tensor)).map_err(WriteError::Io)
}

/// Returns the bytes that a tensor has in a file of dtype `kind`.
pub(crate) fn bytes_of(tensor: &Tensor, kind: Kind) -> std::result::Result<Vec<u8>, TchError> {
    Ok(bytes_in(&contiguous(tensor, kind)?).to_vec())
}

/// Returns a contiguous tensor of dtype `kind` in CPU memory.
fn contiguous(tensor: &Tensor, kind: Kind) -> std::result::Result<Tensor, TchError> {
    tensor
        .detach()
        .f_to_device(Device::Cpu)?
        .f_to_kind(kind)?
        .f_contiguous()
}

/// Returns the bytes of a contiguous tensor in CPU memory.
fn bytes_in(tensor: &Tensor) -> &[u8] {
    let num_bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if num_bytes == 0 {
        return &[];
    }
    assert!(tensor.is_contiguous() && tensor.device() == Device::Cpu);
    // SAFETY: a contiguous CPU tensor has `num_bytes` initialised bytes at its data pointer, and
    // `tensor` outlives the slice. The format is little-endian, like all machines that libtorch is
    // published for.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>(), num_bytes) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn written(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
        let path = folder.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn a_header_whose_length_looks_like_a_pickle_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        for length in [0x280u64, 0x380, 0x480, 0x580] {
            let padded = format!("{header:width$}", width = length as usize);
            let bytes = [
                &length.to_le_bytes()[..],
                padded.as_bytes(),
                &1.5f32.to_le_bytes(),
            ]
            .concat();
            let file =
                TensorFile::open(&written(folder.path(), "model.safetensors", &bytes)).unwrap();
            assert!(file.tensor("a").unwrap().double_value(&[0]) == 1.5);
        }
    }

    #[test]
    fn round_trips_and_gives_the_same_bytes_in_any_order() {
        let folder = tempfile::tempdir().unwrap();
        let a = Tensor::from_slice(&[1.5f32, -2.0, 3.25, 0.0]).reshape([2, 2]);
        let b = Tensor::from_slice(&[7i64, -1]);
        let c = Tensor::zeros([0, 3], (Kind::Float, Device::Cpu));
        let metadata = [("format", "pt"), ("author", "x"), ("z", "y")];
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        write_tensors(&one, [("a", &a), ("b", &b), ("c", &c)], None, &metadata).unwrap();
        write_tensors(&two, [("c", &c), ("b", &b), ("a", &a)], None, &metadata).unwrap();
        assert_eq!(fs::read(&one).unwrap(), fs::read(&two).unwrap());
        let file = TensorFile::open(&one).unwrap();
        assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(file.metadata()["format"], "pt");
        assert!(file.tensor("a").unwrap().equal(&a) && file.tensor("b").unwrap().equal(&b));
        assert_eq!(file.tensor("c").unwrap().size(), [0, 3]);
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            2,
            "temporary files are gone"
        );
    }

    #[test]
    fn converts_floating_point_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let transposed = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0])
            .reshape([2, 2])
            .tr();
        let ids = Tensor::from_slice(&[3i64]);
        write_tensors(
            &path,
            [("w", &transposed), ("ids", &ids)],
            Some(Kind::BFloat16),
            &[],
        )
        .unwrap();
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(
            (file.kind("w"), file.kind("ids")),
            (Some(Kind::BFloat16), Some(Kind::Int64))
        );
        assert!(
            file.tensor("w")
                .unwrap()
                .to_kind(Kind::Float)
                .equal(&transposed)
        );
    }

    /// Returns a file with this header and `num_bytes` zero bytes of data.
    fn with_header(header: &str, num_bytes: usize) -> Vec<u8> {
        [
            &(header.len() as u64).to_le_bytes()[..],
            header.as_bytes(),
            &vec![0; num_bytes],
        ]
        .concat()
    }

    /// Each file is refused by one line that names it and holds the reason.
    fn refuse(cases: &[(&str, &[u8], &str)]) {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes, reason) in cases {
            let error = TensorFile::open(&written(folder.path(), name, bytes))
                .expect_err(name)
                .to_string();
            assert!(
                error.contains(name) && error.contains(reason),
                "{name}: {error}"
            );
            assert!(
                !error.contains('\n') && error.len() < 800,
                "{name}: {error}"
            );
        }
    }

    #[test]
    fn files_of_another_length_or_kind_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let good = folder.path().join("good");
        write_tensors(&good, [("a", &Tensor::from_slice(&[1f32; 64]))], None, &[]).unwrap();
        let good = fs::read(good).unwrap();
        let mut huge = good.clone();
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        let named = |name: &str| {
            with_header(
                &format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#),
                4,
            )
        };
        refuse(&[
            ("empty", b"", "ends after 0 bytes"),
            ("short", b"\x10\0\0", "ends after 3 bytes"),
            ("truncated header", &good[..20], "20"),
            ("truncated data", &good[..good.len() - 1], "it is truncated"),
            (
                "trailing data",
                &[good.as_slice(), b"x"].concat(),
                "not what its header declares",
            ),
            ("huge header", &huge, "18446744073709551615"),
            (
                "forged lines",
                &named("a\\nerror: all is well"),
                "control characters",
            ),
            ("long name", &named(&"a".repeat(10_000)), "10000 bytes"),
            ("pickle", b"PK\x03\x04rest", "run code"),
            ("old pickle", b"\x80\x02}q\x01", "run code"),
            (
                "pointer",
                b"version https://git-lfs.github.com/spec/v1\noid",
                "git lfs pull",
            ),
        ]);
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let one = |shape: &str, from: usize, to: usize| {
            with_header(
                &format!(
                    r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}}}"#
                ),
                4,
            )
        };
        let two = r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#;
        refuse(&[
            (
                "lying shape",
                &one("[9223372036854775807,4]", 0, 4),
                "overflow",
            ),
            (
                "overflowing shape",
                &one("[18446744073709551615]", 0, 4),
                "overflow",
            ),
            (
                "many dimensions",
                &one(&format!("[{}1]", "1,".repeat(99)), 0, 4),
                "impossible shape",
            ),
            ("backwards", &one("[1]", 4, 0), "offset"),
            ("beyond the end", &one("[1]", 8, 12), "offset"),
            ("hole", &one("[0]", 4, 4), "offset"),
            (
                "overlap",
                &with_header(&format!(r#"{{"a":{{{two}}},"b":{{{two}}}}}"#), 8),
                "offset",
            ),
            (
                "twice",
                &with_header(&format!(r#"{{"a":{{{two}}},"a":{{{two}}}}}"#), 8),
                "it is truncated",
            ),
            ("deep", &with_header(&"[".repeat(100_000), 0), "JSON"),
            (
                "no utf-8",
                &[&8u64.to_le_bytes()[..], &[0xff; 8]].concat(),
                "UTF-8",
            ),
        ]);
    }

    #[test]
    fn the_hash_is_of_everything_behind_the_header() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let (a, b) = (
            Tensor::from_slice(&[1.5f32, -2.0]),
            Tensor::from_slice(&[7i64]),
        );
        let planned = |name: &str, tensor: &Tensor| Planned {
            name: name.into(),
            kind: tensor.kind(),
            shape: tensor.size(),
        };
        let metadata = Metadata {
            entries: &[("format", "pt"), ("z", NO_HASH)],
            hash: Some("the \"hash\""),
        };
        let tensors = vec![planned("a", &a), planned("b", &b)];
        write_streamed(&path, tensors, metadata, &mut |name| {
            Ok(if name == "a" { &a } else { &b }.shallow_clone())
        })
        .unwrap();
        let file = TensorFile::open(&path).unwrap();
        assert!(file.tensor("a").unwrap().equal(&a) && file.tensor("b").unwrap().equal(&b));
        // printf '\7\0\0\0\0\0\0\0\0\0\300\77\0\0\0\300' | sha256sum
        let expected = "0x883e84fa23489c606f1d7f02f7319a4c5e0bf3a062bfc42dbbae97bfba052a0e";
        assert_eq!(file.metadata()["the \"hash\""], expected);
        assert_eq!(
            file.metadata()["z"],
            NO_HASH,
            "only its own entry is filled in"
        );
    }
}
