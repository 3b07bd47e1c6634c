//! Tensors that are a file's bytes: not copied into memory of their own, but looked at where the system maps them.
//!
//! A model opened so takes the memory of what it is calculating with: the system reads pages when they are needed, and
//! they are given back when a block is done ([`Mapped::release_pages`]). Such tensors can be read and not written: the map
//! is read-only, and a write would end the process. So they are for drawing, on a CPU, where the file has the dtype that
//! is calculated in.

use std::{collections::BTreeMap, sync::Arc};

use crate::weights::tensor_file::TensorFile;

/// Which of a model's tensors are mapped, and where, by their names in the model.
#[derive(Debug, Default)]
pub(crate) struct Mapped(BTreeMap<String, (Arc<TensorFile>, String)>);

impl Mapped {
    /// Notes that the model's tensor `name` is `stored` in a file.
    pub(crate) fn insert(&mut self, name: &str, file: Arc<TensorFile>, stored: &str) {
        self.0.insert(name.to_owned(), (file, stored.to_owned()));
    }

    /// Whether no tensor is mapped.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes the pages of the tensors whose names begin with `prefix` out of this process's memory. They stay in the
    /// system's cache for as long as it has room, and come back when they are looked at.
    pub(crate) fn release_pages(&self, prefix: &str) {
        let from_here = self.0.range(prefix.to_owned()..);
        for (_, (file, stored)) in from_here.take_while(|(name, _)| name.starts_with(prefix)) {
            file.release_pages(stored);
        }
    }
}
