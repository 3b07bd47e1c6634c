//! The packed data set on disk: manifest and block table, buckets, records, the bytes of a shard.

pub mod block_table;
pub mod bucket;
pub mod manifest;
pub mod record;
pub mod shard;
pub(crate) mod text_shard;
