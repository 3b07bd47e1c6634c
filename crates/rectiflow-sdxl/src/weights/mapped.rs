//! Tensors that are views of a memory-mapped file instead of copies.
//!
//! A model opened this way occupies only the memory of the weights in use: the system reads pages
//! on access, and they are released after each block ([`Mapped::release_pages`]). Such tensors are
//! read-only, and a write would end the process. They serve sampling on a CPU, from files that have
//! the dtype of the calculation.

use std::{collections::BTreeMap, sync::Arc};

use crate::weights::tensor_file::TensorFile;

/// The mapped tensors of a model: their file and their name there, by their names in the model.
#[derive(Debug, Default)]
pub(crate) struct Mapped(BTreeMap<String, (Arc<TensorFile>, String)>);

impl Mapped {
    /// Records that the model's tensor `name` is `stored` in a file.
    pub(crate) fn insert(&mut self, name: &str, file: Arc<TensorFile>, stored: &str) {
        self.0.insert(name.to_owned(), (file, stored.to_owned()));
    }

    /// Returns true if no tensor is mapped.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Releases the pages of the tensors whose names begin with `prefix` from this process's
    /// memory. They stay in the system's cache while it has room, and return on the next access.
    pub(crate) fn release_pages(&self, prefix: &str) {
        let from_here = self.0.range(prefix.to_owned()..);
        for (_, (file, stored)) in from_here.take_while(|(name, _)| name.starts_with(prefix)) {
            file.release_pages(stored);
        }
    }
}
