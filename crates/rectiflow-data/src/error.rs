//! Everything that can go wrong between a folder of images and a batch, by meaning.

use std::{fmt, io, ops::Range, path::PathBuf};

/// A failure of this crate. Each message says what, where, what was expected and found, and what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file is not what its specification says.
    #[error("{}: not a valid {kind}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it should have been, e.g. "manifest".
        kind: &'static str,
        /// The first rule it breaks, with expected and found values.
        reason: String,
    },
    /// Bytes changed since they were written.
    #[error(
        "{}: bytes {}..{} are damaged: expected checksum {expected:016x}, found {found:016x}; \
         restore the file from a copy or prepare the data set again",
        path.display(), range.start, range.end
    )]
    Damaged {
        /// The object.
        path: PathBuf,
        /// The damaged bytes.
        range: Range<u64>,
        /// XXH3-64 in the manifest.
        expected: u64,
        /// XXH3-64 of the bytes read.
        found: u64,
    },
    /// An object store could not or would not give what was asked of it.
    #[error("{object}{}: {reason}", BytesOf(range))]
    Remote {
        /// The object's URL.
        object: String,
        /// The bytes that were asked for; none for a whole object.
        range: Option<Range<u64>>,
        /// Requests that were made for them.
        attempts: u32,
        /// The store says that there is no such object.
        missing: bool,
        /// The last failure, and what to do.
        reason: String,
    },
    /// A setting or a combination of settings that cannot work.
    #[error("{what}: {reason}")]
    Invalid {
        /// The setting, as the user writes it.
        what: String,
        /// Why not, and what would do.
        reason: String,
    },
    /// The VAE's encoder failed.
    #[error("encoding {num_images} images of {width_px}x{height_px} px failed: {reason}")]
    Encode {
        /// Images in the batch.
        num_images: usize,
        /// Width of the bucket.
        width_px: u32,
        /// Height of the bucket.
        height_px: u32,
        /// The encoder's words.
        reason: String,
    },
}

/// A range in a message, where there is one.
struct BytesOf<'a>(&'a Option<Range<u64>>);

impl fmt::Display for BytesOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |range| write!(f, ", bytes {}..{}", range.start, range.end))
    }
}

/// What this crate's functions return.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Whether an object store has answered that an object is not there.
    pub(crate) fn is_missing_object(&self) -> bool {
        matches!(self, Self::Remote { missing: true, .. })
    }

    /// An [`Error::Io`] about `path`, for `map_err`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
