//! safetensors files: read through a memory map, written as a stream, one tensor in memory at a time.
//!
//! The header is parsed and validated by the `safetensors` crate (sizes, offsets, no gaps, no overlaps); the bytes are
//! touched only when a tensor is asked for. Writing is done here rather than by that crate, because its metadata is a
//! hash map, whose order differs between runs: the bytes written here depend on nothing but the tensors. A written file
//! appears under its name only when it is whole and on disk.
//!
//! Not here: what the names mean (`weights`, `keys`).

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// What a valid file must be, in messages.
const KIND: &str = "safetensors file";

/// An open safetensors file.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<i64>,
    start: usize,
    end: usize,
}

impl TensorFile {
    /// Opens a file and validates its header. The file must not be changed while it is open: it is memory-mapped.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::Malformed`] if it is not a safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is read-only and private to this value. Another process truncating the file would end this
        // one with SIGBUS, as for every program that maps its input.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let malformed = |reason| Error::Malformed { path: path.to_owned(), kind: KIND, reason };
        if map.starts_with(b"PK\x03\x04") || map.starts_with(b"\x80\x02") {
            return Err(malformed(
                "this is a pickle, which can run code when it is opened; convert it to safetensors with a tool you \
                 trust"
                    .into(),
            ));
        }
        let (header_bytes, header) = SafeTensors::read_metadata(&map).map_err(|e| malformed(e.to_string()))?;
        let data_start = header_bytes + size_of::<u64>();
        let mut entries = BTreeMap::new();
        for (name, info) in header.tensors() {
            let shape = info.shape.iter().map(|&n| i64::try_from(n)).collect::<std::result::Result<Vec<_>, _>>();
            let shape = shape.map_err(|_| malformed(format!("tensor {name} has an impossible shape")))?;
            let (start, end) = (data_start + info.data_offsets.0, data_start + info.data_offsets.1);
            entries.insert(name, Entry { dtype: info.dtype, shape, start, end });
        }
        if entries.values().any(|entry| entry.end > map.len()) {
            return Err(malformed(format!("the file ends after {} bytes, before its tensors do", map.len())));
        }
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(Self { path: path.to_owned(), map, entries, metadata })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of its tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The `__metadata__` of its header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// The dtype of a tensor, where libtorch has it.
    pub fn kind(&self, name: &str) -> Option<Kind> {
        self.entries.get(name).and_then(|entry| kind_of(entry.dtype))
    }

    /// The raw little-endian bytes of a tensor.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.entries.get(name).map(|entry| &self.map[entry.start..entry.end])
    }

    /// A copy of a tensor in CPU memory, in the dtype of the file.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no such tensor, [`Error::Malformed`] if libtorch lacks its dtype.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let Some(entry) = self.entries.get(name) else {
            let names: Vec<_> = self.names().take(20).collect();
            return Err(Error::Missing {
                path: self.path.clone(),
                what: format!("tensor {name}"),
                hint: format!("the file has {}", names.join(", ")),
            });
        };
        let kind = kind_of(entry.dtype).ok_or_else(|| Error::Malformed {
            path: self.path.clone(),
            kind: KIND,
            reason: format!("tensor {name} has dtype {:?}, which is not supported", entry.dtype),
        })?;
        Tensor::f_from_data_size(&self.map[entry.start..entry.end], &entry.shape, kind)
            .map_err(Error::torch(format!("{}: reading tensor {name}", self.path.display())))
    }
}

/// libtorch's dtype for one of the format's.
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
        _ => return None,
    })
}

/// The format's name for one of libtorch's dtypes.
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

/// Writes tensors as a safetensors file: beside its place, synced, then renamed. The same tensors and metadata give the
/// same bytes, whatever order they come in. `kind` converts floating-point tensors; others keep their dtype.
///
/// # Errors
/// [`Error::Io`] if the disk refuses (nothing is left under `path`), [`Error::Invalid`] for a dtype the format lacks or
/// a name given twice.
pub fn write_tensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    kind: Option<Kind>,
    metadata: &[(&str, &str)],
) -> Result<()> {
    let tensors: Vec<(&str, &Tensor)> = tensors.into_iter().collect();
    let planned = tensors.iter().map(|(name, tensor)| Planned {
        name: (*name).to_owned(),
        kind: stored_kind(tensor.kind(), kind),
        shape: tensor.size(),
    });
    let planned = planned.collect();
    let tensors: BTreeMap<&str, &Tensor> = tensors.into_iter().collect();
    write_streamed(path, planned, metadata, &mut |name| Ok(tensors[name].shallow_clone()))
}

/// A tensor of a file to be written, before it is loaded.
#[derive(Debug, Clone)]
pub struct Planned {
    /// Its name in the file.
    pub name: String,
    /// Its dtype in the file.
    pub kind: Kind,
    /// Its shape in the file.
    pub shape: Vec<i64>,
}

/// As [`write_tensors`], for more tensors than memory holds: each is loaded when its turn comes, converted, written and
/// dropped. `load` is asked once for every name, widest dtype first, then in the order of the names.
///
/// # Errors
/// As [`write_tensors`], and what `load` returns.
///
/// # Panics
/// If `load` gives a tensor of another shape than planned.
pub fn write_streamed(
    path: &Path,
    mut planned: Vec<Planned>,
    metadata: &[(&str, &str)],
    load: &mut dyn FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    // Wider elements first, as the reference writer does, so that every tensor is aligned to its own element.
    planned.sort_by(|a, b| {
        let width = |planned: &Planned| std::cmp::Reverse(planned.kind.elt_size_in_bytes());
        (width(a), &a.name).cmp(&(width(b), &b.name))
    });
    let header = header(path, &planned, metadata)?;
    write_atomically(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(Error::io(path))?;
        file.write_all(&header).map_err(Error::io(path))?;
        for Planned { name, kind, shape } in &planned {
            let tensor = load(name)?;
            assert_eq!(&tensor.size(), shape, "tensor {name} is loaded as it was planned");
            write_tensor(file, &tensor, *kind).map_err(|e| match e {
                WriteError::Io(source) => Error::Io { path: path.to_owned(), source },
                WriteError::Torch(source) => {
                    Error::Torch { doing: format!("{}: writing tensor {name}", path.display()), source }
                }
            })?;
        }
        Ok(())
    })
}

