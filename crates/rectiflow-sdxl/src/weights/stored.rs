//! Tensors in files, under the names that a model takes them by, in diffusers' shapes.
//!
//! The shards of a folder and a single-file checkpoint are the same here: each name has a file, a
//! name in that file, and the conversion of the tensor read. Tensors are read on request.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result},
    weights::{keys::Form, tensor_file::TensorFile},
};

/// Named tensors in files.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    index: BTreeMap<String, StoredTensor>,
    files: Vec<Arc<TensorFile>>,
}

/// The place of a tensor, and its form there.
#[derive(Debug)]
struct StoredTensor {
    file: usize,
    name: String,
    form: Form,
}

impl Stored {
    /// Opens files (shards) with all their tensors, under their own names.
    pub(crate) fn open(paths: &[PathBuf]) -> Result<Self> {
        let mut stored = Self::default();
        for path in paths {
            let file = stored.add_file(Arc::new(TensorFile::open(path)?));
            let names: Vec<String> = stored.files[file].names().map(str::to_owned).collect();
            for name in names {
                stored.add(name.clone(), file, name, Form::Same);
            }
        }
        Ok(stored)
    }

    /// Adds a file without its tensors, and returns its index.
    pub(crate) fn add_file(&mut self, file: Arc<TensorFile>) -> usize {
        self.files.push(file);
        self.files.len() - 1
    }

    /// Adds the tensor `stored` in a file under the name `name`.
    pub(crate) fn add(&mut self, name: String, file: usize, stored: String, form: Form) {
        self.index.insert(
            name,
            StoredTensor {
                file,
                name: stored,
                form,
            },
        );
    }

    /// Renames every tensor.
    pub(crate) fn rename(&mut self, rename: impl Fn(&str) -> String) {
        for (name, place) in std::mem::take(&mut self.index) {
            self.index.insert(rename(&name), place);
        }
    }

    /// Drops the constants that older programs store with the weights: position ids.
    pub(crate) fn drop_constants(&mut self) {
        self.index.retain(|name, _| !is_constant(name));
    }

    /// Returns the names, sorted.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// Returns the paths of the files, for messages.
    pub(crate) fn description(&self) -> String {
        let mut paths = Vec::new();
        for file in &self.files {
            paths.push(file.path().display().to_string());
        }
        paths.join(", ")
    }

    /// Returns a tensor's shape in diffusers' layout; `None` if there is no such tensor or its
    /// shape cannot be converted.
    pub(crate) fn shape(&self, name: &str) -> Option<Vec<i64>> {
        let place = self.index.get(name)?;
        place
            .form
            .diffusers_shape(self.files[place.file].shape(&place.name)?)
    }

    /// Returns a tensor's dtype; `None` if there is no such tensor or libtorch lacks the dtype.
    pub(crate) fn kind(&self, name: &str) -> Option<Kind> {
        let place = self.index.get(name)?;
        self.files[place.file].kind(&place.name)
    }

    /// Returns a copy of a tensor, in its own dtype and diffusers' shape.
    pub(crate) fn load(&self, name: &str) -> Result<Tensor> {
        let Some(place) = self.index.get(name) else {
            let what = format!("{}: {name}", self.description());
            return Err(Error::input(what, "a tensor", "none of that name"));
        };
        let tensor = self.files[place.file].tensor(&place.name)?;
        let path = self.files[place.file].path().display();
        in_diffusers_form(tensor, place.form)
            .map_err(Error::torch(format!("{path}: converting {}", place.name)))
    }

    /// Returns a tensor's file and its name there, if it needs no conversion of its shape.
    pub(crate) fn place_as_is(&self, name: &str) -> Option<(&Arc<TensorFile>, &str)> {
        let place = self
            .index
            .get(name)
            .filter(|place| place.form == Form::Same)?;
        Some((&self.files[place.file], &place.name))
    }

    /// Removes a tensor from the index.
    pub(crate) fn forget(&mut self, name: &str) {
        self.index.remove(name);
    }
}

/// Returns true for the name of a constant that some programs store among CLIP's weights.
pub(crate) fn is_constant(name: &str) -> bool {
    name.ends_with("position_ids")
}

/// Returns a single file's tensor in diffusers' shape.
fn in_diffusers_form(tensor: Tensor, form: Form) -> std::result::Result<Tensor, tch::TchError> {
    let made = match form {
        Form::Same => return Ok(tensor),
        Form::Transposed => tensor.f_tr()?,
        Form::Pointwise => {
            let size = tensor.size();
            tensor.f_reshape(&size[..2])?
        }
        Form::Stacked { index, of } => {
            let rows = tensor.size()[0] / of as i64;
            tensor.f_narrow(0, index as i64 * rows, rows)?
        }
    };
    made.f_contiguous()
}
