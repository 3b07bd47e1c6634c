//! The tensors of a component as bytes, for hashes that identify weights.
//!
//! A folder's files are visited as they are. A single file's tensors are visited in the form that
//! an import writes, so a file and the folder imported from it have one hash.

use std::path::Path;

use tch::Kind;

use crate::{
    error::{Error, Result},
    files::{folder, single_file::SingleFile},
    weights::{
        component::Component,
        tensor_file::{TensorFile, bytes_of},
    },
};

/// Receives the name, dtype, shape and little-endian bytes of a tensor.
pub type Visit<'a> = dyn FnMut(&str, Kind, &[i64], &[u8]) + 'a;

/// Visits all tensors of a component in the order of their names. `place` is the component's
/// folder, or a single-file checkpoint.
///
/// # Errors
/// [`Error::Missing`], [`Error::Io`] or [`Error::Malformed`] for unusable weights.
pub fn visit_weights(component: Component, place: &Path, visit: &mut Visit<'_>) -> Result<()> {
    if place.is_file() {
        visit_file(component, place, visit)
    } else {
        visit_folder(component, place, visit)
    }
}

fn visit_folder(component: Component, folder: &Path, visit: &mut Visit<'_>) -> Result<()> {
    let mut files = Vec::new();
    for path in folder::weight_files(component, folder)? {
        files.push(TensorFile::open(&path)?);
    }
    let mut tensors: Vec<(&str, &TensorFile)> = Vec::new();
    for file in &files {
        tensors.extend(file.names().map(|name| (name, file)));
    }
    tensors.sort_unstable_by_key(|(name, _)| *name);
    for (name, file) in tensors {
        let parts = (file.kind(name), file.shape(name), file.bytes(name));
        let (Some(kind), Some(shape), Some(bytes)) = parts else {
            let dtype = file.dtype_name(name);
            return Err(Error::Malformed {
                path: file.path().to_owned(),
                kind: "model",
                reason: format!("tensor {name} has dtype {dtype}, which is not supported"),
            });
        };
        visit(name, kind, shape, bytes);
    }
    Ok(())
}

fn visit_file(component: Component, path: &Path, visit: &mut Visit<'_>) -> Result<()> {
    let (_, stored) = SingleFile::open(path)?.take(component)?;
    for name in stored.names() {
        let tensor = stored.load(name)?;
        let kind = stored.kind(name).unwrap_or_else(|| tensor.kind());
        let bytes = bytes_of(&tensor, kind).map_err(Error::torch(format!(
            "{}: reading tensor {name}",
            path.display()
        )))?;
        visit(name, kind, &tensor.size(), &bytes);
    }
    Ok(())
}