/// The dtype a tensor is stored in: `kind` if that is given and both are floating point, else its own.
pub(crate) fn stored_kind(own: Kind, kind: Option<Kind>) -> Kind {
    let floating = matches!(own, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double);
    kind.filter(|_| floating).unwrap_or(own)
}

/// The JSON header, padded with spaces so that the data starts at a multiple of 8.
fn header(path: &Path, planned: &[Planned], metadata: &[(&str, &str)]) -> Result<Vec<u8>> {
    let invalid = |reason| Error::Invalid { what: path.display().to_string(), reason };
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        let metadata: BTreeMap<_, _> = metadata.iter().copied().collect();
        header.insert("__metadata__".into(), serde_json::json!(metadata));
    }
    let mut offset = 0;
    for Planned { name, kind, shape } in planned {
        let dtype = dtype_name(*kind)
            .ok_or_else(|| invalid(format!("tensor {name} has dtype {kind:?}, which cannot be stored")))?;
        let end = offset + shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes();
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, end]});
        if header.insert(name.clone(), entry).is_some() {
            return Err(invalid(format!("tensor {name} is given twice")));
        }
        offset = end;
    }
    let mut bytes = serde_json::to_vec(&header).expect("a map of strings and numbers serialises");
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    Ok(bytes)
}

enum WriteError {
    Io(std::io::Error),
    Torch(tch::TchError),
}

fn write_tensor(file: &mut impl Write, tensor: &Tensor, kind: Kind) -> std::result::Result<(), WriteError> {
    let tensor =
        tensor.detach().f_to_device(Device::Cpu).and_then(|t| t.f_to_kind(kind)).and_then(|t| t.f_contiguous());
    let tensor = tensor.map_err(WriteError::Torch)?;
    let num_bytes = tensor.numel() * kind.elt_size_in_bytes();
    if num_bytes == 0 {
        return Ok(());
    }
    // SAFETY: a contiguous CPU tensor is `num_bytes` initialised bytes at its data pointer, and `tensor` outlives the
    // slice. The format is little-endian, as every machine libtorch is published for.
    let bytes = unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>(), num_bytes) };
    file.write_all(bytes).map_err(WriteError::Io)
}

/// Creates `path` from what `write` writes: into a file beside it first, so that a reader never sees a part and a crash
/// leaves the old file.
///
/// # Errors
/// [`Error::Io`], or whatever `write` returns; the temporary file is removed then.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".tmp-{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let result = write_and_sync(&temporary, write)
        .and_then(|()| fs::rename(&temporary, path).map_err(Error::io(path)))
        .and_then(|()| sync_folder(path));
    if result.is_err() {
        // The first failure is the one to report; a temporary file that stays is only untidy.
        let _ = fs::remove_file(&temporary);
    }
    result
}

fn write_and_sync(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(Error::io(path))?);
    write(&mut file)?;
    file.flush().map_err(Error::io(path))?;
    file.get_ref().sync_all().map_err(Error::io(path))
}

/// Makes the rename itself survive a power cut.
fn sync_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
        let path = folder.join(name);
        fs::write(&path, bytes).unwrap();
        path
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
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "temporary files are gone");
    }

    #[test]
    fn converts_floating_point_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let transposed = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0]).reshape([2, 2]).tr();
        let ids = Tensor::from_slice(&[3i64]);
        write_tensors(&path, [("w", &transposed), ("ids", &ids)], Some(Kind::BFloat16), &[]).unwrap();
        let file = TensorFile::open(&path).unwrap();
        assert_eq!((file.kind("w"), file.kind("ids")), (Some(Kind::BFloat16), Some(Kind::Int64)));
        assert!(file.tensor("w").unwrap().to_kind(Kind::Float).equal(&transposed));
    }

    #[test]
    fn hostile_files_give_one_line_errors() {
        let folder = tempfile::tempdir().unwrap();
        let good = folder.path().join("good");
        write_tensors(&good, [("a", &Tensor::from_slice(&[1f32; 64]))], None, &[]).unwrap();
        let good = fs::read(good).unwrap();
        let mut huge = good.clone();
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        let lie = br#"{"a":{"dtype":"F32","shape":[9223372036854775807,4],"data_offsets":[0,4]}}"#;
        let mut lying = (lie.len() as u64).to_le_bytes().to_vec();
        lying.extend_from_slice(lie);
        let cases: [(&str, &[u8]); 8] = [
            ("empty", b""),
            ("short", b"\x10\0\0"),
            ("truncated header", &good[..20]),
            ("truncated data", &good[..good.len() - 1]),
            ("trailing data", &[good.as_slice(), b"x"].concat()),
            ("huge header", &huge),
            ("lying shape", &lying),
            ("pickle", b"PK\x03\x04rest"),
        ];
        for (name, bytes) in cases {
            let error = TensorFile::open(&written(folder.path(), name, bytes)).expect_err(name).to_string();
            assert!(error.contains(name) && !error.contains('\n'), "{name}: {error}");
        }
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path(), "kept", b"old");
        let fails = write_atomically(&path, |file| {
            file.write_all(b"new").unwrap();
            Err(Error::Invalid { what: "x".into(), reason: "y".into() })
        });
        assert!(fails.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
