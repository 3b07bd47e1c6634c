//! The packed data set on disk: manifest, block table, buckets, records, and the bytes of a shard.

pub mod annotation;
pub mod annotation_rows;
pub mod annotation_table;
pub mod block_table;
pub mod bucket;
pub mod crop;
pub mod manifest;
pub mod record;
pub mod shard;
pub(crate) mod text_shard;
