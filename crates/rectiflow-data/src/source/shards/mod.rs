//! Sources whose pictures stand in shards: tar, Parquet, MDS. They are read where they are, locally
//! or at a URL; nothing is unpacked or copied.

pub(crate) mod files;
pub(crate) mod mds;
pub(crate) mod members;
pub(crate) mod parquet_listing;
pub(crate) mod parquet_pictures;
pub(crate) mod row_texts;
pub(crate) mod shard;
pub(crate) mod tar_headers;
pub(crate) mod tar_index;
pub(crate) mod tars;
