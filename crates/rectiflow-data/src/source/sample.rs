//! A picture of a source: its address, where its bytes are, and where its texts are.

use std::fs::File;

use crate::source::{names::Sidecar, rows::Span};

/// A picture that a source lists, with its address and the sources of its text.
#[derive(Debug)]
pub struct Sample {
    /// Its address: the path in the folder, `SHARD/MEMBER` in a tar, `SHARD#ROW` in Parquet and
    /// MDS, always with `/` between its parts and relative to what was prepared.
    pub(crate) path: String,
    pub(crate) place: Place,
    pub(crate) sidecars: Box<[Sidecar]>,
    pub(crate) lines: Box<[Line]>,
    /// The hash that the source has for the picture.
    pub(crate) sha256: Option<Box<[u8; 32]>>,
    /// Width and height that an index says; 0 where none does.
    pub(crate) listed_px: [u32; 2],
}

impl Sample {
    /// The address of the picture: what the packed row keeps.
    pub fn address(&self) -> &str {
        &self.path
    }

    /// Bytes of the picture, if the source knows them without reading it.
    pub fn size_bytes(&self) -> Option<u64> {
        match self.place {
            Place::File | Place::Row { .. } | Place::Object { version: 0, .. } => None,
            Place::Bytes { bytes, .. } | Place::Object { bytes, .. } => Some(bytes),
        }
    }

    /// SHA-256 of the picture, if the source has it.
    pub fn sha256(&self) -> Option<&[u8; 32]> {
        self.sha256.as_deref()
    }
}

/// Where the bytes of a picture are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// A file of its own, at its address.
    File,
    /// An object of its own at a URL. Both are 0 if no listing says them.
    Object {
        bytes: u64,
        /// Changes when the object does.
        version: u64,
    },
    /// Consecutive bytes of a shard.
    Bytes {
        shard: u32,
        offset: u64,
        bytes: u64,
        /// Whether only an index says so: the tar's own header is compared when it is read.
        by_index: bool,
    },
    /// A cell of a Parquet file, by its row from 0.
    Row { shard: u32, row: u64 },
}

/// A row of a table, in the order of precedence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Line {
    pub(crate) table: u32,
    pub(crate) number: u64,
    pub(crate) span: Span,
}

/// A table of metadata: its path, and the file with its rows as JSON.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) path: String,
    pub(crate) file: Option<File>,
}
