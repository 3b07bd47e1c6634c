//! What the listing of a source finds, whatever its kind.

use std::sync::Arc;

use crate::{
    reject::Remark,
    source::{
        rows::RowFile,
        sample::{Sample, Table},
        shards::{parquet_pictures::Pictures, shard::Shard},
    },
};

/// The samples of a source.
#[derive(Debug)]
pub(crate) struct Listing {
    /// In a fixed order: by name, and in a shard by place.
    pub(crate) samples: Vec<Sample>,
    pub(crate) remarks: Vec<Remark>,
    /// Notes about what is used all the same.
    pub(crate) notes: Vec<Remark>,
    pub(crate) tables: Vec<Table>,
    /// The rows of tables that are not JSON lines.
    pub(crate) row_file: RowFile,
    /// The files that hold samples. None of a folder of pictures.
    pub(crate) shards: Vec<Arc<Shard>>,
    /// Of Parquet the reader of each shard.
    pub(crate) pictures: Vec<Pictures>,
}

impl Listing {
    /// An empty listing.
    pub(crate) fn new(row_file: RowFile) -> Self {
        Self {
            samples: Vec::new(),
            remarks: Vec::new(),
            notes: Vec::new(),
            tables: Vec::new(),
            row_file,
            shards: Vec::new(),
            pictures: Vec::new(),
        }
    }
}
